"""Runs triton_cases.py: through Triton's interpreter on the CPU, and compiled on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("triton_cases.py")


def run_cases(environment: dict[str, str]) -> None:
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(CASES),
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
    ]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout


def test_kernels_equal_eager_through_the_interpreter() -> None:
    run_cases({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_kernels_equal_eager_on_the_gpu() -> None:
    run_cases({"TRITON_INTERPRET": "0"})
