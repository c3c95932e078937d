"""Random orders that are pure functions of integers.

A permutation is the stable argsort of raw 64-bit words of the Philox generator keyed by its
integers. Raw words of a bit generator are fixed by its definition, while `permutation` and
`randperm` may change with a version of their library, and a resumed run must see the same order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def permutation(size: int, *keys: int) -> NDArray[np.int64]:
    """An order of 0..size-1 that depends on the keys (whole numbers >= 0) alone."""
    words = np.random.Philox(np.random.SeedSequence(keys)).random_raw(size)
    return np.argsort(np.atleast_1d(words), kind="stable").astype(np.int64)
