"""Ctrl-C without losing the run: the first signal asks, the second insists.

SIGINT and SIGTERM (a scheduler's polite kill) set a flag that the loop reads between steps; it then
saves and leaves. A second one raises KeyboardInterrupt at once; what is being written is then
dropped, as checkpoints are renamed last. Launchers repeat a terminal's Ctrl-C as a SIGTERM of their
own: a signal of another kind within SAME_WISH_S is the same wish.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

from nibble.launch.signals import TakenOver

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_WISH_S = 2.0


class Interrupt(TakenOver):
    """A context in which the first signal sets `requested` and says so."""

    def __init__(self) -> None:
        super().__init__(SIGNALS)
        self.requested = False
        self._first: tuple[int, float] = (0, 0.0)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The first asks, the second insists."""
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
