"""A step of parameters that are not projected, a batch at a time."""

from __future__ import annotations

from typing import Any

from nibble.optim.batches import Kind, Piece
from nibble.optim.by_rows import goes_by_rows, step_by_rows_
from nibble.optim.update import advance, move_, rate_factor, state_noise, weight_noise


def step_plain_(batch: list[Piece], *, group: dict[str, Any], kind: Kind, index: int) -> None:
    """One step of one batch of `kind` from group number `index`: state advances, weights move."""
    of_state = state_noise(group, kind, index=index)
    noise = weight_noise(group, kind, index=index)
    floor = group["parameter_scale"]
    factors = None
    if floor > 0:
        factors = [rate_factor(piece.weight, floor=floor, view=piece.view) for piece in batch]
    if goes_by_rows(batch, rule=group["rule"]):
        step_by_rows_(
            batch[0],
            group=group,
            kind=kind,
            state_noise=of_state,
            weight_noise=noise,
            factor=None if factors is None else factors[0],
        )
        return
    updates = advance(
        [piece.grad for piece in batch],
        [piece.state for piece in batch],
        group=group,
        kind=kind,
        noise=of_state,
        addresses=[piece.slot_address for piece in batch],
        lengths=[piece.view.shape[kind.dim] for piece in batch if kind.dim is not None],
    )
    move_(
        [piece.weight for piece in batch],
        updates,
        group=group,
        noise=noise,
        addresses=[piece.address() for piece in batch] if noise is not None else (),
        factors=factors,
    )
