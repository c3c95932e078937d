"""The low-rank rows: every basis, residual, storage and method, with every codec of the state."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from same_state import assert_equal
from torch import Tensor, nn

from nibble.errors import CheckpointError, ConfigError
from nibble.numerics import balancing, lowrank
from nibble.optim import (
    GroupRule,
    Optimizer,
    batches,
    group_parameters,
    low_rank_rules,
    summarise,
)
from nibble.optim.projection import projections
from nibble.spec.lowrank import (
    BASES,
    BASIS_STORAGE,
    METHODS,
    PROJ_TYPES,
    RESIDUALS,
    low_rank_of,
)
from nibble.spec.state import CODECS, RULES, optimizer_nbytes, state_tensors

torch.set_num_threads(1)

SHAPES = ((80, 64), (48, 96), (64, 64), (3, 40, 24), (24, 3, 4, 5), (5, 90), (300,))
"""Tall, wide, square, a stack, a kernel; then two that rank 8 does not project."""

ROWS: dict[str, dict[str, Any]] = {
    **{name: {"rank": 8, **row} for name, row in METHODS.items()},
    "galore, reverse_std, bf16 basis": {
        "rank": 8,
        "basis": "svd",
        "proj_type": "reverse_std",
        "basis_storage": "bf16",
    },
    "galore, left, randomised, int8 basis": {
        "rank": 8,
        "basis": "randomised",
        "proj_type": "left",
        "basis_storage": "int8",
    },
    "galore, right, random": {"rank": 8, "basis": "random", "proj_type": "right"},
    "galore, full, randomised": {"rank": 8, "basis": "randomised", "proj_type": "full"},
    "galore, adafactor": {"rank": 8, "rule": "adafactor", "basis": "randomised"},
    "galore, adafactor_momentum": {
        "rank": 8,
        "rule": "adafactor_momentum",
        "basis": "randomised",
    },
    "galore, lion": {"rank": 8, "rule": "lion", "basis": "randomised", "stagger": False},
    "galore, momentum": {"rank": 8, "rule": "momentum", "basis": "randomised", "scale": 0.5},
    "fira, sgd, no limit": {
        "rank": 8,
        "rule": "sgd",
        "basis": "randomised",
        "residual": "fira",
        "norm_growth": 0.0,
    },
    "apollo with svd": {"rank": 8, "basis": "svd", "residual": "channel", "lazy_threshold": 0.4},
}
"""Every value of every table, in at least one row; `rule` is adamw where it is not said."""


def test_the_rows_cover_every_table() -> None:
    def values(key: str, default: str) -> set[str]:
        return {row.get(key, default) for row in ROWS.values()}

    assert set(METHODS) <= set(ROWS)
    assert values("basis", "svd") == set(BASES)
    assert values("residual", "none") == set(RESIDUALS)
    assert values("basis_storage", "fp32") == set(BASIS_STORAGE)
    assert values("proj_type", "std") == set(PROJ_TYPES)
    assert values("rule", "adamw") == set(RULES)


def weights_of(
    shapes: tuple[tuple[int, ...], ...] = SHAPES, *, dtype: torch.dtype = torch.float32
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def gradient(weight: Tensor, *, step: int, number: int) -> Tensor:
    """Noise and a pull to zero."""
    generator = torch.Generator().manual_seed(1000 * number + step)
    noise = torch.randn(weight.shape, generator=generator)
    return (noise + 0.1 * weight.detach().float()).to(weight.dtype)


def train(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], *, steps: range) -> None:
    for step in steps:
        for number, weight in enumerate(weights):
            weight.grad = gradient(weight, step=step, number=number)
        optimizer.step()
        optimizer.zero_grad()


def make(
    row: dict[str, Any], *, codec: str, dtype: torch.dtype, gap: int = 3, **more: Any
) -> tuple[list[nn.Parameter], Optimizer]:
    weights = weights_of(dtype=dtype)
    options = {"lr": 1e-2, "weight_decay": 0.1, "stochastic_rounding": True, "seed": 3}
    options |= {"update_proj_gap": gap, **row, "codec": codec, **more}
    return weights, Optimizer(weights, **options)


TABLE = list(itertools.product(ROWS, CODECS, (torch.float32, torch.bfloat16)))


@pytest.mark.parametrize(("name", "codec", "dtype"), TABLE)
def test_resume_across_a_refresh_equals_no_resume(
    name: str, codec: str, dtype: torch.dtype, tmp_path: object
) -> None:
    through, optimizer = make(ROWS[name], codec=codec, dtype=dtype)
    train(optimizer, through, steps=range(8))

    stopped, first = make(ROWS[name], codec=codec, dtype=dtype)
    train(first, stopped, steps=range(4))
    file = f"{tmp_path}/optimizer.pt"
    torch.save({"weights": [w.detach() for w in stopped], "optimizer": first.state_dict()}, file)
    saved = torch.load(file, weights_only=True)
    resumed, second = make(ROWS[name], codec=codec, dtype=dtype)
    for weight, value in zip(resumed, saved["weights"], strict=True):
        weight.data.copy_(value)
    second.load_state_dict(saved["optimizer"])
    assert_equal(second.state_dict(), first.state_dict())
    before = [second.state[weight].get("num_refreshes") for weight in resumed]
    train(second, resumed, steps=range(4, 8))
    after = [second.state[weight].get("num_refreshes") for weight in resumed]

    assert_equal(resumed, through)
    assert_equal(second.state_dict(), optimizer.state_dict())
    num_projected = sum(number is not None for number in after)
    assert num_projected == (6 if ROWS[name]["rank"] == 1 else 5)
    assert all(a > b for a, b in zip(after[:5], before[:5], strict=True))


@pytest.mark.parametrize(("name", "codec", "dtype"), TABLE)
def test_state_is_tensors_and_ints_of_the_planned_bytes(
    name: str, codec: str, dtype: torch.dtype
) -> None:
    weights, optimizer = make(ROWS[name], codec=codec, dtype=dtype)
    train(optimizer, weights, steps=range(1))
    group = optimizer.param_groups[0]
    low, rule = low_rank_of(group), group["rule"]
    nbytes = 0
    for weight in weights:
        state = optimizer.state[weight]
        planned = state_tensors(rule, codec=codec, shape=tuple(weight.shape), low_rank=low)
        found = {
            key: (tuple(value.shape), str(value.dtype).removeprefix("torch."))
            for key, value in state.items()
            if isinstance(value, Tensor)
        }
        assert found == {key: (spec.shape, spec.dtype) for key, spec in planned.items()}
        nbytes += sum(value.nbytes for value in state.values() if isinstance(value, Tensor))
        assert all(type(v) is int or isinstance(v, Tensor) for v in state.values())
    assert nbytes == optimizer_nbytes(rule, codec=codec, shapes=SHAPES, low_rank=low)
    assert nbytes == summarise(optimizer)[0].state_nbytes


def test_state_is_small() -> None:
    # LLaMA's 4096 x 11008 at rank 256 in the papers' own words: mr + 2nr numbers, APOLLO 2nr + 1.
    shape = [(4096, 11008)]
    full = optimizer_nbytes("adamw", codec="fp32", shapes=shape)
    galore = optimizer_nbytes(
        "adamw", codec="fp32", shapes=shape, low_rank=low_rank_of(_group("galore", rank=256))
    )
    apollo = optimizer_nbytes(
        "adamw", codec="fp32", shapes=shape, low_rank=low_rank_of(_group("apollo", rank=256))
    )
    assert full == 4 * 2 * 4096 * 11008
    assert galore == 4 * (4096 * 256 + 2 * 11008 * 256)
    assert apollo == 4 * (2 * 11008 * 256 + 1)


def _group(name: str, **more: Any) -> dict[str, Any]:
    return Optimizer([nn.Parameter(torch.zeros(512, 512))], **METHODS[name], **more).param_groups[0]


def reference(
    weight: Tensor, *, row: dict[str, Any], index: int, steps: int, gap: int, lr: float
) -> Tensor:
    """The papers' equations with whole matrices in float64, AdamW, one matrix.

    Where Fira's scale goes its paper does not say; its authors' code scales the projected part.
    """
    weight = weight.detach().double().clone()
    rows, columns = weight.shape
    flip = rows >= columns  # the smaller side is projected: work on the transpose if it is n
    rank, residual = row["rank"], row.get("residual", "none")
    basis = mean = square = None
    last = 0.0
    for step in range(steps):
        grad = gradient(weight.float(), step=step, number=index)
        if step % gap == 0:
            # Signs of singular vectors are free, and moments survive a refresh: the same call.
            left, _, right = torch.linalg.svd(grad, full_matrices=False)
            basis = (right[:rank].T if flip else left[:, :rank]).double()
        grad = (grad.T if flip else grad).double()
        small = basis.T @ grad
        mean = 0.1 * small if mean is None else 0.9 * mean + 0.1 * small
        square = 0.001 * small**2 if square is None else 0.999 * square + 0.001 * small**2
        update = mean / (1 - 0.9 ** (step + 1))
        update = update / ((square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        ratio = update.norm(dim=0) / small.norm(dim=0)
        if residual == "tensor":
            ratio = update.norm() / small.norm()
        scale = row.get("scale", 1.0)
        rest = ratio * (grad - scale * (basis @ small) if residual == "fira" else scale * grad)
        if last and rest.norm() > 1.01 * last:
            rest = rest * 1.01 * last / rest.norm()
        last = rest.norm().item()
        outside = grad - basis @ small
        first, second = (0, 1) if flip else (1, 0)  # rows of the matrix as it is, then columns
        for _ in range(balancing.NUM_ROUNDS):
            outside = outside / outside.square().mean(first, keepdim=True).sqrt()
            outside = outside / outside.square().mean(second, keepdim=True).sqrt()
        whole = {
            "none": scale * (basis @ update),
            "fira": scale * (basis @ update) + rest,
            "channel": rest,
            "tensor": rest,
            "balanced": scale * (basis @ update) + 2 * update.square().mean().sqrt() * outside,
        }[residual]
        whole = whole.T if flip else whole
        weight = (1 - lr * 0.1) * weight - lr * whole
    return weight


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_equals_the_papers_equations(shape: tuple[int, int], residual: str) -> None:
    row = {"rank": 6, "basis": "svd", "residual": residual, "scale": 0.5}
    weights = weights_of((shape,))
    start = weights[0].detach().clone()
    optimizer = Optimizer(
        weights, lr=1e-2, weight_decay=0.1, update_proj_gap=4, stagger=False, **row
    )
    train(optimizer, weights, steps=range(10))
    expected = reference(start, row=row, index=0, steps=10, gap=4, lr=1e-2)
    error = torch.linalg.matrix_norm(weights[0].detach() - expected)
    assert error <= 2e-5 * torch.linalg.matrix_norm(expected - start)


def test_apollo_needs_no_stored_basis_and_uses_one_within_a_gap() -> None:
    weights = weights_of(((40, 24),))
    optimizer = Optimizer(weights, rank=4, update_proj_gap=2, stagger=False, **METHODS["apollo"])
    seen = []
    for step in range(5):
        train(optimizer, weights, steps=range(step, step + 1))
        (projection,) = projections(0, optimizer.param_groups[0]).values()
        left, right = projection.bases(optimizer.state[weights[0]], dtype=torch.float32)
        assert left is None
        seen.append(right)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])
    assert not torch.allclose(seen[1], seen[2]) and not torch.allclose(seen[3], seen[4])
    assert not any("basis" in name for name in optimizer.state[weights[0]])


@pytest.mark.parametrize("name", ROWS)
def test_chunks_and_batches_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A kernel in channels-last order as well, whose rows are no view.
    def one() -> list[nn.Parameter]:
        weights, optimizer = make(ROWS[name], codec="8bit", dtype=torch.float32)
        kernel = weights[4].detach().contiguous(memory_format=torch.channels_last)
        assert not kernel.is_contiguous()
        weights[4].data = kernel
        train(optimizer, weights, steps=range(3))
        return weights

    whole = one()
    monkeypatch.setattr(batches, "BATCH_NBYTES", 16 * 200)
    for first, second in zip(whole, one(), strict=True):
        assert torch.allclose(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fits_a_low_rank_target(name: str, dtype: torch.dtype) -> None:
    # A quadratic around a matrix of rank 4. A random basis sees a quarter of it at a time.
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(48, 4, generator=generator) @ torch.randn(4, 32, generator=generator) / 2
    weight = nn.Parameter(torch.zeros(48, 32, dtype=dtype))
    row = {"rank": 8, **ROWS[name]}
    peaks = {"momentum": 0.02, "sgd": 0.3, "adafactor_momentum": 0.4}
    peak = peaks.get(row.get("rule", "adamw"), 0.1) / row.get("scale", 1.0)
    optimizer = Optimizer([weight], lr=peak, update_proj_gap=50, stochastic_rounding=True, **row)
    steps = 400
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = peak * (1 - step / steps)
        weight.grad = (weight.detach().float() - target).to(dtype)
        optimizer.step()
    left = torch.linalg.matrix_norm(weight.detach().float() - target)
    bound = 0.5 if row["basis"] == "random" else 0.15
    assert left <= bound * torch.linalg.matrix_norm(target)


def test_refreshes_are_spread_over_the_gap_or_come_together() -> None:
    def dates(*, stagger: bool) -> list[list[int]]:
        weights = weights_of(((20, 12),) * 4 + ((9,),))
        optimizer = Optimizer(weights, rank=4, update_proj_gap=8, stagger=stagger)
        found: list[list[int]] = [[] for _ in range(4)]
        counts = [0] * 4
        for step in range(20):
            train(optimizer, weights, steps=range(step, step + 1))
            for number, weight in enumerate(weights[:4]):
                if optimizer.state[weight]["num_refreshes"] > counts[number]:
                    counts[number] += 1
                    found[number].append(step)
        return found

    assert dates(stagger=False) == [[0, 8, 16]] * 4
    assert dates(stagger=True) == [[0, 10, 18], [0, 4, 12], [0, 6, 14], [0, 8, 16]]


def test_the_lazy_rule_waits_longer_where_bases_are_alike() -> None:
    def gap_after(*, steady: bool, threshold: float = 0.4) -> int:
        weight = nn.Parameter(torch.zeros(60, 40))
        optimizer = Optimizer(
            [weight], rank=4, update_proj_gap=2, basis="randomised", lazy_threshold=threshold
        )
        signal = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)) @ torch.randn(
            4, 40, generator=torch.Generator().manual_seed(1)
        )
        for step in range(40):
            noise = torch.randn(60, 40, generator=torch.Generator().manual_seed(2 + step))
            weight.grad = signal + 0.1 * noise if steady else noise
            optimizer.step()
        return optimizer.state[weight]["gap"]

    assert gap_after(steady=True) == 8
    assert gap_after(steady=False) == 2


def test_a_decomposition_that_fails_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Tensor:
        raise torch.linalg.LinAlgError("did not converge")

    weights = weights_of(((40, 24),))
    optimizer = Optimizer(weights, rank=4)
    monkeypatch.setattr(lowrank, "svd_basis", fail)
    train(optimizer, weights, steps=range(1))
    basis = optimizer.state[weights[0]]["basis_right"]
    assert torch.allclose(basis.T @ basis, torch.eye(4), atol=1e-5)


def test_a_gradient_of_zero_moves_nothing() -> None:
    for row in ROWS.values():
        weights, optimizer = make(row, codec="fp32", dtype=torch.float32, weight_decay=0.0)
        before = [weight.detach().clone() for weight in weights]
        for _ in range(4):
            for weight in weights:
                weight.grad = torch.zeros_like(weight)
            optimizer.step()
        assert_equal(before, [weight.detach() for weight in weights])


def test_options_may_change_and_copies_go_on() -> None:
    weights, optimizer = make(ROWS["galore"], codec="fp32", dtype=torch.float32, gap=50)
    train(optimizer, weights, steps=range(2))
    copied = copy.deepcopy((weights, optimizer))
    for some, own in ((weights, optimizer), copied):
        own.param_groups[0]["scale"] = 0.0
        own.param_groups[0]["weight_decay"] = 0.0
        before = some[0].detach().clone()
        train(own, some, steps=range(2, 3))
        assert torch.equal(some[0], before)
    assert_equal(copied[0], weights)


class Model(nn.Module):
    """An embedding, a tied head, a projection, a small matrix and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.proj = nn.Linear(32, 40)
        self.tiny = nn.Linear(32, 4, bias=False)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight


