"""The Triton twins of a block's functions against the eager ones; run by test_layer_kernels.py.

As with triton_cases.py: Triton decides at import whether it interprets, so these cases need a
process of their own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nibble.kernels.layers import EAGER, triton_kernels
from nibble.nn import fused_alibi, layer_functions
from nibble.numerics.layer_functions import Activation

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "nn"))
from fused_models import loss_and_gradients, make
from triton_interpreter import mend

mend()
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TRITON = triton_kernels()
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def near(ours: Tensor, eager: Tensor, *, units: float = 2.0) -> None:
    """Within some last places; the interpreter cuts bfloat16 off where GPUs round it."""
    assert ours.dtype == eager.dtype and ours.shape == eager.shape
    unit = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[eager.dtype]
    if DEVICE == "cpu" and eager.dtype == torch.bfloat16:
        unit *= 2
    scale = float(eager.float().abs().max())
    torch.testing.assert_close(ours, eager, rtol=units * unit, atol=units * unit * scale * 0.25)


# One row, a head of 128 in tiles of rows, a width that is no power of two, a wide row.
@DTYPES
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("shape", [(1, 64), (5, 7, 128), (9, 576), (3, 5000)])
def test_norm(shape: tuple[int, ...], unit_offset: bool, dtype: torch.dtype) -> None:
    x, grad = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1)
    weight = normal(shape[-1], dtype=dtype, seed=2)
    words = {"eps": 1e-5, "unit_offset": unit_offset}
    near(TRITON.rms_norm(x, weight, **words), EAGER.rms_norm(x, weight, **words))
    for trained in (False, True):
        ours = TRITON.rms_norm_backward(grad, x, weight, trained=trained, **words)
        eager = EAGER.rms_norm_backward(grad, x, weight, trained=trained, **words)
        near(ours[0], eager[0], units=4)
        assert (ours[1] is None) == (eager[1] is None) == (not trained)
        if eager[1] is not None:
            assert ours[1] is not None
            torch.testing.assert_close(ours[1], eager[1], rtol=1e-4, atol=1e-4)


def test_norm_sums_many_rows_and_takes_any_layout() -> None:
    x, grad = normal(3000, 64), normal(3000, 64, seed=1)
    weight = normal(64, seed=2)
    words = {"eps": 1e-6, "unit_offset": False, "trained": True}
    ours = TRITON.rms_norm_backward(grad, x, weight, **words)
    again = TRITON.rms_norm_backward(grad, x, weight, **words)
    eager = EAGER.rms_norm_backward(grad.double().float(), x, weight, **words)
    torch.testing.assert_close(ours[1], eager[1], rtol=1e-4, atol=2e-4)
    assert torch.equal(ours[1], again[1])
    turned = x.view(50, 60, 64).transpose(0, 1)
    near(
        TRITON.rms_norm(turned, weight, eps=1e-6, unit_offset=False),
        EAGER.rms_norm(turned, weight, eps=1e-6, unit_offset=False),
    )
    empty = TRITON.rms_norm_backward(grad[:0], x[:0], weight, **words)
    assert empty[0].shape == (0, 64) and torch.equal(empty[1], torch.zeros_like(weight))


@DTYPES
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("heads", "dim", "turned"), [((4, 2), 16, 16), ((3, 1), 20, 8), ((6, 6), 24, 24)]
)
def test_rotary(
    heads: tuple[int, int], dim: int, turned: int, inverse: bool, dtype: torch.dtype
) -> None:
    for rows_of_angles in (1, 2):
        angles = normal(rows_of_angles, 5, turned, seed=3)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        both = normal(2, 5, sum(heads) * dim, dtype=dtype)
        # Slices of one product, and heads before tokens.
        q = both[..., : heads[0] * dim].view(2, 5, heads[0], dim)
        k = both[..., heads[0] * dim :].view(2, 5, heads[1], dim)
        k = k.transpose(1, 2).contiguous().transpose(1, 2)
        ours = TRITON.rotate(q, k, cos, sin, inverse=inverse)
        for one, other in zip(ours, EAGER.rotate(q, k, cos, sin, inverse=inverse), strict=True):
            near(one, other)
            assert one.is_contiguous()


def test_rotary_takes_the_wider_type_and_no_rows() -> None:
    q, k = normal(1, 3, 2, 8, dtype=torch.bfloat16), normal(1, 3, 1, 8)
    angles = normal(1, 3, 8)
    ours = TRITON.rotate(q, k, angles.cos(), angles.sin())
    for one, other in zip(ours, EAGER.rotate(q, k, angles.cos(), angles.sin()), strict=True):
        near(one, other)
    empty = TRITON.rotate(q[:0], k[:0], angles.cos()[:0], angles.sin()[:0])
    assert empty[0].shape == (0, 3, 2, 8)


@DTYPES
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # 1 / (1 + inf) is meant
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("layout", ["apart", "pair", "alone"])
def test_gate(layout: str, activation: Activation, dtype: torch.dtype) -> None:
    both = 4 * normal(2, 3, 2 * 1100, dtype=dtype)
    gate, up = both.chunk(2, dim=-1)
    if layout == "apart":
        gate, up = gate.contiguous(), up.contiguous()
    grad = normal(2, 3, 1100, dtype=dtype, seed=1)
    second = None if layout == "alone" else up
    near(
        TRITON.gate(gate, second, activation=activation),
        EAGER.gate(gate, second, activation=activation),
    )
    eager = EAGER.gate_backward(grad, gate, second, activation=activation)
    ours = TRITON.gate_backward(grad, gate, second, activation=activation)
    near(ours[0], eager[0])
    assert ours[0].data_ptr() == gate.data_ptr()
    assert (ours[1] is None) == (layout == "alone")
    if ours[1] is not None and eager[1] is not None:
        near(ours[1], eager[1])
        assert ours[1].data_ptr() == up.data_ptr()


@DTYPES
@pytest.mark.parametrize("vocabulary", [5, 97, 20000])
def test_cross_entropy(vocabulary: int, dtype: torch.dtype) -> None:
    logits = 5 * normal(7, vocabulary, dtype=dtype)
    targets = torch.tensor([0, vocabulary - 1, 3, 2, 1, 4, -100], device=DEVICE)
    logits[2] *= 40  # maxima far above the rest, the target's among them
    logits[3, 2] = logits[3].max() + 12
    ours, eager = logits.clone(), logits.clone()
    losses = TRITON.cross_entropy_(ours, targets, need_grad=True)
    expected = EAGER.cross_entropy_(eager, targets, need_grad=True)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    near(ours, eager)
    assert (ours[3, 2] < 0) and torch.isclose(ours[3, 2], eager[3, 2], rtol=2e-2)
    assert losses[6] == 0 and not ours[6].any(), "a row without a target"
    kept = logits.clone()
    torch.testing.assert_close(
        TRITON.cross_entropy_(kept, targets, need_grad=False), expected, rtol=1e-5, atol=1e-5
    )
    assert torch.equal(kept, logits)
    assert TRITON.cross_entropy_(kept[:0], targets[:0], need_grad=True).shape == (0,)


PRODUCT_DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
"""The interpreter takes the bits of bfloat16 for integers in a product."""


# One token; two tiles of queries, not full; heads as wide as BLOOM's, and no power of two.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # of what is not allowed
@pytest.mark.parametrize("dtype", PRODUCT_DTYPES, ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("rows", "tokens", "heads", "dim"), [(1, 1, 1, 16), (2, 150, 2, 24), (1, 200, 2, 128)]
)
def test_alibi_attention(
    rows: int, tokens: int, heads: int, dim: int, padded: bool, dtype: torch.dtype
) -> None:
    qkv, grad = normal(rows, tokens, heads, 3, dim, dtype=dtype), normal(rows, tokens, heads, dim)
    slopes = 0.3 * normal(rows, heads, 1, seed=2).abs()
    bias = (slopes * torch.arange(tokens, device=DEVICE)).to(dtype)
    padding = torch.zeros(rows, tokens, device=DEVICE, dtype=dtype) if padded else None
    if padding is not None:
        padding[0, : min(70, tokens - 1)] = torch.finfo(dtype).min  # a whole tile of keys
        padding[-1, tokens - tokens // 8 :] = torch.finfo(dtype).min
        grad[0, :70] = 0
    grad = grad.to(dtype)
    for given in (qkv, qkv.transpose(2, 3).contiguous().transpose(2, 3)):
        out, sums = TRITON.alibi_attention(given, bias, padding, scale=0.2)
        eager, expected = EAGER.alibi_attention(given, bias, padding, scale=0.2)
        for one in (out, eager):
            assert torch.isfinite(one).all()
            if padded:
                one[0, :70] = 0  # what sees padding alone is of no use to anyone
        near(out, eager, units=8)  # scores of some hundreds, so that fp32 shares differ at once
        torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-4)
        words = {"bias": bias, "padding": padding, "scale": 0.2}
        ours = TRITON.alibi_attention_backward(grad, given, eager, expected, **words)
        by_qkv = EAGER.alibi_attention_backward(grad, given, eager, expected, **words)
        # Shares of one are rounded to the type before they are multiplied.
        near(ours, by_qkv, units=16)
        assert ours.stride() == given.stride()


def test_alibi_attention_of_no_rows() -> None:
    qkv, bias = normal(0, 5, 2, 3, 16), normal(0, 2, 5)
    out, sums = TRITON.alibi_attention(qkv, bias, None, scale=1.0)
    assert out.shape == (0, 5, 2, 16) and sums.shape == (0, 2, 5)
    words = {"bias": bias, "padding": None, "scale": 1.0}
    assert TRITON.alibi_attention_backward(out, qkv, out, sums, **words).shape == qkv.shape


@pytest.mark.skipif(DEVICE != "cpu", reason="models are made on the CPU")
@pytest.mark.parametrize("family", ["qwen3", "phi3", "bloom"])
def test_a_whole_model(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"quant": "nf4", "targets": ("all-linear",)}
    plain = loss_and_gradients(make(family, fused=False, **words)[0])[1]
    for functions in (layer_functions, fused_alibi):
        monkeypatch.setattr(functions, "layer_kernels", lambda _: TRITON)
    ours = loss_and_gradients(make(family, fused=True, **words)[0])[1]
    for name, gradient in plain.items():
        assert (ours[name] - gradient).norm() < 1e-5 * gradient.norm(), name
