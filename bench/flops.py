"""Floating-point operations of a Llama's training step, from its config.json.

A product of [n, k] and [k, m] counts 2 n k m; causal attention counts the half that is needed, and
in packed rows that of each document. `model` is what the step must do: forward, gradients by
activations, and by weights where those are trained. `executed` adds what is computed again because
activations were dropped. HFU = executed / time / peak, with 989 TFLOP/s for an H100 or H200 in
bf16; on other devices the share of that is not meaningful and left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

PEAK_FLOPS = 989e12
HOPPER = ("H100", "H200", "GH200")


class Flops(NamedTuple):
    """Of one step."""

    model: float
    recomputed: float
    """If every block were computed again."""


def step_flops(
    config: dict[str, Any],
    *,
    doc_lengths: Sequence[Sequence[int]],
    trains_base: bool,
    num_trained: int,
) -> Flops | None:
    """Operations of a step over rows of documents; None for a family without gated layers.

    num_trained: parameters of adapters, where the base is frozen.
    """
    if "intermediate_size" not in config:
        return None
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = hidden // heads
    linear = layers * (
        2 * hidden * hidden
        + 2 * hidden * keys * head_dim
        + 3 * hidden * config["intermediate_size"]
    )
    head = hidden * config["vocab_size"]
    tokens = sum(n for row in doc_lengths for n in row)
    squares = sum(n * n for row in doc_lengths for n in row)
    attention = 2.0 * layers * hidden * squares  # scores and values, the causal half of 4 h n^2
    passes = 6 if trains_base else 4
    adapters = 0 if trains_base else num_trained
    model = tokens * (passes * (linear + head) + 6.0 * adapters) + 3 * attention
    recomputed = tokens * (2.0 * linear + 2.0 * adapters) + attention
    return Flops(float(model), float(recomputed))


def shares(flops: Flops | None, *, seconds: float, recomputed: float, device: str) -> dict:
    """TFLOP/s of the model, and MFU and HFU; `recomputed`: share of blocks computed again."""
    if flops is None:
        return {}
    told = {"model_tflops": round(flops.model / seconds / 1e12, 1)}
    if any(name in device for name in HOPPER):
        executed = flops.model + recomputed * flops.recomputed
        told["mfu"] = round(flops.model / seconds / PEAK_FLOPS, 4)
        told["hfu"] = round(executed / seconds / PEAK_FLOPS, 4)
    return told
