"""Batches of few shapes: the same documents and targets, and sizes that hardly vary."""

from __future__ import annotations

from itertools import pairwise

import torch

from nibble.data import IGNORE, Batch
from nibble.data.shapes import MIN_DOCUMENTS, longest_document, of_few_shapes


def packed(lengths: list[list[int]], *, every: int = 1) -> Batch:
    """Rows of documents of these lengths; only each `every`-th position has a target."""
    positions = torch.stack([torch.cat([torch.arange(n) for n in one]) for one in lengths])
    ids = torch.arange(1, positions.numel() + 1).view(positions.shape)
    labels = torch.where(torch.arange(positions.shape[1]) % every == 0, ids + 1, IGNORE)
    return Batch(
        input_ids=ids,
        labels=labels,
        position_ids=positions,
        attention_mask=None,
        num_targets=int((labels != IGNORE).sum()),
        num_tokens=positions.numel(),
        doc_lengths=tuple(tuple(one) for one in lengths),
    )


def test_rows_are_filled_by_documents_without_targets() -> None:
    batch = packed([[1000, 1043], [43, 2000]])
    shaped = of_few_shapes(batch)
    assert shaped.input_ids.shape == (2, 2048) and shaped.position_ids is not None
    assert torch.equal(shaped.input_ids[:, :2043], batch.input_ids)
    assert torch.equal(shaped.labels[:, :2043], batch.labels)
    assert (shaped.labels[:, 2043:] == IGNORE).all()
    assert shaped.position_ids[0, 2043:].tolist() == [0, 1, 2, 3, 4]
    assert shaped.doc_lengths == ((1000, 1043, 5), (43, 2000, 5))
    assert shaped.offsets is not None and len(shaped.offsets) == MIN_DOCUMENTS + 1
    assert shaped.offsets.tolist()[:7] == [0, 1000, 2043, 2048, 2091, 4091, 4096]
    assert set(shaped.offsets.tolist()[7:]) == {4096}


def test_targets_are_bounded_by_eighths() -> None:
    for every, bound in ((1, 4096), (2, 2048), (3, 1536), (2040, 512)):
        batch = packed([[2048], [2048]], every=every)
        shaped = of_few_shapes(batch)
        assert shaped.num_targets == bound >= batch.num_targets


def test_the_longest_document_has_a_bound() -> None:
    for lengths, bound in (([900, 1148], 2048), ([1024] * 2, 1024), ([100] * 20 + [48], 256)):
        assert longest_document(packed([lengths])) == bound
    assert longest_document(packed([[1000, 500]])) == 1024
    assert longest_document(packed([[1400, 100]])) == 1500


def test_few_shapes_serve_many_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = set()
    for _ in range(200):
        length = 2048 - int(torch.randint(0, 60, (), generator=generator))
        cuts = torch.randperm(length - 1, generator=generator)[:19].add(1).sort().values.tolist()
        edges = [0, *cuts, length]
        lengths = [b - a for a, b in pairwise(edges)]
        shaped = of_few_shapes(packed([lengths]))
        assert shaped.offsets is not None
        shapes.add((shaped.input_ids.shape, shaped.offsets.shape, shaped.num_targets))
    assert len(shapes) == 1


def test_rows_of_one_document_keep_their_length() -> None:
    batch = packed([[37], [37]])
    plain = Batch(**{**vars(batch), "position_ids": None, "attention_mask": batch.labels})
    shaped = of_few_shapes(plain)
    assert shaped.input_ids is plain.input_ids and shaped.attention_mask is None
    assert shaped.offsets is not None and shaped.offsets.tolist() == [0]
    assert of_few_shapes(plain, offsets=False).offsets is None


def test_rows_of_one_document_have_few_lengths_if_asked() -> None:
    lengths = set()
    for length in range(128, 1025):
        batch = packed([[length]], every=3)
        plain = Batch(**{**vars(batch), "position_ids": None})
        shaped = of_few_shapes(plain, few_lengths=True)
        found = shaped.input_ids.shape[1]
        assert length <= found <= 1.25 * length and shaped.labels.shape == shaped.input_ids.shape
        assert torch.equal(shaped.labels[:, :length], plain.labels)
        assert (shaped.labels[:, length:] == IGNORE).all()
        lengths.add(found)
    assert len(lengths) == 3 * 4 + 1


def test_a_classifiers_batch_is_left_alone() -> None:
    batch = packed([[8]])
    batch = Batch(**{**vars(batch), "labels": torch.tensor([1])})
    assert of_few_shapes(batch) is batch
