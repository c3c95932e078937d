"""Gradients summed over the processes while backward still runs.

    G = sum over ranks of G_r       (each loss is divided by the targets of all ranks, so no mean)

Parameters are laid into buckets once, last one first, since that is about the order in which
backward finishes them. A bucket is sent when its last gradient is there, never before the one in
front of it: the order of messages is the same on all ranks, whatever the order of gradients. Only
the last micro-batch of a step sends; before it gradients add up where they are. A parameter that
got no gradient here counts as zeros, and has none afterwards if it had none anywhere. The method is
that of torch's DistributedDataParallel (Li et al. 2020, arXiv 2006.15704) without its wrapper, so
that the model's names and hooks stay as they are.

A gradient that is kept as its projection (optim/projected_grad.py) travels as its small tensors, in
ratio min(m, n) / r fewer bytes; one that a rank did not use travels as zeros of the same shapes.

Costs: a copy of each bucket in flight (large gradients are summed where they are), and one short
message a step that says which parameters had gradients; it is read only where some had none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nibble.errors import PlacementError
from nibble.optim import absent_grad, small_tensors
from nibble.optim.projected_grad import ProjectedGrad
from nibble.place.group import Group

BUCKET_BYTES = 32 << 20
"""Of full gradients. Large enough for the links' full speed, small enough that the last bucket,
which nothing hides, is short."""
WHAT = "the sum of the gradients"


@dataclass(kw_only=True)
class _Message:
    """Tensors of one type that are summed together, `flat` when that took a copy."""

    parts: list[Tensor]
    flat: Tensor | None
    wait: Callable[[], None]


@dataclass(eq=False, kw_only=True)
class _Bucket:
    """Parameters whose gradients travel together, and how many of them are not there yet."""

    params: list[nn.Parameter]
    missing: int = 0
    messages: list[_Message] = field(default_factory=list)


class Reducer:
    """The hooks of one process. Make it when the optimiser has placed its own, which come first.

    `num_bytes` counts what this process has sent in gradients so far.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        group: Group,
        *,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self.num_bytes = 0
        self._group = group
        self._params = list(params.values())
        self._buckets = _lay_out(self._params, bucket_bytes)
        self._bucket_of = {p: bucket for bucket in self._buckets for p in bucket.params}
        self._next = 0
        self._sends = False
        self._handles: list[RemovableHandle] = []
        for parameter in self._params:
            register = parameter.register_post_accumulate_grad_hook
            self._handles.append(register(self._arrived))  # type: ignore[no-untyped-call]

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Surrounds forward and backward of one pass; at the end of the last one gradients are
        whole.
        """
        if last:
            self._start()
        yield
        if last:
            self._finish()

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _start(self) -> None:
        self._next, self._sends = 0, True
        for bucket in self._buckets:
            bucket.missing = len(bucket.params)

    def _arrived(self, parameter: Tensor) -> None:
        """A gradient is complete on this process."""
        if not self._sends:
            return
        bucket = self._bucket_of[parameter]  # type: ignore[index]
        bucket.missing -= 1
        while self._next < len(self._buckets) and self._buckets[self._next].missing == 0:
            self._send(self._buckets[self._next])
            self._next += 1

    @torch.no_grad()
    def _send(self, bucket: _Bucket) -> None:
        """Start the sum of a bucket."""
        for parameter in bucket.params:
            if parameter.grad is None:
                parameter.grad = absent_grad(parameter)
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for part in (part for p in bucket.params for part in _parts(p)):
            kinds.setdefault(part.dtype, []).append(part)
        for parts in kinds.values():
            whole = len(parts) == 1 and parts[0].is_contiguous()
            flat = None if whole else torch.cat([part.reshape(-1) for part in parts])
            sent = parts[0] if flat is None else flat
            self.num_bytes += sent.nbytes
            wait = self._group.begin_sum_(sent, WHAT)
            bucket.messages.append(_Message(parts=parts, flat=flat, wait=wait))

    @torch.no_grad()
    def _finish(self) -> None:
        """Send what is left, wait for everything, and put the sums where gradients are kept."""
        without = [p for p in self._params if p.grad is None]
        for bucket in self._buckets[self._next :]:
            self._send(bucket)
        self._sends = False
        counts = self._count_gradients(without)
        for bucket in self._buckets:
            for message in bucket.messages:
                message.wait()
                if message.flat is not None:
                    parts = message.parts
                    sums = torch.split(message.flat, [part.numel() for part in parts])
                    views = [s.view_as(part) for s, part in zip(sums, parts, strict=True)]
                    torch._foreach_copy_(parts, views)
            bucket.messages = []
        if without:
            index = {parameter: i for i, parameter in enumerate(self._params)}
            had = counts.tolist()
            for parameter in without:
                if had[index[parameter]] == 0:
                    parameter.grad = None

    def _count_gradients(self, without: list[nn.Parameter]) -> Tensor:
        """How many ranks had a gradient of each parameter."""
        device = self._params[0].device
        counts = torch.ones(len(self._params), device=device)
        if without:
            lacking = set(without)
            counts = torch.tensor([float(p not in lacking) for p in self._params], device=device)
        self._group.sum_([counts], WHAT)
        return counts


def agree_(params: Mapping[str, nn.Parameter], group: Group) -> None:
    """Give every rank the trained parameters of rank 0, and make sure that it has them.

    Raises PlacementError when the ranks train different parameters, or when their bits differ after
    they were sent: then some link or memory is broken, and so would every step be.
    """
    if group.world == 1:
        return
    what = "the trained parameters"
    mine = [(name, list(p.shape), str(p.dtype)) for name, p in params.items()]
    first = group.share(mine, what)
    differ = [mine_[0] for mine_, theirs in zip(mine, first, strict=False) if mine_ != theirs]
    answers = group.gather(
        (differ[0] if differ else "their number") if mine != first else None, what
    )
    for rank, name in enumerate(answers):
        if name is not None:
            raise PlacementError(
                f"rank {rank} trains other parameters than rank 0 ({name}): start all processes "
                "with one recipe and one version of every package"
            )
    group.broadcast_(list(params.values()), what)
    sums = group.gather(checksum(list(params.values())), what)
    for rank, found in enumerate(sums):
        if found != sums[0]:
            raise PlacementError(
                f"rank {rank} holds other weights than rank 0 sent it: a link or memory is broken"
            )


@torch.no_grad()
def checksum(tensors: list[Tensor]) -> int:
    """A number that differs when one bit of the tensors does; one read from the device."""
    if not tensors:
        return 0
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [
        tensor.detach().contiguous().view(words[tensor.element_size()]).sum(dtype=torch.int64)
        for tensor in tensors
    ]
    weights = torch.arange(1, len(sums) + 1, device=sums[0].device)
    return int((torch.stack([s.to(sums[0].device) for s in sums]) * weights).sum())


def _parts(parameter: nn.Parameter) -> list[Tensor]:
    """The tensors in which a parameter's gradient travels."""
    grad = parameter.grad
    assert grad is not None
    return small_tensors([parameter]) if isinstance(grad, ProjectedGrad) else [grad]


def _lay_out(params: list[nn.Parameter], bucket_bytes: int) -> list[_Bucket]:
    """Buckets of one type and device, last parameter first."""
    buckets: list[_Bucket] = []
    room, kind = 0, None
    for parameter in reversed(params):
        size = parameter.numel() * parameter.element_size()
        if kind != (parameter.dtype, parameter.device) or size > room:
            buckets.append(_Bucket(params=[]))
            room, kind = bucket_bytes, (parameter.dtype, parameter.device)
        buckets[-1].params.append(parameter)
        room -= size
    return buckets
