"""`nibble eval`: numbers that say how good a model is on text, on rows, or at a task."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import typer

from nibble.cli.loading import Loaded, load, resolve
from nibble.data import Splits, prepare
from nibble.errors import ConfigError, DataError
from nibble.spec.config import Data, Recipe, Source
from nibble.use.evaluate import Scores, answers_rouge, rows_scores, text_perplexity


def evaluate(
    path: str,
    *,
    text: Path | None,
    data: str | None,
    context_length: int | None,
    num_rouge_rows: int | None,
    num_rows: int | None,
    base: bool,
    device: str,
    as_json: bool,
) -> None:
    """Measure what was asked for; a run without further words is measured on its held-out rows."""
    if text is not None and data is not None:
        raise ConfigError("--text and --data are two questions: ask one at a time")
    if context_length is not None and text is None:
        raise ConfigError("--context-length is for --text: leave it out")
    if text is not None and (num_rouge_rows is not None or num_rows is not None):
        raise ConfigError("--rouge and --num-rows are for rows: leave them out with --text")
    target = resolve(path, device=device, base=base)
    recipe = _with_rows(target.recipe, data=data, needs_rows=text is None)
    if num_rouge_rows is not None and recipe.model.task == "classification":
        raise ConfigError("--rouge compares texts, and this model classifies: leave it out")
    loaded = load(target)
    recipe = _within_context(recipe, loaded, is_plain=target.run is None)
    if text is not None:
        found = text_perplexity(
            loaded.model, loaded.assembly, loaded.place, path=text, context_length=context_length
        )
    else:
        found = _rows(loaded, recipe, num_rows=num_rows, num_rouge_rows=num_rouge_rows)
    _show(found, as_json=as_json)


def _with_rows(recipe: Recipe, *, data: str | None, needs_rows: bool) -> Recipe:
    if data is not None:
        like = recipe.data.train[0] if recipe.data.train else None
        # As the run read its own rows, but all of them, and from where --data says.
        own = {"path": data, "name": None, "split": None, "num_rows": None}
        source = Source(path=data) if like is None else like.model_copy(update=own)
        words = recipe.data if recipe.data.train else Data()
        rows = words.model_copy(update={"train": (source,), "eval": (source,), "eval_rows": None})
        return recipe.model_copy(update={"data": rows})
    if needs_rows and not recipe.data.train:
        raise ConfigError("nothing to measure on: give --text FILE or --data SET")
    if needs_rows and not recipe.data.eval and recipe.data.eval_rows is None:
        raise ConfigError("this run held no rows out: give --text FILE or --data SET")
    return recipe


def _within_context(recipe: Recipe, loaded: Loaded, *, is_plain: bool) -> Recipe:
    """Rows no longer than the model has positions: a run's were checked when it was trained."""
    limit = loaded.assembly.built.family.max_positions
    if not is_plain or limit is None or limit >= recipe.data.max_length:
        return recipe
    shorter = recipe.data.model_copy(update={"max_length": limit})
    return recipe.model_copy(update={"data": shorter})


def _rows(
    loaded: Loaded, recipe: Recipe, *, num_rows: int | None, num_rouge_rows: int | None
) -> Scores:
    splits = prepare(
        recipe.data,
        loaded.assembly.tokenizer,
        task=recipe.model.task,
        seed=recipe.train.seed,
        can_pack=loaded.assembly.built.family.can_pack,
        num_labels=recipe.model.num_labels,
    )
    if recipe.model.task == "classification":
        num_labels = recipe.model.num_labels or splits.num_labels
        splits = _with_labels_of(splits, loaded.target.label_names, num_labels=num_labels)
    for line in () if splits.eval_report is None else splits.eval_report.lines():
        typer.echo(line, err=True)
    found = rows_scores(
        loaded.model, loaded.assembly, loaded.place, splits=splits, num_rows=num_rows
    )
    if num_rouge_rows is not None:
        found |= answers_rouge(
            loaded.model, loaded.assembly, splits=splits, num_rows=num_rouge_rows
        )
    return found


def _with_labels_of(splits: Splits, names: tuple[str, ...], *, num_labels: int) -> Splits:
    """The rows with the class ids of the model, which may know classes that the rows lack.

    Numbers that are no names of the model are its ids already. Words mean nothing to a model
    without names, unless they are as many as its classes: then they are in the order of training.
    """
    given = splits.label_names
    assert splits.eval is not None and splits.eval.labels is not None
    if not names and given and len(given) != num_labels:
        raise DataError(
            f"the rows have the labels {', '.join(given[:10])}, and the model has {num_labels} "
            "classes without names: give rows with class ids, or the run itself"
        )
    if not names or not given or given == names:
        return splits
    if all(name.isdecimal() and int(name) < len(names) for name in given) and not (
        set(given) <= set(names)
    ):
        return splits
    unknown = [name for name in given if name not in names]
    if unknown:
        raise DataError(
            f"the label {unknown[0]!r} is none of the model's: {', '.join(names[:10])}; give rows "
            "with its labels"
        )
    ids = torch.tensor([names.index(name) for name in given])
    rows = replace(
        splits.eval, labels=ids[splits.eval.labels.long()].to(splits.eval.labels.dtype),
        label_names=names,
    )  # fmt: skip
    return replace(splits, eval=rows, label_names=names)


def _show(found: Scores, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(found))
        return
    width = max(map(len, found))
    for name, value in found.items():
        typer.echo(f"{name:<{width}}  {_number(value)}")


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
