"""The frozen base once in a machine's memory, pulled block by block by each of its cards.

What is trained is small and lives on every card as with `ddp`; only its gradients cross between
them. The base is read, packed and kept once per machine (host_memory.py), whatever the number of
cards: each process packs every local_world-th block on its own card and writes it where the others
will read it. Each card then pulls the blocks through a small ring (ring.py), forward and again
backward, beside its computation.

    bus time of a step     2 (L - resident - ring) x bytes of a block / bus rate, for L blocks
    hidden if              it is below the time that the blocks take to compute

which holds from about a thousand tokens a pass on. `resident_blocks` stay on the card for good;
each takes two copies off every step. `auto` that no plan has decided is decided by the first step:
what it left of the card, less a margin.

It is not for training the base itself: what is trained must be on the device.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from nibble.errors import PlacementError
from nibble.models import Built
from nibble.nn.adapters import locate
from nibble.nn.quant import PackedWeight, QuantLinear
from nibble.place.activations import Activations
from nibble.place.group import Group
from nibble.place.host_memory import HostMemory, check_host_memory
from nibble.place.ring import Copy, Ring, copy_
from nibble.place.single import Single
from nibble.place.streamed import (
    PAGE_BYTES,
    Blocks,
    Layout,
    Piece,
    Streamed,
    lay_out,
    num_resident_blocks,
    resident_positions,
)
from nibble.spec.config import Place
from nibble.spec.host_memory import PROCESS_BYTES
from nibble.spec.units import GIB, parse_bytes
from nibble.weights.stored import StoredTensors

READERS = 12
"""Threads that read a packed base from disk; with fewer a fast disk waits for checksums."""
MARGIN_BYTES, MARGIN_SHARE = GIB, 0.08
"""Left free on the card by `auto`, for rows longer than the first step's."""


