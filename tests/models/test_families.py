"""Every family: built on meta, streamed tensor by tensor, and equal to transformers' own
loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nibble.errors import ConfigError, WeightError
from nibble.models import Built, build, find_ties, finish, materialise
from nibble.spec.config import Model
from nibble.weights import open_weights, stream

torch.set_num_threads(1)

VOCABULARY = 128
BODY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama3-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": 4}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma2": ("gemma2", {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 3.0}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 8,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "granite": ("granite", {"logits_scaling": 4.0}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "gpt_neox": ("gpt_neox", {}),
    "bloom": ("bloom", {"n_head": 4, "n_layer": 2}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "mixtral": ("mixtral", {"num_local_experts": 3}),
    "qwen3_moe": ("qwen3_moe", EXPERTS | {"head_dim": 8}),
    "bert-decoder": ("bert", {"is_decoder": True}),
}
CLASSIFIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {"num_labels": 3}),
    "roberta": ("roberta", {"num_labels": 3, "pad_token_id": 1}),
    "distilbert": ("distilbert", {"num_labels": 3, "dim": 32, "n_layers": 2, "n_heads": 4}),
    "llama-classifier": ("llama", {"num_labels": 2}),
}
PACKS = set(CAUSAL) - {"bloom", "bert-decoder"}


def reference(kind: str, folder: Path) -> nn.Module:
    """A random model of a kind, saved in shards as transformers would."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    model_type, extra = (CAUSAL | CLASSIFIERS)[kind]
    known = AutoConfig.for_model(model_type)
    values = {name: value for name, value in BODY.items() if name in known.to_dict()}
    config = AutoConfig.for_model(model_type, **(BODY if model_type == "bloom" else values) | extra)
    torch.manual_seed(0)
    auto = AutoModelForCausalLM if kind in CAUSAL else AutoModelForSequenceClassification
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms at 1 and biases at 0 would hide a tensor in the wrong place.
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder, max_shard_size="20kB")
    return auto.from_pretrained(folder).eval()


def load(folder: Path, **fields: Any) -> tuple[Built, list[str]]:
    """What a placement does, on one CPU."""
    built = build(Model(path=str(folder), **fields), dtype=torch.float32)
    materialise(built.model, device="cpu")
    targets = dict(built.model.named_parameters()) | dict(built.model.named_buffers())
    seen = []
    source = open_weights(built.path)
    with torch.no_grad():
        for parameter in built.model.parameters():
            parameter.fill_(float("nan"))
        for name, value in stream(
            source, built.skeleton, transposed=built.transposed, initialise=initialiser(built)
        ):
            assert isinstance(value, Tensor)
            targets[name].copy_(value)
            seen.append(name)
    return built, seen


def initialiser(built: Built) -> Callable[..., Any] | None:
    return built.initial_values if built.family.head_path is None else None


def tokens(rows: int = 2, length: int = 11) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


@pytest.mark.parametrize("kind", [*CAUSAL, *CLASSIFIERS])
def test_logits_equal_transformers(kind: str, tmp_path: Path) -> None:
    theirs = reference(kind, tmp_path)
    task = "causal-lm" if kind in CAUSAL else "classification"
    built, seen = load(tmp_path, task=task)
    assert len(seen) == len(set(seen)) == len(list(theirs.parameters()))
    input_ids = tokens()
    mask = torch.ones_like(input_ids)
    mask[1, 7:] = 0
    with torch.no_grad():
        want = theirs(input_ids=input_ids, attention_mask=mask).logits
        got = built.model(input_ids=input_ids, attention_mask=mask).logits
    if kind in CAUSAL:
        want, got = want[mask.bool()], got[mask.bool()]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(built.model.get_buffer(name), buffer, rtol=0, atol=0)
    check_family(built, kind, input_ids)


def check_family(built: Built, kind: str, input_ids: Tensor) -> None:
    """The facts of a family, against its own logits."""
    family, model = built.family, built.model
    assert len(family.blocks(model)) == 2
    assert len({type(block) for _, block in family.blocks(model)}) == 1
    assert family.can_pack == (kind in PACKS)
    assert family.max_positions in (64, None, 62, 512)
    assert family.has_position_limit == (
        kind in {"gpt2", "bert", "roberta", "distilbert", "bert-decoder"}
    )
    if kind in CLASSIFIERS:
        assert family.head(model) is None and family.logits is None
        return
    with torch.no_grad():
        want = model(input_ids=input_ids, use_cache=False).logits
        if family.logits is not None:
            hidden = family.decoder(model)(input_ids=input_ids, use_cache=False).last_hidden_state
            head = family.head(model)
            assert head is not None
            torch.testing.assert_close(family.logits(head(hidden)), want, rtol=0, atol=1e-5)
        assert (family.logits is None) == (kind == "bert-decoder")
        if family.can_pack:
            lengths = (5, 4, 2)
            positions = torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)
            packed = model(input_ids=input_ids, position_ids=positions, use_cache=False).logits
            alone = [
                model(input_ids=part, use_cache=False).logits
                for part in input_ids.split(lengths, dim=1)
            ]
            torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=0, atol=1e-5)


