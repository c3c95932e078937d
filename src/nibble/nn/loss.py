"""The loss of the next token without ever holding all the logits.

Idea. Logits of n tokens over a vocabulary V in fp32 take 4 n V bytes: 2 GiB for 4096 tokens of
Llama 3, and autograd keeps several copies. Only positions that have a target matter, and the
gradient of a sum of cross entropies is known as soon as its logits are, so the rows are taken
`chunk` at a time, and each chunk's gradient is formed while its logits are still there:

    z = f(h W^T + b)       L = sum_t (logsumexp z_t - z_t,y_t)
    dL/dz = softmax(z) - onehot(y)       dL/dh = f'(dL/dz) W       dL/dW += f'(dL/dz)^T h

f is the family's logit transform (soft cap, scale). Backward only multiplies by the incoming
number, which is exact as the loss is a sum. Logits, softmax and dL/dW are fp32; the products are in
the type of h, as a plain head's would be.

Costs: h of the rows with targets once more, and chunk * V * (size of h) bytes while it runs (as
eager code 4 a logit more). A trained head costs the lesser of two: V * D * 4 bytes for dL/dW, or V
* n * (size of h) for dL/dz of all rows, of which backward makes dL/dW in one product (fp16, whose
range an unscaled sum may leave, always takes the former). Nothing is computed twice. A head that is
not a plain linear layer (wrapped by an adapter, quantised) is called as it is, chunk by chunk under
activation checkpointing: the head is then run twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nibble.kernels.layers import layer_kernels

IGNORE = -100
"""The label of a position that has no target."""

LogitTransform = Callable[[Tensor], Tensor]


def causal_lm_loss(
    hidden: Tensor,
    labels: Tensor,
    head: nn.Module,
    *,
    chunk: int,
    transform: LogitTransform | None = None,
    num_targets: int | None = None,
) -> tuple[Tensor, int]:
    """Sum of the cross entropies of the next tokens, fp32 scalar, and how many there are.

    hidden: [..., D], what the head reads. labels: [...], already shifted (labels[t] is the target
    of position t), -100 where there is none. chunk: rows of logits alive at a time. transform:
    applied to fp32 logits, row by row. num_targets: how many labels count, if the host knows;
    counting them reads from the device.
    """
    rows, targets = select_targets(hidden, labels, num_targets=num_targets)
    if transform is not None:
        probe = torch.zeros(1)
        if transform(probe) is probe:  # nothing to do: the faster way without fp32 logits
            transform = None
    if type(head) is nn.Linear:
        dtype = rows.dtype
        if torch.is_autocast_enabled(rows.device.type):
            dtype = torch.get_autocast_dtype(rows.device.type)
        weight: Tensor = head.weight
        bias: Tensor | None = head.bias
        if not torch.is_grad_enabled():  # inside of the function a weight that learns looks alike
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        words = (rows.to(dtype), weight, bias, targets, chunk, transform)
        loss: Tensor = _FusedLoss.apply(*words)  # type: ignore[no-untyped-call]
    else:
        loss = _module_loss(rows, targets, head, chunk, transform)
    return loss, targets.numel()


def select_targets(
    hidden: Tensor, labels: Tensor, *, num_targets: int | None = None
) -> tuple[Tensor, Tensor]:
    """The rows that have a target: hidden [..., D], labels [...] -> [n, D], [n], in order."""
    flat = labels.reshape(-1)
    if num_targets is None:
        index = (flat != IGNORE).nonzero().flatten()
    else:
        # A stable sort leaves the device alone; `nonzero` would wait for it to know the size.
        index = (flat == IGNORE).to(torch.uint8).argsort(stable=True)[:num_targets]
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, index), flat.index_select(0, index)


def full_logits_loss(
    logits: Tensor, labels: Tensor, *, num_targets: int | None = None
) -> tuple[Tensor, int]:
    """The same sum from logits that a family insists on making in full: [..., V] and [...] -> fp32
    scalar, count.
    """
    rows, targets = select_targets(logits, labels, num_targets=num_targets)
    return F.cross_entropy(rows.float(), targets, reduction="sum"), targets.numel()


def classification_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Sum over rows of the cross entropy, or of the squared error when there is one output; and the
    number of rows.

    logits: [rows, classes]. labels: [rows], integers, or numbers for one output (regression).
    """
    if logits.shape[-1] == 1:
        return F.mse_loss(
            logits.float().squeeze(-1), labels.float(), reduction="sum"
        ), labels.numel()
    return F.cross_entropy(logits.float(), labels.long(), reduction="sum"), labels.numel()


