"""Streams of text: nothing lost, nothing twice, and a position that can be gone back to."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nibble.data import stream as stream_module
from nibble.data.documents import START, Documents
from nibble.data.hub import HubSet
from nibble.data.splits import prepare
from nibble.data.stream import BEGINNING, StreamLoader, TextStream, TokenReader
from nibble.errors import CheckpointError, ConfigError, DataError
from nibble.models import load_tokenizer
from nibble.spec.config import Data, Model, Source

LENGTH = 16


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        patch.setattr(stream_module, "BLOCK_ROWS", 8)
        patch.setattr("nibble.data.documents.CHUNK_DOCUMENTS", 5)
        yield


@pytest.fixture(scope="module")
def tokenizer(cache: None) -> Any:
    return load_tokenizer(Model(path="builtin:llama-9m", tokenizer="builtin:bytes"))


def text(number: int) -> str:
    return f"text {number} " + "ab cd " * (number % 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two JSONL files, with rows that hold no text."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [json.dumps({"text": text(i)}) for i in range(40)]
    lines[3:3] = ['{"text": ""}', "no JSON"]
    (folder / "a.jsonl").write_text("\n".join(lines[:25]))
    (folder / "b.jsonl").write_text("\n".join(lines[25:]))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """C4's layout: gzipped JSON lines in numbered shards."""
    folder = tmp_path_factory.mktemp("c4")
    for shard in range(3):
        name = folder / f"c4-train.{shard:05d}-of-00003.json.gz"
        with gzip.open(name, "wt") as file:
            for row in range(14):
                values = {"text": text(shard * 14 + row), "timestamp": "t", "url": "u"}
                file.write(json.dumps(values) + "\n")
    return folder


def stream_of(path: Path, tokenizer: Any, **source: Any) -> TextStream:
    return TextStream(
        sources=(Source(path=str(path), **source),), tokenizer=tokenizer, max_length=LENGTH
    )


