"""The optimiser's state on disk: whole tensors under the parameters' names, and numbers.

    optimizer.safetensors    PARAMETER/STATE
    optimizer.json           groups with the names of their parameters, each parameter's state in
                             order (numbers, such as steps; null for tensors), sizes of the parts
                             of 8-bit states and the dims along which they were cut

So it knows neither the order of parameters nor how many processes held them. A state tensor is cut
as the optimiser says (`split_dims`); another library's is cut as its parameter is where it has its
shape, and else the same everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nibble.errors import CheckpointError
from nibble.optim import Optimizer
from nibble.optim.shards import FLAT, ShardView
from nibble.place.base import Placement
from nibble.spec.state import stored_as
from nibble.train.state import TrainState
from nibble.train.whole import (
    ABSMAX,
    CODES,
    SIGNED,
    Piece,
    WholeFile,
    in_one_codec,
    rows_of,
    write_whole,
)

TENSORS, NUMBERS = "optimizer.safetensors", "optimizer.json"
Number = int | float | bool | str | None


def write_optimizer(folder: Path, state: TrainState) -> None:
    """Write the optimiser's state to a folder; all processes must come, the first one writes."""
    names = {id(p): name for name, p in state.trained().items()}
    pieces: dict[str, Piece] = {}
    states: dict[str, dict[str, Number]] = {}
    for parameter, kept in _states(state.optimizer):
        name = names[id(parameter)]
        view = None if state.place is None else state.place.view(name)
        dims = split_dims(state, name, {k: tuple(t.shape) for k, t in _tensors(kept).items()})
        for key, tensor in _tensors(kept).items():
            dim = dims.get(key)
            shape = view.shape if view is not None and dim == FLAT else None
            pieces[f"{name}/{key}"] = Piece(tensor=tensor, dim=dim, shape=shape)
        states[name] = {k: None if isinstance(v, Tensor) else v for k, v in kept.items()}
    for decoded in in_one_codec(pieces, state.place):
        name, _, slot = decoded.rpartition("/")
        kept_keys = [key for key in states[name] if key != f"{slot}{ABSMAX}"]
        states[name] = {
            slot if key == f"{slot}{CODES}" else key: states[name][key] for key in kept_keys
        }
    pieces, states = _with_empty_parts(pieces, states, state.place)
    sizes = write_whole(folder / TENSORS, pieces, state.place)
    if state.place is not None and state.place.rank > 0:
        return
    groups = [
        {**group, "params": own}
        for group, own in zip(state.optimizer.param_groups, _grouped(state), strict=True)
    ]
    cuts = {name: parts for name, parts in sizes.items() if name.endswith(CODES)}
    dims = {name: pieces[name].dim for name in cuts}
    text = {"groups": groups, "states": states, "sizes": cuts, "dims": dims}
    (folder / NUMBERS).write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")


def _with_empty_parts(
    pieces: Mapping[str, Piece],
    states: Mapping[str, dict[str, Number]],
    place: Placement | None,
) -> tuple[dict[str, Piece], dict[str, dict[str, Number]]]:
    """What any process has, in one order: who has an empty part of a tensor has no state of it."""
    if place is None or place.num_parts == 1:
        return dict(pieces), dict(states)
    mine = {
        name: (tuple(piece.tensor.shape), piece.tensor.dtype, piece.dim, piece.shape)
        for name, piece in pieces.items()
    }
    every = place.group.gather((mine, dict(states)), "what there is of optimiser state")
    found, numbers = dict(pieces), dict(states)
    for described, theirs in every[: place.num_parts]:
        numbers = {**theirs, **numbers}
        for name, (shape, dtype, dim, whole) in described.items():
            if name not in found and dim is not None:
                cut = [0 if index == dim % len(shape) else n for index, n in enumerate(shape)]
                found[name] = Piece(tensor=torch.empty(cut, dtype=dtype), dim=dim, shape=whole)
    return {name: found[name] for name in sorted(found)}, numbers


