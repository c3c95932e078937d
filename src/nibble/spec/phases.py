"""The moments of a run, each a dictionary of bytes by category; a phase is its largest moment.

Idea. Every phase (load, first step, steady step, evaluation, save) passes through a few moments.
What stays between steps comes from `holdings.py`, activations from `activations.py`; only
workspaces and the allocator are estimates, named below with their source.

It adds up, and decides nothing: `plan.py` compares with a budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from nibble.spec.activations import (
    FAST_PATHS,
    Work,
    forward_bytes,
    input_bytes,
    kept_outside,
)
from nibble.spec.arch import Architecture
from nibble.spec.checkpointing import Keeping, keeping
from nibble.spec.config import Recipe
from nibble.spec.formats import DTYPE_BYTES
from nibble.spec.graphs import UPDATE, beside_graphs, is_recorded
from nibble.spec.holdings import Holding
from nibble.spec.host_memory import host_categories
from nibble.spec.inventory import COMPUTE_DTYPE, Inventory
from nibble.spec.units import GIB
from nibble.spec.workspace import Loss, loss_bytes

CATEGORIES: dict[str, str] = {
    "base_codes": "base: codes",
    "base_scales": "base: scales",
    "base_weights": "base: 16-bit weights",
    "moving": "blocks that come and go",
    "trained_weights": "trained weights",
    "gradients": "gradients",
    "optimizer_state": "optimiser state",
    "activations_kept": "activations kept",
    "activation_workspace": "one block's activations",
    "dequantised": "dequantised weight",
    "logits": "logits chunk",
    "recorded": "recorded passes",
    "allocator": "allocator, cuBLAS",
    "cuda_context": "CUDA context",
}
"""Categories of device memory and how they are called; a new one is a row here."""
MERGE = "merge"
PHASES = ("load", "first step", "steady step", "evaluation", "save", MERGE)
"""In the order of a run; `merge` is `nibble export`, a process of its own after it."""

CUDA_CONTEXT_BYTES = GIB * 3 // 4
"""Kernels, libraries and the driver's own: 0.73 GiB on an H200 with torch 2.11 and CUDA 13 behind
the first products (bench/results/2026-11-23-h200-plan-error.md)."""
ALLOCATOR_SHARE, ALLOCATOR_BYTES = 0.035, 32 << 20
"""Reserved beyond allocated, in segments that grow (`place/devices.py`): gaps between tensors of
unlike sizes, and the last segment of each kind. The same grid: 0.1 to 8 %, 3 in the middle."""
BLAS_BYTES = 65 << 20
"""Workspaces of cuBLAS for the thread that goes forward and the one that goes backward, on Hopper;
they are the allocator's."""
MERGE_BYTES_PER_WEIGHT = 14
"""A matrix in fp32, its update, their sum, and what is written (`nn/adapters.py`)."""


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


