"""Tokenised sources kept on disk, addressed by everything that made them.

    key = sha256(code version, content of the files, the source's words, the recipe's words that
                 matter, the tokenizer's vocabulary and rules, the chat template)

so a changed file, template or tokenizer is another key and nothing is ever stale. An entry is one
safetensors file whose metadata holds a checksum of its tensors: a damaged entry is ignored and made
again. Writing is to a temporary name, then a rename; a full disk costs the cache, not the run.
Entries are never removed by nibble. The key costs one pass over the files (about 1 GB/s) and, for a
large vocabulary, half a second.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nibble.data.report import Tally
from nibble.data.rows import Rows
from nibble.data.sources import SourceFile
from nibble.data.tokenise import Tokenised
from nibble.spec.config import Data, Source

CODE_VERSION = 2
"""Raised whenever the same input would give other tokens."""
TENSORS = ("ids", "targets", "offsets", "file_of", "line_of", "type_ids")


def cache_folder(configured: str | None) -> Path:
    """Where entries lie: the recipe's folder, else nibble's in the user's cache."""
    if configured is not None:
        return Path(configured).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "nibble" / "data"


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of what decides a tokenizer's ids: its rules and vocabulary, not where it lies."""
    parts: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "special": tokenizer.special_tokens_map,
        "added": {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()},
    }
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # What the last call happened to ask for; every call here asks anew.
        rules["truncation"] = rules["padding"] = None
        parts["rules"] = rules
    else:
        parts["vocabulary"] = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def cache_key(
    source: Source,
    files: Sequence[SourceFile],
    data: Data,
    *,
    task: str,
    tokenizer_hash: str,
    template: str | None,
) -> str | None:
    """The name of an entry; None when the content of a source cannot be known beforehand."""
    digests = [file.digest() for file in files]
    if any(digest is None for digest in digests):
        return None
    words = {
        "code": CODE_VERSION,
        "files": digests,
        "source": source.model_dump(exclude={"path"}),
        "data": data.model_dump(include={"max_length", "too_long", "packing", "loss_on", "system"}),
        "task": task,
        "tokenizer": tokenizer_hash,
        "template": template,
    }
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()


def _checksum(tensors: dict[str, Tensor], words: str) -> str:
    digest = hashlib.sha256(words.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def load(folder: Path, key: str, *, files: Sequence[SourceFile]) -> Tokenised | None:
    """The entry of a key, with the files' present names; None if there is none that is whole."""
    from safetensors import SafetensorError, safe_open

    path = folder / f"{key}.safetensors"
    try:
        with safe_open(path, framework="pt") as entry:
            metadata = entry.metadata() or {}
            # Copies, so that nothing depends on the file once it has been read.
            tensors = {name: entry.get_tensor(name).clone() for name in entry.keys()}  # noqa: SIM118
        if metadata.get("checksum") != _checksum(tensors, metadata["words"]):
            return None
        words = json.loads(metadata["words"])
        tally = Tally(**words["tally"])
        tally.examples = {
            fate: [(int(file), int(line), str(text)) for file, line, text in examples]
            for fate, examples in tally.examples.items()
        }
        # What was noted of files that had other names then.
        for before, now in zip(words["files"], (file.name for file in files), strict=False):
            tally.notes = [note.replace(before, now) for note in tally.notes]
        rows = Rows(
            ids=tensors["ids"],
            targets=tensors["targets"],
            offsets=tensors["offsets"],
            files=tuple(file.name for file in files),
            file_of=tensors["file_of"],
            line_of=tensors["line_of"],
            type_ids=tensors.get("type_ids"),
        )
        return Tokenised(
            rows=rows,
            tally=tally,
            raw_labels=words["raw_labels"],
            stop_ids=tuple(words["stop_ids"]),
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def save(folder: Path, key: str, tokenised: Tokenised) -> str | None:
    """Write an entry; returns why it could not be written, or None."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {
        name: value
        for name in TENSORS
        if isinstance(value := getattr(tokenised.rows, name), torch.Tensor)
    }
    tally = tokenised.tally
    words = json.dumps(
        {
            "tally": {
                "num_read": tally.num_read,
                "longest": tally.longest,
                "counts": tally.counts,
                "examples": tally.examples,
                "notes": tally.notes,
            },
            "raw_labels": tokenised.raw_labels,
            "stop_ids": tokenised.stop_ids,
            "files": tokenised.rows.files,
        }
    )
    metadata = {"words": words, "checksum": _checksum(tensors, words)}
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".writing-")
        os.close(handle)
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, folder / f"{key}.safetensors")
    except (OSError, SafetensorError) as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        return str(error)
    return None
