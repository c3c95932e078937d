"""Time and error of BLOOM's kernels: attention with ALiBi, and the mixed product of LLM.int8.

    python bench/int8_attention.py [attention] [products] [--tokens 8x512,4x2048] [--heads N]
                                   [--dim N] [--repeats N]

One JSON line for each function and tile at BLOOM-7B1's shapes: milliseconds, TFLOP/s (scores above
the diagonal are not counted), and the relative error by the Frobenius norm against the eager twin
in fp32 on a part of the heads or tokens; bf16 has 2e-3 to 5e-3. `way` is the name in
`nn.fused_alibi.ATTENTIONS` or `kernels.int8.PRODUCTS`, the one that runs by default marked; the
fastest row of each kernel says which tile its table should hold. Products also with 24 outlier
columns. On a CPU only what needs no Triton runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from formats import seconds
from torch import Tensor

from nibble.nn import fused_alibi
from nibble.numerics import int8 as eager_int8
from nibble.numerics.alibi_attention import alibi_attention, alibi_attention_backward

NUM_COMPARED = 2
"""Heads of attention that are compared with the eager twin."""
COMPARED_TOKENS = 512
OUTLIERS = 24
THRESHOLD = 6.0


@dataclass(frozen=True)
class Shape:
    """Rows, tokens of each, heads and their width."""

    rows: int
    tokens: int
    heads: int
    dim: int


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", nargs="*", default=["attention", "products"])
    parser.add_argument("--tokens", default="8x512,4x2048")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for word in options.tokens.split(","):
        rows, tokens = map(int, word.split("x"))
        shape = Shape(rows, tokens, options.heads, options.dim)
        if "attention" in options.what:
            for line in attention(shape, device, options.repeats):
                print(json.dumps({"bench": "attention", "batch": word, **line}), flush=True)
        if "products" in options.what and device.type == "cuda":
            for line in products(shape, device, options.repeats):
                print(json.dumps({"bench": "int8 product", "batch": word, **line}), flush=True)


def attention(shape: Shape, device: torch.device, repeats: int) -> Iterator[dict[str, Any]]:
    """A line for each way and tile."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    size = (shape.rows, shape.tokens, shape.heads, 3, shape.dim)
    qkv = torch.randn(size, generator=generator, device=device).to(dtype).requires_grad_()
    slopes = 2.0 ** -(torch.arange(1, shape.heads + 1, device=device) * 8 / shape.heads)
    bias = (slopes[:, None] * torch.arange(shape.tokens, device=device)).to(dtype)
    bias = bias.expand(shape.rows, -1, -1).contiguous()
    padding = torch.zeros(1, shape.tokens, dtype=dtype, device=device).expand(shape.rows, -1)
    grad = torch.randn(size[:3] + size[4:], generator=generator, device=device).to(dtype)
    scale = shape.dim**-0.5
    flops = 2.0 * shape.rows * shape.heads * shape.tokens**2 * shape.dim  # two products, causal
    exact = _exact(qkv.detach(), bias, padding, grad, scale)
    for way, label, prepare in _ways(device):
        prepare()
        function = fused_alibi.ATTENTIONS[way]

        def forward(function: Callable[..., Tensor] = function) -> Tensor:
            with torch.no_grad():
                return function(qkv, bias, padding, scale=scale)

        def both(function: Callable[..., Tensor] = function) -> Tensor:
            out = function(qkv, bias, padding, scale=scale)
            return torch.autograd.grad(out, qkv, grad)[0]

        try:
            errors = [_error(found, wanted) for found, wanted in zip(
                (forward(), both()), exact, strict=True
            )]  # fmt: skip
            once_s = seconds(forward, device=device, repeats=repeats)
            both_s = seconds(both, device=device, repeats=repeats)
        except Exception as error:  # a tile that does not compile is a row as well
            yield {"way": way, "tile": label, "failed": f"{type(error).__name__}: {error}"[:300]}
            continue
        yield {
            "way": way,
            "tile": label,
            "default": way == fused_alibi.CHOSEN,
            "forward_ms": round(once_s * 1e3, 3),
            "both_ms": round(both_s * 1e3, 3),
            "forward_tflops": round(flops / once_s / 1e12, 1),
            "backward_tflops": round(2.5 * flops / max(both_s - once_s, 1e-9) / 1e12, 1),
            "errors": [round(error, 5) for error in errors],
        }


