"""Packed attention against transformers' own dense block-diagonal mask, and against documents run
alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nibble.nn import attention
from nibble.nn.attention import PACKED, attention_name, document_attention, packed_mask, register

LENGTHS = ((5, 1, 7, 3), (16,), (2, 14))
VOCAB = 61


def positions(rows: tuple[tuple[int, ...], ...]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


def model(kind: str, implementation: str) -> Any:
    import transformers as t

    common = {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
    }  # fmt: skip
    if kind == "llama":
        config: Any = t.LlamaConfig(**common)
    elif kind == "mistral-window":
        config = t.MistralConfig(**common, sliding_window=4)
    elif kind == "gemma3-mixed":
        config = t.Gemma3TextConfig(
            **common,
            head_dim=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        )
    elif kind == "gpt_neox":
        common.pop("num_key_value_heads")
        config = t.GPTNeoXConfig(**common)
    else:
        config = t.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        config.attn_pdrop = config.resid_pdrop = config.embd_pdrop = 0.0
    torch.manual_seed(0)
    return t.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)


KINDS = ("llama", "mistral-window", "gemma3-mixed", "gpt_neox", "gpt2")


@pytest.mark.parametrize("kind", KINDS)
def test_packed_logits_and_gradients_equal_transformers_dense_mask(kind: str) -> None:
    register()
    ours, theirs = model(kind, PACKED), model(kind, "sdpa")
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(VOCAB, (3, 16), generator=torch.Generator().manual_seed(1))
    place = positions(LENGTHS)
    out, ref = (
        m(input_ids=ids, position_ids=place, use_cache=False).logits for m in (ours, theirs)
    )
    torch.testing.assert_close(out, ref, atol=1e-5, rtol=1e-5)
    for logits in (out, ref):
        logits.pow(2).mean().backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(
            a.grad, b.grad, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_in_a_row_equals_the_document_alone(kind: str) -> None:
    register()
    net = model(kind, PACKED).eval()
    ids = torch.randint(VOCAB, (3, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        packed = net(input_ids=ids, position_ids=positions(LENGTHS), use_cache=False).logits
        for row, lengths in enumerate(LENGTHS):
            begin = 0
            for n in lengths:
                piece = ids[row : row + 1, begin : begin + n]
                alone = net(input_ids=piece, use_cache=False).logits[0]
                torch.testing.assert_close(
                    packed[row, begin : begin + n], alone, atol=2e-5, rtol=1e-4
                )
                begin += n


def test_the_packed_path_is_really_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    seen: list[list[int]] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, **words: Any) -> Tensor:
        seen.append(offsets.tolist())
        return document_attention(q, k, v, offsets, **words)

    monkeypatch.setattr(attention, "document_attention", spy)
    net = model("llama", PACKED)
    ids = torch.zeros(3, 16, dtype=torch.long)
    net(input_ids=ids, position_ids=positions(LENGTHS), use_cache=False)
    assert seen == [[0, 5, 6, 13, 16, 32, 34, 48]] * 2
    seen.clear()
    net(input_ids=ids, use_cache=False)  # nothing packed: transformers' own causal path
    net(input_ids=ids, attention_mask=torch.ones(3, 16, dtype=torch.long), use_cache=False)
    assert seen == []


def test_padding_and_generation_are_transformers_own() -> None:
    register()
    ours, theirs = model("llama", PACKED).eval(), model("llama", "sdpa").eval()
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    words = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for m in (ours, theirs):
        m.generation_config.eos_token_id = None
    a, b = (m.generate(ids, attention_mask=mask, **words) for m in (ours, theirs))
    assert torch.equal(a, b)


def test_checkpointed_blocks_carry_the_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    net = model("llama", PACKED)
    ids = torch.randint(VOCAB, (3, 16), generator=torch.Generator().manual_seed(4))

    def grads() -> list[Tensor]:
        net.zero_grad()
        net(input_ids=ids, position_ids=positions(LENGTHS), use_cache=False).logits.pow(
            2
        ).mean().backward()
        return [p.grad.clone() for p in net.parameters()]

    plain = grads()
    for block in net.model.layers:
        forward = partial(checkpoint, block.forward, use_reentrant=False)
        monkeypatch.setattr(block, "forward", forward)
    for a, b in zip(plain, grads(), strict=True):
        assert torch.equal(a, b)


def test_a_mask_that_looks_ahead_is_left_to_the_dense_path() -> None:
    """A prefix that sees itself in both directions has no offsets."""

    def prefix(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) | ((key < 4) & (query < 4))

    mask = packed_mask(1, 8, 8, mask_function=prefix, allow_is_causal_skip=False, device="cpu")
    assert mask is not None and mask.shape == (1, 1, 8, 8) and bool(mask[0, 0, 0, 3])


def test_dropout_acts_inside_documents_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 12, 2, 8)
    v = (
        torch.eye(12)[:, None, :].expand(12, 2, 12).contiguous()
    )  # the output is the attention matrix itself
    out = document_attention(
        q, k, v, torch.tensor([0, 5, 12], dtype=torch.int32), longest=12, dropout=0.5
    )
    assert out[:5, :, 5:].abs().max() == 0 and out[5:, :, :5].abs().max() == 0
    kept = (out != 0).float().mean(dim=(1, 2)).sum() * 12
    assert 0.2 < kept / (15 + 28) < 0.8


def test_families_get_the_attention_they_can_run() -> None:
    import transformers as t

    assert attention_name(t.LlamaForCausalLM) == PACKED
    assert attention_name(t.BloomForCausalLM) == "eager"
    assert attention_name(t.FalconForCausalLM) == "sdpa"  # own sdpa call, outside the interface
    assert attention_name(t.Gemma2ForCausalLM, t.Gemma2Config()) == "eager"
    assert attention_name(t.LlamaForCausalLM, t.LlamaConfig()) == PACKED


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("dim", [64, 128])
def test_the_varlen_kernel_equals_documents_run_alone(dim: int, window: int | None) -> None:
    gen = torch.Generator("cuda").manual_seed(0)
    offsets = torch.tensor([0, 100, 101, 300, 512], dtype=torch.int32, device="cuda")
    wide = [
        torch.randn(512, 4, dim, generator=gen, device="cuda", dtype=torch.bfloat16)
        for _ in range(3)
    ]
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [w.to(dtype).detach().requires_grad_() for w in wide]
        out = document_attention(*leaves, offsets, longest=512, window=window)
        out.float().pow(2).sum().backward()
        results.append([out.float(), *(x.grad.float() for x in leaves if x.grad is not None)])
    for ours, reference in zip(*results, strict=True):
        error = (ours - reference).norm() / reference.norm()
        assert error < 1e-2
