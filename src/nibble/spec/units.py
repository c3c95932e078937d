"""Sizes as people write them: 24GiB and 23.5GB to bytes, and back.

Bytes in code, GiB in text. GiB, MiB and KiB count in 1024, GB, MB and KB in 1000; a bare G is GiB,
as drivers and containers use it. Nothing else is parsed here.
"""

from __future__ import annotations

import re

from nibble.errors import ConfigError

KIB, MIB, GIB = 2**10, 2**20, 2**30
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)


def parse_bytes(text: str, *, option: str = "place.vram") -> int:
    """Bytes of a size such as 24GiB, 23.5 GB or 512MiB; ConfigError when it is no size."""
    found = _SIZE.fullmatch(text)
    if found is None or float(found[1]) <= 0:
        raise ConfigError(f"{option}={text!r} is not a size; write one such as 24GiB or 23.5GB")
    unit, is_decimal = found[2].lower(), not found[3] and text.strip().lower().endswith("b")
    power = " kmgt".index(unit) if unit else 0
    return int(float(found[1]) * (1000 if is_decimal else 1024) ** power)


def show_bytes(num_bytes: float) -> str:
    """A size for people: three digits or so, in the largest unit below it."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(num_bytes) >= unit:
            return (
                f"{num_bytes / unit:,.2f} {name}"
                if unit == GIB
                else f"{num_bytes / unit:.1f} {name}"
            )
    return f"{num_bytes:.0f} B"
