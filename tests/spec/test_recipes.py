"""The recipes that come with nibble are whole, and the reference lists every setting."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nibble.errors import ConfigError
from nibble.spec import recipes
from nibble.spec.config import Recipe, Section
from nibble.spec.load import dump_recipe, load_recipe

# name -> format, adapter, optimiser, task, and what the user must still give
SHIPPED: dict[str, tuple[str, str, str, str, list[str]]] = {
    "qlora": ("nf4", "lora", "adamw", "causal-lm", ["model.path=m", "data.train=a"]),
    "lora": ("none", "lora", "adamw", "causal-lm", ["model.path=m", "data.train=a"]),
    "dora": ("nf4", "dora", "adamw", "causal-lm", ["model.path=m", "data.train=a"]),
    "int8-lora": ("int8", "lora", "adafactor", "causal-lm", ["data.train=a"]),
    "hqq-lora": ("hqq", "lora", "adamw", "causal-lm", ["model.path=m", "data.train=a"]),
    "full": ("none", "none", "adamw8bit", "causal-lm", ["model.path=m", "data.train=a"]),
    "galore": ("none", "none", "adamw", "causal-lm", ["model.path=m", "data.train=a"]),
    "pretrain": ("none", "none", "adamw", "causal-lm", ["data.train=a"]),
    "pretrain-c4": ("none", "none", "adamw", "causal-lm", []),
    "llama-pro": ("nf4", "expand", "adamw", "causal-lm", ["model.path=m", "data.train=a"]),
    "dialogsum-smollm2": ("none", "lora", "adamw", "causal-lm", ["data.train=a", "data.eval=b"]),
    "glue-cola": ("none", "none", "adamw", "classification", ["data.train=a", "data.eval=b"]),
    "glue-sst2": ("none", "none", "adamw", "classification", ["data.train=a", "data.eval=b"]),
    "glue-stsb": ("none", "none", "adamw", "classification", ["data.train=a", "data.eval=b"]),
    "glue-mrpc": ("none", "none", "adamw", "classification", ["data.train=a", "data.eval=b"]),
    "glue-rte": ("none", "none", "adamw", "classification", ["data.train=a", "data.eval=b"]),
}


def test_the_covered_recipes_are_all_recipes() -> None:
    assert recipes.names() == sorted(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_is_what_it_says(name: str, tmp_path: Path) -> None:
    store, kind, optimizer, task, needed = SHIPPED[name]
    recipe = load_recipe(name, needed)
    assert (recipe.quant.format, recipe.adapter.kind) == (store, kind)
    assert (recipe.optim.name, recipe.model.task) == (optimizer, task)
    assert recipe.output_dir == f"runs/{name}"
    if name == "pretrain-c4":
        assert [source.path for source in recipe.data.train] == ["allenai/c4"]
    else:
        assert [source.path for source in recipe.data.train] == ["a"]
    file = tmp_path / "again.yaml"
    file.write_text(dump_recipe(recipe))
    assert load_recipe(file) == recipe


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_begins_with_what_it_is_for(name: str) -> None:
    text = recipes.text(name)
    comment = [line for line in text.splitlines() if line.startswith("#")]
    assert text.startswith("# ") and len(comment) >= 3
    command = [line for line in comment if line.startswith(f"# nibble train {name} ")]
    assert len(command) == 1
    given = {word.partition("=")[0] for word in command[0].split() if "=" in word}
    assert {word.partition("=")[0] for word in SHIPPED[name][4]} <= given
    assert len(recipes.summary(name)) < 160 and recipes.summary(name).endswith(".")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_uses_nibbles_own_words(name: str) -> None:
    raw = yaml.safe_load(recipes.text(name))
    assert set(raw) <= set(Recipe.model_fields)
    for section, values in raw.items():
        if isinstance(values, dict):
            model = Recipe.model_fields[section].annotation
            assert isinstance(model, type) and issubclass(model, Section)
            assert set(values) <= set(model.model_fields)


def test_what_only_the_user_knows_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"model\.path is missing"):
        load_recipe("qlora")
    with pytest.raises(ConfigError, match=r"data\.train\[0\]\.path is missing"):
        load_recipe("glue-rte", ["data.eval=b"])
    with pytest.raises(ConfigError, match=r"not built in: one of .*qlora"):
        recipes.text("nope")


def test_a_recipes_reading_of_rows_survives_the_users_path() -> None:
    recipe = load_recipe("dialogsum-smollm2", ["data.train=a.jsonl", "data.eval=b.jsonl"])
    for source in (*recipe.data.train, *recipe.data.eval):
        assert source.template == "Summarize the chat dialogue:\n{dialogue}\n---\nSummary:\n"
        assert (source.format, source.columns) == ("prompt-completion", {"completion": "summary"})


def test_glue_sets_are_read_as_glue_writes_them() -> None:
    need = ["data.train=a", "data.eval=b"]
    cola = load_recipe("glue-cola", need)
    for source in (*cola.data.train, *cola.data.eval):
        assert source.columns == {"text": "3", "label": "1"}
    labels = {name: load_recipe(name, need).model.num_labels for name in SHIPPED if "glue" in name}
    assert labels == {
        "glue-cola": 2,
        "glue-mrpc": 2,
        "glue-rte": 2,
        "glue-sst2": 2,
        "glue-stsb": 1,
    }


def test_the_bloomz_walk_through() -> None:
    recipe = load_recipe("int8-lora", ["data.train=a.jsonl"])
    adapter = recipe.adapter
    assert (adapter.rank, adapter.alpha, adapter.dropout) == (8, 32.0, 0.05)
    assert adapter.targets == ("query_key_value",)
    assert (recipe.optim.learning_rate, recipe.train.epochs, recipe.data.max_length) == (
        2e-4,
        3.0,
        1536,
    )


def test_the_reference_lists_every_setting_once_with_its_text() -> None:
    rows = recipes.fields()
    paths = [row.path for row in rows]
    assert len(paths) == len(set(paths))
    assert all(row.doc and "\n" not in row.doc and row.type_text for row in rows)
    by_path = {row.path: row for row in rows}
    assert by_path["model.path"].default == "required"
    assert by_path["quant.format"].type_text == "none | nf4 | fp4 | int8 | hqq | ternary"
    assert by_path["quant.block"].type_text == "whole number >= 16 or null"
    assert by_path["optim.betas"].default == (0.9, 0.999)
    assert by_path["data.train[].path"].default == "required"
    assert by_path["train.profile.num_steps"].default == 2


def test_every_field_of_every_model_is_in_the_reference() -> None:
    leaves = {row.path.rpartition(".")[2] for row in recipes.fields()}
    for model in Section.__subclasses__():
        if model is not Recipe:
            assert set(model.model_fields) <= leaves, model.__name__