def test_groups_say_what_is_projected() -> None:
    model = Model()
    rules = (
        GroupRule(
            name="projected", pattern=r"(proj|tiny)\.weight", required=True, values={"rank": 8}
        ),
        GroupRule(name="rest", pattern=""),
    )
    groups = group_parameters(model.named_parameters(), rules=rules)
    lines = summarise(Optimizer(groups))
    assert [(line.name, line.rank, line.num_tensors, line.num_projected) for line in lines] == [
        ("projected", 8, 2, 1),
        ("rest", 0, 2, 0),
    ]
    assert lines[0].num_projected_parameters == 32 * 40
    # basis 32 x 8, two moments 40 x 8; the small matrix has two of its own shape
    assert lines[0].state_nbytes == 4 * (32 * 8 + 2 * 40 * 8 + 2 * 4 * 32)
    nothing = (GroupRule(name="projected", pattern="q_proj", required=True), *rules[1:])
    with pytest.raises(ConfigError, match="'q_proj' of group projected matches no trainable"):
        group_parameters(model.named_parameters(), rules=nothing)


def test_rules_leave_embeddings_heads_and_vectors_plain() -> None:
    model = Model()
    rules = low_rank_rules({"rank": 4, **METHODS["galore"]})
    groups = group_parameters(model.named_parameters(), rules=rules)
    lines = {line.name: line for line in summarise(Optimizer(groups))}
    assert {name: (line.num_tensors, line.rank) for name, line in lines.items()} == {
        "biases": (1, 0),
        "embeddings": (1, 0),
        "projected": (2, 4),
    }
    chosen = low_rank_rules({"rank": 4}, target=r"^tiny")
    named = group_parameters(model.named_parameters(), rules=chosen)
    assert {group["name"]: len(group["params"]) for group in named} == {
        "biases": 1,
        "projected": 1,
        "matrices": 2,
    }
    with pytest.raises(ConfigError, match="the target 'q_proj' of group projected matches no"):
        group_parameters(model.named_parameters(), rules=low_rank_rules({}, target="q_proj"))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"rank": 65}, "rank=65 projects nothing in this parameter group: its largest matrix has"),
        ({"rank": 4, "proj_type": "both"}, "unknown proj_type 'both'"),
        ({"scale": 0.25, "proj_type": "std"}, "scale, proj_type have no effect without a rank"),
        ({"rank": 4, "norm_growth": 1.1}, "norm_growth=1.1 has no effect: residual 'none'"),
        ({"rank": 4, "basis": "seeded"}, "not orthonormal"),
        ({"bias_correction": "all"}, "unknown bias_correction 'all': use one of both, step, none"),
    ],
)
def test_bad_options_are_refused(group: dict[str, Any], message: str) -> None:
    weights = weights_of(((64, 80), (300,)))
    with pytest.raises(ConfigError, match=message):
        Optimizer([{"params": weights, **group}])


def test_more_bad_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="it has no matrix"):
        Optimizer(weights_of(((300,),)), rank=4)
    with pytest.raises(ConfigError, match="basis have no effect without a rank"):
        Optimizer(weights_of(), basis="random")
    weights, optimizer = make(ROWS["galore"], codec="fp32", dtype=torch.float32)
    train(optimizer, weights, steps=range(1))
    saved = optimizer.state_dict()
    other = make({**ROWS["galore"], "rank": 4}, codec="fp32", dtype=torch.float32)[1]
    with pytest.raises(CheckpointError, match="saved with rank 8, this run has 4"):
        other.load_state_dict(saved)
    other = make(ROWS["galore"], codec="fp32", dtype=torch.float32, basis_storage="int4")[1]
    with pytest.raises(CheckpointError, match="basis_storage 'fp32', this run has 'int4'"):
        other.load_state_dict(saved)
