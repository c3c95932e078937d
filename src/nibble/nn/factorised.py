"""A linear whose weight is a product of two trained factors, from scratch: no base beside them.

    y = B (A x) + b,      A [r, in],  B [out, r]

The low-rank row of pretraining tables (arXiv 2403.03507, table 2): as many weights and states as
LoRA has, and a model that can only ever be of rank r. Entries of A have variance 1 / in, so that
A x is as large as x; those of B such that entries of B A vary as `std` says. Values depend only on
the seed and the module's name. Costs r (in + out) weights and products instead of in x out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nibble.nn.adapters import target_names
from nibble.nn.targets import replace_

STD = 0.02
"""Of the entries of B A, as transformers initialises a Llama's weights."""


class FactorisedLinear(nn.Module):
    """x [..., in] to [..., out] through r dims; made like a linear, with its bias."""

    def __init__(self, linear: nn.Linear, *, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = (
            linear.in_features,
            linear.out_features,
            rank,
        )
        like = linear.weight
        self.low_a = nn.Parameter(like.new_empty(rank, self.in_features))
        self.low_b = nn.Parameter(like.new_empty(self.out_features, rank))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in the type of x."""
        return F.linear(F.linear(x, self.low_a), self.low_b, self.bias)

    @torch.no_grad()
    def reset_parameters_(self, name: str, *, generator: torch.Generator) -> None:
        """Gaussian factors from the generator's seed and the module's `name` alone."""
        key = f"{generator.initial_seed()} {name}".encode()
        seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "little", signed=True)
        own = torch.Generator().manual_seed(seed)
        a = torch.randn(self.rank, self.in_features, generator=own)
        b = torch.randn(self.out_features, self.rank, generator=own)
        self.low_a.copy_(a * self.in_features**-0.5)
        self.low_b.copy_(b * (STD * (self.in_features / self.rank) ** 0.5))

    def extra_repr(self) -> str:
        """Features and rank."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def factorise_(model: nn.Module, targets: Sequence[str], *, rank: int) -> list[str]:
    """Replace the linears that `targets` mean; returns their names.

    Raises ConfigError for a target that means no linear.
    """
    names = target_names(model, targets)
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear), "a base that is trained is not quantised"
        replace_(model, name, FactorisedLinear(linear, rank=rank))
    return names


def factorised(model: nn.Module) -> dict[str, FactorisedLinear]:
    """All factorised linears by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, FactorisedLinear)}
