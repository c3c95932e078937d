"""Parameter groups, and the optimiser that a recipe means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nibble.errors import ConfigError
from nibble.optim import (
    GroupRule,
    build,
    clip_grad_norm_,
    group_parameters,
    projection_lines,
    summarise,
)
from nibble.optim.shards import FLAT, ShardView
from nibble.spec.config import MethodName, Optim, OptimizerName
from nibble.spec.lowrank import METHODS
from nibble.spec.state import rule_and_codec


class Model(nn.Module):
    """A block with everything that groups look at."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.norm = nn.LayerNorm(64)
        self.proj = nn.Linear(64, 64)
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(4, 8))  # experts' biases, stacked
        self.frozen = nn.Linear(64, 64)
        self.frozen.requires_grad_(False)


def names_of(model: nn.Module, params: list[nn.Parameter]) -> set[str]:
    ids = {id(param) for param in params}
    return {name for name, param in model.named_parameters() if id(param) in ids}


def test_biases_and_norms_are_not_decayed() -> None:
    model = Model()
    optimizer, _ = build(dict(model.named_parameters()), Optim(weight_decay=0.1), total_steps=10)
    decay = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decay == {"biases": 0.0, "vectors": 0.0, "matrices": 0.1}
    found = {group["name"]: names_of(model, group["params"]) for group in optimizer.param_groups}
    assert found == {
        "biases": {"norm.bias", "proj.bias", "gate_up_proj_bias"},
        "vectors": {"norm.weight"},
        "matrices": {"embed.weight", "proj.weight"},
    }


def test_first_match_wins_and_no_match_is_an_error() -> None:
    model = Model()
    rules = (
        GroupRule(name="slow", pattern=r"^embed\.", values={"lr": 1e-5, "codec": "fp32"}),
        GroupRule(name="rest", pattern=""),
        GroupRule(name="never", pattern="embed"),
    )
    groups = group_parameters(model.named_parameters(), rules=rules)
    assert [group["name"] for group in groups] == ["slow", "rest"]
    assert names_of(model, groups[0]["params"]) == {"embed.weight"}
    assert groups[0]["lr"] == 1e-5
    with pytest.raises(ConfigError, match="no group rule matches the parameter gate_up_proj_bias"):
        group_parameters(model.named_parameters(), rules=rules[:1])


@pytest.mark.parametrize("name", OptimizerName.__args__)
def test_every_recipe_name_builds_trains_and_is_summarised(name: str) -> None:
    model = Model()
    optim = Optim(name=name, learning_rate=1e-2, warmup_steps=1, momentum=0.5)
    optimizer, schedule = build(dict(model.named_parameters()), optim, total_steps=3)
    assert schedule.get_last_lr() == [0.0] * 3
    before = model.proj.weight.detach().clone()
    for _ in range(2):
        for param in model.parameters():
            param.grad = torch.ones_like(param) if param.requires_grad else None
        optimizer.step()
        schedule.step()
    assert not torch.equal(model.proj.weight, before)
    lines = summarise(optimizer)
    assert {(line.rule, line.codec) for line in lines} == {rule_and_codec(optim)}
    assert sum(line.num_parameters for line in lines) == sum(
        param.numel() for param in model.parameters() if param.requires_grad
    )
    state = [value for state in optimizer.state.values() for value in state.values()]
    assert sum(line.state_nbytes for line in lines) == sum(
        value.nbytes for value in state if isinstance(value, torch.Tensor)
    )
    assert lines[-1].learning_rate == 1e-2


def test_sgd_without_momentum_keeps_no_state() -> None:
    optimizer, _ = build(dict(Model().named_parameters()), Optim(name="sgd"), total_steps=3)
    assert all(line.state_nbytes == 0 for line in summarise(optimizer))


def test_nothing_to_train_and_too_long_a_warm_up() -> None:
    with pytest.raises(ConfigError, match="no trainable parameter"):
        build(dict(Model().requires_grad_(False).named_parameters()), Optim(), total_steps=3)
    with pytest.raises(ConfigError, match="warm-up of 4 steps is longer than the run of 3"):
        build(dict(Model().named_parameters()), Optim(warmup_steps=4), total_steps=3)


