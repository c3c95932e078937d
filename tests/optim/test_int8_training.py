"""Training INT8 weights: gradients, small updates, layer-wise mode, resume, moving and saving."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nibble.errors import ConfigError
from nibble.nn.int8_weights import Int8Linear, int8_linears_
from nibble.numerics import int8_weights
from nibble.optim import Int8Store, Optimizer, batches, keep_int8_, layerwise_
from nibble.optim.projected_grad import ProjectedGrad

torch.set_num_threads(1)

Q_GALORE = {"codec": "8bit", "basis_storage": "int4", "lazy_threshold": 0.4}


def build(*, int8: bool = True, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(40, 300), nn.SiLU(), nn.LayerNorm(300), nn.Linear(300, 40, bias=False)
    ).to(dtype)
    if int8:
        int8_linears_(model, r"^[03]$")
    return model


def optimizer_of(model: nn.Module, **options: Any) -> Optimizer:
    matrices = [module.weight for module in model.modules() if isinstance(module, Int8Linear)]
    ids = {id(weight) for weight in matrices}
    rest = [param for param in model.parameters() if id(param) not in ids]
    low_rank = {"rank": 8, "basis": "randomised", "update_proj_gap": 5, **options}
    groups = [{"params": rest}, {"params": matrices or [model[0].weight], **low_rank}]
    optimizer = Optimizer(groups, lr=5e-3, seed=1)
    stores = {
        module.weight: Int8Store(codes=module.codes, scales=module.scales)
        for module in model.modules()
        if isinstance(module, Int8Linear)
    }
    keep_int8_(optimizer, stores)
    return optimizer


def loss_of(model: nn.Module, *, step: int, rows: slice = slice(None)) -> Tensor:
    x = torch.randn(64, 40, generator=torch.Generator().manual_seed(step))
    aim = torch.sin(2 * x.roll(1, 1))
    dtype = next(model.parameters()).dtype
    return (model(x[rows].to(dtype)).float() - aim[rows]).square().sum() / aim.numel()


def train(model: nn.Module, optimizer: Optimizer, *, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        for rows in (slice(0, 32), slice(32, 64)):
            loss_of(model, step=step, rows=rows).backward()
        optimizer.step()


def test_forward_and_gradients_are_those_of_the_dense_weight() -> None:
    model = build()
    dense = build(int8=False)
    for name in ("0", "3"):
        ours, plain = model.get_submodule(name), dense.get_submodule(name)
        assert (plain.weight - ours.dense(torch.float32)).abs().max() < 0.6 / 127 * 0.2
        plain.weight.data = ours.dense(torch.float32)
    x = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(3))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for net, value in zip((model, dense), inputs, strict=True):
        net(value).square().sum().backward()
    assert torch.allclose(inputs[0].grad, inputs[1].grad, atol=1e-5)
    for one, other in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_updates_far_below_a_step_add_up() -> None:
    def mean_move(*, nearest: bool, monkeypatch: pytest.MonkeyPatch) -> float:
        linear = nn.Linear(256, 64, bias=False)
        generator = torch.Generator().manual_seed(0)
        linear.weight.data = torch.rand(64, 256, generator=generator) - 0.5
        module = Int8Linear(linear)
        before = module.dense(torch.float32)
        options = {"rank": 64, "rule": "sgd", "basis": "random"}
        optimizer = Optimizer([module.weight], lr=1e-5, **options)
        keep_int8_(optimizer, {module.weight: Int8Store(codes=module.codes, scales=module.scales)})
        if nearest:
            encode = int8_weights.encode
            monkeypatch.setattr(
                int8_weights, "encode", lambda values, bits: encode(values, bits=None)
            )
        # A full-rank basis of the smaller side: the update is the gradient, a 400th of a step.
        for _ in range(100):
            module.weight.grad = torch.ones(64, 256)
            optimizer.step()
        return (module.dense(torch.float32) - before).mean().item()

    patch = pytest.MonkeyPatch()
    assert mean_move(nearest=False, monkeypatch=patch) == pytest.approx(-1e-3, rel=0.05)
    assert mean_move(nearest=True, monkeypatch=patch) == pytest.approx(0, abs=1e-5)
    patch.undo()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_nearly_as_well_as_float_weights(dtype: torch.dtype) -> None:
    def final(*, int8: bool) -> float:
        model = build(int8=int8, dtype=dtype)
        if int8:
            optimizer = optimizer_of(model, **Q_GALORE)
        else:
            low_rank = {"rank": 8, "basis": "randomised", "update_proj_gap": 5}
            optimizer = Optimizer(model.parameters(), lr=5e-3, **low_rank)
        layerwise_(optimizer)
        train(model, optimizer, steps=range(60))
        return loss_of(model, step=999).item()

    start = loss_of(build(int8=False), step=999).item()
    quantised, plain = final(int8=True), final(int8=False)
    assert plain < 0.85 * start
    assert quantised < start - 0.85 * (start - plain)


def test_no_float_copy_of_a_matrix_and_no_full_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(dtype=torch.bfloat16)
    optimizer = optimizer_of(model, **Q_GALORE)
    layerwise_(optimizer)
    monkeypatch.setattr(batches, "BATCH_NBYTES", 16 * 2000)
    largest = 0
    decode = int8_weights.decode

    def watched(codes: Tensor, scales: Tensor, *, dtype: torch.dtype) -> Tensor:
        nonlocal largest
        if dtype == torch.float32:
            largest = max(largest, codes.numel())
        return decode(codes, scales, dtype=dtype)

    monkeypatch.setattr(int8_weights, "decode", watched)
    train(model, optimizer, steps=range(3))
    assert 0 < largest <= 2000
    assert isinstance(model[0].weight.grad, ProjectedGrad)
    assert model[0].weight.untyped_storage().nbytes() == 2
    weights = sum(b.nbytes for m in model for b in m.buffers())
    assert weights == 2 * 40 * 300 + 4 * (300 + 40 * 2)


def test_resume_equals_no_resume(tmp_path: Path) -> None:
    through = build(dtype=torch.bfloat16)
    optimizer = optimizer_of(through, **Q_GALORE)
    layerwise_(optimizer)
    train(through, optimizer, steps=range(9))

    stopped = build(dtype=torch.bfloat16)
    first = optimizer_of(stopped, **Q_GALORE)
    layerwise_(first)
    train(stopped, first, steps=range(4))
    file = tmp_path / "state.pt"
    torch.save({"model": stopped.state_dict(), "optimizer": first.state_dict()}, file)
    saved = torch.load(file, weights_only=True)
    assert "0.weight" not in saved["model"] and saved["model"]["0.codes"].dtype == torch.int8
    resumed = build(dtype=torch.bfloat16)
    second = optimizer_of(resumed, **Q_GALORE)
    layerwise_(second)
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    train(resumed, second, steps=range(4, 9))
    ours, theirs = resumed.state_dict(), through.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_moving_keeps_scales_and_the_stand_in() -> None:
    model = build()
    scales = model[0].scales.clone()
    model.to(torch.bfloat16)
    assert torch.equal(model[0].scales, scales) and model[0].codes.dtype == torch.int8
    assert model[0].weight.dtype == torch.bfloat16
    assert model[0].weight.untyped_storage().nbytes() == 2
    assert model[0].weight.shape == (300, 40)
    other = copy.deepcopy(model)
    assert torch.equal(other[0].dense(torch.float32), model[0].dense(torch.float32))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="'q_proj' matches no linear"):
        int8_linears_(build(int8=False), "q_proj")
    model = build()
    plain = Optimizer(model.parameters())
    store = Int8Store(codes=model[0].codes, scales=model[0].scales)
    with pytest.raises(ConfigError, match="is not projected by the optimiser"):
        keep_int8_(plain, {model[0].weight: store})
    with pytest.raises(ConfigError, match="do not fit a parameter"):
        keep_int8_(optimizer_of(model), {model[3].weight: store})
