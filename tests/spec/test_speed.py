"""Planned seconds of a step beside measured ones, and that each limit works as it says.

The rows are whole models on H200s (2026-11-22 and 23); those of bench/results that newer fast paths
have overtaken are left out. Constants of `spec/counting.py` come from `FITTED` and from a grid of
shallow models (bench/plan_rows.py, docs/plan.md); `HELD_OUT` gave none, but is of the same machines
and models.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from nibble.spec.arch import from_config
from nibble.spec.config import Recipe
from nibble.spec.hardware import Hardware, hardware
from nibble.spec.holdings import Devices
from nibble.spec.plan import Plan, plan
from nibble.spec.speed import BUS, LAUNCHES, MATMUL, MEMORY, Speed

LLAMA: dict[str, Any] = {"model_type": "llama", "num_key_value_heads": 8}
EIGHT = {
    **LLAMA,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 128256,
}
SEVENTY = {
    **LLAMA,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "vocab_size": 32000,
}
SEVEN = {
    **EIGHT,
    "intermediate_size": 11008,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
BLOOM = {
    "model_type": "bloom",
    "hidden_size": 4096,
    "n_layer": 30,
    "n_head": 32,
    "vocab_size": 250880,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
QLORA: dict[str, Any] = {
    "quant": {"format": "nf4"},
    "adapter": {"kind": "lora", "rank": 16, "alpha": 16},
}
STREAM = {**QLORA, "place": {"kind": "stream", "resident_blocks": 0}}
INT8: dict[str, Any] = {
    "quant": {"format": "int8"},
    "adapter": {
        "kind": "lora",
        "rank": 8,
        "alpha": 32,
        "dropout": 0.05,
        "targets": ["query_key_value"],
    },
}
GALORE: dict[str, Any] = {
    "optim": {
        "method": "galore8bit",
        "rank": 1024,
        "basis_storage": "bf16",
        "layerwise": True,
    }
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A measured step: its shape, recipe, rows x tokens, cards, and milliseconds."""

    config: dict[str, Any]
    recipe: dict[str, Any]
    batch: tuple[int, int]
    measured_ms: float
    words: dict[str, Any] = field(default_factory=dict)
    cards: int = 1
    bus_gbs: float | None = None

    def plan(self) -> Plan:
        sections: dict[str, Any] = {k: dict(v) for k, v in self.recipe.items()}
        sections["model"] = {"path": "m"}
        # No row was replayed unless it says so.
        sections["train"] = {"cuda_graphs": False, "micro_batch_size": self.batch[0]}
        sections.setdefault("data", {})["max_length"] = self.batch[1]
        for path, value in self.words.items():
            section, _, key = path.partition(".")
            sections.setdefault(section, {})[key] = value
        card = hardware("h200")
        if self.bus_gbs is not None:
            card = replace(card, bus_bytes=self.bus_gbs * 1e9)
        return plan(
            Recipe.model_validate(sections),
            architecture=from_config(self.config),
            hardware=card,
            devices=Devices(per_machine=self.cards),
        )


def eight(rows: int, tokens: int, measured_ms: float, *, cards: int = 1, **words: Any) -> Row:
    return Row(
        config=EIGHT,
        recipe=QLORA,
        batch=(rows, tokens),
        measured_ms=measured_ms,
        cards=cards,
        words={f"{'place' if key == 'kind' else 'train'}.{key}": v for key, v in words.items()},
    )


def seventy(
    rows: int,
    tokens: int,
    measured_ms: float,
    *,
    cards: int = 2,
    bus_gbs: float | None = None,
    **place: Any,
) -> Row:
    return Row(
        config=SEVENTY,
        recipe=STREAM,
        batch=(rows, tokens),
        measured_ms=measured_ms,
        cards=cards,
        bus_gbs=bus_gbs,
        words={f"place.{key}": value for key, value in place.items()},
    )


def bloom(rows: int, tokens: int, measured_ms: float, *, eager: bool = False) -> Row:
    words: dict[str, Any] = {}
    if eager:  # steps that ask for outliers, and transformers' blocks
        words = {"train.fused_kernels": False, "quant.kernels": "eager"}
    return Row(
        config=BLOOM,
        recipe=INT8,
        batch=(rows, tokens),
        measured_ms=measured_ms,
        words=words,
    )


def galore(rows: int, measured_ms: float, **words: Any) -> Row:
    named = {f"optim.{key}": value for key, value in words.items()}
    return Row(config=SEVEN, recipe=GALORE, batch=(rows, 256), measured_ms=measured_ms, words=named)


