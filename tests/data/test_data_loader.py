"""The order of rows: each once an epoch, whatever the batch, and the same again after a resume."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.data import Loader, Rows, one_pass
from nibble.data.order import permutation
from nibble.data.pack import Batch
from nibble.errors import CheckpointError, ConfigError, DataError

FAST = settings(max_examples=60, deadline=None)


def store(lengths: list[int]) -> Rows:
    """Rows whose first token is their own number; all others but the first are learnt."""
    ids = [[i + 10, *range(100, 99 + n)] for i, n in enumerate(lengths)]
    total = sum(lengths)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    targets = torch.ones(total, dtype=torch.bool)
    targets[offsets[:-1]] = False
    return Rows(
        ids=torch.tensor([token for row in ids for token in row], dtype=torch.int32),
        targets=targets,
        offsets=offsets,
        files=("f",),
        file_of=torch.zeros(len(lengths), dtype=torch.int32),
        line_of=torch.arange(1, len(lengths) + 1),
    )


def numbers(batch: Batch) -> list[int]:
    """The rows of a batch, by their first tokens; none of a filler."""
    found = []
    for row, lengths in zip(batch.input_ids, batch.doc_lengths, strict=True):
        at = 0
        for n in lengths:
            if int(row[at]) >= 10:
                found.append(int(row[at]) - 10)
            at += n
    return found


def epoch_of(loader: Loader) -> list[list[list[int]]]:
    """Rows of each micro-batch of each step of the coming epoch."""
    return [[numbers(b) for b in next(loader)] for _ in range(loader.steps_per_epoch)]


SIZES = {
    "n": st.integers(1, 40),
    "micro": st.integers(1, 4),
    "accumulation": st.integers(1, 4),
    "world": st.integers(1, 4),
    "seed": st.integers(0, 2**32),
    "packing": st.booleans(),
}


@FAST
@given(**SIZES)
def test_each_row_exactly_once_an_epoch(
    n: int, micro: int, accumulation: int, world: int, seed: int, packing: bool
) -> None:
    rows = store([2 + (i * 7 + seed) % 9 for i in range(n)])
    loaders = [
        Loader(
            rows, micro_batch_size=micro, accumulation=accumulation, seed=seed, rank=rank,
            world=world, packing=packing, max_length=12,
        )
        for rank in range(world)
    ]  # fmt: skip
    for epoch in range(2):
        assert all(loader.epoch == epoch for loader in loaders)
        ranks = [epoch_of(loader) for loader in loaders]
        seen = sorted(i for rank in ranks for step in rank for part in step for i in part)
        assert seen == list(range(n))
        for step in zip(*ranks, strict=True):
            passes = {len(parts) for parts in step}
            assert len(passes) == 1 and passes.pop() <= accumulation  # collectives must match
            if not packing:
                assert all(len(part) <= micro for parts in step for part in parts)
        if not packing and n >= micro * accumulation * world:
            whole = [len(part) for rank in ranks for part in rank[0]]
            assert whole == [micro] * (accumulation * world)


@FAST
@given(**SIZES)
def test_a_step_has_the_same_rows_however_it_is_split(
    n: int, micro: int, accumulation: int, world: int, seed: int, packing: bool
) -> None:
    rows = store([2 + i % 9 for i in range(n)])

    def steps(micro: int, accumulation: int, world: int) -> list[list[int]]:
        ranks = [
            Loader(
                rows, micro_batch_size=micro, accumulation=accumulation, seed=seed, rank=rank,
                world=world, packing=packing, max_length=12,
            )
            for rank in range(world)
        ]  # fmt: skip
        count = ranks[0].steps_per_epoch
        return [
            sorted(i for loader in ranks for part in next(loader) for i in numbers(part))
            for _ in range(2 * count)
        ]

    assert steps(micro, accumulation, world) == steps(1, micro * accumulation * world, 1)


@FAST
@given(stop=st.integers(0, 30), **SIZES)
def test_a_resumed_loader_goes_on_exactly(
    n: int, micro: int, accumulation: int, world: int, seed: int, packing: bool, stop: int
) -> None:
    """Others lose the epoch's order and train on the same rows again."""
    rows = store([2 + i % 9 for i in range(n)])

    def loader() -> Loader:
        return Loader(
            rows, micro_batch_size=micro, accumulation=accumulation, seed=seed, rank=world - 1,
            world=world, packing=packing, max_length=12,
        )  # fmt: skip

    straight = loader()
    for _ in range(stop):
        next(straight)
    state = straight.state_dict()
    assert all(type(value) is int for value in state.values())
    resumed = loader()
    resumed.load_state_dict(state)
    for _ in range(5):
        for a, b in zip(next(straight), next(resumed), strict=True):
            assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels)
            assert a.num_targets == b.num_targets and a.doc_lengths == b.doc_lengths


