"""The plan as a table that a person enjoys: what is held, when, and where the peak is.

Columns are phases, rows are categories; the column of the peak is bold and its cells carry a bar.
The host's categories follow where there is more than the process itself. Below stand the budget,
the speed with what limits it, and hours, energy and rent. It has 80 columns. Text only: the numbers
are `plan.py`'s, and rich is imported when something is drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nibble.spec.holdings import placement_kind
from nibble.spec.host_memory import HOST_CATEGORIES
from nibble.spec.phases import CATEGORIES
from nibble.spec.plan import Plan
from nibble.spec.units import GIB, MIB, show_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType

BAR_WIDTH = 11
HEADS = {"first step": "first", "steady step": "steady", "evaluation": "eval"}
"""Phases whose names are long."""


SOURCES = {
    "headers": ", an unknown family: shapes from the weights' headers",
    "meta": ", an unknown family: shapes of the model built on the meta device",
}
"""Where shapes are from, when not from the family's table."""


def render(plan: Plan) -> RenderableType:
    """A rich renderable of the plan, 80 columns wide."""
    from rich.console import Group
    from rich.text import Text

    return Group(
        Text(_title(plan), style="bold"),
        Text(_counts(plan), style="dim"),
        Text(""),
        _table(plan),
        Text(""),
        _verdict(plan),
        *(Text(line) for line in speed_lines(plan)),
    )


def plain(plan: Plan, *, width: int = 80) -> str:
    """The same as plain text, for logs and run folders."""
    from io import StringIO

    from rich.console import Console

    buffer = StringIO()
    Console(file=buffer, width=width, color_system=None, legacy_windows=False).print(render(plan))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def speed_lines(plan: Plan) -> list[str]:
    """Tokens, FLOPs and, where the card is known, speed, time, energy and money."""
    flops = show_count(plan.flops_per_step)
    lines = [f"A step: at most {plan.tokens_per_step:,} tokens, {flops}FLOP."]
    if plan.speed is None:
        missing = "measure it with nibble plan --calibrate"
        if not plan.on_cpu:
            missing = "name a card of the table (--gpu rtx4090), or " + missing
        return [*lines, f"No speed is planned: {missing}."]
    assert plan.hardware is not None
    speed, tokens = plan.speed, plan.run_tokens
    lines.append(
        f"Speed: about {speed.tokens_per_s:,.0f} tokens/s on {plan.hardware.name}, "
        f"{_seconds(speed.step_s)} a step, limited by {speed.limiter}."
    )
    if tokens is not None:
        lines.append(f"The run: {show_count(tokens)} tokens in {_spent(plan, tokens)}.")
    else:
        lines.append(f"Each million tokens: {_spent(plan, 1e6)}.")
    return lines


def _spent(plan: Plan, tokens: float) -> str:
    """Time, energy and rent of so many tokens."""
    speed = plan.speed
    assert speed is not None
    words = [show_duration(speed.hours(tokens))]
    kwh, usd = speed.energy_kwh(tokens), speed.cost_usd(tokens)
    if kwh is not None:
        words.append(f"{kwh:.2g} kWh at most" if kwh < 100 else f"{kwh:,.0f} kWh at most")
    words.append(f"{show_money(usd)} of rent" if usd is not None else "rent not known")
    return ", ".join(words)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


def show_count(number: float) -> str:
    """`10 M`, `1.5 G`: a large count to three digits."""
    for unit, name in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
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
    source = SOURCES.get(plan.architecture.source, "")
    return (
        f"{plan.num_trainable:,} trainable of {plan.num_total:,} parameters ({share:.3g} %), "
        f"{plan.architecture.model_type}{source}"
    )


def _table(plan: Plan) -> RenderableType:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    name, unit = ("GiB", GIB) if plan.device_bytes >= 4 * GIB else ("MiB", MIB)
    table.add_column(name, no_wrap=True)
    for phase in plan.phases:
        is_peak = phase.name == plan.peak.name
        head = HEADS.get(phase.name, phase.name)
        table.add_column(head, justify="right", style="bold" if is_peak else "", no_wrap=True)
    table.add_column("at peak", style="cyan", no_wrap=True)
    for category, words in CATEGORIES.items():
        cells = [phase.device.get(category, 0) for phase in plan.phases]
        if any(cells):
            table.add_row(words, *(_cell(c, unit) for c in cells), _bar(plan, category))
    table.add_section()
    total = "tensors in all" if plan.on_cpu else "card in all"
    cells = [phase.device_bytes for phase in plan.phases]
    table.add_row(total, *(_cell(c, unit) for c in cells), "", style="bold")
    table.add_section()
    for category, words in HOST_CATEGORIES.items():
        cells = [phase.host.get(category, 0) for phase in plan.phases]
        if any(cells):
            table.add_row(f"host: {words}", *(_cell(c, unit) for c in cells), "", style="dim")
    extra = [p.host_bytes + (p.device_bytes if plan.on_cpu else 0) for p in plan.phases]
    table.add_row("host in all", *(_cell(e, unit) for e in extra), "", style="bold")
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
