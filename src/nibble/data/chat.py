"""Conversations as text, and where in that text the answers are.

The whole conversation is rendered once by the tokenizer's chat template and later tokenised once;
prompt and answer are never tokenised apart and glued, since a tokenizer merges across the seam.
What is learnt is therefore a set of character spans [begin, end) of the rendered text:

    begin   where the template's own prompt for an answer ends, because that is what the model is
            given when it is asked;
    end     after the token that stops the answer (<|im_end|>, <end_of_turn>, </s>, ...), because a
            model that never learnt it does not stop. White space that a template writes after it
            is not learnt.

Both come from rendering prefixes of the conversation, which holds as long as a prefix renders to a
prefix. Templates that rewrite history (drop earlier thoughts, move the system message) break that;
then, in this order: the template's own {% generation %} marks; the text around stand-ins that
replace the answers. A row for which all of them fail is counted as malformed, never guessed.

Where a template writes no special token after an answer, the special token that opens the next
turn is what stops the model (GLM), and after the last answer the tokenizer's end token is added.
Costs 1 + 2 * answers renderings a conversation, some 0.1 ms each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nibble.data.formats import Message
from nibble.data.report import EMPTY, MALFORMED, NO_TARGET, RowProblem
from nibble.errors import ConfigError, DataError

Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A text to tokenise and the spans of characters to learn (None: all of it).

    `add_end`: the tokenizer's end token follows as an id of its own, and is learnt.
    """

    text: str
    spans: tuple[Span, ...] | None
    add_end: bool


def read_template(path: str) -> str:
    """The text of a Jinja file; DataError if it cannot be read."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.chat_template {path} cannot be read ({error})") from None


def chat_template(tokenizer: Any, *, override: str | None = None) -> str | None:
    """The template in force: the recipe's file, else the tokenizer's (its default, if it has
    several)."""
    if override is not None:
        return read_template(override)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template or None


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A tokenizer's template with the words needed to find answers in what it renders."""

    tokenizer: Any
    template: str
    _tokens: tuple[str, ...] = field(init=False, repr=False)
    _special: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        tokens = {str(token) for token in self.tokenizer.all_special_tokens}
        tokens |= {
            token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special
        }
        longest_first = tuple(sorted((t for t in tokens if t), key=len, reverse=True))
        pattern = "|".join(map(re.escape, longest_first)) or r"(?!)"
        object.__setattr__(self, "_tokens", longest_first)
        object.__setattr__(self, "_special", re.compile(pattern))

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """The conversation as text; with `prompt`, ready to be answered.

        RowProblem carries what the template objects to.
        """
        import jinja2

        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"the chat template is not valid Jinja (line {error.lineno}: {error.message})"
            ) from None
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise RowProblem(MALFORMED, f"the chat template refuses it: {error}") from None
        return str(text)

    def answers(self, messages: Sequence[Message], *, every_token: bool = False) -> Rendered:
        """The whole conversation with the spans of its answers.

        RowProblem when it has no answer, an empty one, or one that cannot be found.
        """
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise RowProblem(NO_TARGET, "no message of the assistant")
        for i in turns:
            if (
                not str(messages[i].get("content") or "").strip()
                and "tool_calls" not in messages[i]
            ):
                raise RowProblem(EMPTY, f"the answer in message {i + 1} is empty")
        text = self.render(messages)
        if every_token:
            stops = self._ends_special(text.rstrip())
            return Rendered(text=text if stops else text.rstrip(), spans=None, add_end=not stops)
        spans = self._by_prefix(messages, turns, text)
        if spans is None:
            spans = self._by_marks(messages, text)
        if spans is None:
            spans = self._by_stand_ins(messages, turns, text)
        if spans is None:
            raise RowProblem(
                MALFORMED, "its answers cannot be found in what the chat template renders"
            )
        return self._with_stops(text, spans)

    def _ends_special(self, text: str) -> bool:
        """Whether the last thing in the text is a special token."""
        return text.endswith(self._tokens)

    def _by_prefix(
        self, messages: Sequence[Message], turns: list[int], text: str
    ) -> list[Span] | None:
        """Spans from prefixes of the conversation; only the ends may come from stand-ins."""
        spans: list[Span] = []
        ends: list[Span] | None = None
        for number, i in enumerate(turns):
            try:
                before = self.render(messages[:i], prompt=True) if i else ""
                through = text if i == len(messages) - 1 else self.render(messages[: i + 1])
            except RowProblem:
                return None
            if not i or not text.startswith(before):
                return None
            if text.startswith(through) and len(through) > len(before):
                spans.append((len(before), len(through)))
                continue
            ends = ends or self._by_stand_ins(messages, turns, text)
            if ends is None or ends[number][1] <= len(before):
                return None
            spans.append((len(before), ends[number][1]))
        return spans

    def _by_marks(self, messages: Sequence[Message], text: str) -> list[Span] | None:
        """Spans that the template marks with {% generation %}."""
        if not re.search(r"\{%-?\s*generation\s*-?%\}", self.template):
            return None
        marked = self.tokenizer.apply_chat_template(
            list(messages),
            chat_template=self.template,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
        )
        spans: list[Span] = []
        previous = False
        for (begin, end), inside in zip(
            marked["offset_mapping"], marked["assistant_masks"], strict=True
        ):
            if inside and previous:
                spans[-1] = (spans[-1][0], end)
            elif inside:
                spans.append((begin, end))
            previous = bool(inside)
        return spans or None

    def _by_stand_ins(
        self, messages: Sequence[Message], turns: list[int], text: str
    ) -> list[Span] | None:
        """Spans of the answers' own text: what stands between the pieces that stay the same when
        every answer is replaced by a stand-in."""
        stand_in = {i: f"\ue000{number}\ue001" for number, i in enumerate(turns)}
        try:
            skeleton = self.render(
                [{**m, "content": stand_in[i]} if i in stand_in else m
                 for i, m in enumerate(messages)]
            )  # fmt: skip
        except RowProblem:
            return None
        if re.findall("\ue000.*?\ue001", skeleton) != list(stand_in.values()):
            return None
        pieces = re.split("\ue000.*?\ue001", skeleton)
        if not text.startswith(pieces[0]) or not text.endswith(pieces[-1]):
            return None
        spans: list[Span] = []
        begin = len(pieces[0])
        for piece in pieces[1:-1]:
            end = text.find(piece, begin)
            if end < 0:
                return None
            spans.append((begin, end))
            begin = end + len(piece)
        last = len(text) - len(pieces[-1])
        return [*spans, (begin, last)] if last >= begin else None

    def _with_stops(self, text: str, spans: list[Span]) -> Rendered:
        """Spans that include the stop token of each answer."""
        found: list[Span] = []
        add_end = False
        for begin, end in spans:
            bare = begin + len(text[begin:end].rstrip())
            if self._ends_special(text[begin:bare]):
                found.append((begin, bare))
                continue
            following = re.compile(r"\s*").match(text, end)
            assert following is not None
            stop = self._special.match(text, following.end())
            if stop:
                found.append((begin, stop.end()))
            elif following.end() == len(text):
                add_end = True
                text = text[:bare]
                found.append((begin, bare))
            else:
                found.append((begin, bare))
        return Rendered(text=text, spans=tuple(found), add_end=add_end)


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """The conversation, with the system message in front if it has none."""
    if system is None or (messages and messages[0]["role"] == "system"):
        return list(messages)
    return [{"role": "system", "content": system}, *messages]
