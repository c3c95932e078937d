"""How fast a step can be, and what limits it: matrix products, memory or launches.

    step = max(products / rate + bytes moved / bandwidth, kernels x time to launch one,
               bytes over the bus / its rate)

Products are counted from shapes: forward 2 a weight and token, backward twice that where the weight
is trained and once where it is frozen, forward again where blocks are recomputed; attention's
backward is 2.5 times its forward. Bytes moved are the packed and dense weights at each unpacking,
the elementwise traffic (a multiple of what the blocks keep: transformers' unfused norms and
rotations) and the optimiser's pass over its tensors. Kernels are launched by Python, which small
batches wait for. Over the bus come streamed blocks, once forward and once backward, and activations
that wait on the host, once each way; they hide behind the rest.

The multiples come from a profile of transformers with peft on one H200 (QLoRA of a Llama 3 8B
shape, 4 x 2048 tokens: 524 ms of products, 318 elementwise, 29 unpacking, 45 attention; 1 x 2048:
11,609 kernels in 355 ms). It is an estimate for planning, within some 20 % there; elsewhere it is
as good as the card's row. It is not a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nibble.spec.activations import Work, kept_by_block
from nibble.spec.checkpointing import Keeping, keeping
from nibble.spec.config import Recipe
from nibble.spec.hardware import Hardware
from nibble.spec.holdings import Devices, Holding
from nibble.spec.inventory import Inventory

ELEMENTWISE_TRAFFIC = 25
"""Bytes moved for each byte that a block keeps, in a step with recomputation (15 without)."""
ATTENTION_RATE_SHARE = 0.66
"""Of the rate of products, that fused attention reaches."""
KERNELS_PER_BLOCK, KERNELS_PER_ADAPTER, KERNELS_PER_UNPACKING = 40, 5, 2
LAUNCH_S = 30e-6
"""Python's time for one kernel, on the host of the profile."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds of a step by what they are spent on, and what follows from them."""

    products_s: float
    memory_s: float
    launches_s: float
    bus_s: float
    tokens_per_step: int
    num_devices: int
    power_w: float
    """Of one device."""
    price_usd_hour: float | None
    """Of one device."""

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return max(self.products_s + self.memory_s, self.launches_s, self.bus_s)

    @property
    def limiter(self) -> str:
        """What the step waits for most: products, memory, launches or the bus."""
        if self.bus_s > max(self.products_s + self.memory_s, self.launches_s):
            return "the bus"
        if self.launches_s > self.products_s + self.memory_s:
            return "launches"
        return "products" if self.products_s >= self.memory_s else "memory"

    @property
    def tokens_per_s(self) -> float:
        """Tokens of a step over its seconds."""
        return self.tokens_per_step / self.step_s

    def hours(self, num_tokens: float) -> float:
        """Hours for so many tokens."""
        return num_tokens / self.tokens_per_s / 3600

    def energy_kwh(self, num_tokens: float) -> float:
        """The cards' energy at their board power, an upper bound."""
        return self.hours(num_tokens) * self.num_devices * self.power_w / 1000

    def cost_usd(self, num_tokens: float) -> float | None:
        """Rent for so many tokens; None when the card's price is not known."""
        if self.price_usd_hour is None:
            return None
        return self.hours(num_tokens) * self.num_devices * self.price_usd_hour

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "step_s": self.step_s,
            "products_s": self.products_s,
            "memory_s": self.memory_s,
            "launches_s": self.launches_s,
            "bus_s": self.bus_s,
            "limiter": self.limiter,
            "tokens_per_s": self.tokens_per_s,
            "hours_per_million_tokens": self.hours(1e6),
            "kwh_per_million_tokens": self.energy_kwh(1e6),
            "usd_per_million_tokens": self.cost_usd(1e6),
        }


def estimate(
    recipe: Recipe,
    stock: Inventory,
    work: Work,
    *,
    hardware: Hardware | None,
    held: Holding,
    devices: Devices,
) -> tuple[float, Speed | None]:
    """FLOPs of a step on all devices, and its speed where the card is known."""
    passes = recipe.train.gradient_accumulation_steps
    blocks = keeping(stock.architecture, work, recipe.train)
    products, attention = _flops(recipe, stock, work, blocks)
    flops = passes * (products + attention)
    if hardware is None:
        return flops * devices.total, None
    rate = hardware.matmul_flops
    moved = passes * _traffic(stock, work, blocks) + _update_traffic(stock)
    return flops * devices.total, Speed(
        products_s=passes * (products / rate + attention / (rate * ATTENTION_RATE_SHARE)),
        memory_s=moved / hardware.bandwidth_bytes,
        launches_s=passes * _kernels(stock, blocks) * LAUNCH_S,
        bus_s=passes * 2 * (_pulled(stock, held) + blocks.host) / hardware.bus_bytes,
        tokens_per_step=passes * work.tokens * devices.total,
        num_devices=devices.total,
        power_w=hardware.power_w,
        price_usd_hour=hardware.price_usd_hour,
    )


def _pulled(stock: Inventory, held: Holding) -> int:
    """Bytes of blocks that are not on the device when a pass comes to them."""
    if not held.streamed:
        return 0
    return stock.base_bytes - (held.base_codes + held.base_scales + held.base_weights)


def _flops(recipe: Recipe, stock: Inventory, work: Work, blocks: Keeping) -> tuple[float, float]:
    """FLOPs of one pass: matrix products, attention."""
    shape, tokens = stock.architecture, work.tokens
    base = 2.0 * shape.matmul_size * tokens
    attention = shape.attention_flops_per_token(work.row_length) * tokens
    head = 2.0 * shape.head_size * tokens
    low_rank = 2.0 * stock.num_adapter * tokens
    again = blocks.again_share
    backward = 2.0 if work.everything else 1.0
    products = base * (1.0 + backward + again) + head * (3.0 if stock.head_trained else 2.0)
    products += low_rank * (3.0 + again)
    attention_again = 0.0 if recipe.train.activation_checkpointing == "selective" else again
    return products, attention * (3.5 + attention_again)


def _traffic(stock: Inventory, work: Work, blocks: Keeping) -> float:
    """Bytes of device memory that one pass moves, products apart."""
    shape, again = stock.architecture, blocks.again_share
    block = sum(kept_by_block(shape, work, block=max(0, shape.sizes.num_layers - 1)).values())
    elementwise = (15 + (ELEMENTWISE_TRAFFIC - 15) * again) * block * shape.sizes.num_layers
    packed = stock.base_codes_bytes + stock.base_scales_bytes
    unpacking = (2 + again) * (packed + 2 * work.element * stock.num_packed)
    return float(elementwise + unpacking)


def _update_traffic(stock: Inventory) -> float:
    """Weights and state are read and written, gradients read twice and cleared."""
    return float(2 * stock.trained_bytes + 2 * stock.optimizer_bytes + 3 * stock.trained_bytes)


def _kernels(stock: Inventory, blocks: Keeping) -> float:
    """Kernels of one pass."""
    layers = max(1, stock.architecture.sizes.num_layers)
    adapters = len(stock.adapted) / layers
    linears = sum(p.kind == "linear" for p in stock.architecture.parameters) / layers
    one = KERNELS_PER_BLOCK + KERNELS_PER_ADAPTER * adapters
    one += KERNELS_PER_UNPACKING * (linears if stock.num_packed else 0)
    return layers * one * (3 + blocks.again_share)
