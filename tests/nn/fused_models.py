"""Tiny models of every family that has fast paths; names as transformers has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from nibble.nn.adapters import adapt_
from nibble.nn.fused import FusedSummary, fuse_
from nibble.nn.quant import quantize_
from nibble.spec.config import Adapter, Quant
from nibble.spec.formats import format_spec

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi": {"partial_rotary_factor": 0.5, "qk_layernorm": False},
    "phi3": {"partial_rotary_factor": 0.5, "rope_theta": 10000.0},
    "bloom": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    "gpt_neox": {"use_parallel_residual": True},
    "starcoder2": {"residual_dropout": 0.0},
}


def make(
    family: str,
    *,
    fused: bool,
    quant: str = "none",
    dtype: torch.dtype = torch.float32,
    **lora: Any,
) -> tuple[nn.Module, FusedSummary | None]:
    """A model with random weights, adapters that are not zero, and fast paths if asked."""
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family]})
    torch.manual_seed(0)
    softcap = getattr(config, "attn_logit_softcapping", None)
    attention = "eager" if softcap is not None or family == "bloom" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    quantize_(model, format_spec(Quant(format=quant)), kernels="eager")  # type: ignore[arg-type]
    if lora:
        words = {"kind": "lora", "rank": 4, "alpha": 6.0, **lora}
        generator = torch.Generator().manual_seed(0)
        adapt_(model, Adapter(**words), dtype=torch.float32, generator=generator)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    summary = fuse_(model, model.base_model, dtype=dtype) if fused else None
    return model, summary


def ids(rows: int = 2, length: int = 24) -> Tensor:
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(1))


def loss_and_gradients(model: nn.Module, **words: Any) -> tuple[Tensor, dict[str, Tensor]]:
    tokens = ids()
    logits = model(input_ids=tokens, use_cache=False, **words).logits
    loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
    model.zero_grad()
    loss.backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
