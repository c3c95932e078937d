"""BLOOM's fast path: padding on both sides, recomputed blocks, and what takes the plain way."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from fused_models import ids, make
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nibble.nn import fused_alibi
from nibble.nn.fused_alibi import ATTENTIONS
from nibble.numerics.alibi_attention import alibi_attention, alibi_attention_backward

LORA: dict[str, Any] = {"targets": ("query_key_value",), "quant": "int8"}


def inputs(rows: int, tokens: int, heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """qkv as BLOOM's projection lays it, ALiBi of four slopes, padding at both ends."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(rows, tokens, heads, 3, dim, generator=generator, requires_grad=True)
    slopes = torch.rand(heads, 1, generator=generator)
    padding = torch.zeros(rows, tokens)
    padding[0, :3] = padding[-1, -4:] = torch.finfo(torch.float32).min
    return qkv, (slopes * torch.arange(tokens)).expand(rows, -1, -1).contiguous(), padding


def plain_attention(qkv: Tensor, bias: Tensor, padding: Tensor | None, scale: float) -> Tensor:
    """As transformers' BLOOM writes it."""
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(3))
    scores = bias[:, :, None] + scale * (q @ k.mT)
    tokens = qkv.shape[1]
    mask = torch.full((tokens, tokens), torch.finfo(qkv.dtype).min).triu(1)
    if padding is not None:
        mask = mask + padding[:, None, None]
    shares = (scores + mask.clamp_min(torch.finfo(qkv.dtype).min)).softmax(-1)
    return (shares @ v).transpose(1, 2)


@pytest.mark.parametrize("how", ATTENTIONS)
@pytest.mark.parametrize("padded", [False, True])
def test_attention_and_its_gradient_are_those_of_materialised_scores(
    how: str, padded: bool
) -> None:
    qkv, bias, padding = inputs(2, 21, 4, 12)
    given = padding if padded else None
    ours = ATTENTIONS[how](qkv, bias, given, scale=0.3)
    plain = plain_attention(qkv, bias, given, 0.3)
    grad = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1))
    grad[0, :3] = 0  # what sees padding alone is of no use to anyone
    seen = slice(3, None)
    torch.testing.assert_close(ours[0, seen], plain[0, seen], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], plain[1], rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(plain, qkv, grad)[0]
    found = torch.autograd.grad(ours, qkv, grad)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_view_of_another_layout_is_taken_as_it_lies() -> None:
    qkv, bias, padding = inputs(1, 9, 2, 8)
    turned = qkv.detach().transpose(2, 3).contiguous().transpose(2, 3)
    out, sums = alibi_attention(turned, bias, padding, scale=0.5)
    grad = alibi_attention_backward(out, turned, out, sums, bias, padding, scale=0.5)
    assert grad.stride() == turned.stride()
    out, sums = alibi_attention(qkv.detach(), bias, padding, scale=0.5)
    other = alibi_attention_backward(out, qkv.detach(), out, sums, bias, padding, scale=0.5)
    torch.testing.assert_close(grad, other)


def loss_and_gradients(model: nn.Module, mask: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    tokens = ids()
    logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    labels = tokens if mask is None else tokens.masked_fill(mask == 0, -100)
    loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
    model.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    assert found.keys() == exact.keys() and exact
    wrong = sum(float((found[n].float() - g.float()).norm()) ** 2 for n, g in exact.items())
    return (wrong / sum(float(g.float().norm()) ** 2 for g in exact.values())) ** 0.5


@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("how", ATTENTIONS)
def test_a_step_with_padding_and_recomputed_blocks(
    side: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_alibi, "CHOSEN", how)
    mask = torch.ones_like(ids())
    if side != "none":
        mask[0, slice(0, 7) if side == "left" else slice(17, None)] = 0
    given = None if side == "none" else mask
    plain, _ = make("bloom", fused=False, **LORA)
    fused, summary = make("bloom", fused=True, **LORA)
    assert summary is not None and summary.lacking == ()
    for block in fused.base_model.h:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    loss, gradients = loss_and_gradients(plain, given)
    ours, found = loss_and_gradients(fused, given)
    torch.testing.assert_close(ours, loss, rtol=1e-6, atol=1e-6)
    # Tokens are rounded to 8 bits again in each layer, so that a last bit may become a level.
    assert distance(found, gradients) < 2e-3


def test_bf16_is_as_near_to_exact_arithmetic_as_the_plain_model() -> None:
    words = {**LORA, "quant": "none"}
    exact = loss_and_gradients(make("bloom", fused=False, **words)[0], None)[1]
    errors = [
        distance(
            loss_and_gradients(make("bloom", fused=f, dtype=torch.bfloat16, **words)[0], None)[1],
            exact,
        )
        for f in (False, True)
    ]
    assert errors[1] < 1.1 * errors[0] < 0.1


def test_dropout_of_the_residual_draws_as_before() -> None:
    results = []
    for fused in (False, True):
        model, _ = make("bloom", fused=fused, **{**LORA, "dropout": 0.1, "quant": "nf4"})
        for module in model.modules():
            if hasattr(module, "hidden_dropout"):
                module.hidden_dropout = 0.2
        model.train()
        torch.manual_seed(3)
        results.append(loss_and_gradients(model, None))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-6, atol=1e-6)
    assert distance(results[1][1], results[0][1]) < 1e-5


def test_weights_that_are_asked_for_and_their_dropout_take_the_plain_way() -> None:
    plain, _ = make("bloom", fused=False, targets=("query_key_value",))
    fused, _ = make("bloom", fused=True, targets=("query_key_value",))
    words: dict[str, Any] = {"input_ids": ids(), "use_cache": False, "output_attentions": True}
    shown = fused.eval()(**words).attentions
    for ours, theirs in zip(shown, plain.eval()(**words).attentions, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    outputs = []
    for model in (plain, fused):
        for block in model.base_model.h:
            block.self_attention.attention_dropout.p = 0.5
        torch.manual_seed(4)
        outputs.append(model.train()(input_ids=ids(), use_cache=False).logits)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)
