"""Global gradient clipping without a host synchronisation.

    norm = sqrt(sum_i |G_i|^2) in float32;      G_i <- G_i * min(1, max_norm / (norm + 1e-6))

as in torch.nn.utils.clip_grad_norm_ (arXiv 1211.5063), except that norm and factor are float32 for
16-bit gradients too: a bfloat16 factor is off by up to 0.4 %. A few launches for any number of
tensors. A norm that is not finite is returned as it is, and the gradients become NaN or 0 by it:
the caller looks at the norm before it steps. It knows no ranks: the norm is of the tensors given,
and of those that `sum_` adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

_EPS = 1e-6


@torch.no_grad()
def clip_grad_norm_(
    params: Iterable[Tensor],
    max_norm: float | None,
    *,
    sum_: Callable[[Sequence[Tensor]], None] | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Scale gradients in place to a joint 2-norm of at most `max_norm`; returns the norm before.

    `sum_`: adds tensors in place over all who hold other parts of the gradients. `device`: of the
    norm where there is no gradient.

    The norm is a float32 scalar on the first gradient's device (0 if there is none).
    None for `max_norm` measures only.
    """
    grads = [param.grad for param in params if param.grad is not None]
    if not grads and sum_ is None:
        return torch.zeros((), device=device)
    # foreach wants one device and dtype a call.
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        groups.setdefault((grad.device, grad.dtype), []).append(grad)
    norms = [
        torch.linalg.vector_norm(torch.stack(torch._foreach_norm(group, 2, dtype=torch.float32)))
        for group in groups.values()
    ]
    if grads:
        norm: Tensor = torch.linalg.vector_norm(
            torch.stack([part.to(grads[0].device) for part in norms])
        )
    else:
        norm = torch.zeros((), device=device)
    if sum_ is not None:
        square = norm.square()
        sum_([square])
        norm = square.sqrt()
    if max_norm is not None:
        factor = (max_norm / (norm + _EPS)).clamp(max=1.0)
        for (device, _), group in groups.items():
            torch._foreach_mul_(group, factor.to(device))
    return norm
