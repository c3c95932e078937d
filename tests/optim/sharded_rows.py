"""What test_sharded.py and its processes agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nibble.spec.lowrank import METHODS

STEPS = 10
SHAPES = (
    (96, 64),
    (48, 96),
    (64, 64),
    (49, 64),
    (3, 40, 24),
    (24, 3, 4, 5),
    (5, 90),
    (90,),
    (1, 7),
)
"""Tall, wide, square, uneven; a stack, a kernel; three that rank 8 does not project, of which the
last leaves the second of two processes nothing."""

UNEVEN = ((100, 70), (160, 70), (127, 70), (117, 70))
"""The larger part of the last two is worth 8 bits under some rule below, the smaller is not: what
processes add must not hang on that."""

CUTS: dict[str, Callable[[tuple[int, ...]], int | None]] = {
    "rows": lambda shape: 0,
    "last": lambda shape: len(shape) - 1 if len(shape) <= 3 else 0,
    # As placements cut: what keeps the projection local, and some tensors not at all.
    "mixed": lambda shape: (
        None if shape == (64, 64) else int(len(shape) == 2 and shape[0] < shape[1])
    ),
}
ROWS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "lion": {"rule": "lion", "lr": 1e-3},
    "adafactor": {"rule": "adafactor", "parameter_scale": 1e-3},
    "adafactor_momentum": {"rule": "adafactor_momentum"},
    **{name: {"rank": 8, **row} for name, row in METHODS.items()},
    "q-galore randomised": {"rank": 8, **METHODS["q-galore"], "basis": "randomised"},
    "galore randomised": {"rank": 8, "basis": "randomised"},
    "galore randomised, reverse": {"rank": 8, "basis": "randomised", "proj_type": "reverse_std"},
    "galore randomised, full": {"rank": 8, "basis": "randomised", "proj_type": "full"},
    "galore random, left": {"rank": 8, "basis": "random", "proj_type": "left"},
    "galore right": {"rank": 8, "basis": "randomised", "proj_type": "right"},
    "galore adafactor": {
        "rank": 8,
        "basis": "randomised",
        "rule": "adafactor",
        "parameter_scale": 1e-3,
    },
    "galore adafactor, reverse": {
        "rank": 8,
        "basis": "randomised",
        "rule": "adafactor_momentum",
        "proj_type": "reverse_std",
    },
    "fira randomised": {"rank": 8, "basis": "randomised", "residual": "fira"},
    "balanced": {"rank": 8, "basis": "randomised", "residual": "balanced", "scale": 0.25},
    "adamw 8bit": {"codec": "8bit"},
    "galore 8bit, uneven": {
        "rank": 64,
        "basis": "randomised",
        "proj_type": "right",
        "codec": "8bit",
        "shapes": UNEVEN,
    },
    "adafactor 8bit, uneven": {
        "rule": "adafactor_momentum",
        "parameter_scale": 1e-3,
        "codec": "8bit",
        "shapes": UNEVEN,
    },
    "fira 8bit, uneven": {
        "rank": 64,
        "basis": "randomised",
        "proj_type": "right",
        "residual": "fira",
        "codec": "8bit",
        "shapes": UNEVEN,
    },
    # Noise belongs to elements of the whole: every bit is the same.
    "adamw bf16, rounded": {"codec": "bf16", "dtype": "bf16", "stochastic_rounding": True},
    "lion bf16, rounded": {"rule": "lion", "dtype": "bf16", "stochastic_rounding": True},
}
LAYERWISE: dict[str, dict[str, Any]] = {
    "layerwise adamw": {},
    "layerwise 8bit": {"codec": "8bit"},
    "layerwise, a sixteenth": {"rank": 4},
    "layerwise random": {"basis": "random"},
    "layerwise adafactor": {"rule": "adafactor"},
}
