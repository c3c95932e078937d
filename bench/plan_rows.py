"""The configurations that `plan_error.py` measures: shapes, methods, policies, and the rows.

A row is a line of words, `MODEL[/LAYERS] METHOD ROWSxLENGTH[xPASSES] POLICY [MORE]`, and its name.
Shapes are those of published models, most with fewer layers, since blocks repeat; those without
/LAYERS are whole. Whether a row calibrates the plan or only tests it is decided by its name alone:
a third is held out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, cycle, islice, zip_longest
from typing import Any

Words = dict[str, Any]


def _llama(h: int, ffn: int, heads: int, kv: int, layers: int, vocab: int, **more: Any) -> Words:
    words = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return {
        **words, "hidden_size": h, "intermediate_size": ffn, "num_attention_heads": heads,
        "num_key_value_heads": kv, "num_hidden_layers": layers, "vocab_size": vocab,
        "max_position_embeddings": 131072, "tie_word_embeddings": False, **more,
    }  # fmt: skip


def _named(kind: str, owner: str, **more: Any) -> Words:
    return {"model_type": kind, "architectures": [f"{owner}ForCausalLM"], **more}


QWEN2, QWEN3 = _named("qwen2", "Qwen2"), _named("qwen3", "Qwen3", head_dim=128)
GEMMA2 = _named("gemma2", "Gemma2", head_dim=256, tie_word_embeddings=True)
GEMMA3 = _named("gemma3_text", "Gemma3", head_dim=256, tie_word_embeddings=True)
BLOOM = _named("bloom", "Bloom", hidden_dropout=0.0, attention_dropout=0.0)
TIED: Words = {"tie_word_embeddings": True}

MODELS: dict[str, Words] = {
    "llama-0.1b": _llama(768, 2048, 12, 12, 12, 32000, **TIED),
    "llama3-1b": _llama(2048, 8192, 32, 8, 16, 128256, **TIED),
    "llama3-3b": _llama(3072, 8192, 24, 8, 28, 128256, **TIED),
    "llama2-7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "llama3-8b": _llama(4096, 14336, 32, 8, 32, 128256),
    "llama2-13b": _llama(5120, 13824, 40, 40, 40, 32000),
    "llama2-70b": _llama(8192, 28672, 64, 8, 80, 32000),
    "llama3-70b": _llama(8192, 28672, 64, 8, 80, 128256),
    "mistral-7b": _llama(
        4096, 14336, 32, 8, 32, 32768, **_named("mistral", "Mistral", sliding_window=None)
    ),
    "qwen2-0.5b": _llama(896, 4864, 14, 2, 24, 151936, **QWEN2, **TIED),
    "qwen2-7b": _llama(3584, 18944, 28, 4, 28, 152064, **QWEN2),
    "qwen2-72b": _llama(8192, 29568, 64, 8, 80, 152064, **QWEN2),
    "qwen3-0.6b": _llama(1024, 3072, 16, 8, 28, 151936, **QWEN3, **TIED),
    "qwen3-8b": _llama(4096, 12288, 32, 8, 36, 151936, **QWEN3),
    "gemma2-2b": _llama(2304, 9216, 8, 4, 26, 256000, **GEMMA2),
    "gemma2-9b": _llama(3584, 14336, 16, 8, 42, 256000, **GEMMA2),
    "gemma3-1b": _llama(1152, 6912, 4, 1, 26, 262144, **GEMMA3, sliding_window=512),
    "gemma3-12b": _llama(3840, 15360, 16, 8, 48, 262208, **GEMMA3, sliding_window=1024),
    "phi3-mini": _llama(
        3072, 8192, 32, 32, 32, 32064,
        **_named("phi3", "Phi3", pad_token_id=0, bos_token_id=1, eos_token_id=2, resid_pdrop=0.0,
                 embd_pdrop=0.0),
    ),
    "bloom-560m": {**BLOOM, "hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250880},
    "bloom-7b1": {**BLOOM, "hidden_size": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 250880},
    "mixtral-8x7b": _llama(
        4096, 14336, 32, 8, 32, 32000,
        **_named("mixtral", "Mixtral", num_local_experts=8, num_experts_per_tok=2,
                 sliding_window=None),
    ),
    "mixtral-small": _llama(
        1024, 3584, 16, 8, 12, 32000,
        **_named("mixtral", "Mixtral", num_local_experts=8, num_experts_per_tok=2,
                 sliding_window=None),
    ),
}  # fmt: skip
"""Configurations with all their layers."""
LAYER_KEYS = {"bloom": "n_layer"}

LORA: Words = {"kind": "lora", "rank": 16, "alpha": 16}
GALORE: Words = {"method": "galore", "rank": 128, "basis": "randomised"}


def _lora(**more: Any) -> Words:
    return {"adapter": {**LORA, **more}}


def _quant(name: str, **more: Any) -> Words:
    return {"quant": {"format": name, **more}, **_lora()}


METHODS: dict[str, Words] = {
    "full": {"train": {"precision": "bf16"}},
    "full-fp32": {"train": {"precision": "fp32"}},
    "full-8bit": {"optim": {"name": "adamw8bit"}},
    "full-bf16": {"optim": {"state": "bf16"}},
    "full-sgd": {"optim": {"name": "sgd", "momentum": 0.9}},
    "full-lion": {"optim": {"name": "lion"}},
    "full-adafactor": {"optim": {"name": "adafactor"}},
    "galore": {"optim": GALORE},
    "galore-layerwise": {"optim": {**GALORE, "layerwise": True, "max_grad_norm": None}},
    "galore8-backward": {
        "optim": {
            **GALORE, "method": "galore8bit", "layerwise": True, "in_backward": True,
            "max_grad_norm": None,
        }
    },
    "q-galore": {"optim": {**GALORE, "method": "q-galore"}},
    "fira": {"optim": {**GALORE, "method": "fira"}},
    "balanced": {"optim": {**GALORE, "method": "balanced"}},
    "apollo": {"optim": {"method": "apollo", "rank": 128}},
    "apollo-mini": {"optim": {"method": "apollo-mini"}},
    "lora": _lora(),
    "lora-r64": _lora(rank=64),
    "lora-qv": _lora(targets=["q_proj", "v_proj"]),
    "lora-dropout": _lora(dropout=0.05),
    "lora-bf16": {**_lora(), "train": {"adapter_precision": "bf16"}},
    "lora-head": _lora(modules_to_save=["lm_head"]),
    "lora-8bit": {**_lora(rank=64), "optim": {"name": "adamw8bit"}},
    "dora": _lora(kind="dora"),
    "qlora": _quant("nf4"),
    "qlora-r64": {**_quant("nf4"), **_lora(rank=64)},
    "qlora-single": _quant("nf4", double_quant=False),
    "qlora-dropout": {**_quant("nf4"), **_lora(dropout=0.05)},
    "qlora-bf16": {**_quant("nf4"), "train": {"adapter_precision": "bf16"}},
    "qdora": {**_quant("nf4"), **_lora(kind="dora")},
    "fp4": _quant("fp4"),
    "int8": _quant("int8"),
    "int8-qkv": {
        "quant": {"format": "int8"},
        "adapter": {
            "kind": "lora", "rank": 8, "alpha": 32, "dropout": 0.05,
            "targets": ["query_key_value"],
        },
    },
    "hqq4": _quant("hqq", bits=4),
    "hqq2": _quant("hqq", bits=2),
    "hqq8": _quant("hqq", bits=8),
    "ternary": _quant("ternary"),
    "pro": {"adapter": {"kind": "expand", "num_new_blocks": 2}},
    "factorised": {"adapter": {"kind": "factorised", "rank": 128}},
    "qlora-experts": {**_quant("nf4", keep=["experts"])},
}  # fmt: skip
"""Sections of a recipe by name; `factorised` is trained from scratch."""

POLICIES: dict[str, Words] = {
    "ckpt": {"activation_checkpointing": "full"},
    "none": {"activation_checkpointing": "none"},
    "selective": {"activation_checkpointing": "selective"},
    "keep1": {"keep_blocks": 1},
    "keep2": {"keep_blocks": 2},
    "keep11": {"keep_blocks": 11},
    "sel-keep2": {"activation_checkpointing": "selective", "keep_blocks": 2},
    "offload": {"activation_offload": True},
    "sel-offload": {"activation_checkpointing": "selective", "activation_offload": True},
}
"""Words of train."""

MORE: dict[str, Words] = {
    "unfused": {"train": {"fused_kernels": False}},
    "tiles": {"train": {"mlp_tile_tokens": 2048}},
    "chunk256": {"train": {"loss_chunk_tokens": 256}},
    "chunk8k": {"train": {"loss_chunk_tokens": 8192}},
    "packed": {"data": {"packing": True}},
    "stream0": {"place": {"kind": "stream", "resident_blocks": 0}},
    "stream2": {"place": {"kind": "stream", "resident_blocks": 2}},
    "fp16": {"train": {"precision": "fp16"}},
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One configuration. `passes`: micro-batches of a step."""

    name: str
    model: str
    num_layers: int
    method: str
    rows: int
    length: int
    passes: int
    policy: str
    more: tuple[str, ...]

    @property
    def held_out(self) -> bool:
        """Whether it only tests the plan."""
        return hashlib.sha256(self.name.encode()).digest()[0] % 3 == 0

    @property
    def family(self) -> str:
        """The model's type, as transformers has it."""
        return str(MODELS[self.model]["model_type"])

    def config(self) -> Words:
        """What config.json says."""
        words = dict(MODELS[self.model])
        words[LAYER_KEYS.get(self.family, "num_hidden_layers")] = self.num_layers
        return words

    def recipe(self) -> Words:
        """Sections of the recipe, without the model."""
        found: Words = {"place": {"kind": "single"}, "quant": {"cache": False}}
        own: Words = {
            "data": {"max_length": self.length},
            "train": {
                "micro_batch_size": self.rows,
                "gradient_accumulation_steps": self.passes,
                **POLICIES[self.policy],
            },
        }
        for words in (METHODS[self.method], own, *(MORE[word] for word in self.more)):
            for section, values in words.items():
                found[section] = {**found.get(section, {}), **values}
        return found


