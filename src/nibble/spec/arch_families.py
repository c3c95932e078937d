"""The families whose every parameter follows from config.json: a table of functions, one a family.

Idea. A family is a naming scheme over a few numbers: blocks of linears (out, in), norms, and
embeddings outside. Each function reads those numbers from a config (with transformers' own defaults
where a key may be absent) and lists the parameters exactly as transformers names and shapes them,
with the style of its block. Source: transformers 5.17 to 5.23; tests/spec/test_arch.py compares
every row with the model that transformers builds on the meta device.

Integers only, microseconds a model. Models that are not here are read from their weights' headers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nibble.spec.arch_types import BlockStyle, ConfigReader, Family, Layout, Parameter, Rows

_PLAIN = BlockStyle()


@dataclass(frozen=True, kw_only=True)
class _LlamaWords:
    """How the members of the Llama branch differ."""

    kv_heads: int | None = None
    head_dim: int | None = None
    tied: bool = False
    qkv_bias: bool | None = None
    """None: as `attention_bias` says; Qwen2 has biases on q, k, v only."""
    mlp_bias: bool = False
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    style: BlockStyle = _PLAIN
    attention_bias: bool = True
    """Whether the family reads `attention_bias` at all."""


def _llama_like(config: dict[str, Any], words: _LlamaWords) -> Layout:
    c, w = ConfigReader(config), Rows()
    z = c.sizes(kv_heads=words.kv_heads, head_dim=words.head_dim)
    h, ffn, dim = z.hidden, z.ffn, z.head_dim
    q_size, kv_size = z.num_heads * dim, z.num_kv_heads * dim
    out_bias = words.attention_bias and c.flag("attention_bias", False)
    qkv_bias = out_bias if words.qkv_bias is None else words.qkv_bias
    mlp_bias = words.mlp_bias and c.flag("mlp_bias", False)
    style = replace(words.style, attention_dropout=c.rate("attention_dropout"))
    num_experts = (
        c.number("num_local_experts", "num_experts", default=8) if words is _MIXTRAL else 0
    )
    w.add("model.embed_tokens.weight", (z.vocab, h), "embedding")
    for i in range(z.num_layers):
        at = f"model.layers.{i}"
        w.linear(f"{at}.self_attn.q_proj", q_size, h, bias=qkv_bias, block=i)
        w.linear(f"{at}.self_attn.k_proj", kv_size, h, bias=qkv_bias, block=i)
        w.linear(f"{at}.self_attn.v_proj", kv_size, h, bias=qkv_bias, block=i)
        w.linear(f"{at}.self_attn.o_proj", h, z.num_heads * z.head_dim, bias=out_bias, block=i)
        if style.qk_norm:
            w.norm(f"{at}.self_attn.q_norm", dim, block=i)
            w.norm(f"{at}.self_attn.k_norm", dim, block=i)
        if num_experts:
            w.add(f"{at}.mlp.gate.weight", (num_experts, h), "router", i)
            w.add(f"{at}.mlp.experts.gate_up_proj", (num_experts, 2 * ffn, h), "expert", i)
            w.add(f"{at}.mlp.experts.down_proj", (num_experts, h, ffn), "expert", i)
        else:
            w.linear(f"{at}.mlp.gate_proj", ffn, h, bias=mlp_bias, block=i)
            w.linear(f"{at}.mlp.up_proj", ffn, h, bias=mlp_bias, block=i)
            w.linear(f"{at}.mlp.down_proj", h, ffn, bias=mlp_bias, block=i)
        for name in words.norms:
            w.norm(f"{at}.{name}", h, block=i)
    w.norm("model.norm", h)
    tied = c.flag("tie_word_embeddings", words.tied)
    if not tied:
        w.linear("lm_head", z.vocab, h, kind="head")
    return Layout(
        sizes=z,
        tied=tied,
        style=style,
        parameters=tuple(w.all),
        body="model",
        num_experts=num_experts,
        experts_per_token=c.number("num_experts_per_tok", default=2) if num_experts else 0,
    )


_SANDWICH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_GEMMA = BlockStyle(norm="rms_fp32")
_MIXTRAL = _LlamaWords(kv_heads=8, attention_bias=False)
_LLAMA_WORDS: dict[str, _LlamaWords] = {
    "llama": _LlamaWords(mlp_bias=True),
    "mistral": _LlamaWords(kv_heads=8, attention_bias=False),
    "mixtral": _MIXTRAL,
    "qwen2": _LlamaWords(kv_heads=32, qkv_bias=True, attention_bias=False),
    "qwen3": _LlamaWords(kv_heads=32, head_dim=128, style=BlockStyle(qk_norm=True)),
    "gemma": _LlamaWords(kv_heads=16, head_dim=256, tied=True, style=_GEMMA),
    "gemma2": _LlamaWords(
        kv_heads=4,
        head_dim=256,
        tied=True,
        norms=_SANDWICH,
        style=replace(_GEMMA, norms=4, scores="softcap"),
    ),
    "gemma3_text": _LlamaWords(
        kv_heads=4,
        head_dim=256,
        tied=True,
        norms=_SANDWICH,
        style=replace(_GEMMA, norms=4, qk_norm=True),
    ),
}


def _member(name: str) -> Family:
    return lambda config: _llama_like(config, _LLAMA_WORDS[name])


def phi3(config: dict[str, Any]) -> Layout:
    """Phi-3 and Phi-4: Llama with fused qkv and gate-up projections."""
    c, w = ConfigReader(config), Rows()
    z = c.sizes()
    h = z.hidden
    ffn, dim = z.ffn, z.head_dim
    w.add("model.embed_tokens.weight", (z.vocab, h), "embedding")
    for i in range(z.num_layers):
        at = f"model.layers.{i}"
        w.linear(f"{at}.self_attn.o_proj", h, z.num_heads * z.head_dim, block=i)
        w.linear(f"{at}.self_attn.qkv_proj", (z.num_heads + 2 * z.num_kv_heads) * dim, h, block=i)
        w.linear(f"{at}.mlp.gate_up_proj", 2 * ffn, h, block=i)
        w.linear(f"{at}.mlp.down_proj", h, ffn, block=i)
        w.norm(f"{at}.input_layernorm", h, block=i)
        w.norm(f"{at}.post_attention_layernorm", h, block=i)
    w.norm("model.norm", h)
    tied = c.flag("tie_word_embeddings", False)
    if not tied:
        w.linear("lm_head", z.vocab, h, kind="head")
    style = BlockStyle(
        projection="fused_rotated",
        copied_output=True,
        gate_fused=True,
        dropout=c.rate("resid_pdrop"),
        attention_dropout=c.rate("attention_dropout"),
    )
    return Layout(
        sizes=z,
        tied=tied,
        style=style,
        parameters=tuple(w.all),
        body="model",
    )


def phi(config: dict[str, Any]) -> Layout:
    """Phi-1 to Phi-2: attention and MLP side by side behind one layer norm; the head has a bias."""
    c, w = ConfigReader(config), Rows()
    z = c.sizes()
    h = z.hidden
    ffn, dim = z.ffn, z.head_dim
    w.add("model.embed_tokens.weight", (z.vocab, h), "embedding")
    for i in range(z.num_layers):
        at = f"model.layers.{i}"
        for name, out in (
            ("q_proj", z.num_heads),
            ("k_proj", z.num_kv_heads),
            ("v_proj", z.num_kv_heads),
        ):
            w.linear(f"{at}.self_attn.{name}", out * dim, h, bias=True, block=i)
        w.linear(f"{at}.self_attn.dense", h, z.num_heads * dim, bias=True, block=i)
        if c.flag("qk_layernorm", False):
            w.norm(f"{at}.self_attn.q_layernorm", dim, bias=True, block=i)
            w.norm(f"{at}.self_attn.k_layernorm", dim, bias=True, block=i)
        w.linear(f"{at}.mlp.fc1", ffn, h, bias=True, block=i)
        w.linear(f"{at}.mlp.fc2", h, ffn, bias=True, block=i)
        w.norm(f"{at}.input_layernorm", h, bias=True, block=i)
    w.norm("model.final_layernorm", h, bias=True)
    tied = c.flag("tie_word_embeddings", False)
    if not tied:
        w.linear("lm_head", z.vocab, h, kind="head")
    w.add("lm_head.bias", (z.vocab,), "bias")
    style = BlockStyle(
        norm="layer",
        norms=1,
        shared_norm=True,
        copied_output=True,
        gated=False,
        qk_norm=c.flag("qk_layernorm", False),
        activation_copies=c.activation("hidden_act", default="gelu_new"),
        dropout=c.rate("resid_pdrop"),
        attention_dropout=c.rate("attention_dropout"),
    )
    return Layout(
        sizes=z,
        tied=tied,
        style=style,
        parameters=tuple(w.all),
        body="model",
    )


def gpt_neox(config: dict[str, Any]) -> Layout:
    """GPT-NeoX and Pythia."""
    c, w = ConfigReader(config), Rows()
    z = c.sizes(grouped=False)
    h = z.hidden
    ffn = z.ffn
    bias = c.flag("attention_bias", True)
    w.add("gpt_neox.embed_in.weight", (z.vocab, h), "embedding")
    for i in range(z.num_layers):
        at = f"gpt_neox.layers.{i}"
        w.norm(f"{at}.input_layernorm", h, bias=True, block=i)
        w.norm(f"{at}.post_attention_layernorm", h, bias=True, block=i)
        w.linear(f"{at}.attention.query_key_value", 3 * h, h, bias=bias, block=i)
        w.linear(f"{at}.attention.dense", h, h, bias=bias, block=i)
        w.linear(f"{at}.mlp.dense_h_to_4h", ffn, h, bias=True, block=i)
        w.linear(f"{at}.mlp.dense_4h_to_h", h, ffn, bias=True, block=i)
    w.norm("gpt_neox.final_layer_norm", h, bias=True)
    tied = c.flag("tie_word_embeddings", False)
    if not tied:
        w.linear("lm_head", z.vocab, h, kind="head")
    style = BlockStyle(
        norm="layer",
        shared_norm_input=c.flag("use_parallel_residual", True),
        gated=False,
        projection="fused_rotated",
        copied_output=True,
        activation_copies=c.activation("hidden_act", default="gelu"),
        dropout=c.rate("hidden_dropout"),
        attention_dropout=c.rate("attention_dropout"),
    )
    return Layout(
        sizes=z,
        tied=tied,
        style=style,
        parameters=tuple(w.all),
        body="gpt_neox",
    )


def bloom(config: dict[str, Any]) -> Layout:
    """BLOOM: ALiBi, a norm behind the embedding, attention without a fused kernel."""
    c, w = ConfigReader(config), Rows()
    z = c.sizes(ffn=None, grouped=False)
    h, ffn = z.hidden, z.ffn
    w.add("transformer.word_embeddings.weight", (z.vocab, h), "embedding")
    w.norm("transformer.word_embeddings_layernorm", h, bias=True)
    for i in range(z.num_layers):
        at = f"transformer.h.{i}"
        w.norm(f"{at}.input_layernorm", h, bias=True, block=i)
        w.linear(f"{at}.self_attention.query_key_value", 3 * h, h, bias=True, block=i)
        w.linear(f"{at}.self_attention.dense", h, h, bias=True, block=i)
        w.norm(f"{at}.post_attention_layernorm", h, bias=True, block=i)
        w.linear(f"{at}.mlp.dense_h_to_4h", ffn, h, bias=True, block=i)
        w.linear(f"{at}.mlp.dense_4h_to_h", h, ffn, bias=True, block=i)
    w.norm("transformer.ln_f", h, bias=True)
    tied = c.flag("tie_word_embeddings", True)
    if not tied:
        w.linear("lm_head", z.vocab, h, kind="head")
    style = BlockStyle(
        norm="layer",
        gated=False,
        scores="eager",
        dropout=c.rate("hidden_dropout"),
        attention_dropout=c.rate("attention_dropout"),
    )
    return Layout(
        sizes=z,
        tied=tied,
        style=style,
        parameters=tuple(w.all),
        body="transformer",
        embedding_norm=True,
    )


def gpt2(config: dict[str, Any]) -> Layout:
    """GPT-2: its linears (Conv1D) are stored (in, out)."""
    c, w = ConfigReader(config), Rows()
    z = c.sizes(ffn="n_inner", positions=1024, grouped=False)
    h, ffn = z.hidden, z.ffn
    w.add("transformer.wte.weight", (z.vocab, h), "embedding")
    w.add("transformer.wpe.weight", (z.max_positions, h), "embedding")
    for i in range(z.num_layers):
        at = f"transformer.h.{i}"
        w.norm(f"{at}.ln_1", h, bias=True, block=i)
        w.linear(f"{at}.attn.c_attn", 3 * h, h, bias=True, block=i, transposed=True)
        w.linear(f"{at}.attn.c_proj", h, h, bias=True, block=i, transposed=True)
        w.norm(f"{at}.ln_2", h, bias=True, block=i)
        w.linear(f"{at}.mlp.c_fc", ffn, h, bias=True, block=i, transposed=True)
        w.linear(f"{at}.mlp.c_proj", h, ffn, bias=True, block=i, transposed=True)
    w.norm("transformer.ln_f", h, bias=True)
    tied = c.flag("tie_word_embeddings", True)
    if not tied:
        w.linear("lm_head", z.vocab, h, kind="head")
    style = BlockStyle(
        norm="layer",
        gated=False,
        projection="fused",
        activation_copies=c.activation("activation_function", default="gelu_new"),
        dropout=c.rate("resid_pdrop", 0.1),
        attention_dropout=c.rate("attn_pdrop", 0.1),
    )
    return Layout(
        sizes=z,
        tied=tied,
        style=style,
        parameters=tuple(w.all),
        body="transformer",
    )


def _bert_like(config: dict[str, Any], body: str) -> Layout:
    c, w = ConfigReader(config), Rows()
    z = c.sizes(positions=512, grouped=False)
    h = z.hidden
    ffn = z.ffn
    w.add(f"{body}.embeddings.word_embeddings.weight", (z.vocab, h), "embedding")
    w.add(f"{body}.embeddings.position_embeddings.weight", (z.max_positions, h), "embedding")
    num_types = c.number("type_vocab_size", default=2)
    w.add(f"{body}.embeddings.token_type_embeddings.weight", (num_types, h), "embedding")
    w.norm(f"{body}.embeddings.LayerNorm", h, bias=True)
    for i in range(z.num_layers):
        at = f"{body}.encoder.layer.{i}"
        for name in ("query", "key", "value"):
            w.linear(f"{at}.attention.self.{name}", h, h, bias=True, block=i)
        w.linear(f"{at}.attention.output.dense", h, h, bias=True, block=i)
        w.norm(f"{at}.attention.output.LayerNorm", h, bias=True, block=i)
        w.linear(f"{at}.intermediate.dense", ffn, h, bias=True, block=i)
        w.linear(f"{at}.output.dense", h, ffn, bias=True, block=i)
        w.norm(f"{at}.output.LayerNorm", h, bias=True, block=i)
    style = BlockStyle(
        norm="layer",
        post_norm=True,
        gated=False,
        activation_copies=c.activation("hidden_act", default="gelu"),
        dropout=c.rate("hidden_dropout_prob", 0.1),
        attention_dropout=c.rate("attention_probs_dropout_prob", 0.1),
    )
    return Layout(
        sizes=z,
        tied=True,
        style=style,
        parameters=tuple(w.all),
        body=body,
        encoder=True,
        embedding_norm=True,
    )


def bert(config: dict[str, Any]) -> Layout:
    """BERT; its pooler is added with the classification head."""
    return _bert_like(config, "bert")


def roberta(config: dict[str, Any]) -> Layout:
    """RoBERTa."""
    return _bert_like(config, "roberta")


FAMILIES: dict[str, Family] = {
    **{name: _member(name) for name in _LLAMA_WORDS},
    "phi": phi,
    "phi3": phi3,
    "gpt_neox": gpt_neox,
    "bloom": bloom,
    "gpt2": gpt2,
    "bert": bert,
    "roberta": roberta,
}
"""model_type -> its layout. A new row is a family that the planner knows; the test asks for all."""


def head_of(model_type: str, layout: Layout, *, num_labels: int | None) -> tuple[Parameter, ...]:
    """What transformers adds to the layout for the task: a classifier, or an encoder's LM head.

    `num_labels` None is causal-lm; decoders then have their head in the layout already.
    """
    w, h = Rows(), layout.sizes.hidden
    if num_labels is not None:
        if model_type == "bert":
            w.linear("bert.pooler.dense", h, h, bias=True)
            w.linear("classifier", num_labels, h, bias=True, kind="classifier")
        elif model_type == "roberta":
            w.linear("classifier.dense", h, h, bias=True, kind="classifier")
            w.linear("classifier.out_proj", num_labels, h, bias=True, kind="classifier")
        else:
            w.linear("score", num_labels, h, kind="classifier")
    elif model_type == "bert":
        w.add("cls.predictions.bias", (layout.sizes.vocab,), "bias")
        w.linear("cls.predictions.transform.dense", h, h, bias=True)
        w.norm("cls.predictions.transform.LayerNorm", h, bias=True)
    elif model_type == "roberta":
        w.add("lm_head.bias", (layout.sizes.vocab,), "bias")
        w.linear("lm_head.dense", h, h, bias=True)
        w.norm("lm_head.layer_norm", h, bias=True)
    return tuple(w.all)
