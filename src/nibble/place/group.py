"""The processes of a run: who this one is, and how they add, share and wait.

One process per device. Whoever starts them (`nibble train` itself, torchrun, accelerate, srun) says
who is who in the environment, in torchrun's words:

    RANK, WORLD_SIZE                this process among all
    LOCAL_RANK, LOCAL_WORLD_SIZE    among those of its machine
    MASTER_ADDR, MASTER_PORT        where the first one listens

Tensors on GPUs travel through NCCL, those in host memory through gloo, which does everything where
NCCL is absent. Sums of many small tensors are one message for each type. Everybody must ask for the
same things in the same order; who waits longer than `place.timeout_s` for the others, or learns
that one has gone (watch.py), gets a PlacementError that names what it waited for. A world of one
communicates with nobody and costs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from nibble.errors import NibbleError, PeerError, PlacementError
from nibble.place.devices import begin_context, device_of_rank, pick_device
from nibble.place.watch import Watch
from nibble.spec.config import Place

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Group:
    """This process (`rank` of `world`, `local_rank` of `local_world` on its machine), its device,
    and its ways to the others.
    """

    device: torch.device
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    timeout_s: float = 600.0
    _owns: bool = field(default=False, repr=False)
    """Whether `close` ends torch's process group."""
    _watch: Watch | None = field(default=None, repr=False)

    @classmethod
    def alone(cls, device: torch.device) -> Group:
        """A world of one."""
        return cls(device=device)

    @classmethod
    def from_environment(cls, place: Place) -> Group:
        """The group that the environment describes; alone where it describes none.

        Raises PlacementError when the words contradict each other, a GPU is missing, the port is
        taken, or the others do not come within `place.timeout_s`.
        """
        if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
            device = pick_device(place.device)
            begin_context(device)
            return cls.alone(device)
        rank, world = _number("RANK"), _number("WORLD_SIZE")
        local_rank = _number("LOCAL_RANK", default=rank)
        local_world = _number("LOCAL_WORLD_SIZE", default=world)
        if not (0 <= rank < world and 0 <= local_rank < local_world):
            raise PlacementError(
                f"RANK={rank} of WORLD_SIZE={world}, LOCAL_RANK={local_rank} of LOCAL_WORLD_SIZE="
                f"{local_world}: ranks count from 0 to below the number of processes"
            )
        device = device_of_rank(place.device, local_rank=local_rank, local_world=local_world)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            begin_context(device)
        owns = world > 1 and not dist.is_initialized()
        if owns:
            _join(device, rank=rank, world=world, timeout_s=place.timeout_s)
        return cls(
            device=device,
            rank=rank,
            world=world,
            local_rank=local_rank,
            local_world=local_world,
            timeout_s=place.timeout_s,
            _owns=owns,
            _watch=Watch(rank=rank, world=world, timeout_s=place.timeout_s) if owns else None,
        )

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.rank == 0

    @property
    def is_first_here(self) -> bool:
        """Whether this process does what is done once on each machine."""
        return self.local_rank == 0

    def sum_(self, tensors: Sequence[Tensor], what: str = "a sum") -> None:
        """Replace each tensor by its sum over all processes; one message for each type."""
        if self.world > 1 and tensors:
            with self.during(what):
                coalesced(tensors, dist.all_reduce)

    def max_(self, tensors: Sequence[Tensor], what: str = "a maximum") -> None:
        """Replace each tensor by its element-wise maximum over all processes."""
        if self.world > 1 and tensors:
            with self.during(what):
                coalesced(tensors, _all_reduce_max)

    def broadcast_(self, tensors: Sequence[Tensor], what: str = "a broadcast") -> None:
        """Replace each tensor by that of rank 0; one message for each type."""
        if self.world > 1 and tensors:
            with self.during(what):
                coalesced(tensors, _broadcast_first)

    def begin_sum_(self, tensor: Tensor, what: str = "a sum") -> Callable[[], None]:
        """Start to replace a contiguous tensor by its sum; call what is returned to wait for it.

        On a GPU waiting holds back the present stream and not the host.
        """
        if self.world == 1:
            return _done
        with self.during(what):
            work = dist.all_reduce(tensor, async_op=True)

        def wait() -> None:
            assert work is not None
            with self.during(what):
                work.wait()

        return wait

    def gather(self, value: Any, what: str = "the others' values") -> list[Any]:
        """The `value` of each rank, in order of ranks, on every rank; small plain data."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        with self.during(what):
            dist.all_gather_object(found, value)
        return found

    def share(self, value: Any, what: str = "the first process") -> Any:
        """Rank 0's `value`, on every rank; small plain data."""
        if self.world == 1:
            return value
        held = [value]
        with self.during(what):
            dist.broadcast_object_list(held, src=0)
        return held[0]

    def barrier(self, name: str) -> None:
        """Wait until all have come to `name`."""
        arrived = torch.ones(())
        self.sum_([arrived], name)

    def first_does(self, name: str, action: Callable[[], T]) -> T | None:
        """Let rank 0 do something while the others wait, however long it takes; None there."""
        if self.is_first:
            done = action()
            if self._watch is not None:
                self._watch.announce()
            return done
        assert self._watch is not None, "a group from the environment"
        with self.during(name):
            self._watch.await_first()
        return None

    def first_then_others(self, name: str, action: Callable[[], T]) -> T:
        """Let all do something, rank 0 before the others: it fills a cache that they then read."""
        done = self.first_does(name, action)
        if self.is_first:
            return cast("T", done)
        return action()

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Turn what the libraries say of a vanished or silent process into one PlacementError that
        names `what` this process was at.
        """
        watch = self._watch
        before = "" if watch is None else watch.doing
        at = f"{before}: {what}" if before else what
        if watch is not None:
            watch.doing = at
        try:
            yield
        except (dist.DistError, RuntimeError) as error:
            reason = _what_happened(error)
            if self.world == 1 or reason is None:
                raise
            words = None if watch is None else watch.words(WORDS_S)
            raise PeerError(f"{words or reason} (rank {self.rank} was at {at})") from error
        finally:
            if watch is not None:
                watch.doing = before

    def close(self) -> None:
        """Leave the others, who leave as well; nothing may be asked of the group afterwards."""
        if self._watch is not None:
            self._watch.stop()
        if self._owns and dist.is_initialized():
            self.barrier("the end of the run")
            dist.destroy_process_group()

    def __enter__(self) -> Group:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave in order, or let the others know why this process cannot go on."""
        if error is None:
            self.close()
        elif self._watch is not None:
            # What is under way is not waited for: the others may never answer.
            lines = str(error).strip().splitlines()
            said = lines[0] if lines else ""
            name = "" if isinstance(error, NibbleError) else f"{type(error).__name__}: "
            self._watch.say(f"{name}{said}")


