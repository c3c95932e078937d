"""ZeRO-2 and ZeRO-3 by the deepspeed library (Rajbhandari et al. 2020, arXiv 1910.02054).

Not there yet: the name is kept so that a recipe that asks for it is answered. deepspeed's engine
owns backward, clipping and the update, averages where we sum, and keeps the optimiser's state in
flat pieces of its own, so it needs three things of a placement that no other does: its own
backward, an optimiser that stands for the engine's, and a way from its pieces to a checkpoint that
another number of processes can read. `fsdp` shards the same things and has all of that.
"""

from __future__ import annotations

from nibble.errors import ConfigError
from nibble.place.group import Group
from nibble.spec.config import Place

INSTEAD = "use place.kind=fsdp, which shards weights, gradients and optimiser state as ZeRO-3 does"


class DeepSpeed:
    """Refuses, with what to do instead."""

    def __init__(self, place: Place, group: Group) -> None:
        del group
        raise ConfigError(
            f"place.kind=deepspeed with place.zero_stage={place.zero_stage} is not supported yet: "
            f"{INSTEAD}"
        )
