"""Rows to batches: several documents in a row, or one and padding.

Packing is best-fit decreasing: within a window of rows in random order, the longest first, each
goes to the fullest row of the batch that still has room (at most 11/9 of the fewest possible rows
plus 4: Johnson 1974; on real lengths under 1 % of the tokens stay empty). In a packed row
position_ids begin at 0 for each document, and with attention_mask None that is what keeps attention
inside documents. What is left of a row is filled with a document of padding that is never learnt.

labels are already shifted inside each document: labels[t] is the target of position t, and the last
position of a document has none (-100), so no target crosses a seam.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nibble.data.order import permutation
from nibble.data.rows import Row, Rows

IGNORE = -100
"""The label of a position that has no target."""
WINDOW_ROWS = 8192
FILLER_TOKENS = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """What one forward pass takes: [rows, length] int64 tensors.

    labels: shifted targets, -100 where there is none; for classification class ids int64 [rows] or
    numbers float32 [rows]. position_ids: only of packed rows; None lets the model count from 0.
    attention_mask: None if every position is real or the row is packed. num_targets: labels that
    count (rows for classification). num_tokens: positions that are not padding. doc_lengths: for
    each row its documents in order; of a packed row they add up to its length, the padding being
    the last of them. token_type_ids: for classifiers that were given them. offsets: int32, see
    `shapes.of_few_shapes`; given, attention need not look for the documents.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None
    attention_mask: Tensor | None
    num_targets: int
    num_tokens: int
    doc_lengths: tuple[tuple[int, ...], ...]
    token_type_ids: Tensor | None = None
    offsets: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Bins:
    """Packed rows: bin i holds the rows members[offsets[i]:offsets[i+1]]."""

    members: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        return self.members[self.offsets[index] : self.offsets[index + 1]]


def plan_bins(
    lengths: Sequence[int] | Tensor, *, capacity: int, seed: int, shuffle: bool = True
) -> Bins:
    """Which rows share a packed row of at most `capacity` tokens; a pure function of its arguments.

    Every row is in exactly one bin. `shuffle` False packs neighbours, in their order. A row longer
    than the capacity is a bug of the caller.
    """
    sizes = torch.as_tensor(lengths, dtype=torch.int64).numpy()
    assert not len(sizes) or int(sizes.max()) <= capacity, "a row is longer than a packed row"
    order = permutation(len(sizes), seed) if shuffle else np.arange(len(sizes), dtype=np.int64)
    bins: list[list[int]] = []
    for begin in range(0, len(order), WINDOW_ROWS):
        window = order[begin : begin + WINDOW_ROWS]
        descending = window[np.argsort(-sizes[window], kind="stable")]
        bins += _best_fit(descending.tolist(), sizes, capacity)
    if not shuffle:
        bins = sorted(sorted(one) for one in bins)
    offsets = np.cumsum([0, *map(len, bins)], dtype=np.int64)
    members = np.asarray([row for one in bins for row in one], dtype=np.int64)
    return Bins(members=members, offsets=offsets)


def _best_fit(rows: list[int], sizes: NDArray[np.int64], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for row in rows:
        size = int(sizes[row])
        at = bisect_left(room, (size, -1))
        if at == len(room):
            bins.append([row])
            insort(room, (capacity - size, len(bins) - 1))
        else:
            left, chosen = room.pop(at)
            bins[chosen].append(row)
            insort(room, (left - size, chosen))
    return bins


def shifted_labels(row: Row) -> Tensor:
    """The target of each position of one document, int64 [n]; -100 where none is learnt."""
    labels = torch.full((len(row.ids),), IGNORE, dtype=torch.int64)
    labels[:-1] = torch.where(row.targets[1:], row.ids[1:].long(), IGNORE)
    return labels


def packed_batch(rows: Rows, bins: Sequence[NDArray[np.int64]], *, pad_id: int) -> Batch:
    """One batch of packed rows, as long as the longest of them."""
    content = [[rows.row(int(index)) for index in one] for one in bins]
    totals = [sum(len(row.ids) for row in one) for one in content]
    shape = (len(bins), max(totals))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORE, dtype=torch.int64)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    doc_lengths = []
    for number, one in enumerate(content):
        at = 0
        for row in one:
            n = len(row.ids)
            input_ids[number, at : at + n] = row.ids
            labels[number, at : at + n] = shifted_labels(row)
            position_ids[number, at : at + n] = torch.arange(n)
            at += n
        left = shape[1] - at
        position_ids[number, at:] = torch.arange(left)
        doc_lengths.append((*(len(row.ids) for row in one), *([left] if left else [])))
    return Batch(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        attention_mask=None,
        num_targets=int((labels != IGNORE).sum()),
        num_tokens=sum(totals),
        doc_lengths=tuple(doc_lengths),
    )


def padded_batch(
    rows: Rows, indices: Sequence[int] | NDArray[np.int64], *, pad_id: int, multiple: int = 1
) -> Batch:
    """One batch of single documents, padded on the right to the longest (and to a multiple)."""
    content = [rows.row(int(index)) for index in indices]
    lengths = [len(row.ids) for row in content]
    shape = (len(content), -(-max(lengths) // multiple) * multiple)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE, dtype=torch.int64)
    kinds = None if rows.type_ids is None else torch.zeros(shape, dtype=torch.int64)
    for number, row in enumerate(content):
        n = lengths[number]
        input_ids[number, :n] = row.ids
        mask[number, :n] = 1
        if rows.labels is None:
            labels[number, :n] = shifted_labels(row)
        if kinds is not None and row.type_ids is not None:
            kinds[number, :n] = row.type_ids
    whole = min(lengths) == shape[1]
    if rows.labels is not None:
        values = rows.labels[torch.as_tensor(np.asarray(indices))]
        labels = values.long() if rows.label_names else values.float()
    return Batch(
        input_ids=input_ids,
        labels=labels,
        position_ids=None,
        # A classifier finds the last token by its mask; a language model needs none if all is real.
        attention_mask=None if whole and rows.labels is None else mask,
        num_targets=len(content) if rows.labels is not None else int((labels != IGNORE).sum()),
        num_tokens=sum(lengths),
        doc_lengths=tuple((n,) for n in lengths),
        token_type_ids=kinds,
    )


def filler_batch(rows: Rows, *, pad_id: int, packing: bool) -> Batch:
    """A batch that teaches nothing, for a process that would otherwise have none in a step.

    A classifier's row is the first of the store, which the caller must weigh by num_targets = 0.
    """
    if rows.labels is not None:
        real = padded_batch(rows, [0], pad_id=pad_id)
        return Batch(
            input_ids=real.input_ids,
            labels=real.labels,
            position_ids=None,
            attention_mask=real.attention_mask,
            num_targets=0,
            num_tokens=0,
            doc_lengths=real.doc_lengths,
            token_type_ids=real.token_type_ids,
        )
    ids = torch.full((1, FILLER_TOKENS), pad_id, dtype=torch.int64)
    return Batch(
        input_ids=ids,
        labels=torch.full_like(ids, IGNORE),
        position_ids=torch.arange(FILLER_TOKENS)[None] if packing else None,
        attention_mask=None,
        num_targets=0,
        num_tokens=0,
        doc_lengths=((FILLER_TOKENS,),),
    )
