"""What one device and one machine hold between two steps, by placement.

    single, ddp, dp    everything on each device
    fsdp               1/g of everything on each of g devices, and the blocks that are whole at the
                       moment: the one at work and the next, twice each while it is copied together
    stream             what is trained, what is outside of the blocks, the resident blocks and the
                       ring on each device; the other blocks once in the machine's memory
    deepspeed          fp32 gradients, fp32 copies of what is trained and optimiser state shared
                       out (2), the weights too (3)

Bytes come from `inventory.py`; here they are only shared out. `resident_blocks` and `keep_blocks`
that are `auto` are counted as 0 until the plan has decided them. What is gathered at the moment is
an upper bound: which of the buffers are alive together is up to torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from nibble.spec.config import Place, Recipe
from nibble.spec.formats import DTYPE_BYTES
from nibble.spec.inventory import COMPUTE_DTYPE, Inventory

GATHERED_BLOCKS = 3
"""Alive at once under fsdp: the block at work, and the next one gathered and being cut into
tensors."""
ZERO_BUCKET_NUMEL = 50_000_000
"""Gradients that deepspeed sums together, in fp32."""


@dataclass(frozen=True, kw_only=True)
class Devices:
    """How many devices a run has: `per_machine` on each of `machines`."""

    per_machine: int = 1
    machines: int = 1

    @property
    def total(self) -> int:
        """All of them."""
        return self.per_machine * self.machines


ONE_DEVICE = Devices()


@dataclass(frozen=True, kw_only=True)
class Holding:
    """Bytes on one device, and in one machine's memory, that stay from step to step.

    `moving`: buffers for blocks that come and go. `gradients` are those of what lives here.
    `num_processes`: of one machine.
    """

    base_codes: int
    base_scales: int
    base_weights: int
    trained_weights: int
    gradients: int
    optimizer_state: int
    moving: int
    streamed: int
    num_processes: int


def placement_kind(place: Place, num_devices: int) -> str:
    """What `auto` means on so many devices, a copy on each; and what one device means."""
    if place.kind in ("fsdp", "deepspeed") and num_devices == 1:
        return "single"  # nothing to share out
    if place.kind != "auto":
        return place.kind
    return "single" if num_devices == 1 else "ddp"


def holding(recipe: Recipe, stock: Inventory, devices: Devices) -> Holding:
    """Share a run's tensors out as its placement does."""
    kind = placement_kind(recipe.place, devices.total)
    if kind == "fsdp":
        return _sharded(recipe, stock, devices)
    if kind == "stream":
        return _streamed(recipe, stock, devices)
    if kind == "deepspeed" and devices.total > 1:
        return _zero(recipe, stock, devices)
    return Holding(
        base_codes=stock.base_codes_bytes,
        base_scales=stock.base_scales_bytes,
        base_weights=stock.base_weights_bytes,
        trained_weights=stock.trained_bytes,
        gradients=stock.gradient_bytes,
        optimizer_state=stock.optimizer_bytes,
        moving=0,
        streamed=0,
        num_processes=1 if kind == "dp" else devices.per_machine,
    )


def _share(num_bytes: int, parts: int) -> int:
    return -(-num_bytes // parts)


def _largest_block(stock: Inventory) -> int:
    """Bytes of the largest block, trained tensors included."""
    return max(
        (frozen + stock.trained_by_block[i] for i, frozen in enumerate(stock.base_by_block)),
        default=0,
    )


def _sharded(recipe: Recipe, stock: Inventory, devices: Devices) -> Holding:
    place = recipe.place
    group = devices.total
    if place.shard == "hybrid":
        group = place.shard_group or devices.per_machine
    blocks = sum(stock.base_by_block) + sum(stock.trained_by_block)
    outside = stock.base_bytes + stock.trained_bytes - blocks
    gathered = blocks if place.shard == "grad-op" else GATHERED_BLOCKS * _largest_block(stock)
    apart = [] if place.shard == "grad-op" else _tables(recipe, stock)
    outside -= sum(apart)
    # A frozen table is whole before the first block is gathered or after the last one is freed.
    moving = max([min(gathered, blocks), *apart]) + outside
    return Holding(
        base_codes=_share(stock.base_codes_bytes, group),
        base_scales=_share(stock.base_scales_bytes, group),
        base_weights=_share(stock.base_weights_bytes, group),
        trained_weights=_share(stock.trained_bytes, group),
        gradients=_share(stock.gradient_bytes, group),
        optimizer_state=_share(stock.optimizer_bytes, group),
        moving=moving if group > 1 else 0,
        streamed=0,
        num_processes=devices.per_machine,
    )


def _tables(recipe: Recipe, stock: Inventory) -> list[int]:
    """Bytes of the embedding and the head that fsdp gathers by themselves (place/tables.py)."""
    model = stock.architecture
    learns = {"embedding": stock.embedding_trained, "head": stock.head_trained}
    frozen = {kind for kind, is_trained in learns.items() if not is_trained and not model.tied}
    each = DTYPE_BYTES[COMPUTE_DTYPE[recipe.train.precision]]
    return [
        parameter.size * each
        for parameter in model.parameters
        if parameter.kind in frozen and parameter.module not in stock.adapted
    ]


def _zero(recipe: Recipe, stock: Inventory, devices: Devices) -> Holding:
    """By deepspeed, which does not ask in which type things are trained."""
    total = devices.total
    weights = total if recipe.place.zero_stage == 3 else 1
    in_fp32 = _share(4 * stock.num_trainable, total)
    blocks = sum(stock.base_by_block) + sum(stock.trained_by_block)
    outside = stock.base_bytes + stock.trained_bytes - blocks
    gathered = min(GATHERED_BLOCKS * _largest_block(stock), blocks) + outside
    bucket = 4 * min(stock.num_trainable, ZERO_BUCKET_NUMEL)
    return Holding(
        base_codes=stock.base_codes_bytes,
        base_scales=stock.base_scales_bytes,
        base_weights=_share(stock.base_weights_bytes, weights),
        trained_weights=_share(stock.trained_bytes, weights) + in_fp32,
        gradients=in_fp32,
        optimizer_state=_share(stock.optimizer_bytes, total),
        moving=(gathered if weights > 1 else 0) + bucket,
        streamed=0,
        num_processes=devices.per_machine,
    )


def _streamed(recipe: Recipe, stock: Inventory, devices: Devices) -> Holding:
    place, vectors = recipe.place, stock.vectors_by_block
    blocks = tuple(a - b for a, b in zip(stock.base_by_block, vectors, strict=True))
    dense = sum(stock.dense_by_block) - sum(vectors)
    resident = 0 if place.resident_blocks == "auto" else min(place.resident_blocks, len(blocks))
    largest = max(blocks, default=0)
    streamed = sum(sorted(blocks)[: len(blocks) - resident])
    total = max(1, sum(blocks))

    def resident_part(nbytes: int) -> int:
        return nbytes * (total - streamed) // total

    outside = stock.base_weights_bytes - dense
    return Holding(
        base_codes=resident_part(stock.base_codes_bytes),
        base_scales=resident_part(stock.base_scales_bytes),
        base_weights=outside + resident_part(dense),
        trained_weights=stock.trained_bytes,
        gradients=stock.gradient_bytes,
        optimizer_state=stock.optimizer_bytes,
        moving=min(place.ring_blocks, len(blocks) - resident) * largest,
        streamed=sum(blocks),
        num_processes=devices.per_machine,
    )
