"""What RUN|MODEL means: a run folder, an adapter folder of peft's, or any model.

A run brings its recipe and newest checkpoint. An adapter brings the model that its
adapter_config.json names. A plain model is itself, in the type it computes in here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from nibble.errors import CheckpointError, ConfigError
from nibble.place.single import Single
from nibble.spec.config import Adapter, Model, Quant, Recipe
from nibble.train.checkpoint import TRAINED, latest, load_trained
from nibble.train.folder import RECIPE, read_recipe
from nibble.use.assemble import Assembly, assemble, fill
from nibble.weights.adapter_files import load_adapter, read_adapter_config

PEFT_CONFIG = "adapter_config.json"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A model to use: its recipe, and what was trained on top of the base."""

    recipe: Recipe
    checkpoint: Path | None = None
    adapter_folder: Path | None = None
    run: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model in memory, ready to be asked."""

    target: Target
    assembly: Assembly
    model: nn.Module
    place: Single


def resolve(path: str, *, device: str = "auto", base: bool = False) -> Target:
    """Find what `path` is. `base` asks for the model as it was before the run.

    Raises CheckpointError for a run without a checkpoint, ConfigError for an adapter that does not
    say what it belongs to.
    """
    folder = Path(path)
    if (folder / RECIPE).is_file():
        recipe = read_recipe(folder / RECIPE)
        checkpoint = latest(folder)
        if checkpoint is None and not base:
            raise CheckpointError(
                f"{folder} has no checkpoint yet: train it first, or ask with --base for the model "
                "that it starts from"
            )
        target = Target(recipe=recipe, checkpoint=checkpoint, run=folder)
    elif (folder / PEFT_CONFIG).is_file():
        target = _adapter(folder)
    else:
        if base:
            raise ConfigError(f"--base is for runs, and {path} is a model: leave it out")
        target = Target(recipe=Recipe(model=Model(path=path)))
    if base:
        target = replace(target, checkpoint=None, adapter_folder=None, recipe=_bare(target.recipe))
    place = target.recipe.place.model_copy(update={"device": device, "vram": None})
    return replace(target, recipe=target.recipe.model_copy(update={"place": place}))


def _adapter(folder: Path) -> Target:
    import json

    name = json.loads((folder / PEFT_CONFIG).read_text()).get("base_model_name_or_path")
    if not name:
        raise ConfigError(
            f"{folder / PEFT_CONFIG} does not name its base model: fill in base_model_name_or_path"
        )
    recipe = Recipe(model=Model(path=name), adapter=read_adapter_config(folder))
    return Target(recipe=recipe, adapter_folder=folder)


def _bare(recipe: Recipe) -> Recipe:
    """The recipe without what is trained; a frozen base keeps its storage."""
    quant = recipe.quant if recipe.adapter.kind != "none" else Quant()
    return recipe.model_copy(update={"adapter": Adapter(), "quant": quant})


def load(target: Target) -> Loaded:
    """Put the model on its device, with the newest trained tensors."""
    from nibble.cli.progress import loading_bar

    place = Single(target.recipe.place)
    assembly = assemble(target.recipe, to_train=False)
    with loading_bar("loading") as advance:
        model = fill(assembly, place, checkpointing="none", advance=advance)
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
