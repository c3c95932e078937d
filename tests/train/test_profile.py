"""The profiler writes what it promises, for the steps it was asked for."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import torch
from loop_fakes import make_state, run

from nibble.spec.config import Profile
from nibble.train.profile import Profiler


def test_the_steps_asked_for_are_traced(tmp_path: Path) -> None:
    notes: list[str] = []
    folder = tmp_path / "profile"
    profiler = Profiler(
        Profile(start_step=3, num_steps=2),
        folder=folder,
        device=torch.device("cpu"),
        note=notes.append,
    )
    run(make_state(), tmp_path, profiler=profiler)
    assert notes == [f"profile of 2 steps written to {folder}"]
    with gzip.open(folder / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    embeddings = [e for e in events if e.get("name") == "aten::embedding"]
    assert len(embeddings) == 2 * 2  # two steps of two micro-batches
    assert "aten::addmm" in (folder / "operators.txt").read_text()
    with (folder / "memory.csv").open() as table:
        rows = list(csv.DictReader(table))
    times = [float(r["time_us"]) for r in rows]
    assert len(rows) > 20 and times == sorted(times)
    assert any(int(r["change_bytes"]) < 0 for r in rows) and {r["device"] for r in rows} == {"cpu"}
    assert not (folder / "trace.json").exists()


def test_a_run_that_ends_inside_the_window_still_writes(tmp_path: Path) -> None:
    folder = tmp_path / "profile"
    profiler = Profiler(
        Profile(start_step=2, num_steps=50, memory=False),
        folder=folder,
        device=torch.device("cpu"),
        note=lambda text: None,
    )
    run(make_state(), tmp_path, profiler=profiler, max_steps=3)
    assert {p.name for p in folder.iterdir()} == {"trace.json.gz", "operators.txt"}


def test_a_run_resumed_beyond_the_window_profiles_its_first_steps(tmp_path: Path) -> None:
    run(make_state(), tmp_path, max_steps=4)
    state = make_state()
    state.step = 4
    folder = tmp_path / "profile"
    profiler = Profiler(
        Profile(start_step=1, num_steps=1), folder=folder, device=torch.device("cpu"), note=print
    )
    run(state, tmp_path, profiler=profiler)
    with gzip.open(folder / "trace.json.gz") as file:
        names = [e.get("name") for e in json.load(file)["traceEvents"]]
    assert names.count("aten::embedding") == 2
