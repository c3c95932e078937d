"""The loss that the loop minimises, against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nibble.data import Batch
from nibble.models.family import describe
from nibble.nn.attention import attention_name
from nibble.nn.loss import IGNORE
from nibble.place.single import one_device
from nibble.spec.config import Place
from nibble.use.objective import held_out_loss, objective

VOCAB = 53


def batch_of(
    ids: Tensor, labels: Tensor, *, mask: Tensor | None = None, positions: Tensor | None = None
) -> Batch:
    return Batch(
        input_ids=ids, labels=labels, position_ids=positions, attention_mask=mask,
        num_targets=int((labels != IGNORE).sum()), num_tokens=ids.numel(),
        doc_lengths=tuple((ids.shape[1],) for _ in ids),
    )  # fmt: skip


def model(kind: str) -> Any:
    import transformers as t

    common = {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 64,
    }  # fmt: skip
    configs: dict[str, Any] = {
        "llama": lambda: t.LlamaConfig(**common, tie_word_embeddings=True),
        "gemma2": lambda: t.Gemma2Config(
            **common, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0
        ),
        "cohere": lambda: t.CohereConfig(**common, logit_scale=0.25),
        "bloom": lambda: t.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
        "opt": lambda: t.OPTConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32,
        ),
        "codegen": lambda: t.CodeGenConfig(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4
        ),
    }  # fmt: skip
    torch.manual_seed(0)
    made = t.AutoModelForCausalLM.from_config(configs[kind]()).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(3)  # let caps and scales matter
    return made


def rows() -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (3, 14), generator=gen)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    labels = ids.roll(-1, 1).masked_fill(mask == 0, IGNORE)
    labels[:, -1] = IGNORE
    labels[1, 8] = IGNORE
    labels[0, :6] = IGNORE
    return ids, labels, mask


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "bloom", "opt", "codegen"])
def test_loss_and_gradients_are_transformers(kind: str) -> None:
    net = model(kind)
    family = describe(net)
    ids, labels, mask = rows()
    loss = objective(family, task="causal-lm", chunk=16)(net, batch_of(ids, labels, mask=mask))
    logits = net(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    expected = F.cross_entropy(
        logits.view(-1, VOCAB), labels.view(-1), ignore_index=IGNORE, reduction="sum"
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(loss / 20, list(net.parameters()), allow_unused=True)
    theirs = torch.autograd.grad(expected / 20, list(net.parameters()), allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "bloom", "opt"])
def test_causal_models_are_not_given_the_mask_of_padding(kind: str) -> None:
    """It would change nothing but the speed; that loss and gradients stay is the test above."""
    net = model(kind)
    family = describe(net)
    given: list[object] = []
    family.decoder(net).register_forward_pre_hook(
        lambda module, inputs, words: given.append(words.get("attention_mask")), with_kwargs=True
    )
    ids, labels, mask = rows()
    batch = batch_of(ids, labels, mask=mask)
    loss_of = objective(family, task="causal-lm", chunk=16)
    loss = loss_of(net, batch)
    assert given == [None]
    other = batch_of(ids.masked_fill(mask == 0, 7), labels, mask=mask)
    torch.testing.assert_close(loss_of(net, other), loss, rtol=0, atol=0)


def test_packed_rows_lose_what_their_documents_lose_alone() -> None:
    import transformers as t

    torch.manual_seed(0)
    config = t.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48,
    )  # fmt: skip
    name = attention_name(t.LlamaForCausalLM)
    net = t.AutoModelForCausalLM.from_config(config, attn_implementation=name).eval()
    loss_of = objective(describe(net), task="causal-lm", chunk=16)
    ids, labels, _ = rows()
    labels[:, 6] = IGNORE  # the seam
    positions = torch.cat([torch.arange(7), torch.arange(7)]).expand(3, -1)
    packed = loss_of(net, batch_of(ids, labels, positions=positions))
    halves = [loss_of(net, batch_of(ids[:, s], labels[:, s])) for s in (slice(7), slice(7, 14))]
    torch.testing.assert_close(packed, halves[0] + halves[1], rtol=1e-5, atol=1e-5)
    whole = loss_of(net, batch_of(ids, labels))
    assert (
        abs(float((whole - packed).detach())) > 1e-3
    )  # and documents that see each other lose otherwise


@pytest.mark.parametrize("num_labels", [3, 1])
def test_classification_is_a_sum_over_rows(num_labels: int) -> None:
    import transformers as t

    torch.manual_seed(0)
    config = t.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=48, num_labels=num_labels,
    )  # fmt: skip
    net = t.AutoModelForSequenceClassification.from_config(config).eval()
    ids, _, mask = rows()
    kinds = torch.zeros_like(ids)
    kinds[:, 5:] = 1
    labels = torch.tensor([0, 2, 1]) if num_labels == 3 else torch.tensor([0.5, -1.0, 2.0])
    words = {"position_ids": None, "num_tokens": 37, "doc_lengths": ((14,), (9,), (14,))}
    given: dict[str, Any] = {"input_ids": ids, "labels": labels, "attention_mask": mask, **words}
    loss_of = objective(describe(net, task="classification"), task="classification", chunk=16)
    loss = loss_of(net, Batch(**given, num_targets=3, token_type_ids=kinds))
    out = net(input_ids=ids, attention_mask=mask, token_type_ids=kinds, labels=labels)
    torch.testing.assert_close(loss, out.loss * 3, rtol=1e-5, atol=1e-6)
    without = loss_of(net, Batch(**given, num_targets=3))
    assert not torch.equal(without, loss)  # the segments were read
    nothing = loss_of(net, Batch(**given, num_targets=0))
    assert nothing.item() == 0 and nothing.requires_grad


def test_held_out_loss_is_a_mean_over_targets_and_leaves_no_trace() -> None:
    net = model("llama").train()
    loss_of = objective(describe(net), task="causal-lm", chunk=16)
    ids, labels, mask = rows()
    one = batch_of(ids[:1], labels[:1])
    two = batch_of(ids[1:], labels[1:], mask=mask[1:])
    assert one.num_targets != two.num_targets
    seen: list[bool] = []

    def spying(module: nn.Module, batch: Batch) -> Tensor:
        seen.append(module.training or torch.is_grad_enabled())
        return loss_of(module, batch)

    place = one_device(Place(device="cpu"))
    found = held_out_loss(net, [one, two], place=place, objective=spying)
    expected = (loss_of(net, one) + loss_of(net, two)) / (one.num_targets + two.num_targets)
    assert found == pytest.approx(expected.item(), rel=1e-6)
    assert seen == [False, False] and net.training
    stopped = held_out_loss(net, [one, two], place=place, objective=loss_of, stop=lambda: True)
    assert stopped is None
