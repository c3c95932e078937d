"""One of two processes that share one base; started by test_stream_processes.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from test_streamed import filled, run

from nibble.errors import PlacementError
from nibble.launch.leaving import leave
from nibble.place.group import Group
from nibble.place.stream import Stream
from nibble.spec.config import Place

CASES = [
    {"quant": quant, "adapter": adapter, "policy": policy}
    for quant, adapter, policy in (
        ("nf4", "lora", "full"),
        ("nf4", "dora", "none"),
        ("none", "lora", "none"),
    )
]


def main(folder: Path) -> None:
    place = Place(kind="stream", device="cpu", ring_blocks=2, resident_blocks=1, timeout_s=60)
    group = Group.from_environment(place)
    found: list[Any] = []
    for words in CASES:
        stream = Stream(place, group)
        stream.poison = True
        model = filled(stream, **words)
        assert stream.host is not None
        seen = run(stream, model, accumulation=3, share=2)
        found.append(
            {
                "seen": seen,
                "inode": os.fstat(stream.host.handle).st_ino,
                "packed": sorted(stream._packed_here),
                "sent": stream.reducer.num_bytes if stream.reducer is not None else 0,
                "trained": sum(p.nbytes for p in stream.trained(model).values()),
            }
        )
        stream.close()
    try:
        scarce = place.model_copy(update={"ram": "1GiB"})
        filled(Stream(scarce, group), **CASES[0])
    except PlacementError as error:
        found.append(str(error))
    torch.save(found, folder / f"found-{group.rank}.pt")
    group.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)  # gloo's threads may not see Python end
