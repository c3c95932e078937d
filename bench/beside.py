"""nibble beside Unsloth, liger and hf on the same work, in one run on one machine, with ratios.

    python bench/beside.py qlora packed lora full --packed rows.npz --folder /dev/shm/nf4 --profile
    python bench/beside.py --tiny

Each stack has one process, one after another (a step that is bound by launches differs by up to
40 % between machines, so only rows of one run are compared). WORK:

    qlora    Llama-3-8B shape, nf4 with double-quantised scales, LoRA r=16: 1x2048 and 4x2048, with
             what a 24 GB card leaves (23.5 GiB) used for activations, and with as little as may be
    packed   the same on real instructions, packed into 4 rows of 2048; tokens that are not padding
    lora     a bf16 base, LoRA r=16, 4x2048
    full     all weights with 8-bit AdamW, 4x2048

JSON lines of all stacks go to standard output, then a table. Ratios are nibble's tokens/s to the
stack's. `--stacks` leaves out what is not wanted; one that is not installed is a row that says so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
PEERS = ("hf", "liger", "unsloth")
CAP = "place.vram=23.5GiB"
AUTO = "train.keep_blocks=auto"
BF16 = "quant={format: none}"
FULL = ("adapter={kind: none}", BF16, "optim.name=adamw8bit")
# work -> (nibble's measurements: name, batches, words), (works of the peers), (who does them)
WORKS: dict[str, tuple[tuple[tuple[str, str, tuple[str, ...]], ...], tuple[str, ...], tuple]] = {
    "qlora": (
        (("nibble", "1x2048,4x2048", (CAP, AUTO)), ("nibble lean", "1x2048,4x2048", ())),
        ("qlora:1x2048", "qlora:4x2048"),
        PEERS,
    ),
    "packed": (
        (("nibble", "4xpacked", (CAP, AUTO)), ("nibble lean", "4xpacked", ())),
        ("packed:4",),
        PEERS,
    ),
    "lora": (
        (("nibble", "4x2048", (BF16, CAP, AUTO)), ("nibble lean", "4x2048", (BF16,))),
        ("lora:4x2048",),
        ("liger",),
    ),
    "full": (
        (("nibble", "4x2048", (*FULL, AUTO)), ("nibble lean", "4x2048", FULL)),
        ("full:4x2048",),
        ("liger",),
    ),
}
TINY = {"2048": "64", "4x": "2x", "packed:4": "packed:2"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("works", nargs="*", help=f"of {', '.join(WORKS)} (default: qlora)")
    parser.add_argument("--stacks", default=",".join(("nibble", *PEERS)))
    parser.add_argument("--packed", help="what packed_rows.py wrote")
    parser.add_argument("--folder", default="/dev/shm/nibble-nf4", help="for peers' checkpoint")
    parser.add_argument("--profile", action="store_true", help="the kernel-time table as well")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--limit-s", type=float, default=600.0, help="of one stack")
    parser.add_argument("--out", type=Path, help="JSON lines, appended to")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on a CPU too")
    options = parser.parse_args()
    works = options.works or ["qlora"]
    unknown = set(works) - set(WORKS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(WORKS)}")
    if "packed" in works and options.packed is None:
        parser.error("packed needs --packed FILE, which packed_rows.py writes")
    stacks = options.stacks.split(",")
    lines: list[dict[str, Any]] = []
    if set(stacks) & set(PEERS) and not (Path(options.folder) / "config.json").exists():
        words = ["peers.py", "prepare", options.folder, "--case", _case(options)]
        lines += _run("prepare", words, options)
    for stack in stacks:
        words = _nibble(options, works) if stack == "nibble" else _peer(options, stack, works)
        if words:
            lines += _run(stack, words, options)
    print(as_text(lines))


def _case(options: argparse.Namespace) -> str:
    return "tiny-llama" if options.tiny else "llama3-8b"


def _sized(options: argparse.Namespace, word: str) -> str:
    for old, new in TINY.items() if options.tiny else ():
        word = word.replace(old, new)
    return word


def _nibble(options: argparse.Namespace, works: list[str]) -> list[str]:
    """One command line for step.py: all measurements, each after a +."""
    words: list[str] = []
    for work in works:
        for name, batches, overrides in WORKS[work][0]:
            own = [_case(options), *overrides, "--batches", _sized(options, batches)]
            own += ["--name", f"{work}/{name}", "--steps", str(options.steps)]
            own += ["--packed", options.packed] if "packed" in batches else []
            own += ["--profile"] if options.profile and name == "nibble" else []
            words += [*(["+"] if words else []), *own]
    return ["step.py", *words]


def _peer(options: argparse.Namespace, stack: str, works: list[str]) -> list[str]:
    asked = [_sized(options, word) for work in works if stack in WORKS[work][2]
             for word in WORKS[work][1]]  # fmt: skip
    if not asked:
        return []
    words = ["peers.py", stack, *asked, "--folder", options.folder, "--case", _case(options)]
    words += ["--steps", str(options.steps)]
    words += ["--packed", options.packed] if options.packed else []
    return words + (["--profile"] if options.profile else [])


def _run(name: str, words: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A stack's JSON lines; those of what went wrong as well."""
    began = time.monotonic()
    command = [sys.executable, str(BENCH / words[0]), *words[1:]]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    try:
        printed, errors = process.communicate(timeout=options.limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        printed, errors = process.communicate()
        errors += f"\nstopped after {options.limit_s:g} s"
    lines = []
    for text in printed.splitlines():
        if text.startswith("{"):
            lines.append(json.loads(text))
    if process.returncode:
        last = (errors.strip().splitlines() or ["no output"])[-1]
        lines.append({"bench": "step", "stack": name, "failed": last[-300:]})
    seconds = round(time.monotonic() - began, 1)
    lines.append({"bench": "wall", "stack": name, "seconds": seconds})
    for line in lines:
        print(json.dumps(line), flush=True)
        if options.out is not None:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    return lines


# ---------------------------------------------------------------- the table


def as_text(lines: list[dict[str, Any]]) -> str:
    """Rows with ratios by work and batch, then where the device's time goes."""
    rows = [_row(line) for line in lines if line["bench"] == "step"]
    told = [
        "| work | batch | stack | tokens/s | nibble is | step ms | HFU | GiB allocated, reserved |",
        "|---|---|---|---|---|---|---|---|",
    ]
    best = {
        (row["work"], row["batch"], row["stack"]): row["tokens_per_s"]
        for row in rows
        if row["stack"].startswith("nibble") and row["tokens_per_s"]
    }
    for row in sorted(rows, key=lambda row: (row["work"], row["batch"])):
        told.append(_text(row, best))
    told += _kernel_table([line for line in lines if line["bench"] == "profile"])
    return "\n".join(told)


def _row(line: dict[str, Any]) -> dict[str, Any]:
    work, _, variant = (line.get("work") or "").partition("/")
    return {
        "work": work,
        "batch": line.get("batch", ""),
        "stack": variant or line["stack"],
        "tokens_per_s": line.get("tokens_per_s"),
        "step_ms": line.get("step_ms"),
        "hfu": line.get("hfu"),
        "allocated": line.get("allocated_gib"),
        "reserved": line.get("reserved_gib"),
        "failed": line.get("failed"),
        "keeps": line.get("keep_blocks"),
    }


def _text(row: dict[str, Any], best: dict[tuple[str, str, str], float]) -> str:
    name = row["stack"] + (f", {row['keeps']} blocks keep all" if row["keeps"] else "")
    if not row["tokens_per_s"]:
        return f"| {row['work']} | {row['batch']} | {name} | {row['failed'] or '-'} | | | | |"
    ratios = "-"
    if not row["stack"].startswith("nibble"):
        ours = [
            best.get((row["work"], row["batch"], own), 0.0) / row["tokens_per_s"]
            for own in ("nibble", "nibble lean")
        ]
        ratios = " / ".join(f"{ratio:.2f}" if ratio else "-" for ratio in ours)
    hfu = "-" if row["hfu"] is None else f"{row['hfu']:.1%}"
    return (
        f"| {row['work']} | {row['batch']} | {name} | {row['tokens_per_s']:,.0f} | {ratios} | "
        f"{row['step_ms']:.1f} | {hfu} | {row['allocated']:.2f}, {row['reserved']:.2f} |"
    )


def _kernel_table(profiles: list[dict[str, Any]]) -> list[str]:
    """Milliseconds of a step by kind of kernel, a column for each stack, work and batch."""
    if not profiles:
        return []
    kinds = sorted(
        {kind for line in profiles for kind in line["by_kind_ms"]},
        key=lambda kind: -max(line["by_kind_ms"].get(kind, 0.0) for line in profiles),
    )
    heads = [
        f"{line['stack']} {(line['work'] or '').partition('/')[0]} {line['batch']}"
        for line in profiles
    ]
    told = ["", f"| ms | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for kind in kinds:
        cells = (f"{line['by_kind_ms'].get(kind, 0.0):.1f}" for line in profiles)
        told.append(f"| {kind} | {' | '.join(cells)} |")
    idle = (f"{max(0.0, line['unprofiled_ms'] - line['kernels_ms']):.1f}" for line in profiles)
    told.append(f"| idle | {' | '.join(idle)} |")
    told.append(f"| kernels | {' | '.join(str(line['num_kernels']) for line in profiles)} |")
    return told


if __name__ == "__main__":
    main()
