"""Training steps of bench/galore.py: nibble's own, and galore_torch's layer by layer.

A row is a recipe, a cap on the allocator and a batch. nibble's rows run what `nibble train` runs
(bench/step.py), on random weights; INT8 rows put trained INT8 linears into the same model. Steps
are timed once all matrices have left their random first bases, so each has its share of refreshes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import yaml
from galore_peers import has, hook_galore
from kernel_times import kernel_times
from loop_run import loop_run
from random_model import LLAMA, assemble_random, write_config
from step import RandomSteps, _built
from torch import nn
from torch.nn import functional as F

from nibble.nn.int8_weights import Int8Linear, int8_linears_
from nibble.optim import Int8Store, keep_int8_
from nibble.place.activations import Activations
from nibble.place.single import Single, one_device
from nibble.spec.config import Recipe
from nibble.spec.units import GIB
from nibble.train.loop import _Run
from nibble.train.state import seed_everything
from nibble.use.assemble import Assembly

LAYERS = r"layers\.\d+\..*_proj$"
SEVEN = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab": 32000}
TINY = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "vocab": 512}
NUM_FIRST_STEPS = 18


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one row trains, on how large a card."""

    name: str
    cap: str
    batch: tuple[int, int]
    optim: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    int8: bool = False
    peer: bool = False


GALORE = {"method": "galore8bit", "rank": 1024, "basis_storage": "bf16", "layerwise": True}
NOW = {"in_backward": True, "max_grad_norm": None}
ROWS = {
    "step": (
        Row(name="nibble galore8bit layer-wise", cap="23.5GiB", batch=(16, 256), optim=GALORE),
        Row(
            name="nibble galore8bit in backward",
            cap="23.5GiB",
            batch=(16, 256),
            optim={**GALORE, **NOW},
        ),
        Row(
            name="nibble galore8bit in backward, int8 bases, 19 GiB",
            cap="19GiB",
            batch=(16, 256),
            optim={**GALORE, **NOW, "basis_storage": "int8"},
        ),
        Row(
            name="nibble galore8bit in backward, offload, 19 GiB",
            cap="19GiB",
            batch=(16, 256),
            optim={**GALORE, **NOW},
            train={"activation_offload": True},
        ),
        Row(
            name="nibble balanced 8bit in backward",
            cap="23.5GiB",
            batch=(16, 256),
            optim={**GALORE, **NOW, "method": "balanced", "state": "8bit"},
        ),
        Row(
            name="galore_torch layer-wise, without refreshes",
            cap="23.5GiB",
            batch=(16, 256),
            peer=True,
        ),
    ),
    "small": (
        Row(
            name="16 GiB card: nibble galore8bit in backward, rank 256, int8 bases, offload",
            cap="15.5GiB",
            batch=(8, 256),
            optim={**GALORE, **NOW, "rank": 256, "basis_storage": "int8"},
            train={"activation_offload": True},
        ),
        Row(
            name="16 GiB card: nibble galore8bit in backward, rank 256, bf16 weights",
            cap="15.5GiB",
            batch=(8, 256),
            optim={**GALORE, **NOW, "rank": 256},
        ),
        Row(
            name="16 GiB card: nibble galore8bit layer-wise, rank 128, bf16 weights",
            cap="15.5GiB",
            batch=(8, 256),
            optim={**GALORE, "rank": 128},
        ),
        Row(
            name="12 GiB card: nibble apollo-mini in backward, int8 weights",
            cap="11.5GiB",
            batch=(8, 256),
            optim={"method": "apollo-mini", "layerwise": True, **NOW},
            int8=True,
        ),
        Row(
            name="12 GiB card: nibble q-galore rank 256, int8 weights",
            cap="11.5GiB",
            batch=(8, 256),
            optim={"method": "q-galore", "rank": 256, "layerwise": True},
            int8=True,
        ),
        Row(
            name="12 GiB card: nibble q-galore in backward, rank 1024, int8 weights",
            cap="11.5GiB",
            batch=(8, 256),
            optim={"method": "q-galore", "rank": 1024, "layerwise": True, **NOW},
            int8=True,
        ),
    ),
}


