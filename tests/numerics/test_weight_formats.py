"""What every weight format promises, whatever its arithmetic."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from nibble.numerics.formats import CODECS, pack, unpack
from nibble.spec.config import FormatName, Quant
from nibble.spec.formats import FormatSpec, format_spec

OPTIONS = [
    {"format": "nf4"},
    {"format": "nf4", "double_quant": False, "block": 128},
    {"format": "fp4"},
    {"format": "fp4", "double_quant": False, "block": 16},
    {"format": "int8"},
    {"format": "ternary"},
    *({"format": "hqq", "bits": bits} for bits in (1, 2, 3, 4, 8)),
    {"format": "hqq", "bits": 3, "block": 16},
]
IDS = ["-".join(str(v) for v in options.values()) for options in OPTIONS]
SPECS = [format_spec(Quant(**options)) for options in OPTIONS]  # type: ignore[arg-type]
EVERY = pytest.mark.parametrize("spec", SPECS, ids=IDS)


def weight(rows: int, columns: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(rows, columns, generator=generator)
    # Heavy tails, a row of zeros, a constant row, rows far apart in size: what real weights have.
    made *= torch.rand(rows, 1, generator=generator).mul(6).sub(3).exp() * 0.02
    made[0, ::37] *= 30
    made[1] = 0
    made[2] = 0.125
    return made


def test_the_table_holds_the_formats_of_the_recipe() -> None:
    assert set(CODECS) == set(get_args(FormatName)) - {"none"}
    assert {spec.name for spec in SPECS if spec} == set(CODECS)


@EVERY
@pytest.mark.parametrize("columns", [64, 100, 576])
def test_tensors_are_those_of_the_spec(spec: FormatSpec, columns: int) -> None:
    packed = pack(spec, weight(7, columns))
    made = {
        name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in packed.items()
    }
    assert made == {name: (s.shape, s.dtype) for name, s in spec.tensors((7, columns)).items()}
    assert sum(t.nbytes for t in packed.values()) == spec.nbytes((7, columns))
    assert all(t.is_contiguous() for t in packed.values())


@EVERY
@pytest.mark.parametrize("columns", [100, 576])
def test_any_slice_of_rows_is_a_packed_weight(spec: FormatSpec, columns: int) -> None:
    # 600 rows span several chunks of work, so a slice is also cut into other chunks than the whole.
    whole = weight(600, columns)
    packed = pack(spec, whole)
    dense = unpack(spec, packed, shape=(600, columns), dtype=torch.float32)
    for rows in (slice(0, 1), slice(1, 4), slice(299, 301), slice(5, 599, 7), slice(200, 600)):
        alone = pack(spec, whole[rows])
        for name, tensor in packed.items():
            assert torch.equal(tensor[rows], alone[name]), name
        part = {name: tensor[rows] for name, tensor in packed.items()}
        shape = (len(range(*rows.indices(600))), columns)
        assert torch.equal(unpack(spec, part, shape=shape, dtype=torch.float32), dense[rows])


@EVERY
def test_values_are_rounded_once_to_the_dtype_asked_for(spec: FormatSpec) -> None:
    packed = pack(spec, weight(9, 100))
    exact = unpack(spec, packed, shape=(9, 100), dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(unpack(spec, packed, shape=(9, 100), dtype=dtype), exact.to(dtype))


@EVERY
def test_zeros_stay_zeros_and_nothing_is_not_finite(spec: FormatSpec) -> None:
    packed = pack(spec, weight(9, 100))
    dense = unpack(spec, packed, shape=(9, 100), dtype=torch.float32)
    assert torch.isfinite(dense).all()
    assert torch.count_nonzero(dense[1]) == 0
    torch.testing.assert_close(dense[2], torch.full((100,), 0.125), rtol=4e-3, atol=0)


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_weight_packs_as_its_fp32_copy(spec: FormatSpec, dtype: torch.dtype) -> None:
    half = weight(5, 128).to(dtype)
    packed, again = pack(spec, half), pack(spec, half.float())
    assert all(torch.equal(packed[name], again[name]) for name in packed)


# RMS error over RMS of a normal weight: a change of 2 % is a change of the format.
ERRORS = {
    ("nf4", 4): 0.092,
    ("fp4", 4): 0.122,
    ("int8", 8): 0.0078,
    ("ternary", 2): 0.4613,
    ("hqq", 1): 0.588,
    ("hqq", 2): 0.327,
    ("hqq", 3): 0.1707,
    ("hqq", 4): 0.0837,
    ("hqq", 8): 0.0050,
}


@pytest.mark.parametrize(("name", "bits"), ERRORS)
def test_error_on_a_normal_weight(name: str, bits: int) -> None:
    quant = Quant(format=name, bits=bits if name == "hqq" else None)  # type: ignore[arg-type]
    spec = format_spec(quant)
    assert spec is not None
    whole = torch.randn(256, 1024, generator=torch.Generator().manual_seed(1))
    dense = unpack(spec, pack(spec, whole), shape=(256, 1024), dtype=torch.float32)
    assert ((dense - whole).norm() / whole.norm()).item() == pytest.approx(
        ERRORS[name, bits], rel=0.02
    )


@EVERY
def test_packing_keeps_no_gradient(spec: FormatSpec) -> None:
    whole = weight(4, 64).requires_grad_()
    packed = pack(spec, whole)
    assert not any(t.requires_grad for t in packed.values())
