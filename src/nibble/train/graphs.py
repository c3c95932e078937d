"""Micro-batches as CUDA graphs: after a warm-up the host says "again" instead of saying all.

    pass of the first shape   first and second time   eagerly; the second is observed
                              third time              recorded, and replayed
                              from then on            inputs copied to where they were, replayed
    of further shapes         first time              recorded, and replayed

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

Memory. Recorded passes have a pool that stays, so an eager pass beside them needs a second one. It
is avoided: further shapes are the same code and are recorded without one. Where an eager pass has
to be (too many shapes, a recording that failed) and there is no room for it, recordings are given
up first; if memory runs out all the same, they are given up and the pass is repeated. Its gradients
are kept apart from those of earlier passes until it is done, so that nothing is counted twice;
where they are too large for that, a pass is repeated if it has not touched any.

Whether a run is recorded at all is the recipe's and the plan's to say (`spec/decide.py`). With
several processes gradients are summed after the last pass, as hooks do not run in a replay.

Not recorded: passes that wait for the device (data-dependent shapes, as LLM.int8's outliers), that
step in backward, or pull weights (`spec/graphs.py`, `place/graphs.py`). Whatever cannot be recorded
runs eagerly, and the report says why, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from nibble.data import Batch
from nibble.data.shapes import longest_document, of_few_shapes
from nibble.nn.attention import PACKED, attention_name
from nibble.place.base import Placement
from nibble.place.graphs import NotRecordedError, Recorder, recorder_of
from nibble.spec.graphs import MAX_GRAD_BYTES, Wish
from nibble.spec.units import show_bytes

NUM_WARMUP = 2
"""Eager passes of a shape while nothing is recorded; the last of them is observed."""
MAX_GRAPHS = 16

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
    is_ready: bool = False
    """It was observed, and nothing waited."""
    is_candidate: bool = True
    graph: _Graph | None = None


class Passes:
    """Runs the micro-batches of a run, recorded where that can be had.

    `parameters`: what is trained. `note` is told what is recorded, and what is not and why.
    `offsets`: attention takes offsets of documents.
    """

    def __init__(
        self,
        work: Work,
        *,
        place: Placement,
        parameters: Sequence[nn.Parameter],
        recorder: Recorder,
        note: Callable[[str], None],
        offsets: bool = True,
    ) -> None:
        self._work, self._place, self._recorder = work, place, recorder
        self._parameters, self._note, self._offsets = list(parameters), note, offsets
        self._shapes: dict[tuple[object, ...], _Shape] = {}
        self._grads = StaticGrads()
        self._touched: dict[int, nn.Parameter] = {}
        self.told: list[str] = []
        """What was said, once each."""
        self._num_steps = 0
        self._is_off = False
        self._pool_bytes = self._pool_tokens = 0
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
        batch = of_few_shapes(batch, offsets=self._offsets, few_lengths=True)
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
        self._grads = StaticGrads()
        self._recorder.release()
        if had:
            self._say("memory ran out beside CUDA graphs: they are given up, passes run eagerly")
        return had

    def _is_due(self, shape: _Shape) -> bool:
        """Whether a shape is to be recorded now: after the first update and its own warm-up, or
        that of another shape.
        """
        ready = shape.is_candidate and (shape.is_ready or self.num_graphs > 0)
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
        static, reason = moved, ""

        def work() -> None:
            self._loss.copy_(self._work(static, self._count, self._scale))

        try:
            copies: dict[str, Any] = {name: t.clone() for name, t in _named_tensors(moved)}
            static = replace(moved, **copies)
            self._grads.add(list(self._touched.values()))
            self._grads.attach_()
            made = self._recorder.record(work)
        except NotRecordedError as error:
            reason = str(error)
        except torch.OutOfMemoryError:
            reason = "the device has no memory left for its gradients"
        stolen = [p for p in self._parameters if p.grad is not None and p not in self._grads]
        for parameter in stolen:
            parameter.grad = None
        if stolen:
            reason = reason or "it gives gradients to parameters that had none before"
        if reason:
            shape.is_candidate = False
            self._say(f"no CUDA graph for micro-batches of {_named(batch)}: {reason}")
            if self.num_graphs == 0:
                self._grads = StaticGrads()
            return None
        self._pool_bytes += made.num_bytes
        self._pool_tokens = max(self._pool_tokens, batch.input_ids.numel())
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

        if self.num_graphs > 0:
            loss = self._with_room(work, num_tokens=batch.input_ids.numel())
        elif shape.num_seen == NUM_WARMUP and not self._is_off:
            loss, observed = self._recorder.observe(work)
            shape.is_ready = shape.is_candidate = observed.waits is None
            if observed.waits is not None:
                self._say(
                    f"no CUDA graph for micro-batches of {_named(batch)}: the host waits for the "
                    f"device in it ({observed.waits})"
                )
        else:
            loss = work()
        if shape.num_seen <= NUM_WARMUP:
            self._touched |= {id(p): p for p in self._parameters if p.grad is not None}
        return loss

    def _with_room(self, work: Callable[[], Tensor], *, num_tokens: int) -> Tensor:
        """Do eager work beside recordings; if there is no memory for both, without them."""
        needed = self._pool_bytes * num_tokens // max(1, self._pool_tokens)
        if not self._recorder.has_room(needed):
            self.release()
            return work()
        held = [parameter.grad for parameter in self._parameters]
        num_bytes = sum(0 if g is None else g.numel() * g.element_size() for g in held)
        apart = self._place.world == 1 and num_bytes <= MAX_GRAD_BYTES
        if apart:
            self._give(None for _ in held)
        before = self._versions()
        try:
            loss = work()
        except torch.OutOfMemoryError:
            if not apart and self._versions() != before:
                raise
            again = True
        else:
            again = False
        if again:  # outside of the handler, which holds what the failed pass had
            self._give(None if apart else grad for grad in held)
            self.release()
            loss = work()
        if apart:
            fresh = [parameter.grad for parameter in self._parameters]
            for old, new in zip(held, fresh, strict=True):
                if old is not None and new is not None:
                    old.add_(new)
            self._give(new if old is None else old for old, new in zip(held, fresh, strict=True))
        return loss

    def _give(self, grads: Iterable[Tensor | None]) -> None:
        for parameter, grad in zip(self._parameters, grads, strict=True):
            parameter.grad = grad

    def _versions(self) -> list[int | None]:
        """Counts of what was written to each gradient."""
        return [None if p.grad is None else p.grad._version for p in self._parameters]

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
