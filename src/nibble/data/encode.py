"""Examples to tokens, and which of them are learnt.

    Completion, Conversation    with a chat template: the rendered conversation (`chat.py`);
                                without: prompt + completion as one text, then the end token
    Document                    the text with the tokenizer's own begin and end tokens
    Labelled                    as the tokenizer joins a text or a pair

A text is tokenised once, in batches, with the characters that each token covers; a token is learnt
if it covers any character of an answer, so one that straddles the seam belongs to the answer. A
row cut at max_length gets no end token: a model must not learn to stop in mid-sentence. The
characters come from the tokenizer; one that cannot tell them is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibble.data.chat import Chat, Rendered, with_system
from nibble.data.formats import Completion, Conversation, Document, Example, Labelled, Message
from nibble.data.report import EMPTY, NO_TARGET, TOO_LONG, TRUNCATED
from nibble.errors import ConfigError, DataError
from nibble.spec.config import Data

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One row. `length` is before truncation; `detail` says what was cut or why it is dropped."""

    ids: Ids
    targets: Mask
    length: int
    fate: str | None = None
    detail: str = ""
    type_ids: NDArray[np.uint8] | None = None
    label: str | int | float | None = None

    @property
    def kept(self) -> bool:
        """Whether the row is learnt, if only in part."""
        return self.fate in (None, TRUNCATED)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A tokenizer with the recipe's words. `template` is the chat template in force, if any."""

    tokenizer: Any
    data: Data
    template: str | None

    @cached_property
    def chat(self) -> Chat:
        """The chat template as an object; ConfigError when the tokenizer has none."""
        if self.template is None:
            raise ConfigError(
                "the data are conversations and the tokenizer has no chat template: set "
                "data.chat_template to a Jinja file, or take an instruction-tuned model's tokenizer"
            )
        return Chat(tokenizer=self.tokenizer, template=self.template)

    def messages(self, example: Completion | Conversation) -> list[Message]:
        """The conversation that the chat template renders."""
        if isinstance(example, Conversation):
            return with_system(example.messages, self.data.system)
        turns = [
            {"role": "user", "content": example.prompt},
            {"role": "assistant", "content": example.completion},
        ]
        return with_system(turns, self.data.system)

    def render(self, example: Example) -> Rendered:
        """The text of an example and what of it is learnt, or RowProblem."""
        every = self.data.loss_on == "all"
        if isinstance(example, Document):
            return Rendered(text=example.text, spans=None, add_end=True)
        assert not isinstance(example, Labelled)
        if self.template is not None or isinstance(example, Conversation):
            return self.chat.answers(self.messages(example), every_token=every)
        prompt = plain_prompt(example)
        text = prompt + example.completion
        return Rendered(
            text=text, spans=None if every else ((len(prompt), len(text)),), add_end=True
        )

    def encode(
        self, rendered: Sequence[Rendered], *, chat: bool, document: bool
    ) -> list[list[Encoded]]:
        """Rows of each text: one, or several where a `document` is cut to be packed.

        `chat`: the texts already hold every special token.
        """
        needs_offsets = any(one.spans is not None for one in rendered)
        if needs_offsets:
            check_offsets(self.tokenizer)
        out = self.tokenizer(
            [one.text for one in rendered],
            add_special_tokens=not chat,
            return_offsets_mapping=needs_offsets,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        rows = []
        for number, one in enumerate(rendered):
            ids = np.asarray(out["input_ids"][number], dtype=np.int32)
            if one.spans is None:
                targets = np.ones(len(ids), dtype=np.bool_)
            else:
                offsets = np.asarray(out["offset_mapping"][number], dtype=np.int64).reshape(-1, 2)
                targets = covered(offsets, one.spans)
            if one.add_end:
                ids, targets = self._with_end(ids, targets)
            if len(targets):
                targets[0] = False
            rows.append(self._fit(ids, targets, document=document))
        return rows

    def _with_end(self, ids: Ids, targets: Mask) -> tuple[Ids, Mask]:
        end = self.tokenizer.eos_token_id
        if end is None:
            raise ConfigError(
                "the tokenizer has no end token (eos_token), so an answer could not be ended: set "
                "it in the tokenizer's files"
            )
        if len(ids) and ids[-1] == end:  # some tokenizers write it themselves
            return ids, np.append(targets[:-1], np.True_)
        return np.append(ids, np.int32(end)), np.append(targets, np.True_)

    def _fit(self, ids: Ids, targets: Mask, *, document: bool) -> list[Encoded]:
        """One row of at most max_length, or what is to be said about it; documents to be packed
        become as many rows as it takes."""
        limit, length = self.data.max_length, len(ids)
        if document and self.data.packing and length > limit:
            pieces = [slice(begin, begin + limit) for begin in range(0, length, limit)]
            rows = [(ids[piece], targets[piece].copy()) for piece in pieces]
            for _, mask in rows:
                mask[0] = False
            return [
                Encoded(ids=part, targets=mask, length=len(part))
                for part, mask in rows
                if mask.any()
            ]
        if length <= limit:
            fate, detail = (None, "") if targets.any() else (NO_TARGET, "no token to be trained")
        elif self.data.too_long == "truncate":
            ids, targets = ids[:limit], targets[:limit]
            cut = f"{length} tokens, cut to {limit}"
            fate, detail = (
                (TRUNCATED, cut) if targets.any() else (NO_TARGET, f"{cut}: its answer is cut off")
            )
        else:
            fate, detail = TOO_LONG, f"{length} tokens, more than max_length {limit}"
        return [Encoded(ids=ids, targets=targets, length=length, fate=fate, detail=detail)]

    def encode_labelled(self, examples: Sequence[Labelled]) -> list[Encoded]:
        """Rows for classification. The tokenizer cuts what is too long, so that its special tokens
        stay."""
        whole = self._joined(examples, limit=None)
        rows = []
        for number, example in enumerate(examples):
            length = len(whole["input_ids"][number])
            fate, detail, out, at = None, "", whole, number
            if length > self.data.max_length:
                fate = TRUNCATED if self.data.too_long == "truncate" else TOO_LONG
                detail = f"{length} tokens, more than max_length {self.data.max_length}"
                if fate == TRUNCATED:
                    out, at = self._joined([example], limit=self.data.max_length), 0
            ids = np.asarray(out["input_ids"][at], dtype=np.int32)
            if not len(ids):
                fate, detail = EMPTY, "no token"
            kinds = np.zeros(len(ids), dtype=np.uint8)
            if "token_type_ids" in out:
                kinds = np.asarray(out["token_type_ids"][at], dtype=np.uint8)
            rows.append(
                Encoded(
                    ids=ids,
                    targets=np.zeros(len(ids), dtype=np.bool_),
                    length=length,
                    fate=fate,
                    detail=detail,
                    type_ids=kinds,
                    label=example.label,
                )
            )
        return rows

    def _joined(self, examples: Sequence[Labelled], *, limit: int | None) -> Any:
        pairs = [example.text_pair for example in examples]
        return self.tokenizer(
            [example.text for example in examples],
            None if any(pair is None for pair in pairs) else pairs,
            truncation=limit is not None,
            max_length=limit,
            return_attention_mask=False,
            verbose=False,
        )


def plain_prompt(example: Completion) -> str:
    """The prompt for a model without a chat template."""
    return example.prompt if example.plain_prompt is None else example.plain_prompt


def covered(offsets: NDArray[np.int64], spans: Sequence[tuple[int, int]]) -> Mask:
    """Which tokens, given the characters [begin, end) of each, cover a character of a span."""
    begin, end = offsets[:, 0], offsets[:, 1]
    mask = np.zeros(len(offsets), dtype=np.bool_)
    for first, last in spans:
        mask |= (end > first) & (begin < last) & (end > begin)
    return mask


def check_offsets(tokenizer: Any) -> None:
    """DataError if the tokenizer cannot tell which characters a token covers."""
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} does not tell which characters a token covers, so answers "
            "cannot be told from prompts: use a tokenizer with a tokenizer.json, or loss_on: all"
        )


def too_long_error(row: Encoded, where: str) -> DataError:
    """What data.too_long: error says."""
    return DataError(
        f"{where} has {row.detail}, and data.too_long is error: raise data.max_length, or set "
        "too_long to truncate or drop"
    )
