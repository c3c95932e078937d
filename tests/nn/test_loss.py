"""The chunked loss against torch's own cross entropy on full logits: values, gradients, memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nibble.nn.loss import IGNORE, causal_lm_loss, classification_loss, full_logits_loss

ROWS, LENGTH, DIM, VOCAB = 3, 17, 24, 211


def softcap(logits: Tensor) -> Tensor:
    return 5.0 * torch.tanh(logits / 5.0)


def scaled(logits: Tensor) -> Tensor:
    return logits * 0.0625


class Wrapped(nn.Module):
    """A head that is no plain linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def case(
    *, bias: bool, frozen: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, nn.Linear]:
    gen = torch.Generator().manual_seed(7)
    hidden = torch.randn(ROWS, LENGTH, DIM, generator=gen).to(dtype).requires_grad_()
    labels = torch.randint(VOCAB, (ROWS, LENGTH), generator=gen)
    labels[torch.rand(ROWS, LENGTH, generator=gen) < 0.6] = IGNORE
    labels[1] = IGNORE
    head = nn.Linear(DIM, VOCAB, bias=bias, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCAB, DIM, generator=gen))
        if bias:
            head.bias.copy_(torch.randn(VOCAB, generator=gen))
    return hidden, labels, head.requires_grad_(not frozen)


def reference(hidden: Tensor, labels: Tensor, head: nn.Linear, transform: object) -> Tensor:
    logits = head(hidden).float()
    logits = transform(logits) if callable(transform) else logits
    return F.cross_entropy(
        logits.view(-1, VOCAB), labels.view(-1), ignore_index=IGNORE, reduction="sum"
    )


def gradients(loss: Tensor, hidden: Tensor, head: nn.Linear) -> list[Tensor]:
    wanted = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    return list(torch.autograd.grad(loss / 13, wanted))  # a factor, as the loop's tokens of a step


@pytest.mark.parametrize("chunk", [1, 16, 1000])
@pytest.mark.parametrize("transform", [None, softcap, scaled])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("wrap", [False, True])
def test_value_and_gradients_are_exact_in_fp32(
    chunk: int, transform: object, bias: bool, frozen: bool, wrap: bool
) -> None:
    hidden, labels, head = case(bias=bias, frozen=frozen)
    expected = reference(hidden, labels, head, transform)
    num = int((labels != IGNORE).sum())
    for known in (None, num):
        loss, targets = causal_lm_loss(
            hidden, labels, Wrapped(head) if wrap else head,
            chunk=chunk, transform=transform, num_targets=known,  # type: ignore[arg-type]
        )  # fmt: skip
        assert targets == num and loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        ours, theirs = gradients(loss, hidden, head), gradients(expected.clone(), hidden, head)
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).abs().max() <= 1e-6
        expected = reference(hidden, labels, head, transform)


@pytest.mark.parametrize("frozen", [True, False])
def test_bf16_is_as_close_to_the_truth_as_the_plain_loss(frozen: bool) -> None:
    hidden, labels, head = case(bias=False, frozen=frozen, dtype=torch.bfloat16)
    loss, _ = causal_lm_loss(hidden, labels, head, chunk=16)
    ours = [loss, *gradients(loss, hidden, head)]
    plain_loss = reference(hidden, labels, head, None)
    plain = [plain_loss, *gradients(plain_loss, hidden, head)]
    wide_head = nn.Linear(DIM, VOCAB, bias=False)
    wide_head.weight.data.copy_(head.weight.data)
    wide_head.requires_grad_(not frozen)
    wide = hidden.detach().float().requires_grad_()
    true_loss = reference(wide, labels, wide_head, None)
    truth = [true_loss, *gradients(true_loss, wide, wide_head)]
    for a, p, t in zip(ours, plain, truth, strict=True):
        error, plain_error = ((x.float() - t).norm() / t.norm() for x in (a, p))
        assert error < 1e-2 and error <= 1.2 * plain_error + 1e-6


def test_a_tied_head_gathers_both_gradients() -> None:
    def run(fused: bool) -> Tensor:
        torch.manual_seed(0)
        table = nn.Embedding(VOCAB, DIM)
        head = nn.Linear(DIM, VOCAB, bias=False)
        head.weight = table.weight
        ids = torch.arange(40).view(2, 20)
        labels = ids.roll(-1, 1)
        hidden = table(ids).tanh()
        loss = (
            causal_lm_loss(hidden, labels, head, chunk=16)[0]
            if fused
            else reference(hidden, labels, head, None)
        )
        loss.backward()
        assert table.weight.grad is not None
        return table.weight.grad

    torch.testing.assert_close(run(True), run(False), atol=1e-5, rtol=1e-5)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_well_learnt_tokens_keep_their_small_gradients() -> None:
    """In bf16, p - 1 is 0 for p = 0.999; its true value is what still has to be learnt."""
    hidden = torch.eye(4, dtype=torch.bfloat16).requires_grad_()
    head = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    head.weight.data.copy_(8 * torch.eye(4))  # p = 1 / (1 + 3 e^-8) = 0.998995
    loss, _ = causal_lm_loss(hidden, torch.arange(4), head, chunk=16)
    (grad,) = torch.autograd.grad(loss, hidden)
    left = 1 - 1 / (1 + 3 * math.exp(-8))
    assert grad.diagonal().float().tolist() == pytest.approx([-8 * left] * 4, rel=0.01)


