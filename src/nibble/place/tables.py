"""The frozen tables at both ends of a sharded model, whole only while they are used.

A vocabulary of 128k at width 4096 is 1 GiB in 16 bit, twice: the embedding is read in the first
moment of a pass and the head in its last. Gathered with what stands outside of the blocks they
would stay from forward to the end of backward, beside the largest activations. So

    embedding    a unit of its own: gathered for its forward, freed after it
    head         a DTensor whose rows are gathered when the decoder is done, until the loss is made

The head is no FSDP unit, as the loss multiplies by its weight and never calls it; that loss keeps
nothing of it for backward (nn/loss.py). What is trained, tied or wrapped by an adapter stays with
the rest: its gradient needs FSDP's own hooks. Costs one more gather a pass, of bytes that would be
gathered anyway.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from nibble.models import Built
from nibble.place.shard_views import part


@dataclass(frozen=True, kw_only=True)
class Tables:
    """The embedding and the head that may come and go by themselves."""

    embedding: nn.Module | None
    head: nn.Module | None


def tables(built: Built) -> Tables:
    """The frozen embedding in the decoder and the frozen head beside it, if nobody shares them."""
    model, decoder = built.model, built.family.decoder(built.model)
    held = (p for m in model.modules() for p in m._parameters.values() if p is not None)
    uses = Counter(map(id, held))

    def is_apart(module: nn.Module | None) -> bool:
        if module is None or any(True for _ in module.children()):
            return False
        own = list(module.parameters())
        return bool(own) and all(not p.requires_grad and uses[id(p)] == 1 for p in own)

    embedding = model.get_input_embeddings()  # type: ignore[operator]
    if not is_apart(embedding) or all(module is not embedding for module in decoder.modules()):
        embedding = None
    head = built.family.head(model)
    if not is_apart(head) or all(child is not head for child in model.children()):
        head = None
    return Tables(embedding=embedding, head=head)


class GatheredHead:
    """A head whose rows are shared out; `during` makes it whole from the decoder's end on."""

    def __init__(self, head: nn.Module, mesh: DeviceMesh, *, device: torch.device) -> None:
        """Replace the head's meta parameters by empty rows on `device`."""
        self._head = head
        self._sharded: dict[str, nn.Parameter] = {}
        for name, whole in head.named_parameters(recurse=False):
            held = _rows_of(whole, mesh, device=device)
            self._sharded[name] = nn.Parameter(held, requires_grad=False)
        self._show(self._sharded)

    @contextmanager
    def during(self, decoder: nn.Module) -> Iterator[None]:
        """Surrounds a pass through the decoder and the loss."""
        hook = decoder.register_forward_hook(self._gather)
        try:
            yield
        finally:
            hook.remove()
            self._show(self._sharded)

    @torch.no_grad()
    def _gather(self, *_: object) -> None:
        whole = {}
        for name, parameter in self._sharded.items():
            held = parameter.data
            assert isinstance(held, DTensor)
            whole[name] = nn.Parameter(held.full_tensor(), requires_grad=False)
        self._show(whole)

    def _show(self, parameters: dict[str, nn.Parameter]) -> None:
        self._head._parameters.update(parameters)


def around_head(
    head: GatheredHead, decoder: nn.Module, compute: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """An objective that finds the head whole once the decoder is done."""

    def computed(model: nn.Module, batch: object) -> Tensor:
        with head.during(decoder):
            return compute(model, batch)

    return computed


def _rows_of(whole: Tensor, mesh: DeviceMesh, *, device: torch.device) -> DTensor:
    """Room for this process's rows of a tensor, cut as FSDP cuts it."""
    shape = tuple(whole.shape)
    own = part(shape, 0, rank=mesh.get_local_rank(-1), world=mesh.size(-1))
    local = torch.empty((own.length, *shape[1:]), dtype=whole.dtype, device=device)
    copies = [Replicate()] * (mesh.ndim - 1)
    return DTensor.from_local(
        local,
        mesh,
        [*copies, Shard(0)],
        run_check=False,
        shape=torch.Size(shape),
        stride=whole.stride(),
    )
