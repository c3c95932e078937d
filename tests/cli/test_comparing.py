"""`nibble plan --compare` and `--calibrate` from the command line."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from conftest import Nibble

import nibble.use.calibrate as calibration
from nibble.spec.compare import METHODS
from nibble.use.calibrate import Sizes

SMALL = Sizes(
    tokens=32,
    hidden=64,
    ffn=64,
    copy_bytes=4096,
    pinned_bytes=4096,
    num_operations=50,
    seconds=0.01,
)
MODEL = ("plan", "--compare", "builtin:llama-60m", "--gpu", "rtx3060", "--tokens", "256")


def test_the_comparison_for_programs(nibble: Nibble) -> None:
    told = nibble(*MODEL, "--gpus", "2", "--ram", "32GiB", "--json", "train.max_tokens=3000000")
    assert told.code == 0, told.err
    values = json.loads(told.out)
    assert (values["hardware"], values["devices"]) == ("rtx3060", 2)
    assert [row["method"] for row in values["rows"]] == [method.key for method in METHODS]
    for row in values["rows"]:
        assert row["fits"] and row["num_tokens"] == 3_000_000
        assert row["hours"] == pytest.approx(3e6 / row["tokens_per_s"] / 3600)
        assert row["recipe"]["data"]["max_length"] == 256
        assert row["usd"] is None  # no rent of this card is known
        assert row["kwh"] == pytest.approx(row["hours"] * 2 * 170 / 1000)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "rtx3061"], "unknown card 'rtx3061'; nearest: rtx3060"),
        (["--ram", "much"], "place.ram='much' is not a size"),
        (["colour=red"], "colour"),
        (["place.vram=24GiB"], "more than the card has"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(nibble: Nibble, words: list[str], message: str) -> None:
    done = nibble(*MODEL, *words)
    assert done.code != 0
    assert message in done.err and done.err.count("\n") == 1


def test_a_model_that_is_not_there(nibble: Nibble) -> None:
    done = nibble("plan", "--compare", "./nowhere", "--gpu", "h200")
    assert done.code == 1 and "no such folder" in done.err


def test_nothing_named_is_a_usage_error(nibble: Nibble) -> None:
    done = nibble("plan", "--gpu", "h200")
    assert done.code == 2 and "--compare MODEL" in done.err + done.out


def test_this_machine_is_measured_and_then_planned_with(
    nibble: Nibble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "ON_CPU", SMALL)
    monkeypatch.setattr(calibration.torch.cuda, "is_available", lambda: False)
    shown = nibble("plan", "--calibrate")
    assert shown.code == 0, shown.err
    assert "not known" in shown.out and "Written as [cpu] to" in shown.out
    told = json.loads(nibble("plan", "--calibrate", "--json").out)
    row = tomllib.loads((tmp_path / "nibble" / "hardware.toml").read_text())["cpu"]
    assert told["after"]["bandwidth_bytes"] == row["bandwidth_gbs"] * 1e9
    words = ("builtin:llama-60m", "place.device=cpu", "model.from_scratch=true")
    planned = nibble("plan", "pretrain", *(f"model.path={w}" if ":" in w else w for w in words))
    assert "tokens/s on cpu" in planned.out, planned.out + planned.err
