"""The optimiser against torch and bitsandbytes; its state, its memory bound, its rounding."""

from __future__ import annotations

import itertools

import pytest
import torch
from same_state import assert_equal, leaves
from torch import Tensor, nn

from nibble.errors import CheckpointError, ConfigError
from nibble.optim import Optimizer, batches, clip_grad_norm_
from nibble.spec.state import CODECS, RULES, optimizer_nbytes, state_tensors

torch.set_num_threads(1)

WORDS = {
    "rule",
    "codec",
    "bias_correction",
    "proj_type",
    "basis",
    "basis_storage",
    "residual",
}
"""Keys of groups whose values are words."""
SHAPES = ((64, 80), (5, 7), (300,), (17, 19, 16), (), (4099,))
"""Above and below the 8-bit bound, whole blocks and tails, matrices, vectors, a stack, a scalar."""


def weights_of(
    shapes: tuple[tuple[int, ...], ...] = SHAPES, *, dtype: torch.dtype = torch.float32
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give_grads(weights: list[nn.Parameter], *, step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for weight in weights:
        noise = torch.randn(weight.shape, generator=generator)
        weight.grad = (noise + 0.1 * weight.detach().float()).to(weight.dtype)


def train(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], *, steps: range) -> None:
    for step in steps:
        give_grads(weights, step=step)
        optimizer.step()
        optimizer.zero_grad()


def test_adamw_equals_torch_with_groups() -> None:
    ours, theirs = weights_of(), weights_of()
    shared = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7}

    def groups(weights: list[nn.Parameter]) -> list[dict[str, object]]:
        return [
            {"params": weights[:3], "weight_decay": 0.1},
            {"params": weights[3:], "lr": 1e-2, "weight_decay": 0.0},
        ]

    train(Optimizer(groups(ours), **shared), ours, steps=range(20))
    train(torch.optim.AdamW(groups(theirs), **shared), theirs, steps=range(20))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.linalg.vector_norm(one - other) <= 1e-6 * torch.linalg.vector_norm(other)


TABLE = [
    (rule, codec, dtype)
    for rule, codec in itertools.product(sorted(RULES), CODECS)
    for dtype in (torch.float32, torch.bfloat16)
]


def test_the_table_covers_every_rule_and_codec() -> None:
    assert {(rule, codec) for rule, codec, _ in TABLE} == set(itertools.product(RULES, CODECS))


