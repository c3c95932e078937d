"""What only a GPU can show: no synchronisation, bounded memory, bitsandbytes' kernel."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn

from nibble.numerics import codec8
from nibble.optim import Optimizer, clip_grad_norm_
from nibble.optim.batches import BATCH_NBYTES
from nibble.spec.state import BLOCK, CODECS, RULES

Watch = Callable[[], AbstractContextManager[None]]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def weights_of(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype)) for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    return weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rule", "codec"), list(itertools.product(RULES, CODECS)))
def test_a_step_waits_for_nothing(
    rule: str, codec: str, dtype: torch.dtype, no_waiting: Watch
) -> None:
    weights = weights_of((64, 80), (4099,), (7,), dtype=dtype)
    optimizer = Optimizer(weights, rule=rule, codec=codec, stochastic_rounding=True)
    optimizer.step()  # tables of the codec are copied to the device once
    with no_waiting():
        clip_grad_norm_(weights, 1.0)
        optimizer.step()
    assert all(torch.isfinite(weight).all() for weight in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codec", CODECS)
def test_temporaries_are_bounded(codec: str, dtype: torch.dtype) -> None:
    weights = weights_of((200_000, 512), *[(1024, 16)] * 300, dtype=dtype)  # 107 M elements
    optimizer = Optimizer(weights, codec=codec, stochastic_rounding=True)
    optimizer.step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before <= BATCH_NBYTES


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("codec", ["fp32", "8bit"])
def test_equals_the_cpu(rule: str, codec: str) -> None:
    ours = weights_of((64, 80), (4099,), (7,), dtype=torch.float32)
    theirs = [nn.Parameter(weight.detach().cpu()) for weight in ours]
    on_gpu = Optimizer(ours, rule=rule, codec=codec, weight_decay=0.1)
    on_cpu = Optimizer(theirs, rule=rule, codec=codec, weight_decay=0.1)
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.cpu()
        on_gpu.step()
        on_cpu.step()
    for one, other in zip(ours, theirs, strict=True):
        # A code that lies on an edge may fall to the other side; one step of 1e-3 bounds it.
        difference = (one.cpu() - other).abs()
        assert difference.mean() < 1e-7 and difference.max() < 1e-3


@pytest.mark.parametrize("signed", [True, False])
def test_codes_equal_the_kernel_of_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    x = torch.randn(100_000, device="cuda") * 10 ** (-4 * torch.rand(100_000, device="cuda"))
    x = x if signed else x.square()
    codes, absmax = codec8.encode(x, signed=signed)
    theirs, state = functional.quantize_blockwise(
        x, code=codec8.dynamic_map(signed).cuda(), blocksize=BLOCK
    )
    assert torch.equal(absmax, state.absmax)
    if not signed:
        theirs = torch.where((theirs == 0) & (x > 0), torch.ones_like(theirs), theirs)
    assert (codes != theirs).float().mean() < 1e-4  # x * (1 / absmax) instead of x / absmax
