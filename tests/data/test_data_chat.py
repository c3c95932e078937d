"""What is learnt of a conversation, in every family's template.

Each expectation is written out by hand from the template's text, so it does not depend on how the
spans are found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from chat_tokenizers import STOP, TEMPLATES

from nibble.data.chat import Chat, read_template, with_system
from nibble.data.encode import Encoder, covered
from nibble.data.formats import Completion, Conversation
from nibble.data.report import EMPTY, MALFORMED, NO_TARGET, RowProblem
from nibble.errors import ConfigError, DataError
from nibble.spec.config import Data

Tokenizers = Callable[..., Any]
TURNS = (
    {"role": "user", "content": "Hello world?"},
    {"role": "assistant", "content": "I am fine."},
    {"role": "user", "content": "And the capital?"},
    {"role": "assistant", "content": "Paris"},
)


def encode(tokenizer: Any, messages: Any, **words: Any) -> tuple[list[int], list[bool]]:
    encoder = Encoder(tokenizer=tokenizer, data=Data(**words), template=tokenizer.chat_template)
    rendered = encoder.render(Conversation(messages=tuple(messages)))
    ((row,),) = encoder.encode([rendered], chat=True, document=False)
    return row.ids.tolist(), row.targets.tolist()


def learnt(tokenizer: Any, messages: Any, **words: Any) -> list[str]:
    """The text of each unbroken run of learnt tokens."""
    ids, targets = encode(tokenizer, messages, **words)
    runs: list[list[int]] = []
    previous = False
    for token, target in zip(ids, targets, strict=True):
        if target and not previous:
            runs.append([])
        if target:
            runs[-1].append(token)
        previous = target
    return [tokenizer.decode(run) for run in runs]


EXPECTED = {
    "chatml": ["I am fine.<|im_end|>", "Paris<|im_end|>"],
    "llama3": ["I am fine.<|eot_id|>", "Paris<|eot_id|>"],
    "gemma": ["I am fine.<end_of_turn>", "Paris<end_of_turn>"],
    "mistral": [" I am fine.</s>", " Paris</s>"],
    "thinking": ["I am fine.<|im_end|>", "<think>\n\n</think>\n\nParis<|im_end|>"],
    "glm": ["I am fine.<|user|>", "Paris</s>"],
    "marked": ["I am fine.<|im_end|>", "Paris<|im_end|>"],
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_and_its_stop_token_is_learnt_and_nothing_else(
    tokenizers: Tokenizers, name: str
) -> None:
    assert learnt(tokenizers(name), TURNS) == EXPECTED[name]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "gemma"])
def test_a_system_message_is_put_in_front_and_not_learnt(tokenizers: Tokenizers, name: str) -> None:
    ids, _ = encode(tokenizers(name), TURNS, system="Be nice.")
    assert "Be nice." in tokenizers(name).decode(ids)
    assert learnt(tokenizers(name), TURNS, system="Be nice.") == EXPECTED[name]
    own = [{"role": "system", "content": "Own."}, *TURNS]
    assert with_system(own, "Be nice.") == own


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_stop_token_is_a_target_of_a_single_turn(tokenizers: Tokenizers, name: str) -> None:
    """Gemma's <end_of_turn> was masked by others, with a healthy-looking loss."""
    tokenizer = tokenizers(name)
    ids, targets = encode(tokenizer, TURNS[:2])
    stop = tokenizer.convert_tokens_to_ids(STOP[name])
    last = max(i for i, target in enumerate(targets) if target)
    assert ids[last] == stop and stop != tokenizer.unk_token_id


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_ids_are_those_of_the_whole_text_tokenised_once(
    tokenizers: Tokenizers, name: str
) -> None:
    tokenizer = tokenizers(name)
    once = tokenizer.apply_chat_template(list(TURNS), return_dict=True)["input_ids"]
    ids, _ = encode(tokenizer, TURNS)
    assert ids[: len(once)] == once
    assert ids[len(once) :] == ([tokenizer.eos_token_id] if name == "glm" else [])


@pytest.mark.parametrize("name", ["llama3", "gemma", "mistral"])
def test_a_template_that_writes_the_begin_token_gets_no_second_one(
    tokenizers: Tokenizers, name: str
) -> None:
    tokenizer = tokenizers(name, bos=True)
    ids, _ = encode(tokenizer, TURNS)
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_a_token_across_the_seam_belongs_to_the_answer(tokenizers: Tokenizers) -> None:
    """Tokenised apart, 'The' + ' quick' cut elsewhere than 'The quick' as a whole."""
    tokenizer = tokenizers()
    example = Completion(prompt="Hel", completion="lo world")
    encoder = Encoder(tokenizer=tokenizer, data=Data(), template=None)
    ((row,),) = encoder.encode([encoder.render(example)], chat=False, document=False)
    whole = tokenizer("Hello world")["input_ids"]
    apart = tokenizer("Hel")["input_ids"] + tokenizer("lo world")["input_ids"]
    assert whole != apart, "the corpus must merge across this seam for the test to mean something"
    assert row.ids.tolist() == [*whole, tokenizer.eos_token_id]
    texts = tokenizer.convert_ids_to_tokens(row.ids.tolist())
    straddling = next(i for i in range(len(texts)) if len("".join(texts[: i + 1])) > 3)
    # The first token of a row has nothing before it, so it cannot be a target even here.
    expected = [i >= straddling and i > 0 for i in range(len(texts))]
    assert row.targets.tolist() == expected and any(expected)


