"""Columns to examples: what is found, what is asked for, and what is wrong with a row."""

from __future__ import annotations

from typing import Any

import pytest

from nibble.data.formats import (
    Completion,
    Conversation,
    Document,
    Labelled,
    Reader,
    alpaca_prompt,
    choose,
)
from nibble.data.report import EMPTY, MALFORMED, RowProblem
from nibble.errors import ConfigError, DataError
from nibble.spec.config import Source

ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}


def reader(*rows: dict[str, Any], task: str = "causal-lm", **words: Any) -> Reader:
    return choose(Source(path="f", **words), rows, task=task, name="f")


def test_alpaca_with_and_without_input() -> None:
    read = reader(ALPACA).read
    assert read(ALPACA) == Completion(
        prompt="Add.\n\n1 and 2", completion="3", plain_prompt=alpaca_prompt("Add.", "1 and 2")
    )
    bare = read({"instruction": "Say hi.", "input": "", "output": "hi"})
    assert bare == Completion(
        prompt="Say hi.", completion="hi", plain_prompt=alpaca_prompt("Say hi.", "")
    )
    assert "### Input" not in alpaca_prompt("Say hi.", "")


@pytest.mark.parametrize(
    ("row", "form"),
    [
        (ALPACA, "alpaca"),
        ({"prompt": "a", "completion": "b"}, "prompt-completion"),
        ({"question": "a", "answer": "b"}, "prompt-completion"),
        ({"messages": []}, "messages"),
        ({"conversations": []}, "sharegpt"),
        ({"title": "x", "text": "y"}, "text"),
    ],
)
def test_auto_says_what_it_found(row: dict[str, Any], form: str) -> None:
    found = reader(row)
    assert found.format == form and f"format {form} (found)" in found.note


def test_columns_rename_and_templates_fill() -> None:
    row = {"dialogue": "A: hi", "summary": "greeting", "topic": "{x}"}
    words = {"columns": {"completion": "summary"}, "template": "{{Sum}} up {dialogue}, {topic}:\n"}
    assert reader(row, **words).read(row) == Completion(
        prompt="{Sum} up A: hi, {x}:\n", completion="greeting"
    )
    korean = {"Q": "a", "A": "b"}
    mapped = reader(korean, columns={"question": "Q", "answer": "A"})
    assert mapped.read(korean) == Completion(prompt="a", completion="b")


def test_a_template_takes_the_known_answer_column() -> None:
    row = {"context": "c", "question": "q", "answer": "a"}
    assert reader(row, template="{context}|{question}").read(row) == Completion(
        prompt="c|q", completion="a"
    )


def test_sharegpt_and_messages_become_the_same() -> None:
    share = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
    assert reader(share).read(share) == reader(chat).read(chat)


def test_messages_keep_what_a_template_may_read_but_no_nulls() -> None:
    calls = [{"function": {"name": "f", "arguments": {}}}]
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": calls, "name": None},
        ]
    }
    assert reader(row).read(row) == Conversation(
        messages=(
            {"role": "user", "content": "ab"},
            {"role": "assistant", "tool_calls": calls},
        )
    )


def test_classification_from_glue_columns() -> None:
    def one(row: dict[str, Any], **words: Any) -> Any:
        return reader(row, task="classification", **words).read(row)

    assert one({"sentence": "good", "label": "1"}) == Labelled(
        text="good", text_pair=None, label="1"
    )
    pair = {"index": "0", "sentence1": "a", "sentence2": "b", "score": "4.75"}
    assert one(pair) == Labelled(text="a", text_pair="b", label="4.75")
    mrpc = {"Quality": "1", "#1 ID": "7", "#1 String": "a", "#2 String": "b"}
    assert one(mrpc) == Labelled(text="a", text_pair="b", label="1")
    cola = {"0": "gj04", "1": "1", "2": "", "3": "It is."}
    assert one(cola, columns={"text": "3", "label": "1"}) == Labelled(
        text="It is.", text_pair=None, label="1"
    )


@pytest.mark.parametrize(
    ("row", "fate", "detail"),
    [
        ({"prompt": "a"}, MALFORMED, "completion is missing"),
        ({"prompt": "a", "completion": 42}, MALFORMED, "completion is int, not text"),
        ({"prompt": "a", "completion": " \n"}, EMPTY, "completion is empty"),
        ({"prompt": None, "completion": "b"}, MALFORMED, "prompt is missing"),
    ],
)
def test_what_is_wrong_with_a_row(row: dict[str, Any], fate: str, detail: str) -> None:
    with pytest.raises(RowProblem) as caught:
        reader({"prompt": "", "completion": ""}).read(row)
    assert (caught.value.fate, caught.value.detail) == (fate, detail)


@pytest.mark.parametrize(
    "turns",
    [
        "text",
        [1],
        [{"content": "no role"}],
        [{"role": "user"}],
        [{"from": "martian", "value": "x"}],
        [{"role": "user", "content": 3}],
    ],
)
def test_what_is_wrong_with_a_conversation(turns: Any) -> None:
    with pytest.raises(RowProblem) as caught:
        reader({"messages": []}).read({"messages": turns})
    assert caught.value.fate == MALFORMED


def test_unknown_columns_are_named_with_what_is_wanted() -> None:
    with pytest.raises(DataError) as caught:
        reader({"foo": 1, "bar": 2})
    assert "f has the columns foo, bar" in str(caught.value)
    assert "alpaca wants instruction, output (and may have input)" in str(caught.value)
    with pytest.raises(DataError, match=r"data\.columns asks for 'nope' as prompt"):
        reader({"foo": 1}, columns={"prompt": "nope"})
    with pytest.raises(DataError, match=r"the template asks for \{nope\}"):
        reader({"foo": 1}, template="{nope}")


def test_words_without_effect_are_refused() -> None:
    with pytest.raises(ConfigError, match="columns renames 'body', which format text"):
        reader({"b": "x", "text": "y"}, format="text", columns={"body": "b"})
    with pytest.raises(ConfigError, match="a template has no effect on format text"):
        reader({"text": "x"}, format="text", template="{text}")
    with pytest.raises(ConfigError, match=r"does not go with model\.task causal-lm"):
        reader({"text": "x", "label": 1}, format="classification")
    with pytest.raises(ConfigError, match=r"does not go with model\.task classification"):
        reader({"text": "x"}, format="text", task="classification")
    with pytest.raises(ConfigError, match=r"write \{column\} for a column"):
        reader({"text": "x"}, template="{text")


def test_text() -> None:
    assert reader({"text": "a"}).read({"text": " a\n"}) == Document(text=" a\n")