@pytest.mark.parametrize(("rule", "codec", "dtype"), TABLE)
def test_resume_equals_no_resume(
    rule: str, codec: str, dtype: torch.dtype, tmp_path: object
) -> None:
    def make() -> tuple[list[nn.Parameter], Optimizer]:
        weights = weights_of(dtype=dtype)
        groups = [{"params": weights[:2], "weight_decay": 0.1}, {"params": weights[2:]}]
        options = {"rule": rule, "codec": codec, "stochastic_rounding": True, "seed": 3}
        return weights, Optimizer(groups, lr=1e-2, **options)

    through, optimizer = make()
    train(optimizer, through, steps=range(6))

    stopped, first = make()
    train(first, stopped, steps=range(3))
    file = f"{tmp_path}/optimizer.pt"
    torch.save({"weights": [w.detach() for w in stopped], "optimizer": first.state_dict()}, file)
    saved = torch.load(file, weights_only=True)
    resumed, second = make()
    for weight, value in zip(resumed, saved["weights"], strict=True):
        weight.data.copy_(value)
    second.load_state_dict(saved["optimizer"])
    assert_equal(second.state_dict(), first.state_dict())
    train(second, resumed, steps=range(3, 6))

    assert_equal(resumed, through)
    assert_equal(second.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize(("rule", "codec", "dtype"), TABLE)
def test_state_is_tensors_and_numbers_of_the_planned_bytes(
    rule: str, codec: str, dtype: torch.dtype
) -> None:
    weights = weights_of(dtype=dtype)
    optimizer = Optimizer(weights, rule=rule, codec=codec)
    train(optimizer, weights, steps=range(1))
    state_dict = optimizer.state_dict()
    nbytes = 0
    for leaf in leaves(state_dict["state"]):
        assert type(leaf) is int or isinstance(leaf, Tensor)
        nbytes += leaf.nbytes if isinstance(leaf, Tensor) else 0
    assert nbytes == optimizer_nbytes(rule, codec=codec, shapes=SHAPES)
    for weight, state in zip(weights, state_dict["state"].values(), strict=True):
        planned = state_tensors(rule, codec=codec, shape=tuple(weight.shape))
        found = {
            name: (tuple(value.shape), str(value.dtype).removeprefix("torch."))
            for name, value in state.items()
            if isinstance(value, Tensor)
        }
        assert found == {name: (spec.shape, spec.dtype) for name, spec in planned.items()}
    for group in state_dict["param_groups"]:
        for key, value in group.items():
            for leaf in leaves(value):
                allowed = str if key in WORDS else (int, float, bool)
                assert isinstance(leaf, allowed), (key, leaf)


@pytest.mark.parametrize(("rule", "codec", "dtype"), TABLE)
def test_finds_the_minimum_of_a_quadratic(rule: str, codec: str, dtype: torch.dtype) -> None:
    # 4096 copies, so that the 8-bit codec is in use; every second one is 30 times steeper.
    target = torch.tensor([3.0, -1.0]).repeat(2048).view(64, 64)
    curvature = torch.tensor([0.3, 9.0]).repeat(2048).view(64, 64)
    weight = nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    rates = {"momentum": 0.02}
    betas = (0.9, 0.9) if rule == "lion" else (0.9, 0.999)
    optimizer = Optimizer(
        [weight],
        lr=rates.get(rule, 0.1),
        rule=rule,
        codec=codec,
        betas=betas,
        stochastic_rounding=True,
    )
    peak, steps = optimizer.param_groups[0]["lr"], 200
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = peak * (1 - step / steps)
        weight.grad = (curvature * (weight.detach() - target)).to(dtype)
        optimizer.step()
    error = (weight.detach().float() - target).abs()
    # sgd's slow half shrinks by (1 - 0.03) a step at first and is not done; the others are.
    assert error.mean() < (0.2 if rule == "sgd" else 0.03)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_and_slices_change_nothing(
    rule: str, codec: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = weights_of(dtype=dtype), weights_of(dtype=dtype)
    monkeypatch.setattr(batches, "_UNPACKED_BYTES", 8)
    train(Optimizer(whole, rule=rule, codec=codec, weight_decay=0.1), whole, steps=range(2))
    # 1024 elements a batch: the large tensors are sliced in up to five, the last one not whole.
    monkeypatch.setattr(batches, "BATCH_NBYTES", 8 * 1024)
    train(Optimizer(cut, rule=rule, codec=codec, weight_decay=0.1), cut, steps=range(2))
    for one, other in zip(whole, cut, strict=True):
        if codec == "bf16":  # its noise is drawn batch by batch
            assert torch.allclose(one.float(), other.float(), atol=1e-3, rtol=1e-2)
        else:
            assert torch.equal(one, other)


def test_bfloat16_second_moment_does_not_stall() -> None:
    # To nearest, v would stop far below its limit 1, since 0.001 * v is under half a unit.
    weight = nn.Parameter(torch.zeros(64, 64))
    optimizer = Optimizer([weight], lr=0.0, codec="bf16")
    for _ in range(1500):
        weight.grad = torch.ones(64, 64)
        optimizer.step()
    mean = optimizer.state[weight]["exp_avg_sq"].float().mean().item()
    assert mean == pytest.approx(1 - 0.999**1500, rel=0.01)


def test_stochastic_rounding_where_nearest_stalls() -> None:
    def moved(*, stochastic: bool, seed: int = 0) -> Tensor:
        weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = Optimizer(
            [weight], lr=1e-4, rule="sgd", stochastic_rounding=stochastic, seed=seed
        )
        for _ in range(200):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return weight.detach()

    # An update of 1e-4 is below half a unit of bfloat16 at 1 (1/512): nearest never moves.
    assert torch.equal(moved(stochastic=False), torch.ones(64, 64, dtype=torch.bfloat16))
    walked = moved(stochastic=True)
    assert walked.float().mean().item() == pytest.approx(1 - 200 * 1e-4, abs=5e-4)
    assert torch.equal(walked, moved(stochastic=True))
    assert not torch.equal(walked, moved(stochastic=True, seed=1))


def test_loading_keeps_dtypes_and_shares_nothing() -> None:
    weights, others = weights_of(dtype=torch.bfloat16), weights_of(dtype=torch.bfloat16)
    first = Optimizer(weights, codec="8bit")
    train(first, weights, steps=range(2))
    second = Optimizer(others, codec="8bit")
    calls: list[str] = []
    second.register_load_state_dict_pre_hook(
        lambda _, given: calls.append(f"{len(given['state'])}")
    )
    second.register_load_state_dict_post_hook(lambda own: calls.append(f"{len(own.state)}"))
    second.load_state_dict(first.state_dict())
    assert calls == ["6", "6"]
    state = second.state[others[0]]
    assert state["exp_avg_codes"].dtype == torch.uint8
    assert state["exp_avg_absmax"].dtype == torch.float32
    assert second.state[others[1]]["exp_avg"].dtype == torch.float32
    before = state["exp_avg_codes"].clone()
    train(first, weights, steps=range(2, 4))
    assert torch.equal(state["exp_avg_codes"], before)


def test_loading_the_wrong_state_is_refused() -> None:
    weights = weights_of()
    optimizer = Optimizer(weights, codec="8bit")
    train(optimizer, weights, steps=range(1))
    saved = optimizer.state_dict()
    with pytest.raises(CheckpointError, match="codec '8bit', this run has 'fp32'"):
        Optimizer(weights_of()).load_state_dict(saved)
    with pytest.raises(CheckpointError, match=r"groups of \[6\] tensors, this run has \[5\]"):
        Optimizer(weights_of()[:5], codec="8bit").load_state_dict(saved)
    with pytest.raises(CheckpointError, match="another model"):
        Optimizer(weights_of(SHAPES[1:] + SHAPES[:1]), codec="8bit").load_state_dict(saved)


def test_in_an_ordinary_loop() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    optimizer = Optimizer(model[0].parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    optimizer.add_param_group({"params": model[1].parameters(), "rule": "lion", "lr": 1e-3})
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    losses = []
    frozen = model[1].bias
    for _ in range(10):
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        frozen.grad = None  # a parameter without a gradient stays and keeps no state
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)
    assert frozen not in optimizer.state
    assert optimizer.step(lambda: 4.0) == 4.0


def test_strided_weights_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "BATCH_NBYTES", 8 * 1024)
    plain = nn.Parameter(torch.arange(96.0 * 64).view(96, 64) / 6144)
    strided = nn.Parameter(plain.detach().t().contiguous().t())
    assert not strided.is_contiguous()
    for weight in (plain, strided):
        optimizer = Optimizer([weight], codec="8bit", lr=1e-2)
        for step in range(3):
            weight.grad = torch.sin(torch.arange(6144.0) + step).view(64, 96).t()
            optimizer.step()
    assert torch.allclose(plain, strided, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "adam"}, "unknown update rule 'adam': use one of adamw, sgd, momentum"),
        ({"codec": "4bit"}, "unknown codec '4bit': use one of fp32, bf16, 8bit"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]=1.0"),
        ({"weigth_decay": 0.1}, "unknown parameter-group keys weigth_decay"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Optimizer([{"params": weights_of(), **options}])


def test_bad_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="float64"):
        Optimizer([nn.Parameter(torch.zeros(2, dtype=torch.float64))])
    weight = nn.Parameter(torch.zeros(4, 4))
    weight.grad = torch.zeros(4, 4).to_sparse()
    with pytest.raises(ConfigError, match="sparse"):
        Optimizer([weight]).step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [0.5, 1e6, None])
