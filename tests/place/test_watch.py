"""A process that fails, vanishes or is late ends the others with one line that says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from processes import start

WORKER = Path(__file__).with_name("watch_worker.py")


@pytest.mark.dist
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("fails", r"rank 1 ended the run: loss of step 3 is nan: lower optim.learning_rate"),
        ("vanishes", r"another process of the run has gone \(rank 0 was at step 3: a sum\)"),
        ("is late", r"another process of the run did not come in time \(place.timeout_s\) "
                    r"\(rank 0 was at step 3: a sum\)"),
    ],
)  # fmt: skip
def test_the_others_say_what_ended_them(how: str, words: str) -> None:
    first, second = start(WORKER, how, "cpu", timeout_s=60)
    assert first[0] == 1 and second[0] == {"fails": 1, "vanishes": 9, "is late": 1}[how]
    line = first[1].strip().splitlines()[-1]
    assert re.search(rf"^PeerError: .*{words}", line), first[1]
    took = re.search(r"after (\d+) s", line)
    assert took is not None and int(took[1]) < 30
    if how == "fails":
        assert "TrainingError: loss of step 3" in second[1]