FITTED = {
    "8B qlora 1x2048 keep all": eight(1, 2048, 134.6, activation_checkpointing="none"),
    "8B qlora 1x512 keep all, replayed": eight(
        1, 512, 44.4, activation_checkpointing="none", cuda_graphs=True
    ),
    "8B qlora 4x2048 keep 11": eight(4, 2048, 591.0, keep_blocks=11),
    "bloom int8 8x512": bloom(8, 512, 238.0),
    "bloom int8 4x2048": bloom(4, 2048, 511.0),
    "7B galore 16x256": galore(16, 416.0),
    "7B galore 16x256 in backward": galore(16, 412.0, in_backward=True, max_grad_norm=None),
    "8B qlora unfused 4x2048": eight(4, 2048, 906.9, fused_kernels=False),
    "8B qlora 4x2048": eight(4, 2048, 660.6),
    "70B stream 4x2048": seventy(4, 2048, 5523.0),
    "70B stream 1x512": seventy(1, 512, 1326.0),
    "70B fsdp 1x512": seventy(1, 512, 1524.0, kind="fsdp", resident_blocks="auto"),
    "70B bus 12 4x2048": seventy(4, 2048, 7220.0, cards=1, bus_gbs=12),
    "bloom int8 eager 4x2048": bloom(4, 2048, 1464.5, eager=True),
}
HELD_OUT = {
    "8B qlora 8x2048": eight(8, 2048, 1314.7),
    "8B qlora 4x2048 keep 8": eight(4, 2048, 623.0, keep_blocks=8),
    "8B qlora 4x2048 offload": eight(4, 2048, 667.5, activation_offload=True),
    "8B qlora 4x2048 selective": eight(4, 2048, 653.9, activation_checkpointing="selective"),
    "8B qlora 1x131072": eight(1, 131072, 55137.0, activation_offload=True, mlp_tile_tokens=4096),
    "8B qlora 4x2048 ddp": eight(4, 2048, 673.0, cards=2, kind="ddp"),
    "bloom int8 eager 4x512": bloom(4, 512, 343.8, eager=True),
    "70B stream 1x2048": seventy(1, 2048, 1636.0),
    "70B stream one card": seventy(4, 2048, 5446.0, cards=1),
    "70B stream 24 resident 1x2048": seventy(1, 2048, 1530.0, resident_blocks=24),
    "70B stream 24 resident 1x512": seventy(1, 512, 974.0, resident_blocks=24),
    "70B bus 12 1x512": seventy(1, 512, 5858.0, cards=1, bus_gbs=12),
    "70B bus 12 1x2048": seventy(1, 2048, 5974.0, cards=1, bus_gbs=12),
    "70B bus 25 1x512": seventy(1, 512, 2817.0, cards=1, bus_gbs=25),
    "70B bus 25 4x2048": seventy(4, 2048, 5524.0, cards=1, bus_gbs=25),
    "70B fsdp 1x2048": seventy(1, 2048, 1855.0, kind="fsdp", resident_blocks="auto"),
}


def speed_of(row: Row) -> Speed:
    speed = row.plan().speed
    assert speed is not None
    return speed


@pytest.mark.parametrize("name", [*FITTED, *HELD_OUT])
def test_a_step_takes_what_was_measured(name: str) -> None:
    row = {**FITTED, **HELD_OUT}[name]
    ratio = speed_of(row).step_s * 1e3 / row.measured_ms
    assert 0.8 < ratio < 1.2, f"{name}: planned/measured {ratio:.2f}"


