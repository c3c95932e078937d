"""Low-rank gradients in words and shapes: what is projected, by what, and what is kept for it.

An update rule may see R = P^T G instead of the gradient G [m, n], with P of `rank` columns, and its
answer U comes back as P U. Four values compose a method, each a small table:

    basis          svd          leading singular vectors of a gradient          (arXiv 2403.03507)
                   randomised   range of a random sketch of it                  (arXiv 0909.4061)
                   random       orthonormal, from a seed, blind to the gradient
                   seeded       Gaussian, made anew in every step, never stored (arXiv 2412.05270)
    rule, codec    spec/state.py: any rule, any codec of its state
    residual       none         scale * back(U)                                          GaLore
                   fira         + the rest of G, by |U_j| / |R_j| a channel, unscaled    Fira
                   balanced     + the rest of G, rows and columns of equal norms, sized by U
                   channel      G itself, scaled by |U_j| / |R_j| a channel              APOLLO
                   tensor       G itself, scaled by |U| / |R|                            APOLLO-Mini

METHODS has the published methods as rows. Tensors of three dims are stacks [k, m, n] and taken as
[k m, n]; those of more dims are kernels [out, ...] and taken as [out, rest]. Vectors, and matrices
with a side below the rank, follow the plain rule.

Costs nothing: integers and words only. The arithmetic is numerics/lowrank.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import prod
from typing import Any

from nibble.errors import ConfigError
from nibble.spec.formats import TensorSpec

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
BASES = ("svd", "randomised", "random", "seeded")
RESIDUALS = ("none", "fira", "channel", "tensor", "balanced")
BASIS_STORAGE = ("fp32", "bf16", "int8", "int4")
STORAGE_BLOCK = 256
"""Elements of an int8 or int4 basis that share a scale."""
LAZY_QUEUE = 5
"""Refreshes over which the lazy rule averages the similarity of successive bases."""
LAZY_FACTOR = 2
"""What a steady basis multiplies its gap with."""

METHODS: dict[str, dict[str, Any]] = {
    # arXiv 2403.03507
    "galore": {"rule": "adamw", "basis": "svd", "scale": 0.25},
    # arXiv 2403.03507, section 4: the same with 8-bit states
    "galore8bit": {"rule": "adamw", "codec": "8bit", "basis": "svd", "scale": 0.25},
    # arXiv 2407.08296; INT8 weights are another matter
    "q-galore": {
        "rule": "adamw",
        "codec": "8bit",
        "basis": "svd",
        "basis_storage": "int4",
        "lazy_threshold": 0.4,
        "scale": 0.25,
    },
    # arXiv 2410.01623
    "fira": {"rule": "adamw", "basis": "svd", "residual": "fira", "scale": 0.25},
    # GaLore, and of the rest what SinkGD (arXiv 2502.06742) makes of a whole gradient
    "balanced": {"rule": "adamw", "basis": "randomised", "residual": "balanced", "scale": 0.25},
    # arXiv 2412.05270, algorithm 1
    "apollo": {"rule": "adamw", "basis": "seeded", "residual": "channel", "scale": 1.0},
    # arXiv 2412.05270, section 4.2: rank 1, alpha = sqrt(128)
    "apollo-mini": {
        "rule": "adamw",
        "basis": "seeded",
        "residual": "tensor",
        "scale": 128**0.5,
        "rank": 1,
    },
}
"""Published methods as options of the optimiser; whoever uses one adds rank and learning rate."""


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """How the gradients of a group are projected. Fields are parameter-group keys.

    `update_proj_gap` is in steps. `scale` multiplies the update. `norm_growth` bounds the growth of
    the residual's norm from step to step (0: no bound). `stagger` spreads refreshes over the gap.
    `lazy_threshold` is the mean similarity of bases from which the gap doubles (0: never).
    """

    rank: int
    update_proj_gap: int = 200
    scale: float = 1.0
    proj_type: str = "std"
    basis: str = "svd"
    basis_storage: str = "fp32"
    residual: str = "none"
    norm_growth: float = 1.01
    stagger: bool = True
    lazy_threshold: float = 0.0

    def check(self) -> None:
        """Raise ConfigError for an unknown word, a number out of range or an idle combination."""
        words = (
            ("proj_type", self.proj_type, PROJ_TYPES),
            ("basis", self.basis, BASES),
            ("residual", self.residual, RESIDUALS),
            ("basis_storage", self.basis_storage, BASIS_STORAGE),
        )
        for key, word, allowed in words:
            if word not in allowed:
                raise ConfigError(f"unknown {key} {word!r}: use one of {', '.join(allowed)}")
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ConfigError(f"rank={self.rank} is out of range: give a whole number >= 1")
        if not isinstance(self.update_proj_gap, int) or self.update_proj_gap < 1:
            raise ConfigError(
                f"update_proj_gap={self.update_proj_gap} is out of range: give whole steps >= 1"
            )
        if not self.scale > 0:
            raise ConfigError(f"scale={self.scale} is out of range: give a number > 0")
        if self.norm_growth != 0 and not self.norm_growth > 1:
            raise ConfigError(
                f"norm_growth={self.norm_growth} is out of range: give a number > 1, or 0 for none"
            )
        if not 0 <= self.lazy_threshold < 1:
            raise ConfigError(
                f"lazy_threshold={self.lazy_threshold} is out of range: give a number in [0, 1)"
            )
        self._check_combination()

    def _check_combination(self) -> None:
        if self.basis == "seeded":
            if self.residual not in ("channel", "tensor"):
                raise ConfigError(
                    f"basis 'seeded' is not orthonormal and cannot serve residual "
                    f"{self.residual!r}: use residual 'channel' or 'tensor', or basis 'random'"
                )
            if self.basis_storage != "fp32":
                raise ConfigError(
                    f"basis_storage={self.basis_storage} has no effect: basis 'seeded' is not "
                    "stored; leave it out"
                )
        if self.basis in ("seeded", "random") and self.lazy_threshold > 0:
            raise ConfigError(
                f"lazy_threshold={self.lazy_threshold} has no effect: basis {self.basis!r} does "
                "not look at gradients; leave it out"
            )
        if self.proj_type == "full" and self.residual in ("fira", "channel"):
            raise ConfigError(
                f"proj_type 'full' leaves no channels for residual {self.residual!r}: "
                "use residual 'none' or 'tensor', or project one side"
            )

    def projects(self, shape: tuple[int, ...]) -> bool:
        """Whether a parameter of `shape` is projected; else it follows the plain rule."""
        return len(shape) >= 2 and min(matrix_shape(shape)) >= self.rank

    def sides(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """Sides of the matrix that a basis stands on: left, right or both."""
        rows, columns = matrix_shape(shape)
        if self.proj_type == "full":
            return ("left", "right")
        if self.proj_type in ("left", "right"):
            return (self.proj_type,)
        smaller = "right" if rows >= columns else "left"
        larger = "left" if rows >= columns else "right"
        return (smaller if self.proj_type == "std" else larger,)

    def basis_shape(self, shape: tuple[int, ...], side: str) -> tuple[int, int]:
        """Shape of the basis on one side: that side's length and the rank."""
        rows, columns = matrix_shape(shape)
        return (rows if side == "left" else columns, self.rank)

    def projected_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Shape of the projected gradient, which is what the rule's state is made for."""
        rows, columns = matrix_shape(shape)
        sides = self.sides(shape)
        return (
            self.rank if "left" in sides else rows,
            self.rank if "right" in sides else columns,
        )

    def tensors(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """State of the projection of a parameter of `shape`, by name; the rule's is beside it."""
        tensors: dict[str, TensorSpec] = {}
        if self.basis != "seeded":
            for side in self.sides(shape):
                tensors |= self._basis_tensors(side, self.basis_shape(shape, side))
        if self.keeps_norm:
            tensors["residual_norm"] = TensorSpec(shape=(), dtype="float32")
        if self.lazy_threshold > 0:
            tensors["similarities"] = TensorSpec(shape=(LAZY_QUEUE,), dtype="float32")
        return tensors

    @property
    def can_grow(self) -> bool:
        """Whether the residual has a size of its own, which `norm_growth` may bound."""
        return self.residual not in ("none", "balanced")

    @property
    def keeps_norm(self) -> bool:
        """Whether the norm of the last residual is remembered for the growth limiter."""
        return self.can_grow and self.norm_growth > 0

    def _basis_tensors(self, side: str, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        name = f"basis_{side}"
        if self.basis_storage in ("fp32", "bf16"):
            dtype = {"fp32": "float32", "bf16": "bfloat16"}[self.basis_storage]
            return {name: TensorSpec(shape=shape, dtype=dtype)}
        scales = TensorSpec(shape=(-(-prod(shape) // STORAGE_BLOCK),), dtype="float32")
        if self.basis_storage == "int8":
            return {
                f"{name}_codes": TensorSpec(shape=shape, dtype="int8"),
                f"{name}_scales": scales,
            }
        packed = TensorSpec(shape=(-(-prod(shape) // 2),), dtype="uint8")
        return {f"{name}_codes": packed, f"{name}_scales": scales}


LOW_RANK_KEYS = tuple(field.name for field in fields(LowRank))


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor of two dims or more, taken as a matrix (module docstring)."""
    if len(shape) == 3:
        return (shape[0] * shape[1], shape[2])
    return (shape[0], prod(shape[1:]))


def low_rank_of(group: Mapping[str, Any]) -> LowRank | None:
    """The projection that a parameter group asks for; None where its rank is 0."""
    if group["rank"] == 0:
        return None
    return LowRank(**{key: group[key] for key in LOW_RANK_KEYS})
