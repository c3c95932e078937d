"""Expanded models compute what the original did, for every family that is listed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from nibble.errors import ConfigError
from nibble.nn.adapters import adapt_
from nibble.nn.attention import offsets_mask, register
from nibble.nn.expand import OUTPUT_PROJECTIONS, Expansion, expand_, plan_expansion
from nibble.nn.quant import QuantLinear, quantize_
from nibble.spec.config import Adapter, Quant
from nibble.spec.formats import format_spec

NUM_BLOCKS = 4
SMALL = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
EXTRA: dict[str, dict[str, object]] = {
    "qwen3": {
        "head_dim": 8,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 2,
    },
    "qwen3_moe": {
        **EXPERTS,
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
    },
    "mixtral": EXPERTS,
}
BLOCKS = {"gpt_neox": "gpt_neox.layers", "bloom": "transformer.h", "gpt2": "transformer.h"}


def tiny(family: str) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **(SMALL | EXTRA.get(family, {})))
    model = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: zeros would hide mistakes
            parameter.normal_(std=0.2)
    return model.eval()


def blocks_of(model: PreTrainedModel, family: str) -> nn.ModuleList:
    blocks = model.get_submodule(BLOCKS.get(family, "model.layers"))
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        return model(input_ids=ids).logits


def fill(model: nn.Module, expansion: Expansion, state: dict[str, torch.Tensor]) -> None:
    """What a loader does: each tensor of the checkpoint goes to all its places."""
    for name, value in state.items():
        for target in expansion.targets_of(name):
            model.get_parameter(target).data.copy_(expansion.value_of(target, value))


@pytest.mark.parametrize("family", OUTPUT_PROJECTIONS)
def test_an_expanded_model_is_the_identity_of_its_source(family: str) -> None:
    model = tiny(family)
    before = logits(model)
    state = {name: value.clone() for name, value in model.named_parameters()}
    expansion = expand_(model, blocks_of(model, family), 2)
    assert expansion.positions == (2, 5) and expansion.source_of == (0, 1, 1, 2, 3, 3)
    assert model.config.num_hidden_layers == len(blocks_of(model, family)) == 6
    torch.testing.assert_close(logits(model), before, atol=2e-6, rtol=1e-5)
    assert not torch.equal(logits(model) * 0, before)

    # The same through the meta device, from a checkpoint of the original.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    fill(model, expansion, state)
    torch.testing.assert_close(logits(model), before, atol=2e-6, rtol=1e-5)

    # New blocks learn: every zeroed weight that was used has a gradient, nothing else is trained.
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith(expansion.names) for name in trained)
    model(input_ids=torch.arange(20).view(2, 10)).logits.square().sum().backward()
    assert all(trained[name].grad.abs().sum() > 0 for name in expansion.zeroed)


def test_new_blocks_keep_the_documents_of_a_packed_row_apart() -> None:
    model = tiny("llama")
    expand_(model, blocks_of(model, "llama"), 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.set_attn_implementation(register())
    first, second = torch.arange(1, 5).unsqueeze(0), torch.arange(7, 13).unsqueeze(0)
    with torch.no_grad():
        packed = model(
            input_ids=torch.cat([first, second], dim=1),
            position_ids=torch.cat([torch.arange(4), torch.arange(6)]).unsqueeze(0),
            attention_mask=offsets_mask(torch.tensor([0, 4, 10], dtype=torch.int32), longest=6),
        ).logits
        alone = torch.cat([model(input_ids=ids).logits for ids in (first, second)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "gpt2"])
def test_the_config_rebuilds_the_expanded_model(family: str) -> None:
    """What is exported loads as an ordinary model: same modules, same layer types, same logits."""
    model = tiny(family)
    before = logits(model)
    expand_(model, blocks_of(model, family), 2)
    again = AutoModelForCausalLM.from_config(model.config).eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(again), before, atol=2e-6, rtol=1e-5)
    with torch.no_grad():  # a cache needs layers numbered as they stand
        ids = torch.arange(10).view(1, 10)
        step = model(input_ids=ids[:, :9], use_cache=True)
        last = model(input_ids=ids[:, 9:], past_key_values=step.past_key_values).logits
    torch.testing.assert_close(last[0, -1], before[0, -1], atol=1e-5, rtol=1e-4)


def test_plan_spreads_new_blocks_evenly() -> None:
    assert plan_expansion(4, 2) == [0, 1, 1, 2, 3, 3]
    assert plan_expansion(2, 2) == [0, 0, 1, 1]
    assert plan_expansion(5, 2) == [0, 1, 1, 2, 3, 4, 4]
    # LLaMA-Pro: 32 blocks, 8 groups, one more after each fourth.
    plan = plan_expansion(32, 8)
    assert [i for i in range(1, 40) if plan[i] == plan[i - 1]] == list(range(4, 40, 5))
    for bad in (0, 5):
        with pytest.raises(
            ConfigError, match=r"num_new_blocks=\d: a model of 4 blocks takes 1 to 4"
        ):
            plan_expansion(4, bad)


def test_quantised_base_with_trained_16_bit_blocks() -> None:
    """The order of the main path: expand, quantise all but the new blocks, adapt."""
    with torch.device("meta"):
        model = tiny("llama")
    expansion = expand_(model, blocks_of(model, "llama"), 1)
    spec = format_spec(Quant(format="nf4"))
    names = quantize_(model, spec, keep=expansion.names, kernels="eager")
    assert len(names) == NUM_BLOCKS * 7
    new = model.get_submodule(expansion.names[0])
    assert not any(isinstance(module, QuantLinear) for module in new.modules())
    summary = adapt_(
        model,
        Adapter(kind="expand", num_new_blocks=1),
        dtype=torch.float32,
        generator=torch.Generator(),
        expansion=expansion,
    )
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{expansion.names[0]}.{n}" for n, _ in new.named_parameters()}
    assert summary.num_trainable == sum(p.numel() for p in new.parameters())


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_other_families_are_refused_by_name(family: str) -> None:
    model = tiny(family)
    with pytest.raises(
        ConfigError, match=rf"not known to be an identity for {family}; it works for"
    ):
        expand_(model, blocks_of(model, family), 2)
