"""Tokenised rows, laid end to end in flat tensors.

Row i is ids[offsets[i]:offsets[i+1]]; targets marks the tokens that are learnt, so that
label[t] = ids[t+1] where targets[t+1]. The first token of a row is never a target: nothing stands
before it to predict it. A token costs 5 bytes and a row 20, so 100 M tokens are half a GiB of host
memory; nothing is padded here and no Python object is kept per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One row: token ids int32 [n], targets bool [n], and for classification its label and the
    segment of each token uint8 [n]."""

    ids: Tensor
    targets: Tensor
    label: float | None = None
    type_ids: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """A store of rows that can be pickled; ids int32, targets bool, offsets int64 [rows + 1].

    `file_of` and `line_of` say where each row came from. `labels` (float64 [rows]) and
    `label_names` are there for classification; regression has labels and no names. `type_ids` is
    None when every token is of segment 0.
    """

    ids: Tensor
    targets: Tensor
    offsets: Tensor
    files: tuple[str, ...]
    file_of: Tensor
    line_of: Tensor
    labels: Tensor | None = None
    label_names: tuple[str, ...] = ()
    type_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, int64 [rows]."""
        return self.offsets.diff()

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return self.ids.numel()

    @property
    def num_targets(self) -> int:
        """Tokens that are learnt; rows for classification."""
        return len(self) if self.labels is not None else int(self.targets.sum())

    def row(self, index: int) -> Row:
        """Views of one row."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return Row(
            ids=self.ids[part],
            targets=self.targets[part],
            label=None if self.labels is None else float(self.labels[index]),
            type_ids=None if self.type_ids is None else self.type_ids[part],
        )

    def source(self, index: int) -> str:
        """Where the row came from, as file:line."""
        return f"{self.files[int(self.file_of[index])]}:{int(self.line_of[index])}"

    def select(self, indices: Sequence[int] | Tensor) -> Rows:
        """A copy of some rows, in the order given."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        lengths = self.lengths[chosen]
        offsets = torch.zeros(len(chosen) + 1, dtype=torch.int64)
        torch.cumsum(lengths, 0, out=offsets[1:])
        shift = (self.offsets[:-1][chosen] - offsets[:-1]).repeat_interleave(lengths)
        tokens = torch.arange(int(offsets[-1])) + shift
        return Rows(
            ids=self.ids[tokens],
            targets=self.targets[tokens],
            offsets=offsets,
            files=self.files,
            file_of=self.file_of[chosen],
            line_of=self.line_of[chosen],
            labels=None if self.labels is None else self.labels[chosen],
            label_names=self.label_names,
            type_ids=None if self.type_ids is None else self.type_ids[tokens],
        )


def join(parts: Sequence[Rows]) -> Rows:
    """The rows of several stores, one after the other; all of one task, at least one."""
    first = parts[0]
    files = tuple(name for part in parts for name in part.files)
    starts = torch.tensor([0, *(part.num_tokens for part in parts)]).cumsum(0)
    file_starts = torch.tensor([0, *(len(part.files) for part in parts)]).cumsum(0)
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts, strict=False)]
    file_of = [part.file_of + start for part, start in zip(parts, file_starts, strict=False)]

    labels = [part.labels for part in parts if part.labels is not None]
    assert len(labels) in (0, len(parts)), "rows of different tasks"
    kinds = None
    if any(part.type_ids is not None for part in parts):
        kinds = torch.cat(
            [
                torch.zeros(part.num_tokens, dtype=torch.uint8)
                if part.type_ids is None
                else part.type_ids
                for part in parts
            ]
        )
    return Rows(
        ids=torch.cat([part.ids for part in parts]),
        targets=torch.cat([part.targets for part in parts]),
        offsets=torch.cat([*offsets, starts[-1:]]),
        files=files,
        file_of=torch.cat(file_of).to(torch.int32),
        line_of=torch.cat([part.line_of for part in parts]),
        labels=torch.cat(labels) if labels else None,
        label_names=first.label_names,
        type_ids=kinds,
    )


def show_row(rows: Rows, index: int, *, tokenizer: Any) -> list[tuple[str, bool]]:
    """One row as (text of the token, whether it is trained) pairs, to be shown to a person.

    A character cut into several tokens appears as the replacement character.
    """
    row = rows.row(index)
    ids = row.ids.tolist()

    def decode(parts: list[list[int]]) -> list[str]:
        texts: list[str] = tokenizer.batch_decode(
            parts, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return texts

    # A token's leading space shows only behind another token.
    alone = decode([[token] for token in ids])
    pairs = decode([list(pair) for pair in pairwise(ids)])
    texts = alone[:1]
    for before, pair, text in zip(alone, pairs, alone[1:], strict=False):
        texts.append(pair.removeprefix(before) if pair.startswith(before) else text)
    return list(zip(texts, row.targets.tolist(), strict=True))
