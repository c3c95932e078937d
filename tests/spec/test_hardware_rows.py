"""The user's file is changed as a person would change it, or not at all."""

from __future__ import annotations

import datetime
import tomllib

import pytest

from nibble.errors import ConfigError
from nibble.spec.hardware_rows import changed

FILE = """# my cards

["RTX 4090"]  # the one under the desk
price_usd_hour = 0.11  # what the neighbour pays
bus_gbs=13   # a riser
# the end of it

# another
[mycard]
names = ["a # b"]
power_w = 200
"""
TODAY = datetime.date(2026, 11, 23)


def test_lines_change_in_place_and_comments_stay() -> None:
    made = changed(FILE, "rtx4090", {"bus_gbs": 25.5, "launch_us": 9.5, "date": TODAY})
    assert made == FILE.replace("bus_gbs=13   # a riser", "bus_gbs=25.5  # a riser").replace(
        "# the end of it", "launch_us = 9.5\ndate = 2026-11-23\n# the end of it"
    )


def test_a_new_table_goes_to_the_end() -> None:
    made = changed(FILE, "h200", {"source": 'a "quoted" \\ word', "names": ["NVIDIA H200"]})
    assert made.startswith(FILE)
    rows = tomllib.loads(made)
    assert rows["h200"] == {"source": 'a "quoted" \\ word', "names": ["NVIDIA H200"]}
    assert changed("", "h200", {"bus_gbs": 1.0}) == "[h200]\nbus_gbs = 1.0\n"


def test_the_second_time_changes_nothing_else() -> None:
    values = {"bus_gbs": 25.5, "date": TODAY}
    once = changed(FILE, "rtx4090", values)
    assert changed(once, "rtx4090", values) == once


def test_an_empty_table_and_one_without_a_last_newline() -> None:
    assert changed("[cpu]", "cpu", {"bus_gbs": 2.0}) == "[cpu]\nbus_gbs = 2.0\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[x", "not TOML"),
        ("h200.bus_gbs = 3\n", "cannot be changed line by line; write there bus_gbs = 2.5"),
        ('[h200]\nbus_gbs = """\n3"""\n', "cannot be changed line by line"),
    ],
)
def test_what_cannot_be_changed_is_said(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(text, "h200", {"bus_gbs": 2.5})