class TestLowRankRecipes:
    """What a recipe's method becomes."""

    @pytest.mark.parametrize("method", [m for m in MethodName.__args__ if m != "none"])
    def test_a_method_projects_matrices_and_nothing_else(self, method: MethodName) -> None:
        model = Model()
        optim = Optim(method=method, rank=None if method == "apollo-mini" else 8)
        optimizer, _ = build(dict(model.named_parameters()), optim, total_steps=10)
        found = {g["name"]: names_of(model, g["params"]) for g in optimizer.param_groups}
        assert found == {
            "projected": {"proj.weight"},
            "biases": {"norm.bias", "proj.bias", "gate_up_proj_bias"},
            "vectors": {"norm.weight"},
            "matrices": {"embed.weight"},
        }
        group = optimizer.param_groups[0]
        for key, value in METHODS[method].items():
            assert group[key] == value, key
        assert group["rank"] == (1 if method == "apollo-mini" else 8)
        lines = projection_lines({n: p for n, p in model.named_parameters() if p.requires_grad},
                                 optim)  # fmt: skip
        assert lines[0].startswith(f"projected to rank {group['rank']}") and "4,096" in lines[0]
        assert [line.split(":")[0] for line in lines[1:]] == [
            "not projected, embeddings and heads", "not projected, vectors and biases"]  # fmt: skip

    def test_what_is_given_wins_over_the_method(self) -> None:
        model = Model()
        optim = Optim(method="galore8bit", rank=4, state="fp32", scale=2.0, refresh_every=7,
                      side="right", basis="random", stagger=False)  # fmt: skip
        optimizer, _ = build(dict(model.named_parameters()), optim, total_steps=10)
        group = optimizer.param_groups[0]
        want = {"codec": "fp32", "scale": 2.0, "update_proj_gap": 7, "proj_type": "right",
                "basis": "random", "stagger": False}  # fmt: skip
        assert {key: group[key] for key in want} == want

    def test_targets_choose_and_may_be_embeddings(self) -> None:
        model = Model()
        params = dict(model.named_parameters())
        optimizer, _ = build(params, Optim(rank=8, targets=("embed",)), total_steps=10)
        assert names_of(model, optimizer.param_groups[0]["params"]) == {"embed.weight"}

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ({"rank": 65}, r"optim.rank=65 projects nothing: .* a side of 64"),
            ({"rank": 4, "targets": ("prj",)}, r"'prj' names no trained matrix.*embed, .*proj"),
        ],
    )
    def test_what_fits_nothing_is_refused(self, words: Any, said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            build(dict(Model().named_parameters()), Optim(**words), total_steps=10)

    def test_layer_wise_gradients_are_small(self) -> None:
        model = Model()
        optim = Optim(method="galore", rank=8, layerwise=True)
        optimizer, _ = build(dict(model.named_parameters()), optim, total_steps=10)
        assert optimizer.param_groups[0]["basis"] == "randomised"
        model.proj(torch.randn(3, 64)).square().sum().backward()
        assert type(model.proj.weight.grad).__name__ == "ProjectedGrad"
        assert model.proj.bias.grad is not None and model.proj.bias.grad.shape == (64,)


def test_parts_are_grouped_by_the_dims_of_the_whole() -> None:
    parts = {"up.weight": nn.Parameter(torch.zeros(5)), "norm.weight": nn.Parameter(torch.zeros(3))}
    shapes = {"up.weight": (4, 2), "norm.weight": (4,)}
    views = {name: ShardView(shape=shapes[name], dim=FLAT, start=1) for name in parts}
    optimizer, _ = build(parts, Optim(weight_decay=0.1), total_steps=1, views=views)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {name: decays[id(part)] for name, part in parts.items()} == {
        "up.weight": 0.1,
        "norm.weight": 0.0,
    }


def test_a_norm_over_parts_is_that_of_the_whole() -> None:
    torch.manual_seed(0)
    whole = torch.randn(7, 3)
    expected, alone = nn.Parameter(whole), nn.Parameter(whole)
    expected.grad, alone.grad = whole.clone(), whole.clone()
    there = clip_grad_norm_([expected], max_norm=1.0)
    parts = [nn.Parameter(part.clone()) for part in whole.view(-1).split([4, 0, 17])]
    squares = [part.detach().square().sum() for part in parts]
    for part in parts:
        part.grad = part.detach().clone() if part.numel() else None

    for index, part in enumerate(parts):
        others = sum(squares) - squares[index]
        norm = clip_grad_norm_(
            [part], max_norm=1.0, sum_=lambda tensors, more=others: tensors[0].add_(more)
        )
        torch.testing.assert_close(norm, there)
    found = torch.cat([part.grad for part in parts if part.grad is not None])
    torch.testing.assert_close(found.view(7, 3), expected.grad)
