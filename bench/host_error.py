"""Planned host memory against that of whole `nibble train` processes.

    python bench/host_error.py --folder /tmp/nibble-host [--only WORD]
    python bench/host_error.py --tiny

Each case is a fresh process on a checkpoint of Llama-3-8B's shape (bench/start.py writes it: the
linears are holes) or on a built-in shape: weights read, packed, trained for three steps, evaluated
and saved. The run records the largest resident size of its process beside its plan; a line a case
tells both, by phase. What the kernel keeps of files it has read is not the process's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from start import say, variables, write_checkpoint

GIB = 1 << 30
STEPS = ("train.max_steps=4", "train.log_every=1", "report.sinks=plain",
         "train.gradient_accumulation_steps=2")  # fmt: skip
LLAMA = "model.path={folder}/model"
SCRATCH = ("model.tokenizer=builtin:bytes", "model.from_scratch=true", "data.max_length=4096")
EVALUATED = "data.eval_rows=4"
CASES: dict[str, tuple[str, ...]] = {
    "qlora, packs": ("qlora", LLAMA, EVALUATED),
    "qlora, warm": ("qlora", LLAMA, EVALUATED),
    "qlora, offloaded activations": ("qlora", LLAMA, "train.activation_offload=true"),
    "qlora, streamed": ("qlora", LLAMA, "place.kind=stream", "place.resident_blocks=4"),
    "lora, bf16": ("lora", LLAMA),
    "lora, int8": ("lora", LLAMA, "quant.format=int8"),
    "full, 1B": ("full", "model.path=builtin:llama-1b", *SCRATCH),
    "galore, 1B": ("galore", "model.path=builtin:llama-1b", *SCRATCH),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/nibble-host"))
    parser.add_argument("--only", default="", help="cases with this in their names")
    parser.add_argument("--limit-s", type=float, default=120.0, help="of one case")
    parser.add_argument("--tiny", action="store_true", help="a small shape, on a CPU")
    options = parser.parse_args()
    if not (options.folder / "config.json").exists():
        write_checkpoint(options.folder, "tiny-llama" if options.tiny else "llama3-8b")
    for name, words in CASES.items():
        if options.only in name:
            say(bench="host", case=name, **measured(options, words))


def measured(options: argparse.Namespace, words: tuple[str, ...]) -> dict[str, Any]:
    """Run one case; the run's plan and what was measured, GiB by phase."""
    folder = options.folder
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    recipe, *settings = (word.format(folder=folder) for word in words)
    tiny = ("place.device=cpu",) if options.tiny else ()
    if options.tiny:
        settings = [word.replace("llama-1b", "llama-9m") for word in settings]
        settings = [word for word in settings if not word.startswith("place.")]
        settings += ["optim.rank=8"] if recipe == "galore" else []
    command = [
        *(sys.executable, "-m", "nibble", "train", recipe, *settings, *STEPS, *tiny),
        *(f"data.train={folder}/rows.jsonl", f"output_dir={run}"),
    ]
    began = time.perf_counter()
    try:
        done = subprocess.run(
            command, env=variables(options), capture_output=True, text=True, timeout=options.limit_s
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {options.limit_s:g} s"}
    seconds = round(time.perf_counter() - began, 1)
    if done.returncode != 0:
        return {"failed": done.stderr.strip().splitlines()[-1][:300], "seconds": seconds}
    told = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    phases = told["measured"]["phases"]
    planned = {name: told["phases"][name]["host_bytes"] for name in phases}
    on_device = {
        name: told["phases"][name]["device_bytes"] if told["on_cpu"] else 0 for name in phases
    }
    planned = {name: size + on_device[name] for name, size in planned.items()}
    said, seen = max(planned.values()), told["measured"]["host_bytes"]
    return {
        "error": round(said / seen - 1, 4),
        "planned_gib": round(said / GIB, 3),
        "measured_gib": round(seen / GIB, 3),
        "phases": {
            name: [round(planned[name] / GIB, 3), round(phases[name]["host_bytes"] / GIB, 3)]
            for name in phases
        },
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
