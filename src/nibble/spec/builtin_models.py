"""Shapes to pretrain that come with nibble: Llama models from 9 M to 13 B weights, by name.

    builtin:llama-60m      GaLore's shape of that name (arXiv 2403.03507; 13b is LLaMA's own)
    builtin:bytes          a tokenizer without training: one token a byte, and one that ends texts

They have no weights, so they are only for `model.from_scratch`. Embedding and head have as many
rows as the tokenizer has tokens; the sizes in the names count 32,000. No file is read here and
nothing is made: `models/` writes what transformers wants to read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from nibble.errors import ConfigError

BUILTIN = "builtin:"
BYTES = "bytes"
DEFAULT_TOKENIZER = "t5-base"
"""The tokenizer of a built-in shape that names none, as in GaLore's experiments: a hub id."""
DEFAULT_VOCABULARY = 32_000
VOCABULARY_MULTIPLE = 64
"""A vocabulary is rounded up to this, so that the head is fast."""


class Shape(NamedTuple):
    """What makes one Llama another."""

    hidden: int
    intermediate: int
    num_heads: int
    num_layers: int


SHAPES: dict[str, Shape] = {
    "llama-9m": Shape(128, 352, 4, 4),
    "llama-35m": Shape(384, 1024, 8, 6),
    "llama-60m": Shape(512, 1376, 8, 8),
    "llama-130m": Shape(768, 2048, 12, 12),
    "llama-250m": Shape(768, 2560, 16, 24),
    "llama-350m": Shape(1024, 2736, 16, 24),
    "llama-1b": Shape(2048, 5461, 32, 24),
    "llama-3b": Shape(2560, 6848, 32, 32),
    "llama-7b": Shape(4096, 11008, 32, 32),
    "llama-13b": Shape(5120, 13824, 40, 40),
}


def is_builtin(path: str) -> bool:
    """Whether a path names something that comes with nibble."""
    return path.startswith(BUILTIN)


def config_of(path: str) -> dict[str, Any]:
    """The config.json of a built-in shape. Raises ConfigError for an unknown name."""
    name = path.removeprefix(BUILTIN)
    if name not in SHAPES:
        raise ConfigError(
            f"{path} is unknown: the built-in models are {BUILTIN}{f', {BUILTIN}'.join(SHAPES)}"
        )
    shape = SHAPES[name]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "vocab_size": DEFAULT_VOCABULARY,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def rounded_vocabulary(num_tokens: int) -> int:
    """Rows of an embedding for so many tokens."""
    return -(-num_tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
