"""The table of cards and the user's rows."""

from __future__ import annotations

import datetime
import tomllib
from pathlib import Path

import pytest

from nibble.errors import ConfigError
from nibble.spec import hardware as module
from nibble.spec.hardware import hardware, known
from nibble.spec.units import GIB, parse_bytes, show_bytes


@pytest.fixture(autouse=True)
def no_user_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "nibble" / "hardware.toml"


def test_every_row_has_its_source_and_date_and_no_name_twice() -> None:
    rows = tomllib.loads((Path(module.__file__).parent / "hardware.toml").read_text())
    assert set(rows) == set(known())
    names: dict[str, str] = {}
    for key, row in rows.items():
        assert row["source"] and isinstance(row["date"], datetime.date), key
        for name in (key, *row["names"]):
            assert names.setdefault(module.plain_name(name), key) == key
    for wanted in ("rtx3090", "rtx4090", "rtx5090", "rtx4060ti-16gb", "rtx3060", "a10g", "a10"):
        assert wanted in rows
    for wanted in ("a100-40gb", "a100-80gb", "l4", "l40s", "h100", "h200", "t4", "v100-16gb"):
        assert wanted in rows


def test_rates_are_physically_possible() -> None:
    """Guards against a slipped digit: FLOPs a byte and watts of real cards lie in narrow bands."""
    for name, card in known().items():
        assert 40 < card.matmul_flops / card.bandwidth_bytes < 400, name
        assert 60 <= card.power_w <= 1200, name
        assert 15e9 < card.bus_bytes < 70e9, name
        assert 8 * GIB < card.memory_bytes < 300 * GIB, name


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ("rtx4090", "rtx4090"),
        ("RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-16GB", "v100-16gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A10G", "a10g"),
    ],
)
def test_names_as_typed_and_as_the_driver_says(given: str, key: str) -> None:
    assert hardware(given).name == key


def test_the_measured_card() -> None:
    card = hardware("h200")
    assert card.matmul_flops == 664e12
    assert card.bus_bytes == 55.4e9
    assert "measured" in card.source and card.date == "2026-11-22"


def test_an_unknown_card_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown card 'rtx4091'; nearest: rtx4090"):
        hardware("rtx4091")
    with pytest.raises(ConfigError, match="known: rtx3060"):
        hardware("zzzzzz")


def test_the_users_rows_win_key_by_key(no_user_file: Path) -> None:
    no_user_file.parent.mkdir()
    no_user_file.write_text(
        '["RTX 4090"]\nprice_usd_hour = 0.11\nsustained_tflops = 150\n'
        "[mycard]\nmemory_gib = 20\nmatmul_tflops = 100\nbandwidth_gbs = 500\n"
        "bus_gbs = 12\npower_w = 200\n"
    )
    card = hardware("rtx4090")
    assert (card.price_usd_hour, card.matmul_flops) == (0.11, 150e12)
    assert card.memory_bytes == int(23.99 * GIB)
    assert hardware("my card").matmul_flops == 100e12 * module.SUSTAINED_SHARE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[x", "not TOML"),
        ("[rtx4090]\ncolour = 1\n", "unknown key colour"),
        ("[rtx4090]\npower_w = -1\n", r"power_w=-1 must be a number above 0"),
        ("[other]\npower_w = 100\n", r"memory_gib=None must be"),
        ("rtx4090 = 3\n", "not a table"),
    ],
)
def test_a_wrong_user_file_is_named(no_user_file: Path, text: str, message: str) -> None:
    no_user_file.parent.mkdir()
    no_user_file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        hardware("rtx4090")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("24GiB", 24 * GIB),
        ("24 gib", 24 * GIB),
        ("24G", 24 * GIB),
        ("23.5GB", 23_500_000_000),
        ("512MiB", 512 * 2**20),
        ("1073741824", GIB),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-3GiB", "0GiB", "24 bananas", "1e3GiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match=r"place\.vram=.* is not a size"):
        parse_bytes(text)


def test_sizes_are_shown_as_they_are_read() -> None:
    assert show_bytes(24 * GIB) == "24.00 GiB"
    assert parse_bytes(show_bytes(3.5 * 2**20)) == 3.5 * 2**20
    assert show_bytes(12) == "12 B"
