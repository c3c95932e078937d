"""Device time of one step by kind of kernel, read with torch.profiler.

Only the device is traced where there is one: tracing the host as well makes a launch-bound step
several times slower and its gaps meaningless. On a CPU operators stand in for kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

FUSED_ATTENTION = ("flash", "fmha", "native_sdpa", "efficient_attention", "scaled_dot")
ALIBI_ATTENTION = ("_forward_kernel", "_by_query_kernel", "_by_key_kernel")
PRODUCTS = ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk", "addmm", "aten::mm", "bmm")
KINDS = (
    ("unpacking", ("_unpack_kernel", "dequant")),
    (
        "int8 tokens",
        ("_measure_kernel", "_round_kernel", "_rescale_kernel", "_list_kernel", "_finish_kernel"),
    ),
    ("loss", ("softmax", "cross_entropy", "nll", "gather", "element_mul_kernel")),
    (
        "fused norms, rotary, gates",
        (
            *("_norm_kernel", "_norm_backward", "_rotate_kernel", "_gate_kernel", "_gate_backward"),
            *("_gelu_", "rms_norm", "rms_layernorm", "rope_", "swiglu", "_fg_kernel", "_dwf_"),
        ),
    ),
    (
        "attention",
        (
            *("flash", "fmha", "native_sdpa", "efficient_attention", "scaled_dot"),
            *("_forward_kernel", "_by_query_kernel", "_by_key_kernel", "flex_attention"),
        ),
    ),
    ("factors", ("potrf", "trsm", "trsv", "trtri", "cholesky", "triangular")),
    (
        "matmul",
        (
            *("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk", "addmm", "aten::mm", "bmm"),
            "_product_kernel",
        ),
    ),
    ("memory copies", ("memcpy", "memset")),
    ("optimiser", ("multi_tensor", "_foreach", "_adamw_kernel", "_move_kernel", "koptimizer")),
    ("casts and copies", ("copy_kernel", "aten::copy_", "catarray")),
    ("reductions", ("reduce_kernel", "aten::mean", "aten::sum", "radixsort", "scan")),
)


def kernel_times(step: Callable[[], object], *, device: torch.device, top: int = 16) -> dict:
    """Milliseconds by kind, number of kernels and the longest of them, of one call of `step`."""
    on_gpu = device.type == "cuda"

    def timed() -> float:
        start = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) * 1e3

    unprofiled_ms = timed()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        wall_ms = timed()
    rows = []
    for event in profiler.key_averages():
        total_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if total_us > 0:
            rows.append((event.key, total_us / 1e3, event.count))
    by_kind: dict[str, float] = {}
    for name, ms, _ in rows:
        kind = kind_of(name)
        by_kind[kind] = by_kind.get(kind, 0.0) + ms
    rows.sort(key=lambda row: -row[1])
    return {
        "wall_ms": round(wall_ms, 1),
        "unprofiled_ms": round(unprofiled_ms, 1),
        "kernels_ms": round(sum(row[1] for row in rows), 1),
        "num_kernels": sum(row[2] for row in rows),
        "by_kind_ms": {k: round(v, 1) for k, v in sorted(by_kind.items(), key=lambda i: -i[1])},
        "longest": [[name[:80], round(ms, 2), count] for name, ms, count in rows[:top]],
    }


def kind_of(name: str) -> str:
    """The first kind that a kernel's name fits."""
    low = name.lower()
    for kind, words in KINDS:
        if any(word in low for word in words):
            return kind
    return "elementwise, other"
