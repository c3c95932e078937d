"""Micro-batches as CUDA graphs: after a warm-up the host says "again" instead of saying all.

    pass of a shape     first and second time   eagerly; the second is observed
                        third time              recorded, and replayed
                        from then on            inputs copied to where they were, replayed
    of further shapes   first time              eagerly and observed, and so on

What a shape is: the sizes and types of a batch's tensors and bounds on its targets and documents,
brought to few (data/shapes.py). MAX_GRAPHS shapes are recorded; others stay eager. Forward, loss
and backward are one graph (place/graphs.py); clipping, the optimiser, sums over processes and
everything else stay outside, as they are.

What a recorded pass reads and writes keeps its address: copies of the batch, the number of targets
of the step and the loss scale (tensors, so that they may change), the loss, and the gradients,
which here are views of one buffer a type. They are zeroed by one launch before a step's first
pass, and each pass adds to them. Eager and recorded passes are one function on the same tensors, so
results do not depend on when, or whether, something was recorded, and a resumed run is the same
run.

`auto` records where it pays: where the host needs most of the time that the device needs (a pass
that keeps the device busy gains nothing, and its pool is memory that eager code could use for other
things), and where what is trained is small, since gradients now outlive the step. With several
processes gradients are summed after the last pass, as hooks do not run in a replay.

Not recorded: passes that wait for the device (data-dependent shapes, as LLM.int8's outliers), that
step in backward, or pull weights (`spec/graphs.py`, `place/graphs.py`). Whatever cannot be recorded
runs eagerly, and the report says why, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nibble.data import Batch
from nibble.data.shapes import longest_document, of_few_shapes
from nibble.nn.attention import PACKED, attention_name
from nibble.place.base import Placement
from nibble.place.graphs import NotRecordedError, Observed, Recorder, recorder_of
from nibble.spec.graphs import Wish
from nibble.spec.units import show_bytes

NUM_WARMUP = 2
"""Eager passes of the first shape; the last of them is observed."""
MAX_GRAPHS = 16
HOST_SHARE = 0.75
"""`auto`: of the device's time, what the host must need for a recording to pay."""
MAX_GRAD_BYTES = 1 << 30
"""`auto`: of the gradients, which are kept from step to step."""

T = TypeVar("T")
Work = Callable[[Batch, Tensor, Tensor], Tensor]
"""Forward and backward of a batch on the device: its loss over a number of targets, given as a
tensor, and a factor for backward alone."""


@dataclass(frozen=True, kw_only=True)
class _Graph:
    """A recorded pass and the batch that it reads."""

    replay: Callable[[], None]
    batch: Batch


@dataclass
class _Shape:
    """What is known of the passes of one shape."""

    num_seen: int = 0
    is_observed: bool = False
    is_candidate: bool = True
    graph: _Graph | None = None


