"""Activation checkpointing: keep each block's input, compute the rest again in backward.

Memory of activations falls from L blocks to one block plus L inputs, for one more forward pass
(about a third more time; Chen et al. 2016, arXiv 1604.06174). The blocks' `forward` is wrapped by
us, without touching transformers' own switch, whose wrapper differs between families and drops
arguments that are not tensors by name. Dropout draws the same numbers in both passes because the
generators' states are kept with the input, so gradients are the same with and without. In
evaluation nothing is wrapped: no graph, no cost. The recomputation ends with the last tensor that
backward wants: the last linear of a block is told to keep its own before it multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nibble.nn.quant import QuantLinear
from nibble.spec.config import Train


@dataclass(frozen=True)
class Recomputed:
    """A block's forward that forgets what it computed."""

    forward: Callable[..., Any]

    def __call__(self, *args: Any, **words: Any) -> Any:
        """Whatever the block takes and returns."""
        if not torch.is_grad_enabled():
            return self.forward(*args, **words)
        return checkpoint(
            self.forward, *args, use_reentrant=False, preserve_rng_state=True, **words
        )


@dataclass(frozen=True, kw_only=True)
class Activations:
    """What is kept of the activations, where, and how large a piece is computed at once."""

    policy: str = "full"
    """none, selective or full."""
    keep_blocks: int = 0
    """The last so many blocks keep all."""
    offload: bool = False
    """What a block keeps waits in host memory."""
    mlp_tile_tokens: int | None = None
    """Feed-forward layers see this many tokens at a time."""

    @classmethod
    def of(cls, train: Train) -> Activations:
        """What a recipe says; `keep_blocks: auto` must have been decided."""
        assert train.keep_blocks != "auto", "decided by the plan"
        return cls(
            policy=train.activation_checkpointing,
            keep_blocks=train.keep_blocks,
            offload=train.activation_offload,
            mlp_tile_tokens=train.mlp_tile_tokens,
        )


def checkpoint_(blocks: Sequence[nn.Module], *, policy: str) -> int:
    """Apply `none` or `full` to the blocks and return how many recompute; doing it twice changes
    nothing.
    """
    if policy == "none":
        return 0
    assert policy == "full", policy
    for block in blocks:
        if not isinstance(block.forward, Recomputed):
            block.forward = Recomputed(block.forward)
        linears = [module for module in block.modules() if isinstance(module, QuantLinear)]
        for linear in linears[-1:]:
            linear.keeps_first = True
    return len(blocks)
