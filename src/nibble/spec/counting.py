"""Products, bytes and kernels of one pass: what a step spends its time on, before it is time.

    products   2 a weight and token forward, again where blocks are recomputed, 2 for the gradient
               of the input, 2 for that of the weight where it is trained; attention (causal: half
               of the square) and its backward, 2.5 times that; int8 forward at its own rate
    bytes      weights as products read them, packed and dense ones at each unpacking, elementwise
               traffic (a multiple of what blocks keep), logits, gradients, the optimiser's pass
    bus        streamed blocks once forward and once backward; activations that wait on the host;
               what devices send each other, where the card has no link of its own
    kernels    of a block by how it is built

The constants were fitted on one H200 to rows of bench/results (tests/spec/test_speed.py). Seconds
of a step, and what limits them, are `speed.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nibble.spec.activations import Work, kept_by_block, mlp_size
from nibble.spec.checkpointing import Keeping
from nibble.spec.config import Recipe
from nibble.spec.hardware import Hardware
from nibble.spec.holdings import Devices, Holding, placement_kind
from nibble.spec.inventory import Inventory
from nibble.spec.lowrank import matrix_shape
from nibble.spec.methods import low_rank

FUSED_TRAFFIC, UNFUSED_TRAFFIC = (1.75, 2.5), (8.0, 9.0)
"""Bytes moved forward and backward for each byte that a block keeps, on the fast paths and on
transformers' own layers; recomputation moves those of forward again."""
LOGITS_TRAFFIC = 18
"""Bytes moved for each logit, both ways."""
ATTENTION_RATE_SHARE = 0.66
"""Of the rate of products, that fused attention reaches."""
INT8_RATE_SHARE = 1.4
"""Of the 16-bit rate, that int8 products reach with what surrounds them."""
UPDATE_BANDWIDTH_SHARE = 0.6
"""Of the bandwidth, that updates of many tensors reach: fused AdamW of a 7B 37 ms for 94 GB."""
REFRESH_PRODUCTS = {"svd": 5800.0, "randomised": 38.0, "random": 38.0, "seeded": 0.0}
"""A new basis, in projections of its matrix: 231 and 1.54 s against 40 ms (7B, rank 1024)."""
KERNELS_FUSED, KERNELS_UNFUSED = (16.0, 4.0), (55.0, 6.0)
"""Kernels of a block in each direction, and more for each adapter."""
KERNELS_PER_PACKED, KERNELS_PER_EAGER_INT8 = 1.0, 4.0
"""Kernels of a packed linear in each direction: unpacking or rounding; int8's eager steps."""
KERNELS_PER_GATHERED = 7.0
"""Of each linear of a sharded block, in each direction, for its collectives and copies."""
KERNELS_PER_UPDATE, KERNELS_PER_PROJECTED = 0.5, 10.0
"""Of a trained tensor's update."""
FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Seconds of forward, backward or the update, each on its own."""

    products_s: float
    memory_s: float
    bus_s: float = 0.0

    @property
    def device_s(self) -> float:
        """On the device: products, then bytes."""
        return self.products_s + self.memory_s

    @property
    def seconds(self) -> float:
        """Of the stage, the bus beside the device."""
        return max(self.device_s, self.bus_s)

    def times(self, count: int) -> Stage:
        """The stage, so many times."""
        return Stage(
            products_s=count * self.products_s,
            memory_s=count * self.memory_s,
            bus_s=count * self.bus_s,
        )


@dataclass(frozen=True, kw_only=True)
class Count:
    """Products, bytes and kernels of one pass on one device."""

    recipe: Recipe
    stock: Inventory
    work: Work
    blocks: Keeping
    held: Holding
    devices: Devices

    @property
    def is_int8(self) -> bool:
        return self.stock.spec is not None and self.stock.spec.name == "int8"

    @property
    def synchronises(self) -> bool:
        """Whether the host asks the device for outliers in every linear."""
        spec = self.stock.spec
        return self.is_eager_int8 and spec is not None and spec.int8_threshold > 0

    @property
    def is_eager_int8(self) -> bool:
        return self.is_int8 and self.recipe.quant.kernels in ("eager", "bitsandbytes")

    def flops(self, stage: str) -> tuple[float, float, float]:
        """FLOPs of 16-bit products, of int8 products and of attention."""
        stock, shape, tokens = self.stock, self.stock.architecture, self.work.tokens
        factorised = self.recipe.adapter.kind == "factorised"
        replaced = self._adapted_size() if factorised else 0
        base = 2.0 * (shape.matmul_size - replaced) * tokens
        head = 2.0 * shape.head_size * tokens
        low = 2.0 * stock.num_adapter * tokens
        attention = shape.attention_flops_per_token(self.work.row_length) * tokens
        norms = 2.0 * self.work.rank * self._adapted_size() if self.work.dora else 0.0
        if stage == FORWARD:
            int8 = base if self.is_int8 else 0.0
            return base - int8 + head + low + norms, int8, attention
        again = self.blocks.again_share
        int8 = base * again if self.is_int8 else 0.0
        products = base * (1.0 + self._trained_share() + again) - int8
        products += head * (2.0 if stock.head_trained else 1.0)
        products += (low + norms) * again + 2.0 * low
        if self.work.tiled:  # each tile again, in the blocks that keep the rest
            products += 2.0 * (1.0 - again) * mlp_size(shape) * tokens
        keeps = self.recipe.train.activation_checkpointing == "selective"
        return products, int8, attention * (2.5 + (0.0 if keeps else again))

    def stage(self, stage: str, hardware: Hardware) -> Stage:
        """Forward or backward of one pass."""
        products, int8, attention = self.flops(stage)
        rate = hardware.rate(self.recipe.train.precision)
        products += int8 / INT8_RATE_SHARE + attention / ATTENTION_RATE_SHARE
        link = self._exchanged(stage) / hardware.link_bytes
        return Stage(
            products_s=products / rate,
            memory_s=self._traffic(stage) / hardware.bandwidth_bytes,
            bus_s=(self._pulled() + self.blocks.host) / hardware.bus_bytes + link,
        )

    def update(self, hardware: Hardware) -> Stage:
        """The optimiser's pass: weights and state are read and written, gradients read twice and
        cleared; projections and their refreshes."""
        stock, optim = self.stock, self.recipe.optim
        share = self.held.optimizer_state / max(1, stock.optimizer_bytes)
        moved = 2.0 * stock.trained_bytes + 2.0 * stock.optimizer_bytes + 3.0 * stock.gradient_bytes
        low, flops = low_rank(optim), 0.0
        if low is not None:
            refreshes = REFRESH_PRODUCTS[low.basis] / low.update_proj_gap
            for tensor in stock.trained:
                if low.projects(tensor.shape):
                    rows, columns = matrix_shape(tensor.shape)
                    flops += 4.0 * rows * columns * low.rank * (1.0 + refreshes)
                    moved += 4.0 * rows * columns
        return Stage(
            products_s=min(1.0, share or 1.0) * flops / hardware.rate(self.recipe.train.precision),
            memory_s=min(1.0, share or 1.0)
            * moved
            / (UPDATE_BANDWIDTH_SHARE * hardware.bandwidth_bytes),
        )

    def kernels(self) -> float:
        """Kernels of one pass."""
        stock = self.stock
        layers = max(1, stock.architecture.sizes.num_layers)
        linears = len(stock.architecture.linears) / layers
        block, each = KERNELS_FUSED if self.work.fused else KERNELS_UNFUSED
        one = block + each * len(stock.adapted) / layers
        if stock.num_packed and stock.spec is not None:
            each = KERNELS_PER_EAGER_INT8 if self.is_eager_int8 else KERNELS_PER_PACKED
            one += each * linears
        if placement_kind(self.recipe.place, self.devices.total) in ("fsdp", "deepspeed"):
            one += KERNELS_PER_GATHERED * linears
        return layers * one * (2 + self.blocks.again_share)

    def update_kernels(self) -> float:
        """Kernels of one update."""
        each = KERNELS_PER_UPDATE
        if low_rank(self.recipe.optim) is not None:
            each = KERNELS_PER_PROJECTED
        return each * len(self.stock.trained)

    def _adapted_size(self) -> int:
        adapted = self.stock.adapted
        return sum(p.size for p in self.stock.architecture.parameters if p.module in adapted)

    def _trained_share(self) -> float:
        """Of the products, whose weights have a gradient."""
        if self.work.everything:
            return 1.0
        layers = max(1, self.stock.architecture.sizes.num_layers)
        return len(self.stock.trained_blocks) / layers

    def _traffic(self, stage: str) -> float:
        """Bytes of device memory that a stage moves."""
        stock, work, again = self.stock, self.work, self.blocks.again_share
        shape = stock.architecture
        forward, backward = FUSED_TRAFFIC if work.fused else UNFUSED_TRAFFIC
        times = 1.0 if stage == FORWARD else 1.0 + again
        each = forward if stage == FORWARD else backward + again * forward
        whole = replace(work, mlp_tile_tokens=None)  # tiles keep less and move as much
        block = sum(kept_by_block(shape, whole, block=max(0, shape.sizes.num_layers - 1)).values())
        moved = each * block * shape.sizes.num_layers
        moved += LOGITS_TRAFFIC / 2 * work.tokens * (shape.sizes.vocab if shape.head_size else 0)
        moved += times * work.element * (shape.matmul_size + shape.head_size)
        unpackings = times
        if self.is_int8:  # products read the codes; only gradients of inputs need them unpacked
            unpackings = 0.0 if stage == FORWARD else 1.0
            moved += (1.0 if stage == FORWARD else again) * self._int8_traffic()
        packed = stock.base_codes_bytes + stock.base_scales_bytes
        moved += unpackings * (packed + work.element * stock.num_packed)
        if work.dora:
            moved += times * 3 * work.element * self._adapted_size()
        if stage == BACKWARD:
            moved += stock.gradient_bytes * min(2, self.recipe.train.gradient_accumulation_steps)
        return float(moved)

    def _int8_traffic(self) -> float:
        """Inputs are read and rounded, results written; the eager steps also write and read sums of
        int32."""
        outputs, inputs = self.stock.architecture.linear_widths
        e = self.work.element
        return float(self.work.tokens * ((e + 2) * inputs + (8 + e) * outputs))

    def _pulled(self) -> int:
        """Bytes of blocks that are not on the device when a pass comes to them."""
        held, stock = self.held, self.stock
        if not held.streamed:
            return 0
        return stock.base_bytes - (held.base_codes + held.base_scales + held.base_weights)

    def _exchanged(self, stage: str) -> float:
        """Bytes that a device gets from the others: sharded weights, gradients."""
        total, stock = self.devices.total, self.stock
        if total == 1:
            return 0.0
        part, place = (total - 1) / total, self.recipe.place
        kind = placement_kind(place, total)
        whole = stock.base_bytes + stock.trained_bytes
        if kind == "deepspeed" and place.zero_stage == 2:
            return part * (stock.trained_bytes if stage == FORWARD else 4.0 * stock.num_trainable)
        if kind in ("fsdp", "deepspeed"):
            if stage == FORWARD:
                return part * whole
            return part * ((0 if place.shard == "grad-op" else whole) + stock.gradient_bytes)
        return 0.0 if stage == FORWARD else 2.0 * part * stock.gradient_bytes
