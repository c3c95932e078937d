"""Runs compile_cases.py: kernels compile, fit, and multiply on tensor cores, seen without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("compile_cases.py")


def test_kernels_compile_for_an_h100() -> None:
    pytest.importorskip("triton.backends.nvidia")
    done = subprocess.run(
        [sys.executable, str(CASES)], env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 19
    on_tensor_cores = {line[0] for line in lines if line[-1] == "wgmma"}
    assert on_tensor_cores == {
        "_forward_kernel", "_by_query_kernel", "_by_key_kernel", "_product_kernel"
    }  # fmt: skip
