"""What a run holds in host memory, by category; the moments of the device are in `phases.py`.

Of one machine: processes, blocks that stream from it, activations that wait in it, tensors on their
way in and out. What the kernel keeps of files that were read is nobody's. Measured by
bench/host_error.py (bench/results/2026-11-23-h200-plan-error.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nibble.spec.units import GIB

if TYPE_CHECKING:
    from nibble.spec.phases import Run

HOST_CATEGORIES: dict[str, str] = {
    "process": "processes",
    "streamed_base": "streamed weights",
    "tensor_in_flight": "tensors being read",
    "offloaded_activations": "activations",
    "checkpoint_copy": "a tensor as written",
    "trained_copy": "trained tensors",
}
"""Categories of host memory and how they are called."""
PROCESS_BYTES = int(1.7 * GIB)
"""Resident size of Python with torch, transformers and CUDA's libraries, behind its first step."""
LOADING_PROCESS_BYTES = int(0.95 * GIB)
"""The same before its first step: a GPU's libraries are read as they are needed."""
IN_FLIGHT, IN_FLIGHT_PACKED = 1.0, 1.25
"""Of the largest tensor in 16 bits, that is in host memory while weights are read, and while they
are packed, or packed ones read, on their way."""


def host_categories(name: str, run: Run) -> dict[str, int]:
    """Bytes of each category in the phase called `name`."""
    stock, share = run.stock, run.held
    process = LOADING_PROCESS_BYTES if name == "load" and not run.on_cpu else PROCESS_BYTES
    stepping = name in ("first step", "steady step", "evaluation", "save")  # the pool stays
    host = {
        "process": process * share.num_processes,
        "streamed_base": share.streamed,
        "offloaded_activations": run.seen.blocks.host * share.num_processes if stepping else 0,
        "tensor_in_flight": 0,
        "checkpoint_copy": 0,
    }
    if name == "load":
        times = IN_FLIGHT_PACKED if stock.num_packed else IN_FLIGHT
        host["tensor_in_flight"] = int(2 * times * stock.largest_tensor) * share.num_processes
    if name == "merge":
        host |= {"process": PROCESS_BYTES, "streamed_base": 0}
        host |= {"tensor_in_flight": 2 * stock.largest_tensor, "trained_copy": stock.trained_bytes}
    if name == "save":
        # Tensors are written one by one.
        host["checkpoint_copy"] = 0 if run.on_cpu else stock.largest_trained_bytes
    return host
