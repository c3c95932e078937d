"""One process of the tests of sharded optimisers: its part of each parameter beside the whole."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharded_rows import CUTS, LAYERWISE, ROWS, SHAPES, STEPS
from torch import Tensor, nn

from nibble.optim import Optimizer, clip_grad_norm_, layerwise_
from nibble.optim.projected_grad import absent_grad, small_tensors
from nibble.optim.shards import ShardView

LAYERWISE_STEPS = 12


def gradients(step: int) -> list[Tensor]:
    """Gradients with a few strong directions, which turn slowly."""
    found = []
    for number, shape in enumerate(SHAPES):
        generator = torch.Generator().manual_seed(1000 * step + number)
        noise = torch.randn(shape, generator=generator)
        if len(shape) < 2:
            found.append(noise)
            continue
        fixed = torch.Generator().manual_seed(number)
        rows, columns = shape[0], noise[0].numel()
        basis = torch.randn(rows, 12, generator=fixed) * torch.logspace(1, -0.5, 12)
        turn = torch.randn(12, columns, generator=fixed)
        turn += 0.3 * torch.randn(12, columns, generator=generator)
        found.append((basis @ turn).view(shape) + 0.05 * noise)
    return found


def weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(99)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def part(
    tensor: Tensor, dim: int, *, rank: int, world: int, size: int | None = None
) -> tuple[Tensor, int]:
    """Own indices along a dim, as FSDP2 cuts `size` of them, and the first of them."""
    size = size or tensor.shape[dim]
    each = -(-size // world)
    start = min(rank * each, size)
    unit = tensor.shape[dim] // size  # rows of a matrix in one of a stack
    own = tensor.narrow(dim, start * unit, min(each, size - start) * unit)
    return own.clone(), start


class Sums:
    """Adds over processes, and knows how much it sent of which sizes."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            self.sizes.append(tensor.numel())
            dist.all_reduce(tensor)


def run(row: dict[str, Any], cut: str, *, rank: int, world: int, resume: bool) -> dict[str, Any]:
    """Weights of the sharded run and, of the same run on one process, the parts of them."""
    options = {"lr": 1e-2, "weight_decay": 0.01, "update_proj_gap": 4, **row}
    dtype = torch.bfloat16 if options.pop("dtype", "") == "bf16" else torch.float32
    if options.get("rank", 0) == 0:
        del options["update_proj_gap"]
    alone = [nn.Parameter(weight.to(dtype)) for weight in weights()]
    one = Optimizer(alone, **options)
    sums = Sums()
    dims = [CUTS[cut](shape) for shape in SHAPES]
    own, views = [], {}
    for weight32, dim in zip(weights(), dims, strict=True):
        weight = weight32.to(dtype)
        if dim is None:
            own.append(nn.Parameter(weight))
            continue
        values, start = part(weight, dim, rank=rank, world=world)
        own.append(nn.Parameter(values))
        views[own[-1]] = ShardView(shape=tuple(weight.shape), dim=dim, start=start, sum_=sums)
    two = Optimizer(own, views=views, **options)
    for step in range(STEPS):
        for a, b, dim, grad32 in zip(alone, own, dims, gradients(step), strict=True):
            grad = grad32.to(dtype)
            a.grad = grad
            b.grad = grad.clone() if dim is None else part(grad, dim, rank=rank, world=world)[0]
        one.step()
        two.step()
        if resume and step == 5:
            saved = two.state_dict()
            two = Optimizer(own, views=views, **options)
            two.load_state_dict(saved)
    expected = [
        w.detach() if d is None else part(w.detach(), d, rank=rank, world=world)[0]
        for w, d in zip(alone, dims, strict=True)
    ]
    codec = options.get("codec", "fp32")
    states_differ = []
    for number, (a, b) in enumerate(zip(alone, own, strict=True)):
        for name, dim in two.split_dims(b).items():
            value = two.state[b].get(name)
            if codec != "fp32" or not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            expect = one.state[a][name]
            if dim is not None:
                size = SHAPES[number][dims[number]]
                expect = part(expect, dim, rank=rank, world=world, size=size)[0]
            if not torch.allclose(value, expect, atol=2e-3, rtol=1e-2):
                states_differ.append(f"{number} {name} {dim}")
    return {
        "own": [w.detach() for w in own],
        "expected": expected,
        "sizes": sums.sizes,
        "states_differ": states_differ,
    }


class Net(nn.Module):
    """Two matrices that low-rank methods project, one of which few inputs use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up = nn.Linear(64, 96, bias=False)
        self.rare = nn.Linear(96, 96, bias=False)
        self.down = nn.Linear(96, 64)

    def forward(self, x: Tensor, *, rare: bool) -> Tensor:
        hidden = torch.tanh(self.up(x))
        if rare:
            hidden = hidden + torch.tanh(self.rare(hidden))
        return self.down(hidden)


def layerwise(row: dict[str, Any], *, rank: int, world: int) -> dict[str, Any]:
    """Four micro-batches a step, taken in turns; the third and fourth of odd steps use `rare`."""
    found: dict[str, Any] = {"sent": [], "full": []}
    for name, own, ranks in (("alone", 0, 1), ("own", rank, world)):
        model = Net()
        options = {"lr": 1e-2, "eps": 1e-4, "rank": 16, "basis": "randomised", **row}
        optimizer = Optimizer(model.parameters(), update_proj_gap=4, **options)
        layerwise_(optimizer)
        for step in range(LAYERWISE_STEPS):
            optimizer.zero_grad()
            for micro in range(4):
                generator = torch.Generator().manual_seed(100 * step + micro)
                x, y = torch.randn(2, 16, 64, generator=generator).unbind()
                if micro % ranks == own:
                    # One rank of two never uses it in some steps, and nobody does in others.
                    rare = step % 3 == 1 or (step % 3 == 2 and micro % 2 == 1)
                    ((model(x, rare=rare) - torch.sin(y)).square().sum() / 1024).backward()
            if ranks > 1:
                found["sent"].append(reduce_(list(model.parameters())))
            clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        found[name] = [p.detach().clone() for p in model.parameters()]
    found["full"] = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2)
    return found


def reduce_(params: list[nn.Parameter]) -> int:
    """What a reducer does; returns the elements sent for projected parameters."""
    had = torch.tensor([float(p.grad is not None) for p in params])
    dist.all_reduce(had)
    sent = 0
    for param, anywhere in zip(params, had.tolist(), strict=True):
        if anywhere == 0:
            continue
        if param.grad is None:
            param.grad = absent_grad(param)
        small = small_tensors([param])
        sent += sum(tensor.numel() for tensor in small)
        for tensor in small or [param.grad]:
            dist.all_reduce(tensor)
    return sent


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {}
    for name, row in ROWS.items():
        for cut in CUTS:
            found[f"{name}, {cut}"] = run(row, cut, rank=rank, world=world, resume=cut == "mixed")
    for name, row in LAYERWISE.items():
        found[name] = layerwise(row, rank=rank, world=world)
    torch.save(found, folder / f"sharded-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
