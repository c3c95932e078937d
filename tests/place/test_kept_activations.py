"""Selective, kept blocks, offload and tiles: what is kept changes, gradients do not."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from kept_models import SHAPE, forward, gradients, make
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nibble.nn.tiles import Tiled, feed_forward
from nibble.place import activations, kept_attention, offload
from nibble.place.activations import Activations, Checkpointed
from nibble.place.offload import HostPool, is_dense
from nibble.spec.activations import Work, attention_output_bytes, input_bytes
from nibble.spec.arch import from_config
from nibble.spec.checkpointing import Keeping, keeping
from nibble.spec.config import Train

NONE = Activations(policy="none")
EXACT = {
    "full": Activations(),
    "selective": Activations(policy="selective"),
    "keep_blocks": Activations(keep_blocks=3),
    "more than all": Activations(keep_blocks=9),
    "offload": Activations(offload=True),
    "all of it": Activations(policy="selective", offload=True, keep_blocks=1),
}


@pytest.mark.parametrize("settings", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradients_are_those_of_none(settings: Activations, packed: bool, dropout: float) -> None:
    expected = gradients(make(NONE, dropout=dropout)[0], packed=packed)
    found = gradients(make(settings, dropout=dropout)[0], packed=packed)
    assert len(found) == 2 * 7 * 4
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("settings", ["selective", "all of it"])
def test_attention_of_others_is_watched_or_computed_again(attention: str, settings: str) -> None:
    words = {"attention": attention, "fused": False, "quant": False}
    expected = gradients(make(NONE, **words)[0])
    found = gradients(make(EXACT[settings], **words)[0])
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("attention", ["nibble_packed", "sdpa"])
def test_fused_attention_runs_once(attention: str) -> None:
    counts = {}
    for name in ("full", "selective"):
        model, _ = make(EXACT[name], attention=attention)
        loss = forward(model, length=64, packed=False)
        with Counted() as seen:
            loss.backward()
        counts[name] = [seen.names.count(f"{FUSED}{end}") for end in ("", "_backward")]
    blocks = SHAPE["num_hidden_layers"]
    assert counts == {"full": [blocks, blocks], "selective": [0, blocks]}


FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"


class Counted(TorchDispatchMode):
    """Names of the operations that reach a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_attention_with_dropout_is_computed_again() -> None:
    shape = {**SHAPE, "attention_dropout": 0.3}
    expected = gradients(make(NONE, shape=shape)[0])
    found = gradients(make(EXACT["all of it"], shape=shape)[0])
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_custom_operation_counts_as_attention_by_its_name() -> None:
    library = torch.library.Library("nibble_test", "DEF")
    library.define("_varlen_attn(Tensor x) -> Tensor")
    library.define("_varlen_attn_backward(Tensor x) -> Tensor")
    operations = torch.ops.nibble_test
    assert kept_attention.is_attention(operations._varlen_attn.default)
    assert not kept_attention.is_attention(operations._varlen_attn_backward.default)
    assert not kept_attention.is_attention(torch.ops.aten.mm.default)


# What is kept ---------------------------------------------------------------------------------


def priced(train: Train, *, tokens: int, length: int) -> Keeping:
    shape = from_config({"model_type": "llama", **SHAPE})
    names = frozenset(p.module for p in shape.parameters if p.kind == "linear")
    work = Work(
        tokens=tokens, row_length=length, element=4, adapted=names, rank=4, cast=False, fused=True,
        mlp_tile_tokens=train.mlp_tile_tokens,
    )  # fmt: skip
    return keeping(shape, work, train)


SETTINGS = {
    "full": {},
    "selective": {"activation_checkpointing": "selective"},
    "keep 2": {"keep_blocks": 2},
    "offload": {"activation_offload": True},
    "selective, offload": {"activation_checkpointing": "selective", "activation_offload": True},
}


