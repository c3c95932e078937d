"""DataParallel against ddp on the GPUs of this machine, and how many times ddp is faster.

    python bench/dp.py [--case llama3-8b] [--batch 4x2048] [--steps 3] [key=value ...]

A true shape with random weights, as bench/seventy.py makes and times it. Both see the same rows:
`--batch` is ROWSxTOKENS of each card, and dp takes that of all cards in one pass. `alone` is one
card with its own rows. JSON lines, the last one with the ratio that `place.kind=dp` tells
(DDP_TIMES in src/nibble/place/dp.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SEVENTY = Path(__file__).with_name("seventy.py")


def main() -> None:
    """Time each way in processes of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--case", default="llama3-8b")
    parser.add_argument("--batch", default="4x2048", help="ROWSxTOKENS of each card")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--kinds", default="dp,ddp,alone")
    options = parser.parse_intermixed_args()
    cards = max(1, torch.cuda.device_count())
    rates = {kind: measured(options, kind, cards) for kind in options.kinds.split(",")}
    found: dict[str, Any] = {f"{kind}_tokens_per_s": rate for kind, rate in rates.items()}
    if {"dp", "ddp"} <= rates.keys():
        found["ddp_times_dp"] = round(rates["ddp"] / rates["dp"], 2)
    if {"alone", "ddp"} <= rates.keys():
        found["ddp_times_alone"] = round(rates["ddp"] / rates["alone"], 2)
    print(json.dumps({"bench": "dp", "case": options.case, "cards": cards, **found}))


def measured(options: argparse.Namespace, kind: str, cards: int) -> float:
    """Tokens per second of all cards; prints the lines of the run."""
    rows, _, length = options.batch.partition("x")
    all_rows = int(rows) * cards if kind == "dp" else int(rows)
    python = [sys.executable]
    if kind == "ddp" and cards > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cards}"]
    words = [f"place.kind={'single' if kind == 'alone' else kind}", "place.resident_blocks=auto"]
    done = subprocess.run(
        [*python, str(SEVENTY), "--case", options.case, "--batches", f"{all_rows}x{length}",
         "--steps", str(options.steps), "--warmup", "1", *words, *options.overrides],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    step = next(line for line in lines if line["bench"] == "step")
    print(json.dumps({**step, "kind": kind}), flush=True)
    return float(step["tokens_per_s"])


if __name__ == "__main__":
    main()
