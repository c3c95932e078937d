"""Whether what `fit` chooses is what is fastest: the choice and its neighbours, measured.

    python bench/fit_check.py [--only WORD] [--limit-s S] [--neighbours N] [--tiny]

Each case is a shape, a built-in recipe and a budget of the card. It is searched for this card, and
then the choice, the recipe as it stood and the N fastest neighbours that fit are trained for a few
steps by the functions of plan_error.py. One JSON line a plan: planned and measured tokens a second
and bytes; and one a case: how far below the fastest of them the choice was, and whether what was
reserved is within the budget. --tiny runs small shapes wherever it is.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plan_error as measure
import torch
from plan_rows import MODELS, Row, tiny
from random_model import write_config

from nibble.errors import NibbleError
from nibble.place.devices import pick_device
from nibble.spec.advice import words_of
from nibble.spec.arch import from_config
from nibble.spec.config import Recipe
from nibble.spec.load import load_recipe
from nibble.spec.neighbours import neighbours
from nibble.spec.plan import Plan
from nibble.spec.planner import Budget, budget_of
from nibble.spec.search import Found, search
from nibble.spec.units import GIB


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model of plan_rows.py, a built-in recipe with words, and GiB of a card."""

    model: str
    recipe: str
    words: tuple[str, ...]
    device_gib: float


CASES = (
    Case(model="llama3-8b", recipe="qlora", words=("max_length=2048",), device_gib=24),
    Case(model="llama3-8b", recipe="qlora", words=("max_length=2048",), device_gib=12),
    Case(model="llama3-8b", recipe="lora", words=("max_length=2048",), device_gib=16),
    Case(model="llama3-1b", recipe="full", words=("max_length=2048",), device_gib=16),
    Case(model="qwen2-7b", recipe="qlora", words=("max_length=8192",), device_gib=24),
)


def main() -> None:
    """Print the lines of all cases."""
    options = _options()
    began = time.perf_counter()
    device = pick_device("auto")
    numel = 1 << 16 if options.tiny else measure.POOL_NUMEL
    pool = torch.empty(numel, dtype=torch.bfloat16, device=device).normal_(0.0, 0.02)
    for case in CASES:
        name = f"{case.model} {case.recipe} {case.device_gib:g}"
        if options.only is not None and options.only not in name:
            continue
        if time.perf_counter() - began > options.limit_s:
            break
        config = dict(MODELS[case.model])
        config = tiny(config) if options.tiny else config
        rates: dict[str, float] = {}
        reserved = 0
        with tempfile.TemporaryDirectory() as folder:
            write_config(Path(folder), config)
            found = _found(case, folder, config, device)
            for label, made in _plans(found, options.neighbours):
                line = _line(made, Path(folder), device=device, pool=pool)
                print_line(case=name, plan=label, **line)
                if "tokens_per_s" in line:
                    rates[label] = line["tokens_per_s"]
                if label == "chosen":
                    reserved = line.get("reserved_bytes", 0)
        best = max(rates, key=lambda label: rates[label], default="none")
        chosen = rates.get("chosen", 0.0)
        print_line(
            case=name, fastest=best, share=chosen / rates[best] if rates else None,
            reserved_bytes=reserved, budget_bytes=found.budget.device_bytes,
        )  # fmt: skip


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only")
    parser.add_argument("--limit-s", type=float, default=540.0)
    parser.add_argument("--neighbours", type=int, default=4)
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()


def _found(case: Case, folder: str, config: dict[str, Any], device: torch.device) -> Found:
    on_cpu = device.type == "cpu"
    words = [f"model.path={folder}", "fit=auto", *case.words]
    if case.recipe not in ("lora", "full"):
        words.append("quant.cache=false")
    recipe = load_recipe(case.recipe, words)
    size = int(case.device_gib * GIB)
    budget = (
        Budget(device_bytes=None, host_bytes=size)
        if on_cpu
        else budget_of(recipe, device_bytes=size, host_bytes=None)
    )
    return search(
        recipe,
        architecture=from_config(config),
        hardware=measure._card(device),
        on_cpu=on_cpu,
        budget=budget,
    )


def _plans(found: Found, number: int) -> Iterator[tuple[str, Plan]]:
    """The choice, where it began, and the fastest neighbours that fit."""
    yield "chosen", found.plan
    started = found.planner(found.started)
    if found.budget.fits(started):
        yield "as it stood", started
    fitting = [
        row
        for row in neighbours(found)
        if row.plan is not None and row.is_free and found.budget.fits(row.plan)
    ]
    fitting.sort(
        key=lambda row: -(row.plan.speed.tokens_per_s if row.plan and row.plan.speed else 0)
    )
    for row in fitting[:number]:
        assert row.plan is not None
        yield words_of(row.overrides), row.plan


def _line(made: Plan, folder: Path, *, device: torch.device, pool: torch.Tensor) -> dict[str, Any]:
    """Planned and measured; whatever goes wrong is in the line."""
    recipe = Recipe.model_validate(made.recipe.model_copy(update={"fit": None}).model_dump())
    train = recipe.train
    row = Row(
        name="fit", model="fit", num_layers=0, method="fit", rows=train.micro_batch_size,
        length=recipe.data.max_length, passes=train.gradient_accumulation_steps,
        policy=train.activation_checkpointing, more=(),
    )  # fmt: skip
    speed = made.speed
    line: dict[str, Any] = {
        "planned_tokens_per_s": None if speed is None else speed.tokens_per_s,
        "planned_bytes": made.device_bytes,
    }
    measure._reset(device)
    base = measure._allocated(device)
    try:
        told = measure._measured(recipe, row, folder, device=device, pool=pool, base=base)
    except (NibbleError, RuntimeError) as error:
        return line | {"error": f"{type(error).__name__}: {error}"[:200]}
    return line | {
        "tokens_per_s": made.tokens_per_step / told["step_s"],
        "reserved_bytes": told["reserved_bytes"],
    }


def print_line(**words: Any) -> None:
    """One JSON line."""
    print(json.dumps({"bench": "fit", **words}), flush=True)


if __name__ == "__main__":
    main()
