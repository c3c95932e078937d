"""Checkpoints: a run's state in a folder that is either whole or not there.

    RUN/checkpoint-N/trained.safetensors    every trained tensor, exact, under the module's names
                     optimizer.pt           the optimiser's state (read with weights_only=True)
                     rng.pt                 generators of random numbers trainer.json
                     step, data position, loss scale, versions, sizes of all files
                     adapter_model.safetensors, adapter_config.json    when an adapter is trained:
                     peft's files

A checkpoint is written under another name, flushed to the disk and renamed, so a crash or a full
disk leaves the ones before as they were and nothing that looks like a new one. Old ones go only
after the new one stands. Costs: the trained weights and the optimiser's state once more on the disk
for each one kept. No pickle is ever executed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nibble.errors import CheckpointError
from nibble.train.state import Numbers, TrainState, rng_state, set_rng_state

TRAINED, OPTIMIZER, RNG, TRAINER = "trained.safetensors", "optimizer.pt", "rng.pt", "trainer.json"
PREFIX = "checkpoint-"
FORMAT = 1

WriteModel = Callable[[Path], None]


class Checkpoints:
    """The checkpoints of one run folder. `write_model` adds files that other tools read (an adapter
    in peft's format).
    """

    def __init__(
        self,
        run: Path,
        *,
        keep: int,
        versions: dict[str, Any] | None = None,
        write_model: WriteModel | None = None,
    ) -> None:
        self.run = run
        self.keep = keep
        self.versions = versions or {}
        self.write_model = write_model

    def save(self, state: TrainState) -> Path:
        """Write the state as `checkpoint-STEP` and remove the oldest beyond `keep`.

        Raises CheckpointError when it cannot be written (a full disk); what was there before is
        then untouched. The caller has made sure that the state is finite.
        """
        final = self.run / f"{PREFIX}{state.step}"
        if final.exists():
            return final
        part = self.run / f".{final.name}.part"
        _remove(part)
        try:
            part.mkdir(parents=True)
            self._write(part, state)
            _flush(part)
            part.rename(final)
            _sync(self.run)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not _is_about_writing(error):
                raise
            raise CheckpointError(
                f"{final} could not be written ({_reason(error)}); {self._kept()}: "
                "free some space and go on with --resume"
            ) from error
        finally:
            _remove(part)
        self.prune()
        return final

    def _write(self, folder: Path, state: TrainState) -> None:
        tensors = {name: p.detach().contiguous() for name, p in state.trained().items()}
        save_file(tensors, folder / TRAINED, metadata={"format": "pt"})
        for name, content in ((OPTIMIZER, state.optimizer.state_dict()), (RNG, rng_state())):
            with (folder / name).open("wb") as file:
                torch.save(content, file)
        if self.write_model is not None:
            self.write_model(folder)
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        numbers = Numbers.of(state).as_dict()
        text = {"format": FORMAT, **numbers, "versions": self.versions, "files": sizes}
        (folder / TRAINER).write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")

    def latest(self) -> Path | None:
        """The newest checkpoint, or None."""
        return latest(self.run)

    def _kept(self) -> str:
        last = self.latest()
        return "there is no earlier checkpoint" if last is None else f"{last.name} is intact"

    def prune(self) -> None:
        """Remove all but the newest `keep`; each vanishes by name before its files go."""
        for path in all_checkpoints(self.run)[: -self.keep]:
            doomed = path.with_name(f".{path.name}.old")
            path.rename(doomed)
            _remove(doomed)

    def resume(self, state: TrainState) -> Path | None:
        """Load the newest checkpoint into the state, generators last; None if there is none.

        Raises CheckpointError for one that is damaged or does not fit the model.
        """
        folder = self.latest()
        if folder is not None:
            load(folder, state)
        return folder


def all_checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints by ascending step."""
    found = []
    for path in run.glob(f"{PREFIX}*"):
        number = path.name.removeprefix(PREFIX)
        if number.isdecimal() and (path / TRAINER).is_file():
            found.append((int(number), path))
    return [path for _, path in sorted(found)]


def latest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run folder, or None."""
    found = all_checkpoints(run)
    return found[-1] if found else None


def read_numbers(folder: Path) -> Numbers:
    """The numbers of a checkpoint, after comparing the sizes of its files; CheckpointError if it is
    damaged.
    """
    try:
        text = json.loads((folder / TRAINER).read_text(encoding="utf-8"))
        version, sizes = text["format"], text["files"]
        numbers = Numbers(**{f.name: text[f.name] for f in fields(Numbers)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / TRAINER} is damaged ({error}): use an older checkpoint"
        ) from None
    if version != FORMAT:
        raise CheckpointError(
            f"{folder} has format {version}, this nibble reads {FORMAT}: use the one that wrote it"
        )
    for name, size in sizes.items():
        path = folder / name
        there = path.stat().st_size if path.is_file() else -1
        if there != size:
            found = "is missing" if there < 0 else f"has {there} bytes of {size}"
            raise CheckpointError(
                f"{path} {found}: remove {folder.name} and go on from an older checkpoint"
            )
    return numbers


def load(folder: Path, state: TrainState) -> None:
    """Put a checkpoint into a state that was built from the same recipe."""
    numbers = read_numbers(folder)
    load_trained(folder, state.trained())
    state.optimizer.load_state_dict(_read(folder / OPTIMIZER))
    numbers.put(state)
    set_rng_state(_read(folder / RNG))


def load_trained(folder: Path, parameters: dict[str, Any]) -> None:
    """Copy the trained tensors of a checkpoint into parameters of the same names, shapes and types.

    Raises CheckpointError, with nothing copied, when they are not the same.
    """
    path = folder / TRAINED
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            stored = set(file.keys())
            different = sorted(stored ^ set(parameters))
            if different:
                where = "the checkpoint" if different[0] in stored else "the model"
                raise CheckpointError(
                    f"{path} does not fit: {different[0]} is only in {where} "
                    f"(and {len(different) - 1} more); resume with the recipe that wrote it"
                )
            for name, parameter in parameters.items():
                shape = tuple(file.get_slice(name).get_shape())
                if shape != tuple(parameter.shape):
                    raise CheckpointError(
                        f"{path}: {name} is {list(shape)}, the model has {list(parameter.shape)}; "
                        "resume with the recipe that wrote it"
                    )
            for name, parameter in parameters.items():
                parameter.copy_(file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): use an older checkpoint") from None


def _read(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({_reason(error)}): use an older checkpoint"
        ) from None
    except Exception as error:
        # pickle.UnpicklingError: the file holds more than tensors and numbers.
        raise CheckpointError(
            f"{path} holds something other than tensors ({_reason(error)})"
        ) from None


def all_finite(tensors: dict[str, Any]) -> str | None:
    """The first name whose tensor holds a value that is not finite, or None; one read from the
    device.
    """
    checks: list[Tensor] = [t.detach().isfinite().all() for t in tensors.values()]
    if not checks:
        return None
    flags = torch.stack([c.to(checks[0].device) for c in checks]).tolist()
    return next((name for name, fine in zip(tensors, flags, strict=True) if not fine), None)


def _is_about_writing(error: Exception) -> bool:
    if isinstance(error, OSError | SafetensorError):
        return True
    text = str(error)  # torch's own writer raises RuntimeError
    return "PytorchStreamWriter" in text or "unexpected pos" in text or "iostream" in text


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _flush(folder: Path) -> None:
    """Everything under `folder` on the disk, files before the folders that name them."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(root) / name)
        _sync(Path(root))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