def work_of(recipe: Recipe, stock: Inventory, *, on_cpu: bool = False) -> Work:
    """One training pass of the recipe with rows of full length: the most that it can be."""
    adapter, train = recipe.adapter, recipe.train
    compute = COMPUTE_DTYPE[train.precision]
    low_rank = adapter.kind in ("lora", "dora")
    stored = "bfloat16" if train.adapter_precision == "bf16" else "float32"
    adds = train.gradient_accumulation_steps > 1 or (
        is_recorded(recipe, stock.architecture.style.scores) and not on_cpu
    )
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
        # LoRA casts again instead, or all at once (nn/adapted.py).
        cast=stored != compute and adapter.kind == "dora",
        packed_rows=recipe.data.packing,
        fused=train.fused_kernels and stock.architecture.model_type in FAST_PATHS,
        mlp_tile_tokens=train.mlp_tile_tokens,
        grows=adapter.kind == "none" and not adds and not recipe.optim.layerwise,
        accumulates=adapter.kind in ("none", "expand") and adds and not recipe.optim.layerwise,
        num_idle=stock.num_idle,
        on_card=not on_cpu,
    )


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Bytes of one pass that all phases share."""

    blocks: Keeping
    outside: int
    """Kept by what lies around the blocks until the loss has its gradient."""
    throughout: int
    """Of that, what all blocks read."""
    copies: int
    """Of adapters, in the type that the model computes in."""
    forward: int
    row: int
    """Hidden states of all tokens, once."""
    grows: bool
    """The gradients of a block that is trained are among what its backward holds."""
    dequantised: int
    loss: Loss

    @staticmethod
    def of(recipe: Recipe, stock: Inventory, work: Work) -> Pass:
        shape = stock.architecture
        around = kept_outside(shape, work)
        is_lora = recipe.adapter.kind == "lora" and recipe.train.adapter_precision != "bf16"
        narrow = is_lora and work.fused and work.element < 4
        return Pass(
            blocks=keeping(shape, work, recipe.train),
            outside=sum(around.values()),
            throughout=around["rotary angles"] + around["ids"],
            copies=stock.num_adapter * work.element if narrow else 0,
            forward=forward_bytes(shape, work),
            row=input_bytes(shape, work),
            grows=work.grows and work.everything,
            dequantised=stock.last_packed * work.element,
            loss=loss_bytes(
                shape,
                work,
                chunk_tokens=recipe.train.loss_chunk_tokens,
                head_element=stock.head_element,
                keeps=recipe.train.precision != "fp16",
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """What all phases share: the recipe, its tensors, where they live, one pass."""

    recipe: Recipe
    stock: Inventory
    held: Holding
    seen: Pass
    on_cpu: bool

    @property
    def is_recorded(self) -> bool:
        """Whether passes are replayed as CUDA graphs."""
        scores = self.stock.architecture.style.scores
        return is_recorded(self.recipe, scores) and not self.on_cpu


def phase(name: str, run: Run) -> Phase:
    """Bytes at the largest moment of the phase called `name`."""
    share = run.held
    state = 0 if name == "load" else share.optimizer_state
    held = {
        "base_codes": share.base_codes,
        "base_scales": share.base_scales,
        "base_weights": share.base_weights,
        "trained_weights": share.trained_weights,
        "optimizer_state": state,
        "moving": 0 if name == "load" else share.moving,
    }
    moments = {
        "load": _load_moments,
        "first step": _step_moments,
        "steady step": _step_moments,
        "evaluation": _evaluation_moments,
        # Trained tensors and state are copied to the host one by one.
        "save": lambda run: {"writing": dict[str, int]()},
        MERGE: _merge_moments,
    }[name](run)
    if run.is_recorded:
        moments = beside_graphs(name, moments, _step_moments(run))
    moment, extra = max(moments.items(), key=lambda item: sum((held | item[1]).values()))
    device = {category: extra.get(category, held.get(category, 0)) for category in CATEGORIES}
    if not run.on_cpu:
        gaps = int(ALLOCATOR_SHARE * (sum(device.values()) - device["allocator"]))
        device["allocator"] += gaps + ALLOCATOR_BYTES + BLAS_BYTES
        device["cuda_context"] = CUDA_CONTEXT_BYTES
    held_there = {category: size for category, size in device.items() if size}
    return Phase(name=name, moment=moment, device=held_there, host=host_categories(name, run))


_Moments = dict[str, dict[str, int]]


def _load_moments(run: Run) -> _Moments:
    """The last tensor arrives in 16 bit while all the others are there, and is packed by chunks."""
    return {"packing the largest matrix": {"dequantised": run.stock.packing_bytes}}


def _step_moments(run: Run) -> _Moments:
    """The loss, gradients of the head, of the first and last block and the embedding, the update.

    Gradients exist throughout when several passes are accumulated; with one pass they grow while
    activations go, so the two are never whole at once.
    """
    stock, seen, blocks = run.stock, run.seen, run.seen.blocks
    always, row = seen.throughout + seen.copies, seen.row
    grown = _gradients(run)

    def backward(workspace: int) -> dict[str, int]:
        return {
            "activation_workspace": workspace + stock.passing_gradient_bytes,
            "dequantised": seen.dequantised,
        }

    moments = {
        "the loss": {
            "activations_kept": seen.outside + seen.copies + blocks.forward_ends,
            "logits": seen.loss.chunk + seen.loss.head + seen.loss.head_copy + seen.loss.head_step,
            "gradients": grown.before,
            "allocator": seen.loss.gaps,
        },
        "a block's forward": {
            "activations_kept": always + blocks.forward_ends,
            "activation_workspace": seen.forward if blocks.num_again == blocks.num_blocks else 0,
            "dequantised": seen.dequantised,
            "gradients": grown.before,
        },
    }
    if seen.loss.head:
        moments["the head's gradient"] = {
            "activations_kept": always + blocks.forward_ends + 4 * row,
            "logits": seen.loss.head,
            "activation_workspace": stock.head_gradient_bytes + seen.loss.head_cast,
            "gradients": grown.before,
        }
    if blocks.num_again < blocks.num_blocks:
        moments["backward begins"] = {
            "activations_kept": always + blocks.forward_ends,
            "gradients": grown.head,
            **backward(blocks.kept_backward),
        }
    if blocks.num_again:
        moments["the first block computed again"] = {
            "activations_kept": always + blocks.again,
            "gradients": grown.kept,
            **backward(blocks.again_backward),
        }
    return moments | {
        "backward ends": {
            "activations_kept": always + blocks.first_block,
            "gradients": grown.first_block,
            **backward(blocks.again_backward or blocks.kept_backward),
        },
        "the embedding's gradient": {
            "activations_kept": always + row,
            "gradients": run.held.gradients,
            "activation_workspace": grown.embedding,
            "allocator": grown.hole,
        },
        UPDATE: {
            "gradients": run.held.gradients,
            "optimizer_state": run.held.optimizer_state,
            "activation_workspace": stock.update_bytes,
        },
    }


@dataclass(frozen=True, kw_only=True)
class _Gradients:
    """Bytes of gradients `before` backward, behind the `head`, behind the blocks that `kept` all,
    and at the `first_block`; `embedding`: on top at the end, too large for the logits' `hole`."""

    before: int
    head: int
    kept: int
    first_block: int
    embedding: int
    hole: int = 0


