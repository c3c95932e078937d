"""Talking: only answers on standard output, whole turns forgotten and said so, nothing lost to
Ctrl-C."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import POSITIONS, WORDS, Nibble, save_model

from nibble.cli import chatting
from nibble.cli.chatting import Chat
from nibble.cli.loading import load, resolve
from nibble.use.generate import Sampling


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never ends its answer by itself: its end token has the least logit."""
    from transformers import AutoModelForCausalLM

    folder = save_model(tmp_path_factory.mktemp("talker"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[: WORDS.index("w0")] = 0
        model.model.norm.weight.fill_(4)
    model.save_pretrained(folder)
    return folder


def type_in(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_a_prompt_is_answered_on_standard_output_alone(nibble: Nibble, talker: Path) -> None:
    done = nibble("chat", talker, "--prompt", "w5 w6 w7", "--max-new-tokens", "6")
    assert (done.code, done.err) == (0, "")
    words = done.out.split()
    assert len(words) == 6 and done.out.endswith("\n") and done.out.count("\n") == 1
    assert "w5 w6 w7" not in done.out and "<assistant>" not in done.out
    assert nibble("chat", talker, "--prompt", "w5 w6 w7", "--max-new-tokens", "6") == done


def test_a_short_context_is_shared_between_question_and_answer(
    nibble: Nibble, talker: Path
) -> None:
    done = nibble("chat", talker, "--prompt", "w5")
    assert done.code == 0 and len(done.out.split()) == POSITIONS // 2
    too_many = nibble("chat", talker, "--prompt", "w5", "--max-new-tokens", str(POSITIONS))
    assert too_many.code == 2 and f"the model's context is {POSITIONS} tokens" in too_many.err
    long = nibble("chat", talker, "--prompt", "w5 " * 60, "--max-new-tokens", "8")
    assert long.code == 1 and "shorten it or ask for fewer new tokens" in long.err
    assert long.err.count("\n") == 1 and long.out == ""


def test_a_conversation_forgets_its_oldest_turns_and_says_so(
    nibble: Nibble, talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = "w1 w2 w3 w4 w5 w6 w7 w8"
    type_in(monkeypatch, question, "", question, question, "w9 " * 70, question, "/quit", question)
    done = nibble("chat", talker, "--max-new-tokens", "10")
    assert done.code == 0
    answers = done.out.splitlines()
    assert len(answers) == 4 and all(len(answer.split()) == 10 for answer in answers)
    told = done.err.splitlines()
    # 21 tokens a turn: two and a question fit into 54, three do not.
    assert told[0] == "(the context is full: the oldest 1 turns are forgotten)"
    assert "shorten it" in told[1] and len(told) == 3


def test_new_starts_over(nibble: Nibble, talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    type_in(monkeypatch, "w1 w2", "w3", "/new", "w1 w2")
    done = nibble("chat", talker, "--max-new-tokens", "5", "--system", "w8")
    first, second, again = done.out.splitlines()
    assert first == again and first != second


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said(
    nibble: Nibble, talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions: list[Chat] = []
    start = Chat.__init__

    class Impatient(io.StringIO):
        """A terminal whose user presses Ctrl-C at the third piece."""

        pieces = 0

        def write(self, text: str) -> int:
            self.pieces += 1
            written = super().write(text)
            if self.pieces == 3:
                raise KeyboardInterrupt
            return written

    def spying(self: Chat, *words: Any, **more: Any) -> None:
        start(self, *words, **more)
        sessions.append(self)

    monkeypatch.setattr(Chat, "__init__", spying)
    type_in(monkeypatch, "w1 w2", "w3")
    screen = Impatient()
    monkeypatch.setattr("sys.stdout", screen)
    done = nibble("chat", talker, "--max-new-tokens", "8")
    assert done.code == 0 and done.err == "(stopped)\n"
    first, second = screen.getvalue().splitlines()
    assert 0 < len(first.split()) < 8 and len(second.split()) == 8
    kept = sessions[0].messages
    assert [m["role"] for m in kept] == ["user", "assistant", "user", "assistant"]
    assert kept[1]["content"] == first and kept[3]["content"] == second


def test_ctrl_c_at_a_single_question_ends_the_command(
    nibble: Nibble, talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*words: Any, **more: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(chatting, "generate", interrupted)
    done = nibble("chat", talker, "--prompt", "w1")
    assert done.code == 130 and done.err in ("", "nibble: interrupted\n")


def test_a_stop_text_ends_the_answer_before_it(nibble: Nibble, talker: Path) -> None:
    whole = nibble("chat", talker, "--prompt", "w5 w6", "--max-new-tokens", "12").out.split()
    stop = whole[7]
    at = whole.index(stop)
    assert at > 0
    done = nibble(
        "chat", talker, "--prompt", "w5 w6", "--max-new-tokens", "12", "--stop", "nothing",
        "--stop", f" {stop}",
    )  # fmt: skip
    text = " ".join(whole)
    assert done.out.rstrip("\n") == text[: text.index(f" {stop}")]
    empty = nibble("chat", talker, "--prompt", "w5", "--stop", "")
    assert empty.code == 2 and "--stop is empty" in empty.err


def test_tokens_that_ended_answers_in_training_end_them_here(talker: Path) -> None:
    loaded = load(resolve(str(talker)))
    out = io.StringIO()
    how = Sampling(max_new_tokens=8)
    answer = Chat(loaded, system=None, how=how).ask("w5 w6", out).split()
    stop = WORDS.index(answer[3])
    target = dataclasses.replace(loaded.target, stop_ids=(stop,))
    told = dataclasses.replace(loaded, target=target)
    shorter = Chat(told, system=None, how=how).ask("w5 w6", out).split()
    assert shorter == answer[: answer.index(answer[3])]


def test_a_model_without_a_template_continues_the_text(
    nibble: Nibble, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    type_in(monkeypatch, "the a of", "the a of")
    done = nibble("chat", world / "plain", "--max-new-tokens", "5")
    first, second = done.out.splitlines()
    assert done.code == 0 and first == second  # there are no turns to remember
    refused = nibble("chat", world / "plain", "--system", "be brief", "--prompt", "the")
    assert refused.code == 2 and "--system needs a chat template" in refused.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "  "], "--prompt is empty"),
        (["--top-p", "0.5"], "no effect without --temperature above 0"),
        (["--seed", "3"], "no effect without --temperature above 0"),
        (["--base"], "--base is for runs"),
    ],
)
def test_words_without_effect_are_refused(
    words: list[str], message: str, nibble: Nibble, talker: Path
) -> None:
    done = nibble("chat", talker, *words)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1


def test_sampling_repeats_with_its_seed(nibble: Nibble, talker: Path) -> None:
    words = ("chat", talker, "--prompt", "w1", "--max-new-tokens", "8", "--temperature", "3")
    one, two, three = (nibble(*words, "--seed", seed).out for seed in ("1", "1", "2"))
    assert one == two != three


def test_a_question_is_put_as_the_run_put_it(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(resolve(str(world / "plain")))
    target = dataclasses.replace(loaded.target, question_prompt="a {question} of")
    asked: list[str] = []

    def record(model: Any, tokenizer: Any, ids: list[int], **words: Any) -> str:
        asked.append(tokenizer.decode(ids))
        return ""

    monkeypatch.setattr(chatting, "generate", record)
    for one in (loaded, dataclasses.replace(loaded, target=target)):
        Chat(one, system=None, how=Sampling(max_new_tokens=2)).ask("the", io.StringIO())
    plain, put = asked
    assert (plain.split(), put.split()) == (["the"], ["a", "the", "of"])
