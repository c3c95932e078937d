"""Layer-wise mode: no full gradient of a projected parameter outlives its layer's backward.

    in backward, micro-batch i:   R += P^T G_i;   Y += G_i S, if a basis is due;   G_i is dropped
    step:                         W <- W - lr * scale * P rule(R)
    after it, if due:             P' = orthonormal range of Y

Both sums are linear in the gradient, so k micro-batches equal one batch, whatever they are scaled
by; the norm of R is the norm that clipping needs, and memory is r / min(m, n) of full gradients
(arXiv 2403.03507 proposes updates in backward, which step at every micro-batch; these do not).

A basis for step t + 1 comes from the sketch of step t (arXiv 0909.4061). The columns S are those of
the rule's momentum M of R and half as much noise: G M^T is a step of power iteration from the
present basis, and M is the same for all micro-batches. Where a rule keeps no momentum, they are
Gaussian. At the first step there is no sketch yet: matrices begin on random orthonormal bases and
get their first real ones within FIRST_STEPS steps, spread like all refreshes when the group has
`stagger`.

`param.grad` holds the small matrix (projected_grad.py) between backward and `zero_grad`, so the
optimiser stays an ordinary one: schedules, clipping, `zero_grad` and trainers work as they are.

`in_backward` steps every matrix as soon as its gradient is there, as the paper does: then not even
small gradients are kept, and the step is the same, bit for bit. It is for one pass a step, without
clipping, on one device: more would step more than once, which is refused. Of a gradient remains its
norm. Where a basis or residual asks for the whole gradient, it is stepped with as it is, and the
step is that of the ordinary mode.

Small matrices are kept in the gradient's type, or in another that is asked for: float32 for sums of
many 16-bit micro-batches. Costs: 2 m n r flops a micro-batch to project, which the ordinary mode
pays once a step; random columns are made again for every micro-batch of a step with a sketch. Not
possible but in backward: bases by SVD, and residuals, which need whole gradients at the step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from nibble.errors import ConfigError
from nibble.numerics import lowrank
from nibble.optim.optimizer import Optimizer, initialise_
from nibble.optim.projected_grad import ProjectedGrad, projected_grad, register_absent
from nibble.optim.projection import Projection
from nibble.optim.states import unpack
from nibble.spec.state import slot_tensors, slots

FIRST_STEPS = 16
"""Steps within which all matrices leave their random first bases."""
BASES = ("randomised", "random")


class Layerwise:
    """The hooks that keep an optimiser's projected gradients small; `remove` takes them off."""

    def __init__(
        self, optimizer: Optimizer, *, dtype: torch.dtype | None, in_backward: bool
    ) -> None:
        self._optimizer = optimizer
        self._dtype = dtype
        self._in_backward = in_backward
        self._numbers: dict[Tensor, tuple[int, int]] = {}
        self._held: dict[Tensor, ProjectedGrad] = {}
        self._found: dict[Tensor, tuple[Projection, dict[str, Any]]] = {}
        self._look_up()
        handles: list[RemovableHandle] = []
        for weight in self._found:
            before, after = weight.register_hook, weight.register_post_accumulate_grad_hook
            handles.append(before(self._before(weight)))  # type: ignore[no-untyped-call]
            handles.append(after(_weakly(self._after)))  # type: ignore[no-untyped-call]
            register_absent(weight, self._absent)
        for weight in self._numbers if in_backward else ():
            if weight not in self._found and weight.dim() > 1:
                before, after = weight.register_hook, weight.register_post_accumulate_grad_hook
                handles.append(before(self._before(weight)))  # type: ignore[no-untyped-call]
                handles.append(after(_weakly(self._step_now)))  # type: ignore[no-untyped-call]
        handles.append(optimizer.register_step_post_hook(self._finish))
        # Loading replaces the groups and their options.
        handles.append(optimizer.register_load_state_dict_post_hook(lambda _: self._look_up()))
        self._handles = handles

    def remove(self) -> None:
        """Take the hooks off: gradients are whole again from the next backward on."""
        for handle in self._handles:
            handle.remove()
        for weight in self._found:
            register_absent(weight, None)

    def _look_up(self) -> None:
        """Find every projected parameter's options and group."""
        self._found = {
            weight: (projection, group)
            for index, group in enumerate(self._optimizer.param_groups)
            for weight, projection in self._optimizer.projections(index).items()
        }
        self._numbers = {
            weight: (index, base)
            for index, group in enumerate(self._optimizer.param_groups)
            for weight, base in self._optimizer.numbered(group)
        }

    def _before(self, weight: Tensor) -> Any:
        """A hook that clears the way: torch adds a new gradient in place to what is there."""

        def hold(_: Tensor) -> None:
            if isinstance(weight.grad, ProjectedGrad):
                if weight.grad.spent:
                    raise ConfigError(
                        "a second backward before the step: stepping in backward takes one pass a "
                        "step; use gradient_accumulation_steps=1, or in_backward=false"
                    )
                self._held[weight] = weight.grad
                weight.grad = None

        return hold

    @torch.no_grad()
    def _after(self, weight: Tensor) -> None:
        """Replace a fresh full gradient by its projection, added to that of earlier passes."""
        grad = weight.grad
        assert grad is not None
        if self._in_backward and _wants_whole(self._found[weight][1]):
            self._step_now(weight)
            return
        projection, group, state = self._begun(weight)
        matrix = grad.reshape(projection.matrix_shape)
        left, right = projection.bases(state, dtype=matrix.dtype)
        small = lowrank.project(matrix, left=left, right=right).to(self._dtype or grad.dtype)
        sketches = {
            side: lowrank.sketch(matrix, columns=columns, side=side)
            for side, columns in _sketch_columns(projection, state, group=group).items()
        }
        held = self._held.pop(weight, None)
        if held is not None:
            small.add_(held.small)
            for side, total in sketches.items():
                total.add_(held.sketches[side])
        weight.grad = projected_grad(weight, small=small, sketches=sketches)
        if self._in_backward:
            self._step_now(weight)

    @torch.no_grad()
    def _step_now(self, weight: Tensor) -> None:
        """Step with a gradient that is complete, and keep its norm only."""
        grad = weight.grad
        assert grad is not None
        norm = torch.linalg.vector_norm(grad, dtype=torch.float32).to(grad.dtype).view(1)
        index, base = self._numbers[weight]
        self._optimizer.step_one(weight, index=index, base=base)
        self._refresh(weight)
        weight.grad = projected_grad(weight, small=norm, sketches={}, spent=True)

    def _begun(self, weight: Tensor) -> tuple[Projection, dict[str, Any], dict[str, Any]]:
        """Projection, group and state of a parameter, the state begun."""
        projection, group = self._found[weight]
        state = self._optimizer.state[weight]
        if not state:
            view = projection.view
            initialise_(state, weight, group=group, view=view, projection=projection)
        if state["num_refreshes"] == 0:
            _begin_(projection, state)
        return projection, group, state

    @torch.no_grad()
    def _absent(self, weight: Tensor) -> ProjectedGrad:
        """The gradient of a parameter that no pass has used here: shapes are functions of the
        state, which is equal on all processes.
        """
        projection, _, state = self._begun(weight)
        shape = projection.small_shape
        dtype = self._dtype or weight.dtype
        small = torch.zeros(shape, dtype=dtype, device=weight.device)
        sides = projection.low.sides(projection.shape) if _is_due(projection, state) else ()
        sketches = {
            side: torch.zeros(
                projection.low.basis_shape(projection.shape, side), device=weight.device
            )
            for side in sides
        }
        return projected_grad(weight, small=small, sketches=sketches)

    @torch.no_grad()
    def _finish(self, *unused: object) -> None:
        """After an update: new bases where sketches are complete, for the next step."""
        self._look_up()
        for weight in self._found:
            self._refresh(weight)

    def _refresh(self, weight: Tensor) -> None:
        """A new basis for a parameter that has stepped with a complete sketch."""
        grad = weight.grad
        if not isinstance(grad, ProjectedGrad) or grad.spent:
            return
        projection, state = self._found[weight][0], self._optimizer.state[weight]
        if state["step"] < state["next_refresh"]:
            return
        if projection.low.basis == "random":
            bases = projection.random_bases(state)
        else:
            number = state["num_refreshes"]
            bases = {
                side: lowrank.orthonormalise(
                    sketch,
                    generator=projection.generator(number, side, purpose=1),
                    coarse=weight.dtype != torch.float32,
                )
                for side, sketch in grad.sketches.items()
            }
        if bases:
            projection.refresh_(state, bases, step=state["step"])
        grad.sketches.clear()


