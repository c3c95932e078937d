"""Llama-2-70B, QLoRA r=16 on all linears, on cards capped to 23.5 GiB: speed, memory, exactness.

    torchrun --nproc-per-node 2 bench/seventy.py [--batches 4x2048,1x2048,1x512] [key=value ...]
    python bench/seventy.py --batches 4x2048 place.resident_blocks=20  (one card)
    torchrun --nproc-per-node 2 bench/seventy.py place.kind=fsdp
    python bench/seventy.py --bus-gbs 25 --batches 1x512,1x1024,1x2048,4x2048
    python bench/seventy.py --exact --layers 4 --batches 1x512   (gradients, bit for bit)
    ... --cache FOLDER          the first start packs and keeps, the second one reads
    ... --batches 1x32768 --steps 0 train.activation_offload=true train.mlp_tile_tokens=4096

True shape, random weights drawn on the device layer by layer (no checkpoint of 140 GB). What is
timed is what `nibble train` runs. `--bus-gbs` slows each copy down to that rate: pieces of 16 MiB
with sleeps between them on the copy stream. JSON lines: `start` (seconds of loading, of registering
host memory, of the first step, until its end since the process began; host memory of all
processes), then for each batch size `step` with tokens/s of all cards, the median of synchronised
steps, peak GiB of each card, copies of blocks in a step, and host memory now and at its peak.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "--exact" in sys.argv:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
import yaml
from host_bytes import GIB, Sampler, age_s, pinned_bytes
from loop_run import loop_run
from random_model import CASES, RandomWeights, assemble_random, write_config
from step import RandomSteps
from torch import Tensor

from nibble.place import Group, placement
from nibble.place.activations import Activations
from nibble.place.stream import Stream
from nibble.spec.config import Place, Recipe
from nibble.train.state import seed_everything
from nibble.use.assemble import fill

CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class SeededWeights(RandomWeights):
    """Values that depend on their name alone, so that every run has the same."""

    def only(
        self, wanted: Callable[[str], bool], rows: Callable[[str], slice | None] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        del rows
        generator = torch.Generator(self.device)
        for name, parameter in self.skeleton.named_parameters():
            if not wanted(name):
                continue
            value = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.device)
            if value.dim() > 1:
                seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
                value.normal_(0.0, 0.02, generator=generator.manual_seed(seed))
            else:
                value.fill_(0.0 if name.endswith("bias") else 1.0)
            yield name, value


@dataclass(frozen=True, kw_only=True)
class SlowBus:
    """A copy at a lower rate: after each chunk the stream sleeps for the rest of its time."""

    cycles_per_chunk: int

    def __call__(self, target: Tensor, source: Tensor) -> None:
        for start in range(0, source.numel(), CHUNK_BYTES):
            piece = slice(start, start + CHUNK_BYTES)
            target[piece].copy_(source[piece], non_blocking=True)
            torch.cuda._sleep(self.cycles_per_chunk)


def slow_bus(rate_gbs: float, device: torch.device) -> SlowBus:
    """Measure the bus and the clock, and sleep for what the bus is too fast."""
    source = torch.empty(32 * CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)

    def seconds(action: Callable[[], object]) -> float:
        action()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        action()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1e3

    cycles = 100_000_000
    cycle_s = seconds(lambda: torch.cuda._sleep(cycles)) / cycles
    chunk_s = seconds(lambda: SlowBus(cycles_per_chunk=1)(target, source)) / 32
    wanted_s = CHUNK_BYTES / (rate_gbs * 1e9)
    slow = SlowBus(cycles_per_chunk=max(1, int((wanted_s - chunk_s) / cycle_s)))
    found = source.numel() / seconds(lambda: slow(target, source)) / 1e9
    _say(bench="bus", native_gbs=round(CHUNK_BYTES / chunk_s / 1e9, 1), slowed_gbs=round(found, 1))
    return slow


def main() -> None:
    options = _options()
    case = CASES[options.case]
    config = dict(case.config)
    if options.layers is not None:
        config["num_hidden_layers"] = options.layers
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), config)
        recipe = _recipe(options, folder)
        with Group.from_environment(recipe.place) as group:
            if options.exact:
                _exact(options, recipe, group)
                return
            _measure_all(options, recipe, group, Path(folder))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--case", default="llama2-70b", choices=CASES)
    parser.add_argument("--layers", type=int, help="fewer layers of the same width")
    parser.add_argument("--batches", default="4x2048,1x2048,1x512", help="ROWSxTOKENS, ...")
    parser.add_argument("--steps", type=int, default=5, help="0: the first step alone")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--bus-gbs", type=float, help="slow the bus down to this rate")
    parser.add_argument("--exact", action="store_true", help="streamed against resident gradients")
    parser.add_argument("--cache", help="folder of the packed cache")
    return parser.parse_intermixed_args()


def _recipe(options: argparse.Namespace, folder: str) -> Recipe:
    words = {section: dict(keys) for section, keys in CASES[options.case].recipe.items()}
    words["model"] = {"path": folder}
    words["quant"]["cache"] = options.cache is not None
    if options.cache is not None:
        os.environ["NIBBLE_CACHE"] = options.cache
    words["place"] = {"kind": "stream", "resident_blocks": 0}
    if torch.cuda.is_available():
        words["place"]["vram"] = "23.5GiB"
    for override in options.overrides:
        key, _, value = override.partition("=")
        section, _, name = key.partition(".")
        words.setdefault(section, {})[name] = yaml.safe_load(value)
    return Recipe.model_validate(words)


def _filled(options: argparse.Namespace, recipe: Recipe, place: Any) -> Any:
    """The assembly with its model in its place."""
    seed_everything(recipe.train.seed)
    assembly = assemble_random(recipe, device=place.device)
    weights = SeededWeights(skeleton=assembly.built.skeleton, device=place.device)
    object.__setattr__(assembly, "weights", weights)
    fill(assembly, place, activations=Activations.of(recipe.train))
    return assembly


def _measure_all(options: argparse.Namespace, recipe: Recipe, group: Group, folder: Path) -> None:
    processes = group.gather(os.getpid())
    sampler = Sampler([*processes, os.getppid()] if group.world > 1 else processes)
    place: Any = placement(recipe.place, group)
    if options.bus_gbs is not None:
        place.copy = slow_bus(options.bus_gbs, place.device)
    began = time.perf_counter()
    assembly = _filled(options, recipe, place)
    run = loop_run(assembly, place, folder)
    _wait(place)
    load_s = time.perf_counter() - began
    if isinstance(place, Stream) and place.host is not None:
        sampler.segment_bytes = place.host.bytes.numel()
    vocabulary = assembly.built.config.get_text_config().vocab_size
    for number, word in enumerate(options.batches.split(",")):
        rows, length = map(int, word.split("x"))
        steps = RandomSteps(vocabulary=vocabulary, rows=rows, length=length)
        if number == 0:
            begin = time.perf_counter()
            run.step(next(steps))
            _wait(place)
            _tell(
                group,
                sampler,
                bench="start",
                case=options.case,
                overrides=options.overrides,
                load_s=round(load_s, 1),
                pinned_s=round(getattr(place, "pinned_s", 0.0), 1),
                batch=word,
                first_step_s=round(time.perf_counter() - begin, 1),
                first_step_at_s=round(age_s(), 1),
                segment_gib=round(sampler.segment_bytes / GIB, 2),
                device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            )
        if options.steps > 0:
            _measure(options, run, steps, group, sampler, rows=rows, length=length)
    sampler.stop()
    place.close()


def _measure(
    options: argparse.Namespace,
    run: Any,
    steps: RandomSteps,
    group: Group,
    sampler: Sampler,
    *,
    rows: int,
    length: int,
) -> None:
    place = run.place
    place.reset_memory()
    times_s: list[float] = []
    ring = place.blocks.ring if isinstance(place, Stream) and place.blocks else None
    copies = 0
    loss = 0.0
    for number in range(options.warmup + options.steps):
        batches = next(steps)
        group.barrier("the next step")
        _wait(place)
        before = 0 if ring is None else ring.num_copies
        begin = time.perf_counter()
        result = run.step(batches)
        _wait(place)
        group.barrier("the end of the step")
        if number >= options.warmup:
            times_s.append(time.perf_counter() - begin)
        copies = 0 if ring is None else ring.num_copies - before
        loss = float(result.loss)
    median_s = statistics.median(times_s)
    _tell(
        group,
        sampler,
        bench="step",
        case=options.case,
        overrides=options.overrides,
        bus_gbs=options.bus_gbs,
        batch=f"{rows}x{length}",
        cards=group.world,
        tokens_per_s=round(group.world * rows * length / median_s, 1),
        step_ms=[round(s * 1e3, 1) for s in sorted(times_s)],
        copies=copies,
        resident=len(place.blocks.resident) if ring is not None else None,
        loss=loss,
    )


def _tell(group: Group, sampler: Sampler, **words: Any) -> None:
    """One line of the first process, with the memory of all."""
    memory = (
        (torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB)
        if torch.cuda.is_available()
        else (0.0, 0.0)
    )
    told = group.gather((memory, pinned_bytes() / GIB))
    words["allocated_gib"] = [round(m[0], 2) for m, _ in told]
    words["reserved_gib"] = [round(m[1], 2) for m, _ in told]
    words["torch_pinned_gib"] = [round(pinned, 2) for _, pinned in told]
    if group.is_first:
        words |= sampler.words(sampler.sample())
        pinned = sum(pinned for _, pinned in told)
        words["host_in_all_peak_gib"] = round(sampler.peak["host"] / GIB + pinned, 2)
        _say(**words)
    group.barrier("the line")


def _exact(options: argparse.Namespace, recipe: Recipe, group: Group) -> None:
    """Gradients of every block, streamed and resident, on the same card with the same rows; the
    resident run twice, since kernels that add in any order would differ by themselves.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    found = []
    rows, length = map(int, options.batches.split(",")[0].split("x"))
    for kind in ("single", "single", "stream"):
        place: Any = placement(
            Place.model_validate({**recipe.place.model_dump(), "kind": kind}),
            group if kind == "stream" else Group.alone(group.device),
        )
        if kind == "stream" and options.bus_gbs is not None:
            place.copy = slow_bus(options.bus_gbs, place.device)
        assembly = _filled(options, recipe, place)
        run_of = assembly.model
        trained = place.trained(run_of)
        noise = torch.Generator(place.device).manual_seed(3)
        with torch.no_grad():
            for name, parameter in trained.items():
                if "lora_B" in name:
                    parameter.normal_(0, 0.02, generator=noise)
        vocabulary = assembly.built.config.get_text_config().vocab_size
        steps = RandomSteps(vocabulary=vocabulary, rows=rows, length=length)
        run_of.train()
        gradients: dict[str, Tensor] = {}
        for number in range(3):
            batch = place.batch(next(steps)[0])
            with place.micro_batch(last=True):
                output = run_of(input_ids=batch.input_ids, use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(
                    output.flatten(0, 1).float(), batch.labels.flatten()
                )
                (loss / place.world).backward()
            for name, parameter in trained.items():
                assert parameter.grad is not None
                gradients[f"{number} {name}"] = parameter.grad.cpu()
                parameter.grad = None
        found.append(gradients)
        place.close()
        del assembly, run_of, trained, parameter, output, loss
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    again, one, other = found
    unequal = [name for name in one if not torch.equal(one[name], other[name])]
    largest = max(float((one[n] - other[n]).abs().max()) for n in one)
    if group.is_first:
        _say(
            bench="exact",
            layers=options.layers,
            batch=f"{rows}x{length}",
            overrides=options.overrides,
            bus_gbs=options.bus_gbs,
            cards=group.world,
            num_gradients=len(one),
            num_unequal=len(unequal),
            num_unequal_resident=sum(not torch.equal(one[n], again[n]) for n in one),
            unequal=unequal[:5],
            largest_difference=largest,
            largest_gradient=max(float(g.abs().max()) for g in one.values()),
        )
    if unequal:
        sys.exit(1)


def _wait(place: Any) -> None:
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)


def _say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