def parse(line: str) -> Row:
    """A row from its line."""
    model, method, batch, policy, *more = line.split()
    name, _, layers = model.partition("/")
    rows, length, passes = [int(word) for word in batch.split("x")] + [1] * (2 - batch.count("x"))
    words = MODELS[name]
    whole = words[LAYER_KEYS.get(words["model_type"], "num_hidden_layers")]
    return Row(
        name=" ".join([model, method, batch, policy, *more]),
        model=name,
        num_layers=int(layers) if layers else whole,
        method=method,
        rows=rows,
        length=length,
        passes=passes,
        policy=policy,
        more=tuple(more),
    )


KNOWN = """
llama3-8b qlora 4x2048 keep11
llama3-8b qlora 1x2048 ckpt
bloom-7b1 int8-qkv 4x512 ckpt
llama2-7b galore8-backward 1x2048 ckpt
llama3-8b/4 qlora 1x32768 offload tiles
llama-0.1b full 8x1024 none
qwen2-0.5b full 4x1024 none
llama3-1b full 4x2048 ckpt
llama3-3b lora 2x2048 selective
llama2-7b full-8bit 1x512 ckpt
llama3-70b/4 qlora 1x2048 ckpt stream0
llama-0.1b full-fp32 4x512 ckpt
llama3-1b full 16x512 none
bloom-560m full 2x512 ckpt
llama-0.1b galore-layerwise 8x1024 ckpt
"""
"""Whole models, and where the plan was wrong before."""