def test_clipping_equals_torch(dtype: torch.dtype, max_norm: float | None) -> None:
    ours, theirs = weights_of(dtype=dtype), weights_of()
    give_grads(ours, step=0)
    for one, other in zip(ours, theirs, strict=True):
        other.grad = one.grad.float().clone()
    norm = clip_grad_norm_(ours, max_norm)
    expected = nn.utils.clip_grad_norm_(theirs, float("inf") if max_norm is None else max_norm)
    assert norm.dtype == torch.float32 and norm.dim() == 0
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(
            one.grad.float(), other.grad, rtol=2**-8 if dtype != torch.float32 else 1e-6
        )


def test_clipping_edges() -> None:
    assert clip_grad_norm_(weights_of(), 1.0).item() == 0.0
    weights = weights_of()
    give_grads(weights, step=0)
    weights[1].grad[0, 0] = float("nan")
    assert clip_grad_norm_(weights, 1.0).isnan()
    mixed = [*weights_of(((3,),)), *weights_of(((4,),), dtype=torch.bfloat16)]
    mixed[0].grad, mixed[1].grad = torch.full((3,), 2.0), torch.ones(4, dtype=torch.bfloat16)
    assert clip_grad_norm_(mixed, 2.0).item() == 4.0
    assert torch.allclose(mixed[1].grad.float(), torch.full((4,), 0.5))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("codec", CODECS)
def test_state_made_ahead_changes_nothing(rule: str, codec: str) -> None:
    found = []
    for ahead in (False, True):
        weights = weights_of()
        optimizer = Optimizer(weights, rule=rule, codec=codec, lr=1e-2)
        if ahead:
            optimizer.make_state()
            before = {weight: dict(optimizer.state[weight]) for weight in weights}
            assert all(state["step"] == 0 for state in before.values())
        train(optimizer, weights, steps=range(2))
        if ahead:
            kept = [
                optimizer.state[w][name] is value
                for w, state in before.items()
                for name, value in state.items()
                if isinstance(value, Tensor)
            ]
            assert all(kept), "steps write into what was made"
            optimizer.make_state()
        found.append([weights, *leaves(list(optimizer.state.values()))])
    for one, other in zip(leaves(found[0]), leaves(found[1]), strict=True):
        same = torch.equal(one, other) if isinstance(one, Tensor) else one == other
        assert same
