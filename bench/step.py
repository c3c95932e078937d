"""Speed and memory of nibble's own training step on models of true shape with random weights.

    python bench/step.py CASE [--batches ROWSxTOKENS,...] [--fused on|off|both] [--profile]
                         [key=value ...]
    python bench/step.py llama3-8b --batches 1x2048,4x2048 --profile train.adapter_precision=bf16
    python bench/step.py llama3-8b --batches 4xpacked --packed rows.npz + llama3-8b

CASE: llama3-8b (QLoRA: nf4, r=16 on all linears), bloom-7b1 (LLM.int8, r=8 on query_key_value),
tiny-llama, tiny-bloom (for a CPU). key=value changes the case's recipe, section={key: value} takes
the place of a section; --fused both prints rows of transformers' own layers and of the fast paths.
`train.keep_blocks=auto` and `train.cuda_graphs` are decided for each batch size, as `nibble train`
does. `4xpacked` are rows of real documents, made
by packed_rows.py. A `+` begins another measurement in the same process. bench/beside.py runs other
stacks on the same work. What is timed is what
`nibble train` runs: the loop's step with its objective, clipping, optimiser and schedule, its model
put together and filled by the same functions, batches of fresh random tokens copied from the host.

One JSON line for each batch size: tokens/s of the median of 5 synchronised steps after 3, `host_ms`
(until the host had launched all; close to `step_ms` the step is bound by launches), peak GiB
allocated and reserved since before the first step, what the plan said, and (Llamas) HFU, counted
by flops.py. With --profile a second
line: device time of one step by kind of kernel. The first line says what was built, and where.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import yaml
from flops import shares, step_flops
from kernel_times import kernel_times
from loop_run import loop_run
from packed_rows import micro_batches, tokens_a_row
from random_model import CASES, assemble_random, write_config

from nibble.data import Batch
from nibble.errors import ConfigError
from nibble.nn.attention import PACKED, attention_name
from nibble.place.activations import Activations
from nibble.place.base import Placement
from nibble.place.single import one_device
from nibble.spec.arch import architecture
from nibble.spec.config import Recipe
from nibble.spec.decide import decide_and_say
from nibble.spec.graphs import wish
from nibble.spec.hardware import Hardware, hardware
from nibble.spec.plan import Plan, plan
from nibble.spec.units import GIB, parse_bytes
from nibble.train.folder import gather_versions
from nibble.train.loop import _Run
from nibble.train.state import seed_everything
from nibble.use.assemble import Assembly, fill

IGNORE = -100
FUSED = {"on": (True,), "off": (False,), "both": (False, True)}


class RandomSteps:
    """Steps of one micro-batch of random tokens, fresh ones each time; every token is a target."""

    def __init__(self, *, vocabulary: int, rows: int, length: int) -> None:
        self.vocabulary, self.shape = vocabulary, (rows, length)
        self.generator = torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        rows, length = self.shape
        ids = torch.randint(0, self.vocabulary, self.shape, generator=self.generator)
        labels = ids.roll(-1, dims=1)
        labels[:, -1] = IGNORE
        return [
            Batch(
                input_ids=ids,
                labels=labels,
                position_ids=None,
                attention_mask=None,
                num_targets=rows * (length - 1),
                num_tokens=rows * length,
                doc_lengths=((length,),) * rows,
            )
        ]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


class PackedSteps(RandomSteps):
    """Steps of one micro-batch of real documents, packed: the same ones in every run."""

    def __init__(self, path: str, *, rows: int) -> None:
        self.source = micro_batches(path, rows=rows)
        self.shape = (rows, int(next(micro_batches(path, rows=1)).ids.shape[1]))

    def __next__(self) -> list[Batch]:
        some = next(self.source)
        labels = torch.from_numpy(some.labels).roll(-1, dims=1)
        labels[:, -1] = IGNORE
        return [
            Batch(
                input_ids=torch.from_numpy(some.ids),
                labels=labels,
                position_ids=torch.from_numpy(some.positions),
                attention_mask=None,
                num_targets=int((labels != IGNORE).sum()),
                num_tokens=some.num_tokens,
                doc_lengths=some.doc_lengths,
            )
        ]


def main() -> None:
    words = sys.argv[1:]
    while words:
        end = words.index("+") if "+" in words else len(words)
        _one(_options(words[:end]))
        words = words[end + 1 :]


def _one(options: argparse.Namespace) -> None:
    """What one command line asks for."""
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1.0)
    case = CASES[options.case]
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), case.config)
        for fused in FUSED[options.fused]:
            recipe = _recipe(options, folder, fused=fused)
            batches = options.batches.split(",")
            # What is decided for a batch size needs a model of its own.
            alone = recipe.train.keep_blocks == "auto"
            for some in [[word] for word in batches] if alone else [batches]:
                _rows(options, recipe, Path(folder), some)
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()


def _steps(options: argparse.Namespace, word: str, *, vocabulary: int = 1) -> RandomSteps:
    """What ROWSxTOKENS or ROWSxpacked asks for."""
    rows, _, length = word.partition("x")
    if length != "packed":
        return RandomSteps(vocabulary=vocabulary, rows=int(rows), length=int(length))
    if options.packed is None:
        raise SystemExit(f"{word} needs --packed FILE, which packed_rows.py writes")
    return PackedSteps(options.packed, rows=int(rows))


def _decided(recipe: Recipe, place: Placement, steps: RandomSteps) -> tuple[Recipe, str]:
    """The recipe with the number of blocks that keep their activations and graphs or none, as
    `nibble train` decides for this batch size, and why."""
    found = decide_and_say(
        _sized(recipe, steps),
        architecture=architecture(recipe.model),
        hardware=_card(place),
        on_cpu=place.device.type == "cpu",
        limit_bytes=None if place.device.type == "cpu" else _room_bytes(recipe, place),
    )
    made = found.recipe.train
    values = {"keep_blocks": made.keep_blocks, "cuda_graphs": made.cuda_graphs}
    train = recipe.train.model_copy(update=values)
    return recipe.model_copy(update={"train": train}), found.graphs


def _room_bytes(recipe: Recipe, place: Placement) -> int:
    there = torch.cuda.get_device_properties(place.device).total_memory
    return there if recipe.place.vram is None else min(there, parse_bytes(recipe.place.vram))


def _rows(
    options: argparse.Namespace, recipe: Recipe, folder: Path, batches: Sequence[str]
) -> None:
    """Build the case's model and print its line and those of some batch sizes."""
    seed_everything(recipe.train.seed)
    place = one_device(recipe.place)
    if recipe.train.keep_blocks == "auto":
        made, _ = _decided(recipe, place, _steps(options, batches[0]))
        train = recipe.train.model_copy(update={"keep_blocks": made.train.keep_blocks})
        recipe = recipe.model_copy(update={"train": train})
    place.reset_memory()
    assembly, build_s = _built(recipe, place)
    about = _about(options, assembly, place)
    static = torch.cuda.memory_allocated() / GIB if place.device.type == "cuda" else 0.0
    summary = assembly.summary
    _say(
        bench="built",
        trains=f"{summary.num_trainable:,} of {summary.num_total:,}",
        build_s=round(build_s, 1),
        static_gib=round(static, 2),
        **about,
        versions=gather_versions(seed=recipe.train.seed) | {"command": None},
        commit=os.environ.get("NIBBLE_COMMIT"),
    )
    run = loop_run(assembly, place, folder)
    for word in batches:
        # A run of its own for each size: none finds the graphs of another, nor their memory.
        gc.collect()
        made, why = _decided(recipe, place, _steps(options, word))
        settings = replace(run.settings, graphs=wish(made))
        sized = replace(run, settings=settings)
        decided = {"cuda_graphs": made.train.cuda_graphs, "decided": why}
        _measure(options, replace(assembly, recipe=made), sized, word=word, about=about | decided)


