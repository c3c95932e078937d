"""Where progress goes: a file always, and what the recipe names.

jsonl (RUN/metrics.jsonl), progress (a live view on a terminal, plain lines elsewhere), plain,
tensorboard, wandb. The last two are imported here and only when asked for; a recipe that names one
that is not installed is told so before anything is loaded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from nibble.errors import ConfigError
from nibble.train.folder import METRICS, keep_metrics_until
from nibble.train.live import LiveSink
from nibble.train.report import Pace, Sink, duration

PLAIN_PHASE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class SinkContext:
    """What sinks need to know of a run. `step` is where it goes on (0 for a fresh one)."""

    run: Path
    step: int
    project: str
    run_name: str
    recipe: Mapping[str, Any]


def make_sinks(
    names: Sequence[str], context: SinkContext, *, stream: IO[str] | None = None
) -> list[Sink]:
    """The sinks of a recipe and metrics.jsonl.

    `stream` is where a person looks (default: standard output). Raises ConfigError for a sink whose
    package is absent.
    """
    out = sys.stdout if stream is None else stream
    wanted = dict.fromkeys(names)
    # Those that can be missing come first: nothing is open yet when they say so.
    sinks: list[Sink] = []
    if "tensorboard" in wanted:
        sinks.append(TensorboardSink(context))
    if "wandb" in wanted:
        sinks.append(WandbSink(context))
    sinks.append(JsonlSink(context.run / METRICS, step=context.step))
    live = "progress" in wanted and out.isatty()
    if live:
        sinks.append(LiveSink(out))
    elif "progress" in wanted or "plain" in wanted:
        sinks.append(PlainSink(out))
    return sinks


class JsonlSink:
    """One JSON object a line; a resumed run first drops the lines it will write again."""

    name = "metrics.jsonl"
    every_step = True

    def __init__(self, path: Path, *, step: int) -> None:
        keep_metrics_until(path, step if step else -1)
        self._file = path.open("a", encoding="utf-8")

    def begin(self, *, first_step: int, max_steps: int) -> None:
        """Nothing to write."""

    def metrics(self, values: Mapping[str, float]) -> None:
        """One line, on its way to the disk at once."""
        self._file.write(json.dumps(dict(values)) + "\n")
        self._file.flush()

    def note(self, text: str) -> None:
        """Lines for people are not metrics."""

    def phase(
        self, name: str, done: int, total: int | None, elapsed_s: float, *, ended: bool
    ) -> None:
        """Nor are phases."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class PlainSink:
    """A line a step, for logs and pipes; phases are mentioned when they take long."""

    name = "plain"
    every_step = False

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._pace = Pace()
        self._max_steps = 0
        self._told_s: dict[str, float] = {}

    def begin(self, *, first_step: int, max_steps: int) -> None:
        """Remember how far it goes."""
        self._max_steps = max_steps
        self._pace.begin(max_steps)

    def metrics(self, values: Mapping[str, float]) -> None:
        """step 12/100  loss 1.234  ..."""
        left = self._pace.left_s(values)
        self._line(metrics_line(values, max_steps=self._max_steps, left_s=left))

    def note(self, text: str) -> None:
        """The line itself."""
        self._line(text)

    def phase(
        self, name: str, done: int, total: int | None, elapsed_s: float, *, ended: bool
    ) -> None:
        """Told every few seconds, and at the end if it was told before or took long."""
        told = self._told_s.get(name)
        if ended:
            self._told_s.pop(name, None)
            if told is not None or elapsed_s >= 1:
                self._line(f"{name}: done in {duration(elapsed_s)}")
        elif elapsed_s - (told or 0.0) >= PLAIN_PHASE_S:
            self._told_s[name] = elapsed_s
            share = f" {done}/{total}" if total else ""
            self._line(f"{name}:{share} after {duration(elapsed_s)}")

    def close(self) -> None:
        """Let the last line out."""
        self._stream.flush()

    def _line(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


def metrics_line(
    values: Mapping[str, float], *, max_steps: int, left_s: float | None = None
) -> str:
    """Numbers of a step in one line, in fixed places."""
    head = f"step {int(values['step']):>{len(str(max_steps))}}/{max_steps}"
    if "eval_loss" in values:
        words = f"{head}  held-out loss {values['eval_loss']:.4f}"
        if "eval_perplexity" in values:
            words += f"  perplexity {values['eval_perplexity']:.2f}"
        return words
    parts = [head, f"loss {values['loss']:.4f}", f"lr {values['learning_rate']:.2e}"]
    if "grad_norm" in values:
        parts.append(f"grad {values['grad_norm']:.3f}")
    parts.append(f"{values['tokens_per_s']:,.0f} tokens/s")
    parts.append(f"peak {values['peak_gib']:.2f} GiB")
    if values.get("skipped"):
        parts.append("skipped (fp16 overflow)")
    if left_s is not None:
        parts.append(f"{duration(left_s)} left")
    return "  ".join(parts)


class TensorboardSink:
    """Scalars in RUN/tensorboard."""

    name = "tensorboard"
    every_step = False

    def __init__(self, context: SinkContext) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                'report.sinks: tensorboard is not installed: pip install "nibble[tensorboard]"'
            ) from None
        # What a stopped run wrote beyond its last checkpoint is hidden by the resumed one.
        purge = context.step + 1 if context.step else None
        folder = str(context.run / "tensorboard")
        self._writer: Any = SummaryWriter(folder, purge_step=purge)

    def begin(self, *, first_step: int, max_steps: int) -> None:
        """Nothing to write."""

    def metrics(self, values: Mapping[str, float]) -> None:
        """Each number is a curve: train/... and eval/loss."""
        for name, value in _curves(values).items():
            self._writer.add_scalar(name, value, int(values["step"]))

    def note(self, text: str) -> None:
        """Lines are for people."""

    def phase(
        self, name: str, done: int, total: int | None, elapsed_s: float, *, ended: bool
    ) -> None:
        """Phases are for people."""

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class WandbSink:
    """Weights & Biases; WANDB_MODE=offline keeps it in RUN/wandb. The run's id is kept so that
    resuming goes on with it.
    """

    name = "wandb"
    every_step = False

    def __init__(self, context: SinkContext) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                'report.sinks: wandb is not installed: pip install "nibble[wandb]"'
            ) from None
        self._context = context
        self._wandb: Any = wandb
        self._run: Any = None

    def begin(self, *, first_step: int, max_steps: int) -> None:
        """Start the run there; without a network or login this fails, and the report leaves this
        sink out.
        """
        store = self._context.run / "wandb-id.txt"
        known = (
            store.read_text(encoding="utf-8").strip() if first_step and store.is_file() else None
        )
        self._run = self._wandb.init(
            project=self._context.project,
            name=self._context.run_name,
            dir=str(self._context.run),
            config=dict(self._context.recipe),
            id=known,
            resume="allow" if known else None,
        )
        store.write_text(f"{self._run.id}\n", encoding="utf-8")

    def metrics(self, values: Mapping[str, float]) -> None:
        """Each number is a curve."""
        if self._run is not None:
            self._run.log({**_curves(values), "step": int(values["step"])})

    def note(self, text: str) -> None:
        """Lines are for people."""

    def phase(
        self, name: str, done: int, total: int | None, elapsed_s: float, *, ended: bool
    ) -> None:
        """Phases are for people."""

    def close(self) -> None:
        """Send what is left."""
        if self._run is not None:
            self._run.finish()


def _curves(values: Mapping[str, float]) -> dict[str, float]:
    return {
        (f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"): value
        for name, value in values.items()
        if name != "step"
    }
