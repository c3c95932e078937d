"""The collector rests while large libraries are imported, and is as it was afterwards."""

from __future__ import annotations

import gc

import pytest

from nibble.spec.imports import without_collector


@without_collector()
def is_resting() -> bool:
    with without_collector():
        pass
    return not gc.isenabled()


def test_it_rests_and_returns() -> None:
    assert is_resting() and gc.isenabled()
    with pytest.raises(ZeroDivisionError), without_collector():
        raise ZeroDivisionError
    assert gc.isenabled()
    gc.disable()
    try:
        assert is_resting() and not gc.isenabled(), "whoever had it off keeps it off"
    finally:
        gc.enable()
