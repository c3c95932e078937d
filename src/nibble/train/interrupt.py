"""Ctrl-C without losing the run: the first signal asks, the second insists.

SIGINT and SIGTERM (a scheduler's polite kill) set a flag that the loop reads between steps; it then
saves and leaves. A second one raises KeyboardInterrupt at once; what is being written is then
dropped, as checkpoints are renamed last. Launchers repeat a terminal's Ctrl-C as a SIGTERM of their
own: a signal of another kind within SAME_WISH_S is the same wish. Signals reach the main thread
only: in any other the flag stays down and nothing is installed.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_WISH_S = 2.0


class Interrupt:
    """A context in which the first signal sets `requested` and says so."""

    def __init__(self) -> None:
        self.requested = False
        self._first: tuple[int, float] = (0, 0.0)
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        """Take the signals over."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.requested:
            first, since = self._first
            if number != first and time.monotonic() - since < SAME_WISH_S:
                return
            raise KeyboardInterrupt
        self.requested = True
        self._first = (number, time.monotonic())
        name = signal.Signals(number).name
        # A handler may interrupt a write of the same stream, which Python's own objects do not
        # allow.
        line = f"\n{name}: finishing this step, then saving; once more stops at once, unsaved\n"
        os.write(2, line.encode())