def test_covered_takes_any_overlap_and_no_empty_token() -> None:
    import numpy as np

    offsets = np.array([[0, 3], [3, 7], [7, 7], [7, 9], [9, 12], [0, 0]])
    assert covered(offsets, [(5, 9)]).tolist() == [False, True, False, True, False, False]
    assert covered(offsets, [(0, 1), (9, 10)]).tolist() == [True, False, False, False, True, False]


def test_characters_of_several_bytes_are_learnt_whole(tokenizers: Tokenizers) -> None:
    turns = [
        {"role": "user", "content": "smile"},
        {"role": "assistant", "content": "ok \U0001f680안"},
    ]
    assert learnt(tokenizers("chatml"), turns) == ["ok \U0001f680안<|im_end|>"]


def test_earlier_thoughts_that_a_template_drops_do_not_confuse(tokenizers: Tokenizers) -> None:
    turns = [dict(turn) for turn in TURNS]
    turns[1]["content"] = "<think>hmm</think>\n\nI am fine."
    assert learnt(tokenizers("thinking"), turns) == EXPECTED["thinking"]


def test_the_same_answer_twice_and_an_answer_that_is_in_its_question(
    tokenizers: Tokenizers,
) -> None:
    turns = [dict(turn) for turn in TURNS]
    for turn in turns:
        turn["content"] = "fine"
    for name in ("chatml", "gemma", "mistral", "marked"):
        runs = learnt(tokenizers(name), turns)
        assert [run.strip() for run in runs] == ["fine" + STOP[name]] * 2


def test_loss_on_all_learns_all_but_the_first_token(tokenizers: Tokenizers) -> None:
    for name in TEMPLATES:
        ids, targets = encode(tokenizers(name), TURNS, loss_on="all")
        assert targets == [False] + [True] * (len(ids) - 1)
        text = tokenizers(name).decode(ids).rstrip()
        assert text.endswith(STOP[name])


def test_a_conversation_that_ends_with_a_question(tokenizers: Tokenizers) -> None:
    assert learnt(tokenizers("chatml"), TURNS[:3]) == EXPECTED["chatml"][:1]


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral"])
def test_a_conversation_that_begins_with_an_answer(tokenizers: Tokenizers, name: str) -> None:
    runs = learnt(tokenizers(name), TURNS[1:])
    assert [run.strip() for run in runs] == [run.strip() for run in EXPECTED[name]]


def test_answers_that_cannot_be_learnt(tokenizers: Tokenizers) -> None:
    chat = Chat(tokenizer=tokenizers("gemma"), template=TEMPLATES["gemma"])

    def fate(*messages: dict[str, Any]) -> tuple[str, str]:
        with pytest.raises(RowProblem) as caught:
            chat.answers(messages)
        return caught.value.fate, caught.value.detail

    assert fate(TURNS[0]) == (NO_TARGET, "no message of the assistant")
    empty = {"role": "assistant", "content": " "}
    assert fate(TURNS[0], empty) == (EMPTY, "the answer in message 2 is empty")
    refused = fate({"role": "system", "content": "x"}, *TURNS)
    assert refused == (MALFORMED, "the chat template refuses it: System role not supported")


def test_an_answer_that_a_template_hides_is_not_guessed(tokenizers: Tokenizers) -> None:
    hides = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}"
        "{% endif %}{% endfor %}"
    )
    chat = Chat(tokenizer=tokenizers("chatml"), template=hides)
    with pytest.raises(RowProblem, match="cannot be found"):
        chat.answers(TURNS)


def test_a_template_file_that_is_missing_or_broken(tokenizers: Tokenizers) -> None:
    with pytest.raises(DataError, match=r"data\.chat_template nowhere\.jinja cannot be read"):
        read_template("nowhere.jinja")
    chat = Chat(tokenizer=tokenizers("chatml"), template="{% for %}")
    with pytest.raises(ConfigError, match="not valid Jinja"):
        chat.answers(TURNS)


def test_a_tokenizer_without_character_offsets_is_refused(tokenizers: Tokenizers) -> None:
    class Slow:
        is_fast = False
        chat_template = None
        eos_token_id = 2

    encoder = Encoder(tokenizer=Slow(), data=Data(), template=None)
    rendered = encoder.render(Completion(prompt="a", completion="b"))
    with pytest.raises(DataError, match="Slow does not tell which characters a token covers"):
        encoder.encode([rendered], chat=False, document=False)
