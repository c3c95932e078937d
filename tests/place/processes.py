"""Start the processes of a run as a launcher does, and wait for all of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def start(
    script: Path, *arguments: object, world: int = 2, timeout_s: float = 240
) -> list[tuple[int, str]]:
    """(exit code, output) of each rank of `script`, in torchrun's environment."""
    port = free_port()
    here = Path(__file__).parent
    running = []
    for rank in range(world):
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
        words = [sys.executable, str(script), *map(str, arguments)]
        running.append(
            subprocess.Popen(
                words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    found = []
    try:
        for process in running:
            output, _ = process.communicate(timeout=timeout_s)
            found.append((process.returncode, output))
    finally:
        for process in running:
            process.kill()
    return found
