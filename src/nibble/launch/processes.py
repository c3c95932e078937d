"""The processes of this machine: started together, told the same signals, and ended together.

Each process is the same program with torchrun's variables set, in a session of its own, so that
Ctrl-C reaches it once, through us, and not a second time from the terminal. A process that ends
with an error ends the run: the others have GRACE_S to notice by themselves, then they are killed.
What the person reads is the one line of the process that failed first, not those of the others,
which only say that it has gone. A process writes that line into a file of its own (`report_error`);
one that was killed writes nothing, and is named with its signal.

Only the first process shows progress; the output of the others is kept in files and shown when
they die of a bug. When the starting process vanishes, the kernel sends its children SIGTERM, at
which they save and leave.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from nibble.errors import NibbleError, PlacementError
from nibble.launch.signals import TakenOver

ERROR_FILE = "NIBBLE_ERROR_FILE"
GRACE_S, POLL_S, LOOK_S, TAIL_BYTES = 8.0, 0.05, 1.0, 4000
SIGNALS = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
}
"""What we get, and what the processes are told: a closed terminal is a polite end."""
INTERRUPTED = 130
"""Exit code of a process that was told to stop, and has saved if it could."""
RESTARTABLE = frozenset({"", "PlacementError", "PeerError"})
"""Errors that may not come again: a machine or process that vanished, a card that failed."""
LIKELY = {
    "SIGKILL": ": out of host memory?",
    "SIGABRT": ": a library gave up, as NCCL does when another process is not there within "
    "place.timeout_s; it has said more above",
}
"""What a signal that nobody sent on purpose may mean."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """How one process ended. `kind` is the class of its error, empty when it left no word."""

    rank: int
    code: int
    kind: str = ""
    line: str = ""
    tail: str = ""
    at_s: float = 0.0

    @property
    def is_consequence(self) -> bool:
        """Whether it only says that another process has gone, or was ended by us."""
        return self.kind == "PeerError"

    @property
    def text(self) -> str:
        """The line for a person."""
        if self.line:
            return f"{self.line} (rank {self.rank})"
        if self.code >= 0:
            return f"rank {self.rank} ended with exit code {self.code} and no word"
        name = signal.Signals(-self.code).name
        return f"rank {self.rank} was killed by {name}{LIKELY.get(name, '')}"


class RunFailed(PlacementError):
    """A process of the run failed; the message is its own line, the exit code its own."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.failure = failure
        self.exit_code = failure.code if failure.code > 0 else 1


@dataclass(kw_only=True)
class Ended:
    """What became of all: `failures` in the order in which they happened."""

    failures: list[Failure] = field(default_factory=list)
    interrupted: bool = False

    @property
    def cause(self) -> Failure | None:
        """The failure that ended the run."""
        own = [failure for failure in self.failures if not failure.is_consequence]
        return next(iter(own or self.failures), None)


