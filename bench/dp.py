"""DataParallel against ddp on the GPUs of this machine: tokens per second of one recipe.

    python bench/dp.py RECIPE [key=value ...]

Both see the same rows: `train.micro_batch_size` is of one pass of dp over all GPUs together, and is
divided by their number for ddp. The first steps are left out. One line a placement, as JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from nibble.spec.load import load_recipe

WARM_UP = 3


def main() -> None:
    """Train a few steps each way and print what metrics.jsonl says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    num_gpus = torch.cuda.device_count()
    rows = load_recipe(options.recipe, options.overrides).train.micro_batch_size
    assert rows % num_gpus == 0, f"train.micro_batch_size={rows} is not divided by {num_gpus}"
    for kind, each in (("dp", rows), ("ddp", rows // num_gpus)):
        with tempfile.TemporaryDirectory() as folder:
            words = [
                f"place.kind={kind}",
                f"train.micro_batch_size={each}",
                f"train.max_steps={options.steps}",
                f"output_dir={folder}/run",
                "report.sinks=[plain]",
            ]
            command = [sys.executable, "-m", "nibble", "train", options.recipe]
            subprocess.run([*command, *options.overrides, *words], check=True, stdout=sys.stderr)
            lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
        steps = [
            one for one in map(json.loads, lines) if one.get("step_s") and one["step"] > WARM_UP
        ]
        print(
            json.dumps(
                {
                    "kind": kind,
                    "gpus": num_gpus,
                    "tokens_per_s": sum(one["num_tokens"] for one in steps)
                    / sum(one["step_s"] for one in steps),
                    "peak_gib": max(one["peak_gib"] for one in steps),
                }
            )
        )


if __name__ == "__main__":
    main()
