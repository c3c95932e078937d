"""What loading, the loss and the update have for themselves while they are at work, in bytes.

    load      the largest matrix in 16 bit as it arrives, packed, and temporaries of a chunk of it
    the loss  logits of a chunk; of a trained head T V e by the logits, or 4 V h of its gradient
    update    of adamw on a large tensor the update in fp32, a slice of 128 MiB at a time; of other
              rules and small tensors lists in fp32 of at most 256 MiB; of adafactor whole tensors

T tokens, V vocabulary, h width, e bytes a number. They come and go, so only what is alive at one
time counts, which tests/spec/test_memory_count.py compares with a count of live tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from nibble.spec.activations import Work
from nibble.spec.arch import Architecture
from nibble.spec.config import Optim
from nibble.spec.formats import FormatSpec, TensorSpec
from nibble.spec.methods import low_rank
from nibble.spec.state import rule_and_codec

PACK_CHUNK_WEIGHTS = 1 << 24
"""Packing goes by chunks of at most this many weights (`numerics/rows.py`)."""
PACK_BYTES_PER_WEIGHT = {"nf4": 17, "fp4": 17, "int8": 9, "hqq": 30, "ternary": 16}
"""Temporaries of a chunk, counted: fp32 copies, distances, codes."""
LIST_BYTES = 1 << 28
"""Bound on an update's temporaries, of which adamw's kernel takes a fp32 update: 4 bytes of 8."""
WHOLE_BYTES = 2 * LIST_BYTES
"""Bound on those of a tensor that adafactor takes whole (`optim/by_rows.py`)."""
FUSED_WEIGHTS = 1 << 20
"""From here on a tensor has a kernel to itself (`optim/update.py`)."""
UNPACKED_BYTES = 48
"""Of temporaries a weight, that lists allow for where something must be unpacked."""
SOFTCAP_BYTES_PER_LOGIT = 22
"""Of soft-capped logits in fp32: themselves, their tanh, the loss's copy, gradients."""
SOFTCAP_GAPS = 0.025
"""Of soft-capped logits, that is reserved on top: seven configurations of Gemma 2 had 0.003 to
0.053 more than the usual share, 0.028 in the middle."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Bytes around the head. `chunk`: logits of one chunk with their gradient; `chunk_evaluation`:
    without. `head`: what of a trained head's gradient waits for backward; `head_copy`: its weight
    in the type of the rows; `head_step`: a chunk's share of its gradient; `head_cast`: the gradient
    in the type of the rows, before it is brought to the weight's. `gaps`: what the allocator loses
    between the temporaries of a soft cap.
    """

    chunk: int
    chunk_evaluation: int
    head: int
    head_copy: int
    head_step: int
    head_cast: int = 0
    gaps: int = 0


def loss_bytes(
    shape: Architecture, work: Work, *, chunk_tokens: int, head_element: int | None, keeps: bool
) -> Loss:
    """Price a pass through the chunked loss of `nn/loss.py`.

    `head_element`: bytes of a number of the head where it is trained, else None. `keeps`: whether
    the type allows to keep gradients by the logits (fp16 does not).
    """
    e, tokens, is_lm = work.element, work.tokens, shape.head_size > 0
    vocabulary = shape.sizes.vocab if is_lm else 0
    if shape.encoder and is_lm:
        # Made by the model, in full.
        full = tokens * vocabulary * (8 + e)
        return Loss(chunk=full, chunk_evaluation=full, head=0, head_copy=0, head_step=0)
    logits = min(chunk_tokens, tokens) * vocabulary
    each = e + (SOFTCAP_BYTES_PER_LOGIT if shape.style.scores == "softcap" else 0)
    kept = head_step = copy = cast = 0
    if head_element is not None and is_lm:
        by_logits, own = tokens * vocabulary * e, 4 * shape.head_size
        kept = by_logits if keeps and tokens * e <= 4 * shape.sizes.hidden else own
        head_step = 0 if kept == by_logits else shape.head_size * e
        copy = shape.head_size * e if head_element != e else 0
        cast = copy if kept == by_logits else 0
    return Loss(
        chunk=logits * each,
        chunk_evaluation=logits * each,
        head=kept,
        head_copy=copy,
        head_step=head_step,
        head_cast=cast,
        gaps=int(SOFTCAP_GAPS * logits * (each - e)),
    )


def packing_bytes(spec: FormatSpec | None, matrix: tuple[int, int] | None) -> int:
    """What the device has beside the model while its largest matrix is packed."""
    if spec is None or matrix is None:
        return 0
    size = prod(matrix)
    chunk = min(size, PACK_CHUNK_WEIGHTS) * PACK_BYTES_PER_WEIGHT[spec.name]
    return 2 * size + spec.nbytes(matrix) + chunk


def update_bytes(optim: Optim, trained: Sequence[TensorSpec]) -> int:
    """The most that one batch of an update has beside weights, gradients and state."""
    rule, codec = rule_and_codec(optim)
    sizes = [(prod(tensor.shape), tensor.dtype) for tensor in trained]
    if not sizes:
        return 0
    large = max(size for size, _ in sizes)
    if rule == "adamw":
        whole = codec == "fp32" and all(dtype == "float32" for _, dtype in sizes)
        small = sum(size for size, _ in sizes if size < FUSED_WEIGHTS)
        lists = min(small * (8 if whole else 20), LIST_BYTES)
        alone = min(4 * large, LIST_BYTES // 2) if large >= FUSED_WEIGHTS else 0
        low = low_rank(optim)
        if low is not None and low.residual == "fira":
            alone = min(8 * large, LIST_BYTES)  # the part outside of the basis, in fp32
        if low is not None and low.residual == "balanced":
            projected = [tensor.nbytes for tensor in trained if low.projects(tensor.shape)]
            # Of alike matrices as many as fit, of one at least, in the gradient's type.
            alone = max(alone, min(sum(projected), max([*projected, LIST_BYTES])))
        return max(lists, alone)
    if rule.startswith("adafactor"):
        # Two in fp32, and what reduces them: 8.9 and 9.1 were measured. Of more, rows at a time.
        taken_whole = [9 * size for size, _ in sizes if 9 * size <= WHOLE_BYTES]
        by_rows = [LIST_BYTES] if 9 * large > WHOLE_BYTES else []
        return max(taken_whole + by_rows)
    return min(10 * sum(size for size, _ in sizes), LIST_BYTES * 10 // UNPACKED_BYTES)
