"""Values and names in messages: how a value is shown, which known name was meant.

No pydantic here, so that a mistyped flag is answered at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def show(value: Any) -> str:
    """A value as a user would write it, cut to one short line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        text = "[" + ", ".join(show(item) for item in value) + "]"
    elif isinstance(value, Mapping):
        text = "{" + ", ".join(f"{key}: {show(item)}" for key, item in value.items()) + "}"
    else:
        text = str(value).replace("\n", "\\n")
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(given: str, known: Sequence[str], *, limit: int = 2) -> list[str]:
    """The names most like a given one, best first."""
    import difflib  # only a mistake pays for it

    return difflib.get_close_matches(given, known, n=limit, cutoff=0.6)
