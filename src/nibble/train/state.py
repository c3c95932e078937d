"""What a run is between two steps: tensors and numbers, nothing that needs code to be read back.

A run that is continued from this state cannot be told from one that was never stopped: weights,
optimiser, position in the data, loss scale and the generators of random numbers. The schedule is a
pure function of the step and keeps nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nibble.data import Batch
from nibble.optim import Schedule
from nibble.place.base import Placement


class Steps(Protocol):
    """A loader: for each optimiser step the micro-batches of it; its state says where it is."""

    def __iter__(self) -> Iterator[list[Batch]]:
        """From the present position on."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Numbers only: the position after the last step that was taken from it."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        ...


@dataclass
class LossScaler:
    """Dynamic loss scaling for fp16 (arXiv 1710.03740, section 3.2), as numbers.

    Small gradients vanish in fp16, so the loss is multiplied by `scale` and the gradients divided
    by it before anything looks at them. Gradients that are not finite skip the step and halve the
    scale; `growth_interval` good steps in a row double it.
    """

    enabled: bool
    scale: float = 65536.0
    growth_interval: int = 2000
    num_good_steps: int = 0

    def __post_init__(self) -> None:
        """Without fp16 the scale is one."""
        if not self.enabled:
            self.scale = 1.0

    def update(self, *, finite: bool) -> None:
        """Learn from one step."""
        if not self.enabled:
            return
        if not finite:
            self.scale /= 2
            self.num_good_steps = 0
            return
        self.num_good_steps += 1
        if self.num_good_steps == self.growth_interval:
            self.scale *= 2
            self.num_good_steps = 0

    def state_dict(self) -> dict[str, float | int]:
        """Scale and count."""
        return {"scale": self.scale, "num_good_steps": self.num_good_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self.scale = float(state["scale"])
        self.num_good_steps = int(state["num_good_steps"])


@dataclass
class TrainState:
    """Everything that changes during a run. `num_tokens` counts tokens that were not padding.

    `parameters` are what a placement gives the optimiser to step (default: the model's own), and
    `place` knows how they are cut (None: this process has all of them).
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    loader: Steps
    scaler: LossScaler = field(default_factory=lambda: LossScaler(enabled=False))
    step: int = 0
    num_tokens: int = 0
    parameters: Mapping[str, nn.Parameter] | None = None
    place: Placement | None = None
    instead: Mapping[str, Mapping[str, Tensor]] | None = None
    """Of stand-ins among the parameters: the tensors, by name, that hold their values."""

    def kept(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the model: what learns, and the values of stand-ins."""
        instead = self.instead or {}
        found: dict[str, Tensor] = {n: p for n, p in self.trained().items() if n not in instead}
        return found | {name: t for own in instead.values() for name, t in own.items()}

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, or their parts that live here, by name; tied ones once."""
        if self.parameters is not None:
            return dict(self.parameters)
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """The part of a state that is written as JSON."""

    step: int
    num_tokens: int
    schedule: dict[str, Any]
    loader: dict[str, Any]
    scaler: dict[str, Any]

    @classmethod
    def of(cls, state: TrainState) -> Numbers:
        """Read them from a state."""
        return cls(
            step=state.step,
            num_tokens=state.num_tokens,
            schedule=dict(state.schedule.state_dict()),
            loader=state.loader.state_dict(),
            scaler=dict(state.scaler.state_dict()),
        )

    def put(self, state: TrainState) -> None:
        """Write them into a state."""
        state.step = self.step
        state.num_tokens = self.num_tokens
        state.schedule.load_state_dict(self.schedule)
        state.loader.load_state_dict(self.loader)
        state.scaler.load_state_dict(self.scaler)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def seed_everything(seed: int) -> None:
    """Seed every generator that training may draw from."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state(device: torch.device | None = None) -> dict[str, Any]:
    """All generators as tensors and numbers: torch's on CPU and each GPU (or `device` alone),
    Python's and numpy's.
    """
    import numpy

    version, words, gauss = random.getstate()
    legacy: Any = numpy.random.get_state(legacy=True)
    kind, keys, position, has_gauss, cached = legacy
    assert (version, kind) == (3, "MT19937")
    return {
        "torch": torch.get_rng_state(),
        "cuda": _cuda_states(device),
        "python": {"words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "keys": torch.from_numpy(keys.astype("int64")),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
    }


def _cuda_states(device: torch.device | None) -> list[Tensor]:
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return []
    if device is not None:
        return [torch.cuda.get_rng_state(device)]
    return list(torch.cuda.get_rng_state_all())


def set_rng_state(state: Mapping[str, Any], device: torch.device | None = None) -> None:
    """Put every generator where `rng_state` found it, with the same `device`; GPUs that are gone
    are left out.
    """
    import numpy

    torch.set_rng_state(state["torch"])
    gpus: list[Tensor] = state["cuda"]
    if torch.cuda.is_available() and device is not None:
        for saved in gpus[:1]:
            torch.cuda.set_rng_state(saved, device)
    elif torch.cuda.is_available():
        for index, saved in enumerate(gpus[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(saved, index)
    python, other = state["python"], state["numpy"]
    random.setstate((3, tuple(python["words"].tolist()), python["gauss"]))
    numpy.random.set_state(
        (
            "MT19937",
            other["keys"].numpy().astype("uint32"),
            other["position"],
            other["has_gauss"],
            other["cached"],
        )
    )
