"""What the plan says against what a GPU measures, over many configurations (plan_rows.py).

    python bench/plan_error.py [--part fit|held|all] [--shard I/N] [--limit-s S]
                               [--only WORD,...] [--graphs auto|off] [--profile] [--out FILE]
    python bench/plan_error.py --tiny                  every row's kind on a CPU, nothing measured
    python bench/plan_error.py report FILE... [--again] [--worst N]

Each row is trained in this process by the functions that `nibble train` runs: a model of true shape
with random weights, its placement, optimiser and loss; four steps and an evaluation. Then all of it
is freed, which is checked. Peaks are torch's own of each phase; what the allocator had reserved is
compared with the plan without the CUDA context, which is measured once. A step's time is the median
of those that follow, TIMED_S of them. Host memory is the process's own peak over what it was before
the row. The card's row in the user's file is the machine's, so calibrate it first. Whether passes
are replayed as CUDA graphs is decided for each row as `nibble train` decides it; --graphs off runs
all of them eagerly.

One JSON line a row. `report` makes the table of errors from such files, rows that calibrated the
plan and rows held out apart; --again plans them anew with the code as it is now, each for the card
as it was known to the file's first line, and with graphs where it had them.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TextIO

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from kernel_times import kernel_times
from loop_run import loop_run
from plan_rows import Row, all_rows, shrunk, tiny
from plan_table import report
from random_model import assemble_random, write_config
from torch import Tensor

from nibble.data import Batch
from nibble.errors import ConfigError, NibbleError
from nibble.nn.attention import PACKED, attention_name
from nibble.place import Group, placement
from nibble.place.activations import Activations
from nibble.place.base import Placement
from nibble.place.devices import pick_device
from nibble.spec.arch import from_config
from nibble.spec.config import Recipe
from nibble.spec.decide import decide
from nibble.spec.hardware import Hardware, hardware
from nibble.spec.plan import Plan, plan
from nibble.train.folder import gather_versions
from nibble.train.loop import _Run
from nibble.train.state import seed_everything
from nibble.use.assemble import Assembly, fill
from nibble.use.calibrate import operation_s
from nibble.use.objective import held_out_loss

NUM_STEPS = 4
TIMED_S, MAX_TIMED = 0.5, 20
POOL_NUMEL = 1 << 26
"""Random numbers that all weights are views of: 128 MiB."""
NUM_DOCUMENTS = 4
"""In a packed row."""
Graphs = bool | Literal["auto"]
GRAPHS: dict[str, Graphs] = {"auto": "auto", "off": False}


def main() -> None:
    options = _options()
    with _opened(options.out) as out:
        _measure(options, out)


@contextmanager
def _opened(name: str | None) -> Iterator[TextIO]:
    if name is None:
        yield sys.stdout
        return
    with Path(name).open("a", encoding="utf-8") as out:
        yield out


def _measure(options: argparse.Namespace, out: TextIO) -> None:
    """Print the line of the machine and those of the rows that were asked for."""
    began = time.perf_counter()
    device = pick_device("auto")
    pool = torch.empty(1 << 16 if options.tiny else POOL_NUMEL, dtype=torch.bfloat16, device=device)
    # As in trained models, hardly a number behind a wide layer is an outlier to LLM.int8.
    pool.normal_(0.0, 0.008)
    _say(out, **_about(device))
    index, total = map(int, options.shard.split("/"))
    rows = [row for row in all_rows() if options.part in ("all", ("fit", "held")[row.held_out])]
    words = (options.only or "").split(",")
    rows = [row for row in rows if any(word in row.name for word in words)]
    for number, row in enumerate(rows[index::total]):
        if time.perf_counter() - began > options.limit_s:
            _say(out, bench="stopped", done=number, of=len(rows[index::total]))
            break
        used = shrunk(row) if options.tiny else row
        _say(out, **_row(row, used, device=device, pool=pool, options=options))


def _options() -> argparse.Namespace:
    if sys.argv[1:2] == ["report"]:
        sys.exit(report(sys.argv[2:], planned=planned_again))
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--part", choices=("fit", "held", "all"), default="all")
    parser.add_argument("--shard", default="0/1", help="I/N: every Nth row, beginning with I")
    parser.add_argument("--limit-s", type=float, default=1e9, help="begin no row after so long")
    parser.add_argument("--only", help="rows with one of these words in their names")
    parser.add_argument("--graphs", choices=tuple(GRAPHS), default="auto", help="CUDA graphs")
    parser.add_argument("--profile", action="store_true", help="kernels of one step of each row")
    parser.add_argument("--out", help="append to this file instead of printing")
    parser.add_argument("--tiny", action="store_true", help="a few small layers and tokens")
    return parser.parse_args()


def _about(device: torch.device) -> dict[str, Any]:
    """The first line: the machine, and what the process takes before the first row."""
    words: dict[str, Any] = {"bench": "about", "host_bytes": _resident_bytes()}
    if device.type == "cuda":
        words |= _about_card(device)
        card = _card(device)
        words["hardware"] = None if card is None else dataclasses.asdict(card)
    return {
        **words,
        "versions": gather_versions(seed=0) | {"command": None},
        "commit": os.environ.get("NIBBLE_COMMIT"),
    }


def _about_card(device: torch.device) -> dict[str, Any]:
    """Context and workspaces of cuBLAS: what is there before and after the first products."""
    free, total = torch.cuda.mem_get_info(device)
    before = torch.cuda.memory_allocated(device)
    context = total - free - torch.cuda.memory_reserved(device)
    x = _some_numbers(device)
    made = [torch.cuda.memory_allocated(device) - before for _ in _workspaces(x)]
    del x
    torch.cuda.synchronize(device)
    gc.collect()
    after = torch.cuda.memory_allocated(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "device": torch.cuda.get_device_name(device),
        "context_bytes": context,
        "context_later_bytes": total - free - torch.cuda.memory_reserved(device),
        "workspace_bytes": after - before,
        "workspaces_bytes": made,
        "is_expandable": any(
            segment.get("is_expandable")
            for segment in torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        ),
        "host_later_bytes": _resident_bytes(),
    }


def _some_numbers(device: torch.device) -> Tensor:
    return torch.ones(64, 64, device=device, dtype=torch.bfloat16, requires_grad=True)


def _workspaces(x: Tensor) -> Iterator[None]:
    """Have cuBLAS make what it keeps for each kind of product, forward and backward."""
    for bias in (None, x[0].detach()):
        torch.autograd.backward(torch.nn.functional.linear(x, x, bias).sum())
        yield


def _row(
    row: Row, used: Row, *, device: torch.device, pool: Tensor, options: argparse.Namespace
) -> dict[str, Any]:
    """Measure one row; whatever goes wrong is in the line."""
    found: dict[str, Any] = {"bench": "row", "row": row.name, "held_out": row.held_out}
    is_tiny, graphs = options.tiny, GRAPHS[options.graphs]
    began = time.perf_counter()
    _reset(device)
    before = _allocated(device)
    config = tiny(used.config()) if is_tiny else used.config()
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_config(Path(folder), config)
            asked = _recipe(used, folder, is_tiny=is_tiny, graphs=graphs)
            recipe = _decided(asked, config, device)
            found |= _planned(recipe, config, device)
            found |= _measured(
                recipe,
                used,
                Path(folder),
                device=device,
                pool=pool,
                base=before,
                profiled=options.profile,
            )
    except torch.OutOfMemoryError as error:
        found |= {"out_of_memory": str(error)[:200], **_peaks(device, before)}
        traceback.clear_frames(error.__traceback__)
    except (NibbleError, RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        last = traceback.format_exc().strip().splitlines()[-6:]
        found |= {"error": f"{type(error).__name__}: {error}"[:300], "where": last}
        traceback.clear_frames(error.__traceback__)
    _reset(device)
    left = _allocated(device) - before
    held = {"left_bytes": left, "left_reserved_bytes": _reserved(device)}
    return {**found, **held, "wall_s": round(time.perf_counter() - began, 2)}


def _recipe(row: Row, folder: str, *, is_tiny: bool, graphs: Graphs) -> Recipe:
    words = row.recipe()
    if is_tiny and words.get("optim", {}).get("rank", 0) > 16:
        words["optim"] = {**words["optim"], "rank": 16}
    words["model"] = {"path": folder, "from_scratch": row.method == "factorised"}
    words["train"] = {**words["train"], "cuda_graphs": graphs}
    return Recipe.model_validate(words)


def _decided(recipe: Recipe, config: dict[str, Any], device: torch.device) -> Recipe:
    """With values for whatever is `auto`, as `nibble train` finds them."""
    if device.type != "cuda":
        return recipe
    return decide(
        recipe,
        architecture=from_config(config),
        hardware=_card(device),
        on_cpu=False,
        limit_bytes=torch.cuda.get_device_properties(device).total_memory,
    )


def _planned(recipe: Recipe, config: dict[str, Any], device: torch.device) -> dict[str, Any]:
    made = plan(
        recipe,
        architecture=from_config(config),
        hardware=_card(device),
        on_cpu=device.type == "cpu",
    )
    return {"planned": plan_words(made), "cuda_graphs": recipe.train.cuda_graphs is True}


def plan_words(made: Plan) -> dict[str, Any]:
    """What a plan says of memory and time."""
    speed = made.speed
    return {
        "reserved_bytes": made.allocator_bytes,
        "host_bytes": made.host_bytes,
        "step_s": None if speed is None else made.tokens_per_step / speed.tokens_per_s,
        "limiter": None if speed is None else speed.limiter,
        "peak": f"{made.peak.name}: {made.peak.moment}",
        "phases": {
            p.name: {"moment": p.moment, "device": dict(p.device), "host": dict(p.host)}
            for p in made.phases
        },
    }


def planned_again(row: Row, about: dict[str, Any], line: dict[str, Any]) -> dict[str, Any]:
    """The plan of a row by the code as it is, for the card that measured it and as it ran there."""
    recipe = _recipe(row, "model", is_tiny=False, graphs=line.get("cuda_graphs", False))
    known = None
    if about.get("hardware"):
        known = Hardware(**about["hardware"])
    elif about.get("device"):
        known = hardware(about["device"])
    made = plan(recipe, architecture=from_config(row.config()), hardware=known, on_cpu=False)
    return plan_words(made)


def _card(device: torch.device) -> Hardware | None:
    if device.type != "cuda":
        return None
    try:
        return hardware(torch.cuda.get_device_name(device))
    except ConfigError:
        return None


def _measured(
    recipe: Recipe,
    row: Row,
    folder: Path,
    *,
    device: torch.device,
    pool: Tensor,
    base: int,
    profiled: bool,
) -> dict[str, Any]:
    """Load, first step, steady steps, evaluation: peaks of each, and a step's time."""
    host = _resident_bytes()
    seed_everything(recipe.train.seed)
    place = placement(recipe.place, Group.alone(device), optim=recipe.optim)
    try:
        began = time.perf_counter()
        assembly = _filled(recipe, place, pool)
        _wait(device)
        memory = {"load": _peaks(device, base)}
        build_s = time.perf_counter() - began
        run = loop_run(assembly, place, folder)
        place.reset_memory()  # as a run does when it is loaded
        steps = _batches(row, vocabulary=assembly.built.config.get_text_config().vocab_size)
        walls = [_timed(run, steps, device)]
        memory["first step"] = _peaks(device, base)
        place.reset_memory()  # as a run does when its first step is made
        walls += [_timed(run, steps, device) for _ in range(NUM_STEPS - 2)]
        steady = _peaks(device, base)
        parts: dict[str, dict[str, int]] = {}
        with _observed(run, parts, base):
            walls.append(_timed(run, steps, device))
        parts["update"] = _peaks(device, base)
        memory["steady step"] = {
            name: max(part[name] for part in (steady, *parts.values())) for name in steady
        }
        place.reset_memory(keep_cache=True)
        held_out_loss(assembly.model, next(steps), place=place, objective=run.objective)
        memory["evaluation"] = _peaks(device, base)
        loss = float(run.last_loss or 0.0)
        place.reset_memory(keep_cache=True)
        walls += _more_walls(run, steps, device)
        kernels = {}
        if profiled:
            kernels["kernels"] = kernel_times(lambda: run.step(next(steps)), device=device)
    finally:
        place.close()
    return {
        "measured": memory,
        "reserved_bytes": max(phase["reserved_bytes"] for phase in memory.values()),
        "allocated_bytes": max(phase["allocated_bytes"] for phase in memory.values()),
        "host_bytes": _peak_resident_bytes(),
        "host_before_bytes": host,
        "step_s": statistics.median(walls[NUM_STEPS + 1 :] or walls[-2:]),
        # Whether the host was as fast as when it was calibrated.
        "launch_us": round(operation_s(device, num_operations=1000) * 1e6, 2),
        "parts": parts,
        "num_graphs": 0 if run.passes is None else run.passes.num_graphs,
        "told": [] if run.passes is None else run.passes.told,
        "walls_s": [round(wall, 5) for wall in walls],
        "build_s": round(build_s, 2),
        "loss": loss,
        **kernels,
    }