class Passes:
    """Runs the micro-batches of a run, recorded where that can be had.

    `parameters`: what is trained. `always`: record even where it does not pay, and pad rows that
    are not packed to few lengths. `note` is told what
    is recorded, and what is not and why. `offsets`: attention takes offsets of documents.
    """

    def __init__(
        self,
        work: Work,
        *,
        place: Placement,
        parameters: Sequence[nn.Parameter],
        recorder: Recorder,
        always: bool,
        note: Callable[[str], None],
        offsets: bool = True,
    ) -> None:
        self._work, self._place, self._recorder = work, place, recorder
        self._parameters, self._always, self._note = list(parameters), always, note
        self._offsets = offsets
        self._shapes: dict[tuple[object, ...], _Shape] = {}
        self._grads = StaticGrads()
        self._touched: dict[int, nn.Parameter] = {}
        self.told: list[str] = []
        """What was said, once each."""
        self._num_steps = 0
        self._is_off = False
        self._count, self._scale, self._loss = (
            torch.zeros((), dtype=torch.float32, device=place.device) for _ in range(3)
        )

    @property
    def num_graphs(self) -> int:
        """Shapes that are recorded."""
        return sum(shape.graph is not None for shape in self._shapes.values())

    def run(self, batch: Batch, *, num_targets: int, scale: float, last: bool) -> Tensor:
        """Forward and backward of one batch of the host: its share of the step's loss, a scalar
        that is valid until the next pass. Gradients add up where they are.

        num_targets: of the whole step. scale: of the loss, for backward. last: of the step.
        """
        batch = of_few_shapes(batch, offsets=self._offsets, few_lengths=self._always)
        shape = self._shapes.setdefault(signature(batch), _Shape())
        self._count.fill_(max(num_targets, 1))
        self._scale.fill_(scale)
        if shape.graph is None and self._is_due(shape):
            shape.graph = self._recorded(shape, batch)
        if shape.graph is None:
            with self._place.micro_batch(last=last):
                return self._eagerly(shape, batch)
        self._grads.attach_()
        for static, fresh in zip(
            _tensors(shape.graph.batch), _tensors(self._place.batch(batch)), strict=True
        ):
            static.copy_(fresh, non_blocking=True)
        shape.graph.replay()
        if last:
            # Hooks that send gradients while backward runs have slept: all are sent now.
            with self._place.micro_batch(last=True):
                pass
        return self._loss

    def end_step(self) -> None:
        """An update is made: the optimiser has the memory that it wants."""
        self._num_steps += 1

    def release(self) -> bool:
        """Give recordings up for good, as their memory is needed; False if there were none."""
        had = self.num_graphs > 0
        self._is_off = True
        for shape in self._shapes.values():
            shape.graph = None
        self._recorder.release()
        if had:
            self._say("memory ran out beside CUDA graphs: they are given up, passes run eagerly")
        return had

    def _is_due(self, shape: _Shape) -> bool:
        """Whether a shape is to be recorded now, after the first update and its own warm-up."""
        ready = shape.is_observed and shape.is_candidate
        if not ready or self._is_off or self._num_steps == 0:
            return False
        if self.num_graphs == MAX_GRAPHS:
            self._say(
                f"{MAX_GRAPHS} shapes of micro-batches run as CUDA graphs; others run eagerly"
            )
            return False
        return True

    def _recorded(self, shape: _Shape, batch: Batch) -> _Graph | None:
        """Record a pass of the batch without running it; None where that is impossible."""
        moved = self._place.batch(batch)
        copies: dict[str, Any] = {name: tensor.clone() for name, tensor in _named_tensors(moved)}
        static = replace(moved, **copies)
        self._grads.add(list(self._touched.values()))
        self._grads.attach_()

        def work() -> None:
            self._loss.copy_(self._work(static, self._count, self._scale))

        reason = ""
        try:
            made = self._recorder.record(work)
        except NotRecordedError as error:
            reason = str(error)
        stolen = [p for p in self._parameters if p.grad is not None and p not in self._grads]
        for parameter in stolen:
            parameter.grad = None
        if stolen:
            reason = reason or "it gives gradients to parameters that had none before"
        if reason:
            shape.is_candidate = False
            self._say(f"no CUDA graph for micro-batches of {_named(batch)}: {reason}")
            return None
        self._say(
            f"micro-batches of {_named(batch)} run as a CUDA graph from here on"
            f" ({show_bytes(made.num_bytes)} kept for it)"
        )
        return _Graph(replay=made.replay, batch=static)

    def _eagerly(self, shape: _Shape, batch: Batch) -> Tensor:
        shape.num_seen += 1
        moved = self._place.batch(batch)

        def work() -> Tensor:
            return self._work(moved, self._count, self._scale)

        warm = shape.num_seen >= NUM_WARMUP or self.num_graphs > 0
        if warm and not shape.is_observed and not self._is_off:
            loss, observed = self._with_room(lambda: self._recorder.observe(work))
            shape.is_observed = True
            reason = self._against(observed)
            if reason:
                shape.is_candidate = False
                self._say(f"no CUDA graph for micro-batches of {_named(batch)}: {reason}")
        else:
            loss = self._with_room(work)
        if shape.num_seen <= NUM_WARMUP:
            self._touched |= {id(p): p for p in self._parameters if p.grad is not None}
        return loss

    def _with_room(self, work: Callable[[], T]) -> T:
        """Do the work; if memory runs out while recordings hold some of it, without them."""
        may_repeat = (
            self.num_graphs > 0
            and self._place.world == 1
            and all(parameter.grad is None for parameter in self._parameters)
        )
        try:
            return work()
        except torch.OutOfMemoryError:
            if not may_repeat:
                raise
        for parameter in self._parameters:
            parameter.grad = None
        self.release()
        return work()

    def _against(self, observed: Observed) -> str:
        """Why an observed pass should not be recorded, or an empty text."""
        if observed.waits is not None:
            return f"the host waits for the device in it ({observed.waits})"
        if self._always:
            return ""
        size = sum(p.numel() * p.element_size() for p in self._touched.values())
        if size > MAX_GRAD_BYTES:
            return f"{show_bytes(size)} of gradients would stay (train.cuda_graphs=true makes one)"
        if observed.host_s < HOST_SHARE * observed.device_s:
            share = observed.host_s / observed.device_s
            return f"the device is busy anyway (the host needs {share:.0%} of its time)"
        return ""

    def _say(self, text: str) -> None:
        if text not in self.told:
            self.told.append(text)
            self._note(text)


