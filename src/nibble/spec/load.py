"""From a YAML file, a built-in recipe and the command line to one checked recipe.

Layers, each over the one before: `base`, the file, the overrides. Every layer may use nibble's own
dotted paths, their unambiguous last names, or the words of other trainers (`aliases.py`). What
cannot be meant is one ConfigError in one line: where, what was given, what is allowed. Validating
takes milliseconds and touches no file but the recipe; data paths stay relative to the current
folder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nibble.errors import ConfigError

from . import recipes, rules, schema
from .aliases import VOCABULARY
from .config import Recipe
from .given import fixing
from .texts import nearest, show
from .words import Layer, Tree, apply, claim_all, flatten, look_up, put
from .yaml_text import dump, parse_file_text, parse_value

RUN_RECIPE = "recipe.yaml"
_ASSIGNMENT = re.compile(r"^[A-Za-z_][\w.\-]*=")


def load_recipe(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    base: Mapping[str, Any] | None = None,
) -> Recipe:
    """Read, translate, validate and check a recipe.

    `path`: a YAML file, a run folder, the name of a built-in recipe (see `recipes.names`), or None.
    `overrides`: `key=value`, `--key value`, `--key=value`, or `--flag` alone for true; values are
    YAML. `base`: settings below the file, in the same words. A plain path given for data.train or
    data.eval over a recipe's only source keeps how that source is read. Raises ConfigError.
    """
    layers: list[tuple[Mapping[str, Any], Mapping[str, str], bool]] = []
    if base:
        layers.append((dict(flatten(base, VOCABULARY)), {}, True))
    if path is not None:
        text, where = _read(path)
        read = dict(flatten(parse_file_text(text, where=where), VOCABULARY))
        layers.append((read, {}, where != _built_in(path)))
    typed, texts = parse_overrides(overrides)
    if typed or not layers:
        layers.append((typed, texts, True))
    tree: Tree = {}
    given: set[str] = set()
    for words, raw, somebody_said_so in layers:
        layer = Layer(words=words, below=tree, texts=raw)
        claim_all(layer, VOCABULARY)
        mine = {claim.path for _, claim in layer.claims}
        given |= mine if somebody_said_so else set()
        tree = _drop_moot(below=tree, tree=apply(layer), mine=mine)
    recipe = fixing(_validate(tree), given)
    rules.check(recipe)
    return recipe


def parse_overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Words and values of a command line, and the values as they were typed.

    A later value of the same word replaces an earlier one. Raises ConfigError for a stray word.
    """
    values: dict[str, Any] = {}
    texts: dict[str, str] = {}
    rest = list(overrides)
    while rest:
        item = rest.pop(0)
        if item.startswith("--") and len(item) > 2:
            name, equals, text = item[2:].partition("=")
            if not equals:
                bare = not rest or rest[0].startswith("--") or _ASSIGNMENT.match(rest[0])
                text = "true" if bare else rest.pop(0)
        elif _ASSIGNMENT.match(item):
            name, _, text = item.partition("=")
        else:
            raise ConfigError(f"{item!r} is not an override: write key=value or --key value")
        word = name.replace("-", "_")
        values[word], texts[word] = parse_value(text), text
    return values, texts


