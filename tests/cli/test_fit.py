"""`nibble plan --fit`: from a model and a card to a recipe, in a second, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Nibble

from nibble.cli import planning
from nibble.spec.load import load_recipe

LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "llama-8b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return "llama-8b"


def test_a_recipe_is_written_that_plans_to_the_same_numbers(model: str, nibble: Nibble) -> None:
    words = ("--gpu", "rtx4090", "--gpus", "2", "--ram", "64GiB", "--model", model)
    done = nibble("plan", "--fit", *words, "--tokens", "2048")
    assert done.code == 0, done.err
    assert "fit chose " in done.out and "as fast" in done.out and "over" in done.out
    assert "go on with: nibble train fitted.yaml data.train=FILE" in done.out
    written = load_recipe("fitted.yaml")
    assert written.fit is None and written.place.num_devices == 2
    assert written.place.ram == "64GiB" and written.data.max_length == 2048
    again = json.loads(nibble("plan", "fitted.yaml", "--gpu", "rtx4090", "--json").out)
    assert again["devices_per_machine"] == 2 and again["fits"] is True
    told = json.loads(nibble("plan", "--fit", *words, "--tokens", "2048", "--json").out)
    assert told["written"] == "fitted.yaml", "a file of its own is written over"
    same = ("device_bytes", "host_bytes", "tokens_per_step", "speed", "phases", "placement")
    assert {key: told["plan"][key] for key in same} == {key: again[key] for key in same}
    assert told["started"]["tokens_per_s"] < told["plan"]["speed"]["tokens_per_s"]
    # The recipe word alone plans the same and writes nothing.
    shown = nibble("plan", "qlora", f"model.path={model}", "max_length=2048", "fit=auto", "--json",
                   "--gpu", "rtx4090", "--gpus", "2", "ram=64GiB")  # fmt: skip
    alone = json.loads(shown.out)
    assert alone["chosen"] == told["chosen"] and alone["written"] is None


def test_methods_are_built_in_recipes(model: str, nibble: Nibble) -> None:
    words = ("plan", "--fit", "--gpu", "h200", "--model", model, "--json", "--out", "x.yaml")
    done = nibble(*words, "--method", "full", "fit.allow=[optimizer,method]")
    assert done.code == 0, done.err
    assert load_recipe("x.yaml").adapter.kind == "none"
    assert json.loads(done.out)["plan"]["fits"]


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (("--gpu", "rtx4099"), "unknown card 'rtx4099'; nearest: rtx4090"),
        (("--gpu", "rtx4090", "vram=80GiB"), "place.vram=80GiB is more than rtx4090 has"),
        (("--gpu", "rtx3060", "vram=2GiB"), "nothing fits into 2."),
        (("--gpu", "rtx4090", "--ram", "lots"), "place.ram='lots' is not a size"),
        (("--gpu", "rtx4090", "--method", "qlor"), "--method qlor is no built-in recipe: qlora"),
        (("--gpu", "rtx4090", "--out", "mine.yaml"), "mine.yaml exists and was not written by"),
        (("--gpu", "rtx4090", "fit.batch_rows=8", "micro_batch_size=3"), "does not divide"),
        (("lora", "--gpu", "h100", "--method", "full"), "give one of them"),
        (("--ram", "1000TiB", "place.device=cpu"), "place.ram=1000TiB is more than is free here"),
    ],
)
def test_wrong_words_are_one_line(
    model: str, nibble: Nibble, words: tuple[str, ...], answer: str
) -> None:
    Path("mine.yaml").write_text("model: {path: mine}\n")
    done = nibble("plan", "--fit", "--model", model, *words)
    assert done.code in (1, 2) and answer in done.err and done.err.count("\n") == 1, done.err
    assert Path("mine.yaml").read_text() == "model: {path: mine}\n"
    assert not Path("fitted.yaml").exists()


def test_a_model_that_is_none_is_one_line(model: str, nibble: Nibble) -> None:
    Path("empty").mkdir()
    for name, answer in (("empty", "no config.json"), ("nowhere/at/all", "no such folder")):
        done = nibble("plan", "--fit", "--gpu", "rtx4090", "--model", name)
        assert done.code == 1 and answer in done.err and done.err.count("\n") == 1


def test_it_takes_a_second_and_no_torch(model: str) -> None:
    words = ["plan", "--fit", "--gpu", "rtx4090", "--gpus", "2", "--ram", "64GiB",
             "--model", model, "--tokens", "2048"]  # fmt: skip
    code = (
        "import sys; from nibble.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules); "
        "sys.exit(f'{heavy}' if heavy else code)"
    )
    begin = time.process_time(), time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Other programs may be running beside the tests; a plan alone takes about 0.7 s.
    assert time.perf_counter() - begin[1] < 10


def test_of_unequal_cards_the_least_is_planned_for_and_named(
    model: str, nibble: Nibble, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = ["NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 3060", "NVIDIA GeForce RTX 4090"]
    monkeypatch.setattr(planning, "card_names", lambda: cards)
    words = ("plan", "qlora", f"model.path={model}", "train.max_tokens=1000000")
    told = nibble(*words)
    assert told.code == 0, told.err
    assert "3 x rtx3060" in told.out
    line = " ".join(told.out.split())
    assert "rtx3060 (12.00 GiB) limits all 3 GPUs, of which the largest is rtx4090" in line
    assert json.loads(nibble(*words, "--json").out)["hardware"] == "rtx3060"
    # Cards that the run does not use limit nothing.
    alone = nibble(*words, "place.kind=single")
    assert "rtx4090" in alone.out and "limits" not in alone.out
    second = nibble(*words, "place.kind=single", "place.device=cuda:1")
    assert "rtx3060" in second.out and "limits" not in second.out
