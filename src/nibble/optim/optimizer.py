"""One optimiser, composed of values: an update rule, a codec for its state, how weights round, and
whether and how gradients are projected.

    for each batch of parameters:   states = unpack(stored);  U = rule(G, states);  pack states
                                    W <- (1 - lr * weight_decay) * W - lr * U

A rule (numerics/updates.py) never sees how its state is stored and a codec (states.py) never sees a
rule, so `rule` x `codec` is a table and not a class for each pair; they meet in `advance`
(update.py). With a rank, a matrix's rule gets R = P^T G for G and its answer comes back through P
(projection.py), for every rule and codec; `basis` and `residual` are two more tables
(spec/lowrank.py), and GaLore, Q-GaLore, Fira and APOLLO are rows over all of them.

Temporaries are bounded and small tensors share launches (batches.py). Nothing waits for the device
between refreshes: steps are Python ints and norms stay tensors.

State is tensors and ints; parameter groups hold numbers and words. So
`torch.load(weights_only=True)` reads it, and a resumed run equals an uninterrupted one bit for bit,
with stochastic rounding too: its noise is a function of (seed, group, step). It knows no ranks:
sharded parameters are given as their local tensors, with views that add over the parts (shards.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any, overload

import torch
from torch import Tensor

from nibble.errors import ConfigError
from nibble.kernels.steps import step_kernels
from nibble.numerics.updates import RULES
from nibble.optim.batches import Kind, Piece, batches
from nibble.optim.loading import check_loadable, copied
from nibble.optim.options import check_constructor, check_group, check_projects
from nibble.optim.parts import check_views, slot_dim
from nibble.optim.plain_step import step_plain_
from nibble.optim.projected_grad import is_spent
from nibble.optim.projected_step import (
    ProjectedPiece,
    Store,
    projected_batches,
    refresh_due_,
    step_projected_,
)
from nibble.optim.projection import Projection, projections
from nibble.optim.shards import ShardView, whole
from nibble.optim.states import new_slot
from nibble.optim.update import state_noise, weight_noise
from nibble.spec.lowrank import LOW_RANK_KEYS, LowRank, low_rank_of
from nibble.spec.state import Slot, slots

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Optimizer(torch.optim.Optimizer):
    """Any update rule with any state codec and any projection, as an ordinary torch optimiser.

    `params`: tensors, (name, tensor) pairs or groups, as torch takes them. A group may override
    every other argument. `rule`: adamw, sgd, momentum, adafactor,
    adafactor_momentum, lion. `codec`: fp32, bf16, 8bit.
    `weight_decay` is decoupled for every rule; `decay_last` decays after the update and not before.
    `betas` are for adamw and lion, `eps` for adamw and adafactor, `momentum` for momentum,
    `bias_correction` (both, step, none) for adamw; `parameter_scale` is the least rms of a weight
    that adafactor's rate is multiplied by (0: by none). `stochastic_rounding` applies to bf16
    weights; `seed` fixes all noise. Weights may be fp32, bf16 or fp16; arithmetic is fp32.

    A `rank` of 1 or more projects the matrices of a group whose sides are not below it; what the
    options after it mean is said at `spec.lowrank.LowRank`. Raises ConfigError for a value outside
    its range, an unknown rule, codec, key or dtype, an option without effect, and a rank above
    every matrix of its group.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        rule: str = "adamw",
        codec: str = "fp32",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        stochastic_rounding: bool = False,
        seed: int = 0,
        bias_correction: str = "both",
        decay_last: bool = False,
        parameter_scale: float = 0.0,
        rank: int = 0,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        proj_type: str = "std",
        basis: str = "svd",
        basis_storage: str = "fp32",
        residual: str = "none",
        norm_growth: float = 1.01,
        stagger: bool = True,
        lazy_threshold: float = 0.0,
        views: Mapping[Tensor, ShardView] | None = None,
    ) -> None:
        low_rank = LowRank(
            rank=rank,
            update_proj_gap=update_proj_gap,
            scale=scale,
            proj_type=proj_type,
            basis=basis,
            basis_storage=basis_storage,
            residual=residual,
            norm_growth=norm_growth,
            stagger=stagger,
            lazy_threshold=lazy_threshold,
        )
        defaults = {
            "lr": lr,
            "rule": rule,
            "codec": codec,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "bias_correction": bias_correction,
            "decay_last": decay_last,
            "parameter_scale": parameter_scale,
            **{key: getattr(low_rank, key) for key in LOW_RANK_KEYS},
        }
        self.stores: dict[Tensor, Store] = {}
        self.views = dict(views or {})
        self._projected: dict[int, tuple[tuple[Any, ...], dict[Tensor, Projection]]] = {}
        super().__init__(params, defaults)
        check_constructor(defaults, self.param_groups)
        check_views(self.views, self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; what it does not say is taken from the constructor's arguments."""
        check_group(param_group, self.defaults)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for weight in group["params"]:
                if weight.dtype not in WEIGHT_DTYPES:
                    raise ConfigError(
                        f"cannot train a weight of {weight.dtype}: use float32, bfloat16 or float16"
                    )
            low_rank = low_rank_of(group)
            if low_rank is not None:
                check_projects(low_rank, [self.view(weight).shape for weight in group["params"]])
        except ConfigError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            self._step_some(index, self.numbered(group))
        return loss

    @torch.no_grad()
    def make_state(self) -> None:
        """Make what state is missing, before gradients are there whose gaps it would divide."""
        for index, group in enumerate(self.param_groups):
            projected = self.projections(index)
            for weight in group["params"]:
                if weight.numel() > 0:
                    self._state_of(weight, group, projected.get(weight))

    @torch.no_grad()
    def step_one(self, weight: Tensor, *, index: int, base: int) -> None:
        """Update one parameter of group `index` as `step` would; `base` as in `numbered`."""
        self._step_some(index, [(weight, base)])

    def numbered(self, group: dict[str, Any]) -> list[tuple[Tensor, int]]:
        """A group's parameters with the numbers of their first elements (noise.py)."""
        found, base = [], 0
        for weight in group["params"]:
            found.append((weight, base))
            base += self._num_whole(weight)
        return found

    def _step_some(self, index: int, numbered: list[tuple[Tensor, int]]) -> None:
        group = self.param_groups[index]
        elementwise = RULES[group["rule"]].elementwise
        plain, projected = self._pieces(index, numbered)
        for kind, pieces in plain.items():
            fused = group["rule"] == "adamw" and step_kernels(kind.device.type) is not None
            for batch in batches(pieces, elementwise=elementwise, fused=fused):
                step_plain_(batch, group=group, kind=kind, index=index)
        refresh_due_(piece for matrices in projected.values() for piece in matrices)
        for kind, matrices in projected.items():
            for some in projected_batches(matrices):
                step_projected_(
                    some,
                    group=group,
                    kind=kind,
                    state_noise=state_noise(group, kind, index=index),
                    weight_noise=weight_noise(group, kind, index=index),
                )

    def _pieces(
        self, index: int, numbered: list[tuple[Tensor, int]]
    ) -> tuple[dict[Kind, list[Piece]], dict[Kind, list[ProjectedPiece]]]:
        """Parameters with gradients, their steps counted on, by what may share a batch."""
        group = self.param_groups[index]
        plain: dict[Kind, list[Piece]] = {}
        projected: dict[Kind, list[ProjectedPiece]] = {}
        own_projections = self.projections(index)
        elementwise = RULES[group["rule"]].elementwise
        for weight, base in numbered:
            view = self.views.get(weight)
            if weight.grad is None or is_spent(weight.grad):
                continue
            # An empty part takes part in sums; where there are none, there is nothing to do.
            if weight.numel() == 0 and (
                view is None or (elementwise and weight not in own_projections)
            ):
                continue
            if weight.grad.layout != torch.strided:
                raise ConfigError(
                    "sparse gradients are not supported: build the model without them"
                )
            projection = own_projections.get(weight)
            state = self._state_of(weight, group, projection)
            state["step"] += 1
            dim: int | None = None
            if not elementwise and view is not None:
                dim = projection.small_axis if projection is not None else view.dim
                num_dims = 2 if projection is not None else weight.dim()
                dim = None if dim is None else dim - num_dims
            kind = Kind(
                device=weight.device,
                weight_dtype=weight.dtype,
                grad_dtype=weight.grad.dtype,
                slots=slots(group["rule"], num_dims=weight.dim()),
                names=tuple(state),
                step=state["step"],
                dim=dim,
                sum_=None if dim is None or view is None else view.sum_,
            )
            if projection is None:
                piece = Piece(
                    weight=weight,
                    grad=weight.grad,
                    state=state,
                    base=base,
                    shape=tuple(weight.shape),
                    view=view or whole(weight),
                    looks_around=not elementwise and view is not None,
                )
                plain.setdefault(kind, []).append(piece)
            else:
                matrix = ProjectedPiece(
                    weight=weight,
                    projection=projection,
                    state=state,
                    store=self.stores.get(weight),
                )
                projected.setdefault(kind, []).append(matrix)
        return plain, projected

    def projections(self, index: int) -> dict[Tensor, Projection]:
        """The projected parameters of a group, by the options that the group has now."""
        group = self.param_groups[index]
        options = (*(group[key] for key in LOW_RANK_KEYS), group["seed"], len(group["params"]))
        if index not in self._projected or self._projected[index][0] != options:
            self._projected[index] = (options, projections(index, group, self.view))
        return self._projected[index][1]

    def view(self, weight: Tensor) -> ShardView:
        """The part of a tensor that a parameter is."""
        return self.views.get(weight) or whole(weight)

    def split_dims(self, param: Tensor) -> dict[str, int | None]:
        """Along which dim each state tensor of a parameter is cut, None for the same on all.

        Whatever the codec: names of fp32 and bf16 state, of codes, and of their absmax, which are
        those of one part after another (dim 0). Blocks begin anew in each part; the whole's are the
        same where parts are whole rows that are whole blocks.
        """
        found: dict[str, int | None] = {}
        for index, group in enumerate(self.param_groups):
            projection = self.projections(index).get(param)
            if not any(param is weight for weight in group["params"]):
                continue
            view = self.view(param)
            dim, num_dims = view.dim, len(view.shape)
            if projection is not None:
                dim, num_dims = projection.small_axis, 2
                found |= dict.fromkeys(projection.low.tensors(view.shape))
            for slot in slots(group["rule"], num_dims=num_dims):
                own = slot_dim(slot, dim, num_dims)
                found |= {slot.name: own, f"{slot.name}_codes": own}
                found[f"{slot.name}_absmax"] = None if own is None else 0
        return found

    def __getstate__(self) -> dict[str, Any]:
        # torch copies and pickles what it knows of.
        state: dict[str, Any] = super().__getstate__()
        return {**state, "stores": self.stores, "views": self.views, "_projected": {}}

    def _num_whole(self, weight: Tensor) -> int:
        """Elements of the whole tensor that a parameter is a part of."""
        view = self.views.get(weight)
        return weight.numel() if view is None else prod(view.shape)

    def _state_of(
        self, weight: Tensor, group: dict[str, Any], projection: Projection | None
    ) -> dict[str, Any]:
        state: dict[str, Any] = self.state[weight]
        if not state:
            view = self.view(weight)
            initialise_(state, weight, group=group, view=view, projection=projection)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave: state keeps its dtype and is copied to the weights' device.

        torch's own method would cast every float state to the weight's dtype. CheckpointError
        if rule, codec or a shape differs from what this optimiser would make.
        """
        taken: dict[str, Any] = {}

        def take(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            check_loadable(given, self.param_groups, self.view)
            taken.update(given)
            return {**given, "state": {}}

        def put(_: torch.optim.Optimizer) -> None:
            saved = [key for group in taken["param_groups"] for key in group["params"]]
            own = [weight for group in self.param_groups for weight in group["params"]]
            for key, weight in zip(saved, own, strict=True):
                if key in taken["state"]:
                    self.state[weight] = copied(taken["state"][key], device=weight.device)

        # As hooks of this one call, they run after a caller's pre-hooks and before its post-hooks.
        handles = (
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(put, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()


def initialise_(
    state: dict[str, Any],
    weight: Tensor,
    *,
    group: dict[str, Any],
    view: ShardView,
    projection: Projection | None,
) -> None:
    """Fill an empty state with zeros and step 0."""
    state["step"] = 0
    shape, of = tuple(weight.shape), view.shape
    if projection is not None:
        projection.initialise_(state)
        shape, of = projection.small_shape, projection.low.projected_shape(view.shape)
    own_slots: tuple[Slot, ...] = slots(group["rule"], num_dims=len(shape))
    for slot in own_slots:
        made = new_slot(slot, codec=group["codec"], shape=shape, whole=of, device=weight.device)
        state.update(made)
