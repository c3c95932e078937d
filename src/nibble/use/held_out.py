"""A few held-out rows of a run, as batches: what an export is compared on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nibble.data import Batch, one_pass, prepare
from nibble.models import Family
from nibble.spec.config import Recipe


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Rows to compare on: "held-out" ones or, without such data, "training" ones."""

    batches: tuple[Batch, ...]
    kind: str
    label_names: tuple[str, ...]
    """What the classes of a classification mean; empty for other tasks."""


def held_out_batches(recipe: Recipe, tokenizer: Any, family: Family, *, num_rows: int) -> HeldOut:
    """The first rows that were held out, in one padded batch.

    One batch, because each pass of a model that is read block by block reads all of it.
    """
    splits = prepare(
        recipe.data,
        tokenizer,
        task=recipe.model.task,
        seed=recipe.train.seed,
        can_pack=family.can_pack,
        num_labels=recipe.model.num_labels,
    )
    rows = splits.train if splits.eval is None else splits.eval
    kind = "training" if splits.eval is None else "held-out"
    chosen = rows.select(torch.arange(min(num_rows, len(rows))))
    pad = tokenizer.pad_token_id or 0
    return HeldOut(
        batches=tuple(one_pass(chosen, micro_batch_size=len(chosen), pad_id=pad)),
        kind=kind,
        label_names=splits.label_names,
    )