class Saved:
    """Bytes that autograd saves outside of checkpointed blocks, whose own hooks hide what they
    save."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.storages: dict[int, Tensor] = {}
        self.inside = False

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if self.inside and storage.data_ptr() not in self.weights:
            self.storages[storage.data_ptr()] = tensor
        return tensor

    @property
    def bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.storages.values())


@pytest.mark.parametrize("words", SETTINGS.values(), ids=SETTINGS)
def test_the_plan_counts_what_is_kept(
    words: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs and attention's outputs by their holders, kept blocks by what autograd saves."""
    monkeypatch.setattr(kept_attention, "MIN_BYTES", 0)  # here log-sum-exps are too small to move
    train = Train(**words)  # type: ignore[arg-type]
    model, done = make(Activations.of(train))
    saved, kept = Saved(model), Keeper()
    for block in list(model.model.layers)[done.num_recomputed :]:
        block.register_forward_pre_hook(lambda *_: setattr(saved, "inside", True))
        block.register_forward_hook(lambda *_: setattr(saved, "inside", False))
    with kept, torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t):
        loss = forward(model, length=512, packed=False)
    planned = priced(train, tokens=1024, length=512)
    assert kept.device_bytes + saved.bytes == pytest.approx(planned.forward_ends, rel=0.005)
    assert kept.host_bytes == done.host_bytes == planned.host
    loss.backward()
    assert done.host_bytes == planned.host


class Keeper:
    """Watches what blocks that compute again hold, by wrapping the classes that hold it."""

    def __init__(self) -> None:
        self.device_bytes = 0
        self.host_bytes = 0

    def __enter__(self) -> Keeper:
        self.patch = pytest.MonkeyPatch()
        made, put, value = activations._Input.__init__, offload.Parked.put, kept_attention.Kept._put

        def remembered(this: activations._Input, hidden: Tensor, sent: object) -> None:
            made(this, hidden, sent)  # type: ignore[arg-type]
            if this._here is not None:
                self.device_bytes += hidden.numel() * hidden.element_size()

        def parked(this: offload.Parked, tensor: Tensor) -> int:
            self.host_bytes += tensor.numel() * tensor.element_size()
            return put(this, tensor)

        def kept(this: kept_attention.Kept, output: object) -> object:
            found = value(this, output)
            if isinstance(found, Tensor):
                self.device_bytes += found.numel() * found.element_size()
            return found

        self.patch.setattr(activations._Input, "__init__", remembered)
        self.patch.setattr(offload.Parked, "put", parked)
        self.patch.setattr(kept_attention.Kept, "_put", kept)
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


# The pool ----------------------------------------------------------------------------------------


def test_the_pool_is_as_large_as_the_longest_pass_and_is_used_again() -> None:
    model, done = make(Activations(offload=True))
    one = 2 * 4 * 64
    for length, longest in ((300, 300), (200, 300), (513, 513), (513, 513)):
        gradients(model, lengths=(length,))
        assert done.host_bytes == 3 * one * longest  # the last block's input stays
    pool = next(iter(done.pools.values()))
    assert len(pool._free) == 3


def test_two_graphs_at_once_and_one_that_is_dropped() -> None:
    expected = gradients(make(NONE)[0], lengths=(600, 300))
    model, done = make(Activations(policy="selective", offload=True))
    torch.manual_seed(3)
    first = forward(model, length=600, packed=False, seed=0)
    second = forward(model, length=300, packed=False, seed=1)
    forward(model, length=400, packed=False, seed=2)  # never walked
    second.backward()
    first.backward()
    found = [p.grad for p in model.parameters() if p.requires_grad]
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    del first, second
    gc.collect()
    pool = next(iter(done.pools.values()))
    assert sum(buffer.num_bytes for buffer in pool._free) == done.host_bytes


def test_evaluation_sends_nothing() -> None:
    model, done = make(Activations(policy="selective", offload=True))
    with torch.no_grad():
        forward(model, length=600, packed=False)
    assert done.host_bytes == 0


