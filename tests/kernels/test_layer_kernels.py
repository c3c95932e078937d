"""Runs layer_cases.py: through Triton's interpreter on the CPU, and compiled on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nibble.kernels import layers
from nibble.kernels.layers import EAGER, layer_kernels

CASES = Path(__file__).with_name("layer_cases.py")


def run_cases(interpret: bool) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", str(CASES), "-x"),
            *("-p", "no:cacheprovider", "-p", "no:benchmark"),
        ],
        env={**os.environ, "TRITON_INTERPRET": str(int(interpret)), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
    assert not interpret or "skipped" not in done.stdout


def test_kernels_equal_eager_through_the_interpreter() -> None:
    run_cases(interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_kernels_equal_eager_on_the_gpu() -> None:
    run_cases(interpret=False)


def test_who_computes_what(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    assert layer_kernels("cpu") is EAGER
    assert layer_kernels("cuda") is layers.triton_kernels() is not EAGER
    layer_kernels.cache_clear()
    monkeypatch.setattr(layers, "find_spec", lambda _: None)
    assert layer_kernels("cuda") is EAGER
    layer_kernels.cache_clear()
