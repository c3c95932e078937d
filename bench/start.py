"""Seconds from the command to the first step of an 8B, from a warm cache of its packed base.

    python bench/start.py --folder /tmp/nibble-start [--runs 2] [--parts] [--importtime]
    python bench/start.py --tiny

Once, FOLDER gets a checkpoint of Llama-3-8B's shape (16 GB of which only embeddings, head and norms
are written: the linears are holes, which read as zeros and take no disk), a tokenizer of as many
words and a few rows. The first `nibble train` packs and keeps the base; then fresh processes are
timed until the line of their first step appears. Every line that a run prints is told with its
second, and so is the end of each large import, which a thread sees that looks fifty times a second;
`stages` are the seconds between the main ones. --parts times imports and the start of CUDA alone;
--importtime adds a run under Python's own clock of imports (which slows them) and prints what each
package took itself, and the costliest modules with all that they import.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

BENCH = Path(__file__).resolve().parent
FIRST_STEP = re.compile(r"step +1/")
IMPORTED = "imported: "
WATCHED = """
import runpy, sys, threading, time
def watch(left=("torch", "nibble.run", "transformers", "transformers.modeling_utils", "triton",
                "torch._dynamo", "transformers.models.llama.modeling_llama")):
    left = list(left)
    while left:
        for name in tuple(left):
            module = sys.modules.get(name)
            spec = getattr(module, "__spec__", None)
            if spec is not None and not getattr(spec, "_initializing", False):
                print("imported: " + name, flush=True)
                left.remove(name)
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
runpy.run_module("nibble", run_name="__main__", alter_sys=True)
"""
STAGES = {
    "header": re.compile(r"model · "),
    "torch": re.compile(IMPORTED + r"torch$"),
    "nibble": re.compile(IMPORTED + r"nibble\.run$"),
    "transformers": re.compile(IMPORTED + r"transformers\.models\."),
    "model built": re.compile(r"build the model: done"),
    "weights loaded": re.compile(r"load weights: done"),
    "first step": FIRST_STEP,
}
"""The first line of each kind ends a stage. One that took too little time to be told has none."""
IMPORT_LINE = re.compile(r"import time: +(\d+) \| +(\d+) \|( *)(\S+)")
PARTS = """
import time
begin = time.perf_counter()
def told(name):
    global begin
    now = time.perf_counter()
    print(name, round(now - begin, 2), flush=True)
    begin = time.perf_counter()
import nibble.cli.app, nibble.spec.load
told("nibble.cli")
import torch
told("torch")
import nibble.run
told("nibble.run")
from transformers import AutoModelForCausalLM, AutoTokenizer
told("transformers")
if torch.cuda.is_available():
    torch.zeros(1, device="cuda")
    told("CUDA")
    x = torch.zeros(64, 64, device="cuda", dtype=torch.bfloat16); x @ x; torch.cuda.synchronize()
    told("cuBLAS")
    import triton
    told("triton")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/nibble-start"))
    parser.add_argument("--runs", type=int, default=2, help="warm starts that are timed")
    parser.add_argument("--limit-s", type=float, default=180.0, help="of one start")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--importtime", action="store_true")
    parser.add_argument("--top", type=int, default=20, help="rows of the table of imports")
    parser.add_argument("--tiny", action="store_true", help="a small shape, on a CPU")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    if options.parts:
        began = time.perf_counter()
        printed = subprocess.run(
            [sys.executable, "-c", PARTS], capture_output=True, text=True, check=True
        ).stdout
        parts = dict(line.rsplit(" ", 1) for line in printed.splitlines())
        total = round(time.perf_counter() - began, 2)
        say(bench="start parts", process_s=total, **{k: float(v) for k, v in parts.items()})
    if not (options.folder / "config.json").exists():
        began = time.perf_counter()
        write_checkpoint(options.folder, "tiny-llama" if options.tiny else "llama3-8b")
        say(bench="start checkpoint", seconds=round(time.perf_counter() - began, 1))
    for number in range(options.runs + 1):
        start(options, "packs" if number == 0 else "warm")
    if options.importtime:
        import_times(options)


def train_words(options: argparse.Namespace) -> list[str]:
    """What follows `nibble`; removes the folder of an earlier run."""
    folder = options.folder
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    return [
        *("train", "qlora", f"model.path={folder / 'model'}", f"data.train={folder}/rows.jsonl"),
        *("train.max_steps=2", "train.gradient_accumulation_steps=1", "adapter.dropout=0"),
        *("train.log_every=1", "report.sinks=plain", f"output_dir={run}"),
        *(("data.max_length=64", "place.device=cpu") if options.tiny else ()),
        *options.overrides,
    ]


def variables(options: argparse.Namespace) -> dict[str, str]:
    """The environment of a run, with a cache of its own."""
    return {**os.environ, "NIBBLE_CACHE": str(options.folder / "cache"), "HF_HUB_OFFLINE": "1"}