class StaticGrads:
    """Gradients at fixed addresses: views of one buffer for each type and device."""

    def __init__(self) -> None:
        self._views: dict[nn.Parameter, Tensor] = {}
        self._buffers: list[Tensor] = []

    def __contains__(self, parameter: nn.Parameter) -> bool:
        return parameter in self._views

    def add(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make room for the gradients of parameters that have none yet."""
        kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for parameter in parameters:
            if parameter not in self._views:
                kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        for (dtype, device), some in kinds.items():
            sizes = [_aligned(parameter.numel()) for parameter in some]
            buffer = torch.zeros(sum(sizes), dtype=dtype, device=device)
            self._buffers.append(buffer)
            for parameter, part in zip(some, torch.split(buffer, sizes), strict=True):
                self._views[parameter] = part[: parameter.numel()].view(parameter.shape)

    @torch.no_grad()
    def attach_(self) -> None:
        """Let every parameter have its gradient here: what it has by now, else zeros."""
        empty = [(p, view) for p, view in self._views.items() if p.grad is None]
        if len(empty) == len(self._views):
            for buffer in self._buffers:
                buffer.zero_()
        elif empty:
            torch._foreach_zero_([view for _, view in empty])
        for parameter, view in empty:
            parameter.grad = view
        for parameter, view in self._views.items():
            if parameter.grad is not view and parameter.grad is not None:
                view.copy_(parameter.grad)
                parameter.grad = view


def _aligned(numel: int) -> int:
    """Elements up to the next multiple of 128, so that kernels find every view aligned."""
    return -(-numel // 128) * 128


def passes_of(
    model: nn.Module,
    work: Work,
    *,
    wish: Wish,
    place: Placement,
    parameters: Sequence[nn.Parameter],
    note: Callable[[str], None],
) -> Passes | None:
    """Recorded passes for a run, or None where they are not wanted or cannot be had.

    The model's attention becomes the one that takes offsets of documents, since the host looks at
    masks that transformers makes for it. Attention that is given whole masks (`eager`) stays: where
    its family asks the host, the warm-up will tell.
    """
    if wish == "off":
        return None
    recorder = recorder_of(place, model)
    attention = "eager"
    if not isinstance(recorder, str):
        attention = attention_name(type(model), getattr(model, "config", None))
        if attention == PACKED:
            model.set_attn_implementation(PACKED)  # type: ignore[operator]
        elif attention != "eager":
            recorder = "masks of its attention are made by transformers, by way of the host"
    if isinstance(recorder, str):
        if recorder:
            note(f"no CUDA graphs: {recorder}")
        return None
    return Passes(
        work,
        place=place,
        parameters=parameters,
        recorder=recorder,
        always=wish == "on",
        note=note,
        offsets=attention == PACKED,
    )


def signature(batch: Batch) -> tuple[object, ...]:
    """What two batches have in common that one graph may serve."""
    sizes = [(name, tuple(t.shape), t.dtype) for name, t in _named_tensors(batch)]
    longest = 0 if batch.offsets is None else longest_document(batch)
    return (batch.num_targets, longest, *sizes)


def _named_tensors(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            yield field.name, value


def _tensors(batch: Batch) -> list[Tensor]:
    return [tensor for _, tensor in _named_tensors(batch)]


def _named(batch: Batch) -> str:
    rows, length = batch.input_ids.shape
    return f"{rows}x{length}"
