"""The planner's list of kept tensors against what autograd really keeps, family by family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nibble.models.conv1d import replace_conv1d_
from nibble.nn.adapters import adapt_
from nibble.nn.fused import fuse_
from nibble.nn.quant import quantize_
from nibble.spec.activations import (
    FAST_PATHS,
    Work,
    kept_by_block,
    kept_by_blocks,
)
from nibble.spec.arch import Architecture, from_config
from nibble.spec.arch_families import FAMILIES
from nibble.spec.config import Adapter
from nibble.spec.formats import FormatSpec

ROWS, LENGTH, BLOCKS = 2, 32, 3
TOKENS = ROWS * LENGTH
COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 112,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DROPOUTS = (
    "attention_dropout",
    "hidden_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
)
NO_DROPOUT = dict.fromkeys(DROPOUTS, 0.0)


class Counter:
    """Bytes of distinct storages that autograd saves, by the block that runs; weights excluded."""

    def __init__(self, model: nn.Module) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        self.own = {t.untyped_storage().data_ptr() for t in tensors}
        self.where = "outside"
        self.alive: dict[int, Tensor] = {}
        self.bytes: dict[str, int] = {}
        for index, block in enumerate(blocks(model)):
            block.register_forward_pre_hook(self.enter(str(index)))
            block.register_forward_hook(self.enter("outside"))

    def enter(self, name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            self.where = name

        return hook

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own and storage.data_ptr() not in self.alive:
            self.alive[storage.data_ptr()] = tensor
            self.bytes[self.where] = self.bytes.get(self.where, 0) + storage.nbytes()
        return tensor


def blocks(model: nn.Module) -> list[nn.Module]:
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == BLOCKS]
    return list(lists[0])


def built(name: str) -> tuple[nn.Module, Architecture]:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    words: dict[str, Any] = {**COMMON, **NO_DROPOUT}
    if name == "mixtral":
        words["num_local_experts"] = 4
    if name in ("bert", "roberta"):
        words["is_decoder"] = True
    config = AutoConfig.for_model(name, **words)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.train(), from_config({"model_type": name, **words})


def count(model: nn.Module, *, embeddings_need_grad: bool) -> dict[str, int]:
    counter = Counter(model)
    if embeddings_need_grad:
        table = model.get_input_embeddings()  # type: ignore[operator]
        table.register_forward_hook(
            lambda _m, _i, out: out if out.requires_grad else out.requires_grad_(True)
        )
    ids = torch.randint(3, 90, (ROWS, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda t: t):
        output = model(input_ids=ids, use_cache=False)
    assert output.logits.requires_grad
    return counter.bytes


@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize("everything", [False, True], ids=["frozen", "everything"])
def test_a_block_keeps_what_the_list_says(name: str, everything: bool) -> None:
    model, shape = built(name)
    model.requires_grad_(everything)
    measured = count(model, embeddings_need_grad=True)["1"]
    work = Work(
        tokens=TOKENS,
        row_length=LENGTH,
        element=2,
        everything=everything,
        embedding_trained=True,
    )
    planned = kept_by_block(shape, work, block=1)
    assert sum(planned.values()) == pytest.approx(measured, rel=0.03), planned


@pytest.mark.parametrize("quantised", [False, True], ids=["16 bit", "nf4"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "v_proj")], ids=["all", "qv"])
def test_adapted_llama_keeps_what_the_list_says(
    quantised: bool, kind: str, targets: tuple[str, ...]
) -> None:
    model, shape = built("llama")
    if quantised:
        quantize_(model, FormatSpec(name="nf4", bits=4, block=64))
    adapter = Adapter(kind=kind, rank=4, targets=targets)  # type: ignore[arg-type]
    summary = adapt_(model, adapter, dtype=torch.float32, generator=torch.Generator())
    work = Work(
        tokens=TOKENS,
        row_length=LENGTH,
        element=2,
        adapted=frozenset(summary.targets),
        rank=4,
        dora=kind == "dora",
        cast=kind == "dora",
    )
    measured = count(model, embeddings_need_grad=False)
    for index, planned in enumerate(kept_by_blocks(shape, work)):
        assert sum(planned.values()) == pytest.approx(measured[str(index)], rel=0.05), planned


@pytest.mark.parametrize("name", sorted(FAST_PATHS))
@pytest.mark.parametrize("kind", ["frozen", "everything", "lora"])
def test_fast_paths_keep_what_the_list_says(name: str, kind: str) -> None:
    model, shape = built(name)
    replace_conv1d_(model)
    adapted: tuple[str, ...] = ()
    if kind == "lora":
        words = Adapter(kind="lora", rank=4, targets=("all-linear",))
        summary = adapt_(model, words, dtype=torch.float32, generator=torch.Generator())
        adapted = summary.targets
    else:
        model.requires_grad_(kind == "everything")
    fuse_(model, model.base_model, dtype=torch.bfloat16)
    work = Work(
        tokens=TOKENS,
        row_length=LENGTH,
        element=2,
        everything=kind == "everything",
        embedding_trained=kind != "lora",
        adapted=frozenset(adapted),
        rank=4,
        cast=False,
        fused=True,
    )
    measured = count(model, embeddings_need_grad=kind != "lora")["1"]
    planned = kept_by_block(shape, work, block=1)
    assert sum(planned.values()) == pytest.approx(measured, rel=0.03), planned


def test_packed_rows_repeat_the_key_heads() -> None:
    shape = from_config({"model_type": "llama", **COMMON})
    plain = kept_by_block(shape, Work(tokens=64, row_length=32, element=2), block=1)
    packed = kept_by_block(
        shape, Work(tokens=64, row_length=32, element=2, packed_rows=True), block=1
    )
    assert packed["key"] == 2 * plain["key"]
