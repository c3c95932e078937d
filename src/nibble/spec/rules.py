"""What cannot be combined: contradictions, and settings that would have no effect.

Two tables. `EFFECT` (effects.py) says when a setting does anything at all; given outside of that it
is refused, because a key without effect would let a user believe in it (an off value such as false,
0, [] or null is no claim and passes). `CONTRADICTIONS` (contradictions.py) are combinations that
cannot be meant. Both are plain predicates on a recipe, so they run before anything is loaded, and
`without_effect` also tells `load.py` what to leave out of the resolved recipe.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from nibble.errors import ConfigError

from .config import Recipe, Source
from .contradictions import CONTRADICTIONS
from .effects import EFFECT
from .texts import show
from .units import parse_bytes

LOCAL_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".xz", ".gz", ".bz2")
PROMPT_FORMATS = ("auto", "alpaca", "prompt-completion")


def check(recipe: Recipe) -> None:
    """Raise ConfigError that names, in one line, all that cannot be meant."""
    problems = [rule.message(recipe) for rule in CONTRADICTIONS if rule.holds(recipe)]
    for path in without_effect(recipe):
        rule = _EFFECT_OF[path]
        value = _value(recipe, path)
        if _explicit(recipe, path) and value and value not in rule.neutral:
            problems.append(f"{path}={show(value)} has no effect: it works only {rule.only}")
    problems += _pattern_problems(recipe)
    problems += _source_problems(recipe)
    problems += _size_problems(recipe)
    if problems:
        raise ConfigError("; ".join(problems))


def check_trainable(recipe: Recipe) -> None:
    """Raise ConfigError when a run could not start: no training data is named."""
    if not recipe.data.train:
        raise ConfigError(
            "data.train is missing: give data.train=FILE (.jsonl, .json, .csv, .tsv, .parquet, "
            ".txt), a folder, or a hub data set"
        )


def without_effect(recipe: Recipe) -> list[str]:
    """Paths of the settings that do nothing under this recipe's other choices."""
    return [rule.path for rule in EFFECT if not rule.where(recipe)]


_EFFECT_OF = {rule.path: rule for rule in EFFECT}


def _value(recipe: Recipe, path: str) -> Any:
    value: Any = recipe
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _explicit(recipe: Recipe, path: str) -> bool:
    """Whether somebody gave this setting, be it with its default."""
    here: BaseModel = recipe
    *parents, leaf = path.split(".")
    for part in parents:
        if part not in here.model_fields_set:
            return False
        here = getattr(here, part)
    return leaf in here.model_fields_set


def _size_problems(recipe: Recipe) -> Iterator[str]:
    for option, size in (("place.vram", recipe.place.vram), ("place.ram", recipe.place.ram)):
        if size is not None:
            try:
                parse_bytes(size, option=option)
            except ConfigError as error:
                yield str(error)


def _pattern_problems(recipe: Recipe) -> Iterator[str]:
    """Names that are neither names nor regular expressions."""
    lists = {"adapter.targets": recipe.adapter.targets, "quant.keep": recipe.quant.keep,
             "adapter.modules_to_save": recipe.adapter.modules_to_save}  # fmt: skip
    for path, patterns in lists.items():
        if path == "adapter.targets" and not patterns:
            yield "adapter.targets is empty: give all-linear, module names or patterns"
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                yield f"{path}: {pattern!r} is not a regular expression: {error}"


def _source_problems(recipe: Recipe) -> Iterator[str]:
    for name, sources in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        for index, source in enumerate(sources):
            where = f"data.{name}[{index}]"
            yield from (f"{where}{text}" for text in _one_source(source, recipe))


def _one_source(source: Source, recipe: Recipe) -> Iterator[str]:
    """What contradicts itself in one source; each text follows the source's place."""
    if not source.path.strip():
        yield ".path is empty: give a file, a folder or a hub data set"
    local = source.path.lower().endswith(LOCAL_SUFFIXES) or source.path.startswith("builtin:")
    for key, value in (("name", source.name), ("split", source.split)):
        if local and value is not None:
            yield f".{key}={value} has no effect: {source.path} is not a hub data set"
    classifies = recipe.model.task == "classification"
    if classifies and source.format not in ("auto", "classification"):
        yield f".format={source.format} with model.task=classification: use classification"
    if not classifies and source.format == "classification":
        yield ".format=classification needs model.task=classification"
    if source.template is not None:
        if classifies or source.format not in PROMPT_FORMATS:
            kind = "classification" if classifies else source.format
            yield f".template has no effect: {kind} has no prompt (alpaca, prompt-completion have)"
        elif not re.search(r"\{[^{}]+\}", source.template):
            yield f".template has no {{column}} in it: {show(source.template)}"