def test_a_transform_that_does_nothing_costs_nothing() -> None:
    hidden, labels, head = case(bias=False, frozen=True)
    calls = []

    def identity(logits: Tensor) -> Tensor:
        calls.append(logits.numel())
        return logits

    loss, _ = causal_lm_loss(hidden, labels, head, chunk=16, transform=identity)
    assert calls == [1] and torch.equal(loss, causal_lm_loss(hidden, labels, head, chunk=16)[0])


@pytest.mark.parametrize("wrap", [False, True])
def test_no_tensor_ever_holds_more_logits_than_a_chunk(wrap: bool) -> None:
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 256, 8, generator=gen).requires_grad_()
    labels = torch.randint(997, (1, 256), generator=gen)
    head = nn.Linear(8, 997, bias=False).requires_grad_(False)
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss, _ = causal_lm_loss(hidden, labels, Wrapped(head) if wrap else head, chunk=16)
        loss.backward()
    assert largest.numel == 16 * 997  # all of them would be 256 * 997
    assert max(saved) <= 16 * 997 if wrap else max(saved) == 256 * 8


def test_masked_positions_never_reach_the_head() -> None:
    hidden, labels, head = case(bias=False, frozen=True)
    rows: list[int] = []

    class Counting(Wrapped):
        def forward(self, x: Tensor) -> Tensor:
            rows.append(x.shape[0])
            return super().forward(x)

    with torch.no_grad():
        causal_lm_loss(hidden, labels, Counting(head), chunk=16)
    assert sum(rows) == int((labels != IGNORE).sum()) < labels.numel() / 2


def test_nothing_to_learn_gives_zero_and_a_zero_gradient() -> None:
    hidden, labels, head = case(bias=False, frozen=True)
    loss, num = causal_lm_loss(hidden, torch.full_like(labels, IGNORE), head, chunk=16)
    loss.backward()
    assert num == 0 and loss.item() == 0 and hidden.grad is not None and not hidden.grad.any()


def test_evaluation_makes_no_gradient() -> None:
    hidden, labels, head = case(bias=False, frozen=True)
    with torch.no_grad(), Largest() as largest:
        loss, _ = causal_lm_loss(hidden, labels, head, chunk=16)
    assert not loss.requires_grad and largest.numel <= VOCAB * DIM  # the head itself
    torch.testing.assert_close(loss, reference(hidden, labels, head, None), rtol=1e-6, atol=0)


def test_autocast_computes_the_head_in_its_type() -> None:
    hidden, labels, head = case(bias=False, frozen=False)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = causal_lm_loss(hidden, labels, head, chunk=16)
        expected = reference(hidden, labels, head, None)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for a, b in zip(gradients(loss, hidden, head), gradients(expected, hidden, head), strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() / b.norm() < 1e-2


def test_full_logits_and_classes_are_torchs_sums() -> None:
    hidden, labels, head = case(bias=True, frozen=False)
    loss, num = full_logits_loss(head(hidden), labels)
    torch.testing.assert_close(loss, reference(hidden, labels, head, None), rtol=1e-6, atol=0)
    assert num == int((labels != IGNORE).sum())
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 2, 1, 1, 0, 2])
    loss, num = classification_loss(logits, classes)
    expected = -logits.log_softmax(-1)[torch.arange(6), classes].sum()
    assert num == 6 and torch.allclose(loss, expected)
    numbers = torch.linspace(-1, 1, 6)
    loss, _ = classification_loss(logits[:, :1], numbers)
    assert torch.allclose(loss, ((logits[:, 0] - numbers) ** 2).sum())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_is_never_waited_for_and_gives_the_same(
    no_waiting: Callable[[], AbstractContextManager[None]],
) -> None:
    gen = torch.Generator().manual_seed(0)
    labels = torch.randint(4096, (2, 512), generator=gen)
    labels[:, :200] = IGNORE
    num = int((labels != IGNORE).sum())
    hidden = torch.randn(2, 512, 256, generator=gen)
    weight = torch.randn(4096, 256, generator=gen) / 16
    found = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        x = hidden.to(device, dtype).clone().requires_grad_()
        head = nn.Linear(256, 4096, bias=False, device=device, dtype=dtype)
        head.weight.data.copy_(weight)
        targets = labels.to(device)
        if device == "cuda":
            # The first backward of a process waits for libraries that are loaded then.
            causal_lm_loss(x, targets, head, chunk=128, num_targets=num)[0].backward()
            x.grad, head.weight.grad = None, None
        with no_waiting() if device == "cuda" else nullcontext():
            loss, _ = causal_lm_loss(x, targets, head, chunk=128, num_targets=num)
            (loss / num).backward()
        assert x.grad is not None and head.weight.grad is not None
        found.append([t.float().cpu() for t in (loss, x.grad, head.weight.grad)])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() / a.norm() < 1e-2
