"""What methods were measured to learn: reference runs of this project, from a table.

    quality loss = what the full method (or else 16-bit LoRA) reached less what this one reached,
                   in runs of one set, which differ in the method alone

Perplexities are told apart by their logarithms, in nats as losses are. Where a set has no such
reference, the loss is not measured, and nothing takes its place: numbers of papers are about other
data and other code. Each run names its command, commit and result file in
`quality.toml`; a test compares them with what is published.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

NOT_MEASURED, REFERENCE = "not measured", "reference"
PERPLEXITY = "perplexity"
REFERENCES = ("full", "lora")
"""Methods that others of the same set are held against, the first that is there."""


@dataclass(frozen=True, kw_only=True)
class ReferenceRun:
    """One run: what was trained by which method, and the metric before and after."""

    method: str
    set: str
    model: str
    task: str
    metric: str
    after: float
    better: str
    command: str
    commit: str
    result: str
    before: float | None = None
    settings: str = ""

    @property
    def words(self) -> str:
        """What it reached, in a line."""
        begun = "" if self.before is None else f"{self.before:g} -> "
        return f"{self.metric}: {begun}{self.after:g} ({self.task}, {self.model})"


@dataclass(frozen=True, kw_only=True)
class Loss:
    """How much worse a method did than the reference of its set; below 0 it did better."""

    run: ReferenceRun
    reference: ReferenceRun

    @property
    def amount(self) -> float:
        """In units of the metric, of a perplexity in nats."""
        if self.run.metric == PERPLEXITY:
            return math.log(self.run.after / self.reference.after)
        gap = self.run.after - self.reference.after
        return gap if self.run.better == "lower" else -gap

    @property
    def words(self) -> str:
        """The amount with its sign."""
        name, _, unit = self.run.metric.partition(", ")
        in_nats = name == PERPLEXITY or unit == "nats"
        return f"{self.amount:+.2g} {'nats' if in_nats else name}"


@cache
def reference_runs() -> tuple[ReferenceRun, ...]:
    """All runs of the table."""
    text = files("nibble.spec").joinpath("quality.toml").read_text(encoding="utf-8")
    return tuple(ReferenceRun(**row) for row in tomllib.loads(text)["run"])


def runs_of(method: str, runs: tuple[ReferenceRun, ...] | None = None) -> list[ReferenceRun]:
    """The runs of a method."""
    return [run for run in (reference_runs() if runs is None else runs) if run.method == method]


def losses_of(method: str, runs: tuple[ReferenceRun, ...] | None = None) -> list[Loss]:
    """Of each run of the method that has a reference in its set, how far it is behind."""
    known = reference_runs() if runs is None else runs
    found = []
    for run in runs_of(method, known):
        others = [o for o in known if o.set == run.set and o.metric == run.metric and o is not run]
        for name in REFERENCES:
            reference = next((other for other in others if other.method == name), None)
            if reference is not None and method != name:
                found.append(Loss(run=run, reference=reference))
                break
            if method == name:
                break  # a reference is held against those above it only
    return found


def is_reference(method: str, runs: tuple[ReferenceRun, ...] | None = None) -> bool:
    """Whether the losses of other methods are differences from runs of this one."""
    known = reference_runs() if runs is None else runs
    methods = {run.method for run in known} - {method}
    return any(loss.reference.method == method for m in methods for loss in losses_of(m, known))
