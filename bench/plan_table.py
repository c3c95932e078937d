"""The table of `plan_error.py report`: errors of the plan by kind of configuration."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plan_rows import Row, parse

GIB = 1 << 30
LIMITS = {"reserved": 0.05, "host": 0.10, "step": 0.20}
"""Errors that are aimed at."""
MOST_UNDER = 0.03
OUTSIDE = ("cuda_context", "allocator")
Planned = Callable[[Row, dict[str, Any], dict[str, Any]], dict[str, Any]]
"""A row's plan by the present code, for the machine of a file's first line and the row's own."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Relative errors of one row: planned over measured, minus one."""

    row: Row
    line: dict[str, Any]
    planned: dict[str, Any]
    workspace_bytes: int
    """Of cuBLAS, which the process had reserved before the row."""

    @property
    def is_recorded(self) -> bool:
        """Whether its passes were replayed as CUDA graphs."""
        return bool(self.line.get("num_graphs"))

    @property
    def measured_bytes(self) -> int:
        return int(self.line["reserved_bytes"]) + self.workspace_bytes

    @property
    def reserved(self) -> float:
        return float(self.planned["reserved_bytes"] / self.measured_bytes - 1)

    @property
    def allocated(self) -> float:
        """Of tensors alone, without what the allocator loses; where passes are recorded, of what
        comes before: it does not count what a recording keeps.
        """
        measured = self.line["measured"]
        names = ("load", "first step") if self.is_recorded else tuple(measured)
        seen = max(measured[name]["allocated_bytes"] for name in names)
        said = max(
            sum(size for part, size in phase["device"].items() if part not in OUTSIDE)
            for name, phase in self.planned["phases"].items()
            if name in names
        )
        return float(said / seen - 1)

    @property
    def host(self) -> float | None:
        """What blocks and activations take of the host, where they take any."""
        parts = self.planned["phases"]["steady step"]["host"]
        said = parts["streamed_base"] + parts["offloaded_activations"]
        seen = self.line["host_bytes"] - self.line["host_before_bytes"]
        return float(said / seen - 1) if said and seen > 0 else None

    @property
    def step(self) -> float | None:
        said = self.planned["step_s"]
        return None if not said else float(said / self.line["step_s"] - 1)

    def phases(self) -> str:
        """GiB planned and measured, allocated, of each phase."""
        told = []
        for name, seen in self.line["measured"].items():
            device = self.planned["phases"][name]["device"]
            said = sum(size for part, size in device.items() if part not in OUTSIDE)
            told.append(f"{name} {said / GIB:.3f}/{seen['allocated_bytes'] / GIB:.3f}")
        return ", ".join(told)


def report(arguments: list[str], *, planned: Planned) -> int:
    """Print the tables of files of lines; returns 0."""
    parser = argparse.ArgumentParser(prog="plan_error.py report")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--again", action="store_true", help="plan anew with the present code")
    parser.add_argument("--worst", type=int, default=10)
    options = parser.parse_args(arguments)
    lines = [
        json.loads(line)
        for name in options.files
        for line in Path(name).read_text(encoding="utf-8").splitlines()
        if line.startswith("{")
    ]
    workspace = next((line["workspace_bytes"] for line in lines if "workspace_bytes" in line), 0)
    found, about = [], {}
    for line in lines:
        if line["bench"] == "about":
            about = line
        if line["bench"] != "row" or "reserved_bytes" not in line or "step_s" not in line:
            continue
        row = parse(line["row"])
        made = planned(row, about, line) if options.again else line["planned"]
        found.append(Compared(row=row, line=line, planned=made, workspace_bytes=workspace))
    text = ["\n".join(_tables(found, options.worst))]
    failed = [line for line in lines if "error" in line or "out_of_memory" in line]
    text += [f"- {line['row']}: {line.get('error', 'out of memory')}" for line in failed]
    print("\n".join(text))
    return 0


def _tables(found: list[Compared], worst: int) -> Iterable[str]:
    for title, some in (
        ("calibration", [one for one in found if not one.row.held_out]),
        ("held out", [one for one in found if one.row.held_out]),
    ):
        if not some:
            continue
        yield f"\n### {title}: {len(some)} configurations\n"
        yield (
            "| group | rows | mean | within 5 % | most under | most over | tensors, mean "
            "| step within 20 % |"
        )
        yield "|---|---|---|---|---|---|---|---|"
        yield _line("all", some)
        for name, group in _groups(some):
            yield _line(name, group)
        yield ""
        for one in some:
            if one.host is not None:
                yield f"- host {one.host:+.1%} {one.row.name}"
        ordered = sorted(some, key=lambda one: -abs(one.reserved))
        for one in ordered[:worst]:
            yield (
                f"- {one.reserved:+.1%} {one.row.name}: planned "
                f"{one.planned['reserved_bytes'] / GIB:.3f} GiB ({one.planned['peak']}), measured "
                f"{one.measured_bytes / GIB:.3f}; allocated {one.phases()}"
            )


def _line(name: str, some: list[Compared]) -> str:
    errors = [one.reserved for one in some]
    steps = [one.step for one in some if one.step is not None]
    right = sum(abs(error) <= LIMITS["reserved"] for error in errors) / len(errors)
    timed = sum(abs(error) <= LIMITS["step"] for error in steps) / max(1, len(steps))
    mean = statistics.mean(map(abs, errors))
    return (
        f"| {name} | {len(some)} | {mean:.1%} | {right:.0%} | {min(errors):+.1%} | "
        f"{max(errors):+.1%} | {statistics.mean(abs(one.allocated) for one in some):.2%} | "
        f"{f'{timed:.0%}' if steps else ''} |"
    )


def _groups(some: list[Compared]) -> Iterable[tuple[str, list[Compared]]]:
    keys: tuple[Callable[[Compared], str], ...] = (
        lambda one: "replayed" if one.is_recorded else "eager",
        lambda one: one.row.family,
        lambda one: one.row.method,
        lambda one: one.row.policy,
        lambda one: " ".join(one.row.more) or "plain",
        lambda one: _size(one.row.rows * one.row.length),
    )
    for key in keys:
        names = sorted({key(one) for one in some})
        for name in names:
            yield name, [one for one in some if key(one) == name]


def _size(tokens: int) -> str:
    return next(
        word
        for limit, word in (
            (512, "up to 512 tokens"),
            (4096, "up to 4k tokens"),
            (1 << 40, "more tokens"),
        )
        if tokens <= limit
    )
