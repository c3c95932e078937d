"""One process of the tests of groups and gradients; what it finds goes to a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nibble.errors import PlacementError
from nibble.launch.leaving import leave
from nibble.optim import Optimizer, group_parameters, layerwise_, low_rank_rules
from nibble.place import Group
from nibble.place.reduce import Reducer, agree_
from nibble.spec.config import Place


class Net(nn.Module):
    """Matrices that low-rank methods project, a vector, and a part that a batch may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 128)
        self.down = nn.Linear(128, 32)
        self.rare = nn.Linear(32, 32)
        self.never = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, rare: bool) -> Tensor:
        x = x + self.down(torch.tanh(self.up(x)))
        return (x + self.rare(x)).square().sum() if rare else x.square().sum()


def batches(step: int) -> list[tuple[Tensor, bool]]:
    """The micro-batches of a step: ranks take turns; only the third one uses the rare part."""
    generator = torch.Generator().manual_seed(step)
    return [(torch.randn(5, 32, generator=generator), i == 2) for i in range(4)]


def train(
    group: Group, *, steps: int, low_rank: bool = False, bucket_bytes: int = 4096, rare: bool = True
) -> dict[str, Any]:
    """Weights, gradients of the last step and bytes sent."""
    torch.manual_seed(7 + group.rank)  # equal only because agree_ makes them so
    model = Net()
    if group.world == 1:
        torch.manual_seed(7)
        model = Net()
    named = dict(model.named_parameters())
    rules: dict[str, Any] = {}
    if low_rank:
        rules["rules"] = low_rank_rules(
            {"rank": 8, "scale": 1.0, "update_proj_gap": 2, "basis": "randomised"}, target="up"
        )
    optimizer = Optimizer(group_parameters(named.items(), **rules), lr=1e-2, eps=1e-4)
    if low_rank:
        layerwise_(optimizer)
    agree_(named, group)
    reducer = Reducer(named, group, bucket_bytes=bucket_bytes)
    gradients: dict[str, Any] = {}
    sent = []
    for step in range(steps):
        mine = batches(step)[group.rank :: group.world]
        before = reducer.num_bytes
        for index, (x, uses) in enumerate(mine):
            with reducer.micro_batch(last=index == len(mine) - 1):
                model(x, rare=uses and rare).backward()
        sent.append(reducer.num_bytes - before)
        gradients = {
            n: None if p.grad is None or low_rank else p.grad.clone() for n, p in named.items()
        }
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    reducer.close()
    return {
        "weights": {n: p.detach().clone() for n, p in named.items()},
        "gradients": gradients,
        "sent": sent,
    }


def refused(action: Any) -> str:
    try:
        action()
    except PlacementError as error:
        return str(error)
    return "accepted"


def main(folder: Path) -> None:
    group = Group.from_environment(Place(device="cpu", timeout_s=30))
    alone = Group.alone(torch.device("cpu"))
    found: dict[str, Any] = {"rank": group.rank, "world": group.world}
    sums = [torch.full((3,), 1.0 + group.rank), torch.tensor([[2**40 + group.rank]])]
    sums.append(torch.arange(6.0).view(2, 3).t()[:, :1] * (group.rank + 1))
    group.sum_(sums)
    found["sums"] = [t.clone() for t in sums]
    peak = [torch.tensor([group.rank, 5 - group.rank])]
    group.max_(peak)
    found["max"] = peak[0]
    found["gather"] = group.gather({"rank": group.rank})
    found["share"] = group.share(f"from {group.rank}")
    file = folder / "made-by-first"
    found["turn"] = group.first_then_others(
        "a file", lambda: (file.exists(), file.write_text("x"))[0]
    )
    for name, words in {
        "plain": {}, "one bucket": {"bucket_bytes": 1 << 30}, "low": {"low_rank": True},
        "no rare": {"rare": False},
    }.items():  # fmt: skip
        found[name] = train(group, steps=4, **words)
        if group.rank == 0:
            found[f"{name} alone"] = train(alone, steps=4, **words)
    other = (
        {"a": nn.Parameter(torch.zeros(2))} if group.rank else {"b": nn.Parameter(torch.zeros(2))}
    )
    found["other names"] = refused(lambda: agree_(other, group))
    torch.save(found, folder / f"seen-{group.rank}.pt")
    group.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)  # gloo's threads may not see Python end
