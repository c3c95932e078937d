"""Loading saved state: it keeps its types, and fits what the optimiser would make, or is refused.

Costs a copy of the state. Reading files is train/'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nibble.errors import CheckpointError
from nibble.optim.parts import part_of
from nibble.optim.projection import small_shape
from nibble.optim.shards import ShardView
from nibble.optim.states import DTYPES
from nibble.spec.lowrank import LowRank, low_rank_of
from nibble.spec.state import state_tensors

# What a saved group must share with the one it is loaded into: they shape its state.
_SHAPING_KEYS = ("rule", "codec", "rank", "proj_type", "basis", "basis_storage", "residual")


def check_loadable(
    state_dict: dict[str, Any],
    groups: list[dict[str, Any]],
    view_of: Callable[[Tensor], ShardView],
) -> None:
    """Raise CheckpointError where saved groups or state are not of the making of `groups`."""
    all_saved = state_dict["param_groups"]
    sizes = [len(group["params"]) for group in groups]
    saved_sizes = [len(saved["params"]) for saved in all_saved]
    if sizes != saved_sizes:
        raise CheckpointError(
            f"optimiser was saved with groups of {saved_sizes} tensors, this run has {sizes}: "
            "resume with the recipe that wrote the checkpoint"
        )
    for number, (group, saved) in enumerate(zip(groups, all_saved, strict=True)):
        for key in _SHAPING_KEYS:
            if saved.get(key) != group[key]:
                raise CheckpointError(
                    f"optimiser group {number} was saved with {key} {saved.get(key)!r}, this "
                    f"run has {group[key]!r}: resume with the recipe that wrote the checkpoint"
                )
        for key, weight in zip(saved["params"], group["params"], strict=True):
            state = state_dict["state"].get(key)
            if state is not None:
                _check_state(
                    state, weight, view=view_of(weight), group=group, low=low_rank_of(saved)
                )


def copied(state: dict[str, Any], *, device: torch.device) -> dict[str, Any]:
    """A copy of one parameter's state with its tensors on `device`; nothing is shared."""
    return {
        name: value.to(device=device, copy=True) if isinstance(value, Tensor) else value
        for name, value in state.items()
    }


def _check_state(
    state: dict[str, Any],
    weight: Tensor,
    *,
    view: ShardView,
    group: dict[str, Any],
    low: LowRank | None,
) -> None:
    """Raise CheckpointError unless a saved state has exactly the tensors that we would make."""
    shape, of = tuple(weight.shape), view.shape
    specs = {}
    if low is not None and low.projects(view.shape):
        specs = low.tensors(view.shape)
        shape = small_shape(low, part_of(view, shape), view.shape)
        of = low.projected_shape(view.shape)
    specs |= state_tensors(group["rule"], codec=group["codec"], shape=shape, whole=of)
    expected = {name: (spec.shape, DTYPES[spec.dtype]) for name, spec in specs.items()}
    found = {
        name: (tuple(value.shape), value.dtype)
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    if found != expected:
        raise CheckpointError(
            f"optimiser state of a weight of shape {list(weight.shape)} holds {found}, expected "
            f"{expected}: the checkpoint belongs to another model or optimiser"
        )
