"""The demo's data is real, plentiful, repeatable, and its held-out part is held out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from nibble.cli.stdlib_pairs import MAX_CHARACTERS, make_pairs, split, write_jsonl


def test_a_few_hundred_pairs_that_repeat(tmp_path: Path) -> None:
    pairs = make_pairs(seed=0)
    assert len(pairs) > 600
    assert pairs == make_pairs(seed=0)
    assert pairs != make_pairs(seed=1)
    assert len({pair.name for pair in pairs}) == len(pairs)


def test_held_out_functions_are_not_trained_on() -> None:
    train, held_out = split(make_pairs(), num_train=400, num_held_out=40)
    assert (len(train), len(held_out)) == (400, 40)
    assert not {pair.answer for pair in train} & {pair.answer for pair in held_out}
    assert held_out[0].name == "shutil.which"


def test_an_answer_is_the_signature_and_the_documentation() -> None:
    _, held_out = split(make_pairs(), num_train=1, num_held_out=1)
    pair = held_out[0]
    assert pair.question == "What does `shutil.which` do in Python?"
    assert pair.answer.startswith("`which(cmd")
    prose = " ".join((shutil.which.__doc__ or "").split())
    assert pair.answer.split("`: ")[1] in prose
    assert len(pair.answer) < MAX_CHARACTERS + 100


def test_the_file_is_in_the_messages_format(tmp_path: Path) -> None:
    pairs = make_pairs()[:3]
    write_jsonl(pairs, tmp_path / "pairs.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [row["messages"][0]["content"] for row in rows] == [pair.question for pair in pairs]
    assert [row["messages"][1]["role"] for row in rows] == ["assistant"] * 3
