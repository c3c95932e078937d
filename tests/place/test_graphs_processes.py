"""Recorded passes and sums over processes: gradients travel after a replay, and nobody minds if
another process did not record."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from processes import start

TRAIN = Path(__file__).parents[1] / "train"


@pytest.mark.dist
def test_two_processes_train_as_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code, output in start(TRAIN / "graphs_worker.py", tmp_path, timeout_s=100):
        assert code == 0, output[-3000:]
    monkeypatch.setattr(sys, "path", [str(TRAIN), *sys.path])
    first, second = (
        torch.load(tmp_path / f"graphs-{rank}.pt", weights_only=False) for rank in range(2)
    )
    assert first["replayed"] > 0 and second["replayed"] == 0
    alone = first["alone"]
    for found in (first["together"], second["together"]):
        assert found.losses == pytest.approx(alone.losses, rel=1e-5)
        assert found.eval_losses == first["together"].eval_losses
        for mine, theirs in zip(found.grads, alone.grads, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    for key, value in first["together"].weights.items():
        assert torch.equal(value, second["together"].weights[key]), key
