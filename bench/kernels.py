"""Bandwidth and error of the kernels between a block's matrix products, and time of its adapters.

    python bench/kernels.py [check] [--tokens N,...] [--repeats N] [--shapes 8b,70b]

One JSON line for each kernel and shape: microseconds, GB/s (each input and output once, what a
kernel of this kind must move), the same as a share of a plain copy's bandwidth in the same run, and
microseconds of the eager twin. Then the linears that read one input: their low-rank products taken
together and one by one, forward and backward, without the frozen product. `check` compares instead
every kernel, and the eager twin beside it, with the twin on the same values without 16-bit
rounding: the largest error in last places of the largest value. Shapes: Llama-3-8B and Llama-2-70B.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from formats import seconds
from torch import Tensor

from nibble.kernels.layers import EAGER, LayerKernels, layer_kernels
from nibble.nn.adapted import NO_CASTS, Casts, LowRank, adapted
from nibble.nn.adapters import LoraLinear

EPS = 1e-5
CHUNK, VOCABULARY = 1024, 128256


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The widths that a block's kernels see."""

    hidden: int
    inner: int
    heads: int
    key_heads: int
    head_dim: int = 128


SHAPES = {
    "8b": Shape(hidden=4096, inner=14336, heads=32, key_heads=8),
    "70b": Shape(hidden=8192, inner=28672, heads=64, key_heads=8),
    "tiny": Shape(hidden=256, inner=640, heads=4, key_heads=2, head_dim=64),
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """One kernel on its inputs; `moved`: tensors that it must read or write, in elements."""

    name: str
    run: Callable[[LayerKernels, list[Tensor]], tuple[Tensor, ...]]
    inputs: list[Tensor]
    moved: int


def works(shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[Work]:
    """The kernels of one block at this many tokens."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    wide, inner = tokens * shape.hidden, tokens * shape.inner
    x, grad, weight = (
        normal(tokens, shape.hidden),
        normal(tokens, shape.hidden),
        normal(shape.hidden),
    )
    norm = {"eps": EPS, "unit_offset": False}
    yield Work(
        name="norm",
        run=lambda k, t: (k.rms_norm(*t, **norm),),
        inputs=[x, weight],
        moved=2 * wide,
    )
    for trained in (False, True):
        yield Work(
            name=f"norm backward{', weight trained' if trained else ''}",
            run=lambda k, t, trained=trained: tuple(  # type: ignore[misc]
                y for y in k.rms_norm_backward(*t, trained=trained, **norm) if y is not None
            ),
            inputs=[grad, x, weight],
            moved=3 * wide,
        )
    q = normal(1, tokens, shape.heads, shape.head_dim)
    k = normal(1, tokens, shape.key_heads, shape.head_dim)
    angles = torch.rand(1, tokens, shape.head_dim // 2, device=device).mul_(6.0).repeat(1, 1, 2)
    for inverse in (False, True):
        yield Work(
            name=f"rotary{' backward' if inverse else ''}",
            run=lambda k, t, inverse=inverse: k.rotate(*t, inverse=inverse),  # type: ignore[misc]
            inputs=[q, k, angles.cos().to(dtype), angles.sin().to(dtype)],
            moved=2 * (q.numel() + k.numel()),
        )
    gate, up, by_output = (normal(tokens, shape.inner) for _ in range(3))
    for act in ("silu", "gelu_tanh"):
        yield Work(
            name=f"gate {act}",
            run=lambda k, t, act=act: (k.gate(*t, activation=act),),  # type: ignore[misc]
            inputs=[gate, up],
            moved=3 * inner,
        )
        yield Work(
            name=f"gate {act} backward",
            run=lambda k, t, act=act: k.gate_backward(*t, activation=act),  # type: ignore[misc]
            inputs=[by_output, gate, up],
            moved=5 * inner,
        )

    logits = normal(min(tokens, CHUNK), VOCABULARY)
    targets = torch.randint(0, VOCABULARY, (logits.shape[0],), generator=generator, device=device)
    yield Work(
        name="cross entropy",
        run=lambda k, t: (k.cross_entropy_(t[0], targets, need_grad=True), t[0]),
        inputs=[logits],
        moved=3 * logits.numel(),
    )


def copy_gb_per_s(device: torch.device, repeats: int) -> float:
    """Bandwidth of a plain copy of 1 GiB (on a CPU 16 MiB), read and written."""
    size = (1 << 30) if device.type == "cuda" else (1 << 24)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device=device, repeats=repeats) / 1e9


def measure(work: Work, *, device: torch.device, repeats: int, ceiling: float) -> dict[str, object]:
    """Microseconds and bandwidth of a kernel, and microseconds of its eager twin."""
    fast = layer_kernels(device.type)
    taken_s = seconds(lambda: work.run(fast, work.inputs), device=device, repeats=repeats)
    eager_s = seconds(lambda: work.run(EAGER, work.inputs), device=device, repeats=repeats)
    gb_per_s = work.moved * work.inputs[0].element_size() / taken_s / 1e9
    return {
        "us": round(taken_s * 1e6, 1),
        "gb_per_s": round(gb_per_s, 1),
        "share_of_copy": round(gb_per_s / ceiling, 3),
        "eager_us": round(eager_s * 1e6, 1),
    }


def compare(work: Work, *, device: torch.device) -> dict[str, object]:
    """Largest errors of kernel and eager twin against the twin on the same values in fp32 inputs.

    The twins compute in fp32; with fp32 inputs no intermediate is rounded to 16 bits.
    """
    exact = work.run(EAGER, [t.to(torch.float32, copy=True) for t in work.inputs])
    errors = []
    for kernels in (layer_kernels(device.type), EAGER):
        made = work.run(kernels, [t.clone() for t in work.inputs])
        errors.append(
            max(
                float((y.float() - e.float()).abs().max() / e.float().abs().max())
                / torch.finfo(y.dtype).eps
                for y, e in zip(made, exact, strict=True)
            )
        )
    return {"error_units": round(errors[0], 2), "eager_error_units": round(errors[1], 2)}


def adapters_together(
    shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype, repeats: int
) -> Iterator[dict[str, object]]:
    """The low-rank part of q, k, v and of gate, up: products shared and one by one."""
    keys = shape.key_heads * shape.head_dim
    groups = {"q, k, v": (shape.heads * shape.head_dim, keys, keys), "gate, up": (shape.inner,) * 2}
    for name, widths in groups.items():
        x = torch.randn(tokens, shape.hidden, device=device, dtype=dtype, requires_grad=True)
        bases = [_Nothing(shape.hidden, width) for width in widths]
        plain = (torch.nn.Linear(shape.hidden, w, bias=False, device=device) for w in widths)
        linears = [LoraLinear(p.requires_grad_(False), rank=16, alpha=16).to(device) for p in plain]
        casts = Casts([linears], names=("lora_A", "lora_B"))
        casts.refresh(dtype)

        row: dict[str, object] = {"bench": "adapters", "linears": name}
        for label, shared, cast in (
            ("one by one, cast each time", False, False),
            ("one by one", False, True),
            ("together", True, True),
        ):
            taken_s = seconds(
                partial(_pass, x, bases, linears, casts if cast else NO_CASTS, shared),
                device=device,
                repeats=repeats,
            )
            row[f"{label}, us"] = round(taken_s * 1e6, 1)
        yield row


def _pass(
    x: Tensor, bases: list[_Nothing], linears: list[LoraLinear], casts: Casts, shared: bool
) -> None:
    """Forward and backward through the adapters of linears that read x."""
    updates = [LowRank(x, m.lora_A, m.lora_B, m.scaling, casts) for m in linears]
    if shared:
        outputs = list(adapted(x, bases, updates))
    else:
        outputs = [adapted(x, [b], [u])[0] for b, u in zip(bases, updates, strict=True)]
    torch.autograd.backward(outputs, [y.detach() for y in outputs])


class _Nothing:
    """A base whose product is zero and costs one pass: what is left is the adapter's time."""

    keeps_first = False

    def __init__(self, in_features: int, out_features: int) -> None:
        self.in_features, self.out_features = in_features, out_features

    def product(self, rows: Tensor) -> Tensor:
        return rows.new_zeros(rows.shape[0], self.out_features)

    def transposed_product(self, grad: Tensor, onto: Tensor | None = None) -> Tensor:
        return grad.new_zeros(grad.shape[0], self.in_features) if onto is None else onto


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("mode", nargs="?", choices=["time", "check"], default="time")
    parser.add_argument("--tokens", default="2048,8192")
    parser.add_argument("--shapes", default="8b,70b")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ceiling = copy_gb_per_s(device, options.repeats)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(json.dumps({"bench": "copy", "gb_per_s": round(ceiling, 1), "device": name}), flush=True)
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    for shape in options.shapes.split(","):
        for tokens in map(int, options.tokens.split(",")):
            about = {"shape": shape, "tokens": tokens}
            for dtype in dtypes if options.mode == "check" else dtypes[:1]:
                for work in works(SHAPES[shape], tokens, device, dtype):
                    row = {"bench": options.mode, "kernel": work.name, "dtype": str(dtype), **about}
                    if options.mode == "check":
                        row |= compare(work, device=device)
                    else:
                        row |= measure(
                            work, device=device, repeats=options.repeats, ceiling=ceiling
                        )
                    print(json.dumps(row), flush=True)
            if options.mode == "time":
                words = (SHAPES[shape], tokens, device, dtypes[0], options.repeats)
                for row in adapters_together(*words):
                    print(json.dumps({**row, **about}), flush=True)


if __name__ == "__main__":
    main()
