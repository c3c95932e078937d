"""galore_torch and bitsandbytes as they are used on the same shapes, for bench/galore.py.

Two things of galore_torch 1.0 are helped: bitsandbytes >= 0.49 dropped two constructor arguments
whose positions it still passes, and the SVD of a refresh is replaced by a random orthonormal basis,
so that steady steps are reached without four minutes of SVDs (which are timed by themselves).
"""

from __future__ import annotations

import importlib.util
import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nibble.numerics.lowrank import householder

Named = Sequence[tuple[str, nn.Parameter]]
Make = Callable[[], torch.optim.Optimizer]


def has(package: str) -> bool:
    """Whether a peer is installed."""
    return importlib.util.find_spec(package) is not None


def repair_galore() -> None:
    """Let galore_torch reach steady steps with the bitsandbytes that is installed."""
    from galore_torch import adamw8bit
    from galore_torch.galore_projector import GaLoreProjector

    bases: dict[tuple[Any, ...], Tensor] = {}

    def random_basis(self: object, weights: Tensor, rank: int, type: str) -> Tensor:
        length = weights.shape[1] if type == "right" else weights.shape[0]
        key = (length, rank, weights.dtype, weights.device)
        if key not in bases:
            columns = torch.randn(length, rank, device=weights.device)
            bases[key] = householder(columns).to(weights.dtype)
        basis = bases[key].clone()
        return basis.t().contiguous() if type == "right" else basis

    GaLoreProjector.get_orthogonal_matrix = random_basis
    if not torch.cuda.is_available():  # it waits for a device unconditionally
        torch.cuda.synchronize = lambda *_: None
    from bitsandbytes.optim.optimizer import Optimizer2State

    if "percentile_clipping" in inspect.signature(Optimizer2State.__init__).parameters:
        return

    def init(
        self: Any,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        Optimizer2State.__init__(self, "adam", params, lr, betas, eps, weight_decay, 8, None)

    adamw8bit.AdamW8bit.__init__ = init


def galore_groups(
    named: Named, *, projected: set[nn.Parameter], rank: int, gap: int
) -> list[dict[str, Any]]:
    """galore_torch's parameter groups."""
    low_rank = {"rank": rank, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std"}
    return [
        {"params": [param for _, param in named if param not in projected]},
        {"params": [param for _, param in named if param in projected], **low_rank},
    ]


def peer_rows(
    named: Named, *, projected: set[nn.Parameter], rank: int, gap: int
) -> dict[str, Make]:
    """Constructors of the peers' optimisers over all parameters, by name of their row."""
    params = [param for _, param in named]
    on_gpu = params[0].device.type == "cuda"
    rows: dict[str, Make] = {}
    if has("galore_torch") and has("bitsandbytes"):
        import galore_torch

        repair_galore()
        groups = lambda: galore_groups(named, projected=projected, rank=rank, gap=gap)  # noqa: E731
        rows["galore_torch AdamW"] = lambda: galore_torch.GaLoreAdamW(groups(), lr=1e-4)
        if on_gpu:
            rows["galore_torch AdamW8bit"] = lambda: galore_torch.GaLoreAdamW8bit(
                groups(), lr=1e-4, weight_decay=0
            )
    if has("bitsandbytes") and on_gpu:
        import bitsandbytes

        rows["bitsandbytes AdamW8bit, full rank"] = lambda: bitsandbytes.optim.AdamW8bit(
            params, lr=1e-4
        )
    rows["torch AdamW fused, full rank"] = lambda: torch.optim.AdamW(params, lr=1e-4, fused=True)
    return rows


def svd_refresh_s(shapes: Sequence[tuple[int, int]], *, device: torch.device) -> dict[str, float]:
    """Seconds that galore_torch's SVDs of all `shapes` take: one of each shape, times its count."""
    counts: dict[tuple[int, int], int] = {}
    for shape in shapes:
        counts[shape] = counts.get(shape, 0) + 1
    torch.linalg.svd(torch.randn(64, 64, device=device))
    total, each = 0.0, {}
    for shape, count in counts.items():
        matrix = torch.randn(shape, device=device)
        _wait(device)
        start = time.perf_counter()
        torch.linalg.svd(matrix, full_matrices=False)
        _wait(device)
        each["x".join(map(str, shape))] = time.perf_counter() - start
        total += count * each["x".join(map(str, shape))]
    return {"all": total, **each}


def hook_galore(model: nn.Module, *, projected: set[nn.Parameter], rank: int, gap: int) -> None:
    """galore_torch's layer-wise mode: an 8-bit optimiser a parameter that steps in backward."""
    import bitsandbytes
    import galore_torch

    repair_galore()
    optimizers: dict[nn.Parameter, torch.optim.Optimizer] = {}
    for param in model.parameters():
        if param in projected:
            group = galore_groups([("", param)], projected=projected, rank=rank, gap=2 * gap)[1]
            optimizers[param] = galore_torch.GaLoreAdamW8bit([group], lr=1e-4, weight_decay=0)
        else:
            optimizers[param] = bitsandbytes.optim.Adam8bit([param], lr=1e-4, weight_decay=0)

    def hook(param: nn.Parameter) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(hook)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
