"""Renamed and merged tensors: ours against the library's own operations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nibble.errors import WeightError
from nibble.weights import conversion, open_weights, stream

MIXTRAL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 11,
}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, nn.Module]:
    """A folder in the original layout, the model that wrote it, and its skeleton."""
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**MIXTRAL))
    model.save_pretrained(folder)
    with torch.device("meta"):
        skeleton = MixtralForCausalLM(MixtralConfig(**MIXTRAL))
    return folder, model, skeleton


def test_eleven_experts_merge_in_order(mixtral: tuple[Path, nn.Module, nn.Module]) -> None:
    folder, model, skeleton = mixtral
    stored = load_file(folder / "model.safetensors")
    assert "model.layers.1.block_sparse_moe.experts.10.w3.weight" in stored
    values = dict(stream(open_weights(folder), skeleton))
    own = dict(model.named_parameters())
    assert set(values) == set(own)
    assert all(torch.equal(values[name], own[name]) for name in own)
    fused = values["model.layers.1.mlp.experts.gate_up_proj"]
    assert isinstance(fused, Tensor)
    ten = "model.layers.1.block_sparse_moe.experts.10"
    assert torch.equal(fused[10, :12], stored[f"{ten}.w1.weight"])
    assert torch.equal(fused[10, 12:], stored[f"{ten}.w3.weight"])


def test_merging_in_place_is_the_librarys_chain(
    mixtral: tuple[Path, nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, skeleton = mixtral
    ours = dict(stream(open_weights(folder), skeleton))
    never: Callable[..., None] = lambda *_: None  # noqa: E731
    monkeypatch.setattr(conversion, "_merge_in_place", never)
    theirs = dict(stream(open_weights(folder), skeleton))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_models_own_layout_is_read_too(
    mixtral: tuple[Path, nn.Module, nn.Module], tmp_path: Path
) -> None:
    _, model, skeleton = mixtral
    own = {name: value.detach().clone() for name, value in model.named_parameters()}
    save_file(own, tmp_path / "model.safetensors")
    values = dict(stream(open_weights(tmp_path), skeleton))
    assert all(torch.equal(values[name], own[name]) for name in own)


def test_an_expert_that_is_missing_or_misshapen(
    mixtral: tuple[Path, nn.Module, nn.Module], tmp_path: Path
) -> None:
    folder, _, skeleton = mixtral
    stored = load_file(folder / "model.safetensors")
    one = "model.layers.0.block_sparse_moe.experts.4.w2.weight"
    save_file({n: t for n, t in stored.items() if n != one}, tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match="one of 10; it does not fit"):
        list(stream(open_weights(tmp_path), skeleton))
    save_file(stored | {one: torch.ones(3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match=r"experts\.4\.w2\.weight is \[3, 3\]"):
        list(stream(open_weights(tmp_path), skeleton))


def test_legacy_names_of_norms(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=32,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"): value
        for name, value in model.state_dict().items()
    }
    assert any(name.endswith("gamma") for name in old)
    old["bert.embeddings.position_ids"] = torch.arange(4)
    save_file(old, tmp_path / "model.safetensors")
    with torch.device("meta"):
        skeleton = BertForSequenceClassification(config)
    values = dict(stream(open_weights(tmp_path), skeleton))
    for name, parameter in model.named_parameters():
        assert torch.equal(values[name], parameter)


def test_two_tensors_for_one_parameter(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    tensors = {name: torch.zeros(p.shape) for name, p in skeleton.named_parameters()}
    save_file(tensors | {"norm.weight": torch.ones(8)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match=r"both claim the parameter model\.norm\.weight"):
        stream(open_weights(tmp_path), skeleton)
