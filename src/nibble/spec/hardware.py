"""Cards by name: memory, rates, power and price, from a table that says where each number is from.

Idea. A plan is arithmetic over two tables, shapes and rates; this is the second. `hardware.toml`
holds one row a card with its source and date; the user's own file of the same layout
(~/.config/nibble/hardware.toml, or in XDG_CONFIG_HOME) wins key by key, so that one's own rent or
measured rate replaces ours. Names are compared without case, spaces and vendor words, so what the
driver reports finds its row as well.

It measures nothing and asks no driver: see `nibble doctor` for what is in this machine.
"""

from __future__ import annotations

import datetime
import difflib
import os
import re
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from nibble.errors import ConfigError
from nibble.spec.units import GIB

SUSTAINED_SHARE = 0.75
"""Of the datasheet's matmul rate, where nothing is measured; the one card that is holds 0.67."""

FP32_SHARE = 1 / 8
"""Of the 16-bit rate, that fp32 products have where the row does not say."""
LAUNCH_US = 8.0
"""Where nothing is measured; hosts of rented cards have 10, fast desktops 5."""

SLOW_BF16 = 4.0
"""Where products in bf16 take this many times as long as in fp32, fp32 is what to compute in."""

CPU = "cpu"
"""Key of the row of this machine's processor."""

_NUMBERS = ("memory_gib", "matmul_tflops", "bandwidth_gbs", "bus_gbs")
_OPTIONAL_NUMBERS = (
    "sustained_tflops",
    "fp32_tflops",
    "sustained_fp32_tflops",
    "link_gbs",
    "launch_us",
    "power_w",
    "price_usd_hour",
)
_KEYS = {*_NUMBERS, *_OPTIONAL_NUMBERS, "names", "bf16", "source", "date"}
_NOISE = re.compile(r"nvidia|geforce|tesla|graphics|[\s_-]+")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One card; rates in their units by the second, bytes in bytes."""

    name: str
    memory_bytes: int
    matmul_flops: float
    """What dense 16-bit products sustain, FLOP/s."""
    fp32_flops: float
    bandwidth_bytes: float
    bus_bytes: float
    link_bytes: float
    """Between cards of one machine, one direction; the bus where there is no link."""
    launch_s: float
    """The host's time to launch one kernel."""
    power_w: float | None
    price_usd_hour: float | None
    bf16: bool
    source: str
    date: str

    @property
    def is_cpu(self) -> bool:
        """Whether it is this machine's processor, which only the user's own file can have."""
        return self.name == CPU

    def rate(self, precision: str) -> float:
        """FLOP/s of products in the type that a recipe computes in."""
        return self.fp32_flops if precision == "fp32" else self.matmul_flops


def hardware(name: str) -> Hardware:
    """The card called `name`, by key, by another of its names, or as the driver reports it.

    Raises ConfigError for an unknown card with the nearest names, and for a malformed user file.
    """
    rows = _rows()
    wanted = plain_name(name)
    for key, row in rows.items():
        if wanted in {plain_name(key), *(plain_name(other) for other in row.get("names", []))}:
            return _hardware(key, row)
    plain = {plain_name(key): key for key in rows}
    near = difflib.get_close_matches(wanted, plain, n=4, cutoff=0.4)
    shown = ", ".join(plain[found] for found in near) if near else ", ".join(rows)
    raise ConfigError(
        f"unknown card {name!r}; {'nearest' if near else 'known'}: {shown}. "
        f"Add a row to {user_file()} for another"
    )


def known() -> dict[str, Hardware]:
    """All cards by key, the user's rows included."""
    return {key: _hardware(key, row) for key, row in _rows().items()}


def user_file() -> Path:
    """Where the user's own rows are."""
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "nibble" / "hardware.toml"


def _rows() -> dict[str, dict[str, Any]]:
    shipped = files("nibble.spec").joinpath("hardware.toml").read_text(encoding="utf-8")
    rows: dict[str, dict[str, Any]] = tomllib.loads(shipped)
    own = user_file()
    if not own.is_file():
        return rows
    try:
        given = tomllib.loads(own.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{own}: not TOML ({error}); correct it or move it away") from None
    by_plain = {plain_name(key): key for key in rows}
    for key, row in given.items():
        if not isinstance(row, dict):
            raise ConfigError(f"{own}: {key} is not a table; write [{key}] above its rows")
        unknown = sorted(set(row) - _KEYS)
        if unknown:
            raise ConfigError(
                f"{own}: [{key}] has the unknown key {unknown[0]}; known are "
                f"{', '.join(sorted(_KEYS))}"
            )
        same = by_plain.get(plain_name(key), key)
        rows[same] = {**rows.get(same, {"source": f"{own}", "date": "yours"}), **row}
        _hardware(same, rows[same], where=f"{own}: ")
    return rows


def _hardware(key: str, row: dict[str, Any], *, where: str = "") -> Hardware:
    for name in (*_NUMBERS, *_OPTIONAL_NUMBERS):
        value = row.get(name)
        if value is None and name in _OPTIONAL_NUMBERS:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ConfigError(
                f"{where}[{key}] {name}={value!r} must be a number above 0; a new card needs "
                f"{', '.join(_NUMBERS)}"
            )
    sustained = row.get("sustained_tflops", row["matmul_tflops"] * SUSTAINED_SHARE)
    date = row.get("date", "")
    return Hardware(
        name=key,
        memory_bytes=int(row["memory_gib"] * GIB),
        matmul_flops=sustained * 1e12,
        fp32_flops=_fp32_tflops(row) * 1e12,
        bandwidth_bytes=row["bandwidth_gbs"] * 1e9,
        bus_bytes=row["bus_gbs"] * 1e9,
        link_bytes=row.get("link_gbs", row["bus_gbs"]) * 1e9,
        launch_s=row.get("launch_us", LAUNCH_US) * 1e-6,
        power_w=None if row.get("power_w") is None else float(row["power_w"]),
        price_usd_hour=row.get("price_usd_hour"),
        bf16=bool(row.get("bf16", True)),
        source=str(row.get("source", "")),
        date=date.isoformat() if isinstance(date, datetime.date) else str(date),
    )


def _fp32_tflops(row: dict[str, Any]) -> float:
    nominal = row.get("fp32_tflops", row["matmul_tflops"] * FP32_SHARE)
    return float(row.get("sustained_fp32_tflops", nominal * SUSTAINED_SHARE))


def plain_name(name: str) -> str:
    """The name without case, spaces, dashes and vendor words, as names are compared."""
    return _NOISE.sub("", name.lower())
