"""Host memory of all processes of a run, as it is while they run.

    host = sum of private set sizes + shared memory once + what torch has pinned

The sum of proportional set sizes (Pss of /proc/PID/smaps_rollup) counts a shared page once over all
its users. Shared memory that somebody holds but nobody has mapped would be missing: of what the
processes see of it and the size of the segment, the larger counts. Memory pinned by the driver for
torch's own allocator lies outside of the set sizes and is added. A thread samples; the launcher's
own process is counted too.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

GIB = 1 << 30
FIELDS = ("Pss", "Pss_Shmem")


def set_sizes(process: int) -> dict[str, int]:
    """Bytes of each field for one process; zeros when it has gone."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return dict.fromkeys(FIELDS, 0)
    rows = dict(line.split(":", 1) for line in text.splitlines()[1:] if ":" in line)
    return {name: int(rows.get(name, "0 kB").split()[0]) * 1024 for name in FIELDS}


def free_bytes() -> int:
    """MemAvailable of the machine."""
    rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(rows["MemAvailable"].split()[0]) * 1024


def pinned_bytes() -> int:
    """The most that torch's pinned allocator of this process has held."""
    if not torch.cuda.is_available():
        return 0
    stats: dict[str, Any] = torch.cuda.host_memory_stats()
    return int(max(stats.get("allocated_bytes.peak", 0), stats.get("reserved_bytes.peak", 0)))


def age_s() -> float:
    """Seconds since this process was started."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return float(Path("/proc/uptime").read_text().split()[0]) - began


class Sampler:
    """Samples the processes until it is stopped."""

    def __init__(self, processes: Iterable[int], *, every_s: float = 1.0) -> None:
        self.processes = list(processes)
        self.segment_bytes = 0
        self.peak: dict[str, int] = {"pss": 0, "shared": 0, "private": 0, "host": 0}
        self.free_at_start = self.least_free = free_bytes()
        self._every_s = every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def sample(self) -> dict[str, int]:
        """Now, and into the peaks."""
        sizes = [set_sizes(process) for process in self.processes]
        pss, shared = (sum(size[name] for size in sizes) for name in FIELDS)
        now = {"pss": pss, "shared": shared, "private": pss - shared}
        now["host"] = now["private"] + max(shared, self.segment_bytes)
        for name, value in now.items():
            self.peak[name] = max(self.peak[name], value)
        self.least_free = min(self.least_free, free_bytes())
        return now

    def words(self, now: dict[str, int]) -> dict[str, float]:
        """GiB now and at the peak; `machine_gib` is what the whole machine has less than before."""
        words = {f"{name}_gib": round(value / GIB, 2) for name, value in now.items()}
        words |= {f"{name}_peak_gib": round(v / GIB, 2) for name, v in self.peak.items()}
        words["machine_peak_gib"] = round((self.free_at_start - self.least_free) / GIB, 2)
        return words

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(self._every_s):
            began = time.perf_counter()
            self.sample()
            # Walking the tables of many GiB takes a while: never more than a tenth of the time.
            self._ended.wait(9 * (time.perf_counter() - began))
