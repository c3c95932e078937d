"""Which module a recipe's word means.

A word meets a module name as in peft, so that one list of targets works for both: the whole name,
its last parts (`q_proj` meets `model.layers.0.self_attn.q_proj`), or a regular expression that
matches the whole name. The planner and the modules ask the same function.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from nibble.errors import ConfigError


def meets(pattern: str, name: str) -> bool:
    """Whether `pattern` means the module called `name`: all of it, its last parts, or by regular
    expression.

    Raises ConfigError for a pattern that is not a valid regular expression and meets nothing by
    name.
    """
    if name == pattern or name.endswith(f".{pattern}"):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ConfigError(
            f"target {pattern!r} is neither a module name nor a regular expression ({error}); "
            "write a name such as q_proj or an expression such as .*\\.q_proj"
        ) from None


def covers(patterns: Iterable[str], name: str) -> bool:
    """Whether any pattern means `name` or a module that contains it."""
    return any(meets(pattern, part) for part in lineage(name) for pattern in patterns)


def lineage(name: str) -> list[str]:
    """`a.b.c`, `a.b`, `a`: a name and the names of all that contain it."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
