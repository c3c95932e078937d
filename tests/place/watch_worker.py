"""One process of a run that goes wrong: argument 1 says how, 2 (cpu, cuda) on what."""

from __future__ import annotations

import os
import sys
import time

import torch

from nibble.errors import NibbleError, TrainingError
from nibble.place import Group, watch
from nibble.spec.config import Place

watch.SILENT_S, watch.GRACE_S = 5.0, 2.0


def main(how: str, device: str) -> None:
    # Messages between GPUs end by the watch here, or by NCCL's own clock.
    timeout_s = 60 if (how, device) == ("vanishes", "cuda") else 4
    with Group.from_environment(Place(device=device, timeout_s=timeout_s)) as group:
        group.barrier("the start")
        held = torch.ones(1 << 20, device=group.device)
        group.sum_([held], "a first sum")
        if device == "cuda":
            torch.cuda.synchronize()
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
            if device == "cuda":
                # The sum is only launched: it is the host that waits, for ever.
                group.sum_([held], "a sum")
                torch.cuda.synchronize()
            group.barrier("a sum")


if __name__ == "__main__":
    began = time.monotonic()
    try:
        main(sys.argv[1], sys.argv[2])
    except NibbleError as error:
        print(f"{type(error).__name__}: {error} after {time.monotonic() - began:.0f} s")
        # A process that is late must not be waited for.
        os._exit(1)
