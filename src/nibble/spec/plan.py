"""The plan: what a run needs, in bytes by category at each phase, and how fast it can be.

    peak = max over phases of  weights + gradients + optimiser + activations + workspaces
                               + allocator's loss (3 %) + CUDA context (0.5 GiB)

Idea. Every phase (load, first step, steady step, evaluation, save) passes through a few moments; a
moment is a dictionary of categories, and the phase is its largest moment. Tensors that stay are
counted exactly (`inventory.py`: the tables that allocate them), activations by the list of what
autograd keeps (`activations.py`), and only workspaces and the allocator are estimates, named below
with their source. `check` refuses what does not fit and says which small changes would
(`advice.py`), each planned again.

It costs milliseconds, needs no torch and no GPU, and allocates nothing. Speed is `speed.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nibble.errors import PlanError
from nibble.spec.activations import (
    Work,
    checkpointed_bytes,
    forward_bytes,
    kept_by_blocks,
    kept_outside,
    workspace_bytes,
)
from nibble.spec.arch import Architecture
from nibble.spec.config import Recipe
from nibble.spec.formats import DTYPE_BYTES
from nibble.spec.hardware import Hardware
from nibble.spec.inventory import COMPUTE_DTYPE, Inventory, inventory
from nibble.spec.speed import Speed, estimate
from nibble.spec.units import GIB, parse_bytes, show_bytes

PLAN_VERSION = 1
CATEGORIES: dict[str, str] = {
    "base_codes": "base: codes",
    "base_scales": "base: scales",
    "base_weights": "base: 16-bit weights",
    "trained_weights": "trained weights",
    "gradients": "gradients",
    "optimizer_state": "optimiser state",
    "activations_kept": "activations kept",
    "activation_workspace": "one block's activations",
    "dequantised": "dequantised weight",
    "logits": "logits chunk",
    "allocator": "allocator's loss",
    "cuda_context": "CUDA context",
}
"""Categories of device memory and how they are called; a new one is a row here."""
PHASES = ("load", "first step", "steady step", "evaluation", "save")

CUDA_CONTEXT_BYTES = GIB // 2
"""Kernels, cuBLAS workspaces and the driver's own, as seen on an H200 with torch 2.11."""
ALLOCATOR_SHARE = 0.12
"""Reserved beyond allocated: 1.02 to 1.17 in nibble's own steps on an H200
(bench/results/2026-11-22-h200-step.md); the upper part of it, since a plan must not promise too
much."""
PROCESS_BYTES = int(1.6 * GIB)
"""Resident size of Python with torch and transformers imported."""
PACK_CHUNK_WEIGHTS, PACK_BYTES_PER_WEIGHT = 1 << 24, 16
"""Packing goes by chunks of at most this many weights; each takes fp32 copies and codes."""
UPDATE_BYTES_PER_WEIGHT = 12
"""fp32 steps of an update, for the largest trained tensor only."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Bytes by category at the largest moment of a phase."""

    name: str
    moment: str
    device: Mapping[str, int]
    host: Mapping[str, int]

    @property
    def device_bytes(self) -> int:
        """All categories of the device."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """All categories of the host."""
        return sum(self.host.values())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run needs. `on_cpu`: the device's categories are host memory as well."""

    recipe: Recipe
    architecture: Architecture
    """With the blocks that an expansion adds."""
    source: Architecture
    """As the checkpoint has it."""
    hardware: Hardware | None
    on_cpu: bool
    num_trainable: int
    num_total: int
    phases: tuple[Phase, ...]
    tokens_per_step: int
    flops_per_step: float
    speed: Speed | None

    @property
    def peak(self) -> Phase:
        """The phase with the most device memory."""
        return max(self.phases, key=lambda phase: phase.device_bytes)

    @property
    def device_bytes(self) -> int:
        """Peak of the device, CUDA context included."""
        return self.peak.device_bytes

    @property
    def host_bytes(self) -> int:
        """Peak of the host; on a CPU the device's bytes are in it."""
        return max(p.host_bytes + (p.device_bytes if self.on_cpu else 0) for p in self.phases)

    @property
    def allocator_bytes(self) -> int:
        """Peak without the CUDA context: what a cap on the allocator is compared with."""
        return max(p.device_bytes - p.device.get("cuda_context", 0) for p in self.phases)

    def limit(self) -> int | None:
        """The budget that the recipe or the card names, in bytes, context included; or None."""
        limits = []
        if self.recipe.place.vram is not None and not self.on_cpu:
            limits.append(parse_bytes(self.recipe.place.vram) + CUDA_CONTEXT_BYTES)
        if self.hardware is not None and not self.on_cpu:
            limits.append(self.hardware.memory_bytes)
        return min(limits) if limits else None

    def fits(self, limit_bytes: int | None = None) -> bool:
        """Whether the peak is within the budget (`limit()` when not given); True without one."""
        limit = self.limit() if limit_bytes is None else limit_bytes
        if limit is None:
            return True
        return (self.host_bytes if self.on_cpu else self.device_bytes) <= limit

    def check(self, limit_bytes: int | None = None) -> None:
        """Raise PlanError when the run does not fit, naming the changes that would make it fit."""
        limit = self.limit() if limit_bytes is None else limit_bytes
        if limit is None or self.fits(limit):
            return
        from nibble.spec.advice import advise

        needed = self.host_bytes if self.on_cpu else self.device_bytes
        largest = max(self.peak.device.items(), key=lambda item: item[1])
        found = advise(self, limit)
        text = "; ".join(f"{change.words} ({show_bytes(change.bytes)})" for change in found)
        raise PlanError(
            f"needs {show_bytes(needed)} at its peak ({self.peak.name}: {self.peak.moment}), the "
            f"budget is {show_bytes(limit)}; most of it is {CATEGORIES[largest[0]]} "
            f"({show_bytes(largest[1])}). "
            + (f"Would fit: {text}" if found else "No small change would fit: take a smaller model")
        )

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values; bytes are whole numbers."""
        limit = self.limit()
        return {
            "version": PLAN_VERSION,
            "model": self.recipe.model.path,
            "model_type": self.architecture.model_type,
            "shapes_from": self.architecture.source,
            "hardware": None if self.hardware is None else self.hardware.name,
            "on_cpu": self.on_cpu,
            "num_trainable": self.num_trainable,
            "num_total": self.num_total,
            "tokens_per_step": self.tokens_per_step,
            "flops_per_step": self.flops_per_step,
            "speed": None if self.speed is None else self.speed.to_json(),
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "limit_bytes": limit,
            "fits": None if limit is None else self.fits(limit),
            "peak_phase": self.peak.name,
            "phases": {
                phase.name: {
                    "moment": phase.moment,
                    "device": dict(phase.device),
                    "device_bytes": phase.device_bytes,
                    "host": dict(phase.host),
                    "host_bytes": phase.host_bytes,
                }
                for phase in self.phases
            },
        }


def plan(
    recipe: Recipe,
    *,
    architecture: Architecture,
    hardware: Hardware | None = None,
    on_cpu: bool | None = None,
) -> Plan:
    """Plan a run of `recipe` on a model of this shape.

    `hardware`: the card, for speed and its memory limit. `on_cpu`: whether the run has no GPU; when
    not given, only for place.device=cpu. Raises ConfigError for words that this model cannot mean.
    """
    on_cpu = recipe.place.device == "cpu" if on_cpu is None else on_cpu
    stock = inventory(recipe, architecture)
    work = work_of(recipe, stock)
    seen = _Pass.of(recipe, stock, work)
    phases = tuple(_phase(name, recipe, stock, seen, on_cpu=on_cpu) for name in PHASES)
    flops, speed = estimate(recipe, stock, work, hardware=None if on_cpu else hardware)
    return Plan(
        recipe=recipe,
        architecture=stock.architecture,
        source=architecture,
        hardware=hardware,
        on_cpu=on_cpu,
        num_trainable=stock.num_trainable,
        num_total=stock.num_total,
        phases=phases,
        tokens_per_step=work.tokens * recipe.train.gradient_accumulation_steps,
        flops_per_step=flops,
        speed=speed,
    )


def work_of(recipe: Recipe, stock: Inventory) -> Work:
    """One training pass of the recipe with rows of full length: the most that it can be."""
    adapter, train = recipe.adapter, recipe.train
    compute = COMPUTE_DTYPE[train.precision]
    low_rank = adapter.kind in ("lora", "dora")
    stored = "bfloat16" if train.adapter_precision == "bf16" else "float32"
    return Work(
        tokens=train.micro_batch_size * recipe.data.max_length,
        row_length=recipe.data.max_length,
        element=DTYPE_BYTES[compute],
        everything=adapter.kind == "none",
        trained_blocks=stock.trained_blocks,
        embedding_trained=stock.embedding_trained,
        adapted=stock.adapted,
        rank=adapter.rank if low_rank else 0,
        dora=adapter.kind == "dora",
        adapter_dropout=adapter.dropout if low_rank else 0.0,
        # LoRA around a packed linear casts again instead (nn/quant.py).
        cast=stored != compute and not (adapter.kind == "lora" and stock.num_packed > 0),
        packed_rows=recipe.data.packing,
    )


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """Bytes of one pass that all phases share."""

    kept: int
    """By blocks and outside, at the end of the forward pass."""
    outside: int
    one_block: int
    """A block's own list, recomputed or the last one alive, with its backward workspace."""
    forward: int
    dequantised: int
    logits_training: int
    logits_evaluation: int

    @staticmethod
    def of(recipe: Recipe, stock: Inventory, work: Work) -> _Pass:
        shape = stock.architecture
        blocks = [sum(kept.values()) for kept in kept_by_blocks(shape, work)]
        outside = sum(kept_outside(shape, work).values())
        largest = max(blocks, default=0)
        full = recipe.train.activation_checkpointing == "full"
        chunk = min(recipe.train.loss_chunk_tokens, work.tokens)
        is_lm = shape.head_size > 0
        vocabulary = shape.sizes.vocab if is_lm else 0
        # A trained head's gradient is summed in fp32 while the chunks go by.
        head = shape.head_size * (4 + work.element) if stock.head_trained else 0
        logits = chunk * vocabulary * (8 + work.element)
        if shape.encoder and is_lm:
            logits = work.tokens * vocabulary * (8 + work.element)  # made by the model, in full
        return _Pass(
            kept=outside + (checkpointed_bytes(shape, work) if full else sum(blocks)),
            outside=outside,
            one_block=(largest if full else 0) + workspace_bytes(shape, work),
            forward=forward_bytes(shape, work),
            dequantised=stock.largest_packed * work.element,
            logits_training=logits + head,
            logits_evaluation=logits,
        )


