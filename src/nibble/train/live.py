"""The live view of a run on a terminal: where it is, where the loss goes, how fast, how long still.

One block of lines at the bottom of the terminal, redrawn a few times a second; what is said to a
person scrolls above it. When it closes, the last picture stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import IO, Any

from nibble.train.report import Pace, duration

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 48
REFRESH_PER_S = 8


def sparkline(values: Sequence[float], *, width: int = WIDTH) -> str:
    """Numbers as a row of bars at most `width` wide; each bar is the mean of its share of them."""
    if not values:
        return ""
    num = min(width, len(values))
    edges = [i * len(values) // num for i in range(num + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(BARS[min(len(BARS) - 1, int((m - low) / span * len(BARS)))] for m in means)


class LiveSink:
    """A rich live view."""

    name = "progress"
    every_step = False

    def __init__(self, stream: IO[str], *, force_terminal: bool | None = None) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=stream, force_terminal=force_terminal, highlight=False)
        self._pace = Pace()
        self._max_steps = 0
        self._losses: list[float] = []
        self._eval: list[tuple[int, float]] = []
        self._last: dict[str, float] = {}
        self._left_s: float | None = None
        self._phase: tuple[str, int, int | None] | None = None
        # `get_renderable` makes the picture only when it is drawn, not at each number.
        self._live = Live(
            console=self._console, refresh_per_second=REFRESH_PER_S, get_renderable=self._picture
        )
        self._live.start()

    def begin(self, *, first_step: int, max_steps: int) -> None:
        """The bar's length."""
        self._max_steps = max_steps
        self._pace.begin(max_steps)
        self._last = {"step": first_step}

    def metrics(self, values: Mapping[str, float]) -> None:
        """Take the numbers; they are drawn at the next refresh."""
        if "eval_loss" in values:
            self._eval.append((int(values["step"]), values["eval_loss"]))
            return
        self._last = dict(values)
        self._losses.append(values["loss"])
        self._left_s = self._pace.left_s(values)

    def note(self, text: str) -> None:
        """A line above the view."""
        self._console.print(text, markup=False)

    def phase(
        self, name: str, done: int, total: int | None, elapsed_s: float, *, ended: bool
    ) -> None:
        """Shown while it lasts; a long one leaves a line."""
        self._phase = None if ended else (name, done, total)
        if ended and elapsed_s >= 1:
            self.note(f"{name}: {duration(elapsed_s)}")

    def close(self) -> None:
        """Leave the last picture."""
        self._live.stop()

    def _picture(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.spinner import Spinner
        from rich.table import Table
        from rich.text import Text

        parts: list[Any] = []
        if self._max_steps:
            step = int(self._last.get("step", 0))
            line = Table.grid(padding=(0, 1))
            left = "" if self._left_s is None else f"{duration(self._left_s)} left"
            bar = ProgressBar(total=self._max_steps, completed=step, width=WIDTH)
            line.add_row("train", bar, f"{step}/{self._max_steps}", left)
            parts.append(line)
        if self._losses:
            parts.append(Text(f"loss  {sparkline(self._losses)} {self._losses[-1]:.4f}"))
            parts.append(Text(self._numbers(), style="dim"))
        if self._eval:
            first, last = self._eval[0], self._eval[-1]
            text = f"held-out loss {first[1]:.4f} at step {first[0]}"
            if len(self._eval) > 1:
                text += f", {last[1]:.4f} at step {last[0]}"
            parts.append(Text(text))
        if self._phase is not None:
            name, done, total = self._phase
            share = f" {done}/{total}" if total else ""
            if total:
                line = Table.grid(padding=(0, 1))
                line.add_row(name, ProgressBar(total=total, completed=done, width=WIDTH), share)
                parts.append(line)
            else:
                parts.append(Spinner("dots", text=f"{name}{share}"))
        return Group(*parts)

    def _numbers(self) -> str:
        last = self._last
        parts = [f"{last['tokens_per_s']:,.0f} tokens/s", f"peak {last['peak_gib']:.2f} GiB"]
        parts.append(f"lr {last['learning_rate']:.2e}")
        if "grad_norm" in last:
            parts.append(f"grad norm {last['grad_norm']:.3f}")
        if last.get("skipped"):
            parts.append("skipped (fp16 overflow)")
        return "  ".join(parts)
