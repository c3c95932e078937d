"""Ternary: BitNet's codes, the best scale for them, and five trits a byte."""

from __future__ import annotations

import itertools

import pytest
import torch

from nibble.numerics import ternary
from nibble.spec.formats import FormatSpec

SPEC = FormatSpec(name="ternary", bits=2)


def test_all_243_bytes_are_distinct_and_come_back() -> None:
    trits = torch.tensor(list(itertools.product((-1, 0, 1), repeat=5)), dtype=torch.float32)
    packed = ternary.pack_trits(trits, num_bytes=1)
    assert packed.unique().numel() == 243
    assert torch.equal(ternary.unpack_trits(packed, in_features=5).float(), trits)


@pytest.mark.parametrize("columns", [1, 9, 10, 64, 4096])
def test_codes_survive_packing_at_any_width(columns: int) -> None:
    trits = torch.randint(-1, 2, (3, columns), generator=torch.Generator().manual_seed(0)).float()
    num_bytes = SPEC.tensors((3, columns))["codes"].shape[1]
    packed = ternary.pack_trits(trits, num_bytes=num_bytes)
    assert torch.equal(ternary.unpack_trits(packed, in_features=columns).float(), trits)


def test_codes_are_bitnet_s_absmean_codes_row_by_row() -> None:
    weight = torch.randn(8, 200, generator=torch.Generator().manual_seed(1)) * 0.02
    packed = ternary.pack(SPEC, weight)
    codes = ternary.unpack_trits(packed["codes"], in_features=200)
    for row in range(8):
        # BitNet b1.58, equation 1 to 3, with each row as its matrix.
        gamma = weight[row].abs().mean()
        assert torch.equal(codes[row].float(), (weight[row] / gamma).round().clamp(-1, 1))


def test_the_scale_is_the_least_squares_one() -> None:
    weight = torch.randn(4, 500, generator=torch.Generator().manual_seed(2))
    packed = ternary.pack(SPEC, weight)
    codes = ternary.unpack_trits(packed["codes"], in_features=500).double()
    for row in range(4):
        best = torch.linalg.lstsq(codes[row].unsqueeze(1), weight[row].double().unsqueeze(1))
        assert packed["scales"][row].item() == pytest.approx(best.solution.item(), rel=1e-5)


def test_a_ternary_checkpoint_is_kept_exactly() -> None:
    trits = torch.randint(-1, 2, (6, 300), generator=torch.Generator().manual_seed(3))
    weight = (trits * 0.0371).to(torch.bfloat16)
    dense = ternary.unpack(SPEC, ternary.pack(SPEC, weight), shape=(6, 300), dtype=torch.bfloat16)
    assert torch.equal(dense, weight)