WORDS_S = 4.0
"""How long a broken connection waits for the reason."""
_GONE = ("closed by peer", "reset by peer", "Broken pipe", "connection refused", "remote process")
_LATE = ("Timed out", "timed out", "timeout", "Timeout")


def _what_happened(error: Exception) -> str | None:
    """Words for a failure of communication; None for any other failure."""
    text = str(error)
    if not isinstance(error, dist.DistError) and not any(
        word in text for word in ("gloo", "NCCL", "Gloo", "c10d", "Socket", "socket")
    ):
        return None
    if any(word.lower() in text.lower() for word in _GONE):
        return "another process of the run has gone"
    if any(word in text for word in _LATE):
        return "another process of the run did not come in time (place.timeout_s)"
    lines = text.strip().splitlines()
    return f"communication failed ({lines[0][:200] if lines else type(error).__name__})"


def _join(device: torch.device, *, rank: int, world: int, timeout_s: float) -> None:
    """Meet the others and start torch's process group."""
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    limit = timedelta(seconds=timeout_s)
    fast = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
    try:
        dist.init_process_group(f"cpu:gloo,cuda:{fast}", rank=rank, world_size=world, timeout=limit)
    except (dist.DistError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else "no reason"
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            reason = f"the port is taken: set another MASTER_PORT ({reason})"
        raise PlacementError(
            f"rank {rank} of {world} could not meet the others at {where} within {timeout_s:g} s: "
            f"{reason}"
        ) from error


def _number(name: str, *, default: int | None = None) -> int:
    """An integer of the environment."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise PlacementError(
            f"the environment has {name}={text}: RANK and WORLD_SIZE go together and are integers, "
            "as torchrun sets them"
        ) from None


def _done() -> None:
    """There was nothing to wait for."""


def _all_reduce_max(tensor: Tensor) -> None:
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)


def _broadcast_first(tensor: Tensor) -> None:
    dist.broadcast(tensor, src=0)


MESSAGE_BYTES = 64 << 20
"""Small tensors are put together up to about this size."""


@torch.no_grad()
def coalesced(tensors: Sequence[Tensor], communicate: Callable[[Tensor], object]) -> None:
    """Communicate tensors in as few messages as types and sizes allow; large ones uncopied."""
    kinds: dict[tuple[torch.dtype, torch.device], list[list[Tensor]]] = {}
    for tensor in tensors:
        messages = kinds.setdefault((tensor.dtype, tensor.device), [[]])
        if sum(t.nbytes for t in messages[-1]) + tensor.nbytes > MESSAGE_BYTES:
            messages.append([])
        messages[-1].append(tensor.detach())
    for same in (message for messages in kinds.values() for message in messages if message):
        if len(same) == 1 and same[0].is_contiguous():
            communicate(same[0])
            continue
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        communicate(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in same])
        for tensor, part in zip(same, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