@pytest.mark.parametrize("ahead", [True, False])
def test_tensors_come_back_one_block_ahead(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ahead:
        monkeypatch.setattr(offload, "PREFETCH_MAX_BYTES", 0)
    pool = HostPool(torch.device("cpu"))
    blocks = [pool.begin(is_first=index == 0) for index in range(3)]
    values = [torch.full((4, 5), float(i)).t() for i in range(2)]
    for block, value in zip(blocks, values, strict=False):
        assert block.put(value) == 0
    blocks[2].turn()
    assert list(blocks[1]._arriving) == ([0] if ahead else []) and not blocks[0]._arriving
    assert torch.equal(blocks[1].get(0), values[1]) and not blocks[1]._arriving
    blocks[1].turn()
    assert list(blocks[0]._arriving) == ([0] if ahead else [])
    found = blocks[0].get(0)
    assert torch.equal(found, values[0]) and found.stride() == values[0].stride()
    assert torch.equal(blocks[0].get(0), values[0])  # a graph may be walked twice
    assert pool.num_bytes == 2 * 80


def test_dense_is_without_gaps_in_any_order() -> None:
    x = torch.zeros(2, 3, 4)
    assert is_dense(x) and is_dense(x.transpose(0, 2)) and is_dense(x[:1])
    assert not is_dense(x[:, :2]) and not is_dense(x[:1].expand(2, 3, 4))


# Tiles -------------------------------------------------------------------------------------------

TILED = {
    "none": Activations(policy="none", mlp_tile_tokens=128),
    "full": Activations(mlp_tile_tokens=200),
    "all": Activations(policy="selective", offload=True, keep_blocks=1, mlp_tile_tokens=128),
}


@pytest.mark.parametrize("settings", TILED.values(), ids=TILED)
@pytest.mark.parametrize("quant", [False, True], ids=["16 bit", "nf4"])
def test_tiles_change_nothing_but_the_order_of_sums(settings: Activations, quant: bool) -> None:
    expected = gradients(make(NONE, quant=quant)[0])
    model, done = make(settings, quant=quant)
    assert done.num_tiled == 4
    for a, b in zip(expected, gradients(model), strict=True):
        assert (a - b).norm() <= 3e-6 * a.norm()


def test_tiles_draw_the_same_numbers_again() -> None:
    """With dropout the tiles draw others than the whole; but the same under every policy."""
    found = [
        gradients(make(Activations(policy=policy, mlp_tile_tokens=128), dropout=0.2)[0])
        for policy in ("none", "full")
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_tiles_keep_the_input_and_hold_a_tile() -> None:
    block = make(Activations(policy="none", mlp_tile_tokens=128))[0].model.layers[1]
    x = torch.randn(2, 640, 64, requires_grad=True)
    widths: list[int] = []
    block.mlp.gate_proj.register_forward_hook(lambda _m, i, _o: widths.append(i[0].shape[1]))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = block.mlp(x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]
    y.sum().backward()
    assert widths == [128] * 20


@pytest.mark.parametrize(
    ("name", "found"),
    [("llama", "LlamaMLP"), ("bloom", "BloomMLP"), ("phi", "PhiMLP"), ("gpt_neox", "GPTNeoXMLP"),
     ("opt", None), ("mixtral", None)],
)  # fmt: skip
def test_the_feed_forward_layer_is_found_by_structure(name: str, found: str | None) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    words = {
        "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "intermediate_size": 32, "n_layer": 2, "n_head": 2, "ffn_dim": 32,
        "word_embed_proj_dim": 16, "hidden_dropout": 0.0, "attention_dropout": 0.0, "dropout": 0.0,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **words)).train()
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2]
    module = feed_forward(lists[0][0])
    assert (None if module is None else type(module).__name__) == found
    if module is None:
        return
    ids = torch.randint(32, (2, 40), generator=torch.Generator().manual_seed(1))
    results = []
    for tiled in (False, True):
        for block in lists[0]:
            inner = feed_forward(block)
            assert inner is not None
            if tiled:
                inner.forward = Tiled(inner, inner.forward, 16, False)
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, use_cache=False).logits.pow(2).mean().backward()
        results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_a_plan_of_selective_adds() -> None:
    shape = from_config({"model_type": "llama", **SHAPE})
    work = Work(tokens=64, row_length=64, element=2)
    assert input_bytes(shape, work) == 64 * 64 * 2
    assert attention_output_bytes(shape, work) == 64 * 64 * 2 + 4 * 64 * 4
    assert attention_output_bytes(from_config({"model_type": "bloom", **SHAPE}), work) == 0
    assert Checkpointed().host_bytes == 0