def _options(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--batches", help="ROWSxTOKENS or ROWSxpacked, ...")
    parser.add_argument("--packed", help="what packed_rows.py wrote")
    parser.add_argument("--name", help="of the work, in the lines")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument(
        "--fused", choices=FUSED, default="on", help="both: a row without, one with"
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=3)
    options = parser.parse_intermixed_args(words)
    options.batches = options.batches or CASES[options.case].batches
    return options


def _recipe(options: argparse.Namespace, folder: str, *, fused: bool) -> Recipe:
    """The case's recipe with the overrides, for the model whose config.json is in `folder`."""
    words = {section: dict(keys) for section, keys in CASES[options.case].recipe.items()}
    words["model"] = {"path": folder}
    words["train"] = {**words.get("train", {}), "fused_kernels": fused}
    for override in options.overrides:
        key, _, value = override.partition("=")
        section, _, name = key.partition(".")
        if name:
            words.setdefault(section, {})[name] = yaml.safe_load(value)
        else:
            words[section] = yaml.safe_load(value)
    return Recipe.model_validate(words)


def _built(recipe: Recipe, place: Placement) -> tuple[Assembly, float]:
    """The model in its place with random weights, and the seconds that it took."""
    start = time.perf_counter()
    assembly = assemble_random(recipe, device=place.device)
    fill(assembly, place, activations=Activations.of(recipe.train))
    _wait(place)
    return assembly, time.perf_counter() - start


def _about(options: argparse.Namespace, assembly: Assembly, place: Placement) -> dict[str, Any]:
    on_gpu = place.device.type == "cuda"
    train = assembly.recipe.train
    return {
        "stack": "nibble",
        "work": options.name,
        "case": options.case,
        "keep_blocks": train.keep_blocks if train.activation_checkpointing == "full" else None,
        "overrides": options.overrides,
        "fused": assembly.recipe.train.fused_kernels,
        "num_trainable": assembly.summary.num_trainable,
        "device": torch.cuda.get_device_name(place.device)
        if on_gpu
        else f"cpu, {torch.get_num_threads()} threads",
    }


def _measure(
    options: argparse.Namespace,
    assembly: Assembly,
    run: _Run,
    *,
    word: str,
    about: dict[str, Any],
) -> None:
    """Print the line of one batch size, and that of the profile."""
    place = run.place
    config = assembly.built.config.get_text_config()
    vocabulary = config.vocab_size
    steps = _steps(options, word, vocabulary=vocabulary)
    rows, length = steps.shape
    is_packed = isinstance(steps, PackedSteps)
    attention = config._attn_implementation
    if is_packed and attention_name(type(assembly.model), assembly.built.config) == PACKED:
        assembly.model.set_attn_implementation(PACKED)  # type: ignore[operator]
    row: dict[str, Any] = {"bench": "step", **about, "batch": f"{rows}x{length}"}
    row["packed"] = is_packed
    row |= _planned(assembly.recipe, place, steps)
    place.reset_memory()
    try:
        walls_s, hosts_s, loss, batch = _times(options, run, steps)
    except torch.OutOfMemoryError:
        _say(**row, out_of_memory=True, failed="out of memory", **_peak(place))
        run.state.optimizer.zero_grad(set_to_none=True)
        return
    median_s = statistics.median(walls_s)
    num_tokens = rows * tokens_a_row(options.packed) if is_packed else rows * length
    flops = step_flops(
        CASES[options.case].config,
        doc_lengths=batch.doc_lengths,
        trains_base=assembly.recipe.adapter.kind == "none",
        num_trained=assembly.summary.num_trainable,
    )
    _say(
        **row,
        tokens_per_s=round(num_tokens / median_s, 1),
        **shares(
            flops,
            seconds=median_s,
            recomputed=_recomputed(assembly.recipe, config.num_hidden_layers),
            device=about["device"],
        ),
        step_ms=round(median_s * 1e3, 2),
        min_ms=round(min(walls_s) * 1e3, 2),
        max_ms=round(max(walls_s) * 1e3, 2),
        host_ms=round(statistics.median(hosts_s) * 1e3, 2),
        loss=round(loss, 4),
        first_loss_of_chance=round(math.log(vocabulary), 4),
        graphs=[] if run.passes is None else run.passes.told,
        **_peak(place),
    )
    if options.profile:
        found = kernel_times(lambda: run.step(next(steps)), device=place.device)
        _say(bench="profile", **about, batch=f"{rows}x{length}", **found)
    if is_packed:
        assembly.model.set_attn_implementation(attention)  # type: ignore[operator]


def _recomputed(recipe: Recipe, num_blocks: int) -> float:
    """The share of blocks whose forward pass runs twice."""
    if recipe.train.activation_checkpointing == "none":
        return 0.0
    assert recipe.train.keep_blocks != "auto"
    return 1.0 - min(recipe.train.keep_blocks, num_blocks) / num_blocks


def _times(
    options: argparse.Namespace, run: _Run, steps: RandomSteps
) -> tuple[list[float], list[float], float, Batch]:
    """Seconds of each step, the host's part of them, the last loss and its batch."""
    walls_s, hosts_s = [], []
    loss = math.nan
    for number in range(options.warmup + options.steps):
        batches = next(steps)
        _wait(run.place)
        start = time.perf_counter()
        result = run.step(batches)
        launched = time.perf_counter()
        _wait(run.place)
        end = time.perf_counter()
        if number >= options.warmup:
            walls_s.append(end - start)
            hosts_s.append(launched - start)
        loss = float(result.loss)
    return walls_s, hosts_s, loss, batches[0]


def _planned(recipe: Recipe, place: Placement, steps: RandomSteps) -> dict[str, Any]:
    """What the plan says of this batch size: peak GiB without the CUDA context, and tokens/s."""
    made: Plan = plan(
        _sized(recipe, steps),
        architecture=architecture(recipe.model),
        hardware=_card(place),
        on_cpu=place.device.type == "cpu",
    )
    speed = None if made.speed is None else made.speed.to_json()
    peak = {name: round(size / GIB, 3) for name, size in made.peak.device.items()}
    return {
        "planned_gib": round(made.allocator_bytes / GIB, 2),
        "planned_at": f"{made.peak.name}: {made.peak.moment}",
        "planned_parts_gib": peak,
        "planned_speed": speed,
    }


def _sized(recipe: Recipe, steps: RandomSteps) -> Recipe:
    """The recipe of one micro-batch of this size a step."""
    rows, length = steps.shape
    data = {"max_length": length, "packing": isinstance(steps, PackedSteps)}
    train = {"micro_batch_size": rows, "gradient_accumulation_steps": 1}
    return recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update=train),
            "data": recipe.data.model_copy(update=data),
        }
    )


def _card(place: Placement) -> Hardware | None:
    if place.device.type != "cuda":
        return None
    try:
        return hardware(torch.cuda.get_device_name(place.device))
    except ConfigError:
        return None


def _peak(place: Placement) -> dict[str, float]:
    memory = place.memory()
    return {
        "allocated_gib": round(memory.allocated_bytes / GIB, 2),
        "reserved_gib": round(memory.reserved_bytes / GIB, 2),
    }


def _wait(place: Placement) -> None:
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)


def _say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
