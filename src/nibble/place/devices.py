"""Which device a word of the recipe means on this machine, and the cap on its memory.

A cap is enforced by the caching allocator: a plan that promises less than it needs fails in its
first step and not in the fifth hour, and a large card can stand in for a small one. The CUDA
context (some hundred MiB) lies outside of what an allocator can cap.

The allocator takes memory in segments that grow (torch's `expandable_segments`): freed pieces side
by side become one again whatever they were cut from, so that what is reserved stays within a few
percent of what is allocated, where segments of fixed sizes lose 10 to 20 percent. Whoever sets
PYTORCH_CUDA_ALLOC_CONF (or PYTORCH_ALLOC_CONF) decides instead.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from contextlib import suppress
from functools import cache

import torch

from nibble.errors import PlacementError
from nibble.spec.config import Precision
from nibble.spec.hardware import SLOW_BF16
from nibble.spec.units import show_bytes

OWN_GPU = "NIBBLE_OWN_GPU"
"""Set by nibble/launch where a launcher shows each process of a machine another one GPU."""

ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Environment variables by which a user configures torch's allocator."""


@cache
def expand_segments() -> bool:
    """Let the CUDA allocator's segments grow, unless the user configured it; once a process.

    Returns whether it was done. Memory that is allocated already stays as it is.
    """
    if sys.platform != "linux" or any(name in os.environ for name in ALLOCATOR_SETTINGS):
        return False
    with warnings.catch_warnings():
        # The name that all supported versions of torch have; newer ones prefer another.
        warnings.simplefilter("ignore", FutureWarning)
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    return True


def pick_device(word: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` means here.

    Raises PlacementError for one that this machine does not have.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if word == "auto":
        word = "cuda" if num_gpus else "cpu"
    if word == "cpu":
        return torch.device("cpu")
    kind, _, index = word.partition(":")
    if kind != "cuda" or (index and not index.isdecimal()):
        raise PlacementError(f"place.device={word}: take auto, cpu, cuda or cuda:N")
    if num_gpus == 0:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no GPU answers"
        raise PlacementError(f"place.device={word}, but {why}: use place.device=cpu or auto")
    if int(index or 0) >= num_gpus:
        raise PlacementError(
            f"place.device={word}, but the last GPU is cuda:{num_gpus - 1}: take it or a lower one"
        )
    expand_segments()
    return torch.device("cuda", int(index or 0))


def device_of_rank(word: str, *, local_rank: int, local_world: int) -> torch.device:
    """The device of one of `local_world` processes of this machine: its own GPU, or the CPU.

    Raises PlacementError when there are fewer GPUs than processes.
    """
    device = pick_device(word)
    if device.type == "cpu":
        return device
    num_gpus = torch.cuda.device_count()
    if OWN_GPU in os.environ and num_gpus == 1:
        return torch.device("cuda", 0)
    if local_world > num_gpus:
        raise PlacementError(
            f"{local_world} processes on a machine with {num_gpus} GPUs: "
            f"start {num_gpus} (place.num_devices={num_gpus})"
        )
    return torch.device("cuda", local_rank)


@cache
def bf16_slowdown() -> float:
    """How many times as long as in fp32 a product in bf16 takes on this machine's processor.

    Measured once a process, in a tenth of a second. Processors without AVX-512 or better have no
    such product, and torch's own loop takes 50 times as long; with it bf16 is level or faster.
    """

    def seconds(dtype: torch.dtype) -> float:
        x, weight = torch.ones(64, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
        times = []
        for _ in range(3):  # the first one also sets up
            start = time.perf_counter()
            torch.mm(x, weight)
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) / seconds(torch.float32)


def slow_products(device: torch.device, precision: Precision) -> str:
    """A line that says what to compute in where a processor is slow in `precision`; else empty."""
    if device.type != "cpu" or precision != "bf16" or bf16_slowdown() < SLOW_BF16:
        return ""
    return (
        f"products in bf16 take {bf16_slowdown():.0f} times as long as in fp32 on this processor: "
        "train.precision=fp32 is faster"
    )


def begin_context(device: torch.device) -> None:
    """Let a GPU's context and Triton's driver come into being meanwhile: they take more than a
    second, with little Python.

    Whoever uses the device next waits for the rest of it. What goes wrong here goes wrong there
    again, where it is explained.
    """
    if device.type != "cuda":
        return

    def begin() -> None:
        with suppress(Exception):
            torch.cuda.synchronize(device)
            from nibble.kernels.first import launch_first

            launch_first(device)

    threading.Thread(target=begin, name="nibble-context").start()


def cap_vram(device: torch.device, limit_bytes: int) -> None:
    """Let the allocator refuse more than `limit_bytes` on a GPU; a CPU has no such cap and ignores
    it.

    Raises PlacementError if the card has less.
    """
    if device.type != "cuda":
        return
    total = torch.cuda.get_device_properties(device).total_memory
    if limit_bytes > total:
        raise PlacementError(
            f"place.vram={show_bytes(limit_bytes)}, but {device} has {show_bytes(total)}: "
            "lower place.vram or leave it out"
        )
    torch.cuda.set_per_process_memory_fraction(limit_bytes / total, device)