def _filled(recipe: Recipe, place: Placement, pool: Tensor) -> Assembly:
    assembly = assemble_random(recipe, device=place.device, pool=pool)
    train = recipe.train
    wants = recipe.data.packing or train.activation_checkpointing == "selective"
    name = attention_name(type(assembly.model), assembly.built.config)
    if wants and name == PACKED:
        assembly.model.set_attn_implementation(PACKED)  # type: ignore[operator]
    fill(assembly, place, activations=Activations.of(train))
    return assembly


def _batches(row: Row, *, vocabulary: int) -> Iterator[list[Batch]]:
    """Steps of random tokens, every one a target; packed rows hold documents of equal length."""
    generator = torch.Generator().manual_seed(0)
    shape = (row.rows, row.length)
    packed = "packed" in row.more
    document = row.length // NUM_DOCUMENTS if packed else row.length
    positions = torch.arange(row.length).remainder(document).expand(shape).contiguous()
    while True:
        step = []
        for _ in range(row.passes):
            ids = torch.randint(0, vocabulary, shape, generator=generator)
            labels = ids.roll(-1, dims=1)
            labels[:, document - 1 :: document] = -100
            step.append(
                Batch(
                    input_ids=ids,
                    labels=labels,
                    position_ids=positions if packed else None,
                    attention_mask=None,
                    num_targets=int((labels != -100).sum()),
                    num_tokens=ids.numel(),
                    doc_lengths=((document,) * (row.length // document),) * row.rows,
                )
            )
        yield step


def _timed(run: _Run, steps: Iterator[list[Batch]], device: torch.device) -> float:
    batches = next(steps)
    _wait(device)
    began = time.perf_counter()
    result = run.step(batches)
    _wait(device)
    wall = time.perf_counter() - began
    run.last_loss = float(result.loss)
    return wall


def _more_walls(run: _Run, steps: Iterator[list[Batch]], device: torch.device) -> list[float]:
    """Of steps for TIMED_S; the first of several is not one of them, as evaluation went before."""
    first = _timed(run, steps, device)
    number = min(MAX_TIMED, int(TIMED_S / max(first, 1e-6)))
    return [first, *(_timed(run, steps, device) for _ in range(number))]


@contextmanager
def _observed(run: _Run, parts: dict[str, dict[str, int]], base: int) -> Iterator[None]:
    """Peaks of forward, of backward, and of what comes after, each apart."""
    device, place, inner = run.place.device, run.place, run.objective
    clip = place.clip_

    def forward(model: Any, batch: Any) -> Tensor:
        _begin_phase(device)
        loss = inner(model, batch)
        parts["forward"] = _peaks(device, base)
        _begin_phase(device)
        return loss

    def clipped(*args: Any, **words: Any) -> Tensor:
        parts["backward"] = _peaks(device, base)
        _begin_phase(device)
        return clip(*args, **words)

    run.objective, place.clip_ = forward, clipped  # type: ignore[method-assign]
    yield
    run.objective, place.clip_ = inner, clip  # type: ignore[method-assign]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset(device: torch.device) -> None:
    """Free what the last row had, and begin new peaks."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        # Recorded passes had a stream of their own, and cuBLAS keeps what it had there.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        deque(_workspaces(_some_numbers(device)), maxlen=0)
        torch.cuda.synchronize(device)
        gc.collect()
        torch.cuda.empty_cache()
    _begin_phase(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory begins anew


def _begin_phase(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _reserved(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def _peaks(device: torch.device, base: int) -> dict[str, int]:
    """Peaks of the phase beyond what was allocated before the row."""
    if device.type != "cuda":
        return {"allocated_bytes": 0, "reserved_bytes": 0, "held_bytes": 0}
    return {
        "allocated_bytes": torch.cuda.max_memory_allocated(device) - base,
        "reserved_bytes": torch.cuda.max_memory_reserved(device) - base,
        "held_bytes": torch.cuda.memory_allocated(device) - base,
    }


def _status(word: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(word):
            return int(line.split()[1]) * 1024
    return 0


def _resident_bytes() -> int:
    return _status("VmRSS")


def _peak_resident_bytes() -> int:
    return _status("VmHWM")


def _say(out: TextIO, **words: Any) -> None:
    out.write(json.dumps(words) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
