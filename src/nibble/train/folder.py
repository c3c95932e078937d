"""The run folder: which run it is, that nobody else writes it, and whether a recipe may go on with
it.

    RUN/recipe.yaml      the resolved recipe          RUN/metrics.jsonl     one line a step
    RUN/versions.json    what computed it             RUN/checkpoint-N/     see checkpoint.py

A folder that holds steps of a run is never written over: one resumes it or names another. Resuming
compares the stored recipe with the given one field by field; a field that would make the rest of
the run another run is refused by name. The lock is the operating system's (flock), so it ends with
the process that holds it, however that ends. Of several processes only the first one writes here.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from nibble.errors import CheckpointError
from nibble.place.group import Group
from nibble.spec.config import Recipe
from nibble.spec.load import dump_recipe, recipe_dict
from nibble.train.checkpoint import all_checkpoints, latest

RECIPE, VERSIONS, METRICS, LOCK = "recipe.yaml", "versions.json", "metrics.jsonl", ".lock"

HARMLESS = (
    "output_dir",
    "report",
    "export",
    "place",
    "data.eval",
    "data.cache_dir",
    "train.max_steps",
    "train.epochs",
    "train.eval_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.log_every",
    "train.profile",
    "train.activation_checkpointing",
    "train.keep_blocks",
    "train.activation_offload",
    "train.mlp_tile_tokens",
    "train.loss_chunk_tokens",
    "train.cuda_graphs",
)
"""Fields, or sections, that a resumed run may change: how long, where, how often it is looked at,
and memory against time.
"""


class RunFolder:
    """A locked run folder; a context manager that gives the lock back."""

    def __init__(self, recipe: Recipe, *, resume: bool = False, group: Group | None = None) -> None:
        """Make or open `recipe.output_dir`; the first process of a group does, for all.

        Raises CheckpointError for a folder in use, one that holds a run when not resuming, one
        without a run when resuming, and a recipe that differs from the stored one where it matters.
        """
        self.path = Path(recipe.output_dir)
        self._lock: IO[str] | None = None
        self._writes = group is None or group.is_first
        self.resumed_from: Path | None = None
        if group is None:
            self._open(recipe, resume=resume)
        else:
            name = "the run folder"
            group.first_does(name, lambda: self._open(recipe, resume=resume))
            self.resumed_from = group.share(self.resumed_from, name)

    def _open(self, recipe: Recipe, *, resume: bool) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.path)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"output_dir={recipe.output_dir} cannot be a run folder ({error}): choose another"
            ) from None
        try:
            self._check(recipe, resume=resume)
        except BaseException:
            self._lock.close()
            raise
        self.resumed_from = latest(self.path) if resume else None
        for leftover in (
            *self.path.glob(".checkpoint-*.part"),
            *self.path.glob(".checkpoint-*.old"),
        ):
            _remove(leftover)
        self.write_recipe(recipe)

    def _check(self, recipe: Recipe, *, resume: bool) -> None:
        stored = self.path / RECIPE
        if not resume:
            if holds_a_run(self.path):
                raise CheckpointError(
                    f"{self.path} already holds a run: go on with --resume, or choose another"
                )
            return
        if not stored.is_file():
            raise CheckpointError(
                f"{self.path} holds no run to resume: leave out --resume to start one"
            )
        changed = changed_fields(read_recipe(stored), recipe)
        if changed:
            name, before, now = changed[0]
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise CheckpointError(
                f"{name}={now} differs from {before}, with which {self.path} was started{more}: "
                "resume with the old value, or start anew in another output_dir"
            )

    def write(self, name: str, text: str) -> None:
        """Replace a small file of the folder; the first process does."""
        if self._writes:
            write_text(self.path / name, text)

    def write_recipe(self, recipe: Recipe) -> None:
        """Store the recipe again, with what the data have settled since."""
        self.write(RECIPE, dump_recipe(recipe))

    def write_versions(self, versions: Mapping[str, Any]) -> None:
        """Store what computes the run."""
        self.write(VERSIONS, json.dumps(dict(versions), indent=1) + "\n")

    def __enter__(self) -> RunFolder:
        """The folder."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()


def holds_a_run(path: Path) -> bool:
    """Whether a folder has a checkpoint or a metric of a step after the first evaluation."""
    if all_checkpoints(path):
        return True
    metrics = path / METRICS
    return metrics.is_file() and any(step > 0 for step, _ in read_metrics(metrics))


def read_metrics(path: Path) -> list[tuple[int, str]]:
    """(step, line) of each whole line; what a crash cut short is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append((int(json.loads(line)["step"]), line))
        except (ValueError, KeyError, TypeError):
            continue
    return found


def keep_metrics_until(path: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run will do again; -1 drops all."""
    if path.is_file():
        write_text(path, "".join(f"{line}\n" for at, line in read_metrics(path) if at <= step))


def read_recipe(path: Path) -> Recipe:
    """A stored resolved recipe; CheckpointError if this nibble cannot read it."""
    import yaml

    try:
        return Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} cannot be read ({reason}): use the nibble that wrote it"
        ) from None


def changed_fields(old: Recipe, new: Recipe) -> list[tuple[str, Any, Any]]:
    """(name, old, new) of the fields that differ and are not harmless to change."""
    # What has no effect is not stored, so it must not count as a difference.
    before, now = (
        _flat(Recipe.model_validate(recipe_dict(one)).model_dump(mode="json")) for one in (old, new)
    )
    for settled in ("model.num_labels", "model.vocab_size"):  # by the data and the tokenizer
        if now[settled] is None:
            now[settled] = before[settled]
    return [
        (name, before.get(name), now.get(name))
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
        and not any(name == word or name.startswith(f"{word}.") for word in HARMLESS)
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def gather_versions(*, seed: int) -> dict[str, Any]:
    """Versions, devices, seed, and the commit where nibble runs from a git checkout."""
    import torch

    names = ("torch", "transformers", "safetensors", "tokenizers", "bitsandbytes", "triton")
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "nibble": _version("nibble"),
        **{name: found for name in names if (found := _version(name)) is not None},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(index) for index in gpus],
        "seed": seed,
        "command": sys.argv,
        "git_commit": _git_commit(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        words = ["git", "-C", str(root), "rev-parse", "HEAD"]
        return subprocess.run(
            words, capture_output=True, text=True, check=True, timeout=5
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def write_text(path: Path, text: str) -> None:
    """Replace a small file by a whole new one."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _lock(folder: Path) -> IO[str]:
    import fcntl

    file = (folder / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise CheckpointError(
            f"{folder} is being written by another process: wait, or choose another"
        ) from None
    return file


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
