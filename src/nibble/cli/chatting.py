"""`nibble chat`: a conversation in the terminal, or one question from a script.

Answers go to standard output as they are made, everything else to the error stream. Ctrl-C ends an
answer; Ctrl-D or /quit ends the conversation; /new forgets it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nibble.cli.loading import Loaded, load, resolve
from nibble.errors import ConfigError, DataError
from nibble.use.conversation import Message, fit
from nibble.use.generate import Sampling, generate, render

DEFAULT_CONTEXT = 2048
DEFAULT_NEW_TOKENS = 512


def sampling(
    *, temperature: float, top_p: float, seed: int | None, stop: Sequence[str] = ()
) -> Sampling:
    """The words of the command line as values; refuses what would have no effect."""
    if temperature == 0 and (top_p < 1 or seed is not None):
        raise ConfigError("--top-p and --seed have no effect without --temperature above 0")
    if any(not text for text in stop):
        raise ConfigError("--stop is empty: give the text that ends an answer")
    texts = tuple(text.replace("\\n", "\n") for text in stop)
    return Sampling(temperature=temperature, top_p=top_p, seed=seed, stop_texts=texts)


def context_of(loaded: Loaded) -> int:
    """Tokens of question and answer together that the model has room for."""
    return loaded.assembly.built.family.max_positions or DEFAULT_CONTEXT


class Chat:
    """A model, the conversation so far, and the room it has."""

    def __init__(self, loaded: Loaded, *, system: str | None, how: Sampling) -> None:
        self.model, self.tokenizer = loaded.model, loaded.assembly.tokenizer
        self.how = replace(how, stop_ids=(*how.stop_ids, *loaded.target.stop_ids))
        context = context_of(loaded)
        self.room = context - how.max_new_tokens
        if self.room < 1:
            raise ConfigError(
                f"--max-new-tokens {how.max_new_tokens} leaves no room for a question: the model's "
                f"context is {context} tokens"
            )
        if system is not None and not self.tokenizer.chat_template:
            raise ConfigError("--system needs a chat template, and this model's tokenizer has none")
        self.question_prompt = loaded.target.question_prompt or "{question}"
        self.system: list[Message] = (
            [] if system is None else [{"role": "system", "content": system}]
        )
        self.messages: list[Message] = list(self.system)

    def ask(self, question: str, out: Any) -> str:
        """Add a question, stream the answer to `out`, keep both.

        An answer that is interrupted is kept as far as it was shown, and the interruption raised
        again.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        if not self.tokenizer.chat_template:
            # A base model continues a text; it has no turns to remember, only the words that its
            # run put around a question.
            content = self.question_prompt.replace("{question}", question)
            asked = [*self.system, {"role": "user", "content": content}]
        fitted = fit(
            asked,
            count_tokens=lambda messages: len(render(self.tokenizer, messages)),
            max_prompt_tokens=self.room,
        )
        if fitted.num_dropped_turns:
            print(
                f"(the context is full: the oldest {fitted.num_dropped_turns} turns are forgotten)",
                file=sys.stderr,
            )

        said: list[str] = []

        def show(text: str) -> None:
            said.append(text)
            out.write(text)
            out.flush()

        prompt = render(self.tokenizer, list(fitted.messages))
        try:
            generate(self.model, self.tokenizer, prompt, sampling=self.how, on_text=show)
        finally:
            answer = "".join(said)
            out.write("\n")
            out.flush()
            self.messages = [*fitted.messages, {"role": "assistant", "content": answer}]
        return answer


def chat(
    path: str,
    *,
    prompt: str | None,
    system: str | None,
    how: Sampling,
    max_new_tokens: int | None,
    base: bool,
    device: str,
) -> None:
    """Load and talk. Answers have up to 512 tokens if not said otherwise, or half of a shorter
    context."""
    if prompt is not None and not prompt.strip():
        raise ConfigError("--prompt is empty: give a question")
    target = resolve(path, device=device, base=base)
    if target.recipe.model.task != "causal-lm":
        raise ConfigError(
            f"{path} classifies and cannot talk: use nibble eval {path} for its scores"
        )
    loaded = load(target)
    if max_new_tokens is None:
        max_new_tokens = min(DEFAULT_NEW_TOKENS, max(1, context_of(loaded) // 2))
    session = Chat(loaded, system=system, how=replace(how, max_new_tokens=max_new_tokens))
    if prompt is not None:
        session.ask(prompt, sys.stdout)
        return
    converse(session)


def converse(session: Chat) -> None:
    """Read questions until the input ends."""
    interactive = sys.stdin.isatty()
    if interactive:
        print("Ctrl-C ends an answer, Ctrl-D the talk; /new starts over.", file=sys.stderr)
    while True:
        try:
            line = input("\n> " if interactive else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("(Ctrl-D or /quit ends)", file=sys.stderr)
            continue
        if line == "/quit":
            return
        if line == "/new":
            session.messages = list(session.system)
            continue
        if not line:
            continue
        try:
            session.ask(line, sys.stdout)
        except KeyboardInterrupt:
            print("(stopped)", file=sys.stderr)
        except DataError as error:
            # A question that is too long is no reason to lose the conversation.
            print(f"({error})", file=sys.stderr)
