"""The 8-bit state codec against bitsandbytes, and its own promises."""

from __future__ import annotations

import itertools

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from nibble.numerics import codec8
from nibble.numerics.rounding import random_bits, stochastic_bfloat16, uniform
from nibble.spec.state import BLOCK, state_nbytes


def moments(numel: int, *, signed: bool, seed: int = 0) -> torch.Tensor:
    """Values over many decades, like a first (signed) or second moment."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator)
    scale = 10 ** (-4 * torch.rand(numel, generator=generator))
    return x * scale if signed else x.square() * scale


@pytest.mark.parametrize("signed", [True, False])
def test_map_equals_bitsandbytes(signed: bool) -> None:
    assert torch.equal(codec8.dynamic_map(signed), bnb.create_dynamic_map(signed=signed))
    assert codec8.dynamic_map(signed)[codec8.zero_code(signed=signed)] == 0


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("numel", [1, 255, 256, 257, 5000])
def test_codes_equal_bitsandbytes(signed: bool, numel: int) -> None:
    x = moments(numel, signed=signed)
    codes, absmax = codec8.encode(x, signed=signed)
    # Its float64 path searches exactly; the float32 one goes through a coarse table on the CPU.
    theirs, their_absmax = torch.ops.bitsandbytes.quantize_blockwise(
        x.double(), bnb.create_dynamic_map(signed=signed), BLOCK
    )
    assert torch.equal(absmax, their_absmax)
    if not signed:  # the one deliberate difference: what is above 0 stays above 0
        assert torch.equal(codes == 0, x == 0)
        theirs = torch.where((theirs == 0) & (x > 0), torch.ones_like(theirs), theirs)
    assert torch.equal(codes, theirs)
    ours = codec8.decode(codes, absmax, signed=signed)
    back = bnb.dequantize_blockwise(
        codes, absmax=absmax, code=bnb.create_dynamic_map(signed=signed), blocksize=BLOCK
    )
    assert torch.equal(ours, back)


@pytest.mark.parametrize("signed", [True, False])
def test_table_search_is_exact(signed: bool) -> None:
    _, edges = codec8.tables(signed, torch.device("cpu"))
    near = torch.cat([edges, torch.nextafter(edges, edges + 1), torch.nextafter(edges, edges - 1)])
    noise = moments(100_000, signed=True)
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-42, -1e-42, float("inf"), float("nan")])
    values = torch.cat([near, noise, special])
    expected = torch.bucketize(values, edges, out_int32=True)
    assert torch.equal(codec8._nearest(values, edges, signed=signed), expected)


@pytest.mark.parametrize("signed", [True, False])
def test_fast_bitsandbytes_is_never_nearer(signed: bool) -> None:
    x = moments(20_000, signed=signed)
    codes, absmax = codec8.encode(x, signed=signed)
    code = bnb.create_dynamic_map(signed=signed)
    theirs, _ = bnb.quantize_blockwise(x, code=code, blocksize=BLOCK)
    ours = (codec8.decode(codes, absmax, signed=signed) - x).abs()
    other = (codec8.decode(theirs, absmax, signed=signed) - x).abs()
    scale = absmax.repeat_interleave(BLOCK)[: x.numel()]
    smallest = codec8.dynamic_map(False)[1]  # unsigned values below half of it are held up
    assert ((ours - other) / scale).max() <= smallest * (1 if not signed else 1e-1)


@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (7, 100), (2, 3, 129), (4, 64)])
def test_any_shape_and_exact_bytes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    codes, absmax = codec8.encode(x, signed=True)
    assert codes.shape == x.shape and codes.dtype == torch.uint8
    assert absmax.shape == (-(-x.numel() // BLOCK),) and absmax.dtype == torch.float32
    back = codec8.decode(codes, absmax, signed=True)
    # The widest gap of the signed map is 0.9/64 of absmax, so half of it bounds the error.
    scale = absmax.repeat_interleave(BLOCK)[: x.numel()].view(shape)
    assert ((back - x).abs() <= scale * (0.9 / 64 / 2 + 1e-6)).all()


def test_bytes_formula() -> None:
    numel = 5000
    codes, absmax = codec8.encode(torch.ones(numel), signed=True)
    assert state_nbytes("8bit", numel) == codes.nbytes + absmax.nbytes
    assert state_nbytes("8bit", 4095) == 4 * 4095  # small slots stay fp32
    assert state_nbytes("8bit", 4096) == 4096 + 4 * 16
    assert state_nbytes("bf16", 5) == 10 and state_nbytes("fp32", 5) == 20


def test_extremes() -> None:
    assert torch.equal(
        codec8.decode(*codec8.encode(torch.zeros(300), signed=True), signed=True), torch.zeros(300)
    )
    exact = torch.tensor([0.0, 2.5, -2.5])  # absmax itself and 0 are codes; -absmax is -0.9930
    back = codec8.decode(*codec8.encode(exact, signed=True), signed=True)
    assert torch.equal(back[:2], exact[:2])
    assert back[2].item() == pytest.approx(-2.5 * 0.99296875)
    tiny = torch.full((4,), 1e-42)  # subnormal absmax
    assert torch.isfinite(codec8.decode(*codec8.encode(tiny, signed=True), signed=True)).all()
    broken = torch.ones(2 * BLOCK)
    broken[3] = float("nan")
    seen = codec8.decode(*codec8.encode(broken, signed=False), signed=False)
    assert seen[:BLOCK].isnan().all() and torch.equal(seen[BLOCK:], torch.ones(BLOCK))


@pytest.mark.parametrize("signed", [True, False])
def test_stochastic_rounding_is_unbiased_and_repeatable(signed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.full((64, BLOCK), 0.3)
    x[:, 0] = 1.0  # absmax
    codes, absmax = codec8.encode(x, signed=signed, generator=generator)
    again, _ = codec8.encode(x, signed=signed, generator=torch.Generator().manual_seed(0))
    assert torch.equal(codes, again)
    back = codec8.decode(codes, absmax, signed=signed)[:, 1:]
    assert len(back.unique()) == 2
    gap = back.max() - back.min()
    # 16320 draws between two neighbours: five standard errors of their mean.
    assert abs(back.mean() - 0.3) < 5 * gap / 2 / 16_320**0.5
    nearest = codec8.decode(*codec8.encode(x, signed=signed), signed=signed)[:, 1:]
    assert abs(nearest.mean() - 0.3) > abs(back.mean() - 0.3)


def rounded_at_random(x: Tensor, key: tuple[int, int] = (5, 7)) -> Tensor:
    numbers = torch.arange(x.numel(), dtype=torch.int32).view(x.shape)
    return stochastic_bfloat16(x, bits=random_bits(numbers, key=key))


def test_random_bits_are_uniform_and_unrelated() -> None:
    numbers = torch.arange(1 << 18, dtype=torch.int32)
    words = [random_bits(numbers, key=key) for key in ((0, 0), (0, 1), (1, 0), (-7, 2**31 - 1))]
    for word in words:
        u = uniform(word)
        assert (u >= 0).all() and (u < 1).all()
        # Five standard errors: mean 1/2, variance 1/12, no correlation with the next element.
        assert abs(u.mean() - 0.5) < 5 * (1 / 12 / len(u)) ** 0.5
        for lag in (1, 2, 256):
            both = (u[lag:] - 0.5) * (u[:-lag] - 0.5)
            assert abs(both.mean()) < 5 / 12 / len(u) ** 0.5
        counts = torch.bincount((word >> 16) & 0xFFFF, minlength=1 << 16).float()
        assert ((counts - 4).square() / 4).sum() == pytest.approx(1 << 16, rel=0.05)
    for one, other in itertools.combinations(words, 2):
        both = (uniform(one) - 0.5) * (uniform(other) - 0.5)
        assert abs(both.mean()) < 5 / 12 / len(both) ** 0.5


def test_stochastic_bfloat16() -> None:
    x = torch.full((100_000,), 1.0 + 1 / 512)  # a quarter of the way from 1 to 1 + 1/128
    rounded = rounded_at_random(x).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 1 / 128}
    assert abs(rounded.mean() - x[0]) < 5 * (1 / 128) / 2 / 100_000**0.5
    exact = torch.tensor([0.0, -1.5, 2.0**100])
    assert torch.equal(rounded_at_random(exact).float(), exact)
    all_ones = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # CUDA's NaN
    special = torch.cat([torch.tensor([float("inf"), -float("inf")]), all_ones])
    out = rounded_at_random(special).float()
    assert out[0] == float("inf") and out[1] == -float("inf") and out[2].isnan()
