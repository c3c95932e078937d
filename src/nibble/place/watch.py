"""Knowing that another process of the run has failed, and why.

A process that computes on a GPU may wait in a message that never comes without anybody noticing.
So each one has a thread that, over a connection of its own to the store in which the processes met,

    counts its pulse up every second and looks at the others',
    looks whether one has left last words: the error that ended it.

Who is told so, or hears no pulse for SILENT_S, has GRACE_S to end by itself (a broken connection
wakes it with an error, which then carries the last words); after that the thread ends the process,
because nothing else can. A process that fails leaves its words and stays until the others have read
them, at most LINGER_S. Costs a few messages of some bytes a second, on the host.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from nibble.errors import PeerError

PULSE_S, SILENT_S, GRACE_S, LINGER_S = 1.0, 120.0, 20.0, 5.0


class Watch:
    """One process's thread, and its words with the others."""

    def __init__(self, *, rank: int, world: int, timeout_s: float) -> None:
        self._rank, self._world = rank, world
        self._connect = _connection(timeout_s)
        self._store = self._connect()
        self._words: str | None = None
        self._told = threading.Event()
        self._ended = threading.Event()
        self._turn = 0
        self.doing = ""
        """What this process is at, for the line that ends it."""
        self._thread = threading.Thread(target=self._look, name="nibble-watch", daemon=True)
        self._thread.start()
        # A thread inside of the store's code when the interpreter ends would abort the process.
        atexit.register(self.stop)

    def words(self, wait_s: float = 0.0) -> str | None:
        """What is known of the process that ended the run, within `wait_s`; None if all live."""
        self._told.wait(wait_s)
        return self._words

    def say(self, words: str) -> None:
        """Leave last words, and stay until the others have read them."""
        if self._words is not None:
            self.stop()
            return
        self.stop()
        until = time.monotonic() + LINGER_S
        try:
            self._store.set("words", f"rank {self._rank} ended the run: {words}")
            self._store.add("read", 1)
            while time.monotonic() < until and self._store.add("read", 0) < self._world:
                time.sleep(0.05)
        except (dist.DistError, RuntimeError):
            return  # the store's own process has gone: there is nobody to tell

    def announce(self) -> None:
        """Let the others' next `await_first` return."""
        self._turn += 1
        self._store.set(f"turn-{self._turn}", "")

    def await_first(self) -> None:
        """Wait for the next `announce` of rank 0, however long it takes; PeerError when the
        run has ended.
        """
        self._turn += 1
        while True:
            try:
                if self._store.check([f"turn-{self._turn}"]):
                    return
            except (dist.DistError, RuntimeError):
                raise PeerError(
                    self.words(PULSE_S * 3) or "the first process of the run has gone"
                ) from None
            words = self.words(0.1)
            if words is not None:
                raise PeerError(words)

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join(timeout=PULSE_S * 3)
        atexit.unregister(self.stop)

    def _look(self) -> None:
        pulses: dict[int, tuple[int, float]] = {}
        beats = 0
        try:
            store = self._connect()
            while not self._ended.wait(PULSE_S if beats else 0):
                beats = store.add(f"pulse-{self._rank}", 1)
                if store.check(["words"]):
                    self._end(store.get("words").decode())
                    store.add("read", 1)
                    break
                silent = self._silent(store, pulses)
                if silent is not None:
                    self._end(f"rank {silent} has not been heard of for {SILENT_S:g} s")
                    break
        except (dist.DistError, RuntimeError):
            if not self._ended.is_set():
                self._end("the first process of the run has gone")
        if self._words is not None and not self._ended.wait(GRACE_S):
            at = self.doing or "work of its own"
            line = f"error: {self._words} (rank {self._rank} was at {at})\n"
            os.write(2, line.encode())
            os._exit(1)

    def _silent(self, store: Store, pulses: dict[int, tuple[int, float]]) -> int | None:
        """A rank whose pulse has not changed for too long."""
        now = time.monotonic()
        for rank in range(self._world):
            beats = store.add(f"pulse-{rank}", 0)
            before, since = pulses.get(rank, (-1, now))
            if beats != before:
                pulses[rank] = (beats, now)
            elif now - since > SILENT_S:
                return rank
        return None

    def _end(self, words: str) -> None:
        self._words = words
        self._told.set()


def _connection(timeout_s: float) -> Callable[[], Store]:
    """How to connect to the store in which the processes met; each thread needs its own."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # An elastic restart meets in the same store: what the attempt before left there is not ours.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")

    def connect() -> Store:
        limit = timedelta(seconds=timeout_s)
        store = TCPStore(host, port, None, False, timeout=limit, wait_for_workers=False)
        return PrefixStore(f"nibble/{attempt}", store)

    return connect
