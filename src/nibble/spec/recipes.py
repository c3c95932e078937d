"""The recipes that come with nibble, and the documentation of every setting.

A built-in recipe is a YAML file beside this module that starts with a comment saying what it is
for. It leaves out what only the user knows (the model, the data), so that
`nibble train qlora model.path=... data.train=...` is a whole command.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from nibble.errors import ConfigError

from . import schema

FOLDER = Path(__file__).parent / "recipes"


class FieldRow(NamedTuple):
    """One line of the reference: where, what type, the default, what it does."""

    path: str
    type_text: str
    default: object
    doc: str


def names() -> list[str]:
    """The built-in recipes, in alphabetical order."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def text(name: str) -> str:
    """The YAML of a built-in recipe. Raises ConfigError for an unknown name."""
    if name not in names():
        raise ConfigError(f"recipe {name!r} is not built in: one of {', '.join(names())}")
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def summary(name: str) -> str:
    """The first sentence of a built-in recipe's leading comment."""
    lines = []
    for line in text(name).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines).split(". ")[0].rstrip(".") + "."


def fields() -> list[FieldRow]:
    """Every setting in the recipe's order; the default is "required" where there is none."""
    return [
        FieldRow(field.path, field.type_text, field.default, field.doc)
        for field in schema.fields().values()
    ]
