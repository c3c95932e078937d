"""Which parameter is updated how, by name and number of dims; the optimiser of a recipe.

Rules are tried in order and the first that matches takes the parameter, so a special case stands
before the general one; a parameter that none matches is an error and never silently left out. The
default: biases and everything of one dim (norms, DoRA magnitudes) are not decayed, the rest is:
decay pulls gains and offsets towards values that have no claim to be simpler.

Costs nothing. It knows names and dims only, no module types.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor, nn

from nibble.errors import ConfigError
from nibble.optim.layerwise import layerwise_
from nibble.optim.optimizer import Optimizer
from nibble.optim.schedules import Schedule, num_warmup_steps
from nibble.optim.shards import FLAT, ShardView
from nibble.spec.config import Optim
from nibble.spec.lowrank import LowRank, low_rank_of
from nibble.spec.methods import BIASES, EMBEDDINGS, group_values, low_rank, reasons
from nibble.spec.state import optimizer_nbytes, rule_and_codec
from nibble.spec.units import show_bytes


@dataclass(frozen=True, kw_only=True)
class GroupRule:
    """Parameters whose name `pattern` is found in and that have at most `max_dims` dims.

    `values` are param-group keys (weight_decay, lr, rule, codec, rank, ...) that replace the
    optimiser's. A `required` rule that takes nothing is an error: a target was misspelt.
    """

    name: str
    pattern: str
    max_dims: int | None = None
    required: bool = False
    values: Mapping[str, Any] = field(default_factory=dict)

    def matches(self, name: str, num_dims: int) -> bool:
        """Whether this rule takes the parameter, if none before it did."""
        fits = self.max_dims is None or num_dims <= self.max_dims
        return fits and re.search(self.pattern, name) is not None


DEFAULT_RULES = (
    # By name as well: the biases of stacked experts have two dims.
    GroupRule(name="biases", pattern=BIASES, values={"weight_decay": 0.0}),
    GroupRule(name="vectors", pattern=r"", max_dims=1, values={"weight_decay": 0.0}),
    GroupRule(name="matrices", pattern=r""),
)


def low_rank_rules(
    values: Mapping[str, Any], *, target: str | None = None
) -> tuple[GroupRule, ...]:
    """Rules that give matrices to the group `projected` with `values`: rank, scale and others.

    `target`: a pattern of parameter names, instead of every matrix but embeddings and heads. All
    else follows the plain rule. A target that matches nothing is refused when groups are made.
    """
    biases, vectors, matrices = DEFAULT_RULES
    if target is not None:
        chosen = GroupRule(name="projected", pattern=target, required=True, values=values)
        return (biases, vectors, chosen, matrices)
    embeddings = GroupRule(name="embeddings", pattern=EMBEDDINGS)
    chosen = GroupRule(name="projected", pattern="", required=True, values=values)
    return (biases, vectors, embeddings, chosen)


@dataclass(frozen=True, kw_only=True)
class GroupSummary:
    """What a report says of one group; bytes are of optimiser state.

    With a rank, `num_projected` of its tensors are projected and the others follow the plain rule.
    """

    name: str
    num_tensors: int
    num_parameters: int
    rule: str
    codec: str
    learning_rate: float
    weight_decay: float
    state_nbytes: int
    rank: int
    num_projected: int
    num_projected_parameters: int


def group_parameters(
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    rules: Sequence[GroupRule] = DEFAULT_RULES,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> list[dict[str, Any]]:
    """Param groups of the trainable parameters, in the order of the rules, empty ones left out.

    `shapes`: of the whole tensors by name, where parameters are parts that may have fewer dims.
    Raises ConfigError for a parameter that no rule matches and a required rule that takes none.
    """
    groups: dict[str, list[nn.Parameter]] = {rule.name: [] for rule in rules}
    for name, param in named:
        if not param.requires_grad:
            continue
        for rule in rules:
            shape = param.shape if shapes is None else shapes[name]
            if rule.matches(name, len(shape)):
                groups[rule.name].append(param)
                break
        else:
            raise ConfigError(
                f"no group rule matches the parameter {name}: end the rules with pattern ''"
            )
    for rule in rules:
        if rule.required and not groups[rule.name]:
            raise ConfigError(
                f"the target {rule.pattern!r} of group {rule.name} matches no trainable parameter "
                "that is left for it: name some, or drop the group"
            )
    return [
        {"params": groups[rule.name], "name": rule.name, **rule.values}
        for rule in rules
        if groups[rule.name]
    ]


def build(
    params: Mapping[str, nn.Parameter],
    optim: Optim,
    *,
    total_steps: int,
    seed: int = 0,
    views: Mapping[str, ShardView] | None = None,
) -> tuple[Optimizer, Schedule]:
    """Optimiser and schedule for the trainable ones of the named parameters.

    `views`: which part of each lives here, where not all of it does. `total_steps` counts updates;
    `seed` is of stochastic rounding, which bf16 weights always get, and of random bases.
    In layer-wise mode the gradients of projected parameters are small from now on. Raises
    ConfigError if nothing is trainable, a target or rank fits no matrix, or the warm-up is longer
    than the run.
    """
    trained = {name: param for name, param in params.items() if param.requires_grad}
    if not trained:
        raise ConfigError(
            "the model has no trainable parameter: choose an adapter, or train an unquantised base"
        )
    views = views or {}
    shapes = {
        name: views[name].shape if name in views else tuple(param.shape)
        for name, param in trained.items()
    }
    groups = group_parameters(trained.items(), rules=_rules(optim, shapes), shapes=shapes)
    # What is cut as a line is stepped element by element and asks for no view.
    split = {trained[n]: view for n, view in views.items() if view.dim not in (None, FLAT)}
    sharded: dict[str, Any] = {"views": split} if split else {}
    rule, codec = rule_and_codec(optim)
    optimizer = Optimizer(
        groups,
        lr=optim.learning_rate,
        rule=rule,
        codec=codec,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        momentum=optim.momentum,
        stochastic_rounding=True,
        seed=seed,
        **sharded,
    )
    if optim.layerwise:
        layerwise_(optimizer, in_backward=optim.in_backward)
    schedule = Schedule(
        optimizer,
        name=optim.schedule,
        total_steps=total_steps,
        warmup_steps=num_warmup_steps(
            total_steps=total_steps,
            warmup_steps=optim.warmup_steps,
            warmup_ratio=optim.warmup_ratio,
        ),
        floor_ratio=optim.floor_ratio,
        restart_every=optim.restart_every,
        restart_warmup_steps=optim.restart_warmup_steps,
    )
    return optimizer, schedule


def _rules(optim: Optim, shapes: Mapping[str, tuple[int, ...]]) -> Sequence[GroupRule]:
    """The default rules; of a low-rank recipe the matrices that it projects stand before them."""
    low = low_rank(optim)
    if low is None:
        return DEFAULT_RULES
    chosen = [name for name, why in reasons(optim, shapes, low=low).items() if why is None]
    pattern = f"^(?:{'|'.join(map(re.escape, chosen))})$"
    projected = GroupRule(
        name="projected", pattern=pattern, required=True, values=group_values(low)
    )
    return (projected, *DEFAULT_RULES)


def projection_lines(params: Mapping[str, Tensor], optim: Optim) -> list[str]:
    """For a report: how much is projected, and what is not and why; empty for the plain rule.

    `params`: the trained parameters by name, whole (their shapes are what is asked).
    """
    low = low_rank(optim)
    if low is None:
        return []
    shapes = {name: tuple(param.shape) for name, param in params.items()}
    found = reasons(optim, shapes, low=low)
    rule, codec = rule_and_codec(optim)
    sums: dict[str | None, tuple[int, int, int]] = {}
    for name, why in found.items():
        own = low if why is None else None
        nbytes = optimizer_nbytes(rule, codec=codec, shapes=[shapes[name]], low_rank=own)
        count, numel, total = sums.get(why, (0, 0, 0))
        sums[why] = (count + 1, numel + prod(shapes[name]), total + nbytes)
    return [
        f"{_fate(why, low)}: {count} tensors, {numel:,} parameters, state {show_bytes(nbytes)}"
        for why, (count, numel, nbytes) in sorted(sums.items(), key=lambda item: item[0] or "")
    ]


def _fate(why: str | None, low: LowRank) -> str:
    if why is not None:
        return f"not projected, {why}"
    return f"projected to rank {low.rank} (basis {low.basis}, residual {low.residual})"


def summarise(optimizer: Optimizer) -> list[GroupSummary]:
    """One line for each group, for reports; the learning rate is the peak."""
    return [
        _summary(group, default_name=f"group {number}")
        for number, group in enumerate(optimizer.param_groups)
    ]


def _summary(group: dict[str, Any], *, default_name: str) -> GroupSummary:
    low_rank = low_rank_of(group)
    shapes = [tuple(param.shape) for param in group["params"]]
    projected = [shape for shape in shapes if low_rank is not None and low_rank.projects(shape)]
    return GroupSummary(
        name=group.get("name", default_name),
        num_tensors=len(shapes),
        num_parameters=sum(prod(shape) for shape in shapes),
        rule=group["rule"],
        codec=group["codec"],
        learning_rate=group.get("initial_lr", group["lr"]),
        weight_decay=group["weight_decay"],
        state_nbytes=optimizer_nbytes(
            group["rule"], codec=group["codec"], shapes=shapes, low_rank=low_rank
        ),
        rank=group["rank"],
        num_projected=len(projected),
        num_projected_parameters=sum(prod(shape) for shape in projected),
    )
