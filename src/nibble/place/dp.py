"""torch's DataParallel: one process, several GPUs. For comparison and teaching; `ddp` is better.

In every pass the decoder is copied from the first GPU to all (`replicate`), the rows of the batch
are dealt out (`scatter`), one thread a GPU computes (`parallel_apply`), and hidden states return to
the first GPU (`gather`), which alone makes the loss, holds the gradients and updates. So each pass
moves all weights, and gradients once more; the threads share one interpreter lock; the first GPU
needs more memory than the others; and rows can only be split where a pass has several. `ddp` moves
gradients alone, once a step, behind the computation. bench/dp.py measures both.

The parts are torch's own (torch.nn.parallel). A copy computes with the forward of its modules'
classes: what was put on instances (recomputation, fast paths) speaks of the first GPU's modules, so
it is taken off copies and recomputation is put on anew.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import gather, parallel_apply, replicate
from torch.nn.parallel.scatter_gather import scatter_kwargs
from torch.utils.checkpoint import checkpoint

from nibble.data import Batch
from nibble.errors import NibbleWarning, PlacementError
from nibble.models import Built
from nibble.place.activations import Activations
from nibble.place.base import Memory
from nibble.place.devices import cap_vram
from nibble.place.group import Group
from nibble.place.single import Single
from nibble.spec.config import Place
from nibble.spec.units import parse_bytes

DDP_TIMES = 1.64
"""How many times the tokens per second of dp ddp made of the same rows."""
MEASURED_ON = "Llama-3-8B QLoRA, 4x2048 a card, two H200s (bench/dp.py)"


def advice() -> str:
    """What is said whenever this placement is taken."""
    return (
        "place.kind=dp copies all weights to every GPU in every pass and computes in threads of "
        "one process; place.kind=ddp gives the same gradients, "
        f"{DDP_TIMES:g} times as fast on {MEASURED_ON}"
    )


class DataParallel(Single):
    """The placement of one process that computes on several GPUs and keeps all on the first."""

    def __init__(self, place: Place, group: Group) -> None:
        super().__init__(place, group)
        self.devices = _devices(place, group)
        if place.vram is not None:
            for device in self.devices[1:]:
                cap_vram(device, parse_bytes(place.vram))
        warnings.warn(advice(), NibbleWarning, stacklevel=3)

    def arrange(self, built: Built, *, activations: Activations) -> nn.Module:
        """Everything on the first device; the decoder's forward deals its rows out.

        Raises PlacementError for ways to keep activations that copies cannot follow.
        """
        if activations.offload or activations.policy == "selective":
            word = "activation_offload" if activations.offload else "activation_checkpointing"
            raise PlacementError(
                f"place.kind=dp with train.{word}: copies can keep or recompute activations, no "
                "more; use place.kind=ddp"
            )
        model = super().arrange(built, activations=Activations(policy="none"))
        decoder = built.family.decoder(model)
        blocks = {id(block) for _, block in built.family.blocks(model)}
        names = [name for name, module in decoder.named_modules() if id(module) in blocks]
        kept = activations.keep_blocks if activations.policy == "full" else len(names)
        decoder.forward = Parallel(
            decoder=decoder,
            devices=tuple(self.devices),
            recomputed=tuple(names[: len(names) - kept]),
        )
        return model

    def batch(self, batch: Batch) -> Batch:
        """The batch on the first device, as rows: offsets of documents count through all of them
        and cannot be dealt out; position ids say the same.
        """
        return super().batch(dataclasses.replace(batch, offsets=None))

    def memory(self) -> Memory:
        """Peaks of the device that has most."""
        each = [
            (torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))
            for device in self.devices
            if device.type == "cuda"
        ]
        host = super().memory().host_bytes
        return Memory(
            allocated_bytes=max((one[0] for one in each), default=0),
            reserved_bytes=max((one[1] for one in each), default=0),
            host_bytes=host,
        )


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """A decoder's forward on several devices; `recomputed` names the blocks that forget."""

    decoder: nn.Module
    devices: tuple[torch.device, ...]
    recomputed: tuple[str, ...] = ()

    @property
    def __signature__(self) -> inspect.Signature:
        """The decoder's own: who calls it asks what it takes, and nobody may keep a cache."""
        return inspect.signature(type(self.decoder).forward.__get__(self.decoder))

    def __call__(self, *args: Any, **words: Any) -> Any:
        """What the decoder takes and returns, of all rows, on the first device."""
        inputs, keywords = scatter_kwargs(args, words, self.devices)
        devices = self.devices[: len(inputs)]
        copies = replicate(self.decoder, devices, detach=not torch.is_grad_enabled())
        for copy in copies:
            own_forward_(copy, self.recomputed if torch.is_grad_enabled() else ())
        return gather(parallel_apply(copies, inputs, keywords, devices), devices[0])


def own_forward_(copy: nn.Module, recomputed: Sequence[str]) -> None:
    """Let a copy compute with its own modules: forwards and hooks on instances are the original's.

    The blocks named `recomputed` keep their input only.
    """
    for module in copy.modules():
        vars(module).pop("forward", None)
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            vars(module)[hooks] = type(vars(module)[hooks])()
    for name in recomputed:
        block = copy.get_submodule(name)
        block.forward = _Forgetful(block.forward)


@dataclass(frozen=True)
class _Forgetful:
    """A block's forward that is computed again in backward."""

    forward: Any

    def __call__(self, *args: Any, **words: Any) -> Any:
        return checkpoint(self.forward, *args, use_reentrant=False, **words)


def _devices(place: Place, group: Group) -> list[torch.device]:
    """The GPUs to compute on, the one that keeps everything first."""
    if group.device.type != "cuda":
        raise PlacementError("place.kind=dp copies to GPUs, and none answers: use place.kind=ddp")
    there = torch.cuda.device_count()
    wanted = place.num_devices or there
    if wanted > there:
        raise PlacementError(f"place.num_devices={wanted}, but this machine shows {there} GPUs")
    if wanted < 2:
        raise PlacementError(
            "place.kind=dp with one GPU has nobody to share with: use place.kind=single"
        )
    return [torch.device("cuda", index) for index in range(wanted)]