def line_of_tokens(numbers: range, tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    ids = [[*tokenizer(text(i))["input_ids"], end] for i in numbers]
    return list(chain.from_iterable(ids))


def test_rows_are_the_texts_joined_and_cut(folder: Path, tokenizer: Any) -> None:
    reader = TokenReader(stream_of(folder, tokenizer), BEGINNING)
    rows = reader.take(10**6)
    want = line_of_tokens(range(40), tokenizer)
    assert rows.shape == (len(want) // LENGTH, LENGTH)
    assert rows.reshape(-1).tolist() == want[: rows.size]
    assert reader.tally.num_read == 42 and sum(reader.tally.counts.values()) == 2
    assert len(reader.take(1)) == 0


@pytest.mark.parametrize("first", range(1, 40, 3))
def test_every_place_can_be_gone_back_to(folder: Path, tokenizer: Any, first: int) -> None:
    stream = stream_of(folder, tokenizer)
    whole = TokenReader(stream, BEGINNING).take(10**6)
    reader = TokenReader(stream, BEGINNING)
    reader.take(first)
    place = json.loads(json.dumps(reader.place))
    again = TokenReader(stream, place).take(10**6)
    assert np.array_equal(again, whole[first:])


def loader(stream: TextStream, **words: Any) -> StreamLoader:
    return StreamLoader(stream, **{"micro_batch_size": 3, "accumulation": 1, "seed": 5, **words})


def ids(batches: list[Any]) -> list[list[int]]:
    return torch.cat([batch.input_ids for batch in batches]).tolist()


def test_an_epoch_has_every_row_once_in_an_order_of_its_own(folder: Path, tokenizer: Any) -> None:
    stream = stream_of(folder, tokenizer)
    whole = TokenReader(stream, BEGINNING).take(10**6).tolist()
    steps = loader(stream, micro_batch_size=1)
    first, second = ([ids(next(steps))[0] for _ in whole] for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(whole)
    assert first != second and first != whole
    # Within blocks of 8: rows do not travel further.
    assert sorted(first[:8]) == sorted(whole[:8])
    plain = loader(stream, micro_batch_size=1, shuffle=False)
    assert [ids(next(plain))[0] for _ in whole] == whole


def test_labels_are_the_next_tokens(folder: Path, tokenizer: Any) -> None:
    (batch,) = next(loader(stream_of(folder, tokenizer)))
    assert torch.equal(batch.labels[:, :-1], batch.input_ids[:, 1:])
    assert (batch.labels[:, -1] == -100).all()
    assert (batch.num_targets, batch.num_tokens) == (3 * (LENGTH - 1), 3 * LENGTH)
    assert batch.attention_mask is None and batch.position_ids is None


def test_processes_share_a_step(folder: Path, tokenizer: Any) -> None:
    stream = stream_of(folder, tokenizer)
    alone = loader(stream, micro_batch_size=2, accumulation=4)
    parts = [
        loader(stream, micro_batch_size=2, accumulation=2, rank=rank, world=2) for rank in (0, 1)
    ]
    for _ in range(5):
        step = next(alone)
        shared = [next(part) for part in parts]
        mixed = [shared[0][0], shared[1][0], shared[0][1], shared[1][1]]
        assert ids(step) == ids(mixed)
    # A run goes on with another number of processes.
    other = loader(stream, micro_batch_size=8)
    other.load_state_dict(parts[1].state_dict())
    assert ids(next(other)) == ids(next(alone))


@pytest.mark.parametrize("stop", [1, 2, 3, 7, 20, 41])
def test_a_resumed_stream_is_the_one_that_was_not(folder: Path, tokenizer: Any, stop: int) -> None:
    """Also across the ends of blocks and epochs."""
    stream = stream_of(folder, tokenizer)
    whole = loader(stream)
    for _ in range(stop):
        next(whole)
    state = json.loads(json.dumps(whole.state_dict()))
    again = loader(stream)
    next(again)
    again.load_state_dict(state)
    for _ in range(9):
        assert ids(next(again)) == ids(next(whole))
    assert again.state_dict() == whole.state_dict()
    with pytest.raises(CheckpointError, match="seed 5 and this run has 6"):
        loader(stream, seed=6).load_state_dict(state)


def test_c4_is_streamed_by_datasets_and_resumed(shards: Path, tokenizer: Any) -> None:
    """The hub's code on local shards: the same texts, and any chunk's position leads back to it."""
    source = Source(path=str(shards))
    documents = Documents(sources=(source,), max_length=LENGTH)
    file = HubSet(source=source)
    chunks = [chunk for chunk, _ in documents._of_file(file, source, START, None)]
    assert [t for chunk in chunks for t in chunk.texts] == [text(i) for i in range(42)]
    assert chunks[0].at["hub"] is None and chunks[3].at["row"] == 15
    for number in (1, 3, 7):
        at = json.loads(json.dumps(chunks[number].at))
        again = [chunk for chunk, _ in documents._of_file(HubSet(source=source), source, at, None)]
        assert [c.texts for c in again] == [c.texts for c in chunks[number:]]
        # A resumed stream can be resumed, and that one again.
        for later in range(1, len(again), 2):
            at = json.loads(json.dumps(again[later].at))
            file = HubSet(source=source)
            third = [chunk for chunk, _ in documents._of_file(file, source, at, None)]
            assert [c.texts for c in third] == [c.texts for c in again[later:]]


def test_a_hub_stream_resumes_within_a_block(
    shards: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "nibble.data.documents.open_source", lambda source, max_length: [HubSet(source=source)]
    )
    stream = stream_of(shards, tokenizer)
    whole = loader(stream)
    for _ in range(11):
        next(whole)
    again = loader(stream)
    again.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for _ in range(20):
        assert ids(next(again)) == ids(next(whole))


def test_a_limit_of_rows_counts_those_of_all_files(folder: Path, tokenizer: Any) -> None:
    rows = TokenReader(stream_of(folder, tokenizer, num_rows=30), BEGINNING).take(10**6)
    assert rows.reshape(-1).tolist() == line_of_tokens(range(28), tokenizer)[: rows.size]


def test_held_out_tokens_are_never_trained_on(folder: Path, tokenizer: Any) -> None:
    data = Data(
        train=(Source(path=str(folder)),), max_length=LENGTH, streaming=True, eval_tokens=100
    )
    splits = prepare(data, tokenizer, task="causal-lm", seed=0, can_pack=True)
    want = line_of_tokens(range(40), tokenizer)
    assert splits.eval is not None and splits.stream is not None
    assert splits.eval.ids.tolist() == want[:96]
    assert splits.eval.num_targets == 6 * (LENGTH - 1)
    steps = StreamLoader(splits.stream, micro_batch_size=1, accumulation=1, seed=0, shuffle=False)
    for _ in range(2):  # epochs
        seen = [ids(next(steps))[0] for _ in range((len(want) - 96) // LENGTH)]
        assert list(chain.from_iterable(seen)) == want[96:][: len(seen) * LENGTH]


def test_what_cannot_be_streamed_is_said(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match=r"columns prompt, completion.*streaming reads texts"):
        TokenReader(stream_of(file, tokenizer), BEGINNING).take(1)
    with pytest.raises(ConfigError, match="format=alpaca: use format=text"):
        TokenReader(stream_of(file, tokenizer, format="alpaca"), BEGINNING).take(1)
    short = tmp_path / "short.txt"
    short.write_text("ab")
    with pytest.raises(DataError, match=r"fewer than data.max_length=16 tokens"):
        next(loader(stream_of(short, tokenizer)))
