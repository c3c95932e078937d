"""`nibble plan --compare MODEL`: a row for each method, as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence

import typer

from nibble.errors import ConfigError
from nibble.spec.compare import DEFAULT_TOKENS, compare
from nibble.spec.config import Model
from nibble.spec.hardware import CPU, Hardware, hardware
from nibble.spec.holdings import Devices
from nibble.use.machine import card_names
from nibble.use.shapes import shapes


def show_comparison(
    model: str,
    words: Sequence[str],
    *,
    as_json: bool,
    gpu: str | None,
    gpus: int | None,
    ram: str | None,
    row_tokens: int | None,
) -> None:
    """Print the comparison of all methods on the named card, or on this machine's.

    `row_tokens`: tokens in a row (default 2048). `words`: settings for all methods; the tokens that
    hours and money are told for are train.max_tokens.
    """
    from nibble.spec.compare_text import render

    names = card_names() if gpu is None else [gpu]
    card = _card(names, is_named=gpu is not None)
    devices = Devices(per_machine=gpus or (1 if gpu else max(1, len(names))))
    given = [f"data.max_length={row_tokens or 2048}", f"train.max_tokens={DEFAULT_TOKENS}"]
    if ram is not None:
        given.append(f"place.ram={ram}")
    rows = compare(
        model,
        [*given, *words],
        architecture=shapes(Model(path=model)),
        hardware=card,
        devices=devices,
        on_cpu=not names,
    )
    if as_json:
        values = {
            "model": model,
            "hardware": None if card is None else card.name,
            "devices": devices.total,
            "rows": [row.to_json() for row in rows],
        }
        typer.echo(json.dumps(values, indent=1))
        return
    from rich.console import Console

    Console().print(render(rows))


def _card(names: Sequence[str], *, is_named: bool) -> Hardware | None:
    """The card's row; of an unknown one that was not named there is no speed."""
    try:
        return hardware(names[0] if names else CPU)
    except ConfigError:
        if is_named:
            raise
        return None
