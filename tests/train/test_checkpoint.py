"""Checkpoints are whole or absent, and refuse what does not fit."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from loop_fakes import make_state
from safetensors.torch import load_file

from nibble.errors import CheckpointError
from nibble.train import checkpoint
from nibble.train.checkpoint import Checkpoints, all_checkpoints, latest, load, load_trained


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """A real failing write: the kernel refuses to let any file grow further."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_written_is_what_was_trained(tmp_path: Path) -> None:
    state = make_state()
    state.model.get_parameter("embed.weight").requires_grad_(False)
    state.model.get_parameter("inner.weight").data.mul_(1 / 3)
    state.step = 7
    folder = Checkpoints(tmp_path, keep=2, versions={"nibble": "x"}).save(state)
    tensors = load_file(folder / "trained.safetensors")
    assert set(tensors) == {"inner.weight", "inner.bias", "head.weight"}
    for name, value in state.trained().items():
        assert tensors[name].dtype == value.dtype and torch.equal(tensors[name], value)
    text = json.loads((folder / "trainer.json").read_text())
    assert text["step"] == 7 and text["versions"] == {"nibble": "x"}
    assert set(text["files"]) == {
        "trained.safetensors",
        "optimizer.safetensors",
        "optimizer.json",
        "rng.pt",
    }
    load_file(folder / "optimizer.safetensors")
    torch.load(folder / "rng.pt", weights_only=True)


def test_files_for_others_come_along_and_are_counted(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "adapter_config.json").write_text("{}")

    folder = Checkpoints(tmp_path, keep=2, write_model=write).save(make_state())
    assert json.loads((folder / "trainer.json").read_text())["files"]["adapter_config.json"] == 2


@pytest.mark.parametrize("limit_bytes", [100, 3000])
def test_a_disk_that_is_full_leaves_the_earlier_checkpoint_and_nothing_else(
    limit_bytes: int, tmp_path: Path
) -> None:
    state, keeper = make_state(), Checkpoints(tmp_path, keep=1)
    state.step = 1
    keeper.save(state)
    before = tree(tmp_path)
    state.step = 2
    with files_of_at_most(limit_bytes), pytest.raises(CheckpointError) as told:
        keeper.save(state)
    assert "checkpoint-2 could not be written" in str(told.value)
    assert "checkpoint-1 is intact" in str(told.value) and "\n" not in str(told.value)
    assert tree(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert keeper.save(state) == tmp_path / "checkpoint-2"  # and goes on when there is space


def test_no_space_when_flushing_counts_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*no earlier checkpoint"):
        Checkpoints(tmp_path, keep=1).save(make_state())
    assert list(tmp_path.iterdir()) == []


def test_a_kill_while_writing_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    state = make_state()
    with pytest.raises(KeyboardInterrupt):
        Checkpoints(tmp_path, keep=1, write_model=killed).save(state)
    (tmp_path / ".checkpoint-9.part").mkdir()  # what a power cut leaves
    (tmp_path / "checkpoint-8").mkdir()  # no trainer.json: somebody's own folder
    assert latest(tmp_path) is None


def test_a_bug_is_not_called_a_full_disk(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory"):
        Checkpoints(tmp_path, keep=1, write_model=broken).save(make_state())


def test_the_oldest_go_and_the_last_good_one_stays(tmp_path: Path) -> None:
    state, keeper = make_state(), Checkpoints(tmp_path, keep=2)
    for step in (2, 9, 10, 100):
        state.step = step
        keeper.save(state)
    assert [p.name for p in all_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]
    with files_of_at_most(100), pytest.raises(CheckpointError):
        state.step = 101
        Checkpoints(tmp_path, keep=1).save(state)
    assert [p.name for p in all_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]


def test_the_same_step_is_written_once(tmp_path: Path) -> None:
    state, keeper = make_state(), Checkpoints(tmp_path, keep=2)
    folder = keeper.save(state)
    before = tree(folder)
    state.model.get_parameter("inner.bias").data.add_(1)
    assert keeper.save(state) == folder and tree(folder) == before


@pytest.mark.parametrize(
    "name", ["trained.safetensors", "optimizer.safetensors", "optimizer.json", "rng.pt"]
)
@pytest.mark.parametrize("how", ["short", "gone"])
def test_a_damaged_checkpoint_is_named(name: str, how: str, tmp_path: Path) -> None:
    state = make_state()
    path = Checkpoints(tmp_path, keep=2).save(state) / name
    if how == "short":
        path.write_bytes(path.read_bytes()[:-50])
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match=name):
        Checkpoints(tmp_path, keep=2).resume(make_state())


def test_a_scrambled_file_of_the_right_size_is_named(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path, keep=2).save(make_state())
    path = folder / "optimizer.safetensors"
    path.write_bytes(bytes(len(path.read_bytes())))
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
        load(folder, make_state())
    (folder / "trainer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"trainer\.json is damaged"):
        load(folder, make_state())


def test_no_pickle_is_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "executed",)

    folder = Checkpoints(tmp_path, keep=2).save(make_state())
    (folder / "rng.pt").write_bytes(pickle.dumps(Evil()))
    text = json.loads((folder / "trainer.json").read_text())
    text["files"].pop("rng.pt")
    (folder / "trainer.json").write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match=r"rng\.pt"):
        load(folder, make_state())
    assert not (tmp_path / "executed").exists()


def test_another_model_is_refused_before_a_weight_changes(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path, keep=2).save(make_state())
    other = make_state(seed=1)
    before = {n: p.detach().clone() for n, p in other.trained().items()}
    parameters = other.trained()
    with pytest.raises(CheckpointError, match="new is only in the model"):
        load_trained(folder, {**parameters, "new": parameters["inner.bias"]})
    with pytest.raises(CheckpointError, match=r"inner\.bias is only in the checkpoint"):
        load_trained(folder, {n: p for n, p in parameters.items() if n != "inner.bias"})
    with pytest.raises(
        CheckpointError, match=r"inner\.weight is \[16, 16\], the model has \[8, 32\]"
    ):
        wrong = torch.nn.Parameter(torch.zeros(8, 32))
        load_trained(folder, {**parameters, "inner.weight": wrong})
    assert all(torch.equal(before[n], p) for n, p in parameters.items())
