"""The comparison as a table of 80 columns, and below it what was chosen and what was measured.

What does not fit is dim and says so in the place of its speed; nothing is left out. Text only: the
numbers are `compare.py`'s, and rich is imported when something is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nibble.spec.compare import Row
from nibble.spec.holdings import placement_kind
from nibble.spec.plan import Plan
from nibble.spec.plan_text import show_count, show_duration, show_money
from nibble.spec.units import GIB, show_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType


def render(rows: Sequence[Row]) -> RenderableType:
    """A rich renderable of the comparison, at most 80 columns wide."""
    from rich.console import Group
    from rich.text import Text

    some = next(row.plan for row in rows if row.plan is not None)
    tokens = rows[0].num_tokens
    return Group(
        Text(_title(some), style="bold"),
        Text(_subtitle(some, tokens), style="dim"),
        _table(rows),
        _pairs(_chosen(rows)),
        *([] if any(r.plan and r.plan.speed for r in rows) else [Text(_NO_SPEED)]),
        Text(""),
        Text(_MEASURED if any(row.runs for row in rows) else _UNMEASURED, style="dim"),
        _pairs(_measured(rows), style="dim"),
    )


def plain(rows: Sequence[Row], *, width: int = 80) -> str:
    """The same as plain text."""
    from io import StringIO

    from rich.console import Console

    buffer = StringIO()
    Console(file=buffer, width=width, color_system=None, legacy_windows=False).print(render(rows))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def _title(made: Plan) -> str:
    number = made.devices.total
    card = "CPU" if made.on_cpu else made.hardware.name if made.hardware else "GPU"
    path = made.recipe.model.path
    model = path if path.count("/") <= 1 else path.rstrip("/").rpartition("/")[2]
    return f"{model} on {f'{number} x ' if number > 1 else ''}{card}"


def _subtitle(made: Plan, tokens: int) -> str:
    limit, ram = made.limit(), made.recipe.place.ram
    budget = "" if limit is None else f", {show_bytes(limit)} a card"
    host = "" if ram is None else f", {ram} of host"
    row = f"{made.recipe.data.max_length:,} tokens a row"
    return f"{row}{budget}{host}; time, rent and energy of {show_count(tokens)} tokens"


def _table(rows: Sequence[Row]) -> RenderableType:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("method", no_wrap=True)
    for name in ("GiB", "host", "tok/s", "limit", "time", "rent", "kWh"):
        table.add_column(name, justify="left" if name == "limit" else "right", no_wrap=True)
    table.add_column("quality loss", no_wrap=True)
    fastest = max((r.plan.speed.tokens_per_s for r in rows if _runs(r)), default=None)  # type: ignore[union-attr]
    for row in rows:
        best = _runs(row) and row.plan.speed.tokens_per_s == fastest  # type: ignore[union-attr]
        style = "bold" if best else "" if row.fits else "dim"
        table.add_row(*_cells(row), style=style)
    return table


def _runs(row: Row) -> bool:
    return row.fits and row.plan is not None and row.plan.speed is not None


def _cells(row: Row) -> list[str]:
    made = row.plan
    if made is None:
        return [row.method.name, "", "", "", "no plan", "", "", "", row.quality_loss]
    host, held = f"{made.host_bytes / GIB:,.1f}", f"{made.device_bytes / GIB:,.1f}"
    if not row.fits:
        what = "no: card" if not made.fits() else "no: host"
        return [row.method.name, held, host, "", what, "", "", "", row.quality_loss]
    speed = made.speed
    if speed is None:
        return [row.method.name, held, host, "·", "·", "·", "·", "·", row.quality_loss]
    kwh = speed.energy_kwh(row.num_tokens)
    return [
        row.method.name,
        held,
        host,
        f"{speed.tokens_per_s:,.0f}",
        speed.limiter,
        show_duration(speed.hours(row.num_tokens)),
        show_money(speed.cost_usd(row.num_tokens)),
        "·" if kwh is None else f"{kwh:.3g}",
        row.quality_loss,
    ]


def _pairs(pairs: Sequence[tuple[str, str]], *, style: str = "") -> RenderableType:
    """Names and what is said of each, aligned."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style=style)
    table.add_column(style=style)
    for name, words in pairs:
        table.add_row(name, words)
    return table


def _chosen(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What was chosen for each method that fits, and why a method has no plan."""
    return [
        (row.method.name, row.error if row.plan is None else _words(row.plan))
        for row in rows
        if row.plan is None or row.fits
    ]


def _words(made: Plan) -> str:
    recipe, devices = made.recipe, made.devices
    train = recipe.train
    words = [f"{train.gradient_accumulation_steps} x {train.micro_batch_size} rows an update"]
    kind = placement_kind(recipe.place, devices.total)
    if kind != "single":
        words.append(kind)
    if kind == "stream":
        words.append(f"{recipe.place.resident_blocks} blocks stay")
    if recipe.optim.name != "adamw":
        words.append(recipe.optim.name)
    return ", ".join([*words, _again(made)])


def _again(made: Plan) -> str:
    train, blocks = made.recipe.train, made.architecture.sizes.num_layers
    if train.activation_checkpointing == "none" or train.keep_blocks == blocks:
        return "nothing computed again"
    kept = f", {train.keep_blocks} blocks keep all" if train.keep_blocks else ""
    return f"{train.activation_checkpointing} checkpointing{kept}"


_NO_SPEED = "No speed is planned: name a card (--gpu rtx4090), or measure: nibble plan --calibrate"
_MEASURED = "Bytes and speed are planned. Quality was measured in runs of nibble:"
_UNMEASURED = "Bytes and speed are planned. No quality was measured."


def _measured(rows: Sequence[Row]) -> list[tuple[str, str]]:
    return [(row.method.name, f"{run.words}; {run.result}") for row in rows for run in row.runs]
