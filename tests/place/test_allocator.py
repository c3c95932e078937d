"""Who decides how torch's CUDA allocator takes memory."""

from __future__ import annotations

import pytest
import torch

from nibble.place.devices import ALLOCATOR_SETTINGS, expand_segments


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the allocator was told."""
    told: list[str] = []
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", told.append)
    monkeypatch.setattr("sys.platform", "linux")
    for name in ALLOCATOR_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    return told


def test_segments_grow_unless_the_user_decides(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = expand_segments.__wrapped__
    assert ours() and asked == ["expandable_segments:True"]
    for name in ALLOCATOR_SETTINGS:
        with monkeypatch.context() as users:
            users.setenv(name, "max_split_size_mb:512")
            assert not ours()
    assert len(asked) == 1


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torch_takes_the_word() -> None:
    """The setter is not public: this fails when a version of torch has it no more."""
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
