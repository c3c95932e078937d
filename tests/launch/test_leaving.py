"""The end of a process: as Python's own, without what a thread of gloo may abort."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from nibble.launch.leaving import leave

PROGRAM = """
import atexit, sys, threading, time, types
from concurrent.futures import ThreadPoolExecutor
from nibble.launch.leaving import leave

if {imported}:
    sys.modules["torch.distributed"] = types.ModuleType("torch.distributed")

class Late:
    def __del__(self):
        print("python ended")

late = Late()
atexit.register(lambda: print("exit function"))

def work():
    time.sleep(0.3)
    print("thread")

threading.Thread(target=work).start()
pool = ThreadPoolExecutor(1)
pool.submit(time.sleep, 0.1)  # nobody ends it
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
sys.exit(leave(130))
"""


@pytest.mark.parametrize(
    ("rank", "imported", "ends"),
    [("0", True, False), ("0", False, True), (None, True, True)],
    ids=("of several", "before it met others", "alone"),
)
def test_all_is_done_but_what_aborts(rank: str | None, imported: bool, ends: bool) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    if rank is not None:
        environment["RANK"] = rank
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(imported=imported)],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "")
    said = ["thread", "exit function", "python ended"]
    assert done.stdout.splitlines() == (said if ends else said[:2])


def test_a_closed_output_does_not_change_the_code() -> None:
    program = PROGRAM.format(imported=True).replace("sys.exit(", "sys.stdout.close()\nsys.exit(")
    program = program.replace('print("thread")', "pass").replace('print("exit function")', "0")
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "RANK": "1"}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "")


def test_alone_it_only_says_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert leave(3) == 3