def _phase(name: str, recipe: Recipe, stock: Inventory, seen: _Pass, *, on_cpu: bool) -> Phase:
    state = 0 if name in ("load", "first step") else stock.optimizer_bytes
    held = {
        "base_codes": stock.base_codes_bytes,
        "base_scales": stock.base_scales_bytes,
        "base_weights": stock.base_weights_bytes,
        "trained_weights": stock.trained_bytes,
        "optimizer_state": state,
    }
    moments = {
        "load": _load_moments,
        "first step": _step_moments,
        "steady step": _step_moments,
        "evaluation": _evaluation_moments,
        "save": _save_moments,
    }[name](recipe, stock, seen)
    moment, extra = max(moments.items(), key=lambda item: sum(item[1].values()))
    device = {category: extra.get(category, held.get(category, 0)) for category in CATEGORIES}
    if not on_cpu:
        device["allocator"] = int(ALLOCATOR_SHARE * sum(device.values()))
        device["cuda_context"] = CUDA_CONTEXT_BYTES
    host = {"process": PROCESS_BYTES, "tensor_in_flight": 0, "checkpoint_copy": 0}
    if name == "load":
        host["tensor_in_flight"] = 2 * stock.largest_tensor
    if name == "save":
        host["checkpoint_copy"] = 0 if on_cpu else stock.trained_bytes + state
    return Phase(name=name, moment=moment, device={k: v for k, v in device.items() if v}, host=host)


