"""`nibble eval`: numbers that say how good a model is on text, on rows, or at a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from nibble.cli.loading import Loaded, load, resolve
from nibble.errors import ConfigError
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
        source = Source(path=data) if like is None else like.model_copy(update={"path": data})
        words = recipe.data if recipe.data.train else Data()
        rows = words.model_copy(update={"train": (source,), "eval": (source,), "eval_rows": None})
        return recipe.model_copy(update={"data": rows})
    if needs_rows and not recipe.data.train:
        raise ConfigError("nothing to measure on: give --text FILE or --data SET")
    if needs_rows and not recipe.data.eval and recipe.data.eval_rows is None:
        raise ConfigError("this run held no rows out: give --text FILE or --data SET")
    return recipe


def _rows(
    loaded: Loaded, recipe: Recipe, *, num_rows: int | None, num_rouge_rows: int | None
) -> Scores:
    from nibble.data import prepare

    splits = prepare(
        recipe.data,
        loaded.assembly.tokenizer,
        task=recipe.model.task,
        seed=recipe.train.seed,
        can_pack=loaded.assembly.built.family.can_pack,
        num_labels=recipe.model.num_labels,
    )
    found = rows_scores(
        loaded.model, loaded.assembly, loaded.place, splits=splits, num_rows=num_rows
    )
    if num_rouge_rows is not None:
        found |= answers_rouge(
            loaded.model, loaded.assembly, splits=splits, num_rows=num_rouge_rows
        )
    return found


def _show(found: Scores, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(found))
        return
    width = max(map(len, found))
    for name, value in found.items():
        typer.echo(f"{name:<{width}}  {_number(value)}")


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
