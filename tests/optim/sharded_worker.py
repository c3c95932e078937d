"""One process of the tests of sharded optimisers: its part of each parameter beside the whole."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharded_rows import CUTS, LAYERWISE, ROWS, SHAPES, STEPS
from torch import Tensor, nn

from nibble.launch.leaving import leave
from nibble.numerics import codec8
from nibble.optim import Optimizer, clip_grad_norm_, layerwise_
from nibble.optim.shards import ShardView
from nibble.place.group import Group, coalesced
from nibble.place.reduce import Reducer
from nibble.place.shard_views import collected
from nibble.spec.config import Place
from nibble.spec.state import BLOCK
from nibble.train.optimizer_state import read_optimizer, write_optimizer
from nibble.train.state import TrainState

LAYERWISE_STEPS = 12
Shapes = Sequence[tuple[int, ...]]


def gradients(step: int, shapes: Shapes = SHAPES) -> list[Tensor]:
    """Gradients with a few strong directions, which turn slowly."""
    found = []
    for number, shape in enumerate(shapes):
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


def weights(shapes: Shapes = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(99)
    return [torch.randn(shape, generator=generator) for shape in shapes]


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
        self.sizes += [tensor.numel() for tensor in tensors]
        coalesced(tensors, dist.all_reduce)


class Cut:
    """As much of a placement as checkpoints ask for, of parameters that are cut as views say."""

    def __init__(self, group: Group, views: dict[str, ShardView]) -> None:
        self.group, self.views = group, views
        self.rank, self.num_parts = group.rank, group.world

    def view(self, name: str) -> ShardView:
        return self.views[name]

    def whole(self, own: Tensor, dim: int | None, sizes: Sequence[int]) -> Tensor | None:
        if dim is None:
            return own.detach().clone() if self.rank == 0 else None
        return collected(self.group, own, dim, sizes)


def on_disk(optimizer: Optimizer, params: list[nn.Parameter], place: Cut | None) -> TrainState:
    """What the functions that write and read states look at."""
    named = {f"w{number}": param for number, param in enumerate(params)}
    unused: Any = None
    return TrainState(unused, optimizer, unused, unused, parameters=named, place=place)


def plain(state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state with 8-bit slots decoded."""
    found: dict[str, Any] = {}
    for name, value in state.items():
        if name.endswith("_absmax"):
            continue
        if not name.endswith("_codes") or name.startswith("basis"):
            found[name] = value
            continue
        slot = name.removesuffix("_codes")
        signed = "sq" not in slot
        absmax = state[f"{slot}_absmax"]
        codes = torch.full((absmax.numel() * BLOCK,), codec8.zero_code(signed=signed)).byte()
        codes[: value.numel()] = value.reshape(-1)
        values = codec8.decode_blocks(codes.view(-1, BLOCK), absmax, signed=signed)
        found[slot] = values.view(-1)[: value.numel()].view(value.shape)
    return found


def differ(found: Any, expected: Any, *, bound: float) -> bool:
    """Whether a state tensor or number is another; `bound`: of the largest value."""
    if not isinstance(expected, Tensor):
        return bool(found != expected)
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return True
    if bound == 0 or not expected.is_floating_point() or expected.numel() == 0:
        return not torch.equal(found, expected)
    return bool((found - expected).abs().max() > bound * expected.abs().max())


def resumed(
    two: Optimizer,
    own: list[nn.Parameter],
    folder: Path,
    *,
    group: Group,
    options: dict[str, Any],
) -> tuple[Optimizer, list[str]]:
    """An optimiser that goes on from the files of this one, and what is wrong with it, and with
    those that one process reads and writes.
    """
    views = {f"w{n}": two.view(param) for n, param in enumerate(own)}
    cut = Cut(group, views)
    if group.is_first:
        (folder / "two").mkdir(parents=True)
        (folder / "one").mkdir()
    group.barrier("folders")
    write_optimizer(folder / "two", on_disk(two, own, cut))
    group.barrier("written")
    again = Optimizer(own, views=two.views, **options)
    read_optimizer(folder / "two", on_disk(again, own, cut))
    wrong = [
        f"again: {n} {name}"
        for n, param in enumerate(own)
        for name, value in two.state[param].items()
        if differ(again.state[param].get(name), value, bound=0)
    ]
    # One process reads what two wrote, and two read what it writes.
    dtype = own[0].dtype
    params = [nn.Parameter(torch.zeros(views[f"w{n}"].shape, dtype=dtype)) for n in range(len(own))]
    one = Optimizer(params, **options)
    read_optimizer(folder / "two", on_disk(one, params, None))
    if group.is_first:
        write_optimizer(folder / "one", on_disk(one, params, None))
    group.barrier("one wrote")
    back = Optimizer(own, views=two.views, **options)
    read_optimizer(folder / "one", on_disk(back, own, cut))
    bound = 0.02 if options.get("codec") == "8bit" else 0.0
    for number, param in enumerate(own):
        dims, view = two.split_dims(param), two.view(param)
        of_one, mine, theirs = (
            plain(state) for state in (one.state[params[number]], two.state[param],
                                       back.state[param])
        )  # fmt: skip
        for name, value in mine.items():
            expect, dim = of_one[name], dims.get(name)
            if dim is not None and view.dim is not None:
                size = view.shape[view.dim]
                expect = part(expect, dim, rank=group.rank, world=group.world, size=size)[0]
            if differ(expect, value, bound=bound):
                wrong.append(f"on one: {number} {name}")
            if differ(theirs[name], value, bound=2 * bound):
                wrong.append(f"back on two: {number} {name}")
    return again, wrong


