"""What is measured of each step, read from the device only when somebody looks.

A loss is a tensor that the device may not have computed yet; reading it makes the host wait and the
device idle. So steps are collected as tensors and turned into numbers together, at each logged
step. Between two readings the wall time is shared evenly, which is exact for their sum. Tokens are
those that are not padding, of all processes; memory is that of the process that has most.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nibble.errors import TrainingError
from nibble.place.base import Placement, peak_memory
from nibble.spec.units import GIB

Metrics = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One step as it left the device: mean loss and gradient norm are scalars that may not be
    computed yet.
    """

    step: int
    epoch: float
    loss: Tensor
    grad_norm: Tensor
    learning_rate: float
    num_targets: int
    num_tokens: int
    loss_scale: float | None
    skipped: bool


class Meter:
    """Collects steps and turns them into numbers."""

    def __init__(self, place: Placement) -> None:
        self._place = place
        self._pending: list[StepResult] = []
        self._busy_s = 0.0
        self._since: float | None = None

    def start(self) -> None:
        """The clock of a step runs from here."""
        self._since = time.perf_counter()

    def stop(self, result: StepResult) -> None:
        """The step is done, as far as the host knows."""
        assert self._since is not None, "start() comes first"
        self._pending.append(result)
        self._busy_s += time.perf_counter() - self._since
        self._since = None

    def read(self) -> list[Metrics]:
        """Numbers of all steps since the last reading.

        Raises TrainingError naming the first step whose loss or gradient is not finite (a step that
        fp16 skipped has no gradient to speak of).
        """
        if not self._pending:
            return []
        began = time.perf_counter()
        pairs = torch.stack(
            [v.float() for r in self._pending for v in (r.loss, r.grad_norm.to(r.loss.device))]
        )
        values = pairs.view(-1, 2).tolist()
        self._busy_s += time.perf_counter() - began
        step_s = self._busy_s / len(self._pending)
        memory = peak_memory(self._place)
        peak = memory.reserved_bytes or memory.host_bytes
        found = []
        for result, (loss, norm) in zip(self._pending, values, strict=True):
            _require_finite(result, loss, norm)
            found.append(_numbers(result, loss, norm, step_s=step_s, peak_gib=peak / GIB))
        self._pending, self._busy_s = [], 0.0
        return found


def _require_finite(result: StepResult, loss: float, norm: float) -> None:
    if math.isfinite(loss) and (math.isfinite(norm) or result.skipped):
        return
    what = "loss" if not math.isfinite(loss) else "gradient norm"
    value = loss if not math.isfinite(loss) else norm
    raise TrainingError(f"{what} of step {result.step} is {value}")


def _numbers(
    result: StepResult, loss: float, norm: float, *, step_s: float, peak_gib: float
) -> Metrics:
    found: dict[str, Any] = {
        "step": result.step,
        "epoch": round(result.epoch, 6),
        "loss": loss,
        "learning_rate": result.learning_rate,
        "grad_norm": norm if math.isfinite(norm) else None,
        "tokens_per_s": result.num_tokens / step_s if step_s > 0 else 0.0,
        "num_targets": result.num_targets,
        "num_tokens": result.num_tokens,
        "step_s": step_s,
        "peak_gib": peak_gib,
    }
    if result.loss_scale is not None:
        found["loss_scale"] = result.loss_scale
        found["skipped"] = int(result.skipped)
    return {name: value for name, value in found.items() if value is not None}
