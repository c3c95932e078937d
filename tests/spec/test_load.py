"""Files, built-in names and command lines become one checked recipe, or one line why not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nibble.errors import ConfigError
from nibble.spec.config import Recipe
from nibble.spec.load import dump_recipe, load_recipe, parse_overrides, recipe_dict

MODEL = ["model.path=m"]


def refusal(*overrides: str, path: str | Path | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        load_recipe(path, [*MODEL, *overrides])
    text = str(error.value)
    assert "\n" not in text
    return text


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    "given",
    [
        ["learning_rate=1e-4"],
        ["--learning_rate", "1e-4"],
        ["--learning-rate=1e-4"],
        ["--optim.learning_rate", "0.0001"],
        ["optim.learning_rate=1E-4"],
        ["lr=2e-3", "lr=1e-4"],
    ],
)
def test_override_forms(given: list[str]) -> None:
    assert load_recipe(None, [*MODEL, *given]).optim.learning_rate == 1e-4


def test_override_values_are_yaml() -> None:
    given = ["--packing", "--optim.betas=[0.9, 0.95]", "adapter.kind=lora"]
    given += ["targets=q_proj,v_proj", "--max_grad_norm", "null"]
    recipe = load_recipe(None, [*MODEL, *given, "data.train=[a.jsonl, {path: b.csv}]"])
    assert recipe.data.packing is True
    assert recipe.optim.betas == (0.9, 0.95)
    assert recipe.adapter.targets == ("q_proj", "v_proj")
    assert recipe.optim.max_grad_norm is None
    assert [source.path for source in recipe.data.train] == ["a.jsonl", "b.csv"]


def test_a_number_stays_text_where_text_is_meant() -> None:
    given = [*MODEL, "report.sinks=[wandb]", "run_name=007", "model_revision=1e5"]
    recipe = load_recipe(None, given)
    assert (recipe.report.run_name, recipe.model.revision) == ("007", "1e5")


def test_a_flag_before_an_assignment_is_true() -> None:
    values, _ = parse_overrides(["--packing", "seed=3", "--shuffle", "false", "--x"])
    assert values == {"packing": True, "seed": 3, "shuffle": False, "x": True}


def test_yaml_scalars_are_what_they_look_like(tmp_path: Path) -> None:
    text = "model: {path: 010}\nlearning_rate: 1e-4\neps: 1.5e-8\nseed: 1_000\nshuffle: no\n"
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.model.path == "010"
    assert (recipe.optim.learning_rate, recipe.optim.eps) == (1e-4, 1.5e-8)
    assert (recipe.train.seed, recipe.data.shuffle) == (1000, False)


@pytest.mark.parametrize(
    "text, parts",
    [
        ("", ["is empty"]),
        ("# only a comment\n", ["is empty"]),
        ("- a\n", ["list", "key: value"]),
        ("model: [1\n", ["line 2"]),
        ("seed: 1\nmodel:\n  path: a\n  path: b\n", ["line 4, column 3", "'path' appears twice"]),
        ("seed: 1\n2: 3\n", ["key 2 is not text"]),
        ("a: b: c\n", ["line 1, column 5"]),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, parts: list[str]) -> None:
    file = write(tmp_path, text)
    message = refusal(path=file)
    assert str(file) in message
    assert all(part in message for part in parts), message


def test_a_file_that_is_not_there() -> None:
    assert "did you mean qlora" in refusal(path="qlroa")
    assert "neither a file nor a built-in recipe" in refusal(path="no/such.yaml")


def test_a_run_folder_stands_for_its_recipe(tmp_path: Path) -> None:
    write(tmp_path, "model: {path: m}\nseed: 7\n")
    assert load_recipe(tmp_path).train.seed == 7
    (tmp_path / "empty").mkdir()
    assert "folder without recipe.yaml" in refusal(path=tmp_path / "empty")


def test_a_file_wins_over_a_built_in_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "qlora").write_text("model: mine\nadapter: lora\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("qlora").model.path == "mine"


@pytest.mark.parametrize(
    "override, parts",
    [
        ("learing_rate=1", ["learing_rate", "did you mean optim.learning_rate"]),
        ("quant.formt=nf4", ["quant.formt", "did you mean quant.format"]),
        ("optim.lr=1", ["optim.lr", "lr (optim.learning_rate)"]),
        ("lora_rnk=1", ["did you mean lora_rank (adapter.rank)"]),
        ("name=x", ["data.train.name", "optim.name", "in full"]),
        ("path=x", ["model.path", "adapter.path"]),
        ("zzzzqq=1", ["zzzzqq: unknown key", "nibble recipes --fields"]),
        ("quant.format=nf5", ["quant.format=nf5", "nf4, fp4, int8", "did you mean nf4?"]),
        ("micro_batch_size=0", ["train.micro_batch_size=0 must be >= 1"]),
        ("dropout=1.0", ["adapter.dropout=1.0 must be < 1"]),
        ("seed=x", ["train.seed=x is not a whole number >= 0"]),
        ("seed=1.5", ["train.seed=1.5"]),
        ("epochs=true", ["train.epochs=true is not a number"]),
        ("learning_rate=.inf", ["optim.learning_rate=inf is not a finite number"]),
        ("packing=maybe", ["data.packing=maybe is not true | false"]),
        ("betas=[0.9]", ["optim.betas"]),
        ("data.train=[{pth: a}]", ["data.train[0].pth: unknown key: did you mean path?"]),
        ("data.train=[3]", ["data.train: 3 is neither a path nor a mapping"]),
        ("data.train={path: a, num_rows: 0}", ["data.train[0].num_rows=0 must be >= 1"]),
        ("stray", ["'stray' is not an override", "key=value"]),
    ],
)
def test_what_cannot_be_meant(override: str, parts: list[str]) -> None:
    message = refusal(override)
    assert all(part in message for part in parts), message


def test_several_mistakes_are_one_line() -> None:
    message = refusal("quant.format=nf5", "micro_batch_size=0", "epochs=true")
    assert message.count("; ") == 2
    assert all(p in message for p in ("quant.format", "train.micro_batch_size", "train.epochs"))


def test_a_missing_model_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^model\.path is missing"):
        load_recipe(None)
    with pytest.raises(ConfigError, match=r"^model\.path is missing"):
        load_recipe(None, ["seed=1", "model.task=causal-lm"])


@pytest.mark.parametrize(
    "text",
    ["train: a.jsonl", "train: [a.jsonl]", "train: {path: a.jsonl}", "train: [{path: a.jsonl}]"],
)
def test_data_given_in_any_shape(tmp_path: Path, text: str) -> None:
    recipe = load_recipe(write(tmp_path, f"model: m\ndata: {{{text}}}\n"))
    assert [source.path for source in recipe.data.train] == ["a.jsonl"]


def test_a_path_over_a_recipes_only_source_keeps_how_it_is_read(tmp_path: Path) -> None:
    text = "model: m\ndata: {train: {path: hub/set, split: train, format: alpaca, num_rows: 9}}\n"
    (source,) = load_recipe(write(tmp_path, text), ["data.train=mine.jsonl"]).data.train
    assert (source.path, source.format, source.num_rows, source.split) == (
        "mine.jsonl",
        "alpaca",
        9,
        None,
    )
    (source,) = load_recipe(write(tmp_path, text), ["data.train=[mine.jsonl]"]).data.train
    assert source.format == "auto"


def test_fields_of_a_source_apply_to_every_source() -> None:
    given = [*MODEL, "data.train.num_rows=5", "data.train=[a.jsonl, b.jsonl]"]
    assert [s.num_rows for s in load_recipe(None, given).data.train] == [5, 5]
    assert "data.train has 2 sources" in refusal("data.train=[a, b]", "data.train.path=c")
    assert "no source to apply it to" in refusal("data.train.split=test")


def test_layers_override_in_order(tmp_path: Path) -> None:
    base = {"model": "low", "train": {"seed": 1, "epochs": 2.0}, "lora_r": 4, "adapter": "lora"}
    file = write(tmp_path, "model: {path: mid}\ntrain: {seed: 2}\n")
    recipe = load_recipe(file, ["seed=3"], base=base)
    assert (recipe.model.path, recipe.train.seed, recipe.train.epochs) == ("mid", 3, 2.0)
    assert recipe.adapter.rank == 4


def test_a_later_choice_drops_what_it_makes_meaningless(tmp_path: Path) -> None:
    file = write(tmp_path, "model: m\nadapter: qlora\nlora_r: 8\nwarmup_ratio: 0.1\nmax_steps: 5\n")
    recipe = load_recipe(file, ["adapter.kind=none", "load_in_4bit=false"])
    assert (recipe.quant.format, recipe.adapter.model_fields_set) == ("none", {"kind"})
    recipe = load_recipe(file, ["warmup_steps=3", "epochs=2"])
    assert (recipe.optim.warmup_steps, recipe.optim.warmup_ratio) == (3, None)
    assert (recipe.train.max_steps, recipe.train.epochs) == (None, 2.0)
    # said in the same breath, it is a contradiction
    assert "adapter.rank=8 has no effect" in refusal("adapter.kind=none", "adapter.rank=8")
    # and what was wrong in the file stays wrong
    wrong = write(tmp_path, "model: m\nadapter: {rank: 8}\n")
    assert "adapter.rank=8 has no effect" in refusal("seed=1", path=wrong)


def test_a_section_may_be_empty_and_a_profile_bare(tmp_path: Path) -> None:
    file = write(tmp_path, "model: m\nadapter:\ntrain:\n  profile: {start_step: 4}\n")
    recipe = load_recipe(file, ["train.profile.memory=false"])
    assert recipe.train.profile is not None
    assert (recipe.train.profile.start_step, recipe.train.profile.memory) == (4, False)
    assert load_recipe(None, [*MODEL, "--profile"]).train.profile is not None


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["adapter=qlora", "data.train=a.jsonl", "run_name=1e-4", "report.sinks=[wandb]"],
        ["quant=hqq", "adapter=expand", "max_steps=3", "train.profile=true", "vram=24GiB"],
        ["task=classification", "optim=sgd", "schedule=constant", "device=cpu"],
        ["data.train={path: b.txt, format: text}", "data.eval=c.txt", "learning_rate=1e-5"],
    ],
)
def test_a_dump_reads_back_equal(tmp_path: Path, overrides: list[str]) -> None:
    recipe = load_recipe(None, [*MODEL, *overrides])
    again = load_recipe(write(tmp_path, dump_recipe(recipe)))
    assert again == recipe
    assert dump_recipe(again) == dump_recipe(recipe)
    assert Recipe.model_validate(recipe_dict(recipe)) == recipe
    json.dumps(recipe_dict(recipe))


def test_a_dump_holds_defaults_and_leaves_out_what_has_no_effect() -> None:
    plain = recipe_dict(load_recipe(None, MODEL))
    assert plain["optim"]["learning_rate"] == 2e-4
    assert "rank" not in plain["adapter"] and "bits" not in plain["quant"]


def test_reading_a_recipe_wakes_nothing_heavy() -> None:
    code = (
        "import sys; from nibble.spec.load import load_recipe\n"
        "load_recipe('qlora', ['model.path=m', 'data.train=d'])\n"
        "print(sorted(set(sys.modules) & {'torch', 'transformers', 'numpy', 'datasets'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
