"""The Triton twins of an optimiser's steps against the eager ones; run by test_step_kernels.py."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn
from triton_interpreter import mend

from nibble.kernels import balancing as balancing_kernels
from nibble.kernels import int8_weights as int8_kernels
from nibble.kernels.steps import triton_kernels
from nibble.numerics import balancing, codec8, int8_weights
from nibble.numerics.rounding import random_bits, stochastic_bfloat16
from nibble.numerics.updates import Hyper, adamw_
from nibble.optim import Optimizer, balanced, projected_step, stores, update
from nibble.optim.shards import ShardView

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TRITON = triton_kernels()
mend()
KEYS = ((-123456789, 2**31 - 5), (77, -3))
PLACES = {"whole": (0, 0, 0, 0), "rows": (2**31 - 300, 40, 0, 0), "columns": (1000, 20, 10, 64)}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def numbers(count: int, place: tuple[int, int, int, int]) -> Tensor:
    base, start, width, stride = place
    at = torch.arange(count, dtype=torch.int64, device=DEVICE) + start
    if width:
        at = at // width * stride + at % width
    return (at + base).to(torch.int32)


def equal_but_for_ties(ours: Tensor, eager: Tensor, *, share: float = 2e-3) -> None:
    """All but a few elements are the same: products may be contracted with sums on the way."""
    assert ours.dtype == eager.dtype and ours.shape == eager.shape
    assert (ours != eager).float().mean().item() <= share


@pytest.mark.parametrize("numel", [1, 255, 256, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_with_8_bit_state(numel: int, dtype: torch.dtype) -> None:
    codes = [codec8.encode(normal(numel, seed=1), signed=True)]
    codes += [codec8.encode(normal(numel, seed=2).square() * 1e-3, signed=False)]
    grad = normal(numel).to(dtype)
    hyper = Hyper(step=3, eps=1e-6)
    moments = [codec8.decode(*code, signed=s) for code, s in zip(codes, (True, False), strict=True)]
    (expected,) = adamw_(
        [grad.float()], states={"exp_avg": moments[:1], "exp_avg_sq": moments[1:]}, hyper=hyper
    )
    update = torch.empty(numel, device=DEVICE)
    c, eps = hyper.denominator()
    TRITON.adamw_(
        grad, codes[0], codes[1], update,
        betas=hyper.betas, correction=c, eps=eps, keys=None, place=PLACES["whole"],
    )  # fmt: skip
    torch.testing.assert_close(update, expected, rtol=2e-6, atol=1e-7)
    for (code, absmax), value, signed in zip(codes, moments, (True, False), strict=True):
        again, largest = codec8.encode(value, signed=signed)
        equal_but_for_ties(code, again)
        torch.testing.assert_close(absmax, largest, rtol=1e-6, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_is_the_one_that_a_search_finds(signed: bool) -> None:
    """Values around every edge and every value of the map: with betas 0 and 1 nothing but the
    codec is left.
    """
    values, edges = codec8.tables(signed, torch.device(DEVICE))
    around = torch.cat([values, edges])
    around = torch.cat([around, around * (1 + 2**-22), around * (1 - 2**-22), around / 3])
    around = around[around.abs() <= 1]
    blocks = torch.zeros(-(-len(around) // 255), 256, device=DEVICE)
    blocks[:, 0] = 1.0  # every block is scaled by 1
    blocks[:, 1:].reshape(-1)
    flat = torch.zeros(blocks.shape[0] * 255, device=DEVICE)
    flat[: len(around)] = around
    blocks[:, 1:] = flat.view(-1, 255)
    want, absmax = codec8.encode_blocks(blocks, signed=signed)
    # m <- m + 1 (g - m) = g; v <- 0 v + 1 g^2, so for v the roots are given.
    grad = blocks if signed else blocks.abs().sqrt()
    moments = [codec8.encode(torch.zeros_like(blocks), signed=s) for s in (True, False)]
    TRITON.adamw_(
        grad, moments[0], moments[1], torch.empty_like(blocks),
        betas=(0.0, 0.0), correction=1.0, eps=1e-8, keys=None, place=PLACES["whole"],
    )  # fmt: skip
    if not signed:
        want, absmax = codec8.encode_blocks(grad * grad, signed=False)
    found = moments[0 if signed else 1]
    assert torch.equal(found[0], want) and torch.equal(found[1], absmax)


def test_a_block_with_nan_stays_nan() -> None:
    grad = normal(600)
    grad[300] = float("nan")
    moments = [codec8.encode(torch.zeros(600, device=DEVICE), signed=s) for s in (True, False)]
    TRITON.adamw_(
        grad, moments[0], moments[1], torch.empty_like(grad),
        betas=(0.9, 0.9), correction=1.0, eps=1e-8, keys=None, place=PLACES["whole"],
    )  # fmt: skip
    assert moments[0][1].isnan().tolist() == [False, True, False]
    assert moments[1][1].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
def test_adamw_with_float_state(state: torch.dtype, place: str) -> None:
    mean, square = normal(1000, seed=1).to(state), normal(1000, seed=2).square().to(state)
    grad = normal(1000)
    hyper = Hyper(step=2)
    moments = [mean.float().clone(), square.float().clone()]
    (expected,) = adamw_(
        [grad], states={"exp_avg": moments[:1], "exp_avg_sq": moments[1:]}, hyper=hyper
    )
    update = torch.empty(1000, device=DEVICE)
    c, eps = hyper.denominator()
    TRITON.adamw_(
        grad, (mean,), (square,), update,
        betas=hyper.betas, correction=c, eps=eps, keys=KEYS, place=PLACES[place],
    )  # fmt: skip
    torch.testing.assert_close(update, expected, rtol=2e-6, atol=1e-7)
    for found, value, key in zip((mean, square), moments, KEYS, strict=True):
        if state == torch.float32:
            torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-7)
            continue
        bits = random_bits(numbers(1000, PLACES[place]), key=key)
        equal_but_for_ties(found, stochastic_bfloat16(value, bits=bits))


FACTORS = {"none": None, "one": (1, 1), "rows": (30, 1), "columns": (1, 70)}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_move(dtype: torch.dtype, factor: str, place: str) -> None:
    weight = normal(30, 70).to(dtype)
    update = None if factor == "one" else normal(30, 70, seed=1).to(torch.bfloat16)
    grad = None if factor == "none" else normal(30, 70, seed=2).to(torch.bfloat16)
    shape = FACTORS[factor]
    f = None if shape is None else normal(*shape, seed=3)
    share = torch.tensor(0.7, device=DEVICE) if factor == "none" else None
    last = factor == "rows"
    whole = torch.zeros(30, 70, device=DEVICE)
    if update is not None:
        whole += update.float()
    if grad is not None and f is not None:
        whole += f * grad.float()
    part = 1.0 if share is None else 0.7
    want = weight.float()
    want = want * (1 - 0.1 * part) - 0.02 * part * whole * (1 - 0.1 * part if last else 1)
    key = KEYS[0] if dtype == torch.bfloat16 else None
    if key is not None:
        want = stochastic_bfloat16(
            want, bits=random_bits(numbers(2100, PLACES[place]), key=key).view(30, 70)
        )
    TRITON.move_(
        weight, update, rate=0.02, decay=0.1, decay_last=last, key=key, place=PLACES[place],
        grad=grad, factor=f, share=share,
    )  # fmt: skip
    if key is None:
        torch.testing.assert_close(weight, want, rtol=1e-5, atol=1e-6)
    else:
        equal_but_for_ties(weight, want)


def test_infinities_and_nan_are_not_rounded() -> None:
    weight = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0], device=DEVICE)
    weight = weight.to(torch.bfloat16)
    TRITON.move_(
        weight, torch.zeros_like(weight), rate=1.0, decay=0.0, decay_last=False, key=KEYS[0],
        place=PLACES["whole"],
    )  # fmt: skip
    assert weight[0] == float("inf") and weight[1] == -float("inf")
    assert weight[2].isnan() and weight[3] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [70, 256, 600])
def test_int8_weights_become_dense(columns: int, dtype: torch.dtype) -> None:
    codes, scales = int8_weights.encode(normal(19, columns), bits=None)
    dense = int8_kernels.decode(codes, scales, dtype=dtype)
    expected = int8_weights.decode(codes, scales, dtype=dtype)
    if DEVICE == "cpu" and dtype == torch.bfloat16:  # the interpreter cuts where a GPU rounds
        torch.testing.assert_close(dense, expected, rtol=2**-7, atol=0)
    else:
        assert torch.equal(dense, expected)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("columns", [70, 256, 600])
def test_move_int8(columns: int, place: str) -> None:
    codes, scales = int8_weights.encode(normal(7, columns), bits=None)
    update = normal(7, columns, seed=1).to(torch.bfloat16)
    grad, factor = normal(7, columns, seed=2), normal(7, 1, seed=3)
    want = int8_weights.decode(codes, scales, dtype=torch.float32) * 0.9
    want = want - 0.02 * (update.float() + factor * grad)
    bits = random_bits(numbers(7 * columns, PLACES[place]), key=KEYS[1]).view(7, columns)
    TRITON.move_int8_(
        codes, scales, update, rate=0.02, decay=0.1, decay_last=False, key=KEYS[1],
        place=PLACES[place], grad=grad, factor=factor,
    )  # fmt: skip
    expected, steps = int8_weights.encode(want, bits=bits)
    torch.testing.assert_close(scales, steps, rtol=1e-5, atol=1e-7)
    equal_but_for_ties(codes, expected)


ROWS = {
    "adamw, bf16 state": {"codec": "bf16", "weight_decay": 0.1},
    "adamw, 8-bit state": {"codec": "8bit"},
    "galore 8-bit": {"codec": "8bit", "rank": 8, "basis": "randomised", "scale": 0.25},
    "galore bf16, full": {
        "codec": "bf16",
        "rank": 8,
        "basis": "randomised",
        "proj_type": "full",
        "decay_last": True,
    },
    "fira": {"rank": 8, "basis": "randomised", "residual": "fira"},
    "balanced": {"rank": 8, "basis": "randomised", "residual": "balanced", "scale": 0.25},
    "apollo": {"rank": 8, "basis": "seeded", "residual": "channel"},
    "apollo-mini": {"rank": 1, "basis": "seeded", "residual": "tensor"},
    "galore lion": {"rank": 8, "basis": "randomised", "rule": "lion"},
    "galore adafactor": {
        "rank": 8,
        "basis": "randomised",
        "rule": "adafactor",
        "parameter_scale": 1e-3,
    },
}


@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
@pytest.mark.parametrize("row", ROWS)
def test_optimisers_step_alike(row: str, int8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimiser with and without the kernels: same addresses, keys, scalars and layouts."""
    words = ROWS[row]
    if int8 and ("rank" not in words or "parameter_scale" in words):
        return

    def run(*, kernels: bool) -> list[Tensor]:
        monkeypatch.setattr(update, "FUSED_NUMEL", 1)
        monkeypatch.setattr(projected_step, "FUSED_NUMEL", 1)
        for module in (update, projected_step, stores, balanced):
            monkeypatch.setattr(module, "step_kernels", lambda _: TRITON if kernels else None)
        # Tall and wide, cut in two along either dim: noise is that of the whole.
        shapes = ((96, 64), (48, 80))
        weights = [nn.Parameter(normal(*s, seed=5).to(torch.bfloat16)) for s in shapes]
        views = {
            w: ShardView(shape=(2 * s[0], s[1]) if d == 0 else (s[0], 2 * s[1]), dim=d, start=s[d])
            for w, s, d in zip(weights, shapes, (0, 1), strict=True)
        }
        optimizer = Optimizer(
            weights, lr=0.05, eps=1e-4, stochastic_rounding=True, views=views, **words
        )
        kept = {}
        if int8:
            for weight in weights:
                codes, scales = int8_weights.encode(weight.detach(), bits=None)
                kept[weight] = stores.Int8Store(codes=codes, scales=scales)
            stores.keep_int8_(optimizer, kept)
        for step in range(3):
            for number, weight in enumerate(weights):
                weight.grad = normal(*weight.shape, seed=10 * step + number).to(torch.bfloat16)
            optimizer.step()
        if int8:
            return [
                int8_weights.decode(s.codes, s.scales, dtype=torch.float32) for s in kept.values()
            ]
        return [w.detach().float() for w in weights]

    for eager, fused in zip(run(kernels=False), run(kernels=True), strict=True):
        # Small matrices stay in 16 bits under kernels; what remains is a unit here and there.
        unit = 2**-7 * eager.abs() if not int8 else eager.abs().amax() / 60
        assert ((eager - fused).abs() <= unit + 2e-3).float().mean() >= 0.995
        # Scales of INT8 groups follow their largest number to the last bit.
        differ = (eager - fused).abs() > (2e-3 * eager.abs() + 1e-3 if int8 else 0)
        assert differ.float().mean() <= 0.2


