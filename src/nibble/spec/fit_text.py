"""What a search found, for people: the choice in words, and a table of what was not chosen.

Text only: the numbers are those of `search.py` and `neighbours.py`. rich is imported when something
is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nibble.spec.advice import words_of
from nibble.spec.choices import fixed_paths
from nibble.spec.load import dump_recipe, recipe_dict
from nibble.spec.neighbours import Neighbour, neighbours
from nibble.spec.plan import Plan
from nibble.spec.search import Found
from nibble.spec.units import GIB

if TYPE_CHECKING:
    from rich.console import RenderableType

MARK = "# Chosen by `nibble plan --fit`"
"""How a written recipe begins, so that only such files are written over."""


def lines(found: Found) -> list[str]:
    """What was chosen and what it is worth, beside the recipe as it stood."""
    chosen = words_of(found.changes) or "nothing: the recipe as it stands"
    told = [f"fit chose {chosen}", f"{_worth(found.plan)}, within {found.budget.words()}"]
    before = found.planner(found.started)
    if not found.budget.fits(before):
        told.append(f"as the recipe stands it does not fit: {_memory(before)}")
    elif found.changes and before.speed is not None and found.plan.speed is not None:
        gain = found.plan.speed.tokens_per_s / before.speed.tokens_per_s
        told.append(f"{gain:.2f} times the recipe as it stands: {_worth(before)}")
    given = fixed_paths(found.started)
    if given:
        told.append(f"left as given: {', '.join(given)}")
    return told


def text(found: Found) -> str:
    """The recipe as YAML that `nibble train` takes, and above it what was chosen."""
    before = "".join(f"# {line}\n" for line in lines(found))
    return f"{MARK}; plans again to the same numbers on such devices.\n{before}" + dump_recipe(
        found.recipe
    )


def to_json(found: Found) -> dict[str, Any]:
    """Everything as JSON values."""
    before = found.planner(found.started)
    return {
        "chosen": found.changes,
        "budget": {
            "device_bytes": found.budget.device_bytes,
            "host_bytes": found.budget.host_bytes,
        },
        "started": {
            "fits": found.budget.fits(before),
            "tokens_per_s": None if before.speed is None else before.speed.tokens_per_s,
            "device_bytes": before.device_bytes,
            "host_bytes": before.host_bytes,
        },
        "recipe": recipe_dict(found.recipe),
        "plan": found.plan.to_json(),
        "neighbours": [row.to_json() for row in neighbours(found)],
    }


def render(found: Found, rows: Sequence[Neighbour] | None = None) -> RenderableType:
    """A rich renderable: the choice, and the table of its neighbours."""
    from rich.console import Group
    from rich.text import Text

    first, *rest = lines(found)
    return Group(
        Text(first, style="bold"),
        *(Text(line) for line in rest),
        Text(""),
        _table(found, neighbours(found) if rows is None else rows),
    )


def _table(found: Found, rows: Sequence[Neighbour]) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("instead (memory in GiB)", no_wrap=True)
    for name in ("tokens/s", "card", "host"):
        table.add_column(name, justify="right")
    table.add_column("why not", overflow="fold")
    table.add_row("(chosen)", *_cells(found.plan), "", style="bold")
    for row in rows:
        style = "" if row.is_free and row.plan is not None else "dim"
        table.add_row(Text(_instead(row)), *_cells(row.plan), Text(row.why), style=style)
    return table


def _instead(row: Neighbour) -> str:
    """A setting a line; passes follow from the rows of one."""
    passes = "train.gradient_accumulation_steps"
    shown = [{key: value} for key, value in row.overrides.items() if key != passes]
    return "\n".join(words_of(setting) for setting in shown or [row.overrides])


def _cells(made: Plan | None) -> tuple[str, str, str]:
    if made is None:
        return "", "", ""
    speed = "?" if made.speed is None else f"{made.speed.tokens_per_s:,.0f}"
    card = "" if made.on_cpu else f"{made.device_bytes / GIB:,.2f}"
    return speed, card, f"{made.host_bytes / GIB:,.2f}"


def _worth(made: Plan) -> str:
    speed = made.speed
    rate = "speed not known" if speed is None else f"about {speed.tokens_per_s:,.0f} tokens/s"
    return f"{rate}, {_memory(made)}"


def _memory(made: Plan) -> str:
    host = f"{made.host_bytes / GIB:,.2f} GiB of the host"
    return host if made.on_cpu else f"{made.device_bytes / GIB:,.2f} GiB of a card, {host}"
