"""The planner's shapes against the models that transformers builds."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from nibble.errors import PlanError, WeightError
from nibble.spec.arch import architecture, cached_snapshot, from_config, from_headers
from nibble.spec.arch_families import FAMILIES
from nibble.spec.config import Model
from nibble.spec.headers import TensorHeader, read_gguf, read_headers

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILY_CONFIGS: dict[str, list[dict[str, Any]]] = {
    "llama": [{}, {"attention_bias": True, "mlp_bias": True, "head_dim": 16}],
    "mistral": [{}, {"head_dim": 16}],
    "mixtral": [{"num_local_experts": 4}],
    "qwen2": [{}, {"tie_word_embeddings": True}],
    "qwen3": [{}, {"head_dim": 12, "attention_bias": True}],
    "gemma": [{}],
    "gemma2": [{"head_dim": 8}],
    "gemma3_text": [{}],
    "phi": [{}, {"qk_layernorm": True, "num_key_value_heads": 4}],
    "phi3": [{}],
    "gpt_neox": [{}, {"attention_bias": False}],
    "bloom": [{}],
    "gpt2": [{}, {"n_inner": 40}],
    "bert": [{}],
    "roberta": [{}],
}


def meta_model(config: dict[str, Any], task: str, num_labels: int) -> torch.nn.Module:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )

    words = {key: value for key, value in config.items() if key != "model_type"}
    made = AutoConfig.for_model(config["model_type"], **words)
    auto = AutoModelForCausalLM
    if task == "classification":
        made.num_labels = num_labels
        auto = AutoModelForSequenceClassification
    elif config["model_type"] in ("bert", "roberta"):
        made.is_decoder = True
    with torch.device("meta"):
        model: torch.nn.Module = auto.from_config(made)
    return model


def test_every_family_is_covered() -> None:
    assert set(FAMILY_CONFIGS) == set(FAMILIES)


CASES = [
    (name, words, task)
    for name, rows in FAMILY_CONFIGS.items()
    for words in rows
    for task in ("causal-lm", "classification")
]


@pytest.mark.parametrize(
    ("name", "words", "task"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)]
)
def test_parameters_are_those_of_transformers(name: str, words: dict[str, Any], task: str) -> None:
    config = {"model_type": name, **COMMON, **words}
    labels = 3 if task == "classification" else None
    ours = from_config(config, num_labels=labels)
    model = meta_model(config, task, 3)
    theirs = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert {p.name: p.shape for p in ours.parameters} == theirs
    assert ours.num_parameters == sum(p.numel() for p in model.parameters())
    for parameter in ours.parameters:
        owner = model.get_submodule(parameter.module) if parameter.module else model
        is_linear = type(owner).__name__ in ("Linear", "Conv1D", "NonDynamicallyQuantizableLinear")
        if parameter.name.endswith(".weight") and parameter.kind not in ("router",):
            assert is_linear == (parameter.kind in ("linear", "head", "classifier")), parameter
        assert (parameter.block is not None) == any(f".{i}." in parameter.name for i in range(2))


def test_absent_keys_have_the_defaults_of_transformers() -> None:
    """A config that says only what differs from the class's defaults gives the same shapes."""
    from transformers import AutoConfig

    optional = ("num_key_value_heads", "max_position_embeddings")
    for name in FAMILIES:
        config = {"model_type": name, **{k: v for k, v in COMMON.items() if k not in optional}}
        words = {k: v for k, v in config.items() if k != "model_type"}
        full = AutoConfig.for_model(name, **words).to_dict()
        assert from_config(full).parameters == from_config(config).parameters, name


def test_bloom_7b1_is_counted_as_published() -> None:
    config = {"model_type": "bloom", "vocab_size": 250880, "hidden_size": 4096}
    shape = from_config({**config, "n_layer": 30, "num_attention_heads": 32})
    assert shape.num_parameters == 7_069_016_064
    assert shape.tied


