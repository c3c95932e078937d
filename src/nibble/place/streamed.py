"""Blocks whose frozen weights lie in host memory and are on the device only while they are used.

    forward    take block i . compute it . give it back
    backward   take block i . recompute it, its gradients . give it back      (i falling)

Two autograd functions stand around each block: behind its output one whose backward takes the
block, in front of its inputs one whose backward gives it back. So nothing of the model's own code
is changed, and recomputation happens in between. Where a block's input needs no gradient the second
does not run; the next block that is taken, or the end of the pass, gives it back.

What is streamed are the frozen matrices of a block, packed or not; norms, biases and whatever is
trained stay on the device. While a block is away its parameters show its bytes in host memory, so a
state dict, an export or a look at the model see true values.

Packed linears ask for their tensors again in backward. Others' are kept by autograd: where a
block's matrices are not all packed, what autograd keeps of them is replaced by its place in the
buffer, and read from where the block then is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from nibble.errors import PlacementError
from nibble.nn.quant import QuantLinear
from nibble.place.ring import Ring, Slot, Way

ALIGN_BYTES = 256
PAGE_BYTES = 4096
"""Blocks begin on pages, so that each can be registered with the driver by itself."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One tensor of a block: `owner.leaf`, at `offset` bytes within the block."""

    owner: nn.Module
    leaf: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of its elements."""
        return prod(self.shape) * self.dtype.itemsize

    def view(self, block: Tensor) -> Tensor:
        """This tensor within the bytes of its block."""
        part = block[self.offset : self.offset + self.num_bytes]
        return part.view(self.dtype).view(self.shape)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The streamed tensors of one block, contiguous from `start` bytes on in host memory."""

    name: str
    module: nn.Module
    pieces: tuple[Piece, ...]
    start: int
    num_bytes: int

    @property
    def is_packed(self) -> bool:
        """Whether autograd keeps none of the pieces."""
        return all(isinstance(piece.owner, QuantLinear) for piece in self.pieces)