def step_row(
    part: str, row: Row, options: argparse.Namespace, *, device: torch.device
) -> dict[str, Any] | None:
    """What one row gives; None for a peer that is not installed."""
    if row.peer and not (has("galore_torch") and has("bitsandbytes") and device.type == "cuda"):
        return None
    phases = Phases(device)
    about = {
        "row": f"{part}: {row.name}",
        "cap": row.cap,
        "batch": "x".join(map(str, row.batch)),
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
    }
    try:
        return about | _measured(row, options, phases)
    except torch.OutOfMemoryError as error:
        words = str(error).split(". ")[0]
        return about | {"out_of_memory": f"in {phases.now}: {words}", "phases": phases.rows()}


class Phases:
    """Memory by phase of a step: the most within it, and what is held after it.

    The device's statistics begin anew with every phase; the most of all is kept here.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.now = "build"
        self.found: dict[str, list[int]] = {}

    def end(self, then: str) -> None:
        """The present phase is over, and `then` begins."""
        if self.on_gpu:
            seen = [
                torch.cuda.max_memory_allocated(),
                torch.cuda.memory_allocated(),
                torch.cuda.max_memory_reserved(),
            ]
            before = self.found.get(self.now, [0, 0, 0])
            # The most within, over all steps; what is held after the last.
            most = [max(one, other) for one, other in zip(before, seen, strict=True)]
            self.found[self.now] = [most[0], seen[1], most[2]]
            torch.cuda.reset_peak_memory_stats()
        self.now = then

    def rows(self) -> dict[str, list[float]]:
        """Phase: GiB at its peak, allocated after it, reserved."""
        self.end(self.now)
        return {
            name: [round(number / GIB, 2) for number in numbers]
            for name, numbers in self.found.items()
        }

    def most(self) -> tuple[float, float]:
        """GiB allocated and reserved at the most."""
        rows = list(self.rows().values()) or [[0.0, 0.0, 0.0]]
        return max(row[0] for row in rows), max(row[2] for row in rows)

    def watch_(self, run: _Run) -> None:
        """Let forward, backward and update of a run's steps end phases."""
        objective, clip, update = run.objective, run.place.clip_, run.state.optimizer.step

        def forward(*words: Any) -> Any:
            loss = objective(*words)
            self.end("backward")
            return loss

        def clipped(*words: Any) -> Any:
            self.end("clip")
            return clip(*words)

        def updated() -> None:
            self.end("update")
            update()
            self.end("after")

        run.objective = forward
        run.place.clip_ = clipped  # type: ignore[method-assign]
        run.state.optimizer.step = updated  # type: ignore[assignment,method-assign]


def _measured(row: Row, options: argparse.Namespace, phases: Phases) -> dict[str, Any]:
    sizes = TINY if options.tiny else SEVEN
    batch = (2, 16) if options.tiny else row.batch
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        heads = max(1, sizes["hidden_size"] // 128)
        config = {key: value for key, value in sizes.items() if key != "vocab"}
        config |= {"vocab_size": sizes["vocab"], "num_attention_heads": heads}
        config |= {"num_key_value_heads": heads, "max_position_embeddings": 4096}
        write_config(folder, {**LLAMA, **config})
        recipe = _recipe(row, folder, options)
        seed_everything(recipe.train.seed)
        place = one_device(recipe.place)
        if place.device.type == "cuda":
            torch.cuda.empty_cache()
        place.reset_memory()
        return (_peer if row.peer else _ours)(row, recipe, place, folder, batch, options, phases)


def _recipe(row: Row, folder: Path, options: argparse.Namespace) -> Recipe:
    low_rank = dict(row.optim)
    if options.tiny and low_rank.get("rank", 1) > 1:
        low_rank["rank"] = 16
    words: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder)},
        "adapter": {"kind": "none"},
        "optim": {"name": "adamw", "learning_rate": 1e-5, "state": "8bit", **low_rank},
        "train": {"activation_checkpointing": "full", "fused_kernels": not row.peer, **row.train},
    }
    if row.peer:
        words["train"]["activation_checkpointing"] = "none"  # transformers' own is switched on
    if torch.cuda.is_available():
        words["place"] = {"vram": row.cap}
    else:
        words["place"] = {"device": "cpu"}
        words["train"].pop("activation_offload", None)
    for override in options.overrides:
        key, _, value = override.partition("=")
        section, _, name = key.partition(".")
        words.setdefault(section, {})[name] = yaml.safe_load(value)
    return Recipe.model_validate(words)


