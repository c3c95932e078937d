"""The comparison: every method is planned alike, fits or says so, and quality is what was run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nibble.errors import ConfigError
from nibble.spec.advice import apply
from nibble.spec.arch import Architecture, from_config
from nibble.spec.compare import METHODS, Row, compare, fits
from nibble.spec.compare_text import plain
from nibble.spec.hardware import hardware
from nibble.spec.holdings import Devices
from nibble.spec.plan import plan
from nibble.spec.quality import losses_of, reference_runs

ROOT = Path(__file__).resolve().parents[2]
ONE = Devices()
WORDS = ("data.max_length=1024", "place.ram=64GiB")


@pytest.fixture(scope="module")
def shape() -> Architecture:
    return from_config(
        {
            "model_type": "llama",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "intermediate_size": 11008,
        }
    )


@pytest.fixture(scope="module")
def rows(shape: Architecture) -> list[Row]:
    return compare("m", WORDS, architecture=shape, hardware=hardware("rtx4090"), devices=ONE)


def test_every_method_has_a_row(rows: list[Row]) -> None:
    assert [row.method.key for row in rows] == [method.key for method in METHODS]
    assert {"full", "galore", "q-galore", "apollo-mini"} < {row.method.key for row in rows}
    assert all(row.plan is not None for row in rows)


@pytest.mark.parametrize(
    ("key", "number"), [(m.key, n) for m in METHODS for n in range(len(m.variants))]
)
def test_every_variant_is_a_recipe(key: str, number: int, shape: Architecture) -> None:
    method = next(method for method in METHODS if method.key == key)
    alone = replace(method, variants=(method.variants[number],))
    found = compare(
        "m", WORDS, architecture=shape, hardware=hardware("h200"), devices=ONE, methods=[alone]
    )
    assert found[0].fits and not found[0].error


def test_a_row_is_the_plan_of_its_recipe(rows: list[Row], shape: Architecture) -> None:
    for row in rows:
        assert row.plan is not None
        again = plan(
            row.plan.recipe, architecture=shape, hardware=hardware("rtx4090"), on_cpu=False
        )
        assert again.device_bytes == row.plan.device_bytes
        assert again.speed == row.plan.speed
        assert row.fits == (again.fits() and again.host_bytes <= 64 << 30)


def test_full_training_of_a_7b_does_not_fit_and_qlora_does(rows: list[Row]) -> None:
    by_key = {row.method.key: row for row in rows}
    assert not by_key["full"].fits and by_key["qlora"].fits and by_key["streamed"].fits
    order = ["full", "galore", "q-galore"]
    held = [by_key[key].plan.device_bytes for key in order]  # type: ignore[union-attr]
    assert held[0] > max(held[1:]), "what is left of the card may hold more activations"


def test_updates_are_of_the_same_rows_where_passes_add_up(rows: list[Row]) -> None:
    for row in rows:
        assert row.plan is not None
        train = row.plan.recipe.train
        if not row.plan.recipe.optim.in_backward:
            assert train.micro_batch_size * train.gradient_accumulation_steps == 16


def test_what_was_chosen_is_the_fastest_of_its_neighbours(
    rows: list[Row], shape: Architecture
) -> None:
    qlora = next(row for row in rows if row.method.key == "qlora")
    assert qlora.plan is not None and qlora.plan.speed is not None
    train = qlora.plan.recipe.train
    for micro in (train.micro_batch_size // 2, train.micro_batch_size * 2):
        if not 1 <= micro <= 16:
            continue
        other = plan(
            apply(
                qlora.plan.recipe,
                {
                    "train.micro_batch_size": micro,
                    "train.gradient_accumulation_steps": 16 // micro,
                },
            ),
            architecture=shape,
            hardware=hardware("rtx4090"),
            on_cpu=False,
        )
        assert other.speed is not None
        assert not fits(other) or other.speed.tokens_per_s <= qlora.plan.speed.tokens_per_s


def test_little_host_memory_is_said(shape: Architecture) -> None:
    streamed = next(method for method in METHODS if method.key == "streamed")
    found = compare(
        "m",
        ("data.max_length=1024", "place.ram=3GiB"),
        architecture=shape,
        hardware=hardware("rtx4090"),
        devices=ONE,
        methods=[streamed],
    )
    assert not found[0].fits
    assert "no: host" in plain(found)


def test_own_words_win_and_count(shape: Architecture) -> None:
    lora = [method for method in METHODS if method.key == "lora"]
    found = compare(
        "m",
        (*WORDS, "adapter.rank=64", "train.max_tokens=52000000"),
        architecture=shape,
        hardware=hardware("h200"),
        devices=ONE,
        methods=lora,
    )
    made = found[0].plan
    assert made is not None and made.recipe.adapter.rank == 64
    values = found[0].to_json()
    assert values["num_tokens"] == 52_000_000
    assert values["hours"] == pytest.approx(52e6 / values["tokens_per_s"] / 3600)
    assert values["usd"] == pytest.approx(values["hours"] * 3.5)
    assert "52 M tokens" in plain(found)
    json.dumps(values)


def test_words_that_no_method_takes_are_an_error(shape: Architecture) -> None:
    with pytest.raises(ConfigError, match="colour"):
        compare("m", ["colour=red"], architecture=shape, hardware=None, devices=ONE)


def test_the_table_has_80_columns_and_every_row(rows: list[Row]) -> None:
    text = plain(rows)
    assert max(len(line) for line in text.splitlines()) <= 80
    for row in rows:
        line = next(line for line in text.splitlines() if line.startswith(row.method.name))
        assert ("no: card" in line) == (not row.fits)
        assert row.quality_loss in line


def test_without_a_card_there_is_no_speed_and_it_says_how_to_get_one(shape: Architecture) -> None:
    rows = compare("m", WORDS, architecture=shape, hardware=None, devices=ONE, on_cpu=True)
    assert "nibble plan --calibrate" in " ".join(plain(rows).split())
    assert all("tokens_per_s" not in row.to_json() for row in rows)


def test_reference_runs_are_those_that_are_published() -> None:
    known = {method.key for method in METHODS}
    for run in reference_runs():
        assert run.method in known
        published = (ROOT / run.result).read_text()
        assert run.commit in published
        for value in (run.before, run.after):
            assert value is None or f"{value:g}" in published, run
        assert " ".join(run.command.split()[:3]).strip() in published.replace("\\\n", " ")


def test_a_loss_needs_a_reference_of_its_set() -> None:
    full, lora = reference_runs()[:2]
    assert losses_of("lora", (full, lora)) == []
    same = replace(lora, set=full.set, metric=full.metric, better=full.better, after=77.2)
    found = losses_of("lora", (full, same))
    assert [loss.amount for loss in found] == [pytest.approx(2.0)]
    assert found[0].words == "+2 accuracy"
    assert losses_of("full", (full, same)) == []


def test_perplexities_are_compared_in_nats() -> None:
    full = reference_runs()[0]
    full = replace(full, metric="perplexity", better="lower", before=None, after=20.0)
    (found,) = losses_of("lora", (full, replace(full, method="lora", after=22.0)))
    assert found.amount == pytest.approx(0.0953, rel=1e-3)
    assert found.words == "+0.095 nats"
    assert found.run.words.startswith("perplexity: 22 (")
