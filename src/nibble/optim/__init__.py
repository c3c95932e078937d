"""The optimiser, parameter groups and schedules."""

from nibble.optim.clipping import clip_grad_norm_
from nibble.optim.galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from nibble.optim.groups import (
    GroupRule,
    GroupSummary,
    build,
    group_parameters,
    low_rank_rules,
    projection_lines,
    summarise,
)
from nibble.optim.layerwise import Layerwise, layerwise_
from nibble.optim.optimizer import Optimizer
from nibble.optim.projected_grad import absent_grad, small_tensors
from nibble.optim.schedules import Schedule
from nibble.optim.stores import Int8Store, keep_int8_

__all__ = [
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GroupRule",
    "GroupSummary",
    "Int8Store",
    "Layerwise",
    "Optimizer",
    "Schedule",
    "absent_grad",
    "build",
    "clip_grad_norm_",
    "group_parameters",
    "keep_int8_",
    "layerwise_",
    "low_rank_rules",
    "projection_lines",
    "small_tensors",
    "summarise",
]