_Moments = dict[str, dict[str, int]]


def _load_moments(recipe: Recipe, stock: Inventory, seen: _Pass) -> _Moments:
    """The last tensor arrives in 16 bit while all the others are there, and is packed by chunks."""
    del recipe, seen
    chunk = min(stock.largest_packed, PACK_CHUNK_WEIGHTS) * PACK_BYTES_PER_WEIGHT
    return {"packing the largest matrix": {"dequantised": 2 * stock.largest_packed + chunk}}


def _step_moments(recipe: Recipe, stock: Inventory, seen: _Pass) -> _Moments:
    """The loss, the first and the last block of backward, the update.

    Gradients exist throughout when several passes are accumulated; with one pass they grow while
    activations go, so the two are never whole at once.
    """
    gradients = stock.trained_bytes
    before = gradients if recipe.train.gradient_accumulation_steps > 1 else 0
    full = recipe.train.activation_checkpointing == "full"
    last = seen.outside + (
        0 if full else (seen.kept - seen.outside) // max(1, stock.architecture.sizes.num_layers)
    )
    largest = max((tensor.nbytes // 2 for tensor in stock.trained), default=0)
    block = {"activation_workspace": seen.one_block, "dequantised": seen.dequantised}
    return {
        "the loss": {
            "activations_kept": seen.kept,
            "logits": seen.logits_training,
            "gradients": before,
        },
        "backward begins": {"activations_kept": seen.kept, "gradients": before, **block},
        "backward ends": {"activations_kept": last, "gradients": gradients, **block},
        "the update": {
            "gradients": gradients,
            "optimizer_state": stock.optimizer_bytes,
            "activation_workspace": largest * UPDATE_BYTES_PER_WEIGHT,
        },
    }


def _evaluation_moments(recipe: Recipe, stock: Inventory, seen: _Pass) -> _Moments:
    """A forward pass without a graph."""
    del recipe, stock
    return {
        "a block": {"activation_workspace": seen.forward, "dequantised": seen.dequantised},
        "the loss": {"activations_kept": seen.outside, "logits": seen.logits_evaluation},
    }


def _save_moments(recipe: Recipe, stock: Inventory, seen: _Pass) -> _Moments:
    """Trained tensors and state are copied to the host one by one; the device holds no more."""
    del recipe, stock, seen
    return {"writing": {}}