LENGTHS = """
llama3-8b/4 qlora 1x8 ckpt
llama3-8b/4 qlora 1x128 none
llama3-8b/4 qlora 1x512 selective
llama3-8b/4 qlora 4x512 ckpt
llama3-8b/4 qlora 1x2048 none
llama3-8b/4 qlora 4x2048 none
llama3-8b/4 qlora 8x2048 selective
llama3-8b/4 qlora 1x8192 ckpt
llama3-8b/4 qlora 1x32768 ckpt
llama3-8b/4 qlora 1x32768 selective
llama3-8b/4 qlora 1x32768 sel-offload tiles
llama3-8b/4 qlora 2x16384 offload
llama3-8b/4 qlora 64x128 ckpt
llama3-8b/4 qlora 16x1024 keep1
llama3-8b/4 qlora 2x2048x2 ckpt
llama3-8b/4 lora 1x32768 ckpt tiles
llama3-8b/4 full 1x8 ckpt
llama3-8b/4 full 1x8192 ckpt
llama3-8b/4 full 1x16384 selective
llama2-70b/2 qlora 1x16384 ckpt
llama2-70b/4 qlora 1x512 none
qwen3-8b/4 qlora 1x16384 offload
"""

POLICY_ROWS = """
llama3-8b/6 qlora 4x2048 keep2
llama3-8b/6 qlora 4x2048 sel-keep2
llama3-8b/6 qlora 4x2048 offload
llama3-8b/6 qlora 4x2048 sel-offload
llama3-8b/6 qlora 4x2048 ckpt tiles
llama3-8b/6 qlora 4x2048 ckpt chunk256
llama3-8b/6 qlora 4x2048 ckpt chunk8k
llama3-8b/6 qlora 4x2048 ckpt unfused
llama3-8b/6 qlora 4x2048 none unfused
llama3-8b/6 qlora 4x2048 ckpt packed
llama3-8b/6 qlora 4x2048 selective packed
llama3-8b/6 qlora 4x2048 none packed
llama3-8b/6 qlora 1x2048 ckpt stream2
llama3-8b/6 lora 1x2048 ckpt stream0
llama3-8b/6 qlora 1x2048 ckpt fp16
qwen2-7b/4 lora 4x2048 ckpt unfused
qwen2-7b/4 full 4x2048 none unfused
qwen3-8b/4 lora 2x4096 sel-keep2
gemma2-9b/4 lora 2x1024 none unfused
gemma3-12b/4 qlora 2x1024 selective
llama3-70b/3 qlora 2x2048 keep1
llama3-70b/3 qlora 4x2048 selective
llama3-70b/3 lora 1x4096 offload
qwen2-72b/2 qlora 1x4096 none
llama3-70b/6 qlora 1x2048 ckpt stream2
llama3-1b/8 full-fp32 2x1024 selective
llama3-1b/8 full 2x1024 keep2
"""

