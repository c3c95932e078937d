"""The plan as a table that a person enjoys: what is held, when, and where the peak is.

Columns are phases, rows are categories; the column of the peak is bold and its cells carry a bar.
Below it stand the budget, the speed and what limits it. Text only: the numbers are `plan.py`'s, and
rich is imported when something is drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nibble.spec.holdings import placement_kind
from nibble.spec.phases import CATEGORIES
from nibble.spec.plan import Plan
from nibble.spec.units import GIB, MIB, show_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType

BAR_WIDTH = 18


def render(plan: Plan) -> RenderableType:
    """A rich renderable of the plan, about 100 columns wide."""
    from rich.console import Group
    from rich.text import Text

    lines = [
        Text(_title(plan), style="bold"),
        Text(_counts(plan), style="dim"),
        Text(""),
        _table(plan),
        _verdict(plan),
        *(Text(line) for line in speed_lines(plan)),
    ]
    return Group(*lines)


def plain(plan: Plan, *, width: int = 110) -> str:
    """The same as plain text, for logs and run folders."""
    from io import StringIO

    from rich.console import Console

    buffer = StringIO()
    Console(file=buffer, width=width, color_system=None, legacy_windows=False).print(render(plan))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def speed_lines(plan: Plan) -> list[str]:
    """Tokens, FLOPs and, where the card is known, speed, time and money."""
    flops = f"{plan.flops_per_step / 1e12:,.1f} TFLOP"
    lines = [f"A step is at most {plan.tokens_per_step:,} tokens and {flops}."]
    if plan.speed is None:
        if not plan.on_cpu:
            lines.append("No speed: the card is not named (--gpu rtx4090) or not in the table.")
        return lines
    assert plan.hardware is not None
    speed = plan.speed
    lines.append(
        f"About {speed.tokens_per_s:,.0f} tokens/s on {plan.hardware.name} "
        f"({speed.step_s:.2f} s a step, limited by {speed.limiter}); an estimate, not measured."
    )
    cost = speed.cost_usd(1e6)
    rent = f", ${cost:,.2f} of rent" if cost is not None else ""
    lines.append(
        f"A million tokens: {speed.hours(1e6) * 60:,.1f} min, "
        f"{speed.energy_kwh(1e6):.2f} kWh at most{rent}."
    )
    return lines


def show_count(number: float) -> str:
    """`10 M`, `1.5 G`: a large count to three digits."""
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"


def show_duration(hours: float) -> str:
    """Hours as `12 min`, `3.4 h` or `12 d`."""
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    if hours < 1:
        return f"{hours * 60:.0f} min"
    return f"{hours:.1f} h" if hours < 100 else f"{hours / 24:.0f} d"


def show_money(usd: float | None) -> str:
    """`$1.20`; a dot where the price is not known."""
    return "·" if usd is None else f"${usd:,.2f}" if usd < 1000 else f"${usd:,.0f}"


def _title(plan: Plan) -> str:
    quant, adapter = plan.recipe.quant.format, plan.recipe.adapter.kind
    method = {"none": "full training", "expand": "block expansion"}.get(adapter, adapter)
    stored = "16 bit" if quant == "none" else quant
    where = "CPU" if plan.on_cpu else (plan.hardware.name if plan.hardware else "GPU")
    rows, length = plan.recipe.train.micro_batch_size, plan.recipe.data.max_length
    path = plan.recipe.model.path
    model = path if path.count("/") <= 1 else path.rstrip("/").rpartition("/")[2]
    if plan.devices.total > 1:
        number = plan.devices.total
        where = f"{number} x {where}, {placement_kind(plan.recipe.place, number)}"
    return (
        f"{model} · {method}, base in {stored}, {plan.recipe.optim.name} · "
        f"{rows} x {length} tokens · {where}"
    )


def _counts(plan: Plan) -> str:
    share = 100 * plan.num_trainable / max(1, plan.num_total)
    source = "" if plan.architecture.source == "config" else ", shapes from the weights' headers"
    return (
        f"{plan.num_trainable:,} trainable of {plan.num_total:,} parameters ({share:.3g} %), "
        f"{plan.architecture.model_type}{source}"
    )


def _table(plan: Plan) -> RenderableType:
    from rich import box
    from rich.table import Table

    peak = plan.peak.name
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    name, unit = ("GiB", GIB) if plan.device_bytes >= 4 * GIB else ("MiB", MIB)
    table.add_column(name)
    for phase in plan.phases:
        style = "bold" if phase.name == peak else ""
        table.add_column(phase.name, justify="right", style=style)
    table.add_column("at the peak", style="cyan", no_wrap=True)
    for category, words in CATEGORIES.items():
        cells = [phase.device.get(category, 0) for phase in plan.phases]
        if any(cells):
            table.add_row(words, *(_cell(c, unit) for c in cells), _bar(plan, category))
    table.add_section()
    table.add_row(
        "tensors" if plan.on_cpu else "device",
        *(_cell(p.device_bytes, unit) for p in plan.phases),
        f"{plan.peak.moment}",
    )
    extra = [p.host_bytes + (p.device_bytes if plan.on_cpu else 0) for p in plan.phases]
    table.add_row("host", *(_cell(e, unit) for e in extra), "", style="dim")
    return table


def _bar(plan: Plan, category: str) -> str:
    share = plan.peak.device.get(category, 0) / max(1, plan.device_bytes)
    eighths = round(share * BAR_WIDTH * 8)
    whole, rest = divmod(eighths, 8)
    part = " ▏▎▍▌▋▊▉"[rest] if rest else ""
    return "█" * whole + part


def _cell(num_bytes: int, unit: int) -> str:
    if num_bytes == 0:
        return "·"
    digits = 2 if unit == GIB else 1
    shown = f"{num_bytes / unit:,.{digits}f}"
    return shown if float(shown.replace(",", "")) > 0 else "<" + f"{10**-digits:g}"[1:]


def _verdict(plan: Plan) -> RenderableType:
    from rich.text import Text

    limit = plan.limit()
    needed = plan.host_bytes if plan.on_cpu else plan.device_bytes
    what = f"Peak {show_bytes(needed)} in the {plan.peak.name} ({plan.peak.moment})"
    if limit is None:
        return Text(f"{what}; no budget is named, so nothing is checked.")
    if plan.fits(limit):
        left = show_bytes(limit - needed)
        return Text(f"{what}: fits into {show_bytes(limit)} with {left} to spare.", style="green")
    from nibble.spec.advice import advise

    text = Text(f"{what}: does not fit into {show_bytes(limit)}.", style="red")
    for advice in advise(plan, limit):
        text.append(f"\n  would fit: {advice.words}  ({show_bytes(advice.bytes)})", style="yellow")
    return text
