"""Activation checkpointing: keep each block's input, compute the rest again in backward.

Memory of activations falls from L blocks to one block plus L inputs, for one more forward pass
(about a third more time; Chen et al. 2016, arXiv 1604.06174). Four settings trade the two, and
gradients are the same with all of them, bit for bit:

    selective      attention's output is kept too and not computed again (kept_attention.py)
    keep_blocks    the last N blocks keep all: backward comes to them first, so what they keep is
                   gone before the first block is computed again
    offload        what a block keeps waits in host memory (offload.py)
    mlp tiles      feed-forward layers see so many tokens at a time (nn/tiles.py)

The blocks' `forward` is wrapped by us, without touching transformers' own switch, whose wrapper
differs between families and drops arguments that are not tensors by name. Where a block may draw
random numbers the generators' states are kept with the input, and dropout draws the same numbers in
both passes. In evaluation nothing is wrapped: no graph, no cost. The recomputation ends with the
last tensor that backward wants: the last linear of a block is told to keep its own before it
multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from nibble.nn.quant import QuantLinear
from nibble.nn.randomness import may_draw
from nibble.nn.tiles import tile_
from nibble.place.kept_attention import Kept, is_announced, keeping, replaying
from nibble.place.offload import HostPool, Parked, is_dense
from nibble.spec.config import Train


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


@dataclass
class Checkpointed:
    """What `checkpoint_` did: how many blocks compute again and how many are tiled."""

    num_recomputed: int = 0
    num_tiled: int = 0
    pools: dict[torch.device, HostPool] = field(default_factory=dict)
    """Of devices whose blocks have sent something to the host."""

    @property
    def host_bytes(self) -> int:
        """Host memory that holds activations."""
        return sum(pool.num_bytes for pool in self.pools.values())

    def pool(self, device: torch.device) -> HostPool:
        """The pool of a device, made when first asked for."""
        if device not in self.pools:
            self.pools[device] = HostPool(device)
        return self.pools[device]


@dataclass(frozen=True)
class Recomputed:
    """A block's forward that forgets what it computed."""

    forward: Callable[..., Any]
    may_draw: bool = True
    selective: bool = False
    announced: bool = False
    """See `kept_attention.is_announced`."""
    done: Checkpointed | None = None
    """Whose pools take what is kept; None keeps it where it is."""
    is_first: bool = False
    is_last: bool = False
    """Of the blocks that compute again: what the last one keeps is wanted at once, and stays."""

    def __call__(self, *args: Any, **words: Any) -> Any:
        """Whatever the block takes and returns."""
        if not torch.is_grad_enabled():
            return self.forward(*args, **words)
        by_name = not args
        hidden = words.pop("hidden_states") if by_name else args[0]
        assert isinstance(hidden, Tensor), "a block takes hidden states first"
        parked = None
        if self.done is not None:
            parked = self.done.pool(hidden.device).begin(is_first=self.is_first)
        kept = Kept(None if self.is_last else parked) if self.selective else None
        once = _Pass(
            self.forward,
            hidden,
            parked=parked,
            stays=self.is_last,
            rest=(args[1:], words),
            by_name=by_name,
        )

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            assert kept is not None
            announced = self.announced
            return keeping(kept, announced=announced), replaying(kept, announced=announced)

        # The empty tensor tells on which device random numbers are drawn.
        return checkpoint(
            once,
            hidden.detach().new_empty(0),
            use_reentrant=False,
            preserve_rng_state=self.may_draw,
            context_fn=noop_context_fn if kept is None else contexts,
        )


class _Input:
    """Hidden states between the two passes, on the device or in host memory."""

    def __init__(self, hidden: Tensor, sent: Parked | None) -> None:
        self.needs_grad = hidden.requires_grad
        self._sent = sent if is_dense(hidden) else None
        self._here: Tensor | None = hidden if self._sent is None else None
        self._number = -1 if self._sent is None else self._sent.put(hidden)

    def again(self) -> Tensor:
        """The same numbers; a leaf where they have been away."""
        if self._here is not None:
            return self._here
        assert self._sent is not None
        return self._sent.get(self._number).requires_grad_(self.needs_grad)


class _Pass:
    """One pass through a block: the first call computes on what came, later ones on what was kept
    of it."""

    def __init__(
        self,
        block: Callable[..., Any],
        hidden: Tensor,
        *,
        parked: Parked | None,
        stays: bool,
        rest: tuple[tuple[Any, ...], dict[str, Any]],
        by_name: bool,
    ) -> None:
        self._block, self._parked, self._by_name = block, parked, by_name
        self._args, self._words = rest
        self._fresh: Tensor | None = hidden
        self._kept = _Input(hidden, None if stays else parked)

    def __call__(self, _device: Tensor) -> Any:
        hidden, self._fresh = self._fresh, None
        if hidden is None:
            if self._parked is not None:
                self._parked.turn()
            hidden = self._kept.again()
        if self._by_name:
            return self._block(*self._args, hidden_states=hidden, **self._words)
        return self._block(hidden, *self._args, **self._words)


def checkpoint_(blocks: Sequence[nn.Module], activations: Activations) -> Checkpointed:
    """Let the blocks, in their order, compute and keep as `activations` says.

    Doing it twice changes nothing. Call it after adapters and fast paths are in place.
    """
    done = Checkpointed()
    if activations.mlp_tile_tokens is not None:
        done.num_tiled = sum(tile_(block, activations.mlp_tile_tokens) for block in blocks)
    if activations.policy == "none":
        return done
    assert activations.policy in ("full", "selective"), activations.policy
    again = blocks[: max(0, len(blocks) - activations.keep_blocks)]
    done.num_recomputed = len(again)
    for index, block in enumerate(again):
        if not isinstance(block.forward, Recomputed):
            block.forward = Recomputed(
                block.forward,
                may_draw=may_draw(block),
                selective=activations.policy == "selective",
                announced=is_announced(block),
                done=done if activations.offload else None,
                is_first=index == 0,
                is_last=index == len(again) - 1,
            )
        linears = [module for module in block.modules() if isinstance(module, QuantLinear)]
        for linear in linears[-1:]:
            linear.keeps_first = True
    return done
