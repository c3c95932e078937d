"""A process that waits in a message between GPUs is ended, with a line that says why."""

from __future__ import annotations

import re

import pytest
import torch
from processes import start
from test_watch import WORKER

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.dist,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def test_a_vanished_process_is_missed() -> None:
    """The host cannot be woken while it waits for its GPU: the watch ends the process."""
    first, second = start(WORKER, "vanishes", "cuda", timeout_s=60)
    assert (first[0], second[0]) == (1, 9), first[1]
    line = r"error: rank 1 has not been heard of for 5 s \(rank 0 was at step 3(: a sum)?\)"
    assert re.search(line, first[1]), first[1]


def test_a_late_process_is_not_waited_for_longer_than_asked() -> None:
    """NCCL's own watchdog ends whoever has waited for place.timeout_s, and says so at length."""
    first, second = start(WORKER, "is late", "cuda", timeout_s=60)
    assert first[0] != 0 and second[0] != 0
    assert re.search("timeout|did not come in time", first[1], re.I), first[1][-2000:]
