"""Data sets that have a name: where their rows are and how they are read.

The names and prompts are those of the fsdp_qlora training script, so that `--dataset alpaca` means
here what it means there; `dataset: alpaca` in a recipe works too. Plain values only, nothing is
fetched: `data/` reads the sources. Two differences, on purpose: `num_rows` takes the first rows
where that script shuffles orca_math first, and guanaco's conversations are one text, all of it
trained, where that script masks the first question.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nibble.errors import ConfigError

DEFAULT_SAMPLES = 512


@dataclass(frozen=True, kw_only=True)
class NamedDataset:
    """The fields of one data source, and how the script that named it uses it."""

    source: Mapping[str, Any]
    takes_samples: bool = False
    """Whether a number of rows belongs to the name (alpaca_sample)."""
    eval_rows: int | None = None
    """Rows that the script holds out."""


NAMED: dict[str, NamedDataset] = {
    "alpaca": NamedDataset(source={"path": "yahma/alpaca-cleaned", "format": "alpaca"}),
    "alpaca_sample": NamedDataset(
        source={"path": "yahma/alpaca-cleaned", "format": "alpaca"}, takes_samples=True
    ),
    "dummy": NamedDataset(source={"path": "builtin:dummy"}, takes_samples=True),
    "guanaco": NamedDataset(source={"path": "timdettmers/openassistant-guanaco", "format": "text"}),
    "sql": NamedDataset(
        source={
            "path": "knowrohit07/know_sql",
            "split": "validation",
            "format": "prompt-completion",
            "columns": {"completion": "answer"},
            "template": "###Context:\n{context}\n###Question:\n{question}\n###Answer:\n",
        },
        eval_rows=1000,
    ),
    "orca_math": NamedDataset(
        source={
            "path": "microsoft/orca-math-word-problems-200k",
            "format": "prompt-completion",
            "columns": {"completion": "answer"},
            "template": "###Question:\n{question}\n###Answer:\n",
        },
        takes_samples=True,
    ),
}


def sources(name: str, *, num_rows: int | None = None) -> list[dict[str, Any]]:
    """The sources of a named data set as plain values.

    `num_rows` limits it; a set that is a sample by name has 512 rows unless told. Raises
    ConfigError for an unknown name.
    """
    if name not in NAMED:
        raise ConfigError(f"data set {name!r} is not one of {', '.join(NAMED)}")
    named = NAMED[name]
    rows = DEFAULT_SAMPLES if num_rows is None and named.takes_samples else num_rows
    return [{**named.source, **({} if rows is None else {"num_rows": rows})}]