def test_ties_survive_and_conv1d_is_gone(tmp_path: Path) -> None:
    reference("gpt2", tmp_path)
    built, _ = load(tmp_path)
    assert built.model.lm_head.weight is built.model.transformer.wte.weight
    kinds = {type(module).__name__ for module in built.model.modules()}
    assert "Conv1D" not in kinds
    assert "transformer.h.1.mlp.c_fc.weight" in built.transposed and len(built.transposed) == 8
    assert all(parameter.is_meta for parameter in built.skeleton.parameters())


def test_ties_are_found_by_module_whatever_wraps_them(tmp_path: Path) -> None:
    reference("llama-tied", tmp_path)
    built = build(Model(path=str(tmp_path)), dtype=torch.float32)
    model = built.model
    ties = find_ties(model)
    head = model.lm_head
    model.lm_head = nn.Sequential(head)
    model.to_empty(device="cpu")
    assert head.weight is not model.model.embed_tokens.weight
    finish(model, ties=ties)
    assert head.weight is model.model.embed_tokens.weight


def test_finish_keeps_what_is_loaded(tmp_path: Path) -> None:
    reference("gemma3", tmp_path)
    built, _ = load(tmp_path)
    before = {name: value.clone() for name, value in built.model.state_dict().items()}
    buffers = {name: value.clone() for name, value in built.model.named_buffers()}
    state = torch.get_rng_state()
    finish(built.model)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in built.model.state_dict().items():
        assert torch.equal(value, before[name])
    for name, value in built.model.named_buffers():
        assert torch.equal(value, buffers[name])


def test_a_buffer_that_nobody_computes_is_an_error(tmp_path: Path) -> None:
    reference("llama", tmp_path)
    built = build(Model(path=str(tmp_path)), dtype=torch.float32)
    extra = torch.empty(3, device="meta")
    built.model.model.register_buffer("secret", extra, persistent=False)
    with pytest.raises(WeightError, match=r"model\.secret"):
        materialise(built.model, device="cpu")


@pytest.mark.parametrize("kind", ["gpt2", "qwen3_moe", "llama-tied"])
def test_from_scratch_follows_the_family(kind: str, tmp_path: Path) -> None:
    theirs = reference(kind, tmp_path)
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    built = build(Model(path=str(tmp_path), from_scratch=True), dtype=torch.float32)
    first = dict(built.random_weights(seed=3))
    again = dict(built.random_weights(seed=3))
    other = dict(built.random_weights(seed=4))
    assert set(first) == {name for name, _ in theirs.named_parameters()}
    name = (
        f"{built.family.block_path}.1."
        + {
            "gpt2": "mlp.c_proj.weight",
            "qwen3_moe": "mlp.experts.down_proj",
            "llama-tied": "mlp.down_proj.weight",
        }[kind]
    )
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first[name.replace(".1.", ".0.", 1)])
    # GPT-2 scales its residual projections down by sqrt(2 layers).
    std = 0.02 / (2.0 if kind == "gpt2" else 1.0)
    assert first[name].std().item() == pytest.approx(std, rel=0.1)
    norms = [value for n, value in first.items() if "norm" in n and n.endswith("weight")]
    assert all(torch.equal(value, torch.ones_like(value)) for value in norms)
    assert all(parameter.is_meta for parameter in built.skeleton.parameters())


def test_a_new_head_is_initialised_and_said(tmp_path: Path) -> None:
    theirs = reference("llama", tmp_path)
    built, _seen = load(tmp_path, task="classification", num_labels=5)
    assert built.model.score.weight.shape == (5, 32)
    assert built.model.score.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert torch.equal(
        built.model.model.layers[1].mlp.up_proj.weight, theirs.model.layers[1].mlp.up_proj.weight
    )
    report = stream(open_weights(tmp_path), built.skeleton, initialise=built.initial_values).report
    assert report.initialised == ("score.weight",) and report.ignored == ("lm_head.weight",)
    with pytest.raises(WeightError, match=r"lm_head\.weight"):
        stream(open_weights(tmp_path), built.skeleton)


def test_a_base_models_checkpoint_loads_without_its_prefix(tmp_path: Path) -> None:
    theirs = reference("gpt2", tmp_path / "full")
    theirs.transformer.save_pretrained(tmp_path / "base")
    built, _ = load(tmp_path / "base")
    with torch.no_grad():
        got = built.model(tokens()).logits
        torch.testing.assert_close(got, theirs(tokens()).logits, rtol=0, atol=1e-5)


def test_regression_has_one_label(tmp_path: Path) -> None:
    reference("bert", tmp_path)
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    built = build(
        Model(path=str(tmp_path), task="classification", num_labels=1, from_scratch=True),
        dtype=torch.bfloat16,
    )
    assert built.config.problem_type == "regression"
    assert {p.dtype for p in built.model.parameters()} == {torch.bfloat16}


def test_attention_that_does_not_exist_is_named(tmp_path: Path) -> None:
    reference("llama", tmp_path)
    with pytest.raises(ConfigError, match="attention=telepathy"):
        build(Model(path=str(tmp_path)), dtype=torch.float32, attention="telepathy")
