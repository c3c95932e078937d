"""Recomputed activations change memory and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nibble.place.activations import Activations, Recomputed, checkpoint_


class Block(nn.Module):
    """Keywords, a tuple out, dropout, and a frozen part: what decoder blocks do."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.trained = nn.Linear(16, 16)
        self.drop = nn.Dropout(dropout)
        self.calls = 0

    def forward(self, x: Tensor, *, shift: Tensor, words: dict[str, Any]) -> tuple[Tensor, str]:
        self.calls += 1
        inner = torch.relu(self.frozen(x) + self.trained(x) * words["gain"])
        return x + self.drop(inner) + shift, "kept"


def net(dropout: float) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Block(dropout) for _ in range(4))


def go(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    shift = torch.linspace(0, 1, 16)
    for block in blocks:
        x, kept = block(x, shift=shift, words={"gain": 0.5})
        assert kept == "kept"
    return x.pow(2).sum()


def gradients(blocks: nn.ModuleList, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    go(blocks, x).backward()
    return [p.grad for p in blocks.parameters() if p.grad is not None]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("leaf", [False, True])
def test_gradients_are_the_same(dropout: float, leaf: bool) -> None:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(2), requires_grad=leaf)
    plain, wrapped = net(dropout), net(dropout)
    assert checkpoint_(list(wrapped), Activations()).num_recomputed == 4
    expected = gradients(plain, x)
    after_plain = torch.get_rng_state()
    found = gradients(wrapped, x)
    assert len(found) == 8  # weight and bias of each trained part
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert torch.equal(after_plain, torch.get_rng_state())
    assert [b.calls for b in wrapped] == [2] * 4 and [b.calls for b in plain] == [1] * 4


def saved_elements(blocks: nn.ModuleList, x: Tensor) -> int:
    total = 0

    def pack(t: Tensor) -> Tensor:
        nonlocal total
        total += 0 if isinstance(t, nn.Parameter) else t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        go(blocks, x)
    return total


def test_only_the_inputs_are_kept() -> None:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(3), requires_grad=True)
    plain, wrapped = net(0.4), net(0.4)
    checkpoint_(list(wrapped), Activations())
    assert saved_elements(wrapped, x) < saved_elements(plain, x) / 2


def test_evaluation_is_not_wrapped_and_wrapping_twice_is_once() -> None:
    blocks = net(0.0)
    checkpoint_(list(blocks), Activations())
    first = [b.forward for b in blocks]
    checkpoint_(list(blocks), Activations())
    assert [b.forward for b in blocks] == first
    assert not any(isinstance(f.forward, Recomputed) for f in first)
    with torch.no_grad():
        go(blocks, torch.randn(2, 16))
    assert [b.calls for b in blocks] == [1] * 4


def test_none_leaves_the_blocks_alone() -> None:
    blocks = net(0.0)
    assert checkpoint_(list(blocks), Activations(policy="none")).num_recomputed == 0
    assert not any(isinstance(b.forward, Recomputed) for b in blocks)


def test_transformers_blocks_with_caches_and_masks() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=24, attention_dropout=0.3,
    )  # fmt: skip
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    grads = []
    for policy in ("none", "full"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).train()
        checkpoint_(list(model.model.layers), Activations(policy=policy))
        out = model(input_ids=ids, attention_mask=mask, use_cache=False)
        torch.manual_seed(5)
        out = model(input_ids=ids, attention_mask=mask, use_cache=False)
        out.logits.pow(2).mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_the_last_linear_is_not_multiplied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """QLoRA of a Llama: gradients are the same bit for bit, and of a block's 7 linears one is
    unpacked forward and backward only, the others also when recomputed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from nibble.nn import quant
    from nibble.nn.adapters import adapt_
    from nibble.numerics.formats import unpack
    from nibble.spec.config import Adapter, Quant
    from nibble.spec.formats import format_spec

    config = LlamaConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=96, tie_word_embeddings=False,
    )  # fmt: skip
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(4))
    num_unpacked = 0

    def counted(*args: Any, **words: Any) -> Tensor:
        nonlocal num_unpacked
        num_unpacked += 1
        return unpack(*args, **words)

    monkeypatch.setattr(quant, "select", lambda *_, **__: counted)
    grads, counts = [], []
    for policy in ("none", "full"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).train()
        quant.quantize_(model, format_spec(Quant(format="nf4")))
        words = Adapter(kind="lora", rank=4, alpha=6.0)
        adapt_(model, words, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                nn.init.normal_(parameter, std=0.1)
        checkpoint_(list(model.model.layers), Activations(policy=policy))
        num_unpacked = 0
        model(input_ids=ids, use_cache=False).logits.pow(2).mean().backward()
        counts.append(num_unpacked)
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    # Nothing trained lies before the first block's q, k and v: no gradient of x is needed there.
    assert counts == [2 * 7 * 2 - 3, 2 * 7 * 2 - 3 + 2 * 6]
    assert len(grads[0]) == 2 * 2 * 7
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
