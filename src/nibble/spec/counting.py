"""Products, bytes and launches of a stage: what a step spends its time on, and how long each takes.

    products   2 a weight and token forward, again where blocks are recomputed, 2 for the gradient
               of the input, 2 for that of the weight where it is trained; attention (causal: half
               of the square) and its backward, 2.5 times that; int8 forward at its own rate
    bytes      weights as products read them, packed and dense ones at each unpacking, elementwise
               traffic (a multiple of what blocks keep), logits, gradients, the optimiser's pass
    bus        streamed blocks once forward and once backward; activations that wait on the host;
               what devices send each other, where the card has no link of its own
    host       Python's time for a block by what it is built of, for a pass, for each trained tensor

Host times are in bare launches (`Hardware.launch_s`), as a slow host is slow at all of it. The
constants were fitted on one H200 to the rows of bench/plan_rows.py that calibrate, to steps of
whole models (tests/spec/test_speed.py), and to the small model that a machine is calibrated with.
When stages wait for each other is `speed.py`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from math import prod

from nibble.spec.activations import Work, kept_by_block, mlp_size
from nibble.spec.checkpointing import Keeping
from nibble.spec.config import Recipe
from nibble.spec.hardware import Hardware
from nibble.spec.holdings import Devices, Holding, placement_kind
from nibble.spec.inventory import Inventory
from nibble.spec.lowrank import LowRank, matrix_shape
from nibble.spec.methods import low_rank
from nibble.spec.state import rule_and_codec

FUSED_TRAFFIC, UNFUSED_TRAFFIC = (1.67, 2.38), (9.1, 10.3)
"""Bytes moved forward and backward for each byte that a block keeps, on the fast paths and on
transformers' own layers; recomputation moves those of forward again."""
LOGITS_TRAFFIC, CAPPED_LOGITS_TRAFFIC = 13.4, 180.0
"""Bytes moved for each logit, both ways; a soft cap has some fifteen passes in fp32."""
ATTENTION_RATE_SHARE = 0.76
"""Of the rate of products, that fused attention reaches."""
INT8_RATE_SHARE = 1.75
"""Of the 16-bit rate, that int8 products reach with what surrounds them. Outliers are not planned:
they are a matter of weights, and mostly few."""
UPDATE_BANDWIDTH_SHARE, CODED_BANDWIDTH_SHARE = 0.66, 0.43
"""Of the bandwidth, that updates reach, and those that decode and encode 8-bit states."""
UPDATE_TRAFFIC, LISTED_TRAFFIC = 8.0, 54.0
"""Bytes moved for each trained number beside weight, gradient and state: its update in fp32, which
is written and read; more in rules without a kernel, which go by lists, operation by operation."""
RULES_WITH_KERNELS = ("adamw",)
REFRESH_PRODUCTS = {"svd": 5800.0, "randomised": 38.0, "random": 38.0, "seeded": 0.0}
"""A new basis, in projections of its matrix: 231 and 1.54 s against 40 ms (7B, rank 1024)."""
HOST_FUSED, HOST_UNFUSED = 65.0, 160.0
"""Of a block forward, on the fast paths and on transformers' own layers."""
HOST_NORM, HOST_EXPERT = 8.6, 1.5
"""More for each norm beyond the usual two, and for each expert."""
HOST_DORA, HOST_PACKED, HOST_INT8 = 30.0, 3.1, 4.0
"""More for each linear: with DoRA; packed; int8."""
HOST_GATHERED = 28.0
"""More for each linear of a sharded block, for its collectives and copies."""
HOST_BACKWARD, HOST_AGAIN = 1.1, 3.0
"""Of a block's backward and of computing it again with checkpointing's hooks, over its forward.
Whole steps tell apart what is computed again, but not forward from backward."""
HOST_ADAPTER, HOST_MATRIX, HOST_VECTOR, HOST_UPDATE = 14.8, 12.1, 2.5, 3.1
"""Of a tensor of an adapter in backward, of another that is trained, and of any one's update."""
HOST_PROJECTED, HOST_LAYERWISE, HOST_IN_BACKWARD, HOST_RESIDUAL = 20.0, 52.0, 100.0, 15.0
"""More for each projected matrix: in its update, layer by layer, and updated in backward; and for
its residual, if it has one."""
HOST_STACK = {"fira": 60.0, "channel": 60.0, "tensor": 60.0, "balanced": 115.0}
"""For a residual of matrices that are alike and done as one stack (optim/residuals.py)."""
STACKED = (256 << 20) // 48
"""Elements of small matrices that go together (optim/projected_step.py)."""
BALANCED_PRODUCTS, BALANCED_PASSES = 2.0, 11.0
"""More for each number that a balanced residual has: flops, of each direction of the basis, and
accesses in the gradient's type: made, squared six times, its norm, scaled."""
HOST_CODED_BASIS, HOST_RULE = 40.0, 20.0
"""More for each projected matrix whose basis has to be decoded, and for each tensor under a rule
that takes one after another (adafactor)."""
HOST_PASS, HOST_STEP = 300.0, 105.0
"""Once a pass (embedding, loss) and once a step (clipping, schedule)."""
FORWARD, BACKWARD = "forward", "backward"
KERNEL_S = 2.7e-6
"""From kernel to kernel: the end of one, where most of the device is idle, and the next's start."""
KERNELS_FUSED = {FORWARD: 16.0, BACKWARD: 30.0}
KERNELS_UNFUSED = {FORWARD: 45.0, BACKWARD: 75.0}
"""Kernels of a block, as counted on the fast paths and on transformers' own layers."""
KERNELS_EXPERTS = {FORWARD: 40.0, BACKWARD: 45.0}
"""More where tokens are sorted by expert."""
KERNELS_ADAPTER = {FORWARD: 2.0, BACKWARD: 5.6}
KERNELS_DORA = {FORWARD: 10.0, BACKWARD: 25.0}
KERNELS_DROPOUT = {FORWARD: 2.0, BACKWARD: 3.0}
"""More for each adapter, with DoRA, with dropout."""
KERNELS_PACKED, KERNELS_PASS = 1.0, 25.0
"""More for each packed linear, to unpack or round; and once a pass: embedding, loss."""
KERNELS_GRADIENT, KERNELS_CLIPPED, KERNELS_UPDATE, KERNELS_PROJECTED = 2.0, 2.0, 4.0, 2.6
"""For each 16-bit tensor that is trained: of its gradient, of clipping it, of its update, and more
where it is projected. Tensors in float32 share their launches."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Seconds of forward, backward or the update, each on its own."""

    products_s: float
    memory_s: float
    bus_s: float = 0.0
    fill_s: float = 0.0
    """In which the bus rests while blocks come over it: the first has to be done before its place
    is free, and the last is computed when all are there."""
    gaps_s: float = 0.0
    """Between kernels, however short they are."""
    launch_s: float = 0.0
    """Of the host, to launch it all."""

    @property
    def device_s(self) -> float:
        """On the device: products, then bytes, then what is between."""
        return self.products_s + self.memory_s + self.gaps_s

    @property
    def seconds(self) -> float:
        """Of the stage, the bus beside the device, the host apart."""
        return max(self.device_s, self.bus_s + self.fill_s)

    def times(self, count: float) -> Stage:
        """The stage, so many times."""
        return Stage(
            products_s=count * self.products_s,
            memory_s=count * self.memory_s,
            bus_s=count * self.bus_s,
            fill_s=count * self.fill_s,
            gaps_s=count * self.gaps_s,
            launch_s=count * self.launch_s,
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
        products_s, memory_s = products / rate, self._traffic(stage) / hardware.bandwidth_bytes
        pulled, layers = self._pulled(), max(1, self.stock.architecture.sizes.num_layers)
        link_s = self._exchanged(stage) / hardware.link_bytes
        return Stage(
            products_s=products_s,
            memory_s=memory_s,
            bus_s=(pulled + self.blocks.host) / hardware.bus_bytes + link_s,
            fill_s=2.0 * (products_s + memory_s) / layers if pulled else 0.0,
            gaps_s=self.kernels(stage) * KERNEL_S,
            launch_s=self.launches(stage) * hardware.launch_s,
        )

    def update(self, hardware: Hardware) -> Stage:
        """The optimiser's pass: weights and state are read and written, gradients read, and twice
        more where they are clipped; projections and their refreshes."""
        stock, optim = self.stock, self.recipe.optim
        rule, codec = rule_and_codec(optim)
        gradients = max(stock.gradient_bytes, stock.trained_bytes if optim.layerwise else 0)
        moved = 2.0 * (stock.trained_bytes + stock.optimizer_bytes)
        moved += (1.0 if optim.max_grad_norm is None else 3.0) * gradients
        each = UPDATE_TRAFFIC if rule in RULES_WITH_KERNELS else LISTED_TRAFFIC
        moved += each * stock.num_trainable
        low, flops, projected = low_rank(optim), 0.0, 0
        if low is not None:
            refreshes = REFRESH_PRODUCTS[low.basis] / low.update_proj_gap
            for tensor in stock.trained:
                if low.projects(tensor.shape):
                    rows, columns = matrix_shape(tensor.shape)
                    flops += 4.0 * rows * columns * low.rank * (1.0 + refreshes)
                    projected += 1
                    if low.residual == "balanced":
                        flops += BALANCED_PRODUCTS * rows * columns * low.rank
                        moved += BALANCED_PASSES * tensor.nbytes
        part = min(1.0, self.held.optimizer_state / max(1, stock.optimizer_bytes) or 1.0)
        share = CODED_BANDWIDTH_SHARE if codec == "8bit" else UPDATE_BANDWIDTH_SHARE
        launches = HOST_STEP + HOST_UPDATE * len(stock.trained)
        if rule.startswith("adafactor"):
            launches += HOST_RULE * len(stock.trained)
        if low is not None:
            launches += projected * self._host_projected(low)
            if low.residual != "none":
                launches += HOST_STACK[low.residual] * self._num_stacks(low)
        own = KERNELS_UPDATE + (0.0 if optim.max_grad_norm is None else KERNELS_CLIPPED)
        kernels = own * self._num_narrow() + KERNELS_PROJECTED * projected
        return Stage(
            products_s=part * flops / hardware.rate(self.recipe.train.precision),
            memory_s=part * moved / (share * hardware.bandwidth_bytes),
            gaps_s=kernels * KERNEL_S,
            launch_s=launches * hardware.launch_s,
        )

    def _host_projected(self, low: LowRank) -> float:
        """More for each projected matrix, in bare launches."""
        one = HOST_PROJECTED
        if self.recipe.optim.layerwise:
            one = HOST_IN_BACKWARD if self.recipe.optim.in_backward else HOST_LAYERWISE
        if low.basis_storage in ("int8", "int4"):
            one += HOST_CODED_BASIS
        return one + (0.0 if low.residual == "none" else HOST_RESIDUAL)

    def _num_stacks(self, low: LowRank) -> int:
        """Stacks of projected matrices that are alike; layer by layer each is alone."""
        shapes = Counter(t.shape for t in self.stock.trained if low.projects(t.shape))
        if self.recipe.optim.layerwise:
            return shapes.total()
        sizes = {shape: prod(low.projected_shape(matrix_shape(shape))) for shape in shapes}
        return sum(-(-n // max(1, STACKED // sizes[shape])) for shape, n in shapes.items())

    def launches(self, stage: str) -> float:
        """What forward or backward of one pass takes the host, in bare launches."""
        stock, shape = self.stock, self.stock.architecture
        layers, style, linears = shape.sizes.num_layers, shape.style, len(shape.linears)
        one = HOST_FUSED if self.work.fused else HOST_UNFUSED
        one += HOST_NORM * max(0, style.norms + 2 * style.qk_norm - 2)
        one += HOST_EXPERT * shape.num_experts
        blocks = one * layers + HOST_DORA * self.work.dora * len(stock.adapted)
        if stock.num_packed:
            blocks += (HOST_INT8 if self.is_int8 else HOST_PACKED) * linears
        if placement_kind(self.recipe.place, self.devices.total) in ("fsdp", "deepspeed"):
            blocks += HOST_GATHERED * linears
        if stage == FORWARD:
            return blocks + HOST_PASS
        live = blocks * (1.0 - stock.num_idle / max(1, layers))
        times = HOST_BACKWARD + HOST_AGAIN * self.blocks.again_share
        low_factors = 2 * len(stock.adapted)  # DoRA's magnitudes are vectors
        vectors = sum(len(tensor.shape) < 2 for tensor in stock.trained)
        matrices = len(stock.trained) - low_factors - vectors
        own = HOST_ADAPTER * low_factors + HOST_MATRIX * matrices + HOST_VECTOR * vectors
        return times * live + own

    def kernels(self, stage: str) -> float:
        """Kernels of forward or backward of one pass."""
        stock, again = self.stock, self.blocks.again_share
        layers = max(1, stock.architecture.sizes.num_layers)
        times = {FORWARD: 0.0, BACKWARD: 0.0} | {stage: 1.0}
        if stage == BACKWARD:
            times[FORWARD] = again
        blocks = sum(count * self._kernels_once(each) for each, count in times.items())
        own = KERNELS_GRADIENT * self._num_narrow() if stage == BACKWARD else 0.0
        return KERNELS_PASS + layers * blocks + own

    def _num_narrow(self) -> int:
        """Trained tensors that are not float32."""
        return sum(tensor.dtype != "float32" for tensor in self.stock.trained)

    def _kernels_once(self, stage: str) -> float:
        """Of one block in one direction."""
        stock, shape = self.stock, self.stock.architecture
        one = (KERNELS_FUSED if self.work.fused else KERNELS_UNFUSED)[stage]
        if shape.num_experts > 1:
            one += KERNELS_EXPERTS[stage]
        each = KERNELS_ADAPTER[stage] + KERNELS_DORA[stage] * self.work.dora
        each += KERNELS_DROPOUT[stage] * (self.recipe.adapter.dropout > 0)
        more = each * len(stock.adapted)
        if stock.num_packed:
            more += KERNELS_PACKED * len(shape.linears)
        return one + more / max(1, shape.sizes.num_layers)

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
        each = CAPPED_LOGITS_TRAFFIC if shape.style.scores == "softcap" else LOGITS_TRAFFIC
        moved += each / 2 * work.tokens * (shape.sizes.vocab if shape.head_size else 0)
        experts = sum(p.size for p in shape.parameters if p.kind == "expert")
        # A token visits a few, all tokens together visit every one.
        unseen = experts * (1.0 - shape.experts_per_token / max(1, shape.num_experts))
        moved += times * work.element * (shape.matmul_size + unseen + shape.head_size)
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
        away = stock.base_bytes - (held.base_codes + held.base_scales + held.base_weights)
        return max(0, away - held.moving)  # where passes turn round, the ring still has its blocks

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
