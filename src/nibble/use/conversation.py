"""A conversation that never outgrows the context.

Turns are messages ({"role", "content"}). When prompt and answer no longer fit, the oldest whole
turns go (a user message with the answers that follow it), never half a turn and never the system
message. Pure bookkeeping: the caller brings a function that counts the tokens of a rendered prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nibble.errors import DataError

Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A conversation that fits, and how many turns were dropped to make it fit."""

    messages: tuple[Message, ...]
    num_dropped_turns: int
    num_tokens: int


def split_turns(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """Split into the leading system messages and the turns, each beginning with a user message."""
    system: list[Message] = []
    turns: list[list[Message]] = []
    for message in messages:
        if message["role"] == "system" and not turns:
            system.append(message)
        elif message["role"] == "user" or not turns:
            turns.append([message])
        else:
            turns[-1].append(message)
    return system, turns


def fit(
    messages: Sequence[Message],
    *,
    count_tokens: Callable[[list[Message]], int],
    max_prompt_tokens: int,
) -> Fitted:
    """Drop the oldest whole turns until the rendered prompt has at most `max_prompt_tokens`.

    Raises DataError when the newest turn alone is too long.
    """
    system, turns = split_turns(messages)
    for num_dropped in range(max(len(turns), 1)):
        kept = [*system, *(message for turn in turns[num_dropped:] for message in turn)]
        num_tokens = count_tokens(kept)
        if num_tokens <= max_prompt_tokens:
            return Fitted(
                messages=tuple(kept), num_dropped_turns=num_dropped, num_tokens=num_tokens
            )
    raise DataError(
        f"this message has {num_tokens} tokens with its system text, and the model has room for "
        f"{max_prompt_tokens} beside the answer: shorten it or ask for fewer new tokens"
    )
