"""HQQ: error against the hqq library at the same bits and group, and packing that loses nothing."""

from __future__ import annotations

import warnings

import pytest
import torch

from nibble.numerics import hqq
from nibble.numerics.formats import pack, unpack
from nibble.spec.formats import FormatSpec

BITS = pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(256, 512, generator=generator)
    chi = torch.randn(4, 256, 512, generator=generator).square().sum(dim=0)
    return {
        "normal": normal,
        "student-t": torch.randn(256, 512, generator=generator) / (chi / 4).sqrt(),
        "small and shifted": normal * 0.02 + 0.1,
    }


def errors(dense: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Mean and root mean square of the error."""
    difference = (dense - exact).double()
    return difference.abs().mean().item(), difference.square().mean().sqrt().item()


def library(weight: torch.Tensor, *, bits: int, block: int) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize = pytest.importorskip("hqq.core.quantize")
        codes, meta = quantize.Quantizer.quantize(
            weight.clone(), nbits=bits, group_size=block, axis=1, device="cpu"
        )
        dense: torch.Tensor = quantize.Quantizer.dequantize(
            codes, {**meta, "compute_dtype": torch.float32}
        )
    return dense.float()


@BITS
@pytest.mark.parametrize("block", [32, 64])
def test_the_error_is_not_above_the_library_s(bits: int, block: int) -> None:
    spec = FormatSpec(name="hqq", bits=bits, block=block)
    for name, weight in weights().items():
        ours = errors(
            unpack(spec, pack(spec, weight), shape=(256, 512), dtype=torch.float32), weight
        )
        theirs = errors(library(weight, bits=bits, block=block), weight)
        assert ours[0] <= theirs[0] and ours[1] <= theirs[1], (name, ours, theirs)


@BITS
def test_no_block_is_worse_than_plain_rounding(bits: int) -> None:
    blocks = weights()["student-t"].view(-1, 64)
    codes, scales, zeros = hqq.solve(
        blocks, bits=bits, scale_dtype=torch.float32, zero_dtype=torch.float32
    )
    dense = (codes - (2**bits - 1) / 2 - zeros) * scales
    low, high = blocks.aminmax(dim=1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    rounded = ((blocks - low) / step).round() * step + low
    ours, plain = ((d - blocks).abs().mean(dim=1) for d in (dense, rounded))
    assert (ours <= plain * (1 + 1e-4)).all()


@BITS
def test_codes_survive_packing(bits: int) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 2**bits, (5, 48), generator=generator, dtype=torch.uint8)
    packed = hqq.pack_bits(codes, bits=bits)
    assert packed.shape == (5, 48 * bits // 8)
    assert torch.equal(hqq.unpack_bits(packed, bits=bits), codes)


def test_the_layout_of_three_bits() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8)
    word = int("".join(f"{c:03b}" for c in (1, 2, 3, 4, 5, 6, 7, 0)), 2)
    assert hqq.pack_bits(codes, bits=3).tolist() == [list(word.to_bytes(3, "big"))]


@BITS
def test_blocks_far_from_zero_and_constant_ones(bits: int) -> None:
    spec = FormatSpec(name="hqq", bits=bits, block=64)
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(2)) * 1e-3 + 5.0
    weight[1] = -3.0
    weight[2] = 0.0
    weight[3] = 1e-20
    dense = unpack(spec, pack(spec, weight), shape=(4, 64), dtype=torch.float32)
    torch.testing.assert_close(dense, weight, rtol=2e-3, atol=0)


@BITS
@pytest.mark.parametrize("size", [1e-8, 1e6])
def test_size_does_not_matter(bits: int, size: float) -> None:
    spec = FormatSpec(name="hqq", bits=bits, block=64)
    weight = weights()["normal"][:64]
    ours = []
    for factor in (1.0, size):
        scaled = weight * factor
        dense = unpack(spec, pack(spec, scaled), shape=(64, 512), dtype=torch.float32)
        ours.append(errors(dense, scaled)[1] / factor)
    assert ours[1] == pytest.approx(ours[0], rel=0.05)
