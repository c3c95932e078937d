"""Dropping whole turns, oldest first."""

from __future__ import annotations

import pytest

from nibble.errors import DataError
from nibble.use.conversation import Message, fit, split_turns


def talk(num_turns: int, *, system: bool = True) -> list[Message]:
    messages = [{"role": "system", "content": "s"}] if system else []
    for turn in range(num_turns):
        messages.append({"role": "user", "content": f"q{turn}"})
        if turn < num_turns - 1:
            messages.append({"role": "assistant", "content": f"a{turn}"})
    return messages


def ten_each(messages: list[Message]) -> int:
    return 10 * len(messages)


def test_a_conversation_that_fits_is_kept_whole() -> None:
    messages = talk(3)
    fitted = fit(messages, count_tokens=ten_each, max_prompt_tokens=60)
    assert list(fitted.messages) == messages
    assert (fitted.num_dropped_turns, fitted.num_tokens) == (0, 60)


def test_the_oldest_whole_turns_go_and_the_system_message_stays() -> None:
    fitted = fit(talk(3), count_tokens=ten_each, max_prompt_tokens=59)
    assert [m["content"] for m in fitted.messages] == ["s", "q1", "a1", "q2"]
    assert fitted.num_dropped_turns == 1
    fitted = fit(talk(3), count_tokens=ten_each, max_prompt_tokens=39)
    assert [m["content"] for m in fitted.messages] == ["s", "q2"]
    assert fitted.num_dropped_turns == 2


def test_what_is_left_always_begins_with_a_question() -> None:
    for limit in range(20, 120, 10):
        fitted = fit(talk(5, system=False), count_tokens=ten_each, max_prompt_tokens=limit)
        assert fitted.messages[0]["role"] == "user"


def test_a_message_that_alone_is_too_long_is_refused() -> None:
    with pytest.raises(DataError, match="room for 15"):
        fit(talk(2), count_tokens=ten_each, max_prompt_tokens=15)


def test_turns_hold_every_answer_to_their_question() -> None:
    system, turns = split_turns([*talk(2), {"role": "assistant", "content": "a1"}])
    assert [m["content"] for m in system] == ["s"]
    assert [[m["content"] for m in turn] for turn in turns] == [["q0", "a0"], ["q1", "a1"]]
