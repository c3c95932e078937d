"""Modules that are trained in another type than the model computes in.

Two forward hooks cast: inputs to the module's type, outputs back to the model's. Nothing else in
the model knows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Cast:
    """Forward hooks of a module that is trained in another type than the model computes in."""

    dtype: torch.dtype

    def before(self, _module: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
        return tuple(_cast(value, self.dtype) for value in inputs)

    def after(self, _module: nn.Module, _inputs: object, output: object) -> object:
        return _cast(output, self.dtype)


def _cast(value: object, dtype: torch.dtype) -> object:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if is_float and isinstance(value, Tensor) else value


def train_in_full_(module: nn.Module, dtype: torch.dtype, *, compute: torch.dtype) -> None:
    """Unfreeze `module` and keep it in `dtype`; its inputs and outputs are cast where the model's
    type differs."""
    module.requires_grad_(True)
    if compute != dtype:
        module.to(dtype)
        module.register_forward_pre_hook(_Cast(dtype).before)
        module.register_forward_hook(_Cast(compute).after)
