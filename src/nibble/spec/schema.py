"""What the recipe's models say about themselves: every dotted path with its type, default and text.

One walk over the pydantic models of `config.py` serves the documentation (`recipes.fields`), the
override words (`load.py`: which leaf names are unambiguous) and the messages (what is allowed). The
fields of a data source appear once, as `data.train[].path`; `data.eval[]` has the same.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .config import Recipe, Source

SOURCE_PATHS = ("data.train", "data.eval")
REQUIRED = "required"


@dataclass(frozen=True, kw_only=True)
class Field:
    """One documented setting."""

    path: str
    type_text: str
    default: object
    doc: str
    annotation: object

    @property
    def leaf(self) -> str:
        return self.path.rpartition(".")[2]


@cache
def fields() -> Mapping[str, Field]:
    """Every setting by its dotted path, in the order of the recipe."""
    return {field.path: field for field in _walk(Recipe, "")}


@cache
def sections() -> Mapping[str, type[BaseModel]]:
    """The recipe's sections: model, data, quant, ..."""
    found = {name: _model_of(info.annotation) for name, info in Recipe.model_fields.items()}
    return {name: model for name, model in found.items() if model is not None}


@cache
def source_fields() -> tuple[str, ...]:
    """The keys of one data source."""
    return tuple(Source.model_fields)


@cache
def leaves() -> Mapping[str, tuple[str, ...]]:
    """Last name of a path -> the paths that end in it (a source's fields: train's and eval's)."""
    found: dict[str, tuple[str, ...]] = {}
    for path, field in fields().items():
        full = [path]
        if "[]" in path:
            full = [f"{source}.{field.leaf}" for source in SOURCE_PATHS]
        found[field.leaf] = (*found.get(field.leaf, ()), *full)
    return found


def default(path: str) -> object:
    """Default of a setting; None where it must be given."""
    value = fields()[path].default
    return None if value == REQUIRED else value


def accepts(annotation: object, kind: type) -> bool:
    """Whether an annotation takes values of a plain type (str, bool, int, float, tuple)."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(accepts(part, kind) for part in typing.get_args(annotation))
    if origin is typing.Literal:
        return any(type(value) is kind for value in typing.get_args(annotation))
    return annotation is kind or origin is kind


def _walk(model: type[BaseModel], prefix: str) -> Iterator[Field]:
    for name, info in model.model_fields.items():
        inner = _model_of(info.annotation)
        plain_section = inner is not None and inner is info.annotation
        if not plain_section:
            yield _field(f"{prefix}{name}", info)
        if inner is Source and name != "train":
            continue
        if inner is not None:
            middle = "[]." if inner is Source else "."
            yield from _walk(inner, f"{prefix}{name}{middle}")


def _field(path: str, info: FieldInfo) -> Field:
    value = REQUIRED if info.is_required() else info.get_default(call_default_factory=True)
    return Field(
        path=path,
        type_text=_bounded(type_text(info.annotation), info),
        default=value,
        doc=" ".join((info.description or "").split()),
        annotation=info.annotation,
    )


def _model_of(annotation: object) -> type[BaseModel] | None:
    """The section inside an annotation such as Profile | None or tuple[Source, ...]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in typing.get_args(annotation):
        found = _model_of(part)
        if found is not None:
            return found
    return None


def type_text(annotation: object) -> str:
    """An annotation in words: `nf4 | fp4`, `whole number`, `list of text`, `text or null`."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(str(value) for value in args)
    if origin in (typing.Union, types.UnionType):
        parts = [type_text(part) for part in args if part is not type(None)]
        return " or ".join(parts) + (" or null" if type(None) in args else "")
    if origin is tuple and args[-1] is not Ellipsis:
        return f"{len(args)} of {type_text(args[0])}"
    if origin is tuple:
        return f"list of {type_text(args[0])}"
    if origin is dict:
        return f"mapping of {type_text(args[0])} to {type_text(args[1])}"
    names = {str: "text", int: "whole number", float: "number", bool: "true | false"}
    if isinstance(annotation, type):
        return names.get(annotation, annotation.__name__.lower())
    return str(annotation)


def _bounded(text: str, info: FieldInfo) -> str:
    """A type with the limits of its number: `whole number >= 1 or null`."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = []
    for limit in info.metadata:
        for name, sign in signs.items():
            bound = getattr(limit, name, None)
            if bound is not None:
                found.append(f"{sign} {bound}")
    if not found:
        return text
    bare, null, _ = text.partition(" or null")
    return f"{bare} {', '.join(found)}{null}"
