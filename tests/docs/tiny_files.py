"""The files that the pages speak of: `my-model`, `my-data.jsonl`, ... as small as they can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
THINGS = ("river", "hammer", "violin", "glacier", "ladder", "orchid", "compass", "kettle")


def tokenizer() -> Any:
    """One token a byte, with ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate([*SPECIAL, *alphabet])}
    raw = Tokenizer(models.BPE(vocab=words, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<|pad|>", eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    made.chat_template = CHATML
    return made


def write_model(folder: Path) -> None:
    """A Llama of two blocks with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    made = tokenizer()
    made.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(made), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=128, max_position_embeddings=2048,
        eos_token_id=2, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def write_data(folder: Path) -> None:
    """Rows that a model of this size can learn something from, and a text."""

    def rows(name: str, count: int, first: int) -> None:
        made = [
            {
                "instruction": f"What is a {THINGS[(first + i) % len(THINGS)]}?",
                "output": f"A {THINGS[(first + i) % len(THINGS)]} is a thing, number {i % 5}.",
            }
            for i in range(count)
        ]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in made))

    rows("my-data.jsonl", 96, 0)
    rows("more-data.jsonl", 24, 3)
    (folder / "my-text.txt").write_text("A river is a thing. A ladder is a thing.\n" * 20)