def layerwise_(
    optimizer: Optimizer, *, dtype: torch.dtype | None = None, in_backward: bool = False
) -> Layerwise:
    """Keep the gradients of an optimiser's projected parameters in the small space, from now on.

    `dtype` is that of the small matrices, None for that of the gradients. `in_backward`
    steps in backward (one pass a step, no clipping, one device). Call it once, after all
    groups are added and before the first backward. Raises ConfigError for
    an optimiser that projects nothing, and for a group whose basis or residual needs whole
    gradients.
    """
    ranks = 0
    if any(view.dim is not None for view in optimizer.views.values()):
        raise ConfigError(
            "layer-wise mode keeps gradients of whole matrices, and these are sharded: use ddp, or "
            "the ordinary mode"
        )
    for group in optimizer.param_groups:
        if group["rank"] == 0:
            continue
        ranks += 1
        if in_backward:
            continue
        if group["basis"] not in BASES:
            raise ConfigError(
                f"basis {group['basis']!r} needs whole gradients, which layer-wise mode does not "
                f"keep: use one of {', '.join(BASES)}"
            )
        if group["residual"] != "none":
            raise ConfigError(
                f"residual {group['residual']!r} needs whole gradients, which layer-wise mode does "
                "not keep: use residual 'none', or the ordinary mode"
            )
    if ranks == 0:
        raise ConfigError(
            "layer-wise mode has no effect: no parameter group has a rank; give one, or leave the "
            "mode out"
        )
    return Layerwise(optimizer, dtype=dtype, in_backward=in_backward)


