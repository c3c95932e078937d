"""From a model on the meta device to one with real tensors: buffers, ties, and weights from
scratch.

A checkpoint does not hold everything a model needs. Non-persistent buffers (rotary frequencies,
embedding scales, position ids) are computed, and `to_empty` leaves them as garbage. transformers 5
computes them in `_init_weights`, because its own loader builds on meta too; so they are rebuilt by
running that initialisation with every parameter and stored buffer marked as done. Buffers hold NaN
(the least integer) before, and one that still does after is an error: no family may train on
garbage in silence. Tied parameters come apart in `to_empty`: they are tied again by the module
objects that own them, whatever has been wrapped around those since.

Weights from scratch use transformers' own initialisation, block by block, so a random model of any
size needs one block of host memory; each part has its own seed, so the values do not depend on the
order of reading.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nibble.errors import WeightError

DONE = "_is_hf_initialized"
"""The mark by which transformers' initialisation knows a tensor that it must not touch."""


@dataclass(frozen=True, kw_only=True)
class Tie:
    """`module.attribute` is the same parameter as `source.source_attribute`."""

    module: nn.Module
    attribute: str
    source: nn.Module
    source_attribute: str


def find_ties(model: nn.Module) -> tuple[Tie, ...]:
    """The parameters that several modules share; must be called before `to_empty`, which separates
    them."""
    first: dict[int, tuple[nn.Module, str]] = {}
    ties = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owner = first.setdefault(id(parameter), (module, name))
            if owner != (module, name):
                ties.append(
                    Tie(module=module, attribute=name, source=owner[0], source_attribute=owner[1])
                )
    return tuple(ties)


def tie_(ties: Sequence[Tie]) -> None:
    """Make each tied attribute the parameter of its source again."""
    for tie in ties:
        setattr(tie.module, tie.attribute, getattr(tie.source, tie.source_attribute))


def finish(model: nn.Module, *, ties: Sequence[Tie] = ()) -> None:
    """Tie what is tied and compute every non-persistent buffer in place, on the device where it is.

    Call it after `to_empty`; parameters and stored buffers keep their values, loaded or not yet.
    Raises WeightError naming a buffer that the family's code does not compute.
    """
    tie_(ties)
    buffers = dict(_computed_buffers(model))
    for name, buffer in buffers.items():
        if buffer.is_meta:
            raise AssertionError(f"{name} is on the meta device: call to_empty first")
        _poison_(buffer)
    computed = {id(buffer) for buffer in buffers.values()}
    marked = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in computed]
    for tensor in marked:
        setattr(tensor, DONE, True)
    # The owners of buffers alone where that is enough: a family's code may reach into children
    # that have been wrapped since (GPT-2's scales `c_proj.weight`).
    owners = {name.rpartition(".")[0] for name in buffers}
    _run_initialisation(model, owners)
    if any(_poisoned(buffer) for _, buffer in _computed_buffers(model)):
        _run_initialisation(model, None)
    for tensor in marked:
        _unmark(tensor)
    # A buffer may have been replaced rather than written: look again.
    for name, buffer in _computed_buffers(model):
        if _poisoned(buffer):
            raise WeightError(
                f"{type(model).__name__} does not compute its buffer {name} when it is "
                "initialised; "
                "nibble cannot rebuild it: use a family that transformers itself carries"
            )


def materialise(model: nn.Module, *, device: torch.device | str) -> None:
    """Give a meta model empty storage on `device`, keep its ties and compute its buffers; weights
    are still to be loaded."""
    ties = find_ties(model)
    for tie in ties:
        # Or a table and a head that are one tensor would be made twice, for a moment.
        setattr(tie.module, tie.attribute, nn.Parameter(torch.empty(0, device="meta")))
    model.to_empty(device=device)
    finish(model, ties=ties)


def initial_values(
    model: nn.Module, names: Sequence[str], *, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Freshly initialised CPU tensors for some parameters of a meta model, such as the head of a
    new task."""
    wanted = set(names)
    for path, module in model.named_modules():
        own = {
            name: f"{path}.{name}" if path else name
            for name, _ in module.named_parameters(recurse=False)
        }
        if wanted.isdisjoint(own.values()):
            continue
        twin = _shallow_twin(module)
        _initialise_part(model, twin, seed=seed, device=torch.device("cpu"))
        for name, full_name in own.items():
            if full_name in wanted:
                yield full_name, twin.get_parameter(name).detach()


def random_weights(
    model: nn.Module, *, block_path: str, seed: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, Tensor]]:
    """All parameters and stored buffers of a meta model, freshly initialised by its family's own
    rules.

    `model` stays on meta; one block of `block_path` is in memory at a time. Tied parameters come
    once, under their first name. Values depend on the seed and the device's kind only.
    """
    target = torch.device(device)
    canonical = {name for name, _ in model.named_parameters()}
    stored = set(model.state_dict(keep_vars=True))
    for index, (path, module) in enumerate(_parts(model, block_path)):
        twin = copy.deepcopy(module) if path.startswith(f"{block_path}.") else _shallow_twin(module)
        if not any(True for _ in (*twin.parameters(), *twin.buffers())):
            continue
        _initialise_part(model, twin, seed=seed + index, device=target)
        for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
            full_name = f"{path}.{name}" if path else name
            is_buffer = not isinstance(tensor, nn.Parameter)
            if full_name in canonical or (is_buffer and full_name in stored):
                yield full_name, tensor.detach()


def _parts(model: nn.Module, block_path: str) -> Iterator[tuple[str, nn.Module]]:
    """Whole blocks, and every module outside them."""
    blocks = f"{block_path}."
    for path, module in model.named_modules():
        if not path.startswith(blocks) or path.count(".") == blocks.count("."):
            yield path, module


def _shallow_twin(module: nn.Module) -> nn.Module:
    """A copy of a module's own tensors without its children, of the same class."""
    twin = copy.copy(module)
    twin._modules = {}
    twin._parameters = dict(module._parameters)
    twin._buffers = dict(module._buffers)
    return twin


def _initialise_part(model: nn.Module, part: nn.Module, *, seed: int, device: torch.device) -> None:
    part.to_empty(device=device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        for module in reversed(list(part.modules())):
            _unmark(module)
            model._init_weights(module)  # type: ignore[operator]


def _run_initialisation(model: nn.Module, owners: set[str] | None) -> None:
    """transformers' initialisation of the modules named (None: all), which skips what is marked;
    the inner model when ours is wrapped."""
    from transformers import PreTrainedModel

    for name, module in model.named_modules():
        _unmark(module)
        if owners is not None and name not in owners:
            setattr(module, DONE, True)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            # Random draws of unmarked tensors do not exist, but the generators must not move
            # either.
            with torch.random.fork_rng(devices=[]):
                module.initialize_weights()
            break
    for module in model.modules():
        _unmark(module)


def _computed_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None:
                yield f"{path}.{name}" if path else name, buffer


def _poison_(buffer: Tensor) -> None:
    if buffer.is_floating_point():
        buffer.fill_(float("nan"))
    elif buffer.dtype in (torch.int64, torch.int32):
        buffer.fill_(torch.iinfo(buffer.dtype).min)
    else:
        buffer.zero_()


def _poisoned(buffer: Tensor) -> bool:
    if buffer.numel() == 0:
        return False
    if buffer.is_floating_point():
        return bool(buffer.isnan().any())
    if buffer.dtype in (torch.int64, torch.int32):
        return bool((buffer == torch.iinfo(buffer.dtype).min).any())
    return False


def _unmark(thing: nn.Module | Tensor) -> None:
    thing.__dict__.pop(DONE, None)
