"""Shapes from the family's table, from headers and from the model on meta are the same shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nibble.errors import PlanError, WeightError
from nibble.nn.quant import quantize_
from nibble.spec.arch import Architecture, architecture
from nibble.spec.arch_families import FAMILIES
from nibble.spec.config import Model, Recipe
from nibble.spec.formats import format_spec
from nibble.spec.inventory import inventory
from nibble.spec.plan import plan
from nibble.spec.plan_text import plain
from nibble.use.shapes import built_shapes, shapes

WORDS: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 112,
    "max_position_embeddings": 64,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
UNKNOWN = ("olmo2", "opt", "stablelm", "granite", "starcoder2", "smollm3")


def config_of(name: str) -> dict[str, Any]:
    from transformers import AutoConfig

    words = {key: value for key, value in WORDS.items() if key != "head_dim" or name != "opt"}
    config: dict[str, Any] = AutoConfig.for_model(name, **words).to_dict()
    if name == "opt":
        config |= {"ffn_dim": 112, "word_embed_proj_dim": 64}
    return config | {"model_type": name}


def folder_of(folder: Path, name: str) -> Model:
    (folder / "config.json").write_text(json.dumps(config_of(name), default=str))
    return Model(path=str(folder), from_scratch=True)


def tensors(shape: Architecture) -> dict[str, tuple[int, ...]]:
    """Names and shapes, linears as (out, in) however they are stored."""
    return {p.name: p.matrix if len(p.shape) == 2 else p.shape for p in shape.parameters}


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"bert", "roberta"}))
def test_the_tables_of_families_are_the_models_on_meta(name: str, tmp_path: Path) -> None:
    model = folder_of(tmp_path, name)
    known, built = shapes(model), built_shapes(model)
    assert (known.source, built.source) == ("config", "meta")
    assert tensors(known) == tensors(built)
    assert known.sizes.num_layers == built.sizes.num_layers == 3


def meta_model(model: Model) -> torch.nn.Module:
    from nibble.models import build

    return build(model, dtype=torch.bfloat16).model


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_family_is_built_on_meta_and_says_so(name: str, tmp_path: Path) -> None:
    model = folder_of(tmp_path, name)
    with pytest.raises(PlanError):
        architecture(model)
    shape = shapes(model)
    real = meta_model(model)
    assert shape.source == "meta"
    assert shape.num_parameters == sum(p.numel() for p in real.parameters())
    assert shape.sizes.num_layers == 3
    recipe = Recipe.model_validate(
        {
            "model": {"path": str(tmp_path)},
            "quant": {"format": "nf4"},
            "adapter": {"kind": "lora", "rank": 4},
            "data": {"max_length": 32},
        }
    )
    made = plan(recipe, architecture=shape)
    assert made.device_bytes > 0
    assert "unknown family: shapes of the model built on the meta device" in " ".join(
        plain(made).split()
    )
    spec = format_spec(recipe.quant)
    assert spec is not None
    packed = quantize_(real, spec)
    stock = inventory(recipe, shape)
    assert stock.adapted == set(packed)


def test_headers_of_weights_come_before_building(tmp_path: Path) -> None:
    model = folder_of(tmp_path, "olmo2")
    real = meta_model(model).to_empty(device="cpu")
    values = {n: torch.zeros(p.shape, dtype=p.dtype) for n, p in real.named_parameters()}
    save_file(values, tmp_path / "model.safetensors")
    shape = shapes(Model(path=str(tmp_path)))
    assert shape.source == "headers"
    assert tensors(shape) == tensors(built_shapes(model))
    made = plan(Recipe.model_validate({"model": {"path": str(tmp_path)}}), architecture=shape)
    assert "shapes from the weights' headers" in " ".join(plain(made).split())


def test_what_is_not_there_or_cannot_be_built_is_said(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match="no such folder"):
        shapes(Model(path=str(tmp_path / "nothing")))
    (tmp_path / "config.json").write_text('{"model_type": "marsian"}')
    with pytest.raises(PlanError, match=r"'marsian'.*nor can it be built"):
        shapes(Model(path=str(tmp_path)))
