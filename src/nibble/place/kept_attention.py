"""Keeps the outputs of fused attention through a block's recomputation.

Of all that a block computes, attention is dearest for its size: its work grows with the square of a
row, what it gives is one tensor as wide as the block's input (and a number a head and token). So
the first pass keeps what the fused kernel gave, and the second, which makes query, key and value
again, takes it instead of running the kernel; the kernel's own backward then finds all it saved.

How. Below autograd every fused attention is one operation (`_scaled_dot_product_*_attention`,
`_varlen_attn`, ...). A dispatch mode sees it and keeps its outputs, or hands them over; autograd,
which works above, builds the same graph both times. Such a mode makes Python of every operation, so
it is entered for the call of attention alone, which `nn/attention.py` announces. That costs 12 us;
around the whole block, as torch's own selective checkpointing does it, the same mode costs 2.2 ms a
block, forward and recomputed (one CPU core, torch 2.13, Llama's block with LoRA). Where a family
does not call its attention through our interface, a function mode watches for
`scaled_dot_product_attention`, which costs 1.1 ms a block: Python for each use of a tensor.

Attention with dropout is computed again: its kernel also moves the random generator. So is one that
materialises its scores: there is no small output to keep. Its gradients are those of `full`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nibble.nn.attention import PACKED, around_attention
from nibble.place.offload import MIN_BYTES, Parked, is_dense

ATTENTION_WORDS = ("attention", "attn")


class Kept:
    """Outputs of fused attention in one pass of one block, in order; in `parked` if given."""

    def __init__(self, parked: Parked | None) -> None:
        self._parked = parked
        self._outputs: deque[tuple[OpOverload, tuple[Any, ...]]] = deque()

    def keep(self, operation: OpOverload, outputs: Any) -> None:
        """Remember what `operation` gave."""
        several = outputs if isinstance(outputs, tuple | list) else (outputs,)
        self._outputs.append((operation, tuple(self._put(value) for value in several)))

    def next(self, operation: OpOverload) -> Any:
        """What `operation` gave in its turn; None when it was taken before."""
        if not self._outputs:
            return None
        name, values = self._outputs.popleft()
        assert name is operation, "a block that is computed again calls the same attention"
        found = tuple(self._get(value) for value in values)
        return found if len(found) > 1 else found[0]

    def _put(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        large = value.numel() * value.element_size() >= MIN_BYTES
        if self._parked is None or not large or not is_dense(value):
            return value.detach()
        return _Number(self._parked.put(value))

    def _get(self, value: Any) -> Any:
        if isinstance(value, _Number):
            assert self._parked is not None
            return self._parked.get(value.number)
        return value


class _Number:
    """Stands for a tensor that waits elsewhere."""

    def __init__(self, number: int) -> None:
        self.number = number


class _Keep(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, kept: Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = kept

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if is_attention(func):
            self.kept.keep(func, outputs)
        return outputs


class _Replay(_Keep):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        found = self.kept.next(func) if is_attention(func) else None
        return func(*args, **(kwargs or {})) if found is None else found


class _Watch(TorchFunctionMode):
    """Enters `mode` for each call of attention without dropout."""

    def __init__(self, mode: AbstractContextManager[Any]) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        words = kwargs or {}
        if not _calls_attention(func, args, words):
            return func(*args, **words)
        with self.mode:
            return func(*args, **words)


def keeping(kept: Kept, *, announced: bool) -> AbstractContextManager[Any]:
    """For the first pass. `announced`: as `is_announced` says of the block."""
    return around_attention(_Keep(kept)) if announced else _Watch(_Keep(kept))


def replaying(kept: Kept, *, announced: bool) -> AbstractContextManager[Any]:
    """For the second."""
    return around_attention(_Replay(kept)) if announced else _Watch(_Replay(kept))


def is_announced(block: nn.Module) -> bool:
    """Whether the block calls its attention through `nn/attention.py`."""
    configs = [vars(module).get("config") for module in block.modules()]
    return any(getattr(config, "_attn_implementation", None) == PACKED for config in configs)


def is_attention(operation: OpOverload) -> bool:
    """Whether an operation below autograd is a fused attention, forward."""
    found = _KNOWN.get(operation)
    if found is None:
        name = operation._schema.name.rpartition("::")[2]
        found = any(word in name for word in ATTENTION_WORDS) and "backward" not in name
        _KNOWN[operation] = found
    return found


_KNOWN: dict[OpOverload, bool] = {}


def _calls_attention(func: Any, args: Sequence[Any], words: Mapping[str, Any]) -> bool:
    if func is F.scaled_dot_product_attention:
        dropout = words.get("dropout_p", args[4] if len(args) > 4 else 0.0)
        return not dropout
    return isinstance(func, OpOverload) and is_attention(func)
