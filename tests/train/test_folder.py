"""Run folders: never written over, never by two, and resumed only by the same recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from loop_fakes import make_state

from nibble.errors import CheckpointError
from nibble.spec.config import Recipe
from nibble.train.checkpoint import Checkpoints
from nibble.train.folder import (
    HARMLESS,
    RunFolder,
    changed_fields,
    gather_versions,
    keep_metrics_until,
    read_metrics,
    read_recipe,
)


def recipe(folder: Path, **sections: Any) -> Recipe:
    return Recipe.model_validate({"model": {"path": "m"}, "output_dir": str(folder), **sections})


def start(folder: Path, **sections: Any) -> None:
    """A run that was stopped after a checkpoint."""
    with RunFolder(recipe(folder, **sections)):
        Checkpoints(folder, keep=2).save(make_state())


def test_the_resolved_recipe_is_stored_and_reads_back(tmp_path: Path) -> None:
    given = recipe(tmp_path / "run", train={"max_steps": 7}, data={"train": [{"path": "x.jsonl"}]})
    with RunFolder(given) as folder:
        stored = folder.path / "recipe.yaml"
        assert read_recipe(stored) == given
        assert yaml.safe_load(stored.read_text())["optim"]["learning_rate"] == 2e-4  # defaults too


def test_a_folder_with_a_run_is_refused(tmp_path: Path) -> None:
    start(tmp_path)
    with pytest.raises(CheckpointError, match=r"already holds a run.*--resume"):
        RunFolder(recipe(tmp_path))


def test_a_folder_whose_run_never_stepped_may_be_used_again(tmp_path: Path) -> None:
    with RunFolder(recipe(tmp_path)) as folder:
        (folder.path / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 3.0}\n')
    with RunFolder(recipe(tmp_path, optim={"learning_rate": 1.0})):
        pass
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    with pytest.raises(CheckpointError, match="already holds a run"):
        RunFolder(recipe(tmp_path))


def test_resuming_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run to resume"):
        RunFolder(recipe(tmp_path), resume=True)
    start(tmp_path)
    with RunFolder(recipe(tmp_path), resume=True) as folder:
        assert folder.resumed_from == tmp_path / "checkpoint-0"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optim.learning_rate", 1.0), ("train.seed", 3), ("quant.format", "nf4"),
        ("adapter.kind", "lora"), ("train.micro_batch_size", 2), ("data.packing", True),
        ("data.eval_rows", 5), ("model.path", "other"), ("train.precision", "fp32"),
    ],
)  # fmt: skip
def test_a_field_that_makes_another_run_is_named(name: str, value: object, tmp_path: Path) -> None:
    start(tmp_path)
    section, field = name.split(".")
    words = {"path": "m"} if section == "model" else {}
    with pytest.raises(CheckpointError, match=rf"{name}={value} differs from"):
        RunFolder(recipe(tmp_path, **{section: {**words, field: value}}), resume=True)
    with RunFolder(recipe(tmp_path), resume=True):  # the refusal gave the lock back
        pass


def test_how_long_and_where_may_change(tmp_path: Path) -> None:
    start(tmp_path, train={"max_steps": 3})
    changed = recipe(
        tmp_path,
        train={"max_steps": 9, "save_every": 2, "log_every": 5, "activation_checkpointing": "none"},
        report={"sinks": ["plain"]},
        place={"device": "cpu"},
    )
    with RunFolder(changed, resume=True) as folder:
        assert read_recipe(folder.path / "recipe.yaml").train.max_steps == 9


def test_every_harmless_word_is_a_field() -> None:
    fields = set()

    def walk(model: Any, prefix: str) -> None:
        for name, info in model.model_fields.items():
            fields.add(prefix + name)
            inner = info.annotation
            if isinstance(inner, type) and hasattr(inner, "model_fields"):
                walk(inner, f"{prefix}{name}.")

    walk(Recipe, "")
    assert set(HARMLESS) <= fields
    assert "data.eval_rows" in fields and "data.eval_rows" not in HARMLESS
    one = Recipe.model_validate({"model": {"path": "m"}, "data": {"eval_rows": 3}})
    two = Recipe.model_validate({"model": {"path": "m"}, "data": {"eval_rows": 4}})
    assert changed_fields(one, two) == [("data.eval_rows", 3, 4)]


def test_two_processes_never_write_one_run(tmp_path: Path) -> None:
    code = (
        "import sys; from nibble.spec.config import Recipe; "
        "from nibble.train.folder import RunFolder; "
        "RunFolder(Recipe.model_validate({'model': {'path': 'm'}, 'output_dir': sys.argv[1]}))"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    with RunFolder(recipe(tmp_path)):
        other = subprocess.run(words, capture_output=True, text=True, check=False)
        assert other.returncode != 0
        assert "is being written by another process" in other.stderr
    assert subprocess.run(words, capture_output=True, check=False).returncode == 0


def test_what_a_power_cut_left_is_cleared(tmp_path: Path) -> None:
    start(tmp_path)
    for name in (".checkpoint-4.part", ".checkpoint-1.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trained.safetensors").write_bytes(b"half")
    with RunFolder(recipe(tmp_path), resume=True):
        names = {p.name for p in tmp_path.iterdir()}
    assert names == {".lock", "checkpoint-0", "recipe.yaml"}


def test_metrics_beyond_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "loss": 1.0}) for s in (1, 2, 2, 3, 4)]
    path.write_text("\n".join(lines) + '\n{"step": 5, "lo')  # cut short by a crash
    assert [s for s, _ in read_metrics(path)] == [1, 2, 2, 3, 4]
    keep_metrics_until(path, 2)
    assert path.read_text() == "".join(f"{line}\n" for line in lines[:3])
    keep_metrics_until(path, -1)
    assert path.read_text() == ""


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"output_dir=.*cannot be a run folder") as told:
        RunFolder(recipe(tmp_path / "file" / "run"))
    assert "\n" not in str(told.value)


def test_versions_say_what_computed_the_run() -> None:
    import torch
    import transformers

    found = gather_versions(seed=4)
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert found["transformers"] == transformers.__version__
    assert found["seed"] == 4 and {"nibble", "python", "cuda", "gpus", "git_commit"} <= set(found)