def test_the_order_is_a_pure_function_of_seed_and_epoch() -> None:
    rows = store([3] * 50)

    def order(seed: int, epoch: int) -> list[int]:
        loader = Loader(rows, micro_batch_size=1, accumulation=1, seed=seed)
        return loader.order(epoch).tolist()

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(one) for one in orders}) == 9
    assert orders == [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    # Fixed for all time and every machine: a checkpoint of today must resume in a year.
    assert permutation(8, 0).tolist() == FIRST
    code = "from nibble.data.order import permutation; print(permutation(8, 0).tolist())"
    out = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "7"}, capture_output=True, text=True
    )
    assert out.stdout.strip() == str(FIRST)


FIRST = [0, 3, 7, 5, 1, 2, 6, 4]


@pytest.mark.parametrize("packing", [False, True])
def test_no_order_at_all(packing: bool) -> None:
    rows = store([4] * 7)
    loader = Loader(
        rows, micro_batch_size=2, accumulation=1, seed=3, shuffle=False, packing=packing,
        max_length=8,
    )  # fmt: skip
    seen = [i for step in epoch_of(loader) for part in step for i in part]
    assert seen == list(range(7))
    passed = [
        numbers(batch)
        for batch in one_pass(rows, micro_batch_size=3, packing=packing, max_length=8)
    ]
    assert [i for part in passed for i in part] == list(range(7))


def test_the_short_last_step_weighs_each_token_once() -> None:
    """The sum of losses over the step's targets, divided by their number, is the mean over all
    tokens whatever the split: the last window of others counts its rows too little."""
    lengths = [2, 9, 5, 7, 3, 8, 4]
    rows = store(lengths)
    value = torch.arange(300, dtype=torch.float64).sin()  # stands for the loss of a target token

    def step_means(micro: int, accumulation: int, world: int) -> list[float]:
        loaders = [
            Loader(
                rows, micro_batch_size=micro, accumulation=accumulation, seed=1, rank=rank,
                world=world,
            )
            for rank in range(world)
        ]  # fmt: skip
        means = []
        for _ in range(loaders[0].steps_per_epoch):
            batches = [batch for loader in loaders for batch in next(loader)]
            targets = sum(batch.num_targets for batch in batches)
            total = sum(float(value[b.labels[b.labels != -100]].sum()) for b in batches)
            means.append(total / targets)
        return means

    for split in ((2, 2, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4)):
        np.testing.assert_allclose(step_means(*split), step_means(4, 1, 1), rtol=1e-12)


def test_a_process_without_rows_gets_a_batch_that_teaches_nothing() -> None:
    rows = store([5])
    for packing in (False, True):
        first, second = (
            next(
                Loader(
                    rows, micro_batch_size=2, accumulation=3, seed=0, rank=rank, world=2,
                    packing=packing, max_length=8, pad_id=1,
                )
            )
            for rank in range(2)
        )  # fmt: skip
        assert [batch.num_targets for batch in first] == [4]
        (filler,) = second
        assert (filler.num_targets, filler.num_tokens) == (0, 0)
        assert set(filler.labels.unique().tolist()) == {-100}
        assert set(filler.input_ids.unique().tolist()) == {1} and filler.attention_mask is None


def test_steps_in_epochs() -> None:
    loader = Loader(store([3] * 21), micro_batch_size=2, accumulation=1, seed=0)
    assert loader.steps_per_epoch == 11
    assert [loader.total_steps(epochs) for epochs in (1, 2, 0.5, 0.001, 3.0)] == [11, 22, 6, 1, 33]


def test_a_state_of_other_data_is_refused() -> None:
    state = Loader(store([3] * 9), micro_batch_size=2, accumulation=1, seed=0).state_dict()
    for rows, micro, seed in ((8, 2, 0), (9, 1, 0), (9, 2, 1)):
        loader = Loader(store([3] * rows), micro_batch_size=micro, accumulation=1, seed=seed)
        with pytest.raises(CheckpointError, match="go on with the data, seed and batch size"):
            loader.load_state_dict(state)
    # The same rows a step on twice the processes go on.
    wider = Loader(store([3] * 9), micro_batch_size=1, accumulation=1, seed=0, world=2, rank=1)
    wider.load_state_dict(state)


def test_what_cannot_be_loaded() -> None:
    with pytest.raises(DataError, match="no rows"):
        Loader(store([]), micro_batch_size=1, accumulation=1, seed=0)
    with pytest.raises(ConfigError, match="packing needs max_length"):
        Loader(store([3]), micro_batch_size=1, accumulation=1, seed=0, packing=True)
