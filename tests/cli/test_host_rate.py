"""What a launch costs the host: steps of a real small model over the plan's count of launches."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nibble.cli import host_rate
from nibble.cli.host_rate import planned_launches, recipe, seconds_per_launch
from nibble.spec import counting

NUM_LAYERS, NUM_MATRICES, NUM_VECTORS = 6, 6 * 7 + 2, 6 * 2 + 1
"""Of builtin:llama-35m: seven linears and two norms a block; embedding, last norm, head."""


def test_launches_are_what_counting_says_of_the_small_model(tmp_path: Path) -> None:
    made = recipe(tmp_path, device="cpu", precision="bf16", steps=4)
    blocks = counting.HOST_FUSED * NUM_LAYERS
    forward = blocks + counting.HOST_PASS
    backward = counting.HOST_BACKWARD * blocks
    backward += counting.HOST_MATRIX * NUM_MATRICES + counting.HOST_VECTOR * NUM_VECTORS
    update = counting.HOST_STEP + counting.HOST_UPDATE * (NUM_MATRICES + NUM_VECTORS)
    assert planned_launches(made) == pytest.approx(forward + backward + update)


def test_the_median_of_the_later_steps_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(made: Any, *, stream: object) -> SimpleNamespace:
        folder = Path(made.output_dir)
        folder.mkdir(parents=True)
        times = [9.0, 9.0, 9.0, 9.0, 2.0, 1.0, 2.0, 70.0]  # compiled in the first, disturbed once
        lines = [json.dumps({"step": i, "step_s": t}) for i, t in enumerate(times)]
        (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"eval_loss": 1.0}']))
        return SimpleNamespace(outcome=SimpleNamespace(interrupted=False))

    monkeypatch.setattr(host_rate, "train", train)
    monkeypatch.setattr(host_rate, "planned_launches", lambda made: 1000.0)
    assert seconds_per_launch("cpu", precision="bf16", steps=8) == pytest.approx(2e-3)


def test_ctrl_c_is_not_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = SimpleNamespace(outcome=SimpleNamespace(interrupted=True))
    monkeypatch.setattr(host_rate, "train", lambda made, stream: stopped)
    with pytest.raises(KeyboardInterrupt):
        seconds_per_launch("cpu", precision="bf16", steps=8)


def test_real_steps_are_made_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(host_rate, "MODEL", "builtin:llama-9m")
    assert 1e-7 < seconds_per_launch("cpu", precision="fp32", steps=3) < 1.0
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith("nibble")]
    assert left == [] and capsys.readouterr().out == ""
