"""Counts the bytes of live tensors while nibble's own code runs on a CPU, as a GPU would hold them.

Every storage that an operation makes is counted, in whole pieces of 512 bytes, until the last
tensor on it is gone, which is seen when the next operation begins. Triton's kernels are launched
as nothing: the functions around them allocate what they allocate on a GPU. What an operation has
for itself while it runs is added where it counts
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PIECE = 512
NUM_PYTHON_REFERENCES, NUM_TENSOR_REFERENCES, NUM_STORAGE_REFERENCES = 4, 4, 2
"""To an argument that only autograd's engine holds, as `_sums_gradients` sees it."""
FUSED_NUMEL, BATCH_NBYTES = 1 << 14, 1 << 22
"""As in nibble/optim, for matrices of some ten thousand weights."""


def _pieces(nbytes: int) -> int:
    return -(-nbytes // PIECE) * PIECE


def _attention_backward(args: Sequence[Any]) -> int:
    """Flash attention's own: sums of the query's gradient in fp32, a number a row, and key's and
    value's gradients for each head of the query."""
    _, query, key = args[:3]
    rows, heads, length, dim = query.shape
    rounded, wide = -(-length // 128) * 128, -(-dim // 32) * 32
    scratch = _pieces(4 * rows * heads * rounded * wide) + _pieces(4 * rows * heads * rounded)
    if key.shape[1] != heads:
        scratch += 2 * _pieces(rows * heads * length * dim * query.element_size())
    return scratch


SCRATCH: dict[str, Callable[[Sequence[Any]], int]] = {
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}


def _sums_gradients(args: Sequence[Any]) -> bool:
    """Whether autograd adds two gradients of one tensor, the first of which nobody else holds: it
    does that in place, but not under a mode like this one."""
    if torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled() or len(args) != 2:
        return False
    one, other = args[0], args[1]
    alike = isinstance(other, Tensor) and one.shape == other.shape and one.dtype == other.dtype
    if not alike or not one.is_contiguous() or sys.getrefcount(one) > NUM_PYTHON_REFERENCES:
        return False
    storage = one.untyped_storage()._cdata
    num = one._use_count(), torch._C._storage_Use_Count(storage)  # type: ignore[attr-defined]
    return num[0] <= NUM_TENSOR_REFERENCES and num[1] <= NUM_STORAGE_REFERENCES


class Count(TorchDispatchMode):
    """`live` bytes, their `peak` since the last `begin`, and what was alive then."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.at_peak: list[tuple[str, int]] = []
        self.last = ""
        self._held: dict[int, tuple[str, int, StorageWeakRef]] = {}

    def begin(self) -> None:
        """A new peak."""
        self._sweep()
        self.peak, self.at_peak = 0, []
        self._look("begin", 0)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self._sweep()
        name = func.overloadpacket.__name__
        if name == "add" and _sums_gradients(args):
            return args[0].add_(args[1])
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, Tensor) and value.device.type == "cpu":
                self._see(value, name)
        scratch = SCRATCH.get(name)
        self._look(name, 0 if scratch is None else scratch(args))
        return made

    def _see(self, tensor: Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        nbytes = _pieces(storage.nbytes())
        name = f"{name}{tuple(tensor.shape)}{str(tensor.dtype)[6:]}"
        self._held[key] = (name, nbytes, StorageWeakRef(storage))
        self.live += nbytes

    def _sweep(self) -> None:
        for key in [key for key, (_, _, storage) in self._held.items() if storage.expired()]:
            self.live -= self._held.pop(key)[1]

    def _look(self, name: str, scratch: int) -> None:
        if self.live + scratch > self.peak:
            self.peak, self.last = self.live + scratch, name
            self.at_peak = [held[:2] for held in self._held.values()]
            self.at_peak.append(("scratch of " + name, scratch))

    def table(self, num: int = 25) -> str:
        """What was alive at the peak, largest first."""
        sums: Counter[str] = Counter()
        count: Counter[str] = Counter()
        for name, nbytes in self.at_peak:
            sums[name] += nbytes
            count[name] += 1
        rows = [f"{size:12,} {count[name]:4} {name}" for name, size in sums.most_common(num)]
        return "\n".join([f"peak {self.peak:,} at {self.last}", *rows])


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Let the functions around Triton's kernels run here, without the kernels."""
    from nibble import kernels
    from nibble.kernels import balancing, layers, steps
    from nibble.kernels import launch as launching

    def nothing(*args: Any, **words: Any) -> None:
        del args, words

    real = {
        launching.launch: nothing,
        layers.layer_kernels: lambda device_type: layers.triton_kernels(),
        steps.step_kernels: lambda device_type: steps.StepKernels(
            adamw_=nothing,
            move_=nothing,
            move_int8_=nothing,
            balancing=balancing.TRITON,
        ),
        kernels.select: _select,
        kernels.select_matmul: _select_matmul,
    }
    layers.triton_kernels()
    import nibble.kernels.int8
    import nibble.optim.batches
    import nibble.optim.update

    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if not name.startswith("nibble") or module is None:
                continue
            for word, value in list(vars(module).items()):
                if callable(value) and getattr(value, "__hash__", None) and value in real:
                    patch.setattr(module, word, real[value])
        for module in (nibble.optim.batches, nibble.optim.update):
            patch.setattr(module, "FUSED_NUMEL", FUSED_NUMEL)
        patch.setattr(nibble.optim.batches, "BATCH_NBYTES", BATCH_NBYTES)
        yield


def _select(spec: Any, *, device: Any, choice: str = "auto") -> Any:
    from nibble import kernels

    del device, choice
    return _unpacked if spec.name in kernels.TRITON_MODULES else kernels.CODECS[spec.name].unpack


def _unpacked(spec: Any, tensors: Any, *, shape: Any, dtype: Any) -> Tensor:
    """Every format's kernel makes the dense weight and nothing else."""
    return torch.zeros(shape, dtype=dtype)


def _select_matmul(spec: Any, *, device: Any, choice: str = "auto") -> Any:
    from nibble.kernels import int8

    del device, choice
    return int8.matmul if spec.name == "int8" else None
