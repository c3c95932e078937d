"""Tiny random models with a word tokenizer, as transformers saves them, and recipes to train them.

A module of helpers, not of tests.
"""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import torch
from tiny import WORDS, llama_words, save_tokenizer

from nibble import run
from nibble.data import Batch
from nibble.spec.config import Recipe
from nibble.train.checkpoint import TRAINED
from nibble.weights.tensor_file import TensorFile

VOCAB = len(WORDS)


def config_of(kind: str) -> Any:
    """The configuration of a model whose every part is small but not trivial."""
    import transformers as t

    llama = llama_words()
    makers = {
        "llama": lambda: t.LlamaConfig(**llama),
        "llama-tied": lambda: t.LlamaConfig(**llama, tie_word_embeddings=True),
        "gpt2": lambda: t.GPT2Config(
            vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64, eos_token_id=1,
            bos_token_id=1,
        ),
        "bloom": lambda: t.BloomConfig(
            vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4, eos_token_id=1, bos_token_id=1,
            pad_token_id=0,
        ),
        "mixtral": lambda: t.MixtralConfig(**llama, num_local_experts=4, num_experts_per_tok=2),
        "qwen3_moe": lambda: t.Qwen3MoeConfig(
            **llama, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
            decoder_sparse_step=1,
        ),
        "bert": lambda: t.BertConfig(
            vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=128, max_position_embeddings=64, num_labels=3,
        ),
    }  # fmt: skip
    return makers[kind]()


def save_model(kind: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint folder with tokenizer, made by transformers."""
    import transformers as t

    torch.manual_seed(0)
    auto = t.AutoModelForSequenceClassification if kind == "bert" else t.AutoModelForCausalLM
    model = auto.from_config(config_of(kind), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # let every part matter
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@functools.cache
def rows_file(folder: Path) -> Path:
    """Prompts and completions that can be learnt."""
    path = folder / "rows.jsonl"
    rows = [
        {"prompt": f"the a of w{i % 40} is", "completion": f" w{(i * 7 + 1) % 40} b"}
        for i in range(48)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@functools.cache
def labelled_file(folder: Path) -> Path:
    """Sentences with three labels, one of which the words tell."""
    path = folder / "labelled.jsonl"
    names = ("no", "perhaps", "yes")
    rows = [{"text": f"the {'abc'[i % 3]} w{i % 40}", "label": names[i % 3]} for i in range(60)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def recipe(base: Path, rows: Path, out: Path, **sections: Any) -> Recipe:
    """Three steps in fp32 on the CPU; sections are laid over."""
    words: dict[str, Any] = {
        "model": {"path": str(base)},
        "data": {"train": [{"path": str(rows)}], "eval_rows": 8, "max_length": 32,
                 "cache_dir": str(rows.parent / "cache")},
        "optim": {"learning_rate": 2e-2, "schedule": "constant"},
        "train": {"precision": "fp32", "micro_batch_size": 4, "max_steps": 3,
                  "activation_checkpointing": "none"},
        "place": {"device": "cpu"},
        "report": {"sinks": ["plain"]},
        "output_dir": str(out),
    }  # fmt: skip
    for name, section in sections.items():
        words[name] = {**words.get(name, {}), **section}
    return Recipe.model_validate(words)


def train(given: Recipe) -> tuple[Recipe, Path]:
    """Train; the recipe as the run settled it, and its last checkpoint."""
    from nibble.train.folder import RECIPE, read_recipe

    result = run.train(given, stream=io.StringIO())
    assert result.outcome.checkpoint is not None
    return read_recipe(result.folder / RECIPE), result.outcome.checkpoint


def trained_tensors(checkpoint: Path) -> TensorFile:
    return TensorFile(checkpoint / TRAINED)


def held_out(given: Recipe) -> tuple[Batch, ...]:
    from nibble.use.assemble import assemble
    from nibble.use.held_out import held_out_batches

    made = assemble(given, to_train=False)
    return held_out_batches(given, made.tokenizer, made.built.family, num_rows=8).batches


def sample_ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(3))
