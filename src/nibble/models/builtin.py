"""Files of the models and the tokenizer that come with nibble, written where they can be read.

transformers reads folders, so a built-in shape becomes a folder in the user's cache with its
config.json, and the byte tokenizer one with its tokenizer.json. Both are a kilobyte, written again
whenever they are not what this nibble would write, and the same for everyone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nibble.errors import ConfigError
from nibble.spec.builtin_models import BUILTIN, BYTES, config_of

END = "<|endoftext|>"


def builtin_folder(path: str) -> Path:
    """The folder of `builtin:NAME`; ConfigError for an unknown name or a cache that is read-only.

    The content is a function of the name, so processes may write it at the same time.
    """
    name = path.removeprefix(BUILTIN)
    files = _byte_tokenizer() if name == BYTES else {"config.json": config_of(path)}
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(base).expanduser() / "nibble" / "models" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            _write(folder / file, json.dumps(content, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written to {folder} ({error}): set XDG_CACHE_HOME"
        ) from None
    return folder


def _write(file: Path, text: str) -> None:
    if file.is_file() and file.read_text(encoding="utf-8") == text:
        return
    part = file.with_name(f".{file.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def _byte_tokenizer() -> dict[str, Any]:
    """One token a byte, without merges, and the token that ends texts: 257 tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(END, special=True)])
    return {
        "tokenizer.json": json.loads(raw.to_str()),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "pad_token": END,
            "model_max_length": 10**9,
        },
    }
