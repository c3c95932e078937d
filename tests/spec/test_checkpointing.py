"""What the settings of checkpointing cost in the plan, and how `keep_blocks: auto` is settled."""

from __future__ import annotations

from typing import Any

import pytest

from nibble.errors import PlanError
from nibble.spec.arch import from_config
from nibble.spec.checkpointing import PREFETCH_MAX_BYTES
from nibble.spec.config import Recipe
from nibble.spec.decide import decide
from nibble.spec.hardware import hardware
from nibble.spec.plan import Plan, plan
from nibble.spec.units import GIB, parse_bytes

LLAMA_8B = from_config(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    }
)


def recipe(*, rows: int = 4, length: int = 2048, **train: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": "org/llama"},
            "quant": {"format": "nf4"},
            "adapter": {"kind": "lora", "rank": 16, "alpha": 16},
            "data": {"max_length": length},
            "train": {"micro_batch_size": rows, **train},
            "place": {"vram": "23.5GiB", "kind": "single"},
        }
    )


def planned(words: Recipe) -> Plan:
    return plan(words, architecture=LLAMA_8B, hardware=hardware("h200"), on_cpu=False)


def kept(made: Plan, moment: str) -> int:
    """Activations kept in a step, whatever is largest there."""
    phase = next(p for p in made.phases if p.name == "steady step")
    assert phase.moment == moment
    return phase.device["activations_kept"]


def test_auto_is_the_largest_number_that_fits() -> None:
    auto = decide(recipe(keep_blocks="auto"), architecture=LLAMA_8B, hardware=hardware("h200"))
    number = auto.train.keep_blocks
    assert isinstance(number, int) and 0 < number < 32
    assert planned(auto).fits()
    assert not planned(recipe(keep_blocks=number + 1)).fits()
    all_of_them = recipe(rows=1, length=256, keep_blocks="auto")
    assert decide(all_of_them, architecture=LLAMA_8B).train.keep_blocks == 32


def test_all_blocks_kept_is_no_checkpointing() -> None:
    every = planned(recipe(keep_blocks=32))
    none = planned(recipe(activation_checkpointing="none"))
    assert every.phases == none.phases and every.flops_per_step == none.flops_per_step
    assert planned(recipe(keep_blocks=99)).phases == none.phases


def test_a_kept_block_costs_its_list_and_saves_its_forward() -> None:
    some = [planned(recipe(keep_blocks=number)) for number in (8, 9, 10)]
    bytes_each = [kept(made, "the loss") for made in some]
    assert bytes_each[2] - bytes_each[1] == bytes_each[1] - bytes_each[0] > GIB // 2
    flops = [made.flops_per_step for made in some]
    assert flops[0] - flops[1] == pytest.approx(flops[1] - flops[2]) and flops[1] < flops[0]


def test_offload_leaves_one_block_and_fills_the_host() -> None:
    one = 8192 * 4096 * 2
    made = planned(recipe(activation_offload=True))
    phase = next(p for p in made.phases if p.name == "steady step")
    assert phase.host["offloaded_activations"] == 31 * one
    plain = next(p for p in planned(recipe()).phases if p.name == "steady step")
    assert plain.device_bytes - phase.device_bytes > 15 * one
    speed, plain_speed = made.speed, planned(recipe()).speed
    assert speed is not None and plain_speed is not None
    assert speed.bus_s == pytest.approx(2 * 31 * one / hardware("h200").bus_bytes)
    assert plain_speed.bus_s == 0 and speed.step_s == plain_speed.step_s


def test_too_little_host_memory_is_refused_by_its_largest_part() -> None:
    words = recipe(rows=1, length=131072, activation_offload=True, mlp_tile_tokens=4096)
    made = planned(words)
    assert made.host_bytes > 31 * GIB
    with pytest.raises(PlanError, match="activations"):
        made.check_host(16 * GIB)


def test_a_row_of_131072_tokens_fits_24_gib() -> None:
    for policy in ("full", "selective"):
        words = recipe(
            rows=1,
            length=131072,
            activation_offload=True,
            mlp_tile_tokens=4096,
            activation_checkpointing=policy,
        )
        assert planned(words).allocator_bytes <= parse_bytes("23.5GiB")
    assert not planned(recipe(rows=1, length=131072, activation_offload=True)).fits()
    assert PREFETCH_MAX_BYTES < 131072 * 4096 * 2


def test_selective_spares_attention_and_pays_with_its_output() -> None:
    full, selective = (
        planned(recipe(rows=1, length=32768, activation_checkpointing=policy))
        for policy in ("full", "selective")
    )
    attention = LLAMA_8B.attention_flops_per_token(32768) * 32768
    assert full.flops_per_step - selective.flops_per_step == pytest.approx(attention)
    moment = "the first block computed again"
    more = kept(selective, moment) - kept(full, moment)
    assert more == 32 * 32768 * (4096 * 2 + 32 * 4)
