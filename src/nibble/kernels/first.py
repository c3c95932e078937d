"""The first Triton kernel of a process, which does nothing.

Before it Triton hashes the files of its own installation and loads its driver: half a second, of
which little is Python, so another thread can do it while libraries are imported.
"""

# Triton's kernels are programs of their own language, and its decorator has no types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nibble.kernels.launch import launch


@triton.jit
def _zero_kernel(out):
    tl.store(out, 0)


def launch_first(device: torch.device) -> None:
    """Launch a kernel on a GPU and wait for it."""
    out = torch.ones(1, dtype=torch.int32, device=device)
    launch(_zero_kernel, (1,), (out,), num_warps=1)
    assert int(out) == 0
