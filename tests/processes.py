"""Start the processes of a run as a launcher does, and wait for all of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def start(
    script: Path, *arguments: object, world: int = 2, timeout_s: float = 240
) -> list[tuple[int, str]]:
    """(exit code, output) of each rank of `script`, in torchrun's environment.

    Output goes to files: who writes to a pipe that nobody reads yet stops when it is full, and
    then all others wait for it.
    """
    with ExitStack() as files:
        outputs = [
            files.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            for _ in range(world)
        ]
        running = _started([str(script), *map(str, arguments)], outputs)
        try:
            until = time.monotonic() + timeout_s
            codes = [process.wait(max(0.0, until - time.monotonic())) for process in running]
        finally:
            for process in running:
                process.kill()
                process.wait()
        return [(code, _text(output)) for code, output in zip(codes, outputs, strict=True)]


def _started(words: list[str], outputs: list[IO[str]]) -> list[subprocess.Popen[str]]:
    """A process for each output."""
    port, world = free_port(), len(outputs)
    here = Path(words[0]).parent
    running = []
    for rank, output in enumerate(outputs):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(here), os.environ.get("PYTHONPATH")])),
        }
        running.append(
            subprocess.Popen(
                [sys.executable, *words],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return running


def _text(output: IO[str]) -> str:
    output.seek(0)
    return output.read()
