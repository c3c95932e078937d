"""Labels of classification: from what files hold to class ids or numbers.

    whole numbers from 0 (a few may lack)   the class ids themselves
    other whole numbers, or words           classes in sorted order
    numbers with a point                    regression

A pure function of the set of labels, so that the order of rows never matters. Held-out rows share
the mapping of the training rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from nibble.data.tokenise import RawLabel
from nibble.errors import DataError

MAX_CLASSES = 10_000


def label_names(raw: Sequence[RawLabel]) -> tuple[str, ...]:
    """The classes in the order of their ids; empty for regression.

    Raises DataError when there are so many words that they cannot be classes, or when words stand
    among numbers with a point.
    """
    texts = {str(label).strip() for label in raw}
    if all(re.fullmatch(r"[+-]?\d+", text) for text in texts):
        numbers = sorted({int(text) for text in texts})
        if numbers[0] == 0 and numbers[-1] < 2 * len(numbers):
            return tuple(str(i) for i in range(numbers[-1] + 1))
        return tuple(map(str, numbers))
    if all(_is_number(text) for text in texts):
        return ()
    if len(texts) > MAX_CLASSES:
        raise DataError(
            f"{len(texts)} different labels, more than {MAX_CLASSES}: is the label column right?"
        )
    return tuple(sorted(texts))


def label_tensor(raw: Sequence[RawLabel], names: tuple[str, ...]) -> Tensor:
    """Class ids, or the numbers themselves without names: float64 [rows]."""
    texts = [str(label).strip() for label in raw]
    if not names:
        return torch.tensor([float(text) for text in texts], dtype=torch.float64)
    numeric = all(re.fullmatch(r"[+-]?\d+", name) for name in names)
    index = {name: i for i, name in enumerate(names)}
    if numeric:
        texts = [str(int(text)) for text in texts]
    return torch.tensor([index[text] for text in texts], dtype=torch.float64)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
