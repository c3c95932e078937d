"""The converted header is made once, found again, and never stands in the way."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nibble.models import gguf_cache
from nibble.spec.gguf import GgufTensor


@pytest.fixture()
def conversions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Counts the conversions of a pretended header, in a cache of its own."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    made: list[str] = []
    header = SimpleNamespace(
        values={},
        tensors=[GgufTensor(name="token_embd.weight", shape=(4, 2), type_id=0, offset=64)],
    )

    def config(path: Path) -> Any:
        made.append("config")
        return LlamaConfig(hidden_size=96)

    def tokenizer(path: Path) -> Any:
        made.append("tokenizer")
        raw = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
        return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="a")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf_cache, "read_gguf_header", lambda path: header)
    monkeypatch.setattr(gguf_cache, "gguf_config", config)
    monkeypatch.setattr(gguf_cache, "convert_tokenizer", tokenizer)
    return made


def test_the_second_reading_converts_nothing(conversions: list[str], tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"x" * 200)
    for _ in range(2):
        assert gguf_cache.read_config(file).hidden_size == 96
        assert gguf_cache.read_tokenizer(file)("b")["input_ids"] == [1]
    assert conversions == ["config", "tokenizer"]


def test_another_header_is_another_entry(conversions: list[str], tmp_path: Path) -> None:
    for number in range(2):
        file = tmp_path / f"{number}.gguf"
        file.write_bytes(bytes([number]) * 200)
        gguf_cache.read_config(file)
    assert conversions.count("config") == 2


def test_a_cache_that_cannot_be_written_is_no_error(
    conversions: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file, where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    file = tmp_path / "m.gguf"
    file.write_bytes(b"x" * 200)
    assert gguf_cache.read_config(file).hidden_size == 96
    assert gguf_cache.read_tokenizer(file)("b")["input_ids"] == [1]
