"""Checkpoints: a run's state in a folder that is either whole or not there.

    RUN/checkpoint-N/trained.safetensors    every trained tensor, exact, under the module's names
                     optimizer.safetensors  the optimiser's state, and its numbers in
                     optimizer.json         (optimizer_state.py)
                     rng.pt                 generators of random numbers of each process
                                            (read with weights_only=True)
                     trainer.json           step, data position, loss scale, versions, sizes of all
                                            files
                     adapter_model.safetensors, adapter_config.json    when an adapter is trained:
                     peft's files

Tensors are whole, so a run goes on with any number of processes and any placement. They are
gathered one at a time; the first process writes, and each one reads its own slice. With as many
processes as before, each gets its generators back; otherwise they are seeded anew, from those of
the first one.

A checkpoint is written under another name, flushed to the disk and renamed, so a crash or a full
disk leaves the ones before as they were and nothing that looks like a new one. Old ones go only
after the new one stands. Costs: the trained weights and the optimiser's state once more on the disk
for each one kept. No pickle is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from nibble.errors import CheckpointError
from nibble.place.base import Placement
from nibble.train.int8_weights import DenseFile
from nibble.train.optimizer_state import read_optimizer, write_optimizer
from nibble.train.state import Numbers, TrainState, rng_state, seed_everything, set_rng_state
from nibble.train.whole import Piece, WholeFile, rows_of, write_whole

TRAINED, RNG, TRAINER = "trained.safetensors", "rng.pt", "trainer.json"
PREFIX = "checkpoint-"
FORMAT = 2
OLD_FORMAT, OLD_OPTIMIZER = 1, "optimizer.pt"
"""Of one process: its state in torch's order of parameters."""

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

        All processes must come; the first one writes. Raises CheckpointError, on all of them, when
        it cannot be written (a full disk); what was there before is then untouched. The caller has
        made sure that the state is finite.
        """
        final = self.run / f"{PREFIX}{state.step}"
        if _shared(state.place, final.exists()):
            return final
        refusal, cause = None, None
        try:
            self._write_and_name(final, state)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not _is_about_writing(error):
                raise
            refusal, cause = (
                (
                    f"{final} could not be written ({_reason(error)}); {self._kept()}: "
                    "free some space and go on with --resume"
                ),
                error,
            )
        refusal = _shared(state.place, refusal)
        if refusal is not None:
            raise CheckpointError(refusal) from cause
        if _writes(state.place):
            self.prune()
        return final

    def _write_and_name(self, final: Path, state: TrainState) -> None:
        """Write under another name, and give it the name when all of it is on the disk."""
        part = self.run / f".{final.name}.part"
        if not _writes(state.place):
            self._write(part, state)
            return
        _remove(part)
        failure: OSError | None = None
        try:
            try:
                part.mkdir(parents=True)
            except OSError as error:
                failure = error  # the others are waiting to send: let them
            self._write(part, state)
            if failure is not None:
                raise failure
            _flush(part)
            part.rename(final)
            _sync(self.run)
        finally:
            _remove(part)

    def _write(self, folder: Path, state: TrainState) -> None:
        place = state.place
        failure: Exception | None = None
        for write in (_write_trained, write_optimizer):
            try:
                write(folder, state)
            except OSError as error:
                failure = failure or error
        generators = _generators(place)
        if failure is not None:
            raise failure
        if not _writes(place):
            return
        with (folder / RNG).open("wb") as file:
            torch.save({"ranks": generators}, file)
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
        folder: Path | None = _shared(state.place, self.latest())
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
    if version not in (OLD_FORMAT, FORMAT):
        raise CheckpointError(
            f"{folder} has format {version}, this nibble reads {OLD_FORMAT} and {FORMAT}: "
            "use the one that wrote it"
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
    load_trained(folder, state.kept(), state.place)
    if (folder / OLD_OPTIMIZER).is_file():
        _load_old(folder, state)
    else:
        read_optimizer(folder, state)
    numbers.put(state)
    _set_generators(_read(folder / RNG), state.place)


def _load_old(folder: Path, state: TrainState) -> None:
    """The optimiser of a checkpoint of format 1."""
    place = state.place
    if place is not None and place.num_parts > 1:
        raise CheckpointError(
            f"{folder} has the old format, which goes on unsharded only: use place.kind=ddp once"
        )
    state.optimizer.load_state_dict(_read(folder / OLD_OPTIMIZER))


def load_trained(
    folder: Path, parameters: Mapping[str, Any], place: Placement | None = None
) -> None:
    """Copy the trained tensors of a checkpoint, or the parts that live here, into parameters of the
    same names, shapes and types.

    Raises CheckpointError, with nothing copied, when they are not the same.
    """
    path = folder / TRAINED
    file = WholeFile(path)
    if file.names != set(parameters):
        file = DenseFile(path)  # a model to be used, of weights that were trained as INT8
    different = sorted(file.names ^ set(parameters))
    if different:
        where = "the checkpoint" if different[0] in file.names else "the model"
        raise CheckpointError(
            f"{path} does not fit: {different[0]} is only in {where} "
            f"(and {len(different) - 1} more); resume with the recipe that wrote it"
        )
    views = {name: None if place is None else place.view(name) for name in parameters}
    for name, parameter in parameters.items():
        view = views[name]
        wanted = tuple(parameter.shape) if view is None else view.shape
        if file.shape(name) != wanted:
            raise CheckpointError(
                f"{path}: {name} is {list(file.shape(name))}, the model has {list(wanted)}; "
                "resume with the recipe that wrote it"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            view = views[name]
            dim = None if view is None else view.dim
            rows = None
            if view is not None and dim is not None:
                rows = rows_of(view, parameter.shape[dim])
            parameter.copy_(file.read(name, dim, rows))
    if place is not None:
        place.follow()


def _write_trained(folder: Path, state: TrainState) -> None:
    place = state.place
    pieces = {
        name: Piece.of(p.detach(), None if place is None else place.view(name))
        for name, p in state.kept().items()
    }
    write_whole(folder / TRAINED, pieces, place)


def _generators(place: Placement | None) -> list[dict[str, Any]]:
    """The generators of each process."""
    if place is None or place.world == 1:
        return [rng_state()]
    mine = rng_state(place.device)
    return list(place.group.gather(mine, "the generators of random numbers"))


def _set_generators(saved: Mapping[str, Any], place: Placement | None) -> None:
    """Go on with the own generators; with another number of processes with new ones."""
    states = saved.get("ranks", [saved])
    rank, world = (0, 1) if place is None else (place.rank, place.world)
    if len(states) == world:
        set_rng_state(states[rank], None if place is None or world == 1 else place.device)
        return
    known = bytes(states[0]["torch"].tolist())
    key = known + f" {rank} of {world}".encode()
    seed_everything(int.from_bytes(hashlib.sha256(key).digest()[:7], "little"))


def _writes(place: Placement | None) -> bool:
    return place is None or place.rank == 0


def _shared(place: Placement | None, value: Any) -> Any:
    """What the first process says."""
    return value if place is None else place.group.share(value, "the checkpoint")


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
