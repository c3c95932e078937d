"""What transformers makes of a GGUF header, kept: configuration and tokenizer as ordinary files.

Converting a vocabulary of 50,000 tokens takes transformers some 10 s, and every command on the file
would pay it again. So the result is written once to the user's cache, under the hash of the header
and the version of transformers, and read from there in a tenth of a second. A cache that cannot be
written is no error: the conversion is then done in memory each time.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from nibble.models.gguf_config import ROPE_FACTORS, gguf_config, require_gguf
from nibble.spec.gguf import read_gguf_header

VERSION = "1"
DONE, TOKENIZER = "config.json", "tokenizer_config.json"


def cache_root() -> Path:
    """Where converted headers lie."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "nibble" / "gguf"


def read_config(path: Path) -> Any:
    """The transformers configuration of a .gguf file."""
    folder = converted(path)
    if folder is None:
        return gguf_config(path)
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def read_tokenizer(path: Path) -> Any:
    """The tokenizer of a .gguf file, with the chat template that the file carries."""
    from transformers import AutoTokenizer

    folder = converted(path)
    if folder is None or not (folder / TOKENIZER).is_file():
        return convert_tokenizer(path)
    return AutoTokenizer.from_pretrained(folder)


def convert_tokenizer(path: Path) -> Any:
    """The same without the cache."""
    from transformers import AutoTokenizer

    require_gguf()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if not tokenizer.chat_template:
        template = read_gguf_header(path).values.get("tokenizer.chat_template")
        tokenizer.chat_template = None if template is None else str(template)
    return tokenizer


def converted(path: Path) -> Path | None:
    """The folder with the file's configuration and tokenizer, made if need be; None if it cannot be
    kept. A file without a tokenizer keeps only its configuration."""
    folder = cache_root() / _key(path)
    if (folder / DONE).is_file():
        return folder
    config = gguf_config(path)
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        part.mkdir(parents=True, exist_ok=True)
        # Without a tokenizer in it, or with one that is not understood, the model is still one.
        with suppress(ValueError, KeyError, TypeError):
            convert_tokenizer(path).save_pretrained(part)
        config.save_pretrained(part)
        part.rename(folder)
    except OSError:
        # Full, read-only, or another process was first: what is there then is as good.
        return folder if (folder / DONE).is_file() else None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _key(path: Path) -> str:
    import transformers

    header = read_gguf_header(path)
    size = min((tensor.offset for tensor in header.tensors), default=0)
    digest = hashlib.sha256(f"{VERSION} {transformers.__version__} {size}".encode())
    with path.open("rb") as file:
        digest.update(file.read(size))
        for tensor in header.tensors:
            # Rotary factors are data that the configuration is made from.
            if tensor.name == ROPE_FACTORS:
                file.seek(tensor.offset)
                digest.update(file.read(4 * math.prod(tensor.shape)))
    return digest.hexdigest()[:24]
