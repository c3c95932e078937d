"""The end of a process of a run.

A thread of gloo lets go of the tensors of its last message when it likes. If Python is ending by
then, the lock it asks for ends the thread, C++ takes that for an unforeseen error, and the process
that had saved everything dies of SIGABRT. So one that has met others does all that Python's end
does for its callers (threads joined, exit functions called, output written) and leaves the rest to
the system.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading


def leave(code: int) -> int:
    """End this process if it belongs to a run of several; else return `code`, to exit with."""
    if "RANK" not in os.environ or "torch.distributed" not in sys.modules:
        return code
    # As multiprocessing ends its processes; pools are told to end before their threads are joined.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # closed, or nobody reads it
            continue
    os._exit(code)
