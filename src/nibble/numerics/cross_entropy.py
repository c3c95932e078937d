"""Cross entropy of rows of logits, which become their own gradient.

    m = max_j z_j,  o = sum_{j != t} exp(z_j - m),  s = o + exp(z_t - m)
    L = m + log s - z_t,    dL/dz_j = exp(z_j - m) / s,    dL/dz_t = -o / s

-o / s is p - 1 without the subtraction, which in 16 bit would round the small gradients of
well-learnt tokens to zero. A row with a negative target has none: its loss and gradient are 0. All
arithmetic is fp32; the gradient is rounded once, to the type of the logits. As eager code it makes
one fp32 tensor of the logits' size, as a kernel none.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy_(logits: Tensor, targets: Tensor, *, need_grad: bool) -> Tensor:
    """Losses of rows, fp32 [n]; with `need_grad` `logits` [n, V] then holds their gradient.

    targets: [n], integers below V; negative ones are no targets.
    """
    absent = (targets < 0)[:, None]
    where = targets[:, None].clamp(min=0)
    log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    picked = log_p.gather(1, where)
    if need_grad:
        torch.exp(log_p, out=logits)
        logits.scatter_(1, where, torch.expm1(picked).to(logits.dtype)).masked_fill_(absent, 0)
    return -picked.masked_fill(absent, 0).squeeze(1)
