"""Where a model lies: a folder, a .gguf file, or a hub id that is downloaded to the hub's cache.

Only what nibble reads is downloaded: safetensors, JSON, tokenizer files and chat templates. Pickled
weights are never fetched and never loaded. `HF_HUB_OFFLINE=1` is honoured by the hub client itself:
then only cached files are used.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from nibble.errors import ConfigError, WeightError
from nibble.models.builtin import builtin_folder
from nibble.spec.builtin_models import is_builtin

ALLOWED_FILES = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "*.tiktoken",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
]
IGNORED_FILES = ["consolidated*", "original/*", "onnx/*", "openvino/*"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


def locate(
    path: str,
    *,
    revision: str | None = None,
    with_code: bool = False,
    with_weights: bool = True,
) -> Path:
    """The local folder or .gguf file of a model, downloading a hub id where need be.

    `with_weights` false downloads no weights, for a tokenizer. Raises WeightError for what is
    neither there nor a hub id, and for a download that fails.
    """
    if is_builtin(path):
        return builtin_folder(path)
    local = Path(path).expanduser()
    if local.is_dir() or (local.is_file() and local.suffix == ".gguf"):
        if revision is not None:
            raise ConfigError(
                f"model.revision={revision} is only for hub ids, and {path} is local: remove it"
            )
        return local
    if local.is_file():
        raise WeightError(
            f"{path} is a file but not a .gguf: give the folder that holds config.json and the "
            ".safetensors"
        )
    if local.suffix == ".gguf" or HUB_ID.fullmatch(path) is None:
        raise WeightError(
            f"{path} does not exist: give a folder, a .gguf file or a hub id such as org/name"
        )
    patterns = ALLOWED_FILES if with_weights else ALLOWED_FILES[1:]
    return _download(path, revision=revision, patterns=[*patterns, *(["*.py"] * with_code)])


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a checkpoint folder; WeightError when it is missing or not JSON."""
    file = folder / "config.json"
    if not file.is_file():
        if (folder / "adapter_config.json").is_file():
            raise WeightError(
                f"{folder} holds an adapter, not a model: give its base as model.path and this "
                "folder as adapter.path"
            )
        raise WeightError(f"{folder} has no config.json: it is not a model in transformers' layout")
    try:
        parsed = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise WeightError(f"{file} cannot be read as JSON ({error}): fetch it again") from None
    if not isinstance(parsed, dict):
        raise WeightError(f"{file} is not a JSON object: fetch it again")
    return parsed


def refuse_pickle(folder: Path) -> None:
    """Raise WeightError when a folder holds no safetensors, saying why pickled weights are not an
    alternative."""
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise WeightError(
            f"{folder} holds only {pickles[0]}: nibble never loads pickle; convert it with "
            "transformers' "
            "save_pretrained on a machine that you trust, or take a safetensors revision"
        )
    raise WeightError(f"{folder} holds no .safetensors file: there are no weights to read")


def _download(hub_id: str, *, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=IGNORED_FILES
        )
    except Exception as error:
        # The client raises a dozen kinds (HTTP, cache, validation, offline): for the user they are
        # one.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightError(
            f"{hub_id} is no local folder and cannot be fetched from the hub "
            f"({type(error).__name__}: "
            f"{reason[:200]}): check the name, the network and HF_HUB_OFFLINE, or download it first"
        ) from None
    return Path(folder)
