"""One process of the test of recorded passes; what it finds goes to a file."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from graph_models import Case, FakeRecorder, train

from nibble.launch.leaving import leave
from nibble.place.group import Group
from nibble.place.single import Single
from nibble.spec.config import Place
from nibble.train import graphs

CASE = Case(packed=True, length=64, accumulation=2, answers=True)


def main(folder: Path) -> None:
    """Train together, and on the first process alone as well."""
    words = Place(device="cpu", kind="ddp", timeout_s=60)
    recorder = FakeRecorder()
    graphs.recorder_of = lambda place, model: recorder  # type: ignore[assignment]
    with Group.from_environment(words) as group:
        if group.rank == 1:
            recorder.refusal = "no"  # the others may record, whatever this one does
        place = Single(words, group)
        seen = train(CASE, folder / "run", graphs="on", place=place)
        told = {"together": seen, "replayed": recorder.num_replayed}
        if group.is_first:
            told["alone"] = train(replace(CASE, accumulation=4), folder / "alone", graphs="off")
        torch.save(told, folder / f"graphs-{group.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)  # gloo's threads may not see Python end
