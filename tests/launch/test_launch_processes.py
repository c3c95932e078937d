"""Seeing processes to their end, with small programs in the place of training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nibble.errors import DataError, PeerError
from nibble.launch.processes import (
    RESTARTABLE,
    Ended,
    RunFailed,
    Signals,
    report_error,
    run_processes,
)
from nibble.launch.supervise import _verdict

SAY = """
import json, os, signal, sys, time
rank = int(os.environ["RANK"])
def fail(kind, line, code=1):
    with open(os.environ["NIBBLE_ERROR_FILE"], "w") as file:
        json.dump({"kind": kind, "line": line, "at_s": time.time(), "explained": True}, file)
    sys.exit(code)
"""


def play(program: str, folder: Path, *, world: int = 2, grace_s: float = 0.5) -> Ended:
    environments = [{**os.environ, "RANK": str(rank)} for rank in range(world)]
    command = [sys.executable, "-c", SAY + program]
    with Signals() as signals:
        return run_processes(command, environments, folder=folder, signals=signals, grace_s=grace_s)


def interrupt_when(path: Path, *numbers: signal.Signals) -> threading.Thread:
    """Signal ourselves once the file is there."""

    def work() -> None:
        while not path.exists():
            time.sleep(0.02)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.3)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_all_end_well(tmp_path: Path) -> None:
    ended = play(f"open(f'{tmp_path}/{{rank}}', 'w').write(os.environ['RANK'])", tmp_path, world=3)
    assert ended == Ended()
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == ["0", "1", "2"]


def test_the_line_is_that_of_the_cause(tmp_path: Path) -> None:
    """Rank 1 fails and lingers, as it tells the others; rank 0 notices, and ends before it."""
    program = """
if rank == 1:
    try:
        fail("DataError", "no rows: add some", code=7)
    finally:
        time.sleep(0.5)
time.sleep(0.3)
fail("PeerError", "rank 1 ended the run: no rows")
"""
    ended = play(program, tmp_path, grace_s=5)
    assert [failure.rank for failure in ended.failures] == [1, 0]
    assert ended.cause is not None and ended.cause.text == "no rows: add some (rank 1)"
    error = RunFailed(ended.cause)
    assert (str(error), error.exit_code) == ("no rows: add some (rank 1)", 7)


def test_a_killed_process_ends_the_others(tmp_path: Path) -> None:
    began = time.monotonic()
    ended = play("os.kill(os.getpid(), 9) if rank else time.sleep(60)", tmp_path)
    assert time.monotonic() - began < 5
    assert [(f.rank, f.code) for f in ended.failures] == [(1, -9)]
    assert ended.cause is not None
    assert ended.cause.text == "rank 1 was killed by SIGKILL: out of host memory?"


def test_a_library_that_aborts_is_told_from_a_lack_of_memory(tmp_path: Path) -> None:
    ended = play("os.abort() if rank else time.sleep(60)", tmp_path)
    assert ended.cause is not None
    assert ended.cause.text.startswith("rank 1 was killed by SIGABRT: a library gave up, as NCCL")
    assert "place.timeout_s" in ended.cause.text


def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    ended = play("assert rank == 0, 'what'; time.sleep(60)", tmp_path)
    assert ended.cause is not None
    assert "AssertionError: what" in ended.cause.tail
    assert ended.cause.text == "rank 1 ended with exit code 1 and no word"


def test_signals_are_passed_on_once(tmp_path: Path) -> None:
    program = f"""
got = []
def handle(number, frame):
    got.append(number)
signal.signal(signal.SIGINT, handle)
open(f"{tmp_path}/ready-{{rank}}", "w").close()
until = time.time() + 1.5
while time.time() < until:
    time.sleep(0.05)
open(f"{tmp_path}/got-{{rank}}", "w").write(json.dumps(got))
sys.exit(130)
"""
    thread = interrupt_when(tmp_path / "ready-1", signal.SIGINT)
    ended = play(program, tmp_path)
    thread.join()
    assert ended.interrupted and ended.failures == []
    assert [json.loads((tmp_path / f"got-{rank}").read_text()) for rank in range(2)] == [[2], [2]]


def test_what_goes_wrong_while_stopping_is_told(tmp_path: Path) -> None:
    program = f"""
signal.signal(signal.SIGTERM, lambda *_: fail("CheckpointError", "the disk is full"))
open(f"{tmp_path}/ready-{{rank}}", "w").close() if rank else time.sleep(0.2)
time.sleep(20)
"""
    thread = interrupt_when(tmp_path / "ready-1", signal.SIGHUP)
    ended = play(program, tmp_path)
    thread.join()
    assert ended.interrupted
    assert ended.cause is not None and ended.cause.line == "the disk is full"


def test_a_scheduler_may_signal_the_processes_itself(tmp_path: Path) -> None:
    ended = play("sys.exit(130)", tmp_path)
    assert ended.interrupted and ended.failures == []
    with Signals() as signals, pytest.raises(KeyboardInterrupt):
        _verdict(ended, signals, None, left=3)


def test_only_what_may_not_come_again_is_tried_again(tmp_path: Path) -> None:
    lost = play("os.kill(os.getpid(), 9) if rank else time.sleep(60)", tmp_path)
    wrong = play("fail('DataError', 'no rows', 2)", tmp_path)
    with Signals() as signals:
        said = _verdict(lost, signals, None, left=1)
        assert said is not None and said.endswith("starting again (1 restart left)")
        for ended, left in ((lost, 0), (wrong, 3)):
            with pytest.raises(RunFailed):
                _verdict(ended, signals, None, left=left)
        assert _verdict(Ended(), signals, None, left=0) is None


def test_no_process_outlives_who_started_it(tmp_path: Path) -> None:
    """The starter is killed; the kernel asks its children to end."""
    program = (
        "import sys, os, time; from pathlib import Path\n"
        "from nibble.launch.processes import Signals, run_processes\n"
        "code = '''import os, time\n"
        "from nibble.launch.processes import end_with_parent\n"
        "end_with_parent()\n"
        f"open('{tmp_path}/pid', 'w').write(str(os.getpid()))\n"
        "time.sleep(60)'''\n"
        "with Signals() as s:\n"
        "    run_processes([sys.executable, '-c', code], [{**os.environ, 'RANK': '0'}],\n"
        f"                  folder=Path('{tmp_path}'), signals=s)\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", program])
    pid = tmp_path / "pid"
    until = time.monotonic() + 20
    while not (pid.exists() and pid.read_text()):
        assert time.monotonic() < until
        time.sleep(0.05)
    starter.kill()
    starter.wait()
    while Path(f"/proc/{pid.read_text()}").exists():
        state = Path(f"/proc/{pid.read_text()}/stat").read_text().split(")")[1].split()[0]
        if state == "Z":
            break
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("error", "kind", "explained"),
    [
        (PeerError("rank 1 has gone"), "PeerError", True),
        (DataError("no rows"), "DataError", True),
        (RuntimeError("CUDA error: an illegal memory access"), "", False),
        (TypeError("unexpected keyword"), "TypeError", False),
    ],
)
def test_an_error_is_left_to_who_started_the_process(
    error: Exception, kind: str, explained: bool, tmp_path: Path
) -> None:
    assert not report_error(error, str(error), {})
    assert report_error(error, str(error), {"NIBBLE_ERROR_FILE": str(tmp_path / "0.json")})
    told = json.loads((tmp_path / "0.json").read_text())
    assert (told["kind"], told["line"]) == (kind, str(error))
    assert told["explained"] is explained
    assert (kind in RESTARTABLE) is (kind in ("", "PeerError"))
