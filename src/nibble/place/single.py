"""A whole copy on each device: one process alone, or several that add their gradients.

With several (`ddp`) every process computes its own share of a step's rows; the sum of gradients is
formed while backward still runs (reduce.py) and every process makes the same update. Before the
first step all take the trained parameters of rank 0. A world of one is the same code without
anybody to talk to.

Storage is made on the device at once, so that a weight goes from the checkpoint's memory map to
where it stays with one tensor in between; packed formats are packed by the device that keeps them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nibble.data import Batch
from nibble.errors import ConfigError, WeightError
from nibble.models import Built, materialise
from nibble.nn.adapters import locate
from nibble.nn.int8_weights import Int8Linear
from nibble.nn.quant import PackedWeight, QuantLinear
from nibble.optim import clip_grad_norm_
from nibble.optim.shards import ShardView, whole
from nibble.place.activations import Activations, Checkpointed, checkpoint_
from nibble.place.base import Memory, Objective, host_peak_bytes
from nibble.place.devices import cap_vram, pick_device
from nibble.place.group import Group
from nibble.place.reduce import Reducer, agree_
from nibble.spec.config import Optim, Place
from nibble.spec.methods import has_int8_weights
from nibble.spec.units import parse_bytes


class Single:
    """The placement of a whole copy on this process's device."""

    def __init__(self, place: Place, group: Group) -> None:
        self.group = group
        self.device, self.rank, self.world = group.device, group.rank, group.world
        self._unfilled: dict[int, str] = {}
        self._seen: set[str] = set()
        self._views: dict[str, ShardView] = {}
        self._trained: dict[str, nn.Parameter] = {}
        self.checkpointed = Checkpointed()
        """What blocks compute again, and the host memory that holds activations."""
        self.reducer: Reducer | None = None
        """What adds gradients over the processes, from the first step on."""
        if self.device.type == "cuda":
            # Memory is asked about, and kernels are launched, on the present device.
            torch.cuda.init()  # type: ignore[no-untyped-call]
            torch.cuda.set_device(self.device)
        if place.vram is not None:
            cap_vram(self.device, parse_bytes(place.vram))

    @property
    def num_parts(self) -> int:
        """One: every process has all of it."""
        return 1

    def expect(self, optim: Optim) -> None:
        """Parameters are whole, so it may be anything but what steps codes, which do not add up.

        Raises ConfigError for INT8 weights on several devices.
        """
        if self.world > 1 and has_int8_weights(optim):
            raise ConfigError(
                f"optim.weights=int8 on {self.world} devices: codes are updated on one; use "
                "place.num_devices=1, or optim.weights=float"
            )

    def arrange(self, built: Built, *, activations: Activations) -> nn.Module:
        """Empty storage on the device for every parameter and buffer; blocks wrapped as asked."""
        model = built.model
        self._allocate(built)
        blocks = [block for _, block in built.family.blocks(model)]
        self.checkpointed = checkpoint_(blocks, activations)
        self._seen = set()
        stored = set(model.state_dict(keep_vars=True))
        buffers = ((n, b) for n, b in model.named_buffers() if n in stored)
        # By identity: tied parameters are one tensor with two names.
        self._unfilled = {id(t): name for name, t in (*model.named_parameters(), *buffers)}
        return model

    def _allocate(self, built: Built) -> None:
        """Storage on the device for the whole model."""
        materialise(built.model, device=self.device)

    def rows(self, model: nn.Module, name: str) -> slice | None:
        """All of them: there is one process."""
        del model, name
        return None

    def packed(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        """Those of the linear, which is whole here or nobody's."""
        owner, _ = locate(model, name)
        assert isinstance(owner, QuantLinear)
        return owner.packed()

    @torch.no_grad()
    def load(self, model: nn.Module, name: str, value: Tensor | PackedWeight) -> None:
        """Fill what the checkpoint calls `name`, packed by the device that keeps it.

        Raises WeightError for a name that the model lacks or that came before, and for a shape that
        does not fit.
        """
        if name in self._seen:
            raise WeightError(f"{name} comes twice in the checkpoint: remove the copy")
        self._seen.add(name)
        try:
            owner, leaf = locate(model, name)
        except KeyError:
            raise WeightError(f"{name} is in the checkpoint but not in the model") from None
        for tensor in self._fill(owner, leaf, name, value):
            self._unfilled.pop(id(tensor), None)

    def _fill(
        self, owner: nn.Module, leaf: str, name: str, value: Tensor | PackedWeight
    ) -> Sequence[Tensor]:
        """Put a value where it belongs; returns the parameters and buffers that hold it now."""
        if isinstance(owner, QuantLinear) and leaf == "weight":
            owner.load_(value)
            return list(owner.stored().values())
        if isinstance(owner, Int8Linear) and leaf == "weight" and isinstance(value, Tensor):
            owner.load_(value)
            return [owner.weight, owner.codes, owner.scales]
        return [self._copy(owner, leaf, name, value)]

    def _copy(self, owner: nn.Module, leaf: str, name: str, value: Tensor | PackedWeight) -> Tensor:
        own: dict[str, Tensor | None] = {**owner._buffers, **owner._parameters}
        target = own.get(leaf)
        if target is None:
            raise WeightError(f"{name} is in the checkpoint but not in the model")
        if isinstance(value, PackedWeight):
            raise WeightError(
                f"{name} is stored as {value.spec.name} but stays in 16 bit here: "
                "set the quant section to the checkpoint's format and leave it out of quant.keep"
            )
        if target.shape != value.shape:
            raise WeightError(
                f"{name} has shape {list(value.shape)} in the checkpoint and {list(target.shape)} "
                "in the model: config.json is of another model"
            )
        target.copy_(value)
        return target

    def parts(self, model: nn.Module) -> Iterator[nn.Module]:
        """The whole model, which is here."""
        yield model

    @torch.no_grad()
    def put_(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Copy a value into a parameter, which is whole."""
        parameter.copy_(whole)

    def whole(self, own: Tensor, dim: int | None, sizes: Sequence[int]) -> Tensor | None:
        """The tensor itself, in host memory; None on all but the first process."""
        del dim, sizes
        return own.detach().cpu() if self.rank == 0 else None

    def check_loaded(self, model: nn.Module, *, initialised: Iterable[Tensor] = ()) -> None:
        """Raise WeightError naming what was neither loaded nor `initialised` on purpose."""
        done = {id(tensor) for tensor in initialised}
        missing = [name for key, name in self._unfilled.items() if key not in done]
        if missing:
            more = f" and {len(missing) - 1} others are" if len(missing) > 1 else " is"
            raise WeightError(
                f"{missing[0]}{more} not in the checkpoint: it is incomplete or of another model"
            )
        self._unfilled = {}

    def trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name; tied ones once."""
        found = {n: p for n, p in model.named_parameters() if p.requires_grad}
        tensors = (*model.named_parameters(), *model.named_buffers())
        self._views = {name: whole(tensor) for name, tensor in tensors}
        self._trained = found
        return found

    def view(self, name: str) -> ShardView:
        """All of it."""
        return self._views[name]

    def around(self, objective: Objective) -> Objective:
        """The objective itself."""
        return objective

    def batch(self, batch: Batch) -> Batch:
        """The batch on the device, copied without waiting."""
        if self.device.type == "cpu":
            return batch
        moved: dict[str, Any] = {
            field.name: value.pin_memory().to(self.device, non_blocking=True)
            for field in dataclasses.fields(batch)
            if isinstance(value := getattr(batch, field.name), Tensor)
        }
        return dataclasses.replace(batch, **moved)

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Gradients add up where they are; over the processes after the last pass of a step."""
        if self.world == 1:
            return nullcontext()
        if self.reducer is None:
            # Not before: the weights are loaded and the optimiser has placed its hooks by now.
            agree_(self._trained, self.group)
            self.reducer = Reducer(self._trained, self.group)
        return self.reducer.micro_batch(last=last)

    def clip_(self, parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
        """Scale the gradients to a global norm of at most `max_norm`; returns the norm before,
        fp32.
        """
        return clip_grad_norm_(parameters, max_norm=max_norm)

    def follow(self) -> None:
        """Nothing: what is trained are the model's parameters themselves, or share their memory."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world == 1:
            return tensor
        total = tensor.clone()
        self.group.sum_([total])
        return total

    def during(self, what: str) -> AbstractContextManager[None]:
        """Names what this process is at, for the error when another one goes."""
        return self.group.during(what)

    def barrier(self, name: str = "the others") -> None:
        """Wait for all processes."""
        self.group.barrier(name)

    def close(self) -> None:
        """Take the hooks off; nothing outlives the process."""
        if self.reducer is not None:
            self.reducer.close()
            self.reducer = None

    def memory(self) -> Memory:
        """Peaks of this process since the last reset (the host's since its start)."""
        cuda = self.device.type == "cuda"
        return Memory(
            allocated_bytes=torch.cuda.max_memory_allocated(self.device) if cuda else 0,
            reserved_bytes=torch.cuda.max_memory_reserved(self.device) if cuda else 0,
            host_bytes=host_peak_bytes(),
        )

    def reset_memory(self, *, keep_cache: bool = False) -> None:
        """Start a new peak, with cached memory given back unless it is kept."""
        if self.device.type == "cuda":
            if not keep_cache:
                torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


def one_device(place: Place) -> Single:
    """The placement of a command that needs one device, whatever the recipe trained on."""
    return Single(place, Group.alone(pick_device(place.device)))
