"""Models of true shape with random weights, made on the device that keeps them.

No checkpoint of these sizes is needed to time a step: what counts is shapes, types and kernels. A
config.json in a temporary folder is all that nibble's own path reads; each weight is drawn on the
device and packed on arrival, one at a time, so an 8B model takes seconds and no host memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nibble.models import build
from nibble.nn.adapters import adapt_
from nibble.nn.fused import fuse_
from nibble.nn.quant import quantize_
from nibble.spec.config import Recipe
from nibble.spec.formats import format_spec
from nibble.use.assemble import Assembly, adapter_dtype, compute_dtype, storage_dtype

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
BLOOM = {
    "architectures": ["BloomForCausalLM"],
    "model_type": "bloom",
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
QLORA = {
    "quant": {"format": "nf4"},
    "adapter": {"kind": "lora", "rank": 16, "alpha": 16, "targets": ["all-linear"]},
}
INT8 = {
    "quant": {"format": "int8"},
    "adapter": {
        "kind": "lora",
        "rank": 8,
        "alpha": 32,
        "dropout": 0.05,
        "targets": ["query_key_value"],
    },
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A shape (config.json), a recipe without its model, and the rows x tokens of its batches."""

    config: dict[str, Any]
    recipe: dict[str, Any]
    batches: str


CASES = {
    "llama3-8b": Case(
        config={
            **LLAMA,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
        },
        recipe=QLORA,
        batches="1x2048,4x2048",
    ),
    "llama2-70b": Case(
        config={
            **LLAMA,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "max_position_embeddings": 4096,
        },
        recipe=QLORA,
        batches="4x2048,1x2048,1x512",
    ),
    "bloom-7b1": Case(
        config={**BLOOM, "hidden_size": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 250880},
        recipe=INT8,
        batches="1x512,4x512,8x512",
    ),
    "tiny-llama": Case(
        config={
            **LLAMA,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 512,
        },
        recipe=QLORA,
        batches="1x64,2x64",
    ),
    "tiny-bloom": Case(
        config={**BLOOM, "hidden_size": 128, "n_layer": 2, "n_head": 4, "vocab_size": 512},
        recipe=INT8,
        batches="1x64,2x64",
    ),
}


@dataclass(frozen=True, kw_only=True)
class RandomWeights:
    """Stands where a checkpoint's stream would: names as the checkpoint's, values N(0, 0.02^2)."""

    skeleton: nn.Module
    device: torch.device

    def __len__(self) -> int:
        return sum(1 for _ in self.skeleton.parameters())

    def only(
        self, wanted: Callable[[str], bool], rows: Callable[[str], slice | None] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """(name, value) of each parameter, tied ones once; vectors are ones, biases
        zeros. Values come whole, whatever `rows` would do with."""
        del rows
        for name, parameter in self.skeleton.named_parameters():
            if wanted(name):
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.device)
                if value.dim() > 1:
                    value.normal_(0.0, 0.02)
                else:
                    value.fill_(0.0 if name.endswith("bias") else 1.0)
                yield name, value


def assemble_random(recipe: Recipe, *, device: torch.device) -> Assembly:
    """`use.assemble.assemble` without tokenizer and checkpoint: the model on meta, and what fills
    it."""
    without_checkpoint = recipe.model.model_copy(update={"from_scratch": True})
    built = build(without_checkpoint, dtype=storage_dtype(recipe))
    spec = format_spec(recipe.quant)
    quantize_(built.model, spec, keep=recipe.quant.keep, kernels=recipe.quant.kernels)
    summary = adapt_(
        built.model,
        recipe.adapter,
        dtype=adapter_dtype(recipe),
        generator=torch.Generator().manual_seed(recipe.train.seed),
    )
    if recipe.train.fused_kernels:
        fuse_(built.model, built.family.decoder(built.model), dtype=compute_dtype(recipe))
    return Assembly(
        recipe=recipe,
        built=built,
        tokenizer=None,
        spec=spec,
        expansion=None,
        summary=summary,
        weights=RandomWeights(skeleton=built.skeleton, device=device),  # type: ignore[arg-type]
        trained_names=frozenset(n for n, p in built.model.named_parameters() if p.requires_grad),
    )


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """The config.json that build and plan read."""
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
