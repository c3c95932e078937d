"""The longest row that trains under a cap, and what blocks that keep their activations buy.

    python bench/context.py longest [--vram 23.5GiB] [--from 65536] [--selective] [key=value ...]
    python bench/context.py kept [--batch 4x2048] [--blocks 0,2,4,8,auto] [key=value ...]

QLoRA of the Llama 3 8B shape with random weights (`random_model.py`), nibble's own step
(`step.py`). `longest` offloads what blocks keep and tiles their feed-forward layers
(train.activation_offload, train.mlp_tile_tokens), and lengthens one row until the capped allocator
refuses: each length twice the last, then halfway between, to 8,192 tokens. `kept` times a step for
each number of blocks that keep all. --case tiny-llama tries either on a CPU.

One JSON line for each try: tokens/s of the last of --steps steps, peak GiB allocated and reserved,
GiB of pinned host memory that holds activations and of the process, what the plan said of both, and
whether it ran out. Set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, as long rows leave holes
of a GiB otherwise.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import step
import torch
import yaml
from loop_run import loop_run
from random_model import CASES, assemble_random, write_config

from nibble.nn.attention import PACKED, attention_name
from nibble.place.activations import Activations
from nibble.place.single import one_device
from nibble.spec.arch import architecture
from nibble.spec.config import Recipe
from nibble.spec.decide import decide
from nibble.spec.plan import plan
from nibble.spec.units import GIB, parse_bytes
from nibble.train.state import seed_everything
from nibble.use.assemble import fill

RESOLUTION = 8192


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        config = dict(CASES[options.case].config)
        config["max_position_embeddings"] = max(config.get("max_position_embeddings", 0), 1 << 20)
        write_config(Path(folder), config)
        if options.what == "longest":
            _longest(options, folder)
        else:
            rows, length = map(int, options.batch.split("x"))
            for word in options.blocks.split(","):
                kept = word if word == "auto" else int(word)
                train = {"keep_blocks": kept, "micro_batch_size": rows}
                _try(options, folder, rows=rows, length=length, train=train)


def _longest(options: argparse.Namespace, folder: str) -> None:
    train = {"activation_offload": True, "mlp_tile_tokens": options.tile}
    if options.selective:
        train["activation_checkpointing"] = "selective"
    low, high, length = 0, 0, options.start
    while not high or high - low > options.resolution:
        if _try(options, folder, rows=1, length=length, train=train):
            low = length
        else:
            high = length
        if low >= options.most or (high and high <= options.resolution):
            break
        length = (low + high) // 2 // options.resolution * options.resolution if high else 2 * low
    step._say(bench="longest", case=options.case, vram=options.vram, tokens=low, refused=high)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("longest", "kept"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--case", choices=CASES, default="llama3-8b")
    parser.add_argument("--vram", default="23.5GiB")
    parser.add_argument("--from", dest="start", type=int, default=65536)
    parser.add_argument("--most", type=int, default=1 << 20)
    parser.add_argument("--resolution", type=int, default=RESOLUTION)
    parser.add_argument("--tile", type=int, default=4096)
    parser.add_argument("--selective", action="store_true")
    parser.add_argument("--batch", default="4x2048")
    parser.add_argument("--blocks", default="0,2,4,8,auto")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=1)
    options = parser.parse_intermixed_args()
    options.batches = options.batch
    return options


def _recipe(
    options: argparse.Namespace, folder: str, *, length: int, train: dict[str, Any]
) -> Recipe:
    words = {section: dict(keys) for section, keys in CASES[options.case].recipe.items()}
    words |= {
        "model": {"path": folder},
        "data": {"max_length": length},
        "train": dict(train),
        "place": {"vram": options.vram} if torch.cuda.is_available() else {},
    }
    for override in options.overrides:
        key, _, value = override.partition("=")
        section, _, name = key.partition(".")
        words.setdefault(section, {})[name] = yaml.safe_load(value)
    return Recipe.model_validate(words)


def _try(
    options: argparse.Namespace, folder: str, *, rows: int, length: int, train: dict[str, Any]
) -> bool:
    """One line; whether it fitted."""
    recipe = _recipe(options, folder, length=length, train=train)
    seed_everything(recipe.train.seed)
    place = one_device(recipe.place)
    on_cpu = place.device.type == "cpu"
    shape = architecture(recipe.model)
    limit = None if on_cpu else parse_bytes(options.vram) + GIB // 2
    recipe = decide(recipe, architecture=shape, on_cpu=on_cpu, limit_bytes=limit)
    planned = plan(recipe, architecture=shape, on_cpu=on_cpu)
    row: dict[str, Any] = {
        "bench": options.what,
        "case": options.case,
        "batch": f"{rows}x{length}",
        "train": recipe.train.model_dump(exclude_defaults=True),
        "planned_gib": round(planned.allocator_bytes / GIB, 2),
        "planned_host_gib": round(planned.host_bytes / GIB, 2),
    }
    try:
        seconds, loss = _seconds(options, recipe, place, folder, rows=rows, length=length)
    except torch.OutOfMemoryError:
        step._say(**row, out_of_memory=True, **step._peak(place))
        _clean(place)
        return False
    held = place.checkpointed.host_bytes
    step._say(
        **row,
        tokens_per_s=round(rows * length / seconds, 1),
        step_s=round(seconds, 3),
        loss=round(loss, 4),
        **step._peak(place),
        pinned_gib=round(held / GIB, 2),
        host_gib=round(place.memory().host_bytes / GIB, 2),
        recomputed_blocks=place.checkpointed.num_recomputed,
        tiled_blocks=place.checkpointed.num_tiled,
    )
    del place
    _clean(None)
    return True


def _seconds(
    options: argparse.Namespace, recipe: Recipe, place: Any, folder: str, *, rows: int, length: int
) -> tuple[float, float]:
    """Of the last step, and its loss."""
    assembly = assemble_random(recipe, device=place.device)
    model = assembly.model
    selective = recipe.train.activation_checkpointing == "selective"
    if selective and attention_name(type(model), assembly.built.config) == PACKED:
        model.set_attn_implementation(PACKED)  # type: ignore[operator]
    fill(assembly, place, activations=Activations.of(recipe.train))
    run = loop_run(assembly, place, Path(folder))
    vocabulary = assembly.built.config.get_text_config().vocab_size
    steps = step.RandomSteps(vocabulary=vocabulary, rows=rows, length=length)
    place.reset_memory()
    seconds, loss = 0.0, 0.0
    for _ in range(options.warmup + options.steps):
        batches = next(steps)
        step._wait(place)
        begin = time.perf_counter()
        loss = float(run.step(batches).loss)
        step._wait(place)
        seconds = time.perf_counter() - begin
    return seconds, loss


def _clean(place: Any) -> None:
    del place
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
