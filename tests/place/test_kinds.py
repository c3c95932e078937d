"""Which class a recipe's placement is, and what is refused by name."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from nibble.errors import PlacementError
from nibble.place import PLACEMENTS, Group, placement, resolved
from nibble.place import group as group_module
from nibble.place.single import Single
from nibble.spec.config import Place, Recipe

ALONE = Group.alone(torch.device("cpu"))
TWO = Group(device=torch.device("cpu"), rank=1, world=2, local_rank=1, local_world=2)


def test_auto_is_a_copy_on_each_device() -> None:
    recipe = Recipe.model_validate({"model": {"path": "x"}})
    assert resolved(recipe, ALONE).place.kind == "single"
    assert resolved(recipe, TWO).place.kind == "ddp"
    one, two = placement(Place(), ALONE), placement(Place(), TWO)
    assert isinstance(one, Single) and isinstance(two, Single)
    assert (one.rank, one.world, two.rank, two.world) == (0, 1, 1, 2)
    fixed = Recipe.model_validate({"model": {"path": "x"}, "place": {"kind": "fsdp"}})
    assert resolved(fixed, TWO) == fixed


def test_every_word_of_a_recipe_has_a_class() -> None:
    from typing import get_args

    from nibble.spec.config import PlacementName

    assert set(PLACEMENTS) == set(get_args(PlacementName)) - {"auto"}


@pytest.mark.parametrize(("has_nccl", "backend"), [(True, "nccl"), (False, "gloo")])
def test_gloo_carries_everything_where_nccl_is_absent(
    has_nccl: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(dist, "is_nccl_available", lambda: has_nccl)
    monkeypatch.setattr(dist, "init_process_group", lambda words, **_: asked.append(words))
    group_module._join(torch.device("cuda", 0), rank=0, world=2, timeout_s=1.0)
    group_module._join(torch.device("cpu"), rank=0, world=2, timeout_s=1.0)
    assert asked == [f"cpu:gloo,cuda:{backend}", "cpu:gloo,cuda:gloo"]


@pytest.mark.parametrize("kind", ["single", "dp"])
def test_one_process_is_not_two(kind: str) -> None:
    with pytest.raises(PlacementError, match=f"place.kind={kind} is one process, but 2 were"):
        placement(Place.model_validate({"kind": kind}), TWO)
