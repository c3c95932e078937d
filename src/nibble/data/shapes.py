"""Batches brought to one of few shapes, for whoever records passes by shape (train/graphs.py).

Best-fit packing fills rows almost, so the length of a packed batch, its number of documents and of
targets differ from batch to batch by a little. Here each is rounded up, by values that depend on
nothing but the batch:

    length      of packed rows, to a sixteenth of it: one more document of padding in each row
    documents   to a power of two: the offsets end with empty documents
    longest     of them to a power of two: a bound that sizes a kernel's launch
    targets     to an eighth of the tokens: a bound; the positions between have none (-100)

The loss is the same, and so are its gradients. It costs at most 1/16 more tokens, mostly under 1 %.
Rows that are not packed keep their length unless few are asked for: four lengths an octave, by
padding on the right, which costs a tenth more tokens on average and a quarter at most.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from nibble.data.pack import IGNORE, Batch

LENGTH_STEPS = 16
ROW_STEPS = 4
TARGET_STEPS = 8
MIN_TARGETS_STEP = 64
MIN_DOCUMENTS = 16
LONGEST_STEPS = 8


def of_few_shapes(batch: Batch, *, offsets: bool = True, few_lengths: bool = False) -> Batch:
    """The same targets in a batch whose sizes depend little on which documents it holds.

    `num_targets` becomes a bound. `offsets`: say where documents begin if the rows are laid end to
    end, and the number of positions, several times at the end; a single 0 if every row is one
    document. `few_lengths`: of rows that are not packed, too. For language models; a classifier's
    batch is returned as it is.
    """
    if batch.labels.dim() == 1:
        return batch
    if batch.position_ids is None:
        only = torch.zeros(1, dtype=torch.int32) if offsets else None
        batch = replace(batch, attention_mask=None, offsets=only)
        if few_lengths:
            batch = _filled(batch, _missing(batch, ROW_STEPS))
    elif offsets:
        batch = _packed(batch)
    num_positions = batch.input_ids.numel()
    step = max(MIN_TARGETS_STEP, num_positions // TARGET_STEPS)
    bound = min(num_positions, -(-max(1, batch.num_targets) // step) * step)
    return replace(batch, num_targets=bound)


def longest_document(batch: Batch) -> int:
    """A bound on the longest document, one of few: a power of two, or the rows' length."""
    length = batch.input_ids.shape[1]
    longest = max(n for one in batch.doc_lengths for n in one)
    return min(length, max(_power_of_two(longest), length // LONGEST_STEPS))


def _packed(batch: Batch) -> Batch:
    assert batch.position_ids is not None
    more = _missing(batch, LENGTH_STEPS)
    if more:
        positions = [batch.position_ids, torch.arange(more).expand(len(batch.position_ids), -1)]
        lengths = tuple((*one, more) for one in batch.doc_lengths)
        batch = replace(batch, position_ids=torch.cat(positions, dim=1), doc_lengths=lengths)
        batch = _filled(batch, more)
    num_positions = batch.input_ids.numel()
    return replace(batch, offsets=_offsets(batch.doc_lengths, num_positions=num_positions))


def _missing(batch: Batch, steps: int) -> int:
    """Positions from a row's length to the next of `steps` lengths an octave."""
    length = batch.input_ids.shape[1]
    step = max(1, _power_of_two(length) // (2 * steps))
    return -(-length // step) * step - length


def _filled(batch: Batch, more: int) -> Batch:
    """The batch with positions that have no target at the end of its rows."""
    labels = F.pad(batch.labels, (0, more), value=IGNORE)
    return replace(batch, input_ids=F.pad(batch.input_ids, (0, more)), labels=labels)


def _offsets(lengths: tuple[tuple[int, ...], ...], *, num_positions: int) -> Tensor:
    ends = torch.tensor([n for one in lengths for n in one]).cumsum(0)
    assert int(ends[-1]) == num_positions, "documents fill the rows"
    offsets = torch.full((max(MIN_DOCUMENTS, _power_of_two(len(ends))) + 1,), num_positions)
    offsets[0] = 0
    offsets[1 : len(ends) + 1] = ends
    return offsets.to(torch.int32)


def _power_of_two(number: int) -> int:
    """The least power of two that is not below the number."""
    return 1 << (number - 1).bit_length()
