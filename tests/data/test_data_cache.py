"""Tokenised rows on disk: found again by content, and never trusted when damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_tokenizers import bert_tokenizer, build_tokenizer

from nibble.data import Splits, cache, prepare
from nibble.spec.config import Data, Source

Write = Callable[..., str]
Tokenizers = Callable[..., Any]
CHATS = [
    {"conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": f"a{i}"}]}
    for i in range(5)
]


def run(tokenizer: Any, path: str, **words: Any) -> Splits:
    data = Data(train=(Source(path=path),), **words)
    return prepare(data, tokenizer, task="causal-lm", seed=0, can_pack=True)


def entries(folder: Path) -> list[Path]:
    return sorted((folder / "nibble" / "data").glob("*"))


def same(a: Splits, b: Splits) -> bool:
    rows = zip(
        (a.train.ids, a.train.targets, a.train.offsets, a.train.line_of),
        (b.train.ids, b.train.targets, b.train.offsets, b.train.line_of),
        strict=True,
    )
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in rows)


@pytest.fixture
def no_tokenising(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def forbid(*args: Any, **words: Any) -> None:
        raise AssertionError("tokenised again")

    return lambda: monkeypatch.setattr("nibble.data.splits.tokenise_source", forbid)


def test_the_second_run_reads_what_the_first_kept(
    tokenizers: Tokenizers, write: Write, own_cache: Path, no_tokenising: Callable[[], None]
) -> None:
    path = write("a.jsonl", [*CHATS, {"conversations": 3}])
    first = run(tokenizers("chatml"), path)
    assert [entry.suffix for entry in entries(own_cache)] == [".safetensors"]
    no_tokenising()
    moved = Path(path).rename(Path(path).with_name("moved.jsonl"))
    second = run(tokenizers("chatml"), str(moved))
    assert same(first, second) and second.train.source(0).endswith("moved.jsonl:1")
    assert first.report.counts == second.report.counts == {"malformed": 1}
    assert "moved.jsonl:6" in second.report.examples["malformed"][0]
    assert any("moved.jsonl" in note for note in second.report.notes)
    assert not any("a.jsonl" in note for note in second.report.notes)
    assert first.stop_ids == second.stop_ids


def test_whatever_changes_the_tokens_changes_the_entry(
    tokenizers: Tokenizers, write: Write, own_cache: Path
) -> None:
    path = write("a.jsonl", CHATS)
    chat = tokenizers("chatml")
    run(chat, path)
    run(chat, path, max_length=17)
    run(chat, path, system="x")
    run(chat, path, loss_on="all")
    run(tokenizers("gemma"), path)
    run(chat, path, chat_template=write("t.jinja", chat.chat_template + "{{ '\n' }}"))
    run(build_tokenizer("chatml", special=("<extra>",)), path)
    write("a.jsonl", CHATS[:4])
    run(chat, path)
    assert len(entries(own_cache)) == 8
    # What a call does to the tokenizer's own state changes nothing.
    chat("x", truncation=True, max_length=7, padding="max_length")
    run(chat, path)
    run(build_tokenizer("chatml"), path)
    assert len(entries(own_cache)) == 8


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_entry_is_made_again(
    tokenizers: Tokenizers, write: Write, own_cache: Path, damage: str
) -> None:
    path = write("a.jsonl", CHATS)
    first = run(tokenizers("chatml"), path)
    (entry,) = entries(own_cache)
    good = entry.read_bytes()
    flipped = good[:-20] + bytes([good[-20] ^ 1]) + good[-19:]
    entry.write_bytes({"cut": good[: len(good) // 2], "flip": flipped, "empty": b""}[damage])
    assert cache.load(entry.parent, entry.stem, files=[]) is None
    assert same(first, run(tokenizers("chatml"), path))
    assert cache.load(entry.parent, entry.stem, files=[]) is not None


def test_a_full_disk_costs_the_cache_and_not_the_run(
    tokenizers: Tokenizers, write: Write, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **words: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    splits = run(tokenizers("chatml"), write("a.jsonl", CHATS))
    assert len(splits.train) == 5 and entries(own_cache) == []
    assert any("No space left on device" in note for note in splits.report.notes)


def test_labels_and_segments_are_kept(write: Write, no_tokenising: Callable[[], None]) -> None:
    path = write("a.jsonl", [{"text": "one", "text_pair": "two", "label": x} for x in ("n", "y")])
    data = Data(train=(Source(path=path),))
    tokenizer = bert_tokenizer()

    def splits() -> Splits:
        return prepare(data, tokenizer, task="classification", seed=0, can_pack=False)

    first = splits()
    no_tokenising()
    second = splits()
    assert first.label_names == second.label_names == ("n", "y")
    assert second.train.labels is not None and second.train.labels.tolist() == [0, 1]
    assert torch.equal(first.train.type_ids, second.train.type_ids)  # type: ignore[arg-type]


def test_the_folder_follows_the_recipe_then_the_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert cache.cache_folder(str(tmp_path)) == tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache.cache_folder(None) == tmp_path / "x" / "nibble" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder(None) == Path.home() / ".cache" / "nibble" / "data"
