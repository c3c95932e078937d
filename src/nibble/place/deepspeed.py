"""ZeRO-2 and ZeRO-3 by the deepspeed library (Rajbhandari et al. 2020, arXiv 1910.02054).

    stage 2    gradients and optimiser state are shared out; all weights on every device
    stage 3    weights too: gathered for a block's forward and backward, freed after each

What is the library's: it partitions, gathers, sums gradients, and copies updated weights back. What
is not: the update. It keeps fp32 copies of the trained weights in flat pieces, a range of each
tensor on each process, and nibble's optimiser steps those, so that rules, schedules, loss scales,
clipping and checkpoints are the ones of every placement. The library's engine gets an optimiser
that does nothing; its step hands the new weights round.

    loss -> engine forward and backward -> pieces' gradients -> optimiser on pieces -> engine step

Its gradients are means over the processes; losses here are divided by the targets of all, so pieces
get the sum. Rules that need rows and columns of a matrix cannot step pieces of it and are refused
(spec/contradictions.py), as are packed weights. Costs: fp32 copies of what is trained, which `fsdp`
does without. In a block all weights are fetched together, as fast paths read the weights of their
parts; where recomputation is on it runs to its end, as the library counts who came and went.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from nibble.data import Batch
from nibble.errors import ConfigError, PlacementError
from nibble.models import Built
from nibble.models.initialise import find_ties, finish
from nibble.nn.adapters import adapters
from nibble.nn.quant import PackedWeight
from nibble.optim import clip_grad_norm_
from nibble.optim.shards import FLAT, ShardView
from nibble.place.activations import Activations
from nibble.place.base import Objective
from nibble.place.group import Group
from nibble.place.shard_views import collected
from nibble.place.single import Single
from nibble.spec.config import Place
from nibble.spec.holdings import GATHERED_BLOCKS, ZERO_BUCKET_NUMEL

EXTRA = 'pip install "nibble[deepspeed]"'


class DeepSpeed(Single):
    """The placement of flat pieces, made and moved by the library."""

    def __init__(self, place: Place, group: Group) -> None:
        super().__init__(place, group)
        self._stage = place.zero_stage
        self._library = _library(group)
        self._engine: Any = None
        self._pass = _Pass()
        self._whole: dict[str, nn.Parameter] = {}
        self._units: list[tuple[nn.Module, list[nn.Parameter]]] = []
        self._has_gradients = False
        self._largest = 0
        """Numbers in the largest block."""

    @property
    def num_parts(self) -> int:
        """All processes share one copy of what is trained."""
        return self.world

    def arrange(self, built: Built, *, activations: Activations) -> nn.Module:
        """Empty storage: of everything, or in stage 3 of this process's pieces."""
        model = super().arrange(built, activations=activations)
        blocks = [block for _, block in built.family.blocks(model)]
        inside = {id(p) for block in blocks for p in block.parameters()}
        self._units = [(block, list(block.parameters())) for block in blocks]
        head = built.family.head(model)
        beside = [p for p in model.parameters() if id(p) not in inside]
        decoder = {id(p) for p in built.family.decoder(model).parameters()}
        apart = [p for p in beside if id(p) not in decoder]
        tied = [] if head is None else [p for p in head.parameters() if id(p) in decoder]
        # The loss reads the head's weight itself: it stays for the whole pass.
        self._units.append((self._pass, [*apart, *tied]))
        return model

    def _allocate(self, built: Built) -> None:
        """Storage for the model; in stage 3 one block is whole at a time."""
        model = built.model
        sizes = [
            sum(p.numel() for p in block.parameters()) for _, block in built.family.blocks(model)
        ]
        self._largest = max(sizes, default=0)
        if self._stage < 3:
            super()._allocate(built)
            return
        ties = find_ties(model)
        partition = partial(self._library.zero.Init, config_dict_or_path=self._words())
        for _, block in built.family.blocks(model):
            block.to_empty(device=self.device)
            partition(module=block)
        for module in model.modules():
            own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            if any(tensor.is_meta for tensor in own):
                module.to_empty(device=self.device, recurse=False)
        finish(model, ties=ties)
        partition(module=model)

    def _words(self) -> dict[str, Any]:
        """The library's configuration."""
        num_trained = sum(_shape(p).numel() for p in self._whole.values())
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "zero_allow_untested_optimizer": True,
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
            "steps_per_print": None,
            "zero_optimization": {
                "stage": self._stage,
                # A buffer of so many fp32 values stays allocated.
                "reduce_bucket_size": min(max(num_trained, 1), ZERO_BUCKET_NUMEL),
                # It would replace torch's own linear for the whole process.
                "memory_efficient_linear": False,
                # The next block comes while one computes, and none stays.
                "stage3_prefetch_bucket_size": self._largest,
                "stage3_max_live_parameters": GATHERED_BLOCKS * self._largest,
                "stage3_max_reuse_distance": 0,
                "stage3_param_persistence_threshold": 0,
            },
        }

    def _gathered(
        self, parameters: Sequence[nn.Parameter], *, changes: bool
    ) -> AbstractContextManager[Any]:
        """Surrounds the use of whole parameters; `changes`: they are written, by all alike."""
        if self._stage < 3:
            return nullcontext()
        context: AbstractContextManager[Any] = self._library.zero.GatheredParameters(
            list(parameters), modifier_rank=0 if changes else None
        )
        return context

    def _fill(
        self, owner: nn.Module, leaf: str, name: str, value: Tensor | PackedWeight
    ) -> Sequence[Tensor]:
        """Put a value where it belongs."""
        held = owner._parameters.get(leaf)
        with self._gathered([] if held is None else [held], changes=True):
            return super()._fill(owner, leaf, name, value)

    @torch.no_grad()
    def put_(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Copy a value into a parameter, of which a piece may live here."""
        with self._gathered([parameter], changes=True):
            parameter.copy_(whole)

    @torch.no_grad()
    def parts(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model; in stage 3 what reads the base: each DoRA adapter, gathered."""
        if self._stage < 3:
            yield model
            return
        for adapter in adapters(model).values():
            if adapter.magnitude is not None:
                with self._gathered(list(adapter.parameters()), changes=True):
                    yield adapter

    def trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The pieces of fp32 copies that live here, by the model's names; tied ones once."""
        if not self._trained:
            self._whole = {n: p for n, p in model.named_parameters() if p.requires_grad}
            if self._whole:
                self._start(model)
            for name, parameter in self._whole.items():
                piece, start = self._piece(parameter)
                self._trained[name] = nn.Parameter(piece)
                self._views[name] = ShardView(
                    shape=tuple(_shape(parameter)), dim=FLAT, start=start, sum_=self._sum_parts
                )
        return dict(self._trained)

    def _start(self, model: nn.Module) -> None:
        """Give the loaded model to the library."""
        types = {p.dtype: name for name, p in self._whole.items()}
        if len(types) > 1:
            (one, name), (other, second) = list(types.items())[:2]
            raise PlacementError(
                f"place.kind=deepspeed keeps what is trained in one buffer, but {name} is {one} "
                f"and {second} is {other}: use train.precision=fp32, or place.kind=ddp"
            )
        self._pass.model = model
        self._engine, *_ = self._library.initialize(
            model=self._pass,
            optimizer=_Idle(self._whole.values()),
            config=self._words(),
            dist_init_required=False,
        )
        if self._stage == 3:
            for unit, parameters in self._units:
                for parameter in parameters:
                    self._library.zero.register_external_parameter(unit, parameter)

    def _piece(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        """What lives here of the fp32 copy of a parameter, and where in the parameter it begins."""
        held: Any = parameter
        if self._stage == 3:
            local = self._library.utils.safe_get_local_fp32_param(parameter)
            start = min(self.rank * local.numel(), held.ds_numel)
            return local.detach()[: held.ds_numel - start], start
        fragment = held._hp_mapping
        if fragment is None:
            return torch.empty(0, device=self.device), 0
        return fragment.hp_fragment.detach(), fragment.lp_fragment_address.start

    def _gradient(self, parameter: nn.Parameter, numel: int) -> Tensor:
        """The mean over processes of the piece's gradient, the library's own memory."""
        held: Any = parameter
        if self._stage == 3:
            local: Tensor = self._library.utils.safe_get_local_grad(parameter)
            return local[:numel]
        grad: Tensor = held._hp_mapping.get_lp_grad_fragment(held._index_in_param_group)
        return grad.view(-1)

    def around(self, objective: Objective) -> Objective:
        """The objective, computed in the engine's forward."""

        def computed(model: nn.Module, batch: Batch) -> Tensor:
            kind = self.device.type
            casts, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

            def compute() -> Tensor:
                # The engine turns autocast off.
                with torch.autocast(kind, dtype, enabled=casts):
                    return objective(model, batch)

            self._pass.compute = compute
            loss: Tensor = self._engine()
            return loss

        return computed

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """The pieces' gradients are complete after the last pass of a step."""
        assert self._engine is not None, "trained() comes before the first pass"
        self._engine.set_gradient_accumulation_boundary(last)
        with set_checkpoint_early_stop(self._stage < 3):
            yield
        if last:
            self._hand_over()

    def _hand_over(self) -> None:
        """Give each piece its gradient: the sum over processes."""
        grads = []
        for name, piece in self._trained.items():
            if piece.numel():
                piece.grad = self._gradient(self._whole[name], piece.numel())
                grads.append(piece.grad)
        if grads:
            torch._foreach_mul_(grads, float(self.world))
        self._has_gradients = True

    def _sum_parts(self, tensors: Sequence[Tensor]) -> None:
        self.group.sum_(list(tensors))

    @torch.no_grad()
    def clip_(self, parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
        """Scale the gradients to a norm, over all pieces, of at most `max_norm`; returns the norm
        before.
        """
        return clip_grad_norm_(parameters, max_norm, sum_=self._sum_parts, device=self.device)

    @torch.no_grad()
    def follow(self) -> None:
        """Let the model's weights be what the pieces hold now."""
        if self._has_gradients:
            self._engine.step()
            self._has_gradients = False
            return
        for parameter in self._whole.values():
            whole = self._library.utils.safe_get_full_fp32_param(parameter)
            with self._gathered([parameter], changes=True):
                parameter.copy_(whole)

    def whole(self, own: Tensor, dim: int | None, sizes: Sequence[int]) -> Tensor | None:
        """All of a tensor of which pieces, `sizes` long, live here, on rank 0 in host memory."""
        if dim is None:
            return super().whole(own, None, sizes)
        return collected(self.group, own, dim, sizes)

    def close(self) -> None:
        """Take the library's hooks off the model."""
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None
        super().close()


class _Pass(nn.Module):
    """What the engine takes for its model: a pass through the loss is a forward of it."""

    def __init__(self) -> None:
        super().__init__()
        self.model: nn.Module = nn.Identity()
        self.compute: Callable[[], Tensor] | None = None

    def forward(self) -> Tensor:
        assert self.compute is not None
        loss = self.compute()
        self.compute = None
        return loss


class _Idle(torch.optim.Optimizer):
    """What the engine takes for its optimiser: the update has been made when it is asked."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(list(parameters), {"lr": 0.0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing."""
        del closure


def _shape(parameter: nn.Parameter) -> torch.Size:
    """The whole shape of a parameter that may be partitioned."""
    return torch.Size(vars(parameter).get("ds_shape", parameter.shape))


def _library(group: Group) -> Any:
    """deepspeed, told which device is this process's and to be silent.

    Raises ConfigError when it is not installed.
    """
    if group.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    index = group.local_rank if group.device.index is None else group.device.index
    os.environ["LOCAL_RANK"] = str(index)
    try:
        library = importlib.import_module("deepspeed")
    except ImportError:
        raise ConfigError(
            f"place.kind=deepspeed needs deepspeed: {EXTRA}, or use place.kind=fsdp"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls torch by names that torch 2.13 warns of, once more at nearly every message: 140 kB in
    # twenty steps of two blocks, and a process whose output nobody reads stops when a pipe is full.
    warnings.filterwarnings(
        "ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning
    )
    if group.device.type == "cpu":
        # It would compile its own messages in shared memory, and wait for ever for a compilation
        # that was once interrupted.
        vars(importlib.import_module("deepspeed.ops"))["__compatible_ops__"] = {}
    with group.during("the start of deepspeed"):
        library.init_distributed(dist_init_required=False, verbose=False)
    return library
