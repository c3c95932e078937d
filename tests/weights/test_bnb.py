"""Checkpoints that bitsandbytes quantised: the same numbers, without quantising twice."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nibble.errors import WeightError
from nibble.models import build, materialise
from nibble.nn.quant import PackedWeight, QuantLinear, quantize_
from nibble.numerics.formats import unpack
from nibble.spec.config import Model
from nibble.weights import open_weights, stream
from nibble.weights.bnb_source import BnbSource

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """bitsandbytes and transformers warn of their own ways on a CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def checkpoint(folder: Path, *, width: int = 64, **options: Any) -> nn.Module:
    """A tiny Llama quantised by transformers and saved; the model that transformers loads from
    it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96,
        hidden_size=width,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "plain")
    quantised = AutoModelForCausalLM.from_pretrained(
        folder / "plain",
        dtype=torch.float32,
        device_map="cpu",
        quantization_config=BitsAndBytesConfig(**options),
    )
    quantised.save_pretrained(folder / "quantised")
    return quantised.eval()


def bnb_dense(module: Any) -> Tensor:
    """The weight as bitsandbytes itself unpacks it."""
    import bitsandbytes.functional as F

    weight = module.weight
    if weight.dtype == torch.int8:
        return weight.data.float() * (weight.SCB[:, None] / 127)
    # bitsandbytes' CPU kernel is wrong where a row is no whole number of blocks: it gets one row.
    state = copy.copy(weight.quant_state)
    shape, state.shape = state.shape, torch.Size((1, state.shape.numel()))
    return F.dequantize_4bit(weight.data, state).reshape(shape)


FOUR_BIT = [
    {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    {"bnb_4bit_quant_type": "nf4"},
    {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
]


@pytest.mark.parametrize(
    "options", [*({"load_in_4bit": True} | o for o in FOUR_BIT), {"load_in_8bit": True}]
)
def test_packed_weights_are_the_checkpoints(options: dict[str, Any], tmp_path: Path) -> None:
    theirs = checkpoint(tmp_path, **options)
    built = build(Model(path=str(tmp_path / "quantised")), dtype=torch.float32)
    assert (
        built.quantization is not None and built.config.to_dict().get("quantization_config") is None
    )
    source = open_weights(built.path)
    assert isinstance(source, BnbSource) and source.packed_spec is not None
    assert source.packed_spec.name == options.get("bnb_4bit_quant_type", "int8")
    assert not source.packed_spec.double_quant
    packed = 0
    quantize_(built.model, source.packed_spec, keep=(), kernels="eager")
    materialise(built.model, device="cpu")
    for name, value in stream(source, built.skeleton):
        module = built.model.get_submodule(name.rpartition(".")[0])
        if isinstance(value, PackedWeight):
            assert isinstance(module, QuantLinear)
            packed += 1
            own = theirs.get_submodule(name.removesuffix(".weight"))
            dense = unpack(
                value.spec, value.tensors, shape=tuple(module_shape(module)), dtype=torch.float32
            )
            torch.testing.assert_close(dense, bnb_dense(own).float(), rtol=0, atol=1e-7)
            module.load_(value)
        else:
            with torch.no_grad():
                built.model.get_parameter(name).copy_(value)
    assert packed == 14
    input_ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        got = built.model(input_ids, use_cache=False).logits
        # bitsandbytes' CPU products round through 16 bit: its own dense weights are the reference.
        for name, module in list(theirs.named_modules()):
            if name.endswith("_proj"):
                parent, _, last = name.rpartition(".")
                weight = bnb_dense(module).float()
                plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                plain.weight.copy_(weight)
                setattr(theirs.get_submodule(parent), last, plain)
        # LLM.int8 also rounds the activations to 8 bits.
        tolerance = 5e-3 if options.get("load_in_8bit") else 1e-5
        torch.testing.assert_close(got, theirs(input_ids).logits, rtol=0, atol=tolerance)


def module_shape(module: QuantLinear) -> tuple[int, int]:
    return module.out_features, module.in_features


def test_rows_that_are_not_whole_blocks_are_dequantised(tmp_path: Path) -> None:
    theirs = checkpoint(
        tmp_path,
        width=48,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
    )
    built = build(Model(path=str(tmp_path / "quantised")), dtype=torch.float32)
    source = open_weights(built.path)
    values = dict(stream(source, built.skeleton))
    packed = {name for name, value in values.items() if isinstance(value, PackedWeight)}
    assert isinstance(source, BnbSource) and packed == source.packed_names
    assert len(packed) == 2 and all("down_proj" in name for name in packed)
    for name, module in theirs.named_modules():
        value = values.get(f"{name}.weight")
        if name.endswith(("q_proj", "up_proj")):
            assert isinstance(value, Tensor)
            torch.testing.assert_close(value, bnb_dense(module).float(), rtol=0, atol=1e-7)


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint(tmp_path, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    file = tmp_path / "quantised" / "model.safetensors"
    tensors = load_file(file)
    state = next(name for name in tensors if "quant_state" in name)
    save_file(tensors | {state: tensors[state][:-5].clone()}, file)
    with pytest.raises(WeightError, match="is damaged"):
        open_weights(file.parent)
    weight = state.partition(".quant_state")[0]
    save_file(tensors | {f"{weight}.absmax": torch.ones(3)}, file)
    with pytest.raises(WeightError, match="3 scales"):
        open_weights(file.parent).read(weight)
