"""A run's plan against the machine it runs on: before, when memory runs out, and afterwards.

The plan is arithmetic on the recipe (spec/plan.py) and knows no machine. Here it is compared with
what the cards of all processes have, since the one with least decides; a run that does not fit is
refused before a byte of weights is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from nibble.errors import ConfigError, PlanError
from nibble.place import Group, resolved
from nibble.place.base import Memory, Placement
from nibble.place.host_memory import available_bytes
from nibble.spec.advice import advise
from nibble.spec.decide import decide_and_say
from nibble.spec.hardware import Hardware, hardware
from nibble.spec.holdings import Devices
from nibble.spec.phases import CUDA_CONTEXT_BYTES
from nibble.spec.plan import Plan, plan
from nibble.spec.units import show_bytes
from nibble.use.assemble import Assembly
from nibble.use.shapes import shapes


def plan_run(
    assembly: Assembly, place: Placement, group: Group, *, note: Callable[[str], None]
) -> Plan | None:
    """The plan, checked against every process's card; None where the planner does not know the
    shape.
    """
    recipe = resolved(assembly.recipe, group)
    local = recipe.model.model_copy(update={"path": str(assembly.built.path), "revision": None})
    try:
        shape = shapes(local)
    except PlanError as error:
        note(f"not planned: {error}")
        return None
    on_cpu = place.device.type == "cpu"
    devices = Devices(
        per_machine=group.local_world, machines=max(1, group.world // group.local_world)
    )
    words = {"hardware": _card(place), "on_cpu": on_cpu, "devices": devices}
    made = plan(recipe, architecture=shape, **words)  # type: ignore[arg-type]
    limits = group.gather(_limit_bytes(made, place), "the plan")
    least = min((limit for limit in limits if limit is not None), default=None)
    if "auto" in (recipe.train.keep_blocks, recipe.train.cuda_graphs):
        found = decide_and_say(recipe, architecture=shape, limit_bytes=least, **words)  # type: ignore[arg-type]
        made = plan(found.recipe, architecture=shape, **words)  # type: ignore[arg-type]
        if found.graphs:
            note(f"{found.graphs} (train.cuda_graphs)")
    offloads = any(p.host["offloaded_activations"] for p in made.phases)
    made.check_host(available_bytes() if offloads and not on_cpu else None)
    try:
        made.check(least)
    except PlanError as error:
        if len(set(limits)) == 1:
            raise
        raise PlanError(f"the device of rank {limits.index(least)} has least: {error}") from None
    return made


def decided(assembly: Assembly, planned: Plan | None, *, note: Callable[[str], None]) -> Assembly:
    """The assembly with what the plan found for `auto`: the number of kept blocks (0 without one),
    and whether passes are recorded (not without one, and still open on a CPU).
    """
    recipe, found = assembly.recipe, {}
    if recipe.train.keep_blocks == "auto":
        kept = 0 if planned is None else planned.recipe.train.keep_blocks
        note(f"{kept} of the blocks keep their activations (train.keep_blocks)")
        found["keep_blocks"] = kept
    if recipe.train.cuda_graphs == "auto" and planned is not None:
        found["cuda_graphs"] = planned.recipe.train.cuda_graphs
    if not found:
        return assembly
    train = recipe.train.model_copy(update=found)
    return replace(assembly, recipe=recipe.model_copy(update={"train": train}))


def _card(place: Placement) -> Hardware | None:
    if place.device.type != "cuda":
        return None
    try:
        return hardware(torch.cuda.get_device_name(place.device))
    except ConfigError:
        return None


def _limit_bytes(planned: Plan, place: Placement) -> int | None:
    """What the plan says, but never more than the card has."""
    limit = planned.limit()
    if place.device.type != "cuda":
        return limit
    there = torch.cuda.get_device_properties(place.device).total_memory
    return there if limit is None else min(limit, there)


def advice(planned: Plan | None, place: Placement) -> str:
    """What to do when memory runs out although the plan said that it would do."""
    if planned is None:
        return "try a smaller train.micro_batch_size or data.max_length"
    needed = planned.host_bytes if planned.on_cpu else planned.allocator_bytes
    limit = _limit_bytes(planned, place)
    aim = (needed + CUDA_CONTEXT_BYTES if limit is None else limit) * 85 // 100
    changes = " or ".join(change.words for change in advise(planned, aim))
    said = f"the plan said {show_bytes(needed)}"
    return f"{said}; try {changes or 'a smaller data.max_length'}"


def to_text(
    planned: Plan | None, memory: Memory, phases: Mapping[str, Memory] | None = None
) -> str:
    """Planned against measured, in all and by phase: bytes on the device and of the host."""
    told = {} if planned is None else planned.to_json()
    measured: dict[str, object] = {**_numbers(memory)}
    measured["phases"] = {name: _numbers(peak) for name, peak in (phases or {}).items()}
    told["measured"] = measured
    return json.dumps(told, indent=1) + "\n"


def _numbers(memory: Memory) -> dict[str, int]:
    return {
        "reserved_bytes": memory.reserved_bytes,
        "allocated_bytes": memory.allocated_bytes,
        "host_bytes": memory.host_bytes,
    }
