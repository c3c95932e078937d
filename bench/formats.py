"""Packing time, unpacking bandwidth and error of every weight format on the device present.

    python bench/formats.py [--rows N] [--columns N] [--repeats N] [--tokens N]

One JSON line for each format and provider: seconds to pack, GB/s of unpacking to bf16 (codes,
scales and output, each once), the same as a share of the bandwidth of a plain copy measured in the
same run, and the relative error of a normal weight. bitsandbytes' own unpacking is a row where it
is installed (its nested scales are decoded in two steps, as in its modules), and so is LLM.int8's
product. The default is 4096 x 4096 (on a CPU: 1024 x 1024).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from nibble.errors import NibbleError
from nibble.kernels import select, select_matmul
from nibble.numerics.formats import pack
from nibble.spec.config import Quant
from nibble.spec.formats import FormatSpec, format_spec

QUANTS = (
    Quant(format="nf4"),
    Quant(format="nf4", double_quant=False),
    Quant(format="fp4"),
    Quant(format="int8"),
    *(Quant(format="hqq", bits=bits) for bits in (1, 2, 3, 4, 8)),  # type: ignore[arg-type]
    Quant(format="ternary"),
)


def seconds(work: Callable[[], object], *, device: torch.device, repeats: int) -> float:
    """Median time of one call. On CUDA several calls with cold caches between two events."""
    for _ in range(3):
        work()
    if device.type == "cpu":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    # Larger than the second-level cache, and long enough to overwrite that the host, which needs
    # some 50 us to launch a Triton kernel, is ahead of the GPU when the timed call begins.
    flush = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    times = []
    for _ in range(repeats):
        flush.zero_()
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        work()
        end_event.record()
        torch.cuda.synchronize(device)
        times.append(start_event.elapsed_time(end_event) / 1e3)
    return statistics.median(times)


def theirs(spec: FormatSpec, weight: Tensor) -> Callable[[], Tensor] | None:
    """bitsandbytes' unpacking of the same weight, or None where it has none."""
    try:
        from bitsandbytes import functional
    except ImportError:
        return None
    if spec.name not in ("nf4", "fp4"):
        return None
    codes, state = functional.quantize_4bit(
        weight, blocksize=spec.block, quant_type=spec.name, compress_statistics=spec.double_quant
    )
    return lambda: functional.dequantize_4bit(codes, state)


def unpack_rows(
    spec: FormatSpec, weight: Tensor, *, copy_gbps: float, repeats: int
) -> list[dict[str, object]]:
    """The rows of one format: each of our providers, then bitsandbytes."""
    device = weight.device
    shape = (weight.shape[0], weight.shape[1])
    pack_s = seconds(lambda: pack(spec, weight), device=device, repeats=3)
    packed = pack(spec, weight)
    moved = spec.nbytes(shape) + weight.numel() * 2
    calls: dict[str, Callable[[], Tensor]] = {}
    for choice in ("eager", "triton", "bitsandbytes"):
        try:
            unpack = select(spec, device=device, choice=choice)
        except NibbleError:
            continue
        calls[choice] = lambda f=unpack: f(spec, packed, shape=shape, dtype=torch.bfloat16)
    other = theirs(spec, weight)
    if other is not None:
        calls["bitsandbytes itself"] = other
    rows: list[dict[str, object]] = []
    for provider, call in calls.items():
        error = (call().float() - weight).norm() / weight.float().norm()
        unpack_s = seconds(call, device=device, repeats=repeats)
        rows.append(
            {
                "format": spec.name,
                "bits": spec.bits,
                "block": spec.block,
                "double_quant": spec.double_quant,
                "provider": provider,
                "bits_per_weight": round(spec.nbytes(shape) * 8 / weight.numel(), 3),
                "pack_s": None if other is call else round(pack_s, 5),
                "unpack_us": round(unpack_s * 1e6, 1),
                "unpack_gbps": round(moved / unpack_s / 1e9, 1),
                "of_copy": round(moved / unpack_s / 1e9 / copy_gbps, 3),
                "relative_error": round(error.item(), 5),
            }
        )
    return rows


def int8_rows(weight: Tensor, *, tokens: int, repeats: int) -> list[dict[str, object]]:
    """LLM.int8's product with two outlier columns, beside the 16-bit product and bitsandbytes."""
    device = weight.device
    spec = format_spec(Quant(format="int8"))
    assert spec is not None
    packed = pack(spec, weight)
    x = torch.randn(tokens, weight.shape[1], device=device, dtype=torch.bfloat16)
    x[:, 5:7] *= 20
    exact = x.float() @ weight.float().t()
    calls: dict[str, Callable[[], Tensor]] = {"bf16 matmul": lambda: x @ weight.t()}
    for choice in ("eager", "triton"):
        try:
            matmul = select_matmul(spec, device=device, choice=choice)
        except NibbleError:
            continue
        assert matmul is not None
        calls[choice] = lambda f=matmul: f(spec, packed, x)
    try:
        import bitsandbytes

        half = x.half()
        state = bitsandbytes.MatmulLtState()
        state.CB, state.SCB = packed["codes"], packed["scales"].squeeze(1)
        state.threshold, state.has_fp16_weights = 6.0, False
        calls["bitsandbytes itself"] = lambda: bitsandbytes.matmul(half, state.CB, state=state)
    except ImportError:
        pass
    rows: list[dict[str, object]] = []
    for provider, call in calls.items():
        with torch.no_grad():
            error = (call().float() - exact).norm() / exact.norm()
            call_s = seconds(call, device=device, repeats=repeats)
        rows.append(
            {
                "format": "int8 product",
                "tokens": tokens,
                "provider": provider,
                "product_us": round(call_s * 1e6, 1),
                "relative_error": round(error.item(), 5),
            }
        )
    return rows


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=4096 if on_gpu else 1024)
    parser.add_argument("--columns", type=int, default=4096 if on_gpu else 1024)
    parser.add_argument("--repeats", type=int, default=30 if on_gpu else 5)
    parser.add_argument("--tokens", type=int, default=2048 if on_gpu else 64)
    options = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(options.rows, options.columns, generator=generator) * 0.02
    weight = weight.to(device, torch.bfloat16)
    copied = torch.empty_like(weight)
    for _ in range(2000 if on_gpu else 0):  # a GPU that was idle takes a while to clock up
        copied.copy_(weight)
    copy_s = seconds(lambda: copied.copy_(weight), device=device, repeats=options.repeats)
    copy_gbps = 2 * weight.nbytes / copy_s / 1e9
    name = (
        torch.cuda.get_device_name(device) if on_gpu else f"cpu, {torch.get_num_threads()} threads"
    )
    shape = [options.rows, options.columns]
    print(json.dumps({"device": name, "shape": shape, "copy_gbps": round(copy_gbps, 1)}))
    for quant in QUANTS:
        spec = format_spec(quant)
        assert spec is not None
        for row in unpack_rows(spec, weight, copy_gbps=copy_gbps, repeats=options.repeats):
            print(json.dumps(row), flush=True)
    for row in int8_rows(weight, tokens=options.tokens, repeats=options.repeats):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