def run(row: dict[str, Any], cut: str, *, group: Group, folder: Path | None) -> dict[str, Any]:
    """Weights of the sharded run and, of the same run on one process, the parts of them.

    With a folder, the sharded run stops after six steps and goes on from its files.
    """
    rank, world = group.rank, group.world
    wrong: list[str] = []
    options = {"lr": 1e-2, "weight_decay": 0.01, "update_proj_gap": 4, **row}
    dtype = torch.bfloat16 if options.pop("dtype", "") == "bf16" else torch.float32
    shapes = options.pop("shapes", SHAPES)
    if options.get("rank", 0) == 0:
        del options["update_proj_gap"]
    alone = [nn.Parameter(weight.to(dtype)) for weight in weights(shapes)]
    one = Optimizer(alone, **options)
    sums = Sums()
    dims = [CUTS[cut](shape) for shape in shapes]
    own, views = [], {}
    for weight32, dim in zip(weights(shapes), dims, strict=True):
        weight = weight32.to(dtype)
        if dim is None:
            own.append(nn.Parameter(weight))
            continue
        values, start = part(weight, dim, rank=rank, world=world)
        own.append(nn.Parameter(values))
        views[own[-1]] = ShardView(shape=tuple(weight.shape), dim=dim, start=start, sum_=sums)
    two = Optimizer(own, views=views, **options)
    for step in range(STEPS):
        for a, b, dim, grad32 in zip(alone, own, dims, gradients(step, shapes), strict=True):
            grad = grad32.to(dtype)
            a.grad = grad
            b.grad = grad.clone() if dim is None else part(grad, dim, rank=rank, world=world)[0]
        one.step()
        two.step()
        if folder is not None and step == 5:
            two, wrong = resumed(two, own, folder, group=group, options=options)
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
                size = shapes[number][dims[number]]
                expect = part(expect, dim, rank=rank, world=world, size=size)[0]
            if not torch.allclose(value, expect, atol=2e-3, rtol=1e-2):
                states_differ.append(f"{number} {name} {dim}")
    return {
        "own": [w.detach() for w in own],
        "expected": expected,
        "sizes": sums.sizes,
        "states_differ": states_differ,
        "wrong_on_disk": wrong,
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


def layerwise(row: dict[str, Any], *, group: Group) -> dict[str, Any]:
    """Four micro-batches a step, taken in turns: all of a step use `rare`, or every other, which
    are those of one process, or none. Gradients are summed as ddp sums them, and clipped.
    """
    found: dict[str, Any] = {"sent": []}
    for name, own in (("alone", Group.alone(torch.device("cpu"))), ("own", group)):
        model = Net()
        options = {"lr": 1e-2, "eps": 1e-4, "rank": 16, "basis": "randomised", **row}
        optimizer = Optimizer(model.parameters(), update_proj_gap=4, **options)
        layerwise_(optimizer)
        reducer = None
        if own.world > 1:
            reducer = Reducer(dict(model.named_parameters()), own, bucket_bytes=20_000)
        for step in range(LAYERWISE_STEPS):
            optimizer.zero_grad()
            for micro in range(4):
                generator = torch.Generator().manual_seed(100 * step + micro)
                x, y = torch.randn(2, 16, 64, generator=generator).unbind()
                if micro % own.world == own.rank:
                    # One rank of two never uses it in some steps, and nobody does in others.
                    rare = step % 3 == 1 or (step % 3 == 2 and micro % 2 == 1)
                    last = micro + own.world >= 4
                    with reducer.micro_batch(last=last) if reducer else nullcontext():
                        ((model(x, rare=rare) - torch.sin(y)).square().sum() / 1024).backward()
            clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            if reducer:
                found["sent"].append(reducer.num_bytes // 4 - sum(found["sent"]))
        if reducer:
            reducer.close()
        found[name] = [p.detach().clone() for p in model.parameters()]
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    group = Group.from_environment(Place(device="cpu"))
    found: dict[str, Any] = {}
    for name, row in ROWS.items():
        for cut in CUTS:
            files = folder / name if cut == "last" else None
            found[f"{name}, {cut}"] = run(row, cut, group=group, folder=files)
    for name, row in LAYERWISE.items():
        found[name] = layerwise(row, group=group)
    torch.save(found, folder / f"sharded-{group.rank}.pt")
    group.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)  # gloo's threads may not see Python end
