"""Fast paths equal the plain ones: every family, trained in full and by adapters, with caches."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from fused_models import FAMILIES, ids, loss_and_gradients, make
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from nibble.nn.adapted import Casts
from nibble.nn.adapters import LoraLinear, adapters
from nibble.nn.attention import register
from nibble.nn.fused import FusedAttention, fuse_, together

LAYER_NORMS = ("phi", "bloom", "gpt_neox", "starcoder2")
EACH = pytest.mark.parametrize("family", FAMILIES)


def close(ours: dict[str, Tensor], plain: dict[str, Tensor], *, rtol: float = 1e-5) -> None:
    assert ours.keys() == plain.keys() and ours
    for name, value in plain.items():
        error = (ours[name] - value).norm() / value.norm().clamp_min(1e-12)
        assert error < rtol, (name, float(error))


@EACH
@pytest.mark.parametrize("how", ["full", "lora", "qlora", "some"])
def test_loss_and_gradients_are_those_of_the_plain_model(family: str, how: str) -> None:
    words: dict[str, Any] = {
        "full": {},
        "lora": {"targets": ("all-linear",)},
        "qlora": {"targets": ("all-linear",), "quant": "nf4"},
        "some": {
            "targets": (r".*(q_proj|qkv_proj|query_key_value|down_proj|fc2|4h_to_h|mlp.c_proj)",),
            "quant": "nf4",
        },
    }[how]
    plain, _ = make(family, fused=False, **words)
    fused, summary = make(family, fused=True, **words)
    assert summary is not None and summary.lacking == ()
    assert summary.attentions == summary.mlps == 2 and (summary.norms >= 5 or family in LAYER_NORMS)
    logits, gradients = loss_and_gradients(plain)
    ours, found = loss_and_gradients(fused)
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=2e-6)
    close(found, gradients)


@EACH
def test_bf16_differs_by_rounding_only(family: str) -> None:
    """Both are compared with fp32 arithmetic: the fast path may not be further from it."""
    words = {"targets": ("all-linear",), "quant": "nf4"}
    exact = loss_and_gradients(make(family, fused=False, **words)[0])[1]
    errors = []
    for fused in (False, True):
        model, _ = make(family, fused=fused, dtype=torch.bfloat16, **words)
        found = loss_and_gradients(model)[1]
        assert all(g.dtype == torch.float32 for g in found.values())
        distance = sum((found[n] - g).norm() ** 2 for n, g in exact.items())
        errors.append(float((distance / sum(g.norm() ** 2 for g in exact.values())) ** 0.5))
    assert errors[1] < 1.15 * errors[0] < 0.2


@EACH
def test_generation_with_a_cache_gives_the_same_tokens(family: str) -> None:
    words: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    plain, fused = (make(family, fused=f, targets=("all-linear",))[0].eval() for f in (False, True))
    prompt = ids(1, 6)
    expected = plain.generate(prompt, **words)  # type: ignore[operator]
    assert torch.equal(fused.generate(prompt, **words), expected)  # type: ignore[operator]


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_checkpointed_packed_rows_and_accumulation(family: str) -> None:
    """What a step does: documents in a row, blocks recomputed, gradients of two passes summed."""
    positions = torch.cat([torch.arange(10), torch.arange(14)]).repeat(2, 1)
    results = []
    for fused in (False, True):
        model, _ = make(family, fused=fused, quant="nf4", targets=("all-linear",))
        model.config._attn_implementation = register()
        if fused:
            for block in model.base_model.layers:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        for _ in range(2):
            loss_and_gradients(model, position_ids=positions)
        total = {}
        for _ in range(2):
            logits = model(input_ids=ids(), position_ids=positions, use_cache=False).logits
            logits.square().mean().backward()
        total = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append(total)
    close(results[1], results[0])


def test_dropout_dora_and_hooks_take_each_linear_by_itself() -> None:
    for words in ({"dropout": 0.3}, {"kind": "dora"}):
        results = []
        for fused in (False, True):
            model, _ = make("llama", fused=fused, quant="nf4", targets=("all-linear",), **words)
            model.train()
            torch.manual_seed(5)
            results.append(loss_and_gradients(model)[1])
        close(results[1], results[0])
    model, _ = make("llama", fused=True, quant="nf4", targets=("all-linear",))
    seen = []
    name = next(n for n in adapters(model) if n.endswith("k_proj"))
    model.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
    loss_and_gradients(model)
    assert seen == [1]


def test_the_graph_of_a_gate_is_walked_once() -> None:
    model, _ = make("llama", fused=True)
    loss = model(input_ids=ids(), use_cache=False).logits.square().mean()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"walked twice.*train\.fused_kernels=false"):
        loss.backward()


def test_a_family_without_fast_paths_says_so_and_runs_as_before() -> None:
    config = AutoConfig.for_model(
        "mixtral", vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    before = model(input_ids=ids()).logits
    summary = fuse_(model, model.base_model, dtype=torch.float32)
    assert (summary.norms, summary.mlps, summary.attentions) == (0, 0, 0)
    assert "MixtralAttention" in summary.lacking and "MixtralRMSNorm" in summary.lacking
    assert torch.equal(model(input_ids=ids()).logits, before)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("gpt2", {"resid_pdrop": 0.2, "attn_pdrop": 0.0, "embd_pdrop": 0.0}),
        ("falcon", {"alibi": False, "hidden_dropout": 0.0}),
    ],
)
def test_families_with_a_fast_feed_forward_layer_alone(family: str, words: dict[str, Any]) -> None:
    small = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(family, **small, **words)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config).train()
    fused = copy.deepcopy(plain)
    summary = fuse_(fused, fused.base_model, dtype=torch.float32)
    assert (summary.norms, summary.mlps, summary.attentions) == (0, 2, 0)
    assert any("Attention" in name for name in summary.lacking)
    results = []
    for model in (plain, fused):
        torch.manual_seed(7)
        results.append(loss_and_gradients(model))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=2e-6)
    close(results[1][1], results[0][1])


def test_no_class_is_touched_and_copies_stand_alone() -> None:
    model, _ = make("llama", fused=True, targets=("all-linear",), quant="nf4")
    again = fuse_(model, model.base_model, dtype=torch.float32)
    assert again.norms == 0 and len(model.base_model._forward_pre_hooks) == 1
    twin = copy.deepcopy(model)
    path = vars(twin.base_model.layers[0].self_attn)["forward"]
    assert isinstance(path, FusedAttention)
    assert path.module is twin.base_model.layers[0].self_attn
    fresh, _ = make("llama", fused=False)
    assert "forward" not in vars(fresh.base_model.layers[0].mlp)
    logits, gradients = loss_and_gradients(model)
    ours, found = loss_and_gradients(twin)
    assert torch.equal(ours, logits)
    close(found, gradients)


def test_copies_of_adapters_follow_the_optimiser() -> None:
    """Two bf16 steps with copies equal two without, bit by bit."""
    results = []
    for shared in (True, False):
        words = {"quant": "nf4", "targets": ("all-linear",), "dtype": torch.bfloat16}
        model, _ = make("llama", fused=True, **words)
        if not shared:
            model.base_model._forward_pre_hooks.clear()
        lora = [m for m in model.modules() if isinstance(m, LoraLinear)]
        optimizer = torch.optim.SGD([p for m in lora for p in m.parameters(False)], lr=0.5)
        for _ in range(2):
            logits, _ = loss_and_gradients(model)
            optimizer.step()
        with torch.no_grad():
            after = model(input_ids=ids(), use_cache=False).logits
        results.append((logits, after))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_a_copy_is_used_only_while_it_is_true() -> None:
    module = nn.Module()
    module.a = nn.Parameter(torch.ones(2, 3))
    other = nn.Module()
    other.a = nn.Parameter(torch.ones(1, 3))
    casts = Casts([(module, other)], names=("a",))
    assert casts.of(module.a, torch.bfloat16).data_ptr() != module.a.data_ptr()
    casts.refresh(torch.bfloat16)
    copy_of_a = casts.of(module.a, torch.bfloat16)
    assert casts.of(module.a, torch.bfloat16).data_ptr() == copy_of_a.data_ptr()
    joined = casts.joined([module.a, other.a], torch.bfloat16)
    assert joined.shape == (3, 3) and joined.data_ptr() == copy_of_a.data_ptr()
    with torch.no_grad():
        module.a.add_(1)
    assert torch.equal(casts.of(module.a, torch.bfloat16), module.a.bfloat16())
    expected = torch.cat([module.a, other.a]).bfloat16()
    assert torch.equal(casts.joined([module.a, other.a], torch.bfloat16), expected)
    casts.refresh(torch.bfloat16)
    assert casts.of(module.a, torch.bfloat16).data_ptr() == copy_of_a.data_ptr()
    module.a = nn.Parameter(torch.full((2, 3), 7.0))
    assert torch.equal(casts.of(module.a, torch.bfloat16), module.a.bfloat16())


class Operations(TorchDispatchMode):
    """Counts what would be a kernel on a GPU: views and allocations are none."""

    FREE = (
        "view",
        "as_strided",
        "split",
        "transpose",
        "::t.",
        "slice",
        "expand",
        "empty",
        "detach",
    )
    FREE += ("select", "unsqueeze", "alias", "reshape", "permute", "_local_scalar", "unbind")

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += not any(word in f"{func}" for word in self.FREE)
        return func(*args, **(kwargs or {}))


def test_linears_of_one_input_share_their_adapters_products() -> None:
    model, _ = make("llama", fused=True, targets=("all-linear",), dtype=torch.bfloat16)
    attention = model.base_model.layers[0].self_attn
    linears = [attention.q_proj, attention.k_proj, attention.v_proj]
    counts = []
    for run in (together, lambda parts, x: tuple(part(x) for part in parts)):
        x = torch.randn(2, 5, 32, dtype=torch.bfloat16, requires_grad=True)
        linears[0].casts.refresh(torch.bfloat16)
        with Operations() as operations:
            outputs = run(linears, x)
            torch.autograd.grad(outputs, x, [torch.ones_like(y) for y in outputs])
        counts.append(operations.num)
    # Forward 7 products for 9; backward 10 (3 g B, 3 g W, g_l A) and no sums of gradients.
    assert counts[0] < 0.75 * counts[1], counts
