"""One optimiser, composed of values: an update rule, a codec for its state, and how weights round.

    for each batch of parameters:   states = unpack(stored);  U = rule(G, states);  pack states
                                    W <- (1 - lr * weight_decay) * W - lr * U

A rule (numerics/updates.py) never sees how its state is stored and a codec (states.py) never sees a
rule, so `rule` x `codec` is a table and not a class for each pair. `_update` is the one place where
they meet, and where whatever changes a gradient before the rule or an update after it belongs.

Temporaries are bounded and small tensors share launches (batches.py). Nothing waits for the device:
steps are Python ints and norms stay tensors.

State is tensors and ints; parameter groups hold numbers and the names of rule and codec. So
`torch.load(weights_only=True)` reads it, and a resumed run equals an uninterrupted one bit for bit,
with stochastic rounding too: its noise is a function of (seed, group, step). It never communicates
and knows no ranks: sharded parameters are given as their local tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

from nibble.errors import CheckpointError, ConfigError
from nibble.numerics.updates import RULES, Hyper
from nibble.optim.batches import Kind, Piece, batches
from nibble.optim.states import (
    DTYPES,
    Stored,
    as_float32,
    new_slot,
    store_rounded_,
    unpack,
    write_back_,
)
from nibble.spec.state import CODECS, Slot, slot_tensors, slots, state_tensors

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GROUP_KEYS = {"params", "param_names", "name", "initial_lr"}
_MASK64 = (1 << 64) - 1


class Optimizer(torch.optim.Optimizer):
    """Any update rule with any state codec, as an ordinary torch optimiser.

    `params`: tensors, (name, tensor) pairs or groups, as torch takes them. A group may override
    every other argument. `rule`: adamw, sgd, momentum, adafactor, lion. `codec`: fp32, bf16, 8bit.
    `weight_decay` is decoupled for every rule. `betas` are for adamw and lion, `eps` for adamw and
    adafactor, `momentum` for momentum. `stochastic_rounding` applies to bf16 weights; `seed` fixes
    its noise. Weights may be fp32, bf16 or fp16; arithmetic is fp32. Raises ConfigError for a value
    outside its range, an unknown rule, codec, key or dtype.
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
    ) -> None:
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
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; what it does not say is taken from the constructor's arguments."""
        _check_group(param_group, self.defaults)
        super().add_param_group(param_group)
        for weight in self.param_groups[-1]["params"]:
            if weight.dtype not in WEIGHT_DTYPES:
                self.param_groups.pop()
                raise ConfigError(
                    f"cannot train a weight of {weight.dtype}: use float32, bfloat16 or float16"
                )

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
            elementwise = RULES[group["rule"]].elementwise
            for ordinal, (kind, pieces) in enumerate(self._pieces(group).items()):
                generator = _generator(group, kind, index=index, ordinal=ordinal)
                for batch in batches(pieces, elementwise=elementwise):
                    _update(batch, group=group, kind=kind, generator=generator)
        return loss

    def _pieces(self, group: dict[str, Any]) -> dict[Kind, list[Piece]]:
        """Parameters with gradients, their steps counted on, by what may share a batch."""
        kinds: dict[Kind, list[Piece]] = {}
        for weight in group["params"]:
            if weight.grad is None or weight.numel() == 0:
                continue
            if weight.grad.layout != torch.strided:
                raise ConfigError(
                    "sparse gradients are not supported: build the model without them"
                )
            own_slots = slots(group["rule"], num_dims=weight.dim())
            state = self.state[weight]
            if not state:
                _initialise(state, weight, own_slots, codec=group["codec"])
            state["step"] += 1
            kind = Kind(
                device=weight.device,
                weight_dtype=weight.dtype,
                grad_dtype=weight.grad.dtype,
                slots=own_slots,
                names=tuple(state),
                step=state["step"],
            )
            kinds.setdefault(kind, []).append(Piece(weight=weight, grad=weight.grad, state=state))
        return kinds

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave: state keeps its dtype and is copied to the weights' device.

        torch's own method would cast every float state to the weight's dtype. CheckpointError
        if rule, codec or a shape differs from what this optimiser would make.
        """
        taken: dict[str, Any] = {}

        def take(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            self._check_loadable(given)
            taken.update(given)
            return {**given, "state": {}}

        def put(_: torch.optim.Optimizer) -> None:
            saved = [key for group in taken["param_groups"] for key in group["params"]]
            own = [weight for group in self.param_groups for weight in group["params"]]
            for key, weight in zip(saved, own, strict=True):
                if key in taken["state"]:
                    self.state[weight] = _copied(taken["state"][key], device=weight.device)

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

    def _check_loadable(self, state_dict: dict[str, Any]) -> None:
        """Raise CheckpointError where saved groups or state are not of this optimiser's making."""
        all_saved = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in self.param_groups]
        saved_sizes = [len(saved["params"]) for saved in all_saved]
        if sizes != saved_sizes:
            raise CheckpointError(
                f"optimiser was saved with groups of {saved_sizes} tensors, this run has {sizes}: "
                "resume with the recipe that wrote the checkpoint"
            )
        for number, (group, saved) in enumerate(zip(self.param_groups, all_saved, strict=True)):
            for key in ("rule", "codec"):
                if saved.get(key) != group[key]:
                    raise CheckpointError(
                        f"optimiser group {number} was saved with {key} {saved.get(key)!r}, this "
                        f"run has {group[key]!r}: resume with the recipe that wrote the checkpoint"
                    )
            for key, weight in zip(saved["params"], group["params"], strict=True):
                state = state_dict["state"].get(key)
                if state is not None:
                    _check_state(state, weight, rule=group["rule"], codec=group["codec"])


