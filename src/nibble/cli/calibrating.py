"""`nibble plan --calibrate`: measure this machine and write the user's row of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import typer

from nibble.use.calibrate import Calibration, calibrate

_ROWS = (
    ("matmul, 16 bit", "matmul_flops", 1e12, "TFLOP/s"),
    ("matmul, fp32", "fp32_flops", 1e12, "TFLOP/s"),
    ("memory", "bandwidth_bytes", 1e9, "GB/s"),
    ("bus", "bus_bytes", 1e9, "GB/s"),
    ("link between cards", "link_bytes", 1e9, "GB/s"),
    ("launch of a kernel", "launch_s", 1e-6, "us"),
)


def run(*, device: str | None = None, as_json: bool = False) -> None:
    """Measure, write, and show each rate before and after."""
    if not as_json:
        typer.echo("Measuring for some seconds; nothing else should use the machine meanwhile.")
    done = calibrate(device, step=_step)
    if as_json:
        typer.echo(json.dumps(_values(done), indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", "planned with", "measured", "", box=None, header_style="bold")
    for words, name, unit, unit_name in _ROWS:
        before = None if done.before is None else getattr(done.before, name)
        after = getattr(done.after, name)
        table.add_row(words, _shown(before, unit), _shown(after, unit), unit_name)
    Console().print(table)
    rates = done.rates
    typer.echo(
        f"{rates.device}: to the device {rates.to_device_gbs:.3g} GB/s, from it "
        f"{rates.from_device_gbs:.3g} GB/s."
    )
    typer.echo(f"Written as [{done.key}] to {done.file}; plans of this machine use it from now on.")


def _step(device: str, *, precision: str, steps: int) -> float:
    """A processor needs no steps, and not what they import."""
    from nibble.cli.host_rate import seconds_per_launch

    return seconds_per_launch(device, precision=precision, steps=steps)


def _shown(value: float | None, unit: float) -> str:
    return "not known" if value is None else f"{value / unit:,.3g}"


def _values(done: Calibration) -> dict[str, Any]:
    return {
        "key": done.key,
        "file": str(done.file),
        "before": None if done.before is None else asdict(done.before),
        "after": asdict(done.after),
        "measured": asdict(done.rates),
    }