def recipe_dict(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain data: every setting that has an effect, defaults included."""
    tree: dict[str, Any] = recipe.model_dump(mode="json")
    for path in rules.without_effect(recipe):
        put(tree, path, None, remove=True)
    return tree


def dump_recipe(recipe: Recipe) -> str:
    """YAML that `load_recipe` reads back to an equal run; settings without effect are left out."""
    return dump(recipe_dict(recipe))


def _read(path: str | Path) -> tuple[str, str]:
    """The text of a recipe and the name to use for it in messages."""
    file = Path(path)
    if (file / RUN_RECIPE).is_file():
        file = file / RUN_RECIPE
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8"), str(file)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read as text: {error}") from None
    if isinstance(path, str) and path in recipes.names():
        return recipes.text(path), _built_in(path)
    if file.is_dir():
        raise ConfigError(f"{path} is a folder without {RUN_RECIPE}: give a recipe file")
    known = recipes.names()
    near = nearest(str(path), known)
    hint = f"did you mean {' or '.join(near)}?" if near else f"built-in ones: {', '.join(known)}"
    raise ConfigError(f"recipe {path} is neither a file nor a built-in recipe: {hint}")


def _built_in(name: str | Path) -> str:
    return f"recipe {name}"


def _drop_moot(*, below: Tree, tree: Tree, mine: set[str]) -> Tree:
    """Take back settings of earlier layers that this layer has made meaningless.

    `adapter.kind=none` over a recipe with a rank drops the rank. What was already meaningless
    below, or is said in this layer, stays and is refused by `rules.check`.
    """
    if not below:
        return tree
    before, now = _try(below), _try(tree)
    if before is None or now is None:
        return tree
    already = set(rules.without_effect(before))
    for path in rules.without_effect(now):
        if path not in already and path not in mine and look_up(tree, path) is not None:
            put(tree, path, None, remove=True)
    return tree


def _try(tree: Tree) -> Recipe | None:
    """The recipe of an unfinished tree, with a stand-in for a model that is not named yet."""
    model = tree.get("model") or {}
    data = dict(tree.get("data") or {})
    for key in ("train", "eval"):
        if isinstance(data.get(key), list):
            data[key] = [{"path": "-", **source} for source in data[key]]
    try:
        whole = {**tree, "model": {"path": "-", **model}, "data": data}
        return Recipe.model_validate(whole)
    except ValidationError:
        return None


def _validate(tree: Tree) -> Recipe:
    problems = [
        text
        for path, field in schema.fields().items()
        if (text := _wrong_number(path, look_up(tree, path), field.annotation))
    ]
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        problems += [_explain(detail) for detail in error.errors(include_url=False)]
    else:
        if not problems:
            return recipe
    raise ConfigError("; ".join(dict.fromkeys(problems)))


def _wrong_number(path: str, value: Any, annotation: object) -> str | None:
    """Numbers that pydantic would accept and nobody means: true for 1, infinity."""
    numeric = schema.accepts(annotation, int) or schema.accepts(annotation, float)
    if numeric and isinstance(value, bool) and not schema.accepts(annotation, bool):
        return f"{path}={show(value)} is not {_article(schema.type_text(annotation))}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{path}={value} is not a finite number"
    return None


_BOUNDS = {
    "greater_than_equal": (">=", "ge"),
    "greater_than": (">", "gt"),
    "less_than_equal": ("<=", "le"),
    "less_than": ("<", "lt"),
}


def _explain(detail: Mapping[str, Any]) -> str:
    """One pydantic error in words: dotted path, what was given, what is allowed."""
    path = _dotted(detail["loc"])
    given, kind, context = show(detail["input"]), detail["type"], detail.get("ctx", {})
    general = re.sub(r"\[\d+\]", "[]", path).replace("data.eval[]", "data.train[]")
    known = schema.fields().get(general) or schema.fields().get(general.removesuffix("[]"))
    if kind == "missing":
        doc = f": {known.doc}" if known else ""
        return f"{path} is missing{doc}" if path != "model" else _explain_model()
    if kind == "extra_forbidden":
        names = list(schema.source_fields()) if general.startswith("data.train[]") else []
        near = nearest(path.rpartition(".")[2], names)
        hint = f"did you mean {' or '.join(near)}?" if near else f"one of {', '.join(names)}"
        return f"{path}: unknown key: {hint}"
    if kind in _BOUNDS:
        sign, name = _BOUNDS[kind]
        return f"{path}={given} must be {sign} {context[name]}"
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'|(-?\d+)", context.get("expected", ""))
        choices = [first or second for first, second in allowed]
        near = nearest(given, choices, limit=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"{path}={given} is not one of {', '.join(choices)}{hint}"
    if path == "fit":
        return f"fit={given} is not auto, null or a mapping of its settings"
    if known is not None:
        return f"{path}={given} is not {_article(known.type_text)}"
    if isinstance(detail["input"], str | int | float | bool | list):
        return f"{path}={given} is not a mapping of settings"
    return f"{path}={given}: {detail['msg']}"


def _article(type_text: str) -> str:
    countable = type_text.startswith(("whole", "number", "list", "mapping"))
    return f"a {type_text}" if countable else type_text


def _explain_model() -> str:
    return f"model.path is missing: {schema.fields()['model.path'].doc}"


def _dotted(location: Sequence[str | int]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