def _update(
    batch: list[Piece], *, group: dict[str, Any], kind: Kind, generator: torch.Generator | None
) -> None:
    """One step of one batch: the module's equation, in float32."""
    grads = as_float32([piece.grad for piece in batch])
    stored: dict[Slot, list[Stored]] = {}
    for slot in kind.slots:
        names = kind.stored_names(slot)
        stored[slot] = [tuple(piece.state[name] for name in names) for piece in batch]
    states = {slot: unpack(tensors, slot=slot) for slot, tensors in stored.items()}

    updates = RULES[group["rule"]].apply_(
        grads.views,
        states={slot.name: values.views for slot, values in states.items()},
        hyper=Hyper(
            step=kind.step,
            betas=tuple(group["betas"]),
            eps=group["eps"],
            momentum=group["momentum"],
        ),
    )

    for slot, values in states.items():
        write_back_(stored[slot], values=values, slot=slot, generator=generator)
    del states, grads  # updates keep what they need; the rest makes room for the weights
    learning_rate = float(group["lr"])
    weights = as_float32([piece.weight for piece in batch])
    if group["weight_decay"] != 0:
        torch._foreach_mul_(weights.views, 1 - learning_rate * group["weight_decay"])
    torch._foreach_add_(weights.views, updates, alpha=-learning_rate)
    if weights.flat is not None:
        noise = generator if _rounds_weights(group, kind) else None
        store_rounded_([piece.weight for piece in batch], flat=weights.flat, generator=noise)


def _generator(
    group: dict[str, Any], kind: Kind, *, index: int, ordinal: int
) -> torch.Generator | None:
    """Noise of one kind of one group in one step, the same whenever that step is taken again.

    None where nothing is rounded stochastically.
    """
    if not (_rounds_weights(group, kind) or (group["codec"] == "bf16" and kind.slots)):
        return None
    mixed = int(group["seed"])
    for number in (index, ordinal, kind.step):
        mixed = _mix(mixed ^ number)
    return torch.Generator(device=kind.device).manual_seed(mixed >> 1)


def _rounds_weights(group: dict[str, Any], kind: Kind) -> bool:
    return bool(group["stochastic_rounding"]) and kind.weight_dtype == torch.bfloat16


def _mix(number: int) -> int:
    """A well mixed 64-bit word (splitmix64): neighbouring steps must not give related seeds."""
    word = (number + 0x9E3779B97F4A7C15) & _MASK64
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK64
    return word ^ (word >> 31)


def _initialise(
    state: dict[str, Any], weight: Tensor, own_slots: tuple[Slot, ...], *, codec: str
) -> None:
    """Fill an empty state with zeros and step 0."""
    state["step"] = 0
    for slot in own_slots:
        shape = tuple(weight.shape)
        names = slot_tensors(slot, codec=codec, shape=shape)
        tensors = new_slot(slot, codec=codec, shape=shape, device=weight.device)
        state.update(zip(names, tensors, strict=True))


def _copied(state: dict[str, Any], *, device: torch.device) -> dict[str, Any]:
    """A copy of one parameter's state with its tensors on `device`; nothing is shared."""
    return {
        name: value.to(device=device, copy=True) if isinstance(value, Tensor) else value
        for name, value in state.items()
    }


def _check_state(state: dict[str, Any], weight: Tensor, *, rule: str, codec: str) -> None:
    """Raise CheckpointError unless a saved state has exactly the tensors that we would make."""
    shape = tuple(weight.shape)
    expected = {
        name: (spec.shape, DTYPES[spec.dtype])
        for name, spec in state_tensors(rule, codec=codec, shape=shape).items()
    }
    found = {
        name: (tuple(value.shape), value.dtype)
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    if found != expected:
        raise CheckpointError(
            f"optimiser state of a weight of shape {list(shape)} holds {found}, expected "
            f"{expected}: the checkpoint belongs to another model or optimiser"
        )


def _check_group(group: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raise ConfigError for a key we do not know or a value outside its range."""
    unknown = sorted(set(group) - set(defaults) - _GROUP_KEYS)
    if unknown:
        raise ConfigError(
            f"unknown parameter-group keys {', '.join(unknown)}: use {', '.join(defaults)}"
        )
    values = {**defaults, **group}
    if values["rule"] not in RULES:
        raise ConfigError(f"unknown update rule {values['rule']!r}: use one of {', '.join(RULES)}")
    if values["codec"] not in CODECS:
        raise ConfigError(f"unknown codec {values['codec']!r}: use one of {', '.join(CODECS)}")
    for key in ("lr", "eps", "weight_decay"):
        if not values[key] >= 0:
            raise ConfigError(f"{key}={values[key]} is out of range: give a number >= 0")
    shares = {"momentum": values["momentum"]}
    shares |= {f"betas[{place}]": beta for place, beta in enumerate(values["betas"])}
    for key, share in shares.items():
        if not 0 <= share < 1:
            raise ConfigError(f"{key}={share} is out of range: give a number in [0, 1)")