def read_optimizer(folder: Path, state: TrainState) -> None:
    """Load the parts of the optimiser's state that live here.

    Raises CheckpointError for files that are damaged or of another optimiser or model.
    """
    path = folder / NUMBERS
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
        groups, states, sizes = text["groups"], text["states"], text["sizes"]
        cuts = text.get("dims", {})
        listed = [list(group["params"]) for group in groups]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): use an older checkpoint") from None
    file = WholeFile(folder / TENSORS, sizes, cuts)
    own = _grouped(state)
    if listed != own:
        raise CheckpointError(
            f"{path}: the optimiser was saved with groups of {[len(g) for g in listed]} tensors, "
            f"this run has {[len(g) for g in own]} or others: resume with the recipe that wrote "
            "the checkpoint"
        )
    ours = [group["params"] for group in state.optimizer.param_groups]
    order = {id(p): number for number, p in enumerate(p for group in ours for p in group)}
    place_of = {name: order[id(p)] for name, p in state.trained().items() if id(p) in order}
    loaded: dict[int, dict[str, Any]] = {}
    for group, names in zip(groups, listed, strict=True):
        is_8bit = group.get("codec") == "8bit"
        for name in names:
            if name in states:
                loaded[place_of[name]] = _read_state(
                    file, state, name, states[name], is_8bit=is_8bit
                )
    restored = [
        {k: [order[id(p)] for p in params] if k == "params" else _tupled(v) for k, v in g.items()}
        for g, params in zip(groups, ours, strict=True)
    ]
    state.optimizer.load_state_dict({"state": loaded, "param_groups": restored})


def _read_state(
    file: WholeFile, state: TrainState, name: str, saved: Mapping[str, Number], *, is_8bit: bool
) -> dict[str, Any]:
    """The own part of the state of one parameter."""
    shapes = {key: file.shape(f"{name}/{key}") for key in saved if f"{name}/{key}" in file.names}
    dims = split_dims(state, name, shapes)
    view = None if state.place is None else state.place.view(name)
    own = state.trained()[name]
    found: dict[str, Any] = {}
    for key, number in saved.items():
        slot = key.removesuffix(CODES)
        if key.endswith(ABSMAX):
            continue  # comes with its codes
        if key not in shapes:
            found[key] = number
            continue
        shape, dim = shapes[key], dims.get(key)
        rows = None
        if dim is not None and view is not None and view.dim is not None:
            # A projected stack of matrices has as many rows as all of them together.
            times = 1 if dim == FLAT else shape[dim] // view.shape[view.dim]
            kept = rows_of(view, own.shape[view.dim])
            rows = slice(kept.start * times, kept.stop * times)
        if not is_8bit or slot not in SIGNED:
            found[key] = file.read(f"{name}/{key}", dim, rows)
            continue
        # Whether 8 bits are worth it is said by the whole; by the part of one cut as a line.
        numel = torch.Size(shape).numel()
        if dim == FLAT and rows is not None:
            numel = rows.stop - rows.start
        as_8bit = stored_as("8bit", numel) == "8bit"
        found |= file.read_slot(f"{name}/{slot}", dim, rows, as_8bit=as_8bit)
    return found


def split_dims(
    state: TrainState, name: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int | None]:
    """The dim along which each state tensor of a parameter is cut over the processes."""
    view: ShardView | None = None if state.place is None else state.place.view(name)
    if view is None or view.dim is None:
        return {}
    own = state.trained()[name]
    if isinstance(state.optimizer, Optimizer) and view.dim != FLAT:
        dims = state.optimizer.split_dims(own)
        return {key: dims.get(key) for key in shapes}
    alike = (tuple(own.shape), view.shape)
    return {key: view.dim if shape in alike else None for key, shape in shapes.items()}


def _states(optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
    """Every parameter with state, in the optimiser's order."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad and optimizer.state.get(parameter):
                yield parameter, optimizer.state[parameter]


def _tensors(kept: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in kept.items() if isinstance(value, Tensor)}


def _grouped(state: TrainState) -> list[list[str]]:
    """Names of what each group of the optimiser trains."""
    names = {id(p): name for name, p in state.trained().items()}
    groups = state.optimizer.param_groups
    return [[names[id(p)] for p in group["params"] if id(p) in names] for group in groups]


def _tupled(value: Any) -> Any:
    """JSON has no tuples: betas come back as one."""
    return tuple(value) if isinstance(value, list) else value
