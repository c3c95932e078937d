"""Time of one optimiser step beside torch's fused AdamW and bitsandbytes' AdamW8bit.

    python bench/optimizer.py [--set lora|full|both] [--steps 20] [--layers N]

`lora` is the adapters of a Llama-3-8B at rank 16 on all linears: 448 tensors, 42 M elements, fp32.
`full` is a Llama-3.2-1B-shaped model, 1.24 G elements in bf16 (on a CPU: two of its 16 layers). One
JSON line for each row: median milliseconds, ratio to torch's fused AdamW of the same set (below 1
is faster), MiB of state, and the most memory above weights, gradients and state that a step took.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import nn

from nibble.optim import Optimizer, clip_grad_norm_

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OURS = (("adamw", "fp32"), ("adamw", "8bit"), ("adamw", "bf16"), ("adafactor", "fp32"))


def lora_shapes(num_layers: int = 32, rank: int = 16) -> list[tuple[int, ...]]:
    """A and B of every linear of a Llama-3-8B."""
    hidden, key_value, inner = 4096, 1024, 14336
    linears = [(hidden, hidden), (key_value, hidden), (key_value, hidden), (hidden, hidden)]
    linears += [(inner, hidden), (inner, hidden), (hidden, inner)]
    shapes = [shape for out, in_ in linears for shape in ((rank, in_), (out, rank))]
    return shapes * num_layers


def full_shapes(num_layers: int = 16) -> list[tuple[int, ...]]:
    """Every parameter of a Llama-3.2-1B (tied embedding)."""
    hidden, key_value, inner, vocabulary = 2048, 512, 8192, 128256
    layer = [(hidden, hidden), (key_value, hidden), (key_value, hidden), (hidden, hidden)]
    layer += [(inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,)]
    embedding = [(vocabulary, hidden)] if num_layers == 16 else []
    return [*embedding, *(layer * num_layers), (hidden,)]


def rows(device: torch.device) -> Iterable[tuple[str, Make]]:
    """Name and constructor of each contender; the first is what ratios refer to."""
    yield "torch fused", lambda weights: torch.optim.AdamW(weights, lr=1e-4, fused=True)
    yield "torch foreach", lambda weights: torch.optim.AdamW(weights, lr=1e-4, foreach=True)
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes

        yield "bitsandbytes 8bit", lambda weights: bitsandbytes.optim.AdamW8bit(weights, lr=1e-4)
    for rule, codec in OURS:
        yield (
            f"nibble {rule} {codec}",
            lambda weights, rule=rule, codec=codec: Optimizer(
                weights, lr=1e-4, rule=rule, codec=codec, stochastic_rounding=True
            ),
        )


def measure(
    make: Make,
    shapes: list[tuple[int, ...]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    steps: int,
) -> dict[str, float]:
    """Median step time, bytes of state and bytes of temporaries (0 where there is no CUDA)."""
    weights = [nn.Parameter(torch.zeros(shape, dtype=dtype, device=device)) for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = make(weights)
    optimizer.step()  # makes the state
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    start = time.perf_counter()
    norm = clip_grad_norm_(weights, 1.0)
    assert torch.isfinite(norm)
    return {
        "ms": 1e3 * statistics.median(times),
        "state_mib": sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor)) / 2**20,
        "temporaries_mib": (peak - before) / 2**20,
        "clip_ms": 1e3 * (time.perf_counter() - start),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=("lora", "full", "both"), default="both")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    full_layers = options.layers or (16 if device.type == "cuda" else 2)
    sets = {
        "lora": (lora_shapes(options.layers or 32), torch.float32),
        "full": (full_shapes(full_layers), torch.bfloat16),
    }
    for set_name, (shapes, dtype) in sets.items():
        if options.set not in (set_name, "both"):
            continue
        base_ms: float | None = None
        for row, make in rows(device):
            found = measure(make, shapes, dtype=dtype, device=device, steps=options.steps)
            base_ms = base_ms or found["ms"]
            line = {
                "device": name,
                "set": set_name,
                "dtype": str(dtype).removeprefix("torch."),
                "num_tensors": len(shapes),
                "num_elements": sum(torch.Size(shape).numel() for shape in shapes),
                "row": row,
                "ratio_to_torch_fused": round(found["ms"] / base_ms, 3),
                **{key: round(value, 2) for key, value in found.items()},
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
