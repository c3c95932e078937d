"""Everything sharded: each process keeps its rows of every weight, and gathers a block to compute
it.

torch's `fully_shard` with one unit for each block and one for what is outside of the blocks;
frozen tables come and go by themselves (tables.py). A process holds 1/p of codes, scales, trained
weights, gradients and optimiser state:

    forward     gather block i + 1 while block i computes        all-gather of the block's bytes
    backward    the same in reverse, and gradients are summed    reduce-scatter of the trained part
                to the rows of each process

`full` frees a block after each use; `grad-op` keeps it from forward to backward (half the gathers,
all blocks in memory); `hybrid` shards within groups of `shard_group` processes and copies across
them, where the links between groups are slow.

Packed weights are ordinary parameters whose rows are packed by themselves, so each process reads,
packs and keeps its own rows, and nobody ever holds the model. Under torch before 2.12 their bytes
are seen as bfloat16 (shard_views.py). No mixed-precision policy is used: it would cast such views,
silently to garbage. Adapters have a type of their own and are cast where they are used.

Gradients are summed, as the loss is divided by the targets of all processes. Passes before a step's
last one add without communication where whole gradients are small; large ones are scattered each
time. The optimiser steps plain parameters that share memory with the shards.

The decoder is the root: the loss calls it and multiplies by the head's weight itself. What stands
beside it in the model joins its unit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from nibble.errors import PlacementError, WeightError
from nibble.models import Built
from nibble.models.initialise import find_ties, finish
from nibble.nn.adapters import LoraLinear, adapters, locate
from nibble.nn.quant import PackedWeight, QuantLinear
from nibble.optim.shards import ShardView
from nibble.place.activations import Activations
from nibble.place.base import Objective
from nibble.place.group import Group, coalesced
from nibble.place.shard_views import Part, collected, cut, part, split_dim, storage_view
from nibble.place.single import Single
from nibble.place.tables import GatheredHead, around_head, tables
from nibble.spec.config import Optim, Place
from nibble.spec.lowrank import LowRank
from nibble.spec.methods import low_rank

BESIDE = "beside_the_decoder"
WHOLE_GRADIENT_BYTES = 256 << 20
"""Up to here the passes of a step add whole gradients and communicate once."""
WHAT = "the sum over shards"


class Fsdp(Single):
    """The placement of rows of everything on each of several processes."""

    def __init__(self, place: Place, group: Group) -> None:
        super().__init__(place, group)
        self._reshards = place.shard != "grad-op"
        self.mesh = _mesh(place, group)
        self._num_parts = self.mesh.size(-1)
        self._own = self.mesh.get_local_rank(-1)
        self._parts_group = self.mesh.get_group(-1)
        self._low: LowRank | None = None
        self._decoder: Any = None
        self._head: GatheredHead | None = None
        self._shards: dict[str, DTensor] = {}
        self._adds_whole = False
        self._is_checked = False

    @property
    def num_parts(self) -> int:
        """How many processes share one copy of the model."""
        return self._num_parts

    def expect(self, optim: Optim) -> None:
        """Cut what this optimiser projects along the dim that keeps the projection local."""
        self._low = low_rank(optim)

    def _allocate(self, built: Built) -> None:
        """Empty storage on the device for this process's rows.

        Raises PlacementError for a model whose trained parameters FSDP cannot put in one unit.
        """
        model, decoder = built.model, built.family.decoder(built.model)
        blocks = [block for _, block in built.family.blocks(model)]
        ties = find_ties(model)
        _check_types(model, blocks)
        words: dict[str, Any] = {
            "mesh": self.mesh,
            "ignored_params": _seen_as_floats_(model),
            "shard_placement_fn": self._placement_of,
        }
        apart = tables(built)
        first = [] if apart.embedding is None else [apart.embedding]
        with _joined(model, decoder, without=apart.head):
            for block in blocks:
                fully_shard(block, reshard_after_forward=self._reshards, **words)
            for table in first:
                fully_shard(table, reshard_after_forward=True, **words)
            fully_shard(decoder, reshard_after_forward=False, **words)
            decoder.to_empty(device=self.device)
        if apart.head is not None:
            self._head = GatheredHead(apart.head, self.mesh, device=self.device)
        finish(model, ties=ties)
        self._decoder = decoder
        units: list[Any] = [decoder, *first, *blocks]
        for unit in units:
            # Gradients are sums: the loss is divided by the targets of all processes.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        for unit, following in pairwise(units):
            unit.set_modules_to_forward_prefetch([following])

    def arrange(self, built: Built, *, activations: Activations) -> nn.Module:
        """Empty storage for this process's rows; blocks wrapped as asked."""
        model = super().arrange(built, activations=activations)
        for parameter in model.parameters():
            if not _local(parameter).numel():
                self._unfilled.pop(id(parameter), None)  # no rows of it live here
        return model

    def _placement_of(self, parameter: nn.Parameter) -> Shard:
        low = self._low if parameter.requires_grad else None
        return Shard(split_dim(parameter.shape, low, world=self._num_parts))

    def _part(self, parameter: Tensor) -> Part | None:
        """The part of a parameter that is here; None for one that is whole."""
        if not isinstance(parameter, DTensor):
            return None
        placement = parameter.placements[-1]
        assert isinstance(placement, Shard)
        shape = tuple(parameter.shape)
        own = part(shape, placement.dim, rank=self._own, world=self._num_parts)
        assert parameter._local_tensor.shape[own.dim] == own.length
        return own

    def rows(self, model: nn.Module, name: str) -> slice | None:
        """This process's rows; None for what is whole here, or cut by columns."""
        try:
            owner, leaf = locate(model, name)
        except KeyError:
            return None
        if isinstance(owner, QuantLinear) and leaf == "weight":
            leaf = "codes"
        held = owner._parameters.get(leaf)
        own = None if held is None else self._part(held)
        return own.rows if own is not None and own.dim == 0 else None

    def packed(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        """Those of the own rows."""
        owner, _ = locate(model, name)
        assert isinstance(owner, QuantLinear)
        own = self._part(owner.stored()["codes"])
        linear: QuantLinear = owner if own is None else _local_linear(owner, own)
        return linear.packed()

    def _fill(
        self, owner: nn.Module, leaf: str, name: str, value: Tensor | PackedWeight
    ) -> Sequence[Tensor]:
        """Put the own rows of a value where they belong; it comes whole or as `rows` says."""
        if isinstance(owner, QuantLinear) and leaf == "weight":
            own = self._part(owner.stored()["codes"])
            if own is None:
                return super()._fill(owner, leaf, name, value)
            dense = Part(shape=owner.shape, dim=0, start=own.start, length=own.length)
            mine = cut(value, dense, name=name)
            if own.length:
                _local_linear(owner, own).load_(mine)
            return list(owner.stored().values())
        held = owner._parameters.get(leaf)
        own = None if held is None else self._part(held)
        if held is None or own is None or isinstance(value, PackedWeight):
            return super()._fill(owner, leaf, name, value)
        mine = cut(value, own, name=name)
        assert isinstance(mine, Tensor)
        _local(held).copy_(mine)
        return [held]

    @torch.no_grad()
    def put_(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Copy the own part of a whole value into a parameter of the model."""
        own = self._part(parameter)
        if own is None:
            parameter.copy_(whole)
        elif tuple(whole.shape) != own.shape:
            raise WeightError(f"a value of {list(whole.shape)} does not fit {list(own.shape)}")
        else:
            _local(parameter).copy_(own.of(whole))

    @torch.no_grad()
    def parts(self, model: nn.Module) -> Iterator[nn.Module]:
        """What reads the base and writes by rows: each DoRA adapter as it is on the own rows."""
        for adapter in adapters(model).values():
            if adapter.magnitude is None:
                continue
            whole_a: Tensor = adapter.lora_A
            if isinstance(whole_a, DTensor):
                whole_a = whole_a.full_tensor()
            own = self._part(adapter.lora_B)
            assert own is not None
            if own.length:
                yield _local_adapter(adapter, whole_a, own)

    def trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The own parts of the parameters that learn, by the model's names; tied ones once."""
        if not self._trained:
            found = {n: p for n, p in model.named_parameters() if p.requires_grad}
            for name, parameter in found.items():
                own = self._part(parameter)
                assert own is not None and isinstance(parameter, DTensor), name
                self._shards[name] = parameter
                self._trained[name] = nn.Parameter(_local(parameter))
                self._views[name] = ShardView(
                    shape=own.shape, dim=own.dim, start=own.start, sum_=self._sum_parts
                )
            whole_bytes = sum(p.numel() * p.element_size() for p in found.values())
            self._adds_whole = whole_bytes <= WHOLE_GRADIENT_BYTES
        return dict(self._trained)

    def _sum_parts(self, tensors: Sequence[Tensor]) -> None:
        """Add tensors over the processes that share one copy of the model, in place."""

        def add(tensor: Tensor) -> None:
            dist.all_reduce(tensor, group=self._parts_group)

        with self.group.during(WHAT):
            coalesced(tensors, add)

    def around(self, objective: Objective) -> Objective:
        """The objective, which finds the head whole once the decoder is done."""
        if self._head is None:
            return objective
        return around_head(self._head, self._decoder, objective)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Gradients of the own parts are complete after the last pass of a step."""
        assert self._shards, "trained() comes before the first pass"
        self._decoder.set_requires_gradient_sync(last or not self._adds_whole)
        yield
        if last:
            self._hand_over()

    def _hand_over(self) -> None:
        """Give each own part its gradient."""
        for name, shard in self._shards.items():
            own = self._trained[name]
            if not self._is_checked and own.data_ptr() != _local(shard).data_ptr():
                raise PlacementError(
                    f"torch {torch.__version__} moved the shard of {name} after it was made: "
                    "place.kind=fsdp needs another version, such as 2.11 or 2.13"
                )
            grad = shard.grad
            own.grad = None if grad is None else _local(grad)
            shard.grad = None
        self._is_checked = True

    @torch.no_grad()
    def clip_(self, parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
        """Scale the gradients to a norm, over all parts, of at most `max_norm`; returns the norm
        before.
        """
        square = super().clip_(parameters, None).to(self.device).square()
        self._sum_parts([square])
        norm = square.sqrt()
        if max_norm is not None:
            factor = (max_norm / (norm + CLIP_EPS)).clamp(max=1.0)
            grads = [p.grad for p in parameters if p.grad is not None]
            if grads:
                torch._foreach_mul_(grads, factor)
        return norm

    def whole(self, own: Tensor, dim: int | None, sizes: Sequence[int]) -> Tensor | None:
        """All of a tensor cut along `dim`, whose parts are `sizes` long, on rank 0 in host memory.

        None on the other ranks, which must all call it. One tensor is in memory at a time.
        """
        if dim is None or self._num_parts == 1:
            return super().whole(own, None, sizes)
        if self.rank >= self._num_parts:
            return None  # another copy of the same
        return collected(self.group, own, dim, sizes)


CLIP_EPS = 1e-6
"""As in optim/clipping.py."""


def _mesh(place: Place, group: Group) -> DeviceMesh:
    """All processes in a line; for `hybrid` in rows that share one copy of the model."""
    kind = group.device.type
    if place.shard != "hybrid":
        return init_device_mesh(kind, (group.world,), mesh_dim_names=("shard",))
    size = place.shard_group or group.local_world
    if group.world % size:
        raise PlacementError(
            f"place.shard_group={size} does not divide {group.world} processes: "
            "choose a divisor, or place.shard=full"
        )
    shape = (group.world // size, size)
    return init_device_mesh(kind, shape, mesh_dim_names=("copy", "shard"))


@contextmanager
def _joined(model: nn.Module, decoder: nn.Module, *, without: nn.Module | None) -> Iterator[None]:
    """Let what is beside the decoder be a part of it."""
    others = nn.ModuleList(
        child
        for child in model.children()
        if child is not without and all(part is not decoder for part in child.modules())
    )
    if decoder is model:
        others = nn.ModuleList()
    decoder.add_module(BESIDE, others)
    try:
        yield
    finally:
        del decoder._modules[BESIDE]


def _check_types(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Raise PlacementError where one unit would train parameters of two types."""
    inside = {id(p) for block in blocks for p in block.parameters()}
    outside = [(n, p) for n, p in model.named_parameters() if id(p) not in inside]
    for named in (outside, *(list(block.named_parameters()) for block in blocks)):
        types = {str(p.dtype)[6:]: name for name, p in named if p.requires_grad}
        if len(types) > 1:
            (one, name), (other, second) = list(types.items())[:2]
            raise PlacementError(
                f"place.kind=fsdp sums gradients of one type, but {name} is {one} and "
                f"{second} is {other}: use train.precision=fp32, or place.kind=ddp"
            )


def _seen_as_floats_(model: nn.Module) -> set[nn.Parameter]:
    """Replace packed parameters by views that can be sharded; returns those that stay whole."""
    whole: set[nn.Parameter] = set()
    for module in model.modules():
        if not isinstance(module, QuantLinear):
            continue
        stored = module.stored()
        views = {name: storage_view(parameter.detach()) for name, parameter in stored.items()}
        if any(view is None for view in views.values()):
            whole |= set(module.parameters())  # scales and bias stay with their codes
            continue
        for name, view in views.items():
            assert view is not None
            if view.dtype != stored[name].dtype:
                module._parameters[name] = nn.Parameter(view, requires_grad=False)
    return whole


def _local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that is here, without gradient."""
    return tensor._local_tensor.detach() if isinstance(tensor, DTensor) else tensor.detach()


def _local_linear(linear: Any, own: Part) -> Any:
    """A linear of the own rows that shares their memory: it packs and unpacks as the whole does."""
    twin = copy.copy(linear)
    twin._parameters = {
        name: None if held is None else nn.Parameter(_own_rows(held, own), requires_grad=False)
        for name, held in linear._parameters.items()
    }
    twin.out_features = own.length
    return twin


def _own_rows(held: Tensor, own: Part) -> Tensor:
    """The own rows of a parameter that is sharded, or whole here."""
    return _local(held) if isinstance(held, DTensor) else held.detach()[own.rows]


def _local_adapter(adapter: LoraLinear, whole_a: Tensor, own: Part) -> LoraLinear:
    """An adapter of the own rows that shares their memory, but for A."""
    twin = copy.copy(adapter)
    twin._parameters = {
        name: None if held is None else nn.Parameter(_own_rows(held, own), requires_grad=False)
        for name, held in adapter._parameters.items()
        if name != "lora_A"
    }
    twin._parameters["lora_A"] = nn.Parameter(whole_a, requires_grad=False)
    twin.out_features = own.length
    twin._modules = {**adapter._modules, "base": _local_linear(adapter.base, own)}
    return twin