class Signals(TakenOver):
    """Collects the signals which processes are to be told."""

    def __init__(self) -> None:
        super().__init__(SIGNALS)
        self.got: list[signal.Signals] = []
        self.num_told = 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Remember what the processes are told of it."""
        del frame
        self.got.append(SIGNALS[signal.Signals(number)])

    def untold(self) -> list[signal.Signals]:
        """Signals since the last call."""
        new = self.got[self.num_told :]
        self.num_told += len(new)
        return new


def run_processes(
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    *,
    folder: Path,
    signals: Signals,
    shows_first: bool = True,
    others_wait: Callable[[], bool] | None = None,
    grace_s: float = GRACE_S,
) -> Ended:
    """Start one process for each environment and wait until all have ended.

    `folder`: for the errors and the output of the processes. `shows_first`: the first one writes to
    our own output. `others_wait`: whether machines wait to join, for which the processes are asked
    to save and end. A process that fails takes the others down after `grace_s` seconds.
    """
    ended = Ended()
    started: list[_Process] = []
    deadline_s: float | None = None
    look_s = time.monotonic() + LOOK_S
    try:
        for index, environment in enumerate(environments):
            rank = int(environment["RANK"])
            shown = shows_first and index == 0
            started.append(_Process(command, environment, rank=rank, folder=folder, shown=shown))
        while any(process.failure is None and not process.done for process in started):
            for number in signals.untold():
                ended.interrupted = True
                for process in started:
                    process.tell(number)
            for process in started:
                if process.look() and process.failure is not None:
                    ended.failures.append(process.failure)
                    if deadline_s is None:
                        deadline_s = time.monotonic() + grace_s
            if deadline_s is not None and time.monotonic() > deadline_s:
                for process in started:
                    process.kill()
            if others_wait is not None and time.monotonic() > look_s:
                look_s = time.monotonic() + LOOK_S
                if others_wait():
                    others_wait = None
                    for process in started:
                        process.tell(signal.SIGTERM)
            time.sleep(POLL_S)
    finally:
        for process in started:
            process.close()
    codes = {failure.code for failure in ended.failures}
    if INTERRUPTED in codes:
        ended.interrupted = True  # by a scheduler that told the processes themselves
    if ended.interrupted:
        # Being interrupted is what was asked for: only what went wrong besides counts.
        ended.failures = [f for f in ended.failures if not _is_interruption(f)]
    ended.failures.sort(key=lambda failure: failure.at_s)
    return ended


def _is_interruption(failure: Failure) -> bool:
    return failure.code in (INTERRUPTED, -signal.SIGINT, -signal.SIGTERM) or failure.is_consequence


class _Process:
    """One started process."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        rank: int,
        folder: Path,
        shown: bool,
    ) -> None:
        self.rank = rank
        self.done = False
        self.failure: Failure | None = None
        self._killed = False
        self._errors = folder / f"{rank}.json"
        self._errors.unlink(missing_ok=True)
        self._output: IO[bytes] | None = None if shown else (folder / f"{rank}.log").open("w+b")
        self._popen = subprocess.Popen(
            list(command),
            env={**environment, ERROR_FILE: str(self._errors)},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            start_new_session=True,
        )

    def look(self) -> bool:
        """Whether it has ended since the last look."""
        if self.done or self._popen.poll() is None:
            return False
        self.done = True
        code = self._popen.returncode
        if code != 0 and not self._killed:
            told = _read_error(self._errors)
            self.failure = Failure(
                rank=self.rank,
                code=code,
                kind=told.get("kind", ""),
                line=told.get("line", ""),
                at_s=told.get("at_s", time.time()),
                tail="" if told.get("explained") else self._tail(),
            )
        return True

    def _tail(self) -> str:
        if self._output is None:
            return ""
        self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, self._output.tell() - TAIL_BYTES))
        return self._output.read().decode(errors="replace").strip()

    def tell(self, number: signal.Signals) -> None:
        """Pass a signal on."""
        if not self.done:
            self._popen.send_signal(number)

    def kill(self) -> None:
        """End it at once; what it says of that is not asked."""
        if not self.done and not self._killed:
            self._killed = True
            self._popen.kill()

    def close(self) -> None:
        """Leave nothing behind."""
        if self._popen.poll() is None:
            self._popen.kill()
            self._popen.wait()
        if self._output is not None:
            self._output.close()


def report_error(error: BaseException, line: str, environment: Mapping[str, str]) -> bool:
    """In a started process: leave the line of an error to who started it; False if nobody did."""
    path = environment.get(ERROR_FILE)
    if path is None:
        return False
    explained = isinstance(error, NibbleError)
    # A card, a network or a disk may do better the next time; a bug does not.
    luck = isinstance(error, RuntimeError | OSError)
    kind = "" if luck else type(error).__name__
    told = {"kind": kind, "line": line, "at_s": time.time(), "explained": explained}
    part = Path(f"{path}.part")
    part.write_text(json.dumps(told), encoding="utf-8")
    part.replace(path)
    return True


def _read_error(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def end_with_parent() -> None:
    """In a started process: be told SIGTERM when who started it vanishes. Linux only."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGTERM))
