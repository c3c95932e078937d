"""A run of several processes from its start to its end, again after failures if asked.

Each attempt meets the other machines (if there are any), starts the processes of this one, and
waits. A failure that may not come again (a machine or process that vanished) starts another
attempt from the last checkpoint, up to `max_restarts` times; a machine that waits at the rendezvous
is taken in the same way and costs none of them. What the run itself refused is final.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nibble.launch.meeting import Attempt, Meeting, Nodes, free_port, with_interface
from nibble.launch.processes import RESTARTABLE, Ended, Failure, RunFailed, Signals, run_processes
from nibble.spec.config import Recipe
from nibble.spec.load import RUN_RECIPE

Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every process of a run is told: the recipe as JSON, whether to go on with the run in
    its folder, what the person typed, and whether errors keep their tracebacks.
    """

    recipe: str
    resume: bool
    typed: tuple[str, ...]
    debug: bool

    def write(self, path: Path) -> None:
        """To a file for `read_job`."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def read_job(path: Path) -> Job:
    """What `Job.write` wrote."""
    told = json.loads(path.read_text(encoding="utf-8"))
    return Job(**{**told, "typed": tuple(told["typed"])})


def holds_run(recipe: Recipe) -> bool:
    """Whether the run folder has been begun, so that one can go on with it."""
    return (Path(recipe.output_dir) / RUN_RECIPE).is_file()


def supervise(
    recipe: Recipe,
    job: Job,
    *,
    num_processes: int,
    nodes: Nodes | None,
    max_restarts: int,
    note: Note,
    environment: Mapping[str, str],
) -> None:
    """Run the job in `num_processes` processes of this machine until it is done.

    Raises RunFailed with the line of the process that failed, PlacementError when the machines do
    not meet, KeyboardInterrupt when the run was told to stop and has saved.
    """
    with tempfile.TemporaryDirectory(prefix="nibble-") as name, Signals() as signals:
        folder = Path(name)
        meeting = None
        if nodes is not None:
            limit_s = recipe.place.timeout_s
            meeting = Meeting(nodes, timeout_s=limit_s, stopped=lambda: bool(signals.got))
        try:
            failed = 0
            while True:
                job = replace(job, resume=job.resume or (failed > 0 and holds_run(recipe)))
                attempt = (
                    meeting.again(num_processes=num_processes, resume=job.resume)
                    if meeting
                    else _alone(num_processes, resume=job.resume)
                )
                replace(job, resume=attempt.resume).write(folder / "job.json")
                environments = worker_environments(
                    attempt, num_processes=num_processes, nodes=nodes, environment=environment
                )
                ended = run_processes(
                    [sys.executable, "-m", "nibble.cli.worker", str(folder / "job.json")],
                    environments,
                    folder=folder,
                    signals=signals,
                    shows_first=attempt.node == 0,
                    others_wait=meeting.others_wait if meeting else None,
                )
                again = _verdict(ended, signals, meeting, left=max_restarts - failed)
                if again is None:
                    return
                note(again)
                failed += 1 if ended.failures else 0
                max_restarts += 0 if ended.failures else 1
                job = replace(job, resume=holds_run(recipe))
        finally:
            if meeting:
                meeting.close()


def _verdict(ended: Ended, signals: Signals, meeting: Meeting | None, *, left: int) -> str | None:
    """None when the run is done, words when there is to be another attempt; raises otherwise."""
    cause = ended.cause
    if cause is None:
        if not ended.interrupted:
            return None
        if signals.got or meeting is None or not meeting.others_wait():
            raise KeyboardInterrupt
        return "another machine has come: going on with it from the checkpoint just written"
    if signals.got or left <= 0 or cause.kind not in RESTARTABLE:
        show_tail(cause)
        raise RunFailed(cause)
    return f"{cause.text}; starting again ({left} restart{'s' * (left != 1)} left)"


def show_tail(failure: Failure) -> None:
    """The last output of a process that died of a bug: its traceback."""
    if failure.tail:
        sys.stderr.write(f"{failure.tail}\n")


def _alone(num_processes: int, *, resume: bool) -> Attempt:
    return Attempt(
        node=0,
        num_nodes=1,
        first_rank=0,
        world=num_processes,
        master="127.0.0.1",
        port=free_port(),
        resume=resume,
    )


def worker_environments(
    attempt: Attempt,
    *,
    num_processes: int,
    nodes: Nodes | None,
    environment: Mapping[str, str],
) -> list[dict[str, str]]:
    """The environment of each process of this machine, in torchrun's words."""
    base = {name: value for name, value in environment.items() if name not in _NOT_PASSED}
    base.setdefault(*QUIET)
    if num_processes > 1:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        base.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_processes)))
    if nodes is not None:
        base = with_interface(base, nodes.host, nodes.port)
    elif any(name == "lo" for _, name in socket.if_nameindex()):
        # Processes of one machine need no name service and no firewall's leave.
        base.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return [
        {
            **base,
            "RANK": str(attempt.first_rank + index),
            "WORLD_SIZE": str(attempt.world),
            "LOCAL_RANK": str(index),
            "LOCAL_WORLD_SIZE": str(num_processes),
            "MASTER_ADDR": attempt.master,
            "MASTER_PORT": str(attempt.port),
        }
        for index in range(num_processes)
    ]


QUIET = ("TORCH_CPP_LOG_LEVEL", "ERROR")
"""Sockets without a host name and the like are no news."""
_NOT_PASSED = ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT")
