"""What a run says while it runs: numbers, lines, and phases that would otherwise be silent.

The run reports to one object and knows no sink. A sink takes the same five calls and shows or
stores them; one that fails (a network, a closed pipe) is dropped with one line and the run goes on,
because no curve is worth a training run. metrics.jsonl gets every step; the other sinks every
`log_every`-th, and every evaluation.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol


class Sink(Protocol):
    """Somewhere that progress goes."""

    name: str
    every_step: bool

    def begin(self, *, first_step: int, max_steps: int) -> None:
        """Training starts after `first_step` and ends with `max_steps`."""
        ...

    def metrics(self, values: Mapping[str, float]) -> None:
        """Numbers of one step; `step` is among them."""
        ...

    def note(self, text: str) -> None:
        """A line for a person."""
        ...

    def phase(
        self, name: str, done: int, total: int | None, elapsed_s: float, *, ended: bool
    ) -> None:
        """A phase other than training is `done` of `total` far; called at its start, on progress,
        and when it ended.
        """
        ...

    def close(self) -> None:
        """Nothing will follow."""
        ...


class Phase:
    """A running phase: `advance` it."""

    def __init__(self, report: Report, name: str, total: int | None) -> None:
        self._report = report
        self.name = name
        self.total = total
        self.done = 0
        self._began = time.perf_counter()
        self._tell(ended=False)

    def advance(self, count: int = 1) -> None:
        """`count` more are done."""
        self.done += count
        self._tell(ended=False)

    def at(self, done: int, total: int | None, name: str | None = None) -> None:
        """`done` of `total` are done; `name` says more exactly what."""
        self.done, self.total, self.name = done, total, name or self.name
        self._tell(ended=False)

    def _tell(self, *, ended: bool) -> None:
        self._report.phase_changed(
            self.name, self.done, self.total, time.perf_counter() - self._began, ended=ended
        )


class Report:
    """Fans out to sinks; a context manager that closes them."""

    def __init__(self, sinks: Sequence[Sink] = (), *, log_every: int = 1) -> None:
        self._sinks = list(sinks)
        self._log_every = log_every
        self._max_steps = 0

    def add(self, sink: Sink) -> None:
        """One more sink, from here on."""
        self._sinks.append(sink)

    def begin(self, *, first_step: int, max_steps: int) -> None:
        """Training starts."""
        self._max_steps = max_steps
        for sink in list(self._sinks):
            with self._guard(sink):
                sink.begin(first_step=first_step, max_steps=max_steps)

    def metrics(self, values: Mapping[str, float]) -> None:
        """Numbers of one step (or an evaluation: `eval_loss`)."""
        step = int(values["step"])
        wanted = step % self._log_every == 0 or step == self._max_steps or "eval_loss" in values
        for sink in list(self._sinks):
            if wanted or sink.every_step:
                with self._guard(sink):
                    sink.metrics(values)

    def note(self, text: str) -> None:
        """A line for a person."""
        for sink in list(self._sinks):
            with self._guard(sink):
                sink.note(text)

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Phase]:
        """Show that something other than training goes on; `advance` the phase where its extent is
        known.
        """
        phase = Phase(self, name, total)
        try:
            yield phase
        finally:
            phase._tell(ended=True)

    def phase_changed(
        self, name: str, done: int, total: int | None, elapsed_s: float, *, ended: bool
    ) -> None:
        """Told by a phase."""
        for sink in list(self._sinks):
            with self._guard(sink):
                sink.phase(name, done, total, elapsed_s, ended=ended)

    def close(self) -> None:
        """Close all sinks."""
        for sink in list(self._sinks):
            with self._guard(sink):
                sink.close()
        self._sinks = []

    @contextmanager
    def _guard(self, sink: Sink) -> Iterator[None]:
        """Drop a sink that fails, and say so to the others."""
        try:
            yield
        except Exception as error:
            # Whatever a sink raises is no reason to lose a run; NibbleErrors are not raised by
            # sinks in use.
            if sink in self._sinks:
                self._sinks.remove(sink)
            lines = str(error).strip().splitlines()
            reason = lines[0][:200] if lines else type(error).__name__
            self.note(f"{sink.name} failed and is left out from here on: {reason}")

    def __enter__(self) -> Report:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the sinks however the run ended."""
        self.close()


def duration(seconds: float) -> str:
    """3725 -> 1h02m; 75 -> 1m15s; 4.2 -> 4.2s."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    if seconds < 60:
        return f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


class Pace:
    """Time left, from the pace of the last steps."""

    def __init__(self) -> None:
        self._step_s: float | None = None
        self._max_steps = 0

    def begin(self, max_steps: int) -> None:
        """How far to go."""
        self._max_steps = max_steps

    def left_s(self, values: Mapping[str, float]) -> float | None:
        """Seconds left after this step, or None before there is a pace."""
        if "step_s" in values:
            now = values["step_s"]
            self._step_s = now if self._step_s is None else 0.9 * self._step_s + 0.1 * now
        if self._step_s is None:
            return None
        return self._step_s * max(0, self._max_steps - int(values["step"]))
