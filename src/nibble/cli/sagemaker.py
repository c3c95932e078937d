"""A training job of SageMaker: its hyperparameters are the words of a recipe.

The training toolkit starts the entry point of a job as `python ENTRY --word value ...` with the
job's hyperparameters, and says in SM_* where things are. An entry point of two lines is enough:

    from nibble.cli.sagemaker import main
    raise SystemExit(main())

    hyperparameter `recipe`     a built-in recipe or a YAML file beside the entry point
    hyperparameter `export`     what the job's model is: adapter, merged or hf
    any other                   a word of the recipe, over what follows
    channel train, training     data.train        channel model    model.path
    channel eval, validation    data.eval
    /opt/ml/checkpoints         the run folder, if the job has a checkpoint_s3_uri: SageMaker keeps
                                it, and a job that was interrupted goes on from it
    SM_OUTPUT_DATA_DIR          the run folder of other jobs
    SM_MODEL_DIR                gets the export at the end, from the first host
    SM_HOSTS, SM_NUM_GPUS       one process for each GPU of each host

Source: the SageMaker training toolkit's ENVIRONMENT_VARIABLES.md and the service's page on
checkpoints. Spot interruptions come without a signal that reaches the entry point: what was done
since the last `train.save_every` is done again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nibble.cli import explain
from nibble.errors import ConfigError, NibbleError
from nibble.launch.leaving import leave
from nibble.launch.processes import INTERRUPTED
from nibble.spec.config import Recipe
from nibble.spec.load import load_recipe, parse_overrides

CHANNELS = {
    "data.train": ("TRAIN", "TRAINING"),
    "data.eval": ("EVAL", "VALIDATION"),
    "model.path": ("MODEL",),
}
"""Words of the recipe, and the channels that may carry them, the first one that is there."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a job asks for: a recipe, and the kind of export that becomes the job's model."""

    recipe: Recipe
    export: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the job that the arguments and the environment describe; returns the exit code."""
    try:
        task = read_task(sys.argv[1:] if arguments is None else arguments, os.environ)
        _train(task.recipe)
        if _is_first(os.environ):
            export_model(task, os.environ)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        sys.stderr.write(f"nibble: {line}\n")
        return error.exit_code if isinstance(error, NibbleError) else 1
    return 0


def read_task(arguments: Sequence[str], environment: Mapping[str, str]) -> Task:
    """The task of a job. Raises ConfigError for words that no recipe has."""
    given, texts = parse_overrides(arguments)
    name, export = texts.pop("recipe", None), texts.pop("export", None)
    words = {**channel_words(environment), **texts}
    words.setdefault("output_dir", str(run_folder(environment)))
    recipe = load_recipe(name, [f"{word}={text}" for word, text in words.items()])
    del given
    if export is None:
        export = "adapter" if recipe.adapter.kind in ("lora", "dora") else "hf"
    if export not in ("adapter", "merged", "hf"):
        raise ConfigError(f"export={export} is not one of adapter, merged, hf")
    return Task(recipe=recipe, export=export)


def channel_words(environment: Mapping[str, str]) -> dict[str, str]:
    """Words of the recipe for the input channels that a job has."""
    found = {}
    for word, channels in CHANNELS.items():
        paths = [environment.get(f"SM_CHANNEL_{channel}", "") for channel in channels]
        path = next((path for path in paths if path), None)
        if path is not None:
            found[word] = path
    return found


def run_folder(environment: Mapping[str, str]) -> Path:
    """Where a job's run goes: to the checkpoints that SageMaker keeps, where it keeps some."""
    kept = Path(environment.get("SM_MODEL_DIR", "/opt/ml/model")).parent / "checkpoints"
    if kept.is_dir():
        return kept
    return Path(environment.get("SM_OUTPUT_DATA_DIR", "/opt/ml/output/data")) / "run"


def _train(recipe: Recipe) -> None:
    from nibble.cli import train_recipe
    from nibble.cli.launching import Start

    if recipe.train.save_every is None:
        sys.stderr.write(
            "note: train.save_every is not set: a job that is interrupted starts from step 0\n"
        )
    train_recipe(recipe, start=Start(resume_if_begun=True))


def _is_first(environment: Mapping[str, str]) -> bool:
    """Whether this process is the first of the job, whoever started how many of them."""
    from nibble.launch.environment import detect

    launch = detect(environment)
    return launch is None or launch.rank == 0


def export_model(task: Task, environment: Mapping[str, str]) -> None:
    """Put the export into the folder that becomes the job's model.tar.gz, at its top."""
    from nibble.cli.exporting import export

    model = environment.get("SM_MODEL_DIR")
    if model is None:
        return
    folder = Path(model)
    # The folder itself may be a mount, which cannot be replaced by another folder.
    inside = folder / "export"
    export(task.recipe.output_dir, to=task.export, out=inside, max_divergence=None, device="auto")
    for file in inside.iterdir():
        file.rename(folder / file.name)
    inside.rmdir()


if __name__ == "__main__":
    sys.exit(leave(main()))
