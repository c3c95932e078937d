"""What RUN|MODEL means: a run folder, one of its checkpoints, an adapter folder of peft's, or any
model.

A run brings its recipe and newest checkpoint. An adapter brings the model that its
adapter_config.json names. A plain model is itself, in the type it computes in here, and classifies
if its config.json says so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from nibble.cli.quiet import quiet_libraries
from nibble.errors import CheckpointError, ConfigError, WeightError
from nibble.models.locate import locate, read_config
from nibble.place.activations import Activations
from nibble.place.base import Placement
from nibble.place.devices import pick_device
from nibble.place.single import one_device
from nibble.spec.config import Adapter, Model, Precision, Quant, Recipe, Train
from nibble.train.checkpoint import TRAINED, TRAINER, latest, load_trained
from nibble.train.folder import RECIPE, read_recipe
from nibble.use.assemble import Assembly, assemble, fill
from nibble.weights.adapter_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_adapter,
    read_adapter_config,
)

DATA = "data.json"
CLASSIFIER = "ForSequenceClassification"
PRECISIONS: dict[str | None, Precision] = {"float32": "fp32", "float16": "fp16"}


@dataclass(frozen=True, kw_only=True)
class Target:
    """A model to use: its recipe, and what was trained on top of the base.

    `label_names`, `stop_ids` and `question_prompt` are what the data of its run said, or the
    model's own config.
    """

    recipe: Recipe
    checkpoint: Path | None = None
    adapter_folder: Path | None = None
    run: Path | None = None
    label_names: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    question_prompt: str | None = None


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model in memory, ready to be asked."""

    target: Target
    assembly: Assembly
    model: nn.Module
    place: Placement


def resolve(path: str, *, device: str = "auto", base: bool = False) -> Target:
    """Find what `path` is. `base` asks for the model as it was before the run.

    Raises CheckpointError for a run without a checkpoint, ConfigError for an adapter that does not
    say what it belongs to.
    """
    quiet_libraries()
    folder = Path(path)
    if (folder / RECIPE).is_file():
        target = _run(folder, checkpoint=latest(folder), needs_checkpoint=not base)
    elif (folder / TRAINER).is_file() and (folder.parent / RECIPE).is_file():
        target = _run(folder.parent, checkpoint=folder, needs_checkpoint=True)
    elif (folder / CONFIG_FILE).is_file():
        target = _adapter(folder, device=device)
    elif base:
        raise ConfigError(f"--base is for runs, and {path} is a model: leave it out")
    else:
        target = _plain(path, device=device)
    if base:
        target = replace(
            target,
            checkpoint=None,
            adapter_folder=None,
            question_prompt=None,
            recipe=_bare(target.recipe),
        )
    place = target.recipe.place.model_copy(update={"device": device, "vram": None})
    return replace(target, recipe=target.recipe.model_copy(update={"place": place}))


def _run(folder: Path, *, checkpoint: Path | None, needs_checkpoint: bool) -> Target:
    if checkpoint is None and needs_checkpoint:
        raise CheckpointError(
            f"{folder} has no checkpoint yet: train it first, or ask with --base for the model "
            "that it starts from"
        )
    try:
        told = json.loads((folder / DATA).read_text(encoding="utf-8"))
        names, stops = tuple(told["label_names"]), tuple(told["stop_ids"])
        prompt = told["question_prompt"]
    except (OSError, ValueError, KeyError, TypeError):
        names, stops, prompt = (), (), None  # it stopped before its data were read
    return Target(
        recipe=read_recipe(folder / RECIPE),
        checkpoint=checkpoint,
        run=folder,
        label_names=names,
        stop_ids=stops,
        question_prompt=prompt,
    )


def _adapter(folder: Path, *, device: str) -> Target:
    adapter = read_adapter_config(folder)  # which also says when it is not JSON
    told = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    name = told.get("base_model_name_or_path")
    if not name:
        raise ConfigError(
            f"{folder / CONFIG_FILE} does not name its base model: fill in base_model_name_or_path"
        )
    words = Model(path=name)
    if told.get("task_type") == "SEQ_CLS":
        words = Model(path=name, task="classification", num_labels=_num_labels(folder))
    found = locate(name)
    train = _own_type(read_config(found) if found.is_dir() else {}, device=device)
    recipe = Recipe(model=words, adapter=adapter, train=train)
    return Target(recipe=recipe, adapter_folder=folder)


def _own_type(config: dict[str, Any], *, device: str) -> Train:
    """The type that a checkpoint was saved in; bf16 where it does not say."""
    precision = PRECISIONS.get(config.get("dtype") or config.get("torch_dtype"), "bf16")
    if precision == "fp16" and pick_device(device).type == "cpu":
        precision = "fp32"  # the arithmetic of fp16 is no CPU's
    return Train(precision=precision)


def _num_labels(folder: Path) -> int | None:
    """Rows of the classification head that an adapter folder holds: the narrowest weight in it."""
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        shapes = [
            file.get_slice(name).get_shape()
            for name in file.keys()  # noqa: SIM118 (not a dict)
            if name.endswith(".weight") and ".lora_" not in name
        ]
    return min((int(shape[0]) for shape in shapes if len(shape) == 2), default=None)


def _plain(path: str, *, device: str) -> Target:
    """A model as it is; its configuration says what it is for and in which type it was saved."""
    words = Model(path=path)
    found = locate(path)
    if not found.is_dir():
        return Target(recipe=Recipe(model=words))
    config: dict[str, Any] = read_config(found)
    train = _own_type(config, device=device)
    if not any(str(name).endswith(CLASSIFIER) for name in config.get("architectures") or ()):
        return Target(recipe=Recipe(model=words, train=train))
    names = config.get("id2label") or {}
    if not isinstance(names, dict):
        raise WeightError(f"{found / 'config.json'}: id2label is {names!r}, not a mapping")
    words = words.model_copy(update={"task": "classification", "num_labels": len(names) or 2})
    ordered = tuple(str(names[key]) for key in sorted(names, key=int))
    own = () if all(name.startswith("LABEL_") for name in ordered) else ordered
    return Target(recipe=Recipe(model=words, train=train), label_names=own)


def _bare(recipe: Recipe) -> Recipe:
    """The recipe without what is trained; a frozen base keeps its storage."""
    quant = recipe.quant if recipe.adapter.kind != "none" else Quant()
    return recipe.model_copy(update={"adapter": Adapter(), "quant": quant})


def load(target: Target) -> Loaded:
    """Put the model on its device, with the newest trained tensors."""
    from nibble.cli.progress import loading_bar

    place = one_device(target.recipe.place)
    assembly = assemble(target.recipe, to_train=False)
    with loading_bar("loading") as advance:
        model = fill(assembly, place, activations=Activations(policy="none"), advance=advance)
    if target.checkpoint is not None:
        parameters = {n: p for n, p in model.named_parameters() if n in assembly.trained_names}
        load_trained(target.checkpoint, parameters)
    if target.adapter_folder is not None:
        load_adapter(model, target.adapter_folder)
    return Loaded(target=target, assembly=assembly, model=model.eval(), place=place)


def trained_file(target: Target) -> Path:
    """The file of trained tensors of a run's newest checkpoint."""
    if target.run is None or target.checkpoint is None:
        raise ConfigError("only a run folder can be exported: give the output_dir of a recipe")
    return target.checkpoint / TRAINED
