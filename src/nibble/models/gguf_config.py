"""The configuration inside a GGUF file, as transformers reads it, with what it leaves out put
right.

Two things are left out. The size of the vocabulary, when the tokenizer is not in the file: the
embedding's rows have it. And the rotary scaling of Llama 3.1 and later, which llama.cpp stores as a
tensor of factors by which each frequency is divided,

    factor_i = 1 for short waves, F for long ones, and in between 1 / ((1 - s) / F + s),
    s = (8192 / wavelength_i - 1) / (4 - 1)

It is recognised by its values; ignoring it would give wrong logits in silence, so factors of
another kind are refused. Costs two
readings of the header.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nibble.errors import ConfigError, WeightError
from nibble.spec.gguf import GgufTensor, read_gguf_header

LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_POSITIONS = 1.0, 4.0, 8192
ROPE_FACTORS = "rope_freqs.weight"
LONG_ROPE = ("rope_factors_long.weight", "rope_factors_short.weight")


def gguf_config(path: Path) -> Any:
    """The transformers configuration of a .gguf file.

    Raises ConfigError without the gguf package, WeightError for a damaged file, an architecture
    that transformers does not convert, or rotary factors that it cannot express.
    """
    require_gguf()
    from transformers import AutoConfig

    header = read_gguf_header(path)
    tensors = {tensor.name: tensor for tensor in header.tensors}
    if "token_embd.weight" not in tensors:
        raise WeightError(f"{path} has no token_embd.weight: it is no language model")
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:
        # The reader raises numpy, key and value errors for damage, and ValueError for an unknown
        # architecture.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise WeightError(
            f"{path} cannot be read as GGUF ({reason}): it is damaged, or of an architecture that "
            "transformers does not convert"
        ) from None
    config.vocab_size = tensors["token_embd.weight"].shape[0]
    if any(name in tensors for name in LONG_ROPE):
        raise WeightError(
            f"{path} has rotary factors for long contexts that transformers does not read from "
            "GGUF: take the safetensors model"
        )
    if ROPE_FACTORS in tensors:
        config.rope_parameters = _llama3_rope(path, config, _read_fp32(path, tensors[ROPE_FACTORS]))
    return config


def require_gguf() -> None:
    """Raise ConfigError naming the extra when the gguf package is absent."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ConfigError(
            'a .gguf file needs the gguf package: pip install "nibble[gguf]"'
        ) from None


def llama3_factors(theta: float, *, factor: float, num_frequencies: int) -> Tensor:
    """By what Llama 3.1's scaling divides each of the rotary frequencies: [num_frequencies]."""
    wavelengths = 2 * math.pi * theta ** (torch.arange(num_frequencies) / num_frequencies)
    smooth = (LLAMA3_POSITIONS / wavelengths - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)
    smooth = smooth.clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _read_fp32(path: Path, tensor: GgufTensor) -> Tensor:
    count = math.prod(tensor.shape)
    with path.open("rb") as file:
        file.seek(tensor.offset)
        raw = file.read(4 * count)
    if len(raw) != 4 * count or tensor.type_id != 0:
        raise WeightError(f"{path}: {tensor.name} is not {count} fp32 values: fetch it again")
    return torch.tensor(struct.unpack(f"<{count}f", raw))


def _llama3_rope(path: Path, config: Any, factors: Tensor) -> dict[str, Any]:
    theta = float(config.rope_parameters["rope_theta"])
    factor = float(factors.max())
    wanted = llama3_factors(theta, factor=factor, num_frequencies=factors.numel())
    if not torch.allclose(factors, wanted, rtol=1e-3):
        raise WeightError(
            f"{path} has rotary factors that are not Llama 3's, and transformers does not read "
            "them from GGUF: take the safetensors model"
        )
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": LLAMA3_POSITIONS,
    }
