"""A safetensors file as a mapping from names to tensors, read when asked for.

The trained tensors of a run may be a whole model: exporting one must not hold it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nibble.errors import WeightError


class TensorFile(Mapping[str, Tensor]):
    """Names of a .safetensors file; each look-up reads one tensor into host memory.

    Raises WeightError when the file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise WeightError(f"{path} cannot be read ({error}): use another checkpoint") from None
        self._names = tuple(self._file.keys())  # type: ignore[no-untyped-call]
        self._known = frozenset(self._names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._known:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
