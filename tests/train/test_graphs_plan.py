"""`train.cuda_graphs=auto` is decided by the plan, and the plan knows what recorded passes keep."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from nibble.spec.arch import Architecture, from_config
from nibble.spec.config import Recipe
from nibble.spec.decide import Decided, decide, decide_and_say
from nibble.spec.graphs import SPARE_BYTES
from nibble.spec.hardware import hardware
from nibble.spec.holdings import Devices
from nibble.spec.inventory import inventory
from nibble.spec.phases import Phase
from nibble.spec.plan import Plan, plan
from nibble.spec.plan_text import plain
from nibble.spec.units import GIB
from nibble.train.planned import decided
from nibble.use.assemble import Assembly

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}  # fmt: skip
SHAPE = from_config(LLAMA)
SMALL = from_config(
    {**LLAMA, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
)
H200 = hardware("h200")


def recipe(*, rows: int = 1, length: int = 512, vram: str | None = None, **train: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": "m"},
            "quant": {"format": "nf4", "double_quant": True},
            "adapter": {"kind": "lora", "rank": 16},
            "data": {"max_length": length},
            "train": {"micro_batch_size": rows, "activation_checkpointing": "none", **train},
            "place": {"vram": vram},
        }
    )


def found(words: Recipe, shape: Architecture = SHAPE, **more: Any) -> Decided:
    return decide_and_say(words, architecture=shape, **{"hardware": H200, "on_cpu": False, **more})


def planned(words: Recipe, shape: Architecture = SHAPE) -> Plan:
    return plan(words, architecture=shape, hardware=H200, on_cpu=False)


def phase(made: Plan, name: str) -> Phase:
    return next(each for each in made.phases if each.name == name)


def test_passes_that_wait_for_the_host_are_recorded() -> None:
    made = found(recipe())
    assert made.recipe.train.cuda_graphs is True
    assert made.graphs.startswith("CUDA graphs: the host needs ")
    share = int(made.graphs.split()[5].rstrip("%"))
    eager = planned(recipe(cuda_graphs=False)).speed
    assert eager is not None and share == round(100 * eager.host_share) >= 75


@pytest.mark.parametrize(
    ("words", "more", "said"),
    [
        ({"rows": 4, "length": 2048}, {}, "the device is busy anyway (the host needs "),
        ({}, {"hardware": None}, "the card's speed is not known"),
        ({}, {"limit_bytes": 9 * GIB}, "GiB would be needed with them"),
        ({"activation_offload": True, "activation_checkpointing": "full"}, {}, "train.activation_"),
    ],
)
def test_others_are_not_and_it_is_said_why(
    words: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    made = found(recipe(**words), **more)
    assert made.recipe.train.cuda_graphs is False
    assert made.graphs.startswith("no CUDA graphs: ") and said in made.graphs


def test_placements_that_move_weights_are_not_recorded() -> None:
    sharded = recipe().model_copy(
        update={"place": recipe().place.model_copy(update={"kind": "fsdp"})}
    )
    made = found(sharded, devices=Devices(per_machine=2))
    assert made.graphs == "no CUDA graphs: place.kind=fsdp"


@pytest.mark.parametrize("kind", ["gemma2", "bloom"])
def test_masks_that_transformers_makes_are_not_recorded(kind: str) -> None:
    """Measured: its masks wait for the host (bench/results/2026-11-23-h200-plan-error.md)."""
    shape = from_config({**LLAMA, "model_type": kind, "n_layer": 32, "head_dim": 128})
    made = found(recipe(), shape)
    said = "no CUDA graphs: transformers makes the masks of its attention by way of the host"
    assert made.recipe.train.cuda_graphs is False and made.graphs == said
    asked, eager = (planned(recipe(cuda_graphs=value), shape) for value in (True, False))
    assert asked.device_bytes == eager.device_bytes
    assert asked.speed is not None and asked.speed.launches_s > 0


def test_a_recording_leaves_room_for_what_runs_between_passes() -> None:
    shape = from_config({**LLAMA, "num_hidden_layers": 2})
    made = planned(recipe(cuda_graphs=True), shape)
    assert inventory(made.recipe, shape).update_bytes < SPARE_BYTES
    pool = phase(made, "evaluation").device["recorded"]
    steady = phase(made, "steady step").device
    passing = ("activations_kept", "activation_workspace", "dequantised", "logits")
    assert sum(steady.get(name, 0) for name in passing) == pool + SPARE_BYTES


def test_a_matrix_that_does_not_fit_what_was_left_free_is_made_beside_it() -> None:
    """Measured: 70B blocks evaluated beside a recording (dev/LOG.md)."""
    wide = {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 2}
    used = {}
    for kind in (LLAMA, wide):
        eager, made = (
            phase(planned(recipe(cuda_graphs=value), from_config(kind)), "evaluation").device
            for value in (False, True)
        )
        used[kind["hidden_size"]] = made["activation_workspace"] - eager["activation_workspace"]
    assert used == {4096: 0, 8192: SPARE_BYTES}


def test_large_gradients_are_not_kept_unasked() -> None:
    words = recipe(length=128).model_dump(mode="json", exclude_unset=True)
    words |= {"quant": {"format": "none"}, "adapter": {"kind": "none"}}
    full = Recipe.model_validate(words)
    assert inventory(full, SMALL).gradient_bytes > GIB
    made = found(full, SMALL)
    assert made.recipe.train.cuda_graphs is False and "of gradients would stay" in made.graphs


def test_what_is_asked_for_is_not_decided_and_a_cpu_leaves_it_open() -> None:
    for value in (True, False):
        made = found(recipe(rows=4, length=2048, cuda_graphs=value))
        assert made.recipe.train.cuda_graphs is value and made.graphs == ""
    made = found(recipe(), on_cpu=True)
    assert made.recipe.train.cuda_graphs == "auto" and made.graphs == ""


def test_blocks_are_kept_beside_the_graphs() -> None:
    words = recipe(activation_checkpointing="full", keep_blocks="auto", vram="8GiB")
    made = found(words).recipe
    alone = decide(
        recipe(activation_checkpointing="full", keep_blocks="auto", vram="8GiB", cuda_graphs=False),
        architecture=SHAPE, hardware=H200, on_cpu=False,
    )  # fmt: skip
    assert made.train.cuda_graphs is True and planned(made).fits()
    assert isinstance(made.train.keep_blocks, int) and isinstance(alone.train.keep_blocks, int)
    assert 0 < made.train.keep_blocks < alone.train.keep_blocks


def test_the_plan_holds_gradients_and_the_pool_in_every_phase() -> None:
    eager, made = (planned(recipe(cuda_graphs=value)) for value in (False, True))
    stock = inventory(made.recipe, SHAPE)
    steady = phase(made, "steady step")
    pool = phase(made, "evaluation").device["recorded"]
    for name in ("steady step", "evaluation", "save"):
        assert phase(made, name).device["gradients"] == stock.gradient_bytes
    passing = ("activations_kept", "activation_workspace", "dequantised", "logits")
    used = sum(steady.device.get(name, 0) for name in passing)
    assert stock.update_bytes >= SPARE_BYTES
    assert used == pool + stock.update_bytes, "an update has its memory beside the pool"
    assert phase(made, "save").device["recorded"] == pool
    # What an evaluation needs comes on top of the pool.
    more = stock.gradient_bytes + pool
    before, after = (
        sum(v for k, v in phase(each, "evaluation").device.items() if k != "allocator")
        for each in (eager, made)
    )
    assert after == before + more
    assert phase(made, "load") == phase(eager, "load")
    assert eager.device_bytes < made.device_bytes < eager.device_bytes + 1.1 * GIB
    assert "recorded passes" in plain(made) and "recorded passes" not in plain(eager)


def test_recorded_gradients_of_a_full_run_add_to_what_is_there() -> None:
    words = recipe(length=128).model_dump(mode="json", exclude_unset=True)
    words |= {"quant": {"format": "none"}, "adapter": {"kind": "none"}}
    words["train"] |= {"gradient_accumulation_steps": 1, "cuda_graphs": True}
    once = planned(Recipe.model_validate(words), SMALL)
    words["train"] |= {"gradient_accumulation_steps": 2, "cuda_graphs": False}
    added = planned(Recipe.model_validate(words), SMALL)
    stock = inventory(once.recipe, SMALL)
    for each in (once, added):
        assert phase(each, "steady step").device["gradients"] == stock.gradient_bytes
    assert phase(once, "first step").device_bytes == phase(added, "first step").device_bytes


def test_a_run_keeps_what_was_decided() -> None:
    made = planned(found(recipe()).recipe)
    given = cast(Assembly, SimpleNamespace(recipe=recipe()))
    notes: list[str] = []

    def replaced(assembly: Any, **words: Any) -> Any:
        return SimpleNamespace(**words)

    import nibble.train.planned as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "replace", replaced)
        assert decided(given, made, note=notes.append).recipe.train.cuda_graphs is True
        assert decided(given, None, note=notes.append) is given
    assert notes == []
