"""Bytes of activations under checkpointing: what blocks keep on the device and in host memory.

With L blocks, of which the last N keep all (list K_i of `activations.py`), and each other one its
input and, if selective, what attention gave (k):

    when forward ends       on the device   (L - N) k + K_{L-N} + .. + K_{L-1}
      with offload          on the device   k + the kept blocks           on the host (L - N - 1) k
    block i computed again  on the device   (i + 1) k + its list and workspace without its own k
      with offload          on the device   2 k + the same: its own, and the next on its way
                                            (k + the same where k is above 512 MiB: offload.py)

It prices `place/activations.py` and `place/offload.py`; a test counts what autograd keeps there.
"""

from __future__ import annotations

from dataclasses import dataclass

from nibble.spec.activations import (
    Work,
    attention_output_bytes,
    backward_bytes,
    input_bytes,
    kept_bytes,
)
from nibble.spec.arch import Architecture
from nibble.spec.config import Train

PREFETCH_MAX_BYTES = 512 << 20
"""What a block keeps comes back from the host one block ahead up to this size. More comes when it
is asked for: the copy is a hundredth of so large a block's time, and its memory would be the price.
"""


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """Bytes of the blocks' activations in one pass, on one device."""

    num_blocks: int
    num_again: int
    """Blocks that compute again."""
    forward_ends: int
    """All that is kept on the device."""
    again: int
    """Kept on the device when the first block is computed again, without its backward."""
    again_backward: int
    """The most that a block that computes again holds beside that."""
    kept_backward: int
    """The most that the last kept block holds beside what it keeps; 0 without one."""
    first_block: int
    """Kept when backward comes to the first block."""
    host: int
    """In host memory."""

    @property
    def again_share(self) -> float:
        """Of the blocks, that compute again."""
        return self.num_again / max(1, self.num_blocks)


def num_kept_blocks(train: Train, num_blocks: int) -> int:
    """How many blocks keep all; what is `auto` counts as none until it is decided."""
    if train.activation_checkpointing == "none":
        return num_blocks
    return 0 if train.keep_blocks == "auto" else min(train.keep_blocks, num_blocks)


def keeping(shape: Architecture, work: Work, train: Train) -> Keeping:
    """Price the settings of `train` for one pass."""
    lists = kept_bytes(shape, work)[work.num_idle :]
    num_kept = num_kept_blocks(train, len(lists))
    num_again = len(lists) - num_kept
    one = input_bytes(shape, work)
    # The fast norm keeps the input itself, which the list has then as well.
    listed = one if work.fused else 0
    if train.activation_checkpointing == "selective":
        one += attention_output_bytes(shape, work)
        listed += attention_output_bytes(shape, work)
    held = min(num_again, 1) if train.activation_offload else num_again
    ahead = 2 if one <= PREFETCH_MAX_BYTES else 1
    moving = min(num_again, ahead) if train.activation_offload else num_again
    most = max(range(len(lists)), key=lists.__getitem__, default=None)
    backward = 0 if most is None else backward_bytes(shape, work, block=most + work.num_idle)
    return Keeping(
        num_blocks=len(lists),
        num_again=num_again,
        forward_ends=held * one + sum(lists[num_again:]),
        again=moving * one,
        again_backward=max(0, backward - listed) if num_again else 0,
        kept_backward=max(0, backward - max(lists)) if num_kept else 0,
        first_block=one if num_again else lists[0] if lists else 0,
        host=(num_again - held) * one if train.activation_offload else 0,
    )
