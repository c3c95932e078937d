"""Runs step_cases.py: through Triton's interpreter on the CPU, and compiled on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nibble.kernels import steps
from nibble.kernels.steps import step_kernels

CASES = Path(__file__).with_name("step_cases.py")


def run_cases(interpret: bool) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        # A plugin of an image that warns beside xdist would end it: warnings are errors.
        [
            *(sys.executable, "-m", "pytest", str(CASES), "-x"),
            *("-p", "no:cacheprovider", "-p", "no:benchmark"),
        ],
        env={**os.environ, "TRITON_INTERPRET": str(int(interpret)), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout


def test_kernels_equal_eager_through_the_interpreter() -> None:
    run_cases(interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_kernels_equal_eager_on_the_gpu() -> None:
    run_cases(interpret=False)


def test_who_takes_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    assert step_kernels("cpu") is None
    assert step_kernels("cuda") is steps.triton_kernels()
    step_kernels.cache_clear()
    monkeypatch.setattr(steps, "find_spec", lambda _: None)
    assert step_kernels("cuda") is None
    step_kernels.cache_clear()