def test_most_held_out_rows_are_nearer_than_that() -> None:
    errors = [abs(speed_of(r).step_s * 1e3 / r.measured_ms - 1) for r in HELD_OUT.values()]
    assert sorted(errors)[len(errors) * 9 // 10] < 0.12


def test_what_limits() -> None:
    assert speed_of(FITTED["70B fsdp 1x512"]).limiter == LAUNCHES
    assert speed_of(FITTED["8B qlora 4x2048"]).limiter == MATMUL
    assert speed_of(FITTED["70B stream 1x512"]).limiter == BUS
    assert speed_of(FITTED["bloom int8 eager 4x2048"]).limiter == MEMORY


def test_a_slow_forward_is_not_helped_by_backward() -> None:
    """At 12 GB/s forward waits for the bus and backward, which computes twice as much, does not."""
    speed = speed_of(FITTED["70B bus 12 4x2048"])
    assert speed.forward.bus_s > speed.forward.device_s
    assert speed.backward.bus_s < speed.backward.device_s
    assert speed.step_s > max(speed.bus_s, speed.products_s + speed.memory_s)


def with_card(row: Row, **rates: float) -> Speed:
    made = row.plan()
    assert made.hardware is not None
    card: Hardware = replace(made.hardware, **rates)
    speed = plan(made.recipe, architecture=made.source, hardware=card, devices=made.devices).speed
    assert speed is not None
    return speed


def test_each_rate_moves_its_own_part() -> None:
    row = FITTED["8B qlora 4x2048"]
    speed, h200 = speed_of(row), hardware("h200")
    twice = with_card(row, matmul_flops=2 * h200.matmul_flops)
    assert twice.products_s == pytest.approx(speed.products_s / 2)
    assert twice.memory_s == speed.memory_s
    twice = with_card(row, bandwidth_bytes=2 * h200.bandwidth_bytes)
    assert twice.memory_s == pytest.approx(speed.memory_s / 2)
    short = eight(1, 512, 0.0, activation_checkpointing="none")
    launched = with_card(short, launch_s=h200.launch_s / 4)
    assert launched.launches_s == pytest.approx(speed_of(short).launches_s / 4)
    assert (speed_of(short).limiter, launched.limiter) == (LAUNCHES, MATMUL)


def test_an_update_behind_blocks_that_wait_for_the_host_comes_on_top() -> None:
    """AdamW of few large tensors is long on the card and short on the host, its blocks are not."""
    words = {"train.activation_checkpointing": "none", "train.precision": "bf16"}
    speed = speed_of(Row(config=SEVEN, recipe={}, batch=(1, 64), measured_ms=0.0, words=words))
    blocks_s = speed.forward.launch_s + speed.backward.launch_s
    assert blocks_s > speed.forward.seconds + speed.backward.seconds
    assert speed.step_s == pytest.approx(blocks_s + speed.update.seconds)
    assert speed.step_s > max(
        speed.launches_s, sum(stage.seconds for stage in speed.stages.values())
    )


def test_updates_in_backward_hide_behind_it() -> None:
    after = speed_of(galore(4, 0.0, layerwise=False))
    within = speed_of(galore(4, 0.0))
    assert within.update.launch_s > after.update.launch_s  # one by one, not by shapes
    assert within.step_s == pytest.approx(within.launches_s)
    assert after.step_s > after.launches_s


def test_experts_that_no_single_token_visits_are_read_as_well() -> None:
    mixtral = {**SEVEN, "model_type": "mixtral", "num_experts_per_tok": 2, "num_key_value_heads": 8}
    rows = [
        Row(
            config={**mixtral, "num_local_experts": count},
            recipe={"adapter": QLORA["adapter"]},
            batch=(1, 256),
            measured_ms=0.0,
        )
        for count in (4, 8)
    ]
    few, many = (speed_of(row).forward for row in rows)
    experts_bytes = 4 * 3 * 4096 * 11008 * 2 * 32
    assert many.memory_s - few.memory_s == pytest.approx(
        experts_bytes / hardware("h200").bandwidth_bytes, rel=0.01
    )


def test_accumulation_repeats_passes_but_not_the_update() -> None:
    one = speed_of(FITTED["7B galore 16x256"])
    words = {
        "train.gradient_accumulation_steps": 4,
        "optim.layerwise": False,
        "optim.basis": "randomised",
    }
    four = speed_of(replace(FITTED["7B galore 16x256"], words=words))
    assert four.forward.seconds == pytest.approx(4 * one.forward.seconds)
    assert four.update.products_s == one.update.products_s
    assert four.tokens_per_step == 4 * one.tokens_per_step


def test_true_singular_vectors_cost_what_they_cost() -> None:
    """galore_torch's SVDs: 231 s for a 7B, 1.2 s of each step at a gap of 200."""
    words = {"optim.layerwise": False, "optim.basis": "svd"}
    slow = speed_of(replace(FITTED["7B galore 16x256"], words=words))
    quick = speed_of(FITTED["7B galore 16x256"])
    assert slow.step_s - quick.step_s == pytest.approx(231 / 200, rel=0.1)


@pytest.mark.parametrize(
    ("method", "measured_ms"), [("galore8bit", 80.1), ("fira", 397.2), ("balanced", 518.0)]
)
def test_residuals_of_large_matrices_wait_for_the_host(method: str, measured_ms: float) -> None:
    """Updates of a 7B at rank 1024, one matrix a stack, on a host of 13.1 us (2026-11-23)."""
    words = {
        "optim.method": method,
        "optim.state": "8bit",
        "optim.layerwise": False,
        "optim.basis": "randomised",
    }
    update = speed_of(replace(FITTED["7B galore 16x256"], words=words)).update
    launch_s = hardware("h200").launch_s
    planned_ms = 1e3 * update.launch_s * 13.1e-6 / launch_s
    assert 0.7 < planned_ms / measured_ms < 1.3
    stacked = speed_of(
        replace(FITTED["7B galore 16x256"], words={**words, "optim.rank": 64})
    ).update
    assert stacked.launch_s <= update.launch_s
    if method != "galore8bit":
        assert stacked.launch_s < 0.5 * update.launch_s


def test_a_replayed_pass_is_not_limited_by_launches() -> None:
    """Measured: 44.4 ms replayed; the host alone takes longer to launch it all (2026-11-23)."""
    row = FITTED["8B qlora 1x512 keep all, replayed"]
    eager = speed_of(replace(row, words={**row.words, "train.cuda_graphs": False}))
    assert eager.limiter == LAUNCHES
    assert speed_of(row).limiter == MATMUL
    assert eager.step_s > 1.5 * speed_of(row).step_s
    row = bloom(1, 512, 0.0, eager=True)
    asked = speed_of(replace(row, words={**row.words, "train.cuda_graphs": "auto"}))
    assert asked.limiter == LAUNCHES  # outliers are asked for, layer by layer


def test_fp32_has_a_rate_of_its_own() -> None:
    row = FITTED["8B qlora 4x2048"]
    full = replace(row, words={"train.precision": "fp32"})
    card = hardware("h200")
    ratio = speed_of(full).products_s / speed_of(row).products_s
    assert ratio == pytest.approx(card.matmul_flops / card.fp32_flops)