def _ours(
    row: Row,
    recipe: Recipe,
    place: Single,
    folder: Path,
    batch: tuple[int, int],
    options: argparse.Namespace,
    phases: Phases,
) -> dict[str, Any]:
    """tokens/s of nibble's loop, all refreshes counted."""
    assembly = _int8_built(recipe, place) if row.int8 else _built(recipe, place)[0]
    run = loop_run(assembly, place, folder)
    if row.int8:
        stores = {
            module.weight: Int8Store(codes=module.codes, scales=module.scales)
            for module in assembly.model.modules()
            if isinstance(module, Int8Linear)
        }
        keep_int8_(run.state.optimizer, stores)
    vocabulary = assembly.built.config.vocab_size
    steps = RandomSteps(vocabulary=vocabulary, rows=batch[0], length=batch[1])
    static_gib = _allocated(place)
    phases.watch_(run)
    times_s, loss = [], 0.0
    for number in range(NUM_FIRST_STEPS + (2 if options.tiny else options.steps)):
        phases.end("forward")
        start = _now(place)
        loss = float(run.step(next(steps)).loss)
        spent_s = _now(place) - start
        if number >= NUM_FIRST_STEPS:
            times_s.append(spent_s)
    found = _said(times_s, batch, phases)
    found |= {"static_gib": static_gib, "loss": round(loss, 3), "phases": phases.rows()}
    if options.profile:
        found["profile"] = kernel_times(lambda: run.step(next(steps)), device=place.device)
    return found


def _peer(
    row: Row,
    recipe: Recipe,
    place: Single,
    folder: Path,
    batch: tuple[int, int],
    options: argparse.Namespace,
    phases: Phases,
) -> dict[str, Any]:
    """tokens/s of transformers' model with galore_torch's 8-bit optimisers in backward."""
    assembly = _built(recipe, place)[0]
    model, config = assembly.model, assembly.built.config
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    projected = {
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ("attn" in name or "mlp" in name)
    }
    hook_galore(model, projected=projected, rank=1024, gap=100_000)
    times_s, loss = [], 0.0
    for number in range(8):
        ids = torch.randint(0, config.vocab_size, batch, device=place.device)
        start = _now(place)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)[:, :-1].reshape(-1, config.vocab_size)
        step_loss = F.cross_entropy(logits, ids[:, 1:].reshape(-1))
        del hidden, logits
        step_loss.backward()
        loss = float(step_loss.detach())
        spent_s = _now(place) - start
        if number >= 3:
            times_s.append(spent_s)
    return _said(times_s, batch, phases) | {"loss": round(loss, 3)}


def _said(times_s: list[float], batch: tuple[int, int], phases: Phases) -> dict[str, Any]:
    """Throughput over all timed steps together, not their median: refreshes count."""
    allocated_gib, reserved_gib = phases.most()
    return {
        "tokens_per_s": round(batch[0] * batch[1] * len(times_s) / sum(times_s), 1),
        "ms": round(sum(times_s) / len(times_s) * 1e3, 1),
        "median_ms": round(statistics.median(times_s) * 1e3, 1),
        "max_ms": round(max(times_s) * 1e3, 1),
        "num_steps": len(times_s),
        "peak_gib": allocated_gib,
        "reserved_gib": reserved_gib,
    }


def _int8_built(recipe: Recipe, place: Single) -> Assembly:
    """The model with trained INT8 linears in its layers; their codes are random."""
    assembly = assemble_random(recipe, device=place.device)
    inner = {f"{name}.weight" for name in int8_linears_(assembly.model, LAYERS)}
    model = place.arrange(assembly.built, activations=Activations.of(recipe.train))
    assert assembly.weights is not None
    for name, value in assembly.weights.only(lambda name: name not in inner):
        place.load(model, name, value)
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.codes.random_(-127, 128)
            module.scales.fill_(0.02 / 73)  # uniform codes have a deviation of 73
    return assembly


def _allocated(place: Single) -> float:
    if place.device.type != "cuda":
        return 0.0
    return round(torch.cuda.memory_allocated(place.device) / GIB, 2)


def _now(place: Single) -> float:
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)
    return time.perf_counter()
