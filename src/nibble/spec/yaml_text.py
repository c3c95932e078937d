"""YAML in and out, without the surprises of YAML 1.1.

PyYAML follows YAML 1.1, where `1e-4` is a text, `12:30` is 750 and `010` is 8. The loader and the
dumper here share one table of plain scalars: decimal numbers with or without an exponent, booleans
(yes, no, on and off included, as other trainers' files use them) and null. Duplicate keys are
errors, with line and column. Only plain data is ever built.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from nibble.errors import ConfigError

_INT = r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)"
_FLOAT = (
    r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
    r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
)
_BOOL = "yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF"
_NULL = "~|null|Null|NULL|"
# tag, pattern, first characters (None: any), in the order they are tried
_PLAIN: tuple[tuple[str, str, list[str | None]], ...] = (
    ("bool", _BOOL, list("yYnNtTfFoO")),
    ("float", _FLOAT, list("-+0123456789.")),
    ("int", _INT, list("-+0123456789")),
    ("null", _NULL, ["~", "n", "N", ""]),
    ("merge", "<<", ["<"]),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of this module and no duplicate keys."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name in seen and name != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {name!r} appears twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what the loader would read as something else."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012


for _tag, _pattern, _first in _PLAIN:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first
        )


def parse_file_text(text: str, *, where: str) -> dict[str, Any]:
    """The mapping in a YAML text; `where` names it in messages.

    Raises ConfigError for syntax (line and column), a duplicate key, an empty text, anything but a
    mapping at the top, and keys that are not text.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}{_place(error)}: {_problem(error)}") from None
    if value is None:
        raise ConfigError(f"{where} is empty: a recipe names at least model.path and data.train")
    if not isinstance(value, dict):
        raise ConfigError(
            f"{where} holds a {type(value).__name__}, not the `key: value` lines of a recipe"
        )
    _require_text_keys(value, where)
    return value


def parse_value(text: str) -> Any:
    """A value as written on the command line: number, true, null, text, [list] or {mapping}.

    Text that is not YAML (such as a path with a colon and a space) is taken as it stands.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


def dump(value: Any) -> str:
    """YAML of plain data, in the given order."""
    return yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False
    )


def _require_text_keys(value: Any, where: str) -> None:
    if isinstance(value, list):
        for item in value:
            _require_text_keys(item, where)
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{where}: the key {key!r} is not text: put it in quotes")
            _require_text_keys(item, where)


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""


def _problem(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or error).replace("\n", " ")