class Stream(Single):
    """The placement of a base in host memory."""

    copy: Copy = staticmethod(copy_)
    """How a block comes over the bus; measurements slow it down."""
    poison = False
    """For tests: see `Ring`."""

    def __init__(self, place: Place, group: Group) -> None:
        super().__init__(place, group)
        self._place = place
        asked = place.resident_blocks
        self.resident_blocks: int | None = None if asked == "auto" else asked
        """None: the first step decides."""
        self.blocks: Blocks | None = None
        self.host: HostMemory | None = None
        self.pinned_s = 0.0
        """Seconds that registering the memory took, in its own thread."""
        self._of: dict[tuple[int, str], int] = {}
        self._packed_here: frozenset[int] = frozenset()
        self._complete = False
        self._reads: list[Future[None]] = []
        self._readers: ThreadPoolExecutor | None = None
        self._steps_done = 0

    def arrange(self, built: Built, *, activations: Activations) -> nn.Module:
        """Storage on the device for what is not streamed, in shared host memory for the rest."""
        model = built.model
        layouts = lay_out(model, built.family.blocks(model))
        num_bytes = max((b.start + _paged(b.num_bytes) for b in layouts), default=0)
        if num_bytes == 0:
            raise PlacementError(
                "place.kind=stream finds nothing frozen in the model's blocks: all of it is "
                "trained and stays on the device; use place.kind=fsdp"
            )
        pieces = [(block, piece) for block in layouts for piece in block.pieces]
        names = {id(m): name for name, m in model.named_modules()}
        for _, piece in pieces:
            empty = torch.empty(0, dtype=piece.dtype, device="meta")
            piece.owner._parameters[piece.leaf] = nn.Parameter(empty, requires_grad=False)
        super().arrange(built, activations=activations)
        for _, piece in pieces:
            self._unfilled.pop(id(piece.owner._parameters[piece.leaf]), None)
        self._share_memory(num_bytes)
        self._own_blocks(layouts)
        assert self.host is not None
        for number, block in enumerate(layouts):
            for piece in block.pieces:
                held = piece.view(self.host.bytes[block.start : block.start + block.num_bytes])
                parameter = nn.Parameter(held, requires_grad=False)
                piece.owner._parameters[piece.leaf] = parameter
                self._of[id(piece.owner), piece.leaf] = number
                if number in self._packed_here:
                    self._unfilled[id(parameter)] = f"{names[id(piece.owner)]}.{piece.leaf}"
        self._make_blocks(layouts)
        return model

    def _share_memory(self, num_bytes: int) -> None:
        """One memory for the processes of this machine: the first makes it, the others open it."""
        self._agree(lambda: self._check_and_create(num_bytes))
        refused = self._attach(num_bytes)
        if refused and Path("/dev/shm").is_dir():
            # A sandbox may keep processes from each other's files in /proc.
            if self.group.is_first_here:
                self._agree(lambda: self._create(num_bytes, Path("/dev/shm")))
            else:
                self._agree(lambda: None)
            refused = self._attach(num_bytes)
            if self.group.is_first_here and self.host is not None:
                self.host.forget()
        if refused:
            raise PlacementError(refused)

    def _check_and_create(self, num_bytes: int) -> None:
        if self.group.is_first_here:
            budget = None if self._place.ram is None else parse_bytes(self._place.ram)
            others = PROCESS_BYTES * self.group.local_world
            check_host_memory(num_bytes, other_bytes=others, budget_bytes=budget)
            self._create(num_bytes, None)

    def _create(self, num_bytes: int, folder: Path | None) -> None:
        self.host = HostMemory.create(num_bytes, folder=folder)

    def _attach(self, num_bytes: int) -> str | None:
        """Open what the first process of this machine has made; why some process could not."""
        group = self.group
        mine = (_machine(), group.local_rank, str(self.host.path) if self.host else "")
        table = group.gather(mine, "the host memory")
        refusal: str | None = None
        if not group.is_first_here:
            # The nearest first process before this one that is on the same machine.
            before = (row for row in table[group.rank :: -1] if row[:2] == (mine[0], 0))
            found = next(before, None)
            try:
                if found is None:
                    raise PlacementError(
                        f"rank {group.rank} finds no first process (LOCAL_RANK=0) on its machine: "
                        "start the processes with torchrun, srun or nibble train"
                    )
                self.host = HostMemory.attach(Path(found[2]), num_bytes)
            except PlacementError as error:
                refusal = str(error)
        refusals = group.gather(refusal, "the host memory")
        if any(refusals) and not group.is_first_here:
            self.host = None
        return next((words for words in refusals if words), None)

    def _agree(self, action: Callable[[], None]) -> None:
        """Do something that may be refused here; then all raise the refusal."""
        refusal = None
        try:
            action()
        except PlacementError as error:
            refusal = str(error)
        told = self.group.gather(refusal, "the host memory")
        if any(told):
            raise PlacementError(next(words for words in told if words))

    def _own_blocks(self, layouts: list[Layout]) -> None:
        """Divide the packing among the machine's processes, and begin to register, own first."""
        here, world = self.group.local_rank, self.group.local_world
        streamed = [number for number, block in enumerate(layouts) if block.pieces]
        self._packed_here = frozenset(streamed[here::world])
        order = streamed[here::world] + [n for n in streamed if n not in self._packed_here]
        spans = [(layouts[n].start, layouts[n].start + _paged(layouts[n].num_bytes)) for n in order]
        assert self.host is not None
        self.host.pin(spans, device=self.device)

    def _make_blocks(self, layouts: list[Layout]) -> None:
        assert self.host is not None
        memory = self.host.bytes
        sources = [memory[b.start : b.start + b.num_bytes] for b in layouts]
        streamed = sum(bool(block.pieces) for block in layouts)
        left = streamed - (self.resident_blocks or 0)
        ring = Ring(
            sources,
            num_slots=max(0, min(self._place.ring_blocks, left)),
            device=self.device,
            copy=self.copy,
            poison=self.poison,
        )
        self.blocks = Blocks(layouts, memory, ring)
        for number, block in enumerate(layouts):
            if block.pieces:
                block.module.forward = Streamed(
                    forward=block.module.forward, blocks=self.blocks, number=number
                )

    def rows(self, model: nn.Module, name: str) -> slice | None:
        """None of a matrix that another process of this machine packs, else all."""
        number = self._block_of(model, name)
        return None if number is None or number in self._packed_here else slice(0, 0)

    @torch.no_grad()
    def load(self, model: nn.Module, name: str, value: Tensor | PackedWeight) -> None:
        """Fill what the checkpoint calls `name`; a matrix of a block is packed on the device and
        goes to host memory, once on each machine.
        """
        number = self._block_of(model, name)
        if number is None:
            super().load(model, name, value)
            return
        if number not in self._packed_here:
            return
        super().load(model, name, value)

    def _fill(
        self, owner: nn.Module, leaf: str, name: str, value: Tensor | PackedWeight
    ) -> Sequence[Tensor]:
        """Put a value where it belongs; what is stored on disk is read by threads."""
        number = self._of.get((id(owner), "codes"))
        if number is None or self.blocks is None or not isinstance(owner, QuantLinear):
            return super()._fill(owner, leaf, name, value)
        pieces = [p for p in self.blocks.layouts[number].pieces if p.owner is owner]
        if isinstance(value, PackedWeight):
            stored = value.tensors
            if (
                isinstance(stored, StoredTensors)
                and value.spec == owner.spec
                and all(stored.entry(p.leaf) == (p.shape, p.dtype) for p in pieces)
            ):
                self._reads += [self._submit(stored, piece) for piece in pieces]
                return list(owner.stored().values())
        elif leaf == "weight" and self.device.type != "cpu":
            assert self.host is not None
            self.host.wait_pinned(self.blocks.layouts[number].start)
            with self._on_device(pieces):
                return super()._fill(owner, leaf, name, value.to(self.device))
        return super()._fill(owner, leaf, name, value)

    def _submit(self, stored: StoredTensors, piece: Piece) -> Future[None]:
        if self._readers is None:
            self._readers = ThreadPoolExecutor(min(READERS, os.cpu_count() or 1))
        target = piece.owner.get_parameter(piece.leaf).data
        return self._readers.submit(stored.read_into, piece.leaf, target)

    @contextmanager
    def _on_device(self, pieces: list[Piece]) -> Iterator[None]:
        """Let the pieces be on the device and copy them to host memory at the end."""
        held = [(piece.owner.get_parameter(piece.leaf), piece) for piece in pieces]
        homes = [parameter.data for parameter, _ in held]
        for parameter, _ in held:
            parameter.data = torch.empty_like(parameter.data, device=self.device)
        try:
            yield
        finally:
            for (parameter, _), home in zip(held, homes, strict=True):
                home.copy_(parameter.data, non_blocking=True)
                parameter.data = home

    def _block_of(self, model: nn.Module, name: str) -> int | None:
        """The number of the block whose host memory `name` fills."""
        try:
            owner, leaf = locate(model, name)
        except KeyError:
            return None
        if isinstance(owner, QuantLinear) and leaf == "weight":
            leaf = "codes"
        return self._of.get((id(owner), leaf))

    def parts(self, model: nn.Module) -> Iterator[nn.Module]:
        """Each block while it is on the device, and then what is outside of the blocks."""
        blocks = self._finish_loading()
        inside: set[int] = set()
        for number, block in enumerate(blocks.layouts):
            inside.add(id(block.module))
            blocks.take(number, "once")
            try:
                yield block.module
            finally:
                blocks.leave(number)
        yield from _outside(model, inside)

    def _finish_loading(self) -> Blocks:
        """All blocks are in host memory, of all processes; keep the resident ones here."""
        assert self.blocks is not None and self.host is not None
        if not self._complete:
            for read in self._reads:
                read.result()
            self._reads = []
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
            self.pinned_s = self.host.wait_pinned()
            self.group.barrier("the weights in host memory")
            self._complete = True
            self._keep(self.resident_blocks or 0)
        return self.blocks

    def _keep(self, num_resident: int) -> None:
        assert self.blocks is not None
        filled = [n for n, block in enumerate(self.blocks.layouts) if block.pieces]
        kept = resident_positions(len(filled), min(num_resident, len(filled)))
        self.blocks.keep_([filled[position] for position in kept], device=self.device)
        self.blocks.ring.prepare()

    def trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name; tied ones once."""
        self._finish_loading()
        return super().trained(model)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Gradients add up where they are; over the processes after the last pass of a step."""
        blocks = self._finish_loading()
        if self._steps_done == 1 and self.resident_blocks is None:
            self._decide()
        whole: AbstractContextManager[None] = super().micro_batch(last=last)
        try:
            with whole:
                yield
            self._steps_done += last
        finally:
            blocks.leave()

    def _decide(self) -> None:
        """Keep as many blocks as the first step left room for; every process by its own card."""
        self.resident_blocks = 0
        if self.device.type != "cuda" or self.blocks is None:
            return
        total = torch.cuda.get_device_properties(self.device).total_memory
        limit = total if self._place.vram is None else parse_bytes(self._place.vram)
        used = torch.cuda.max_memory_reserved(self.device)
        free = limit - used - MARGIN_BYTES - int(MARGIN_SHARE * limit)
        sizes = [block.num_bytes for block in self.blocks.layouts if block.pieces]
        self.resident_blocks = num_resident_blocks(
            free, block_bytes=max(sizes), num_blocks=len(sizes)
        )
        self._keep(self.resident_blocks)

    def close(self) -> None:
        """Wait for what is under way and give the memory back."""
        super().close()
        if self._readers is not None:
            self._readers.shutdown(cancel_futures=True)
        if self.blocks is not None:
            self.blocks.leave()
            self.blocks.ring.wait()
        if self.host is not None:
            self.host.close()
            self.host = None


def _paged(num_bytes: int) -> int:
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def _machine() -> str:
    """What two processes share that can share memory."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.is_file() else ''}"


def _outside(module: nn.Module, inside: set[int]) -> Iterator[nn.Module]:
    """The outermost modules that hold none of the modules `inside`."""
    for child in module.children():
        if id(child) in inside:
            continue
        if any(id(part) in inside for part in child.modules()):
            yield from _outside(child, inside)
        else:
            yield child
