"""On a GPU copies run beside the computation: late ones and slow kernels must change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_streamed import filled, run, same

from nibble.place import placement
from nibble.place.group import Group
from nibble.place.ring import copy_
from nibble.place.stream import Stream
from nibble.spec.config import Place

pytestmark = [
    pytest.mark.gpu,
    # Kernels that cannot do what is asked for here say so by a warning.
    pytest.mark.filterwarnings("ignore:.*determinis"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
LATE_CYCLES = 2_000_000
"""About a millisecond, many times what a tiny block computes."""


def late(target: torch.Tensor, source: torch.Tensor) -> None:
    """A copy that comes long after it was asked for, in two halves."""
    middle = source.numel() // 2
    torch.cuda._sleep(LATE_CYCLES)
    copy_(target[:middle], source[:middle])
    torch.cuda._sleep(LATE_CYCLES)
    copy_(target[middle:], source[middle:])


def linger(model: Any) -> None:
    """Let each block's last linear come long after the host has gone on."""
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda *_: torch.cuda._sleep(LATE_CYCLES))


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize(
    ("quant", "adapter"), [("nf4", "lora"), ("nf4", "dora"), ("none", "lora"), ("int8", "lora")]
)
def test_late_copies_and_slow_kernels_change_nothing(quant: str, adapter: str, policy: str) -> None:
    device = torch.device("cuda", 0)
    words = {"quant": quant, "adapter": adapter, "policy": policy}
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        single = placement(Place(kind="single", device="cuda"), Group.alone(device))
        expected = run(single, filled(single, **words), accumulation=2)
        for resident, poison, slow in ((0, True, False), (0, False, True), (2, True, True)):
            words_of_place = Place(
                kind="stream", device="cuda", ring_blocks=2, resident_blocks=resident
            )
            place = Stream(words_of_place, Group.alone(device))
            place.poison = poison
            if slow:
                place.copy = late
            model = filled(place, **words)
            if slow:
                linger(model)
            assert place.host is not None and place.pinned_s > 0
            same(run(place, model, accumulation=2), expected)
            place.close()
    finally:
        torch.use_deterministic_algorithms(False)