def lay_out(model: nn.Module, blocks: Sequence[tuple[str, nn.Module]]) -> list[Layout]:
    """Where each frozen matrix of the blocks lies in one stretch of host memory.

    What several modules share stays out: it may be used outside of its block.
    """
    uses = Counter(id(p) for p in _all_parameters(model))
    layouts, start = [], 0
    for name, block in blocks:
        pieces, offset = [], 0
        for owner in block.modules():
            for leaf, parameter in owner._parameters.items():
                if parameter is None or parameter.requires_grad or parameter.dim() < 2:
                    continue
                if uses[id(parameter)] == 1:
                    shape = tuple(parameter.shape)
                    piece = Piece(
                        owner=owner, leaf=leaf, offset=offset, shape=shape, dtype=parameter.dtype
                    )
                    pieces.append(piece)
                    offset += -(-piece.num_bytes // ALIGN_BYTES) * ALIGN_BYTES
        layouts.append(
            Layout(name=name, module=block, pieces=tuple(pieces), start=start, num_bytes=offset)
        )
        start += -(-offset // PAGE_BYTES) * PAGE_BYTES
    return layouts


def _all_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        yield from (p for p in module._parameters.values() if p is not None)


def resident_positions(num_blocks: int, num_resident: int) -> tuple[int, ...]:
    """Which blocks stay on the device: the streamed ones are spread evenly over the model.

    A resident block is time in which the bus works ahead, but only as far as the ring reaches:
    residents in a row would leave it idle behind a full ring, and then waited for.
    """
    num_streamed = max(0, num_blocks - num_resident)
    streamed = {(2 * j + 1) * num_blocks // (2 * num_streamed) for j in range(num_streamed)}
    return tuple(block for block in range(num_blocks) if block not in streamed)


def num_resident_blocks(free_bytes: int, *, block_bytes: int, num_blocks: int) -> int:
    """How many blocks may stay in what is free beside the ring."""
    return min(num_blocks, max(0, free_bytes) // max(1, block_bytes))


class Blocks:
    """The blocks of a model in their places: host memory, ring, or for good on the device."""

    def __init__(self, layouts: Sequence[Layout], host: Tensor, ring: Ring) -> None:
        """`host`: the bytes that the layouts divide."""
        self.layouts = layouts
        self.ring = ring
        self._host = [host[b.start : b.start + b.num_bytes] for b in layouts]
        self._views: dict[tuple[int | None, int], list[Tensor]] = {}
        self._storages = {s.buffer.untyped_storage().data_ptr(): s for s in ring.slots}
        self._resident: dict[int, Tensor] = {}
        for block in range(len(layouts)):
            self._show(block, None)
        self._order()

    def host_bytes(self, block: int) -> Tensor:
        """The block in host memory."""
        return self._host[block]

    @property
    def resident(self) -> tuple[int, ...]:
        """Numbers of the blocks that stay."""
        return tuple(self._resident)

    def keep_(self, blocks: Sequence[int], *, device: torch.device) -> None:
        """Keep these blocks on the device for good."""
        self.ring.give_back()
        for block in blocks:
            if self.layouts[block].pieces and block not in self._resident:
                buffer = self._host[block].to(device, copy=True)
                self._resident[block] = buffer
                for piece in self.layouts[block].pieces:
                    piece.owner.get_parameter(piece.leaf).data = piece.view(buffer)
        self._order()

    def take(self, block: int, way: Way) -> None:
        """Let the block's parameters be on the device."""
        if not self._is_streamed(block):
            return
        before = self.ring.taken
        if before == block:
            return
        if before is not None:
            self._show(before, None)
        self._show(block, self.ring.take(block, way))

    def leave(self, block: int | None = None) -> None:
        """Nothing reads the block (None: any) after what was launched until now."""
        taken = self.ring.taken
        if taken is not None and block in (None, taken):
            self._show(taken, None)
            self.ring.give_back()

    def saved(self, block: int) -> saved_tensors_hooks | nullcontext[None]:
        """What surrounds a forward pass whose graph may keep matrices of the block."""
        if not self._is_streamed(block) or self.layouts[block].is_packed:
            return nullcontext()
        return saved_tensors_hooks(self._forget, self._recall)

    def _order(self) -> None:
        self.ring.set_order([b for b in range(len(self.layouts)) if self._is_streamed(b)])

    def _is_streamed(self, block: int) -> bool:
        return bool(self.layouts[block].pieces) and block not in self._resident

    def _show(self, block: int, slot: Slot | None) -> None:
        """Point the block's parameters to a slot, or (None) to host memory."""
        key = (None if slot is None else slot.number, block)
        if key not in self._views:
            held = self._host[block] if slot is None else slot.buffer
            self._views[key] = [piece.view(held) for piece in self.layouts[block].pieces]
        for piece, view in zip(self.layouts[block].pieces, self._views[key], strict=True):
            parameter = piece.owner._parameters[piece.leaf]
            assert parameter is not None
            parameter.data = view

    def _forget(self, tensor: Tensor) -> Tensor | _Place:
        """Keep of a tensor in a slot where it was."""
        slot = self._storages.get(tensor.untyped_storage().data_ptr())
        if slot is None or slot.block is None:
            return tensor.detach()
        return _Place(
            block=slot.block,
            offset=int(tensor.storage_offset()) * tensor.dtype.itemsize,
            size=tuple(tensor.size()),
            stride=tensor.stride(),
            dtype=tensor.dtype,
        )

    def _recall(self, kept: Tensor | _Place) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        slot = next(slot for slot in self.ring.slots if slot.block == kept.block)
        assert self.ring.taken == kept.block, "a block is read that was not taken"
        whole = slot.buffer.view(kept.dtype)
        return whole.as_strided(kept.size, kept.stride, kept.offset // kept.dtype.itemsize)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A tensor in the buffer of a block."""

    block: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """A block's forward that has its weights when it runs, and again in backward."""

    forward: Callable[..., Any]
    blocks: Blocks
    number: int

    def __call__(self, *args: Any, **words: Any) -> Any:
        """Whatever the block takes and returns."""
        graph = torch.is_grad_enabled()
        with self._present("up" if graph else "once"):
            if not graph:
                return self.forward(*args, **words)
            args, words = self._through(_Front, args), self._through(_Front, words)
            with self.blocks.saved(self.number):
                output = self.forward(*args, **words)
            if not isinstance(output, Tensor | tuple | list | dict):
                raise PlacementError(
                    f"place.kind=stream cannot follow {type(output).__name__}, which "
                    f"{self.blocks.layouts[self.number].name} returns: use place.kind=fsdp"
                )
            return self._through(_Back, output)

    @contextmanager
    def _present(self, way: Way) -> Iterator[None]:
        self.blocks.take(self.number, way)
        try:
            yield
        finally:
            self.blocks.leave(self.number)

    def _through(self, function: type[_Front | _Back], value: Any) -> Any:
        """`value` with every tensor in it that needs a gradient passed through the function."""
        found: list[Tensor] = []
        _visit(value, found.append)
        if not found:
            return value
        passed = iter(function.apply(self.blocks, self.number, *found))  # type: ignore[no-untyped-call]
        return _replaced(value, passed)


def _needs_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _visit(value: Any, seen: Callable[[Tensor], None]) -> None:
    if _needs_gradient(value):
        seen(value)
    elif type(value) in (tuple, list):
        for part in value:
            _visit(part, seen)
    elif type(value) is dict:
        for part in value.values():
            _visit(part, seen)


def _replaced(value: Any, new: Iterator[Tensor]) -> Any:
    if _needs_gradient(value):
        return next(new)
    if type(value) in (tuple, list):
        return type(value)(_replaced(part, new) for part in value)
    if type(value) is dict:
        return {key: _replaced(part, new) for key, part in value.items()}
    return value


class _Front(torch.autograd.Function):
    """Identity in front of a block: its backward comes last and gives the block back."""

    @staticmethod
    def forward(ctx: Any, blocks: Blocks, number: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.blocks, ctx.number = blocks, number
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        ctx.blocks.leave(ctx.number)
        return None, None, *grads


class _Back(torch.autograd.Function):
    """Identity behind a block: its backward comes first and takes the block."""

    @staticmethod
    def forward(ctx: Any, blocks: Blocks, number: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.blocks, ctx.number = blocks, number
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        ctx.blocks.take(ctx.number, "down")
        return None, None, *grads
