"""A card's measured rates: near its row, repeatable, and read again by the plan."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from nibble.cli.host_rate import seconds_per_launch
from nibble.spec.hardware import hardware
from nibble.use.calibrate import calibrate, measure

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_card_is_measured_in_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    start = time.perf_counter()
    done = calibrate("cuda", step=seconds_per_launch)
    assert time.perf_counter() - start < 30
    found = done.rates
    assert found.bandwidth_gbs > 2 * found.bus_gbs
    assert found.matmul_tflops > 2 * found.fp32_tflops
    assert 1 < found.launch_us < 50
    assert (found.link_gbs is None) == (torch.cuda.device_count() < 2)
    assert hardware(torch.cuda.get_device_name(0)) == done.after
    if done.before is not None and "measured" in done.before.source:
        assert done.after.matmul_flops == pytest.approx(done.before.matmul_flops, rel=0.15)
        assert done.after.bandwidth_bytes == pytest.approx(done.before.bandwidth_bytes, rel=0.15)
        assert done.after.bus_bytes == pytest.approx(done.before.bus_bytes, rel=0.25)


def test_two_measurements_agree() -> None:
    first, second = (measure(torch.device("cuda", 0), step=seconds_per_launch) for _ in range(2))
    assert second.matmul_tflops == pytest.approx(first.matmul_tflops, rel=0.05)
    assert second.bandwidth_gbs == pytest.approx(first.bandwidth_gbs, rel=0.05)
    assert second.to_device_gbs == pytest.approx(first.to_device_gbs, rel=0.1)
