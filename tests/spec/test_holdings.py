"""What each placement holds on a device and in a machine, for the model that they are made for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nibble.errors import PlanError
from nibble.spec.arch import Architecture, architecture
from nibble.spec.config import Model, Place, Quant, Recipe
from nibble.spec.decide import decide
from nibble.spec.hardware import hardware
from nibble.spec.holdings import Devices, Holding, holding
from nibble.spec.inventory import inventory
from nibble.spec.plan import Plan, plan
from nibble.spec.units import GIB

SEVENTY = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip
TWO = Devices(per_machine=2)


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    folder: Path = tmp_path_factory.mktemp("seventy")
    (folder / "config.json").write_text(json.dumps(SEVENTY))
    return architecture(Model(path=str(folder)))


def recipe(kind: str, **place: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": "seventy"},
            "quant": {"format": "nf4"},
            "adapter": {"kind": "lora", "rank": 16},
            "data": {"max_length": 2048},
            "train": {"micro_batch_size": 4},
            "place": {"kind": kind, **place},
        }
    )


def held(words: Recipe, shape: Architecture, devices: Devices) -> Holding:
    return holding(words, inventory(words, shape), devices)


def planned(words: Recipe, shape: Architecture, devices: Devices) -> Plan:
    return plan(
        words, architecture=shape, hardware=hardware("rtx4090"), on_cpu=False, devices=devices
    )


def test_a_copy_on_each_device_is_the_whole(shape: Architecture) -> None:
    one = held(recipe("single"), shape, Devices())
    assert held(recipe("ddp"), shape, TWO).base_codes == one.base_codes
    stock = inventory(recipe("single"), shape)
    assert sum(stock.base_by_block) + 2 * (2 * 32000 * 8192) + 2 * 8192 == stock.base_bytes
    assert sum(stock.trained_by_block) == stock.trained_bytes


def test_shards_add_up_to_the_whole(shape: Architecture) -> None:
    one, two = held(recipe("single"), shape, TWO), held(recipe("fsdp"), shape, TWO)
    for name in ("base_codes", "base_scales", "base_weights", "trained_weights", "gradients"):
        assert getattr(one, name) <= 2 * getattr(two, name) <= getattr(one, name) + 2
    assert two.moving < 2 * GIB, "three blocks; the two tables come and go before and after them"
    kept = held(recipe("fsdp", shard="grad-op"), shape, TWO)
    assert kept.moving > 30 * GIB
    hybrid = held(
        recipe("fsdp", shard="hybrid", shard_group=2), shape, Devices(per_machine=2, machines=4)
    )
    assert hybrid.base_codes == two.base_codes


def test_zero_shares_out_fp32_copies(shape: Architecture) -> None:
    words = recipe("deepspeed").model_copy(update={"quant": Quant()})
    two, three = (
        held(words.model_copy(update={"place": words.place.model_copy(update={"zero_stage": n})}),
             shape, TWO)
        for n in (2, 3)
    )  # fmt: skip
    stock = inventory(words, shape)
    assert two.gradients == three.gradients == 2 * stock.num_trainable, "fp32, half on each"
    assert two.base_weights == 2 * three.base_weights == stock.base_weights_bytes
    assert two.trained_weights - stock.trained_bytes == 2 * stock.num_trainable
    assert 2 * three.optimizer_state == stock.optimizer_bytes
    alone = held(words, shape, Devices())
    assert alone == held(words.model_copy(update={"place": Place()}), shape, Devices())


def test_streamed_blocks_are_once_in_the_machine(shape: Architecture) -> None:
    stock = inventory(recipe("stream"), shape)
    none = held(recipe("stream", resident_blocks=0), shape, TWO)
    vectors = sum(stock.vectors_by_block)
    assert none.streamed == sum(stock.base_by_block) - vectors and vectors == 80 * 2 * 2 * 8192
    assert 32 * GIB < none.streamed < 34 * GIB
    assert none.base_codes == 0
    assert none.base_weights == 2 * 2 * 32000 * 8192 + 2 * 8192 + vectors
    some = held(recipe("stream", resident_blocks=40), shape, TWO)
    assert some.base_codes * 2 == pytest.approx(stock.base_codes_bytes)
    assert some.streamed == none.streamed
    every = held(recipe("stream", resident_blocks=80), shape, TWO)
    assert every.base_codes == stock.base_codes_bytes and every.moving == 0


def test_seventy_billion_fit_streamed_and_not_otherwise(shape: Architecture) -> None:
    limit = 24 * GIB
    assert not planned(recipe("single"), shape, Devices()).fits(limit)
    assert not planned(recipe("ddp"), shape, TWO).fits(limit)
    streamed = planned(recipe("stream", resident_blocks=0), shape, Devices())
    assert streamed.fits(limit)
    with pytest.raises(PlanError, match="streamed weights"):
        streamed.check_host(32 * GIB)
    streamed.check_host(64 * GIB)


def test_auto_becomes_the_most_that_fits(shape: Architecture) -> None:
    words = recipe("stream").model_copy(
        update={"train": recipe("stream").train.model_copy(update={"micro_batch_size": 1})}
    )
    card = hardware("rtx4090")
    made = decide(words, architecture=shape, hardware=card, on_cpu=False, devices=TWO)
    resident = made.place.resident_blocks
    assert isinstance(resident, int) and 0 < resident < 80
    assert planned(made, shape, TWO).fits()
    more = recipe("stream", resident_blocks=resident + 1).place
    assert not planned(made.model_copy(update={"place": more}), shape, TWO).fits()


def test_two_devices_take_two_steps_tokens(shape: Architecture) -> None:
    one = planned(recipe("stream", resident_blocks=0), shape, Devices())
    two = planned(recipe("stream", resident_blocks=0), shape, TWO)
    assert two.tokens_per_step == 2 * one.tokens_per_step
    assert one.speed is not None and two.speed is not None
    assert two.speed.tokens_per_s == pytest.approx(2 * one.speed.tokens_per_s)
    assert two.speed.energy_kwh(1e6) == pytest.approx(one.speed.energy_kwh(1e6))
    few = recipe("stream", resident_blocks=0)
    few = few.model_copy(
        update={
            "train": few.train.model_copy(update={"micro_batch_size": 1}),
            "data": few.data.model_copy(update={"max_length": 128}),
        }
    )
    waiting = planned(few, shape, Devices()).speed
    assert waiting is not None and waiting.limiter == "bus"
