"""Models of true shape with random weights, made on the device that keeps them.

No checkpoint of these sizes is needed to time a step: what counts is shapes, types and kernels. A
config.json in a temporary folder is all that nibble's own path reads; each weight is drawn on the
device and packed on arrival, one at a time, so an 8B model takes seconds and no host memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nibble.models import build
from nibble.nn.adapters import adapt_, locate
from nibble.nn.expand import expand_
from nibble.nn.factorised import factorise_, factorised
from nibble.nn.fused import fuse_
from nibble.nn.quant import QuantLinear, quantize_
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


def _itself(name: str) -> Iterator[str]:
    yield name


@dataclass(frozen=True, kw_only=True)
class RandomWeights:
    """Stands where a checkpoint's stream would: names as the checkpoint's, values N(0, 0.02^2)."""

    skeleton: nn.Module
    device: torch.device
    pool: Tensor | None = None
    """Where given, values are views of it, rows shifted against one another: filling a model then
    takes no more memory than from a checkpoint, and no time for drawing."""
    arriving: Callable[[str], bool] = lambda name: False
    """With a pool: of these the device holds a copy while it is packed, as of what comes from the
    host."""
    targets_of: Callable[[str], Iterator[str]] = _itself
    """Names under which the model wants a parameter; none where it is replaced."""

    def __len__(self) -> int:
        return sum(1 for _ in self.skeleton.parameters())

    def only(
        self, wanted: Callable[[str], bool], rows: Callable[[str], slice | None] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """(name, value) of each parameter, tied ones once; vectors are ones, biases
        zeros. Values come whole, whatever `rows` would do with."""
        del rows
        for name, parameter in self.skeleton.named_parameters():
            for target in self.targets_of(name):
                if wanted(target):
                    yield from self._value(target, parameter)

    def _value(self, name: str, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        if self.pool is not None and parameter.dim() > 1:
            value, passes = shifted_rows(self.pool, parameter.shape), self.arriving(name)
            if passes:
                value = value.clone()
            yield name, value
            if passes:
                value.untyped_storage().resize_(0)  # whoever still has it may not keep it
            return
        value = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.device)
        if value.dim() > 1:
            value.normal_(0.0, 0.02)
        else:
            value.fill_(0.0 if name.endswith("bias") else 1.0)
        yield name, value


def shifted_rows(pool: Tensor, shape: torch.Size) -> Tensor:
    """A view of `shape` on a pool of random numbers: each row begins a little behind the one
    before it."""
    *lead, columns = shape
    num_rows = math.prod(lead)
    step = max(1, min(columns, (pool.numel() - columns) // num_rows))
    strides, size = [1], step
    for count in reversed(lead):
        strides.insert(0, size)
        size *= count
    return pool.as_strided(tuple(shape), strides)


def assemble_random(
    recipe: Recipe, *, device: torch.device, pool: Tensor | None = None
) -> Assembly:
    """`use.assemble.assemble` without tokenizer and checkpoint: the model on meta, and what fills
    it, from a pool of random numbers where one is given."""
    without_checkpoint = recipe.model.model_copy(update={"from_scratch": True})
    built = build(without_checkpoint, dtype=storage_dtype(recipe))
    model, spec, adapter = built.model, format_spec(recipe.quant), recipe.adapter
    expansion = None
    if adapter.kind == "expand":
        blocks = model.get_submodule(built.family.block_path)
        assert isinstance(blocks, nn.ModuleList)
        expansion = expand_(model, blocks, adapter.num_new_blocks)
    keep = (*recipe.quant.keep, *(expansion.names if expansion else ()))
    quantize_(model, spec, keep=keep, kernels=recipe.quant.kernels)
    if adapter.kind == "factorised":
        factorise_(model, adapter.targets, rank=adapter.rank)
        adapter = adapter.model_copy(update={"kind": "none"})
    summary = adapt_(
        model,
        adapter,
        dtype=adapter_dtype(recipe),
        generator=torch.Generator().manual_seed(recipe.train.seed),
        expansion=expansion,
    )
    if recipe.train.fused_kernels:
        fuse_(model, built.family.decoder(model), dtype=compute_dtype(recipe))
    replaced = {f"{name}.weight" for name in factorised(model)}

    def is_packed(name: str) -> bool:
        return isinstance(locate(model, name)[0], QuantLinear)

    def targets_of(name: str) -> Iterator[str]:
        if name not in replaced:
            yield from _itself(name) if expansion is None else expansion.targets_of(name)

    weights = RandomWeights(
        skeleton=built.skeleton,
        device=device,
        pool=pool,
        arriving=is_packed,
        targets_of=targets_of,
    )
    return Assembly(
        recipe=recipe,
        built=built,
        tokenizer=None,
        spec=spec,
        expansion=expansion,
        summary=summary,
        weights=weights,  # type: ignore[arg-type]
        trained_names=frozenset(n for n, p in model.named_parameters() if p.requires_grad),
    )


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """The config.json that build and plan read."""
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
