"""The plan's bytes against a count of live tensors while the true step runs (memory_count.py)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import plan_error
import plan_rows
from loop_run import loop_run
from memory_count import BATCH_NBYTES, FUSED_NUMEL, Count, as_on_cuda

from nibble.place import Group, placement
from nibble.spec import workspace
from nibble.spec.arch import from_config
from nibble.spec.config import Recipe
from nibble.spec.plan import plan

ROWS = {
    "llama3-8b/3 qlora 2x256 ckpt": 0.02,
    "llama3-8b/3 qlora 2x256 none": 0.02,
    "llama3-8b/3 lora 2x256 selective": 0.02,
    "llama2-7b/3 dora 2x256 ckpt": 0.01,
    "llama2-7b/3 qdora 2x256 none": 0.01,
    "llama3-8b/3 full 2x256 ckpt": 0.02,
    "qwen3-8b/3 full 2x256x2 none": 0.02,
    "gemma3-12b/3 full 2x256x2 ckpt": 0.02,
    "llama3-1b/3 full 2x256 none": 0.02,
    "llama3-8b/3 galore8-backward 2x256 ckpt": 0.04,
    "llama3-8b/3 balanced 2x256 ckpt": 0.02,
    "mixtral-8x7b/2 lora 2x256 ckpt": 0.02,
    "llama3-8b/3 lora-head 2x256 keep2": 0.02,
}
"""Rows of the grid in small, and how far off their peaks may be."""


def small(row: plan_rows.Row) -> dict[str, Any]:
    """The row's shape in small, with a vocabulary that is not."""
    words = plan_rows.tiny(row.config()) | {"hidden_size": 256, "vocab_size": 4096}
    words |= {"intermediate_size": 768, "num_hidden_layers": row.num_layers}
    return words | ({"head_dim": 64} if "head_dim" in words else {})


def recipe_of(row: plan_rows.Row, folder: Path) -> Recipe:
    words = row.recipe()
    words["model"] = {"path": str(folder)}
    words["train"]["loss_chunk_tokens"] = 32
    for section in ("optim", "adapter"):
        if words.get(section, {}).get("rank", 0) > 8:
            words[section] = {**words[section], "rank": 8}
    return Recipe.model_validate(words)


def counted(recipe: Recipe, row: plan_rows.Row, folder: Path) -> dict[str, int]:
    """Peaks of two steps' forward, backward and update."""
    peaks: dict[str, int] = {}
    pool = torch.empty(1 << 16, dtype=torch.bfloat16)
    with Count() as count:
        before = count.live
        place = placement(recipe.place, Group.alone(torch.device("cpu")), optim=recipe.optim)
        assembly = plan_error._filled(recipe, place, pool)
        run = loop_run(assembly, place, folder)
        steps = plan_error._batches(row, vocabulary=4096)
        before += pool.nbytes  # counted when it was first looked at
        run.step(next(steps))
        inner, clip = run.objective, place.clip_

        def note(name: str) -> None:
            peaks[name] = max(peaks.get(name, 0), count.peak - before)
            count.begin()

        def forward(model: Any, batch: Any) -> torch.Tensor:
            note("backward")
            loss = inner(model, batch)
            note("forward")
            return loss

        def clipped(*args: Any, **words: Any) -> torch.Tensor:
            note("backward")
            return clip(*args, **words)

        run.objective, place.clip_ = forward, clipped  # type: ignore[method-assign]
        count.begin()
        run.step(next(steps))
        note("update")
    return peaks


@pytest.mark.parametrize("line", ROWS)
def test_a_steps_peak_is_planned(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = plan_rows.parse(line)
    config = small(row)
    plan_error.write_config(tmp_path, config)
    recipe = recipe_of(row, tmp_path)
    monkeypatch.setattr(workspace, "FUSED_WEIGHTS", FUSED_NUMEL)
    monkeypatch.setattr(workspace, "LIST_BYTES", BATCH_NBYTES)
    made = plan(recipe, architecture=from_config(config), on_cpu=False)
    steady = next(phase for phase in made.phases if phase.name == "steady step")
    planned = sum(
        size for name, size in steady.device.items() if name not in ("allocator", "cuda_context")
    )
    with as_on_cuda():
        peaks = counted(recipe, row, tmp_path)
    measured = max(peaks.values())
    assert planned == pytest.approx(measured, rel=ROWS[line]), (steady, peaks)


def test_bounds_are_those_of_the_optimiser() -> None:
    from nibble.numerics import rows
    from nibble.optim import batches, by_rows, update

    assert workspace.LIST_BYTES == batches.BATCH_NBYTES
    assert workspace.WHOLE_BYTES == by_rows.WHOLE_NBYTES
    assert workspace.UNPACKED_BYTES == batches._UNPACKED_BYTES
    assert workspace.FUSED_WEIGHTS == update.FUSED_NUMEL
    assert workspace.PACK_CHUNK_WEIGHTS == rows.GPU_CHUNK_ELEMENTS
