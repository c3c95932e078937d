"""Measuring a machine: rates agree with what was done, and the user's file keeps the rest."""

from __future__ import annotations

import datetime
import time
import tomllib
from pathlib import Path

import pytest
import torch

import nibble.use.calibrate as calibration
from nibble.errors import ConfigError
from nibble.spec.hardware import hardware, user_file
from nibble.use.calibrate import SOURCE, Rates, Sizes, calibrate, measure, write

SMALL = Sizes(
    tokens=64,
    hidden=128,
    ffn=256,
    copy_bytes=1 << 20,
    pinned_bytes=1 << 20,
    num_operations=500,
    seconds=0.05,
)
CPU = torch.device("cpu")


def no_step(device: str, *, precision: str, steps: int) -> float:
    raise AssertionError("a processor's launch is an operation")


@pytest.fixture(autouse=True)
def own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "nibble" / "hardware.toml"


def test_rates_are_what_was_done_over_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_seconds", lambda action, device, sizes: 0.5)
    rates = measure(CPU, step=no_step, sizes=SMALL)
    products = 2 * 64 * (128 * 128 + 2 * 128 * 256)
    assert rates.matmul_tflops == pytest.approx(products / 0.5 / 1e12)
    assert rates.fp32_tflops == pytest.approx(2 * 64 * 128 * 128 / 0.5 / 1e12)
    assert rates.bandwidth_gbs == pytest.approx(2 * (1 << 20) / 0.5 / 1e9)  # read and written
    assert rates.bus_gbs == rates.bandwidth_gbs and rates.link_gbs is None
    assert 0.05 < rates.launch_us < 1000


def test_seconds_are_those_of_one_action() -> None:
    taken = calibration._seconds(lambda: time.sleep(0.005), CPU, SMALL)
    assert 0.005 <= taken < 0.1


def test_the_processors_row_is_written_and_read(own_file: Path) -> None:
    done = calibrate("cpu", step=no_step, sizes=SMALL)
    assert done.before is None and done.key == "cpu" and done.file == own_file
    row = tomllib.loads(own_file.read_text())["cpu"]
    assert row["source"] == SOURCE and row["date"] == datetime.date.today()
    card = hardware("cpu")
    assert card == done.after and card.power_w is None
    assert card.matmul_flops == row["sustained_tflops"] * 1e12
    again = calibrate("cpu", step=no_step, sizes=SMALL)
    assert again.before == done.after
    assert list(tomllib.loads(own_file.read_text())) == ["cpu"]


def rates(device: str) -> Rates:
    return Rates(
        device=device,
        memory_gib=23.6,
        matmul_tflops=150.04,
        fp32_tflops=60.0,
        bandwidth_gbs=900.0,
        to_device_gbs=25.3,
        from_device_gbs=24.149,
        link_gbs=None,
        launch_us=5.25,
    )


def test_a_known_card_keeps_what_was_not_measured(own_file: Path) -> None:
    own_file.parent.mkdir()
    own_file.write_text("# mine\n[rtx4090]\nprice_usd_hour = 0.2  # a friend's\n")
    write("rtx4090", rates("NVIDIA GeForce RTX 4090"), is_new=False)
    card = hardware("NVIDIA GeForce RTX 4090")
    assert (card.matmul_flops, card.bus_bytes, card.launch_s) == (150e12, 24.1e9, 5.25e-6)
    assert (card.price_usd_hour, card.power_w, card.source) == (0.2, 450, SOURCE)
    assert own_file.read_text().startswith(
        "# mine\n[rtx4090]\nprice_usd_hour = 0.2  # a friend's\n"
    )


def test_a_card_that_no_table_has_is_found_by_its_drivers_name(own_file: Path) -> None:
    write("new-card-9000", rates("NVIDIA New Card 9000"), is_new=True)
    assert hardware("NVIDIA New Card 9000").memory_bytes == int(23.6 * 2**30)


def test_a_file_that_is_a_link_stays_one(own_file: Path, tmp_path: Path) -> None:
    real = tmp_path / "dotfiles.toml"
    real.write_text("# kept\n")
    own_file.parent.mkdir()
    own_file.symlink_to(real)
    write("rtx4090", rates("x"), is_new=False)
    assert own_file.is_symlink() and "150.0" in real.read_text() and "# kept" in real.read_text()


def test_a_wrong_file_is_named_before_anything_is_measured(own_file: Path) -> None:
    own_file.parent.mkdir()
    own_file.write_text("[x\n")
    before = time.perf_counter()
    with pytest.raises(ConfigError, match="not TOML"):
        calibrate("cpu", step=no_step)
    assert time.perf_counter() - before < 0.5
    assert user_file().read_text() == "[x\n"
