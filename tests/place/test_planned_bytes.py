"""The plan's tensor bytes against those of a filled model and its optimiser, exactly: every format,
adapter, optimiser and placement of one process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from plan_rows import METHODS, MODELS, tiny
from random_model import assemble_random, write_config

from nibble import optim
from nibble.nn.quant import QuantLinear
from nibble.place import Group, placement
from nibble.place.activations import Activations
from nibble.place.stream import Stream
from nibble.spec.arch import architecture
from nibble.spec.config import Recipe
from nibble.spec.holdings import ONE_DEVICE, holding
from nibble.spec.inventory import inventory
from nibble.use.assemble import fill

LORA: dict[str, Any] = {"kind": "lora", "rank": 4}
FORMATS: list[dict[str, Any]] = [
    {"format": "none"},
    {"format": "nf4"},
    {"format": "nf4", "double_quant": False},
    {"format": "fp4"},
    {"format": "int8"},
    *({"format": "hqq", "bits": bits} for bits in (1, 2, 3, 4, 8)),
    {"format": "ternary"},
]
ADAPTERS: list[dict[str, Any]] = [
    LORA,
    {**LORA, "kind": "dora"},
    {"kind": "expand", "num_new_blocks": 1},
]
OPTIMS: dict[str, dict[str, Any]] = {
    **{name: words["optim"] for name, words in METHODS.items() if set(words) == {"optim"}},
    "adamw": {},
    "sgd": {"name": "sgd", "momentum": 0.0},
}
PLACES: list[dict[str, Any]] = [
    {"kind": "single"},
    {"kind": "stream", "resident_blocks": 0},
    {"kind": "stream", "resident_blocks": 2, "ring_blocks": 2},
]


def filled(recipe: Recipe) -> tuple[dict[str, int], int]:
    """Bytes on the device by what they are, and those that wait in host memory."""
    device = torch.device("cpu")
    place = placement(recipe.place, Group.alone(device), optim=recipe.optim)
    pool = torch.randn(1 << 16, dtype=torch.float32).bfloat16()
    assembly = assemble_random(recipe, device=device, pool=pool)
    model = fill(assembly, place, activations=Activations.of(recipe.train))
    host: set[int] = set()
    if isinstance(place, Stream):
        assert place.host is not None
        begin = place.host.bytes.data_ptr()
        span = range(begin, begin + place.host.bytes.numel())
        host = {id(p) for p in model.parameters() if p.data_ptr() in span}
    packed = {
        id(p): name
        for m in model.modules()
        if isinstance(m, QuantLinear)
        for name, p in m.stored().items()
    }
    found = dict.fromkeys(("codes", "scales", "weights", "trained"), 0)
    streamed = 0
    for parameter in model.parameters():
        if id(parameter) in host:
            streamed += parameter.nbytes
        elif parameter.requires_grad:
            found["trained"] += parameter.nbytes
        else:
            name = packed.get(id(parameter), "weights")
            name = name if name in ("codes", "weights") else "scales"
            found[name] += parameter.nbytes
    place.close()
    return found, streamed


@pytest.mark.parametrize("place", PLACES, ids=lambda p: "-".join(str(v) for v in p.values()))
@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: a["kind"])
@pytest.mark.parametrize("quant", FORMATS, ids=lambda q: "-".join(str(v) for v in q.values()))
def test_tensors_are_planned_to_the_byte(
    quant: dict[str, Any], adapter: dict[str, Any], place: dict[str, Any], tmp_path: Path
) -> None:
    write_config(tmp_path, tiny(MODELS["qwen2-0.5b"]))
    recipe = Recipe.model_validate(
        {
            "model": {"path": str(tmp_path)},
            "quant": {**quant, "cache": False},
            "adapter": adapter,
            "place": {**place, "device": "cpu"},
        }
    )
    stock = inventory(recipe, architecture(recipe.model))
    held = holding(recipe, stock, ONE_DEVICE)
    found, streamed = filled(recipe)
    assert found == {
        "codes": held.base_codes,
        "scales": held.base_scales,
        "weights": held.base_weights,
        "trained": held.trained_weights,
    }
    everything = stock.base_codes_bytes + stock.base_scales_bytes + stock.base_weights_bytes
    here = held.base_codes + held.base_scales + held.base_weights
    assert streamed == everything - here
    if place["kind"] == "stream" and not place["resident_blocks"]:
        assert streamed == held.streamed


def optimised() -> Iterator[Any]:
    """Optimisers of adapters everywhere; low-rank gradients where the base is trained."""
    for name, words in OPTIMS.items():
        places = PLACES[:1] if "method" in words else PLACES
        for quant in ("none",) if "method" in words else ("none", "nf4"):
            for place in places:
                label = "-".join(map(str, (name, quant, *place.values())))
                yield pytest.param(name, quant, place, id=label)


@pytest.mark.parametrize(("name", "quant", "place"), list(optimised()))
def test_the_optimisers_state_is_planned_to_the_byte(
    name: str, quant: str, place: dict[str, Any], tmp_path: Path
) -> None:
    words, low_rank = dict(OPTIMS[name]), "method" in OPTIMS[name]
    if "rank" in words:
        words["rank"] = 8
    write_config(tmp_path, tiny(MODELS["qwen2-0.5b"]))
    recipe = Recipe.model_validate(
        {
            "model": {"path": str(tmp_path)},
            "quant": {"format": quant, "cache": False},
            "adapter": {"kind": "none"} if low_rank else {"kind": "lora", "rank": 40},
            "optim": words,
            "place": {**place, "device": "cpu"},
        }
    )
    held = holding(recipe, inventory(recipe, architecture(recipe.model)), ONE_DEVICE)
    device = torch.device("cpu")
    at = placement(recipe.place, Group.alone(device), optim=recipe.optim)
    assembly = assemble_random(recipe, device=device, pool=torch.zeros(1 << 16).bfloat16())
    model = fill(assembly, at, activations=Activations.of(recipe.train))
    trained = at.trained(model)
    views = {name: at.view(name) for name in trained}
    optimizer, _ = optim.build(trained, recipe.optim, total_steps=10, seed=0, views=views)
    assert isinstance(optimizer, optim.Optimizer)
    optimizer.make_state()
    states = [value for state in optimizer.state.values() for value in state.values()]
    found = sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
    at.close()
    assert found == held.optimizer_state