def _ways(device: torch.device) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """Name, tile, and what sets it."""
    yield "sdpa", "", lambda: None
    if device.type != "cuda":
        yield "kernel", "eager twin", lambda: None
        return
    from nibble.kernels import alibi_attention as kernel

    usual = (kernel.FORWARD, kernel.BY_QUERY, kernel.BY_KEY)
    for index, name, tiles in (
        (0, "FORWARD", ((128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3))),
        (1, "BY_QUERY", ((128, 64, 8, 3), (64, 64, 4, 2))),
        (2, "BY_KEY", ((64, 128, 8, 2), (64, 64, 4, 2))),
    ):
        for tile in tiles:
            chosen = list(usual)
            chosen[index] = kernel.Tile(*tile)

            def prepare(chosen: list[Any] = chosen) -> None:
                kernel.FORWARD, kernel.BY_QUERY, kernel.BY_KEY = chosen

            yield "kernel", f"{name}={tile}", prepare
    kernel.FORWARD, kernel.BY_QUERY, kernel.BY_KEY = usual


def _exact(
    qkv: Tensor, bias: Tensor, padding: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and gradient of the last row's first heads, in fp32."""
    part = qkv[-1:, :, :NUM_COMPARED].float()
    heads, row = bias[-1:, :NUM_COMPARED], padding[-1:]
    out, sums = alibi_attention(part, heads, row, scale=scale)
    by_out = grad[-1:, :, :NUM_COMPARED].float()
    return out, alibi_attention_backward(by_out, part, out, sums, heads, row, scale=scale)


def _error(found: Tensor, exact: Tensor) -> float:
    part = found[-1:, :, :NUM_COMPARED].float()
    return float((part - exact).norm() / exact.norm())


def products(shape: Shape, device: torch.device, repeats: int) -> Iterator[dict[str, Any]]:
    """A line for each of a block's products, way and tile."""
    from nibble.kernels import int8

    tokens, hidden = shape.rows * shape.tokens, shape.heads * shape.dim
    generator = torch.Generator(device).manual_seed(0)
    usual = int8.PRODUCT
    for features, columns in (
        (3 * hidden, hidden), (hidden, hidden), (4 * hidden, hidden), (hidden, 4 * hidden)
    ):  # fmt: skip
        weight = torch.randn(features, columns, generator=generator, device=device) * 0.02
        packed = eager_int8.pack(_spec(), weight)
        bias = torch.randn(features, generator=generator, device=device).bfloat16()
        flops = 2.0 * tokens * features * columns
        for num_outliers in (0, OUTLIERS):
            x = torch.randn(tokens, columns, generator=generator, device=device).clamp_(-5, 5)
            x[:, :: columns // OUTLIERS][:, :num_outliers] *= 8
            x = x.bfloat16()
            rounded = int8.round_tokens(x, threshold=THRESHOLD)
            part = x[:COMPARED_TOKENS]
            # The twin's outlier columns are those of its own tokens.
            exact = eager_int8.matmul(_spec(), packed, part.float(), bias.float())
            about = {"out": features, "in": columns, "outliers": num_outliers}
            timed = partial(seconds, device=device, repeats=repeats)
            rounding_s = timed(partial(int8.round_tokens, x, threshold=THRESHOLD))
            yield {**about, "way": "rounding", "ms": round(rounding_s * 1e3, 3)}
            alone_s = timed(partial(torch._int_mm, rounded.codes, packed["codes"].t()))
            yield {**about, "way": "_int_mm alone", **_rate(alone_s, flops)}
            for way, tile in (
                ("two", usual), ("one", usual), ("one", int8.Tile(128, 256, 128, 8, 4)),
                ("one", int8.Tile(128, 128, 128, 8, 4)), ("one", int8.Tile(256, 128, 128, 8, 3)),
            ):  # fmt: skip
                int8.PRODUCT = tile
                product = int8.PRODUCTS[way]
                inputs = (x, rounded, packed["codes"], packed["scales"], bias)
                line = {**about, "way": way, "default": way == int8.CHOSEN}
                line |= {"tile": list(tile)} if way == "one" else {}
                try:
                    wrong = product(*inputs)[:COMPARED_TOKENS].float() - exact
                    error = float(wrong.norm() / exact.norm())
                    spent_s = timed(partial(product, *inputs))
                except Exception as failure:  # a tile that does not compile is a row as well
                    yield {**line, "failed": f"{type(failure).__name__}: {failure}"[:300]}
                    continue
                yield {**line, **_rate(spent_s, flops), "error": round(error, 5)}
            int8.PRODUCT = usual


def _rate(spent_s: float, flops: float) -> dict[str, float]:
    return {"ms": round(spent_s * 1e3, 3), "tflops": round(flops / spent_s / 1e12, 1)}


def _spec() -> Any:
    from nibble.spec.formats import FormatSpec

    return FormatSpec(name="int8", bits=8, int8_threshold=THRESHOLD)


if __name__ == "__main__":
    main()
