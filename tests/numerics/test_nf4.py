"""nf4 and fp4 against bitsandbytes: codes and values bit for bit, 8-bit scales no worse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nibble.numerics.nf4 import compress_scales, expand_scales, pack, unpack
from nibble.spec.formats import FormatSpec

functional = pytest.importorskip("bitsandbytes.functional")

NAMES = pytest.mark.parametrize("name", ["nf4", "fp4"])


def normal(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def heavy(rows: int, columns: int) -> torch.Tensor:
    """Student's t with 3 degrees of freedom, with outlier columns as in down projections."""
    generator = torch.Generator().manual_seed(1)
    chi = torch.randn(3, rows, columns, generator=generator).square().sum(dim=0)
    made = normal(rows, columns) / (chi / 3).sqrt() * 0.02
    made[:, 5] *= 20
    return made


def awkward(rows: int, columns: int) -> torch.Tensor:
    """Zeros, ties on every threshold, tiny and huge blocks."""
    made = normal(rows, columns)
    made[0] = 0
    made[1] = 0
    made[1, 3] = -2.0
    for row, name in ((2, "nf4"), (3, "fp4")):
        values = functional.get_4bit_type(name, device="cpu").sort().values
        ties = torch.cat(((values[:-1] + values[1:]) / 2, values, -values))
        made[row] = 0
        made[row, : ties.numel()] = ties
        made[row, 63] = 1.0
    made[4] *= 1e-30
    made[5] *= 1e30
    made[6, ::2] = 0.0
    made[6, 1::4] = -0.0
    made[7] = 1e-42
    return made


@NAMES
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("make", [normal, heavy, awkward])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_scales_and_values_are_bitsandbytes_own(
    name: str, block: int, make: Callable[[int, int], torch.Tensor], dtype: torch.dtype
) -> None:
    weight = make(48, 512).to(dtype)
    theirs, state = functional.quantize_4bit(weight, blocksize=block, quant_type=name)
    spec = FormatSpec(name=name, bits=4, block=block)
    ours = pack(spec, weight)
    assert torch.equal(ours["codes"].flatten(), theirs.flatten())
    assert torch.equal(ours["scales"].flatten(), state.absmax)
    dense = unpack(spec, ours, shape=(48, 512), dtype=torch.float32)
    state.dtype = torch.float32
    expected = functional.dequantize_4bit(theirs, state)
    assert torch.equal(dense, expected)


@NAMES
def test_the_first_value_lies_in_the_high_nibble(name: str) -> None:
    weight = torch.zeros(1, 64)
    weight[0, 0] = 1.0
    code = pack(FormatSpec(name=name, bits=4, block=64), weight)["codes"][0, 0].item()
    assert code >> 4 == {"nf4": 15, "fp4": 3}[name]


@NAMES
def test_a_tail_is_packed_as_if_the_row_went_on_with_zeros(name: str) -> None:
    spec = FormatSpec(name=name, bits=4, block=64, double_quant=True)
    weight = heavy(6, 100)
    extended = torch.cat((weight, torch.zeros(6, 28)), dim=1)
    short, long = pack(spec, weight), pack(spec, extended)
    assert all(torch.equal(short[k], long[k]) for k in long)
    dense = unpack(spec, short, shape=(6, 100), dtype=torch.float32)
    assert torch.equal(dense, unpack(spec, long, shape=(6, 128), dtype=torch.float32)[:, :100])


@pytest.mark.parametrize("make", [normal, heavy])
@pytest.mark.parametrize("columns", [1024, 4096, 64 * 300])
def test_8_bit_scales_are_no_worse_than_nested_ones(
    make: Callable[[int, int], torch.Tensor], columns: int
) -> None:
    weight = make(32, columns)
    scales = pack(FormatSpec(name="nf4", bits=4, block=64), weight)["scales"]
    ours = expand_scales(compress_scales(scales), num_blocks=scales.shape[1])

    offset = scales.mean()
    nested, state = functional.quantize_blockwise(scales - offset, blocksize=256)
    theirs = functional.dequantize_blockwise(nested, state) + offset

    for error in (lambda s: (s - scales).norm(), lambda s: ((s - scales) / scales).abs().mean()):
        assert error(ours) <= error(theirs)
    assert ((ours - scales).norm() / scales.norm()).item() < 0.01


def test_8_bit_scales_are_even_in_the_root_and_exact_at_the_ends() -> None:
    generator = torch.Generator().manual_seed(2)
    scales = torch.rand(5, 300, generator=generator).mul(4).exp()
    stored = compress_scales(scales)
    back = expand_scales(stored, num_blocks=300)
    half_steps = stored["scale_steps"].repeat_interleave(256, dim=1)[:, :300] / 2
    assert ((back.sqrt() - scales.sqrt()).abs() <= half_steps * 1.001 + 1e-6).all()
    torch.testing.assert_close(back.amin(dim=1), scales.amin(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(back.amax(dim=1), scales.amax(dim=1), rtol=1e-6, atol=0)


def test_equal_scales_need_no_step() -> None:
    scales = torch.full((2, 3), 0.37)
    stored = compress_scales(scales)
    assert torch.count_nonzero(stored["scale_steps"]) == 0
    assert stored["scales"].shape == (2, 4)
    torch.testing.assert_close(expand_scales(stored, num_blocks=3), scales, rtol=1e-6, atol=0)


def test_double_quantisation_costs_almost_no_accuracy() -> None:
    weight = heavy(64, 1024)
    errors = []
    for double_quant in (False, True):
        spec = FormatSpec(name="nf4", bits=4, block=64, double_quant=double_quant)
        dense = unpack(spec, pack(spec, weight), shape=(64, 1024), dtype=torch.float32)
        errors.append((dense - weight).norm().item())
    assert errors[1] < errors[0] * 1.005
