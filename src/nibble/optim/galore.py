"""The optimisers of galore_torch by their names, arguments and parameter-group keys.

    from galore_torch import GaLoreAdamW        ->        from nibble.optim import GaLoreAdamW

Groups with `rank`, `update_proj_gap`, `scale` and `proj_type` are projected, the others are not
(arXiv 2403.03507). In float32 the trajectory is that package's: bases by SVD of the gradient whose
step is a multiple of the gap, all at once; eps beside an uncorrected second moment, and weight
decay after the update. Every other key of nibble's optimiser may stand in a group as well:
`basis="randomised"` and `stagger=True` take the stall out of a refresh.

Differences, on purpose: a matrix with a side below the rank follows the plain rule instead of
being turned in its full space; vectors may stand in any group; bfloat16 weights and their bfloat16
states are rounded stochastically; state is tensors and ints and loads with `weights_only=True`.
What has no counterpart here is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch

from nibble.errors import ConfigError
from nibble.optim.optimizer import Optimizer

_REQUIRED = ("update_proj_gap", "scale", "proj_type")


class GaLoreAdamW(Optimizer):
    """AdamW of galore_torch: fp32 states for fp32 weights, bf16 states for 16-bit ones.

    `no_deprecation_warning` is accepted and has nothing to silence. Raises ConfigError as
    `Optimizer` does, and for a group with a rank but without the other three keys.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        no_deprecation_warning: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            bias_correction="step" if correct_bias else "none",
            decay_last=True,
            stochastic_rounding=True,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with galore_torch's keys or ours."""
        group = _with_galore_keys(param_group)
        if "correct_bias" in group:
            group["bias_correction"] = "step" if group.pop("correct_bias") else "none"
        if _has_16_bits(group):
            group.setdefault("codec", "bf16")
        super().add_param_group(group)


class GaLoreAdamW8bit(Optimizer):
    """AdamW8bit of galore_torch: 8-bit block-wise states, bitsandbytes' arithmetic of AdamW.

    `optim_bits` and `args` are accepted and mean nothing there either. Raises ConfigError as
    `Optimizer` does, and for arguments that ask for what 8-bit states here do not do.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: object = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool = False,
    ) -> None:
        _refuse(
            {
                "amsgrad": (amsgrad, False),
                "min_8bit_size": (min_8bit_size, 4096),
                "percentile_clipping": (percentile_clipping, 100),
                "block_wise": (block_wise, True),
                "is_paged": (is_paged, False),
            }
        )
        super().__init__(
            params,
            lr=lr,
            codec="8bit",
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decay_last=True,
            stochastic_rounding=True,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with galore_torch's keys or ours."""
        super().add_param_group(_with_galore_keys(param_group))


class GaLoreAdafactor(Optimizer):
    """Adafactor of galore_torch, with external or relative learning rates.

    `relative_step` sets the rate of every group at each step, from the steps that its parameters
    have made. With `beta1` the mean of updates is kept before the rate is applied and not after, so
    trajectories differ where the rate changes. Raises ConfigError as `Optimizer` does, for rates
    that contradict each other, and for another `clip_threshold` or `decay_rate`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
    ) -> None:
        _refuse({"clip_threshold": (clip_threshold, 1.0), "decay_rate": (decay_rate, -0.8)})
        if (lr is None) is not relative_step:
            raise ConfigError(
                f"lr={lr} with relative_step={relative_step}: give an lr, or relative_step=True "
                "and none"
            )
        if warmup_init and not relative_step:
            raise ConfigError("warmup_init=True has no effect without relative_step: leave it out")
        self._relative_step, self._warmup_init = relative_step, warmup_init
        super().__init__(
            params,
            lr=0.0 if lr is None else lr,
            rule="adafactor" if beta1 is None else "adafactor_momentum",
            betas=(0.9 if beta1 is None else beta1, 0.999),
            eps=eps[0] ** 0.5,
            parameter_scale=eps[1] if scale_parameter else 0.0,
            weight_decay=weight_decay,
            stochastic_rounding=True,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with galore_torch's keys or ours."""
        super().add_param_group(_with_galore_keys(param_group))

    def __getstate__(self) -> dict[str, Any]:
        # What is copied or pickled goes on as it was.
        own = {"_relative_step": self._relative_step, "_warmup_init": self._warmup_init}
        return {**super().__getstate__(), **own}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; returns what `closure` returned."""
        if self._relative_step:
            for group in self.param_groups:
                made = [self.state[p].get("step", 0) for p in group["params"] if p in self.state]
                step = max(made, default=0) + 1
                bound = 1e-6 * step if self._warmup_init else 1e-2
                group["lr"] = min(bound, step**-0.5)
        return super().step(closure)


def _with_galore_keys(param_group: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the group as galore_torch means it: SVD, all at once, bases as the weights."""
    group = dict(param_group)
    # A generator of parameters is read twice from here on.
    params = group["params"]
    group["params"] = [params] if isinstance(params, torch.Tensor) else list(params)
    if "dim" in group:
        raise ConfigError(
            f"dim={group['dim']} asks for a Tucker projection, which is not supported: leave it "
            "out, and tensors of more than two dims are projected as matrices"
        )
    if "rank" not in group:
        return group
    missing = [key for key in _REQUIRED if key not in group]
    if missing:
        raise ConfigError(
            f"a group with rank={group['rank']} needs {', '.join(missing)} as well, as in "
            "galore_torch"
        )
    group.setdefault("stagger", False)
    if _has_16_bits(group) and group.get("basis") != "seeded":
        group.setdefault("basis_storage", "bf16")
    return group


def _has_16_bits(group: Mapping[str, Any]) -> bool:
    """Whether all weights of a group are 16-bit; parameters may be given with their names."""
    params = [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]
    return all(param.dtype in (torch.bfloat16, torch.float16) for param in params)


def _refuse(arguments: Mapping[str, tuple[object, object]]) -> None:
    """Raise ConfigError for an argument that is not the one value we can do."""
    for name, (given, possible) in arguments.items():
        if given != possible:
            raise ConfigError(f"{name}={given} is not supported: pass {name}={possible}")
