"""Packing: nothing crosses from one document to another, in the labels or in the model."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.data import IGNORE, Loader, Rows
from nibble.data.pack import Batch, packed_batch, padded_batch, plan_bins

VOCAB = 64
LENGTHS = [9, 1, 14, 5, 3, 2, 11, 6]


def random_rows(lengths: list[int] = LENGTHS, *, learnt: float = 0.6) -> Rows:
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    targets = torch.rand(total, generator=generator) < learnt
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    targets[offsets[:-1]] = False
    return Rows(
        ids=torch.randint(3, VOCAB, (total,), generator=generator, dtype=torch.int32),
        targets=targets,
        offsets=offsets,
        files=("f",),
        file_of=torch.zeros(len(lengths), dtype=torch.int32),
        line_of=torch.arange(len(lengths)),
    )


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 16), min_size=1, max_size=60),
    seed=st.integers(0, 2**31),
    shuffle=st.booleans(),
)
def test_every_row_is_in_one_bin_that_holds_it(
    lengths: list[int], seed: int, shuffle: bool
) -> None:
    bins = plan_bins(lengths, capacity=16, seed=seed, shuffle=shuffle)
    members = [bins[i].tolist() for i in range(len(bins))]
    assert sorted(row for one in members for row in one) == list(range(len(lengths)))
    assert all(one and sum(lengths[row] for row in one) <= 16 for one in members)
    again = plan_bins(torch.tensor(lengths), capacity=16, seed=seed, shuffle=shuffle)
    assert members == [again[i].tolist() for i in range(len(again))]
    # Best fit decreasing needs at most 11/9 of the fewest bins that could hold the tokens, plus 4.
    assert len(bins) <= 11 / 9 * max(1, -(-sum(lengths) // 16)) * 2 + 4


def test_packing_wastes_little() -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = (torch.randn(5000, generator=generator).exp() * 150).long().clamp(8, 1024)
    bins = plan_bins(lengths, capacity=1024, seed=0)
    assert int(lengths.sum()) / (len(bins) * 1024) > 0.99


def test_labels_are_shifted_inside_each_document() -> None:
    rows = random_rows()
    bins = plan_bins(rows.lengths, capacity=16, seed=0)
    batch = packed_batch(rows, [bins[i] for i in range(len(bins))], pad_id=0)
    for i in range(len(bins)):
        at = 0
        for index in bins[i].tolist():
            row = rows.row(index)
            for t in range(len(row.ids)):
                last = t + 1 == len(row.ids)
                learnt = not last and bool(row.targets[t + 1])
                expected = int(row.ids[t + 1]) if learnt else IGNORE
                assert int(batch.labels[i, at + t]) == expected
                assert int(batch.position_ids[i, at + t]) == t  # type: ignore[index]
                assert int(batch.input_ids[i, at + t]) == int(row.ids[t])
            at += len(row.ids)
        assert (batch.labels[i, at:] == IGNORE).all() and (batch.input_ids[i, at:] == 0).all()
        assert sum(batch.doc_lengths[i]) == batch.input_ids.shape[1]
    assert batch.num_targets == rows.num_targets and batch.num_tokens == rows.num_tokens


def test_padded_rows() -> None:
    rows = random_rows()
    batch = padded_batch(rows, [0, 3, 2], pad_id=1, multiple=8)
    assert batch.input_ids.shape == (3, 16) and batch.position_ids is None
    assert batch.attention_mask is not None
    assert batch.attention_mask.sum(1).tolist() == [9, 5, 14] and batch.num_tokens == 28
    assert (batch.input_ids[batch.attention_mask == 0] == 1).all()
    assert (batch.labels[batch.attention_mask == 0] == IGNORE).all()
    assert batch.num_targets == sum(int(rows.row(i).targets.sum()) for i in (0, 3, 2))
    assert padded_batch(rows, [2], pad_id=1).attention_mask is None


def tiny(kind: str) -> Any:
    import transformers as hf

    words: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "attn_implementation": "sdpa",
    }
    configs = {
        "llama": lambda: hf.LlamaConfig(**words),
        "mistral with a sliding window": lambda: hf.MistralConfig(**words, sliding_window=4),
        "qwen3": lambda: hf.Qwen3Config(**words),
        "gemma3": lambda: hf.Gemma3TextConfig(
            **words,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=8,
        ),
    }
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(configs[kind]()).eval()


KINDS = ["llama", "mistral with a sliding window", "qwen3", "gemma3"]


def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
        ).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows_together", [1, 4])
def test_packed_logits_equal_those_of_each_document_alone(kind: str, rows_together: int) -> None:
    model, rows = tiny(kind), random_rows()
    loader = Loader(
        rows, micro_batch_size=rows_together, accumulation=1, seed=2, packing=True, max_length=16
    )
    checked = []
    for step in range(loader.steps_per_epoch):
        (numbers,) = loader.row_numbers(0, step)
        (batch,) = next(loader)
        assert batch.attention_mask is None and len(batch.input_ids) <= rows_together
        logits = logits_of(model, batch)
        documents = iter(numbers)
        for i, lengths in enumerate(batch.doc_lengths):
            at = 0
            for n in lengths:
                ids = batch.input_ids[i : i + 1, at : at + n]
                if (ids != 0).all():  # not the padding at the end
                    index = next(documents)
                    assert torch.equal(ids[0], rows.row(index).ids.long())
                    with torch.no_grad():
                        alone = model(input_ids=ids, use_cache=False).logits[0]
                    torch.testing.assert_close(logits[i, at : at + n], alone, atol=1e-5, rtol=1e-5)
                    checked.append(index)
                at += n
    assert sorted(checked) == list(range(len(rows)))


@pytest.mark.parametrize("kind", KINDS)
def test_without_position_ids_documents_do_leak(kind: str) -> None:
    """The proof above can fail: what it forbids happens as soon as the positions are not given."""
    model, rows = tiny(kind), random_rows()
    loader = Loader(rows, micro_batch_size=4, accumulation=1, seed=2, packing=True, max_length=16)
    (batch,) = next(loader)
    with torch.no_grad():
        leaking = model(input_ids=batch.input_ids, use_cache=False).logits
    assert float((leaking - logits_of(model, batch)).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_packed_and_padded_rows_have_the_same_loss_and_gradient(kind: str) -> None:
    model, rows = tiny(kind), random_rows()
    results = []
    for packing in (True, False):
        loader = Loader(
            rows, micro_batch_size=3, accumulation=4, seed=2, packing=packing, max_length=16
        )
        model.zero_grad()
        targets, total = 0, 0.0
        for _ in range(loader.steps_per_epoch):
            for batch in next(loader):
                logits = model(
                    input_ids=batch.input_ids,
                    position_ids=batch.position_ids,
                    attention_mask=batch.attention_mask,
                    use_cache=False,
                ).logits
                loss = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), batch.labels.flatten(), reduction="sum"
                )
                loss.backward()
                targets, total = targets + batch.num_targets, total + float(loss.detach())
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((targets, total / targets, gradient / targets))
    assert results[0][0] == results[1][0] == rows.num_targets
    assert abs(results[0][1] - results[1][1]) < 1e-5
    torch.testing.assert_close(results[0][2], results[1][2], atol=1e-6, rtol=1e-4)
