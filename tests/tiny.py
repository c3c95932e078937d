"""A tiny Llama and a tokenizer of whole words, as the files of a checkpoint folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

SPECIAL = ("<pad>", "<eos>", "<unk>")
WORDS = [*SPECIAL, *(f"w{i}" for i in range(40)), "a", "b", "c", "is", "the", "of"]


def save_tokenizer(
    folder: Path,
    words: Sequence[str] = WORDS,
    *,
    marks: Sequence[str] = (),
    template: str | None = None,
) -> None:
    """`words` in their order, split at spaces; `marks` are words that are never split nor shown."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    more = {"additional_special_tokens": list(marks)} if marks else {}
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", **more
    )
    made.chat_template = template
    made.save_pretrained(folder)


def llama_words(num_words: int = len(WORDS), **more: Any) -> dict[str, Any]:
    """The words of its configuration."""
    return {
        "vocab_size": num_words, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
        "max_position_embeddings": 64, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None,
        **more,
    }  # fmt: skip


def save_llama(folder: Path, num_words: int = len(WORDS), **more: Any) -> None:
    """Random weights, the same in every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**llama_words(num_words, **more))).save_pretrained(folder)
