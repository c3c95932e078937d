"""Which provider serves what, what is refused, and bitsandbytes' operators against eager."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.machinery import ModuleSpec

import pytest
import torch

from nibble import kernels
from nibble.errors import ConfigError, PlacementError
from nibble.kernels import select, select_matmul
from nibble.numerics import formats, int8
from nibble.spec.formats import FormatSpec

NF4 = FormatSpec(name="nf4", bits=4, block=64, double_quant=True)
FP4 = FormatSpec(name="fp4", bits=4, block=128)
SMALL = FormatSpec(name="nf4", bits=4, block=16)
INT8 = FormatSpec(name="int8", bits=8, int8_threshold=6.0)
HQQ = FormatSpec(name="hqq", bits=3, block=64)


def without(*absent: str) -> Callable[[str], ModuleSpec | None]:
    real = importlib.util.find_spec
    return lambda name: None if name in absent else real(name)


@pytest.fixture
def bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("spec", [NF4, FP4], ids=["nf4", "fp4"])
@pytest.mark.parametrize("columns", [128, 576, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitsandbytes_equals_eager(spec: FormatSpec, columns: int, dtype: torch.dtype) -> None:
    weight = torch.randn(20, columns, generator=torch.Generator().manual_seed(0))
    packed = formats.pack(spec, weight)
    provided = select(spec, device="cpu", choice="bitsandbytes")
    for rows in (slice(0, 20), slice(3, 11), slice(0, 20, 3)):
        part = {name: tensor[rows] for name, tensor in packed.items()}
        shape = (len(range(*rows.indices(20))), columns)
        ours = provided(spec, part, shape=shape, dtype=dtype)
        eager = formats.unpack(spec, part, shape=shape, dtype=dtype)
        assert ours.is_contiguous() and ours.shape == shape
        assert torch.equal(ours, eager)


@pytest.mark.usefixtures("bitsandbytes")
def test_auto_takes_bitsandbytes_on_a_cpu_where_it_serves() -> None:
    named = select(NF4, device="cpu", choice="bitsandbytes")
    assert select(NF4, device="cpu") is named is not formats.unpack
    for spec in (SMALL, INT8, HQQ):
        assert select(spec, device="cpu") is formats.unpack


def test_auto_falls_back_to_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_spec", without("bitsandbytes", "triton"))
    for device in ("cpu", "cuda"):
        assert select(NF4, device=device) is formats.unpack
        assert select_matmul(INT8, device=device) is int8.matmul


def test_auto_takes_triton_on_cuda() -> None:
    pytest.importorskip("triton")
    for spec in (NF4, SMALL, FP4, INT8, HQQ, FormatSpec(name="ternary", bits=2)):
        provided = select(spec, device="cuda:1")
        assert provided is select(spec, device="cuda", choice="triton")
        assert provided.__module__.startswith("nibble.kernels.")  # type: ignore[attr-defined]


def test_only_int8_has_a_product_of_its_own() -> None:
    assert select_matmul(NF4, device="cpu") is None
    assert select_matmul(INT8, device="cpu") is int8.matmul
    pytest.importorskip("triton")
    triton = select_matmul(INT8, device="cuda")
    assert triton is not None and triton is not int8.matmul
    assert select_matmul(INT8, device="cuda", choice="eager") is int8.matmul


def test_a_choice_by_name_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlacementError, match="triton needs a CUDA device, not cpu"):
        select(NF4, device="cpu", choice="triton")
    with pytest.raises(ConfigError, match="bitsandbytes does not serve hqq at 3 bits"):
        select(HQQ, device="cpu", choice="bitsandbytes")
    with pytest.raises(ConfigError, match="does not serve nf4 in blocks of 16"):
        select(SMALL, device="cpu", choice="bitsandbytes")
    monkeypatch.setattr(kernels, "find_spec", without("bitsandbytes", "triton"))
    with pytest.raises(ConfigError, match=r'not installed; pip install "nibble\[kernels\]"'):
        select(NF4, device="cpu", choice="bitsandbytes")
    with pytest.raises(ConfigError, match="triton is not installed"):
        select(NF4, device="cuda", choice="triton")