SIZES = ((1, 1, 1), (3, 5, 7), (2, 4, 1024), (1, 70, 1025), (2, 33, 300))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("programs", [1, 4, 1024])
def test_sums_of_squares(
    size: tuple[int, int, int],
    dtype: torch.dtype,
    programs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Few programs have many tiles each, the last of them none or half of one."""
    monkeypatch.setattr(balancing_kernels, "NUM_PROGRAMS", programs)
    matrices = normal(*size).to(dtype)
    ours, eager = TRITON.balancing.squared_sums(matrices), balancing.squared_sums(matrices)
    columns, rows = normal(size[0], size[2], seed=1).square(), normal(*size[:2], seed=2).square()
    torch.testing.assert_close(ours.over_columns(columns), eager.over_columns(columns))
    torch.testing.assert_close(ours.over_rows(rows), eager.over_rows(rows))
    # Each matrix is its own: bits do not hang on those beside it.
    alone = TRITON.balancing.squared_sums(matrices[-1:].contiguous())
    assert torch.equal(alone.over_columns(columns[-1:])[0], ours.over_columns(columns)[-1])
    assert torch.equal(alone.over_rows(rows[-1:])[0], ours.over_rows(rows)[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 70, 33), (3, 9, 300), (1, 1100, 17), (2, 5, 40)])
@pytest.mark.parametrize("widest", [32, balancing_kernels.WIDEST])
def test_a_round_of_balancing(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int, int], dtype: torch.dtype, widest: int
) -> None:
    monkeypatch.setattr(balancing_kernels, "WIDEST", widest)
    monkeypatch.setattr(balancing_kernels, "HELD", 64)
    matrices = normal(*size).to(dtype)
    matrices[:, -1] = 0.0
    of_columns = normal(size[0], size[2], seed=1).square()
    lengths = [normal(size[0], seed=seed).square() + 1.0 for seed in (2, 3)]
    ours, eager = TRITON.balancing.squared_sums(matrices), balancing.squared_sums(matrices)
    made, expected = (one.balanced_once(of_columns, *lengths) for one in (ours, eager))
    assert not expected[0][:, -1].any(), "rows of zeros have no weight"
    for one, other in zip(made, expected, strict=True):
        torch.testing.assert_close(one, other)
    alone = TRITON.balancing.squared_sums(matrices[-1:].contiguous())
    (last, *_) = zip(*alone.balanced_once(of_columns[-1:], *(x[-1:] for x in lengths)), strict=True)
    for one, own in zip(made, last, strict=True):
        assert torch.equal(own, one[-1])


@pytest.mark.parametrize("num", [1, 1024, 1500])
def test_inverse_means(num: int) -> None:
    sums = normal(3, num).square()
    sums[:, 0] = 0.0
    sums[1, -1] = balancing.NOTHING  # half of it is its mean
    lengths = torch.tensor([0.5, 2.0, 1e3], device=DEVICE)
    expected = balancing.inverse_means_(sums.clone(), lengths)
    assert not expected[:, 0].any() and expected[1, -1] == 0 and expected.isfinite().all()
    torch.testing.assert_close(TRITON.balancing.inverse_means_(sums.clone(), lengths), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 1030), (9, 300)])
def test_scaling_rows_and_columns(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = normal(*shape).to(dtype)
    rows, columns = normal(shape[0], 1, seed=1), normal(1, shape[1], seed=2)
    expected = (matrix.double() * rows * columns).to(dtype)
    for scale_ in (TRITON.balancing.scale_, balancing.scale_):
        made = matrix.clone()
        assert scale_(made, rows, columns) is made
        rtol = 1e-6 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(made, expected, rtol=rtol, atol=0)


def test_the_first_kernel_does_what_it_says() -> None:
    from nibble.kernels.first import launch_first

    launch_first(torch.device(DEVICE))
