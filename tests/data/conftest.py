"""What the tests of data share: tokenizers, files, a cache of their own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_tokenizers import build_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizers() -> Callable[..., Any]:
    """build_tokenizer, with what it made kept."""
    made: dict[Any, Any] = {}

    def get(template: str | None = None, *, bos: bool = False) -> Any:
        if (template, bos) not in made:
            made[template, bos] = build_tokenizer(template, bos=bos)
        return made[template, bos]

    return get


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes a file (rows become JSON lines) and returns its path."""

    def to_file(name: str, content: str | bytes | list[Any]) -> str:
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return to_file


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the repository, or a skip."""
    root = os.environ.get("NIBBLE_SHARED") or Path(__file__).resolve().parents[3] / "shared"
    if not (Path(root) / "data").is_dir():
        pytest.skip("the real data are not here: set NIBBLE_SHARED to the folder that holds data/")
    return Path(root) / "data"
