"""Whether two states are the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def leaves(value: object) -> Iterator[object]:
    """Everything inside dicts, lists and tuples."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value


def assert_equal(one: Any, two: Any) -> None:
    """The same numbers in the same types; keys may come in another order."""
    assert type(one) is type(two)
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two)
    elif isinstance(one, dict):
        assert set(one) == set(two)
        for key in one:
            assert_equal(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for pair in zip(one, two, strict=True):
            assert_equal(*pair)
    else:
        assert one == two