FAMILY_BATCHES = ("2x1024 ckpt", "4x512 none", "1x2048x2 ckpt", "1x2048 selective")
FAMILY_LAYERS = {
    "llama3-1b": 6, "llama3-3b": 6, "llama2-13b": 3, "mistral-7b": 4, "qwen2-0.5b": 8,
    "qwen2-7b": 3, "qwen3-0.6b": 8, "qwen3-8b": 4, "gemma2-2b": 5, "gemma2-9b": 3, "gemma3-1b": 6,
    "gemma3-12b": 3, "phi3-mini": 4, "bloom-560m": 6, "bloom-7b1": 3, "mixtral-8x7b": 2,
    "mixtral-small": 4, "llama3-70b": 2,
}  # fmt: skip
FAMILY_METHODS = ("qlora", "full", "lora", "int8", "full-8bit")
UNQUANTISED = {"mixtral": {"qlora": "qlora-experts", "int8": "lora-r64"}}
METHOD_MODELS = (
    "llama3-8b/4 1x2048 ckpt",
    "qwen3-0.6b/8 4x1024 none",
    "llama2-7b/4 2x1024 selective",
)
METHOD_ROWS_LEFT_OUT = ("int8-qkv", "qlora-experts", "full", "qlora")


def _families() -> Iterator[str]:
    """Every model with two or three methods, batches in turn."""
    methods, batches = cycle(FAMILY_METHODS), cycle(FAMILY_BATCHES)
    for model, layers in FAMILY_LAYERS.items():
        family = MODELS[model]["model_type"]
        for method in islice(methods, 3):
            method = UNQUANTISED.get(family, {}).get(method, method)
            yield f"{model}/{layers} {method} {next(batches)}"


def _methods() -> Iterator[str]:
    """Every method on a small and on a large shape."""
    models = cycle(METHOD_MODELS)
    for method in METHODS:
        if method in METHOD_ROWS_LEFT_OUT:
            continue
        for words in islice(models, 2):
            model, batch, policy = words.split()
            if method == "lora-head" and MODELS[model.split("/")[0]]["tie_word_embeddings"]:
                continue  # a tied head is no module of its own
            yield f"{model} {method} {batch} {policy}"


def all_rows() -> list[Row]:
    """Every row once, those that tell most first, then a little of each kind in turn."""
    lists = [[line for line in text.splitlines() if line] for text in (KNOWN, LENGTHS, POLICY_ROWS)]
    known, *others = [*lists, list(_families()), list(_methods())]
    mixed = (line for lines in zip_longest(*others) for line in lines if line is not None)
    return [parse(str(line)) for line in dict.fromkeys(chain(known, mixed))]


def shrunk(row: Row) -> Row:
    """The same kind of row with few tokens, for `tiny`."""
    length = 8 if row.length < 64 else 256 if "tiles" in row.more else 32
    return parse(
        " ".join(
            [
                row.name.split()[0],
                row.method,
                f"{min(row.rows, 2)}x{length}x{row.passes}",
                row.policy,
                *row.more,
            ]
        )
    )


def tiny(words: Words) -> Words:
    """A configuration of the same kind that a CPU trains in a moment."""
    heads = words.get("num_attention_heads", words.get("n_head"))
    kv = words.get("num_key_value_heads", heads)
    found = {**words, "vocab_size": 384}
    if words["model_type"] == "bloom":
        return {**found, "hidden_size": 128, "n_layer": 3, "n_head": 4}
    found |= {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if kv == heads else 1 if kv == 1 else 2,
    }
    return found | ({"head_dim": 32} if "head_dim" in words else {})
