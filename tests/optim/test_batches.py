"""Which parameters take a step together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nibble.optim import batches as module
from nibble.optim.batches import Piece, batches
from nibble.optim.shards import ShardView


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of 4,096 weights have a kernel to themselves; lists hold 5,120 unpacked ones."""
    monkeypatch.setattr(module, "FUSED_NUMEL", 4096)
    monkeypatch.setattr(module, "BATCH_NBYTES", 5120 * 48)


def piece(*shape: int) -> Piece:
    weight = torch.zeros(shape, dtype=torch.bfloat16)
    state: dict[str, Tensor] = {"mean": torch.zeros(shape), "square": torch.zeros(shape)}
    view = ShardView(shape=shape)
    return Piece(weight=weight, grad=weight.clone(), state=state, base=0, shape=shape, view=view)


def sizes(pieces: list[Piece], *, fused: bool) -> list[list[int]]:
    made = batches(pieces, elementwise=True, fused=fused)
    return [[part.weight.numel() for part in batch] for batch in made]


def test_vectors_between_matrices_share_a_batch_where_kernels_take_matrices() -> None:
    layer = [piece(64, 64), piece(64), piece(64, 64), piece(64)]
    assert sizes(layer * 3, fused=True) == [[*[64] * 6, 4096], *[[4096]] * 5]
    assert sizes(layer * 3, fused=False) == [[4096, 64], [4096, 64]] * 3


def test_every_number_is_in_one_batch() -> None:
    given = [piece(48, 64), piece(64), piece(160, 512), piece(48, 64), piece(7)]
    for fused in (False, True):
        parts = [part for batch in batches(given, elementwise=True, fused=fused) for part in batch]
        for part in parts:
            part.weight.add_(1)
            assert part.state["mean"].numel() == part.grad.numel() == part.weight.numel()
        for one in given:
            assert torch.equal(one.weight, torch.ones_like(one.weight))
            one.weight.zero_()
        assert len(parts) > len(given)
