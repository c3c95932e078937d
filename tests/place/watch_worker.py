"""One process of a run that goes wrong: argument 1 says how."""

from __future__ import annotations

import os
import sys
import time

from nibble.errors import NibbleError, TrainingError
from nibble.place import Group
from nibble.spec.config import Place


def main(how: str) -> None:
    with Group.from_environment(Place(device="cpu", timeout_s=4)) as group:
        group.barrier("the start")
        if group.rank == 1:
            if how == "fails":
                raise TrainingError("loss of step 3 is nan: lower optim.learning_rate")
            if how == "vanishes":
                os._exit(9)
            if how == "is late":
                time.sleep(6)
                return
        with group.during("step 3"):
            if how == "fails":
                # Waits for a turn that never comes, however long that would take.
                group.first_does("a file", lambda: time.sleep(0.2))
            group.barrier("a sum")


if __name__ == "__main__":
    began = time.monotonic()
    try:
        main(sys.argv[1])
    except NibbleError as error:
        print(f"{type(error).__name__}: {error} after {time.monotonic() - began:.0f} s")
        # A process that is late must not be waited for.
        os._exit(1)