def start(options: argparse.Namespace, name: str) -> None:
    """Run `nibble train` for two steps and print when each of its lines came."""
    command = [sys.executable, "-u", "-c", WATCHED, *train_words(options)]
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=variables(options),
    )
    timer = threading.Timer(options.limit_s, process.kill)
    timer.start()
    timeline: list[tuple[float, str]] = []
    first_s = None
    assert process.stdout is not None
    for line in process.stdout:
        now = round(time.perf_counter() - began, 2)
        timeline.append((now, line.rstrip()[:110]))
        if first_s is None and FIRST_STEP.search(line):
            first_s = now
    code = process.wait()
    timer.cancel()
    total = round(time.perf_counter() - began, 2)
    say(bench="start", run=name, first_step_s=first_s, process_s=total, exit_code=code)
    say(bench="start stages", run=name, **stages(timeline))
    say(bench="start timeline", run=name, lines=shown(timeline))
    if code != 0:
        print("\n".join(line for _, line in timeline[-20:]), file=sys.stderr)


def stages(timeline: list[tuple[float, str]]) -> dict[str, float]:
    """Seconds that each stage took, in the order in which they ended."""
    ends = {}
    for at, line in timeline:
        for name, pattern in STAGES.items():
            if name not in ends and pattern.search(line):
                ends[name] = at
    lengths, before = {}, 0.0
    for name, at in sorted(ends.items(), key=lambda item: item[1]):
        lengths[name], before = round(at - before, 2), at
    return lengths


def import_times(options: argparse.Namespace) -> None:
    """Print the packages and modules whose imports take longest in a warm start."""
    command = [sys.executable, "-X", "importtime", "-m", "nibble", *train_words(options)]
    told = subprocess.run(
        command, capture_output=True, text=True, env=variables(options), check=True
    ).stderr
    packages: dict[str, float] = {}
    modules: dict[str, float] = {}
    for own, cumulative, _, module in IMPORT_LINE.findall(told):
        package = module.partition(".")[0]
        packages[package] = packages.get(package, 0.0) + int(own) / 1e6
        modules[module] = max(modules.get(module, 0.0), int(cumulative) / 1e6)
    total = round(sum(packages.values()), 2)
    say(bench="start imports", num_modules=len(modules), total_s=total)
    say(bench="start imports, own_s by package", **costliest(packages, options.top))
    say(bench="start imports, cumulative_s by module", **costliest(modules, 2 * options.top))


def costliest(seconds: dict[str, float], num: int) -> dict[str, float]:
    """The largest of them, first."""
    ordered = sorted(seconds.items(), key=lambda item: -item[1])[:num]
    return {name: round(value, 3) for name, value in ordered}


def shown(timeline: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Without the lines that come together with the one before, such as those of the plan."""
    kept: list[tuple[float, str]] = []
    for at, line in timeline:
        apart = not kept or at - kept[-1][0] >= 0.05
        is_told = FIRST_STEP.search(line) or line.startswith(("nibble:", IMPORTED))
        if line and (apart or is_told):
            kept.append((at, line))
    return kept


def write_checkpoint(folder: Path, case: str) -> None:
    """config.json, model.safetensors with holes, tokenizer.json and rows.jsonl."""
    from peers import write_tokenizer
    from random_model import CASES, write_config

    config = CASES[case].config
    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    shapes = tensor_shapes(config)
    for name, shape in shapes.items():
        size = 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    begin = 8 + len(raw)
    # The high halves of float32 numbers are bfloat16; a megabyte of them is repeated.
    some = np.random.default_rng(0).normal(0.0, 0.02, 2**19).astype("<f4").view("<u2")[1::2]
    ones = np.full(2**12, 0x3F80, "<u2")
    with (model / "model.safetensors").open("wb") as file:
        file.truncate(begin + end)
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, shape in shapes.items():
            if ".layers." in name and len(shape) == 2:
                continue
            file.seek(begin + header[name]["data_offsets"][0])
            source = ones if len(shape) == 1 else some
            left = prod(shape)
            while left > 0:
                left -= file.write(source[:left].tobytes()) // 2
    write_config(model, config)
    write_tokenizer(model, config["vocab_size"])
    words = [" ".join(f"w{n}" for n in range(5 + i, 500 + i) if n < 500) for i in range(32)]
    rows = [{"instruction": "w4 w5", "output": text} for text in words]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text("{}")


def tensor_shapes(config: dict[str, Any]) -> dict[str, list[int]]:
    """Names and shapes of a Llama's tensors."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": [config["vocab_size"], hidden]}
    for number in range(config["num_hidden_layers"]):
        own = {
            "self_attn.q_proj": [hidden, hidden],
            "self_attn.k_proj": [keys, hidden],
            "self_attn.v_proj": [keys, hidden],
            "self_attn.o_proj": [hidden, hidden],
            "mlp.gate_proj": [inner, hidden],
            "mlp.up_proj": [inner, hidden],
            "mlp.down_proj": [hidden, inner],
            "input_layernorm": [hidden],
            "post_attention_layernorm": [hidden],
        }
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in own.items()}
    return shapes | {
        "model.norm.weight": [hidden],
        "lm_head.weight": [config["vocab_size"], hidden],
    }


def say(**values: Any) -> None:
    """One JSON line."""
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
