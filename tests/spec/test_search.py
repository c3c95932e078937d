"""`fit: auto` against brute force, against its neighbours, and against what was asked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nibble.errors import ConfigError, PlanError
from nibble.spec import fit_text
from nibble.spec.arch import Architecture, from_config
from nibble.spec.choices import (
    CHOICES,
    KEEP,
    RANK,
    RESIDENT,
    counts,
    differs,
    is_free,
    override,
    present,
    refusal_of,
)
from nibble.spec.config import Recipe
from nibble.spec.decide import decide
from nibble.spec.given import ALLOWED, ALWAYS, value_of
from nibble.spec.hardware import Hardware, hardware
from nibble.spec.holdings import Devices
from nibble.spec.load import dump_recipe, load_recipe
from nibble.spec.neighbours import neighbours
from nibble.spec.phases import CUDA_CONTEXT_BYTES
from nibble.spec.plan import Plan, plan
from nibble.spec.planner import Budget, Planner, budget_of, rate
from nibble.spec.search import Found, search, starting
from nibble.spec.space import SAME
from nibble.spec.units import GIB

CARD = hardware("rtx4090")
ONE, TWO = Devices(), Devices(per_machine=2)


def shape(layers: int = 3, hidden: int = 1024, **more: Any) -> Architecture:
    words = {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 128,
        "num_key_value_heads": 8, "intermediate_size": 4 * hidden, **more,
    }  # fmt: skip
    return from_config(words)


LLAMA_8B = shape(32, 4096, vocab_size=128256, intermediate_size=14336)
SMALL = shape()
BLOOM = from_config({"model_type": "bloom", "vocab_size": 40000, "hidden_size": 1024,
                     "n_layer": 3, "n_head": 16})  # fmt: skip


def read(name: str, *words: str) -> Recipe:
    return load_recipe(name, ["model.path=m", "fit=auto", *words])


def find(
    recipe: Recipe,
    architecture: Architecture,
    *,
    device: float,
    host: float | None = None,
    devices: Devices = ONE,
    card: Hardware | None = CARD,
) -> Found:
    """With budgets in GiB."""
    return search(
        recipe,
        architecture=architecture,
        hardware=card,
        devices=devices,
        budget=Budget(
            device_bytes=int(device * GIB), host_bytes=None if host is None else int(host * GIB)
        ),
    )


# Brute force -------------------------------------------------------------------------------------


def everything(recipe: Recipe, planner: Planner) -> Iterator[Plan]:
    """Every legal combination of every choice and count."""
    started = starting(recipe, planner.devices)
    choices = [c for c in CHOICES if is_free(started, c) and c is not RANK]

    def spread(made: Recipe, rest: list[Any]) -> Iterator[Recipe]:
        if not rest:
            yield made
            return
        for values in rest[0].values(made, planner.setting):
            yield from spread(override(made, values), rest[1:])

    for core in spread(started, choices):
        if refusal_of(started, core) is not None:
            continue
        most = counts(core, planner.setting)
        for numbers in itertools.product(*(range(number + 1) for number in most.values())):
            yield planner(override(core, dict(zip(most, numbers, strict=True))))


def num_changes(started: Recipe, recipe: Recipe) -> int:
    number = sum(
        is_free(started, choice) and differs(started, present(recipe, choice)) for choice in CHOICES
    )
    return number + (recipe.train.keep_blocks != started.train.keep_blocks)


CASES: list[tuple[str, Architecture, Devices, list[str]]] = [
    ("qlora", SMALL, ONE, []),
    (
        "lora",
        SMALL,
        ONE,
        ["fit.allow=[format,optimizer]", "train.loss_chunk_tokens=512", "mlp_tile_tokens=1024"],
    ),
    ("lora", BLOOM, ONE, ["train.loss_chunk_tokens=512"]),
    ("lora", SMALL, TWO, ["train.mlp_tile_tokens=1024"]),
    ("full", SMALL, TWO, ["fit.allow=[method]"]),
    ("qlora", SMALL, ONE, ["place.kind=stream", "loss_chunk_tokens=1024"]),
]


@pytest.mark.parametrize(("name", "architecture", "devices", "words"), CASES)
def test_the_search_finds_what_brute_force_finds(
    name: str, architecture: Architecture, devices: Devices, words: list[str]
) -> None:
    recipe = read(name, "fit.batch_rows=4", "max_length=2048", *words)
    card = replace(CARD, bus_bytes=2e9, link_bytes=2e9)  # so that pulling over it costs
    planner = Planner(architecture=architecture, hardware=card, on_cpu=False, devices=devices)
    plans = list(everything(recipe, planner))
    started = starting(recipe, devices)
    sizes = sorted(made.device_bytes for made in plans)
    hosts = sorted({made.host_bytes for made in plans})
    tried = 0
    for share, host in itertools.product((0.01, 0.2, 0.6, 0.95), (hosts[0], hosts[-1])):
        budget = Budget(device_bytes=sizes[int(share * (len(sizes) - 1))], host_bytes=host)
        fitting = [made for made in plans if budget.fits(made)]
        words_of = {"architecture": architecture, "hardware": card, "devices": devices}
        if not fitting:
            with pytest.raises(PlanError, match="nothing fits"):
                search(recipe, budget=budget, **words_of)  # type: ignore[arg-type]
            continue
        tried += 1
        found = search(recipe, budget=budget, **words_of)  # type: ignore[arg-type]
        best = max(rate(made) for made in fitting)
        assert budget.fits(found.plan)
        assert rate(found.plan) >= best * (1 - SAME)
        near = [made for made in fitting if rate(made) >= best * (1 - SAME)]
        fewest = min(num_changes(started, made.recipe) for made in near)
        assert num_changes(started, found.plan.recipe) == fewest
    assert tried >= 4


# Properties --------------------------------------------------------------------------------------

PLACES: list[tuple[str, Architecture, float, float | None, Devices, list[str]]] = [
    ("qlora", LLAMA_8B, 24, 64, ONE, []),
    ("qlora", LLAMA_8B, 12, 64, ONE, []),
    ("qlora", LLAMA_8B, 8, 9, ONE, []),
    ("lora", LLAMA_8B, 24, 64, ONE, []),
    ("lora", LLAMA_8B, 24, 64, TWO, ["fit.allow=[optimizer,rank]", "place.kind=fsdp"]),
    ("full", LLAMA_8B, 80, None, TWO, ["fit.allow=[method,rank]"]),
    ("dora", LLAMA_8B, 16, 32, TWO, ["train.micro_batch_size=2"]),
    ("galore", SMALL, 2, None, ONE, ["fit.allow=[rank]"]),
    ("llama-pro", LLAMA_8B, 24, 64, ONE, []),
]


@pytest.mark.parametrize(("name", "architecture", "device", "host", "devices", "words"), PLACES)
def test_what_is_found_fits_and_no_neighbour_is_faster(
    name: str,
    architecture: Architecture,
    device: float,
    host: float | None,
    devices: Devices,
    words: list[str],
    tmp_path: Path,
) -> None:
    recipe = read(name, "max_length=2048", *words)
    found = find(recipe, architecture, device=device, host=host, devices=devices)
    assert found.recipe.fit is None
    assert found.budget.fits(found.plan)
    for row in neighbours(found):
        if row.plan is None:
            assert row.why
        elif row.is_free and found.budget.fits(row.plan):
            assert rate(row.plan) <= rate(found.plan) * (1 + SAME), row.words
        else:
            assert row.why
    # Written, read again and planned without any help, it is the same run.
    file = tmp_path / "fitted.yaml"
    file.write_text(fit_text.text(found))
    again = load_recipe(file)
    assert again == found.recipe
    made = plan(
        decide(again, architecture=architecture, hardware=CARD, devices=devices),
        architecture=architecture, hardware=CARD, devices=devices,
    )  # fmt: skip
    assert made.to_json() == {
        **found.plan.to_json(),
        "limit_bytes": made.limit(),
        "fits": made.fits(),
    }
    assert made.tokens_per_step == found.planner(found.started).tokens_per_step


def test_what_is_given_stays() -> None:
    given = {
        "place.kind": "stream", "train.micro_batch_size": 2, "train.keep_blocks": 3,
        "train.loss_chunk_tokens": 1024,
    }  # fmt: skip
    for path, value in given.items():
        found = find(read("qlora", f"{path}={value}", "max_length=2048"), LLAMA_8B, device=24)
        assert value_of(found.recipe, path) == value
        assert path in found.started.fit.fixed  # type: ignore[union-attr]
        row = [r for r in neighbours(found) if path in r.overrides and r.plan is not None]
        assert row and not any(r.is_free for r in row)
    # Without permission what is learnt stays, and with it what was given may go.
    before = read("lora", "quant.format=none")
    unchanged = find(before, LLAMA_8B, device=24)
    assert unchanged.recipe.quant.format == "none"
    allowed = find(read("lora", "quant.format=none", "fit.allow=[format]"), LLAMA_8B, device=6)
    assert allowed.recipe.quant.format in ("int8", "nf4")
    assert value_of(allowed.recipe, "adapter.rank") == before.adapter.rank


def test_built_in_values_are_no_wishes_and_auto_is_none() -> None:
    recipe = read("qlora", "train.keep_blocks=auto", "place.kind=auto", "lr=1e-4")
    assert recipe.fit is not None and recipe.fit.fixed == ()
    twice = load_recipe(
        None, base={"model": "m", "fit": {"allow": ["rank"]}, "micro_batch_size": 4}
    )
    assert twice.fit is not None
    assert twice.fit.fixed == ("train.micro_batch_size",) and twice.fit.allow == ("rank",)
    again = Recipe.model_validate_json(twice.model_dump_json())
    assert again == twice, "other processes know what was given"
    assert read("qlora").fit == read("lora").fit, "reading one recipe leaves no trace in the next"
    assert load_recipe("qlora", ["model.path=m", "fit=null"]).fit is None


def test_a_rank_is_lowered_no_further_than_it_takes() -> None:
    recipe = read("lora", "adapter.rank=512", "fit.allow=[rank]", "place.kind=single",
                  "max_length=512")  # fmt: skip
    ranks = []
    for device in (80, 30, 21):
        found = find(recipe, LLAMA_8B, device=device)
        rank = found.recipe.adapter.rank
        assert found.recipe.adapter.alpha / rank == pytest.approx(32 / 512)
        ranks.append(rank)
        if rank < 512:
            twice = read("lora", f"adapter.rank={2 * rank}", "place.kind=single", "max_length=512")
            with pytest.raises(PlanError, match="nothing fits"):
                find(twice, LLAMA_8B, device=device)
    assert 512 == ranks[0] > ranks[1] > ranks[2]


def test_the_batch_is_kept_or_the_one_that_is_named() -> None:
    for rows in (8, 12):
        found = find(read("qlora", f"fit.batch_rows={rows}"), LLAMA_8B, device=80, devices=TWO)
        train = found.recipe.train
        assert train.micro_batch_size * train.gradient_accumulation_steps * 2 == rows
    with pytest.raises(ConfigError, match="does not divide by 2 devices: take 6 or 8"):
        find(read("qlora", "fit.batch_rows=7"), LLAMA_8B, device=80, devices=TWO)
    with pytest.raises(ConfigError, match=r"which train.micro_batch_size=3 does not divide"):
        find(read("qlora", "fit.batch_rows=8", "micro_batch_size=3"), LLAMA_8B, device=80)
    with pytest.raises(ConfigError, match="leave one out"):
        words = ["fit.batch_rows=8", "micro_batch_size=2", "gradient_accumulation_steps=2"]
        find(read("qlora", *words), LLAMA_8B, device=80)


# Refusals ----------------------------------------------------------------------------------------


def test_nothing_to_choose_is_said() -> None:
    words = [f"{path}={value_of(read('lora'), path)}" for path in ALWAYS if "tile" not in path]
    words = [w for w in words if "shard" not in w and "resident" not in w]
    given = [w.replace("=auto", "=single") for w in words] + ["mlp_tile_tokens=1024"]
    with pytest.raises(ConfigError, match=r"fit has nothing to choose: you gave place.kind, "):
        find(read("lora", *given), LLAMA_8B, device=24)


def test_a_budget_that_is_too_small_names_the_smallest_plan() -> None:
    recipe = read("lora", "place.kind=single", "max_length=512")
    with pytest.raises(PlanError) as raised:
        find(recipe, LLAMA_8B, device=8, host=64)
    message = str(raised.value)
    assert message.startswith("nothing fits into 8.00 GiB of a card and 64.00 GiB of the host: ")
    smallest = float(message.split("takes ")[1].split(" GiB")[0])
    assert "fit.allow=[format]" in message and "\n" not in message
    fits = find(recipe, LLAMA_8B, device=smallest + 0.01, host=64)
    assert fits.plan.device_bytes <= (smallest + 0.01) * GIB
    with pytest.raises(PlanError, match="nothing fits"):
        find(recipe, LLAMA_8B, device=smallest - 0.02, host=64)


def test_budgets_that_contradict_what_there_is() -> None:
    def budget(*words: str, device: int | None = 24 * GIB, host: int | None = 32 * GIB) -> Budget:
        return budget_of(read("qlora", *words), device_bytes=device, host_bytes=host, card="x")

    with pytest.raises(ConfigError, match=r"place.vram=80GiB is more than x has"):
        budget("vram=80GiB")
    with pytest.raises(ConfigError, match=r"place.ram=1TiB is more than is free here"):
        budget("ram=1TiB")
    with pytest.raises(ConfigError, match=r"fit needs a budget: name a card"):
        budget(device=None)
    told = budget("vram=8GiB", "ram=16GiB")
    assert told.device_bytes == 8 * GIB + CUDA_CONTEXT_BYTES and told.host_bytes == 16 * GIB
    assert budget().words() == (
        "24.00 GiB of a card less 737.3 MiB to spare and 32.00 GiB of the host"
    )


def test_wrong_words_are_answered() -> None:
    for words, answer in (
        (["fit=always"], "fit=always is not auto"),
        (["fit.allow=[fromat]"], "did you mean format?"),
        (["fit.fixed=[place.knd]"], "place.knd is no setting: did you mean place.kind"),
        (["fit.batch_rows=0"], "must be >= 1"),
    ):
        with pytest.raises(ConfigError) as raised:
            load_recipe("qlora", ["model.path=m", *words])
        assert answer in str(raised.value)


# What else there is ------------------------------------------------------------------------------


def test_a_card_without_a_row_is_fitted_by_flops() -> None:
    found = find(read("qlora", "max_length=2048"), LLAMA_8B, device=24, card=None)
    assert found.plan.speed is None and found.recipe.train.keep_blocks > 0  # type: ignore[operator]
    assert "speed not known" in " ".join(fit_text.lines(found))
    here = search(
        read("qlora", "max_length=512"), architecture=LLAMA_8B, on_cpu=True,
        budget=Budget(device_bytes=None, host_bytes=24 * GIB),
    )  # fmt: skip
    assert here.plan.on_cpu and here.plan.host_bytes <= 24 * GIB
    assert here.recipe.place.kind == "single"


def test_the_search_plans_as_the_plan_does() -> None:
    """Inventories that are kept give the bytes that a plan of its own has."""
    planner = Planner(architecture=LLAMA_8B, hardware=CARD, on_cpu=False, devices=TWO)
    recipe = read("lora", "fit.allow=[format,optimizer,method,rank]")
    started = starting(recipe, TWO)
    for choice in CHOICES:
        for values in choice.values(started, planner.setting):
            changed = override(started, values)
            if refusal_of(started, changed) is None:
                own = plan(changed, architecture=LLAMA_8B, hardware=CARD, devices=TWO)
                assert planner(changed).to_json() == own.to_json()


def test_every_searched_path_is_known_and_chosen() -> None:
    paths = {path for choice in CHOICES if choice.searched for path in choice.paths}
    assert {*ALWAYS, *itertools.chain(*ALLOWED.values())} == paths | {KEEP, RESIDENT}


def test_the_text_says_what_was_chosen() -> None:
    found = find(
        read("qlora", "max_length=2048", "place.kind=single"), LLAMA_8B, device=24, host=64
    )
    first, *rest = fit_text.lines(found)
    assert first.startswith("fit chose train.keep_blocks=")
    assert any("within 24.00 GiB of a card and 64.00 GiB of the host" in line for line in rest)
    assert "left as given: place.kind" in rest
    told = fit_text.to_json(found)
    assert told["plan"]["device_bytes"] == found.plan.device_bytes
    assert {"tokens_per_s", "why_not", "free"} <= set(told["neighbours"][0])
    assert load_recipe(None, base=told["recipe"]) == load_recipe(
        None, base=__import__("yaml").safe_load(dump_recipe(found.recipe))
    )
