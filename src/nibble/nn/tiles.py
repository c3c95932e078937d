"""Feed-forward layers computed for a tile of tokens at a time.

A feed-forward layer looks at one token at a time, so the tokens of a long row may go through it in
tiles of t. Forward writes each tile's output where it belongs and keeps the layer's input only;
backward computes a tile again, takes its gradients and drops it:

    y[tile] = f(x[tile])       g_x[tile] = (df/dx)^T g_y[tile]       g_w = sum over tiles

With width F and T tokens the inner tensors (3 F T and as many gradients: 11 GiB of Llama 3 8B at
131,072 tokens) become those of a tile. What it costs: f once more in backward where blocks are not
checkpointed; where they are it takes the place of their own recomputation, which ends at the
layer's input (backward makes the whole tile again, its last linear too). Packed weights are
unpacked once a tile. Gradients of x are those without tiles bit for bit if the products are; those
of weights differ by the order of a sum over tiles, made in the type of the gradient (fp32 for
adapters).

A layer qualifies by its structure: a child of a block that holds linears, activations, dropout and
norms and nothing else, and is no attention. Mixtures of experts are left alone: their products are
over tokens sorted by expert. Same idea as TiledMLP in Arctic's long-sequence training (2506.13996).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nibble.nn.adapters import LoraLinear
from nibble.nn.quant import is_linear
from nibble.nn.randomness import Generators, may_draw

NOT_TOKENWISE = ("attn", "attention", "moe", "expert", "router", "sparse", "conv", "mixer")
"""Parts of class names of layers that mix tokens, or sort them."""


@dataclass(frozen=True)
class Tiled:
    """The forward of a feed-forward layer, `num_tokens` at a time."""

    module: nn.Module
    forward: Callable[..., Any]
    num_tokens: int
    draws: bool

    def __call__(self, *inputs: Any, **words: Any) -> Any:
        """Tensors [..., D] (some families hand in the residual as well) to [..., D]."""
        first = inputs[0] if inputs else None
        fits = isinstance(first, Tensor) and all(
            isinstance(x, Tensor) and x.shape[:-1] == first.shape[:-1] for x in inputs
        )
        if not fits or words or first.shape[:-1].numel() <= self.num_tokens:  # type: ignore[union-attr]
            return self.forward(*inputs, **words)
        work = _Work(self.forward, self.num_tokens, self.draws)
        if not torch.is_grad_enabled():
            return work.compute(inputs)
        trained = [p for p in self.module.parameters() if p.requires_grad]
        held: list[Tensor] = []
        empty = _Hold.apply(work, held, len(inputs), *inputs, *trained)  # type: ignore[no-untyped-call]
        return _Fill.apply(empty, work, held)  # type: ignore[no-untyped-call]


@dataclass
class _Work:
    """One pass through a layer: what to call, and the random states of its tiles."""

    forward: Callable[..., Any]
    num_tokens: int
    draws: bool
    states: list[Generators] = field(default_factory=list)
    autocast: tuple[str, torch.dtype] | None = None

    def tiles(self, x: Tensor) -> Iterator[slice]:
        total = x.shape[:-1].numel()
        for begin in range(0, total, self.num_tokens):
            yield slice(begin, min(begin + self.num_tokens, total))

    def compute(self, inputs: Sequence[Tensor]) -> Tensor:
        """The output [..., D], tile by tile, without a graph."""
        first = inputs[0]
        device = first.device
        if torch.is_autocast_enabled(device.type):
            self.autocast = (device.type, torch.get_autocast_dtype(device.type))
        flat = [_flat(x) for x in inputs]
        out: Tensor | None = None
        for tile in self.tiles(first):
            if self.draws:
                self.states.append(Generators(device))
            y = self.forward(*(x[None, tile] for x in flat))[0]
            if out is None:
                out = y.new_empty(flat[0].shape[0], y.shape[-1])
            out[tile] = y
        assert out is not None
        return out.view(*first.shape[:-1], -1)

    def again(self, index: int) -> AbstractContextManager[None]:
        """Tile `index` draws what it drew."""
        return self.states[index].again() if self.draws else nullcontext()

    def as_before(self) -> AbstractContextManager[None]:
        """Autocast as it was in forward."""
        if self.autocast is None:
            return nullcontext()
        device, dtype = self.autocast
        return torch.autocast(device, dtype=dtype)


class _Hold(Function):
    """Keeps the inputs and gives an empty tensor for `_Fill`: a block's recomputation ends with the
    last tensor kept, so that it does not compute the layer in vain."""

    @staticmethod
    def forward(ctx: Any, work: _Work, held: list[Tensor], num: int, *tensors: Tensor) -> Tensor:
        inputs = tensors[:num]
        ctx.work, ctx.trained = work, tensors[num:]
        ctx.versions = [p._version for p in ctx.trained]
        ctx.save_for_backward(*inputs)
        held += inputs
        return inputs[0].new_empty(1).expand(inputs[0].shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, work, trained = ctx.saved_tensors, ctx.work, ctx.trained
        assert ctx.versions == [p._version for p in trained], "a weight changed before backward"
        needs = ctx.needs_input_grad[3 : 3 + len(inputs)]
        flat, grad_rows = [_flat(x) for x in inputs], _flat(grad)
        sums: list[Tensor | None] = [None] * len(trained)
        grads = [torch.empty_like(x) if n else None for x, n in zip(flat, needs, strict=True)]
        for index, tile in enumerate(work.tiles(inputs[0])):
            parts = [
                x[None, tile].detach().requires_grad_(n) for x, n in zip(flat, needs, strict=True)
            ]
            with torch.enable_grad(), work.again(index), work.as_before():
                y = work.forward(*parts)
            wanted = [part for part in parts if part.requires_grad]
            found = list(
                torch.autograd.grad(
                    y, [*wanted, *trained], grad_rows[None, tile], allow_unused=True
                )
            )
            del y, parts
            for whole in grads:
                if whole is not None:
                    part = found.pop(0)
                    whole[tile] = 0 if part is None else part[0]
            _add(sums, found)
        shaped = [
            None if g is None else g.view(x.shape) for g, x in zip(grads, inputs, strict=True)
        ]
        return None, None, None, *shaped, *sums


class _Fill(Function):
    """The output of a `_Hold`; keeps nothing."""

    @staticmethod
    def forward(ctx: Any, empty: Tensor, work: _Work, held: list[Tensor]) -> Tensor:
        y = work.compute(held)
        held.clear()
        assert y.shape == empty.shape, "a feed-forward layer keeps the width"
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _add(sums: list[Tensor | None], found: Sequence[Tensor | None]) -> None:
    for index, grad in enumerate(found):
        own = sums[index]
        if own is None or grad is None:
            sums[index] = grad if own is None else own
        else:
            own.add_(grad)


def feed_forward(block: nn.Module) -> nn.Module | None:
    """The feed-forward layer of a block, by its structure; None where there is none to tile."""
    found = [child for child in block.children() if _is_tokenwise(child)]
    return found[-1] if found else None


def _is_tokenwise(module: nn.Module) -> bool:
    """Two linears or more with activations, dropout and norms around them, and nothing else."""
    num_linears = 0
    for inner in module.modules():
        name = type(inner).__name__.lower()
        if any(word in name for word in NOT_TOKENWISE):
            return False
        if is_linear(inner):
            num_linears += 1
        elif not isinstance(inner, LoraLinear) and "norm" not in name:
            stacked = any(p.dim() > 2 for p in inner.parameters(recurse=False))
            if stacked or isinstance(inner, nn.Embedding):
                return False
    return num_linears >= 2


def tile_(block: nn.Module, num_tokens: int) -> bool:
    """Compute the block's feed-forward layer `num_tokens` at a time; False if it has none to tile.

    Doing it twice changes nothing. Call it after adapters and fast paths are in place.
    """
    module = feed_forward(block)
    if module is None:
        return False
    if not isinstance(module.forward, Tiled):
        module.forward = Tiled(module, module.forward, num_tokens, may_draw(module))
    return True
