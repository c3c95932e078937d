"""What happened to the rows on their way from a file to the model: counted, and named by file and
line.

Nothing is dropped in silence. Each row that is not learnt as it stands has one of five fates, and
the first few of each are kept with their place and the reason. It costs one integer a fate and
NUM_EXAMPLES strings; it is not a log of every bad row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MALFORMED = "malformed"
"""Not a row at all: bad JSON, not UTF-8, a missing or wrongly typed field."""
EMPTY = "empty"
"""Nothing but white space where the text to learn should be."""
TOO_LONG = "too long"
"""Longer than max_length and dropped."""
TRUNCATED = "truncated"
"""Longer than max_length; its head is learnt."""
NO_TARGET = "no target"
"""No token of it would be trained (its answer lies beyond max_length, or it has none)."""
DROPPED = (MALFORMED, EMPTY, TOO_LONG, NO_TARGET)
NUM_EXAMPLES = 5


class RowProblem(Exception):
    """One row cannot be learnt: caught where rows are counted, never shown as an error."""

    def __init__(self, fate: str, detail: str) -> None:
        super().__init__(detail)
        self.fate = fate
        self.detail = detail


@dataclass
class Tally:
    """The counts of one source while it is read. `examples` hold (file number, line, detail)."""

    num_read: int = 0
    longest: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[tuple[int, int, str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, fate: str, *, file: int, line: int, detail: str) -> None:
        """Count one row and keep it as an example if it is among the first."""
        self.counts[fate] = self.counts.get(fate, 0) + 1
        examples = self.examples.setdefault(fate, [])
        if len(examples) < NUM_EXAMPLES:
            examples.append((file, line, detail))

    def note(self, text: str) -> None:
        """Keep something a user should know, once."""
        if text not in self.notes:
            self.notes.append(text)


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """The rows of one split: what is left, and what became of the rest.

    Lengths are tokens; `longest` is before truncation. `examples` gives for each fate the first
    few rows as "file:line: detail".
    """

    num_rows: int = 0
    num_read: int = 0
    num_tokens: int = 0
    num_target_tokens: int = 0
    longest: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def num_dropped(self) -> int:
        """Rows that were read and are not learnt."""
        return sum(self.counts.get(fate, 0) for fate in DROPPED)

    def lines(self) -> list[str]:
        """The report for a person: notes, the sum, then every fate with examples."""
        if not self.num_read:  # it is read while training
            return [*self.notes]
        out = [
            *self.notes,
            f"{self.num_rows:,} rows of {self.num_read:,} read, {self.num_tokens:,} tokens, "
            f"{self.num_target_tokens:,} of them trained, the longest row {self.longest:,}",
        ]
        for fate, count in self.counts.items():
            verb = "learnt in part" if fate == TRUNCATED else "dropped"
            out.append(f"{count:,} {fate} ({verb}), such as")
            out += [f"  {example}" for example in self.examples.get(fate, ())]
        return out


def first_problem(tallies: list[tuple[Tally, tuple[str, ...]]]) -> str:
    """The first row that was dropped as "file:line: detail", or an empty string."""
    for fate in DROPPED:
        for tally, files in tallies:
            for file, line, detail in tally.examples.get(fate, [])[:1]:
                return f"{files[file]}:{line}: {detail}"
    return ""


def summarise(
    tallies: list[tuple[Tally, tuple[str, ...]]],
    *,
    num_rows: int,
    num_tokens: int,
    num_target_tokens: int,
) -> DataReport:
    """One report of several sources, each a tally with the names of its files."""
    counts: dict[str, int] = {}
    examples: dict[str, tuple[str, ...]] = {}
    for tally, files in tallies:
        for fate, count in tally.counts.items():
            counts[fate] = counts.get(fate, 0) + count
            named = [f"{files[file]}:{line}: {what}" for file, line, what in tally.examples[fate]]
            examples[fate] = (*examples.get(fate, ()), *named)[:NUM_EXAMPLES]
    return DataReport(
        num_rows=num_rows,
        num_read=sum(tally.num_read for tally, _ in tallies),
        num_tokens=num_tokens,
        num_target_tokens=num_target_tokens,
        longest=max((tally.longest for tally, _ in tallies), default=0),
        counts=counts,
        examples=examples,
        notes=tuple(dict.fromkeys(note for tally, _ in tallies for note in tally.notes)),
    )