class _FusedLoss(torch.autograd.Function):
    """Forward makes loss and gradients chunk by chunk; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
        transform: LogitTransform | None,
    ) -> Tensor:
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        with torch.autocast(rows.device.type, enabled=False):
            head = weight.to(rows.dtype)
            grad_rows = torch.empty_like(rows) if needs_rows else None
            keeps = needs_weight and _keeps_logits(rows, weight)
            kept = rows.new_empty((rows.shape[0], weight.shape[0])) if keeps else None
            grad_weight = None
            if needs_weight and not keeps:
                grad_weight = torch.zeros_like(weight, dtype=torch.float32)
            grad_bias = None
            if bias is not None and needs_bias:
                grad_bias = torch.zeros_like(bias, dtype=torch.float32)
            total = torch.zeros((), dtype=torch.float32, device=rows.device)
            for begin in range(0, rows.shape[0], chunk):
                part = slice(begin, begin + chunk)
                loss, grad = _chunk_loss(
                    _logits(rows[part], head, bias),
                    targets[part],
                    transform,
                    need_grad=any(ctx.needs_input_grad),
                )
                total += loss
                if grad is None:
                    continue
                if grad_bias is not None:
                    grad_bias += grad.sum(0, dtype=torch.float32)
                grad = grad.to(rows.dtype)
                if grad_rows is not None:
                    torch.mm(grad, head, out=grad_rows[part])
                if kept is not None:
                    kept[part] = grad
                if grad_weight is not None:
                    grad_weight += grad.T @ rows[part]
                del grad  # or two chunks' logits would be alive while the next are made
        ctx.save_for_backward(
            grad_rows, grad_weight, grad_bias, kept, None if kept is None else rows
        )
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        scale = grad_outputs[0]
        grad_rows, grad_weight, grad_bias, kept, rows = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        if kept is not None:
            made = (kept.T @ rows).mul_(scale).to(weight_dtype)
        else:
            made = None if grad_weight is None else _scaled(grad_weight, scale, weight_dtype)
        return (
            None if grad_rows is None else grad_rows * scale,
            made,
            None if grad_bias is None else (grad_bias * scale).to(bias_dtype),
            None, None, None,
        )  # fmt: skip


def _keeps_logits(rows: Tensor, weight: Tensor) -> bool:
    """Whether dL/dz of all rows is smaller than dL/dW in fp32, and may be what is kept."""
    wide = rows.dtype in (torch.float32, torch.bfloat16)
    return wide and rows.shape[0] * rows.element_size() <= weight.shape[1] * 4


def _scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * scale in `dtype`, by rows: no second fp32 copy of a head is made."""
    made = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    for target, part in zip(torch.split(made, 4096), torch.split(grad, 4096), strict=True):
        target.copy_(part * scale)
    return made


def _logits(rows: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
    """h W^T, in the type of h, or in fp32 where a bias is added."""
    raw = F.linear(rows, head)
    return raw if bias is None else raw.float().add_(bias)


def _chunk_loss(
    raw: Tensor, targets: Tensor, transform: LogitTransform | None, *, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Summed loss of logits [n, V] in fp32 arithmetic, and its gradient by them.

    The gradient is in the type of `raw`, where the logits were, or fp32 behind a transform.
    """
    if transform is None:
        cross_entropy_ = layer_kernels(raw.device.type).cross_entropy_
        return cross_entropy_(raw, targets, need_grad=need_grad).sum(), raw if need_grad else None
    raw = raw.detach().float().requires_grad_(need_grad)
    with torch.set_grad_enabled(need_grad):
        through = transform(raw)
    logits = through.detach().clone()
    loss = layer_kernels(raw.device.type).cross_entropy_(logits, targets, need_grad=need_grad).sum()
    if not need_grad:
        return loss, None
    (grad,) = torch.autograd.grad(through, raw, logits)
    return loss, grad


def _module_loss(
    rows: Tensor, targets: Tensor, head: nn.Module, chunk: int, transform: LogitTransform | None
) -> Tensor:
    """The same sum through any head module, logits of one chunk alive at a time and made again in
    backward.
    """

    def part(some_rows: Tensor, some_targets: Tensor) -> Tensor:
        logits = head(some_rows).float()
        if transform is not None:
            logits = transform(logits)
        return F.cross_entropy(logits, some_targets, reduction="sum")

    total = torch.zeros((), dtype=torch.float32, device=rows.device)
    for some_rows, some_targets in zip(
        torch.split(rows, chunk), torch.split(targets, chunk), strict=True
    ):
        if torch.is_grad_enabled():
            total = total + checkpoint(part, some_rows, some_targets, use_reentrant=False)
        else:
            total = total + part(some_rows, some_targets)
    return total
