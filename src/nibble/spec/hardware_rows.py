"""A row of the user's file of cards, changed in its text: other rows and all comments stay.

Idea. The file belongs to the user, so it is edited as a person would: the line of a key is replaced
in place with what stands behind its `#`, new keys go to the end of the table, a new table to the
end of the file. What comes out is read again and compared with what was meant; if the two differ
(a value over several lines, say), nothing is returned but an error that shows the row.

It reads and writes no file: text in, text out.
"""

from __future__ import annotations

import datetime
import re
import tomllib
from collections.abc import Mapping

from nibble.errors import ConfigError
from nibble.spec.hardware import plain_name

Value = str | int | float | bool | datetime.date | list[str]
_HEADER = re.compile(r"^\s*\[\s*(?:\"([^\"]*)\"|'([^']*)'|([^\]\"']+?))\s*\]\s*(?:#.*)?$")
_KEY = re.compile(r"^(\s*)([A-Za-z0-9_-]+)(\s*=\s*)(.*)$")


def changed(text: str, key: str, values: Mapping[str, Value]) -> str:
    """The text of a hardware.toml in which the table of card `key` has these values.

    A table of the same card under another spelling is the one that is changed. Raises ConfigError
    when the text is no TOML, or cannot be changed line by line.
    """
    before = _read(text)
    lines = text.splitlines()
    start = _find(lines, key)
    if start is None:
        lines += ["", f"[{key}]"] if lines and lines[-1].strip() else [f"[{key}]"]
        start = len(lines) - 1
    end = next((i for i in range(start + 1, len(lines)) if _HEADER.match(lines[i])), len(lines))
    section = _section(lines[start + 1 : end], values)
    made = "\n".join([*lines[: start + 1], *section, *lines[end:]]) + "\n"
    name = next((k for k in before if plain_name(k) == plain_name(key)), key)
    wanted = {**before, name: {**before.get(name, {}), **values}}
    try:
        if tomllib.loads(made) == wanted:
            return made
    except tomllib.TOMLDecodeError:
        pass
    row = " ".join(f"{name} = {_shown(value)};" for name, value in values.items())
    raise ConfigError(f"hardware.toml: [{key}] cannot be changed line by line; write there {row}")


def _section(lines: list[str], values: Mapping[str, Value]) -> list[str]:
    """The lines of one table with the values in place."""
    left = dict(values)
    section = []
    for line in lines:
        found = _KEY.match(line)
        if found is None or found[2] not in left:
            section.append(line)
            continue
        comment = _comment(found[4])
        section.append(f"{found[1]}{found[2]}{found[3]}{_shown(left.pop(found[2]))}{comment}")
    own = [
        i for i, line in enumerate(section) if line.strip() and not line.lstrip().startswith("#")
    ]
    at = own[-1] + 1 if own else 0  # comments after the last key belong to the next table
    return [*section[:at], *(f"{k} = {_shown(v)}" for k, v in left.items()), *section[at:]]


def _find(lines: list[str], key: str) -> int | None:
    for number, line in enumerate(lines):
        found = _HEADER.match(line)
        name = next((part for part in found.groups() if part), "") if found else None
        if name is not None and plain_name(name) == plain_name(key):
            return number
    return None


def _comment(value: str) -> str:
    """What stands behind the value, its blanks included; a # within quotes is no comment."""
    quote = ""
    for place, letter in enumerate(value):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter == "#":
            return "  " + value[place:]
    return ""


def _shown(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, list):
        return "[" + ", ".join(_shown(item) for item in value) + "]"
    if isinstance(value, datetime.date):
        return value.isoformat()
    return repr(value)


def _read(text: str) -> dict[str, dict[str, object]]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"hardware.toml: not TOML ({error}); correct it or move it away"
        ) from None
