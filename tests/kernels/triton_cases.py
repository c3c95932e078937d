"""The Triton kernels against the eager functions; run by test_triton.py, in a process of its own.

Triton decides when it is imported whether it interprets kernels on the CPU (TRITON_INTERPRET=1) or
compiles them for a GPU, so these cases cannot share a process with tests that import it otherwise.
"""

from __future__ import annotations

import os

import pytest
import torch
from triton_interpreter import mend

from nibble.kernels import hqq, int8, nf4, ternary
from nibble.numerics import int8 as eager_int8
from nibble.numerics.formats import pack, unpack
from nibble.spec.formats import FormatSpec

mend()
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TWINS = {"nf4": nf4, "fp4": nf4, "hqq": hqq, "int8": int8, "ternary": ternary}
SPECS = [
    FormatSpec(name="nf4", bits=4, block=64, double_quant=True),
    FormatSpec(name="nf4", bits=4, block=16),
    FormatSpec(name="fp4", bits=4, block=128, double_quant=True),
    FormatSpec(name="fp4", bits=4, block=64),
    FormatSpec(name="int8", bits=8, int8_threshold=6.0),
    FormatSpec(name="ternary", bits=2),
    *(FormatSpec(name="hqq", bits=bits, block=64) for bits in (1, 2, 3, 4, 8)),
    FormatSpec(name="hqq", bits=1, block=16),
    FormatSpec(name="hqq", bits=3, block=16),
]
EVERY = pytest.mark.parametrize(
    "spec", SPECS, ids=[f"{s.name}-{s.bits}-{s.block}-{s.double_quant}" for s in SPECS]
)


def normal(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def same(ours: torch.Tensor, eager: torch.Tensor) -> None:
    """Equal but for a last bit: a GPU fuses products and sums that eager functions round apart."""
    assert ours.dtype == eager.dtype and ours.device == eager.device
    unit = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[eager.dtype]
    most = 0.5 if eager.dtype == torch.float32 else 1e-3
    if DEVICE == "cpu" and eager.dtype == torch.bfloat16:
        # The interpreter cuts bfloat16 off where GPUs round it.
        unit, most = 2**-7, 1.0
    torch.testing.assert_close(ours, eager, rtol=unit, atol=1e-7)
    assert (ours != eager).float().mean().item() <= most


# One block, a padded tail, an odd tail, more than a tile of columns, more than 256 blocks in a row.
@EVERY
@pytest.mark.parametrize("shape", [(1, 64), (3, 100), (5, 33), (3, 2112), (1, 16500)])
def test_unpack_equals_eager(spec: FormatSpec, shape: tuple[int, int]) -> None:
    packed = pack(spec, normal(*shape))
    ours = TWINS[spec.name].unpack(spec, packed, shape=shape, dtype=torch.float32)
    same(ours, unpack(spec, packed, shape=shape, dtype=torch.float32))


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unpack_to_16_bit_and_of_slices(spec: FormatSpec, dtype: torch.dtype) -> None:
    packed = pack(spec, normal(9, 200))
    eager = unpack(spec, packed, shape=(9, 200), dtype=dtype)
    for rows in (slice(0, 9), slice(3, 8), slice(1, 9, 3)):
        part = {name: tensor[rows] for name, tensor in packed.items()}
        shape = (len(range(*rows.indices(9))), 200)
        same(TWINS[spec.name].unpack(spec, part, shape=shape, dtype=dtype), eager[rows])


@EVERY
def test_no_rows_are_no_work(spec: FormatSpec) -> None:
    packed = {name: tensor[:0] for name, tensor in pack(spec, normal(1, 64)).items()}
    dense = TWINS[spec.name].unpack(spec, packed, shape=(0, 64), dtype=torch.float32)
    assert dense.shape == (0, 64)


@pytest.mark.parametrize("threshold", [0.0, 3.0])
@pytest.mark.parametrize("shape", [(1, 64), (5, 100), (33, 2112), (2, 9000)])
def test_tokens_are_rounded_as_eager(threshold: float, shape: tuple[int, int]) -> None:
    """But for columns of outliers, whose remainder the product adds."""
    x = normal(*shape)
    x[0] = 0
    x[-1, 7] = 25.0
    rounded = int8.round_tokens(x, threshold=threshold)
    expected, absmax, columns = eager_int8.quantize_tokens(x, threshold=threshold)
    assert torch.equal(rounded.scales, absmax)
    if rounded.listed is None:
        assert threshold == 0
    else:
        assert int(rounded.listed[0]) == len(columns) > 0
        assert torch.equal(rounded.listed[1 : 1 + len(columns)].long(), columns)
    assert torch.equal(rounded.codes.index_fill(1, columns, 0), expected)


MIXED_DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
"""The interpreter takes the bits of bfloat16 for integers in a product."""


@pytest.mark.parametrize("how", int8.PRODUCTS)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("dtype", MIXED_DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "features", "columns"), [(6, 40, 264), (70, 300, 128)])
def test_the_mixed_product_equals_eager(
    how: str,
    threshold: float,
    dtype: torch.dtype,
    tokens: int,
    features: int,
    columns: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No outlier, one, more than are multiplied at once; with a bias and without."""
    monkeypatch.setattr(int8, "CHOSEN", how)
    spec = FormatSpec(name="int8", bits=8, int8_threshold=threshold)
    packed = pack(spec, normal(features, columns))
    bias = normal(1, features)[0].to(dtype)
    for outliers in ([], [9], list(range(0, 120, 6))):
        x = normal(tokens, columns).clamp_(-5, 5)
        x[:, outliers] *= 20
        x = x.to(dtype).view(2, -1, columns)
        for added in (None, bias):
            ours = int8.matmul(spec, packed, x, added)
            eager = eager_int8.matmul(spec, packed, x, added)
            assert ours.shape == (2, tokens // 2, features) and ours.dtype == dtype
            error = ((ours - eager).float().norm() / eager.float().norm()).item()
            exact = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
            assert error < exact, outliers


@pytest.mark.parametrize("tile", [int8.PRODUCT, int8.SMALL_PRODUCT])
def test_tiles_cover_the_product_once(tile: int8.Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tiles of tokens than a swath has, and a last one that is not full."""
    small = int8.Tile(16, 32, 32, 4, 2)
    monkeypatch.setattr(int8, "PRODUCT", small if DEVICE == "cpu" else tile)
    monkeypatch.setattr(int8, "SMALL_PRODUCT", small if DEVICE == "cpu" else tile)
    spec = FormatSpec(name="int8", bits=8, int8_threshold=6.0)
    packed = pack(spec, normal(72, 128))
    x = normal(16 * int8.SWATH + 23, 128)
    ours, eager = int8.matmul(spec, packed, x), eager_int8.matmul(spec, packed, x)
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-4)


@EVERY
def test_a_launch_that_is_known_does_the_same(spec: FormatSpec) -> None:
    """The first call compiles, the second takes the short way, an odd slice neither."""
    first, second = (pack(spec, normal(4, 256) * scale) for scale in (1.0, 3.0))
    twin = TWINS[spec.name].unpack
    for packed in (first, second, first):
        ours = twin(spec, packed, shape=(4, 256), dtype=torch.float32)
        same(ours, unpack(spec, packed, shape=(4, 256), dtype=torch.float32))
