"""A model of which one block at a time is in memory.

Exporting and measuring a 70B model must not need the memory of a 70B model. Everything outside the
repeated blocks (embeddings, final norm, head) is loaded at once; a block is filled from the
checkpoint when it is entered and emptied when it is left. A forward pass does that by itself
through hooks, so whole-model logits cost one block of memory and one read of the checkpoint. For
inference only.

The base comes from its checkpoint through the same stream that loads a run, so it is quantised the
same way; trained tensors come from the run's checkpoint and win over the base's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nibble.models import Built
from nibble.models.initialise import find_ties, finish
from nibble.nn.adapters import locate
from nibble.nn.quant import PackedWeight, QuantLinear

Values = Callable[[Callable[[str], bool]], Iterator[tuple[str, Tensor | PackedWeight]]]
"""(name, value) of the base's parameters whose name is wanted."""


class LazyModel:
    """`built.model` with its blocks on the meta device except while they are used."""

    def __init__(
        self,
        built: Built,
        *,
        values: Values,
        trained: Mapping[str, Tensor],
        device: torch.device,
        hold_trained: bool,
    ) -> None:
        """`hold_trained` keeps trained tensors in memory: for adapters, which are small."""
        self.model = built.model.eval().requires_grad_(False)
        self.family = built.family
        self.values = values
        self.trained = trained
        self.device = device
        self.blocks = dict(self.family.blocks(self.model))
        prefix = f"{self.family.block_path}."
        held = frozenset(trained) if hold_trained else frozenset[str]()
        for name in held:
            # What is trained is told by this mark, and an adapter's files hold just that.
            self.model.get_parameter(name).requires_grad_(True)
        names = {id(p): name for name, p in self.model.named_parameters()}
        self._lazy = {
            module: [leaf for leaf, p in module._parameters.items() if names.get(id(p)) not in held]
            for block in self.blocks.values()
            for module in block.modules()
        }
        self._materialise_outside()
        self._fill(lambda name: name in held or not name.startswith(prefix))
        for name, block in self.blocks.items():
            block.register_forward_pre_hook(self._before(name))
            block.register_forward_hook(self._after(name))
        self._held = held

    def _materialise_outside(self) -> None:
        ties = find_ties(self.model)
        lazy = {id(m._parameters[leaf]) for m, leaves in self._lazy.items() for leaf in leaves}

        def placed(tensor: Tensor) -> Tensor:
            keep = id(tensor) in lazy or not tensor.is_meta
            return tensor if keep else torch.empty_like(tensor, device=self.device)

        self.model._apply(placed)  # type: ignore[no-untyped-call]
        finish(self.model, ties=ties)

    @torch.no_grad()
    def _fill(self, wanted: Callable[[str], bool]) -> None:
        for name, value in self.values(lambda n: wanted(n) and n not in self.trained):
            module, leaf = locate(self.model, name)
            if isinstance(module, QuantLinear) and leaf == "weight":
                module.load_(value)
            else:
                assert isinstance(value, Tensor)
                module.get_parameter(leaf).copy_(value) if leaf in module._parameters else (
                    module.get_buffer(leaf).copy_(value)
                )
        for name in filter(wanted, self.trained):
            self.model.get_parameter(name).copy_(self.trained[name])

    @contextmanager
    def filled(self, name: str) -> Iterator[nn.Module]:
        """The block called `name`, in memory."""
        block = self.blocks[name]
        self._swap(block, self.device)
        self._fill(lambda n: n.startswith(f"{name}.") and n not in self._held)
        try:
            yield block
        finally:
            self._swap(block, torch.device("meta"))

    def _swap(self, block: nn.Module, device: torch.device) -> None:
        """Give the block's lazy parameters fresh storage on a device; what they held is gone."""
        for module in block.modules():
            for leaf in self._lazy[module]:
                parameter = module._parameters[leaf]
                if parameter is not None:
                    fresh = torch.empty_like(parameter, device=device)
                    module._parameters[leaf] = nn.Parameter(fresh, requires_grad=False)

    def _before(self, name: str) -> Callable[..., None]:
        def enter(_module: nn.Module, _inputs: Any) -> None:
            self._open = self.filled(name)
            self._open.__enter__()

        return enter

    def _after(self, name: str) -> Callable[..., None]:
        def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            self._open.__exit__(None, None, None)

        return leave