def _gradients(run: Run) -> _Gradients:
    stock, whole, blocks = run.stock, run.held.gradients, run.seen.blocks
    tied = stock.embedding_trained and stock.architecture.tied
    if run.recipe.train.gradient_accumulation_steps > 1 or run.is_recorded:
        # A tied head's gradient waits for the embedding's: their sum joins those of passes before.
        waits = stock.head_gradient_bytes if tied else 0
        kept = dict.fromkeys(("head", "kept", "first_block"), whole + waits)
        last = waits + stock.embedding_gradient_bytes
        hole = run.seen.loss.head if waits > run.seen.loss.head else 0
        return _Gradients(before=whole, **kept, embedding=last, hole=hole)
    share = whole / max(1, stock.gradient_bytes)
    embedding = 0 if tied else stock.embedding_gradient_bytes
    head = stock.head_gradient_bytes if stock.gradient_bytes >= stock.head_gradient_bytes else 0
    of_blocks = max(0, stock.gradient_bytes - head - embedding)
    each = of_blocks / max(1, blocks.num_blocks)
    done = blocks.num_blocks - blocks.num_again
    first = head + (of_blocks - each if run.seen.grows else of_blocks)
    return _Gradients(
        before=0,
        head=int(share * head),
        kept=int(share * (head + done * each)),
        first_block=int(share * first),
        embedding=stock.embedding_gradient_bytes if tied else 0,
    )


def _evaluation_moments(run: Run) -> _Moments:
    """A forward pass without a graph."""
    seen = run.seen
    logits = seen.loss.chunk_evaluation + seen.loss.head_copy
    return {
        "a block": {"activation_workspace": seen.forward, "dequantised": seen.dequantised},
        "the loss": {"activations_kept": seen.outside, "logits": logits},
    }


@lru_cache(maxsize=16)
def _sizes_in_blocks(shape: Architecture) -> tuple[int, int]:
    """Weights of all blocks, and of the largest tensor in them."""
    sizes = [parameter.size for parameter in shape.parameters if parameter.block is not None]
    return sum(sizes), max(sizes, default=0)


def _merge_moments(run: Run) -> _Moments:
    """`nibble export`: outside of the blocks, adapters, one block; a matrix is merged in fp32, and
    then both models see a batch, block by block."""
    stock, seen = run.stock, run.seen
    is_small = run.recipe.adapter.kind in ("lora", "dora")
    outside = stock.base_weights_bytes - sum(stock.dense_by_block)
    blocks = [
        frozen + (0 if is_small else trained)
        for frozen, trained in zip(stock.base_by_block, stock.trained_by_block, strict=True)
    ]
    element = DTYPE_BYTES[COMPUTE_DTYPE[run.recipe.train.precision]]
    total, largest = _sizes_in_blocks(stock.architecture)
    dense, block = element * total // max(1, len(blocks)), max(blocks, default=0)
    held = {
        "base_codes": 0,
        "base_scales": 0,
        "base_weights": outside,
        "trained_weights": stock.trained_bytes - (0 if is_small else sum(stock.trained_by_block)),
        "optimizer_state": 0,
        "moving": block,
    }
    merged = largest * (MERGE_BYTES_PER_WEIGHT if is_small else element)
    return {
        "a merged matrix": {**held, "dequantised": merged},
        "both models compared": {
            **held,
            "base_weights": 2 * outside,
            "moving": max(block, dense),
            "activations_kept": seen.outside,
            "activation_workspace": seen.forward,
            "logits": seen.loss.chunk_evaluation + seen.loss.head_copy,
        },
    }
