"""Small Llamas with LoRA whose blocks keep what a test asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from nibble.nn.adapters import adapt_
from nibble.nn.attention import register
from nibble.nn.fused import fuse_
from nibble.nn.quant import quantize_
from nibble.place.activations import Activations, Checkpointed, checkpoint_
from nibble.spec.config import Adapter, Quant
from nibble.spec.formats import format_spec

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "tie_word_embeddings": False,
}


def make(
    activations: Activations,
    *,
    quant: bool = True,
    fused: bool = True,
    dropout: float = 0.0,
    attention: str | None = None,
    shape: dict[str, Any] = SHAPE,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Any, Checkpointed]:
    """The model, always with the same weights, and what was done to its blocks."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape)).to(device=device, dtype=dtype).train()
    model.set_attn_implementation(attention or register())
    if quant:
        quantize_(model, format_spec(Quant(format="nf4")))
    adapt_(
        model,
        Adapter(kind="lora", rank=4, alpha=6.0, dropout=dropout),
        dtype=torch.float32,
        generator=torch.Generator().manual_seed(0),
    )
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    if fused:
        fuse_(model, model.model, dtype=dtype)
    return model, checkpoint_(list(model.model.layers), activations)


def forward(model: Any, *, length: int, packed: bool, seed: int = 0) -> Tensor:
    """A loss of two rows; packed ones hold two documents each."""
    ids = torch.randint(50, (2, length), generator=torch.Generator().manual_seed(seed))
    words = {}
    if packed:
        cut = length // 3
        positions = torch.cat([torch.arange(cut), torch.arange(length - cut)])
        words["position_ids"] = positions[None].expand(2, -1).to(model.device)
    logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False, **words).logits
    return logits.float().pow(2).mean()


def gradients(
    model: Any, *, lengths: tuple[int, ...] = (280, 340), packed: bool = False
) -> list[Tensor]:
    """Of the sum over passes of these lengths, each with its own backward."""
    torch.manual_seed(3)
    for seed, length in enumerate(lengths):
        forward(model, length=length, packed=packed, seed=seed).backward()
    found = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad(set_to_none=True)
    return found