def test_flops_are_those_that_torch_counts() -> None:
    """Forward FLOPs of a tiny Llama by torch's own counter, which counts whole squares."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {"model_type": "llama", **COMMON}
    made = AutoConfig.for_model("llama", **COMMON)
    made._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(made)
    ids = torch.zeros(2, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    shape = from_config(config)
    # Rotary angles are one product of 1 x dim/2 a token; causal halves what eager attention does.
    expected = 64 * (shape.flops_per_token(32) + shape.attention_flops_per_token(32))
    assert abs(counter.get_total_flops() - expected) / expected < 0.002


def test_an_unknown_family_is_read_from_headers(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    words = {**COMMON, "num_key_value_heads": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("olmo2", **words))
    model.save_pretrained(tmp_path)
    shape = architecture(Model(path=str(tmp_path)))
    assert shape.source == "headers"
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    found = {p.module for p in shape.parameters if p.kind in ("linear", "head")}
    assert found == linears
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(PlanError, match=r"olmo2.*not in the planner's table"):
        architecture(Model(path=str(tmp_path)))
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(PlanError, match="no repeated blocks"):
        architecture(Model(path=str(tmp_path)))


def test_a_hub_id_is_found_in_the_cache_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    with pytest.raises(WeightError, match="not in the hub cache"):
        architecture(Model(path="org/name"))
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text(json.dumps({"model_type": "llama", **COMMON}))
    assert architecture(Model(path="org/name")).sizes.vocab == 96
    assert cached_snapshot("org/name", revision="abc") == snapshot
    with pytest.raises(WeightError, match="revision other"):
        cached_snapshot("org/name", revision="other")
    with pytest.raises(WeightError, match="not a hub id"):
        architecture(Model(path="no/such/folder"))


def test_a_folder_without_a_usable_config(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match=r"no config\.json"):
        architecture(Model(path=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 32}')
    with pytest.raises(WeightError, match="num_attention_heads is missing"):
        architecture(Model(path=str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightError, match="not JSON"):
        architecture(Model(path=str(tmp_path)))


def test_safetensors_headers_are_those_of_the_tensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {
        "a": torch.zeros(3, 5, dtype=torch.bfloat16),
        "b": torch.zeros(7, dtype=torch.uint8),
        "c": torch.zeros(2, 2, 2),
        "d": torch.zeros(4, dtype=torch.float8_e4m3fn),
    }
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    found = read_headers(tmp_path)
    assert {n: (h.shape, h.nbytes) for n, h in found.items()} == {
        n: (tuple(t.shape), t.nbytes) for n, t in tensors.items()
    }
    whole = file.read_bytes()
    for cut in (0, 4, 40, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(WeightError, match="damaged"):
            read_headers(file)
    file.write_bytes(b"\xff" * 64)
    with pytest.raises(WeightError, match="damaged"):
        read_headers(file)
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"0000")
    with pytest.raises(WeightError, match="has 4 bytes"):
        read_headers(file)


def test_shards_are_followed_by_the_index(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_headers(tmp_path)["b"] == TensorHeader(shape=(3,), dtype="F32", nbytes=12)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(WeightError, match=r"1 of 2 shards are missing, first two.safetensors"):
        read_headers(tmp_path)


def test_gguf_headers_are_those_of_the_gguf_package(tmp_path: Path) -> None:
    import gguf
    import numpy as np

    file = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    words = {
        "embedding_length": 64,
        "block_count": 1,
        "feed_forward_length": 96,
        "context_length": 32,
    }
    for key, value in words.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_uint32("llama.attention.head_count", 4)
    writer.add_uint32("llama.attention.head_count_kv", 2)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(128)])
    writer.add_string("general.name", "tiny")
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((128, 64)).astype(np.float32)
    for name, kind in (("Q8_0", "Q8_0"), ("F16", "F16"), ("Q4_0", "Q4_0")):
        quant = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(dense, quant), raw_dtype=quant)
    writer.add_tensor("token_embd.weight", dense)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata, found = read_gguf(file)
    reader = gguf.GGUFReader(file)
    assert {n: (h.shape[::-1], h.dtype, h.nbytes) for n, h in found.items()} == {
        t.name: (tuple(int(d) for d in t.shape), t.tensor_type.name, int(t.n_bytes))
        for t in reader.tensors
    }
    assert metadata["general.name"] == "tiny"
    assert metadata["tokenizer.ggml.tokens.length"] == 128
    shape = architecture(Model(path=str(file)))
    assert (shape.sizes.vocab, shape.sizes.hidden, shape.tied) == (128, 64, True)
    whole = file.read_bytes()
    for cut in (3, 20, 200, len(whole) - 100):
        file.write_bytes(whole[:cut])
        with pytest.raises(WeightError, match=r"damaged|no whole GGUF"):
            read_gguf(file)


def test_ggml_block_sizes_are_those_of_the_gguf_package() -> None:
    import gguf

    from nibble.spec.headers import GGML_TYPES

    for number, (name, block, nbytes) in GGML_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, *gguf.GGML_QUANT_SIZES[kind]) == (name, block, nbytes)


def test_a_real_checkpoint(tmp_path: Path) -> None:
    shared = Path(os.environ.get("NIBBLE_SHARED", Path(__file__).parents[3] / "shared"))
    folder = shared / "data" / "models" / "stories260K-hf"
    if not folder.is_dir():
        pytest.skip("the shared data folder is not here (set NIBBLE_SHARED)")
    shape = architecture(Model(path=str(folder)))
    assert shape.num_parameters == 260_032
    headers = read_headers(folder)
    names = {n: h.shape for n, h in headers.items() if n != "lm_head.weight"}
    assert {p.name: p.shape for p in shape.parameters} == names
    inferred = from_headers({"model_type": "?"}, {n: headers[n] for n in names})
    assert [p.kind for p in inferred.parameters if p.kind != "norm"] == [
        next(q.kind for q in shape.parameters if q.name == p.name)
        for p in inferred.parameters
        if p.kind != "norm"
    ]
