"""A few steps under torch.profiler: where time and memory go.

    RUN/profile/trace.json.gz    open in chrome://tracing or ui.perfetto.dev
                operators.txt    operators by time memory.csv       allocated and reserved bytes
                over time, one line an allocation memory.pickle    the CUDA allocator's history, for
                pytorch.org/memory_viz (never read by nibble)

Steps are counted as the run counts them. Profiled steps are slower, several times on small models:
their times are not to be quoted, their shares are.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.utils.checkpoint import set_checkpoint_early_stop

from nibble.spec.config import Profile

MAX_MEMORY_EVENTS = 200_000
NUM_OPERATORS = 40


class Profiler:
    """Profiles steps [start, start + num) and writes into `folder`; a context, so that a run that
    ends early still writes.
    """

    def __init__(
        self,
        profile: Profile | None,
        *,
        folder: Path,
        device: torch.device,
        note: Callable[[str], None],
    ) -> None:
        self._profile = profile
        self._folder = folder
        self._cuda = device.type == "cuda"
        self._note = note
        self._running: Any = None
        self._whole = ExitStack()
        self._last = 0

    @classmethod
    def off(cls) -> Profiler:
        """A profiler that does nothing."""
        return cls(None, folder=Path(), device=torch.device("cpu"), note=lambda text: None)

    def __enter__(self) -> Profiler:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write what was recorded, if a run ended inside the window."""
        if self._running is not None:
            self._finish()

    def before(self, step: int) -> None:
        """Called before a step; a resumed run beyond `start_step` profiles its first steps."""
        if self._profile is None or self._running is not None or self._last:
            return
        if step >= self._profile.start_step:
            self._last = step + self._profile.num_steps - 1
            self._begin(self._profile)

    def after(self, step: int) -> None:
        """Called after a step."""
        if self._running is not None and step >= self._last:
            self._finish()

    def _begin(self, profile: Profile) -> None:
        from torch.profiler import ProfilerActivity

        if self._cuda and profile.memory:
            torch.cuda.memory._record_memory_history(max_entries=MAX_MEMORY_EVENTS)
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._running = torch.profiler.profile(
            activities=kinds,
            profile_memory=profile.memory,
            record_shapes=True,
            acc_events=True,  # there is one cycle; without it torch warns that others are lost
        )
        self._running.__enter__()
        # Recomputation that ends by an exception inside an operator loses it while torch records
        # the memory's history: a SystemError (seen with torch 2.11).
        self._whole.enter_context(set_checkpoint_early_stop(False))

    def _finish(self) -> None:
        assert self._profile is not None
        running, self._running = self._running, None
        self._whole.close()
        if self._cuda:
            torch.cuda.synchronize()
        running.__exit__(None, None, None)
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / "trace.json"
        running.export_chrome_trace(str(trace))
        by = "self_cuda_time_total" if self._cuda else "self_cpu_time_total"
        table = running.key_averages().table(sort_by=by, row_limit=NUM_OPERATORS)
        (self._folder / "operators.txt").write_text(table + "\n", encoding="utf-8")
        if self._profile.memory:
            write_memory_timeline(trace, self._folder / "memory.csv")
            if self._cuda:
                snapshot: Any = torch.cuda.memory._dump_snapshot
                snapshot(str(self._folder / "memory.pickle"))
                torch.cuda.memory._record_memory_history(enabled=None)
        with gzip.open(self._folder / "trace.json.gz", "wb") as packed:
            packed.write(trace.read_bytes())
        trace.unlink()
        self._note(f"profile of {self._profile.num_steps} steps written to {self._folder}")


def write_memory_timeline(trace: Path, out: Path) -> int:
    """Write the allocations of a chrome trace as a table over time; returns how many there are."""
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    rows = [
        (event["ts"], "cuda" if event["args"].get("Device Type") == 1 else "cpu", event["args"])
        for event in events
        if event.get("name") == "[memory]"
    ]
    with out.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["time_us", "device", "change_bytes", "allocated_bytes", "reserved_bytes"])
        for time_us, device, about in sorted(rows, key=lambda row: row[0]):
            table.writerow(
                [
                    time_us,
                    device,
                    about.get("Bytes"),
                    about.get("Total Allocated"),
                    about.get("Total Reserved"),
                ]
            )
    return len(rows)
