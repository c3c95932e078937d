"""What trained parameters cost besides activations: state, gradients and, as int8, themselves.

    ordinary      a gradient as large as each trained parameter
    layer-wise    of a projected one P^T G only, [rank, n], in the gradient's type; while its
                  layer's backward runs, one whole gradient; and where the next step begins with
                  new bases, a float32 sketch [side, rank] for each side
    in backward   of matrices only those of the one that is at work

Which parameters are projected is `methods.py`, the state is `state.py`: the functions that allocate
are the functions that price, so bytes are exact. Sketches are counted at their most: staggered
refreshes share FIRST_STEPS steps at the start, and together means all in one step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from nibble.spec.config import Optim
from nibble.spec.formats import DTYPE_BYTES, TensorSpec
from nibble.spec.int8_weights import int8_weight_tensors
from nibble.spec.lowrank import LowRank, matrix_shape
from nibble.spec.methods import has_int8_weights, low_rank, reasons
from nibble.spec.state import optimizer_nbytes, rule_and_codec

FIRST_STEPS = 16
"""As in optim/layerwise.py: the steps within which all matrices get their first real bases."""


@dataclass(frozen=True, kw_only=True)
class Learning:
    """Bytes of what is trained. `weights`: of each trained tensor by name. `gradients`: what exists
    from backward to the step; `passing`: the whole gradient that exists on top while one layer is
    at work (0 in the ordinary mode); `sketches`: what the next bases come from.
    """

    state: int
    weights: Mapping[str, int]
    gradients: int
    passing: int
    sketches: int
    num_projected: int


def learning(optim: Optim, tensors: Mapping[str, TensorSpec]) -> Learning:
    """Price the training of these parameters, in the types that they are trained in.

    Raises ConfigError for a rank or target that fits no matrix.
    """
    low = low_rank(optim)
    rule, codec = rule_and_codec(optim)
    why: Mapping[str, str | None] = dict.fromkeys(tensors, "")
    if low is not None:
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        why = reasons(optim, shapes, low=low)
    state = gradients = sketches = passing = 0
    weights: dict[str, int] = {}
    for name, tensor in tensors.items():
        own = low if why[name] is None else None
        state += optimizer_nbytes(rule, codec=codec, shapes=[tensor.shape], low_rank=own)
        weights[name] = tensor.nbytes
        if own is not None and has_int8_weights(optim):
            parts = int8_weight_tensors(matrix_shape(tensor.shape)).values()
            weights[name] = sum(part.nbytes for part in parts)
        if own is None and optim.in_backward and len(tensor.shape) > 1:
            passing = max(passing, tensor.nbytes)
            continue
        if own is None or not optim.layerwise:
            gradients += tensor.nbytes
            continue
        small = prod(own.projected_shape(tensor.shape)) * DTYPE_BYTES[tensor.dtype]
        if optim.in_backward:
            passing = max(passing, tensor.nbytes + small + _sketch_bytes(own, tensor.shape))
            continue
        gradients += small
        passing = max(passing, tensor.nbytes)
        sketches += _sketch_bytes(own, tensor.shape)
    num_projected = sum(reason is None for reason in why.values())
    if low is not None and low.stagger:
        sketches = -(-sketches // min(FIRST_STEPS, low.update_proj_gap))
    return Learning(
        state=state,
        weights=weights,
        gradients=gradients,
        passing=passing,
        sketches=sketches,
        num_projected=num_projected,
    )


def _sketch_bytes(low: LowRank, shape: tuple[int, ...]) -> int:
    if low.basis == "random":
        return 0
    return sum(4 * prod(low.basis_shape(shape, side)) for side in low.sides(shape))