def _weakly(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """A hook that does not keep its owner: torch's collector cannot see cycles through hooks that
    run after a gradient is there, so model and state would stay for as long as the process lives.
    """
    held = weakref.WeakMethod(method)

    def hook(weight: Tensor) -> None:
        own = held()
        if own is not None:
            own(weight)

    return hook


def _wants_whole(group: dict[str, Any]) -> bool:
    return group["basis"] not in BASES or group["residual"] != "none"


def _begin_(projection: Projection, state: dict[str, Any]) -> None:
    """Random bases for the first step, and the date of the first real ones."""
    projection.refresh_(state, projection.random_bases(state), step=0)
    if projection.low.basis != "random":
        low = projection.low
        num_steps = min(FIRST_STEPS, low.update_proj_gap)
        share = (projection.first_gap - 1) * num_steps // low.update_proj_gap
        state["next_refresh"] = state["step"] + 1 + (share if low.stagger else 0)


def _is_due(projection: Projection, state: dict[str, Any]) -> bool:
    """Whether the step after this one begins with a basis from this one's sketch."""
    return projection.low.basis != "random" and state["step"] + 1 >= state["next_refresh"]


def _sketch_columns(
    projection: Projection, state: dict[str, Any], *, group: dict[str, Any]
) -> dict[str, Tensor]:
    """Columns to sketch with, by side, if a sketch is due."""
    if not _is_due(projection, state):
        return {}
    momentum = _momentum(projection, state, group=group)
    left, right = projection.bases(state, dtype=torch.float32)
    columns = {}
    for side in projection.low.sides(projection.shape):
        guide = None
        if momentum is not None and side == "left":
            guide = lowrank.project_back(momentum, left=None, right=right).mT
        elif momentum is not None:
            guide = lowrank.project_back(momentum, left=left, right=None)
        columns[side] = lowrank.sketch_columns(
            projection.matrix_shape[1 if side == "left" else 0],
            rank=projection.low.rank,
            generator=projection.generator(state["num_refreshes"], side),
            guide=guide,
        )
    return columns


def _momentum(
    projection: Projection, state: dict[str, Any], *, group: dict[str, Any]
) -> Tensor | None:
    """The running mean of projected gradients or updates, float32, if the rule keeps one."""
    shape = projection.low.projected_shape(projection.shape)
    for slot in slots(group["rule"], num_dims=len(shape)):
        if slot.signed and slot.extent == "full":
            names = slot_tensors(slot, codec=group["codec"], shape=shape)
            return unpack([tuple(state[name] for name in names)], slot=slot).views[0]
    return None
