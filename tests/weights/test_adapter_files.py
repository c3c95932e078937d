"""Adapter folders that the real peft wrote and reads, both ways, with equal logits."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from nibble.errors import CheckpointError, ConfigError, WeightError
from nibble.nn.adapters import adapt_, adapters
from nibble.spec.config import Adapter, Task
from nibble.weights import adapter_files
from nibble.weights.adapter_files import load_adapter, read_adapter_config, save_adapter

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

LLAMA = LlamaConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_labels=3,
    pad_token_id=0,
)
BLOOM = BloomConfig(vocab_size=48, hidden_size=32, n_layer=2, n_head=4)
NEOX = GPTNeoXConfig(
    vocab_size=48,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
)
SELF = ("q_proj", "o_proj", "down_proj")
ALL = ("all-linear",)
QKV = ("query_key_value",)
LM_EXTRA = ("embed_tokens", "lm_head")

# name -> (model class, its config, the recipe's adapter section)
CASES: dict[str, tuple[Any, Any, Adapter]] = {
    "plain": (LlamaForCausalLM, LLAMA, Adapter(kind="lora", rank=4, alpha=6.5, targets=ALL)),
    "rslora": (
        LlamaForCausalLM,
        LLAMA,
        Adapter(kind="lora", rank=9, alpha=4, rank_stabilised=True, targets=SELF),
    ),
    "dora": (LlamaForCausalLM, LLAMA, Adapter(kind="dora", rank=4, alpha=8, targets=ALL)),
    "dora-rslora": (
        LlamaForCausalLM,
        LLAMA,
        Adapter(kind="dora", rank=4, alpha=3, rank_stabilised=True, targets=SELF),
    ),
    "expression": (
        LlamaForCausalLM,
        LLAMA,
        Adapter(kind="lora", rank=4, targets=(r".*layers\.1\..*_proj",), dropout=0.1),
    ),
    "saved-modules": (
        LlamaForCausalLM,
        LLAMA,
        Adapter(kind="lora", rank=4, targets=SELF, modules_to_save=LM_EXTRA),
    ),
    "dora-saved-norms": (
        LlamaForCausalLM,
        LLAMA,
        Adapter(
            kind="dora", rank=4, targets=ALL, modules_to_save=("input_layernorm", "model.norm")
        ),
    ),
    "classifier": (LlamaForSequenceClassification, LLAMA, Adapter(kind="lora", rank=4)),
    "bloom": (BloomForCausalLM, BLOOM, Adapter(kind="lora", rank=4, targets=QKV)),
    "bloom-dora": (BloomForCausalLM, BLOOM, Adapter(kind="dora", rank=4, targets=ALL)),
    "gpt-neox": (GPTNeoXForCausalLM, NEOX, Adapter(kind="lora", rank=4, targets=QKV)),
    "gpt-neox-dora": (GPTNeoXForCausalLM, NEOX, Adapter(kind="dora", rank=4, targets=QKV)),
}
EACH = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def base_model(case: str) -> tuple[PreTrainedModel, Adapter, Task]:
    model_class, config, adapter = CASES[case]
    model = model_class(copy.deepcopy(config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    task: Task = "classification" if "Sequence" in model_class.__name__ else "causal-lm"
    return model.eval(), adapter, task


def scramble_(model: torch.nn.Module) -> None:
    """Values that training could have left: nothing at zero, nothing equal."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(1, 21).view(2, 10)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def ours(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    adapt_(model, adapter, dtype=torch.float32, generator=torch.Generator().manual_seed(2))
    return model


def peft_config(adapter: Adapter, task: Task, **more: Any) -> LoraConfig:
    targets: Any = list(adapter.targets)
    if len(targets) == 1 and (targets == list(ALL) or "*" in targets[0]):
        targets = targets[0]
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rank_stabilised,
        use_dora=adapter.kind == "dora",
        target_modules=targets,
        modules_to_save=list(adapter.modules_to_save) or None,
        task_type={"causal-lm": "CAUSAL_LM", "classification": "SEQ_CLS"}[task],
        **more,
    )


def peft_adapter(case: str, folder: Path, **more: Any) -> torch.Tensor:
    """Let peft train (at random) and save to `folder`; its logits."""
    model, adapter, task = base_model(case)
    wrapped = get_peft_model(model, peft_config(adapter, task, **more))
    scramble_(wrapped)
    wrapped.save_pretrained(str(folder))
    return logits(wrapped)


@EACH
def test_peft_loads_ours(case: str, tmp_path: Path) -> None:
    model, adapter, task = base_model(case)
    before = logits(model)
    scramble_(ours(model, adapter))
    save_adapter(model, tmp_path, base_name="some/model", adapter=adapter, task=task)
    theirs = PeftModel.from_pretrained(base_model(case)[0], str(tmp_path))
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-5)
    assert (logits(model) - before).abs().max() > 1e-2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@EACH
def test_we_load_pefts(case: str, tmp_path: Path) -> None:
    expected = peft_adapter(case, tmp_path)
    model, adapter, _ = base_model(case)
    read = read_adapter_config(tmp_path)
    assert (read.kind, read.rank, read.alpha) == (adapter.kind, adapter.rank, adapter.alpha)
    assert (read.rank_stabilised, read.dropout) == (adapter.rank_stabilised, adapter.dropout)
    load_adapter(ours(model, read), tmp_path)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


@EACH
def test_our_files_have_pefts_tensors_and_their_own_round_trip(case: str, tmp_path: Path) -> None:
    peft_adapter(case, tmp_path / "theirs")
    model, adapter, task = base_model(case)
    scramble_(ours(model, adapter))
    save_adapter(model, tmp_path / "ours", base_name=None, adapter=adapter, task=task)
    file = "adapter_model.safetensors"
    stored, theirs = load_file(tmp_path / "ours" / file), load_file(tmp_path / "theirs" / file)
    assert {k: t.shape for k, t in stored.items()} == {k: t.shape for k, t in theirs.items()}

    again = base_model(case)[0]
    load_adapter(ours(again, read_adapter_config(tmp_path / "ours")), tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("case", ["plain", "dora", "bloom-dora"])
def test_gradients_and_dropout_are_pefts(case: str, tmp_path: Path) -> None:
    """The same adapter, the same batch, the same random numbers: the same gradients."""
    base, adapter, task = base_model(case)
    adapter = adapter.model_copy(update={"dropout": 0.3})
    theirs = get_peft_model(base, peft_config(adapter, task))
    scramble_(theirs)
    theirs.save_pretrained(str(tmp_path))
    model = ours(base_model(case)[0], adapter)
    load_adapter(model, tmp_path)
    ids = torch.arange(1, 21).view(2, 10)
    for each in (theirs, model):
        torch.manual_seed(4)
        each.train()
        each(input_ids=ids).logits.square().mean().backward()
    named = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters()}
    for name, module in adapters(model).items():
        prefix = f"base_model.model.{name}"
        pairs = [
            (module.lora_A, named[f"{prefix}.lora_A.weight"]),
            (module.lora_B, named[f"{prefix}.lora_B.weight"]),
        ]
        if module.magnitude is not None:
            pairs.append((module.magnitude, named[f"{prefix}.lora_magnitude_vector.weight"]))
        for parameter, wanted in pairs:
            assert parameter.grad is not None
            error = (parameter.grad - wanted).norm() / wanted.norm()
            assert error < 1e-4, (name, error)


def test_tied_weights_trained_together_are_written_twice(tmp_path: Path) -> None:
    config = copy.deepcopy(LLAMA)
    config.tie_word_embeddings = True
    adapter = CASES["saved-modules"][2]
    model = ours(LlamaForCausalLM(config), adapter)
    base = LlamaForCausalLM(config)
    base.load_state_dict(
        {n.replace(".base.", "."): p for n, p in model.state_dict().items() if "lora" not in n}
    )
    scramble_(model)
    save_adapter(model, tmp_path, base_name=None, adapter=adapter, task="causal-lm")
    with pytest.warns(UserWarning, match="tie"):
        theirs = PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"bias": "all"}, "bias"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    more: dict[str, Any], name: str, tmp_path: Path
) -> None:
    peft_adapter("rslora" if "init" in name else "plain", tmp_path, **more)
    with pytest.raises(WeightError, match=name):
        read_adapter_config(tmp_path)


def test_options_that_narrow_the_targets_are_honoured(tmp_path: Path) -> None:
    expected = peft_adapter("dora-rslora", tmp_path, layers_to_transform=[1])
    read = read_adapter_config(tmp_path)
    assert set(read.targets) == {
        f"model.layers.1.{n}" for n in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    }
    model = ours(base_model("dora-rslora")[0], read)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def test_pefts_letter_by_letter_endings_are_honoured(tmp_path: Path) -> None:
    """To peft, modules_to_save=["norm"] also means every ..._layernorm."""
    model, adapter, task = base_model("rslora")
    adapter = adapter.model_copy(update={"modules_to_save": ("norm",)})
    theirs = get_peft_model(model, peft_config(adapter, task))
    scramble_(theirs)
    theirs.save_pretrained(str(tmp_path))
    read = read_adapter_config(tmp_path)
    assert len(read.modules_to_save) == 5 and "norm" in read.modules_to_save
    again = ours(base_model("rslora")[0], read)
    load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again), logits(theirs), atol=1e-5, rtol=1e-5)


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_foreign_and_damaged_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match="is not a saved adapter"):
        read_adapter_config(tmp_path)
    peft_adapter("plain", tmp_path)
    edit(tmp_path, invented_option={"a": 1})
    with pytest.raises(WeightError, match=r"invented_option=\{'a': 1\} cannot be honoured"):
        read_adapter_config(tmp_path)
    edit(tmp_path, invented_option=None, peft_type="IA3")
    with pytest.raises(WeightError, match="peft_type is IA3; only LORA"):
        read_adapter_config(tmp_path)
    edit(tmp_path, peft_type="LORA")
    weights = tmp_path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightError, match="damaged or truncated"):
        read_adapter_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(WeightError, match="not readable JSON"):
        read_adapter_config(tmp_path)


def test_an_adapter_that_does_not_fit_leaves_the_model_alone(tmp_path: Path) -> None:
    peft_adapter("plain", tmp_path)
    adapter = read_adapter_config(tmp_path)

    def refused(change: dict[str, Any], message: str) -> None:
        model = ours(base_model("plain")[0], adapter.model_copy(update=change))
        before = {name: p.clone() for name, p in model.named_parameters()}
        with pytest.raises(WeightError, match=message):
            load_adapter(model, tmp_path)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())

    refused({"targets": ("q_proj",)}, r"has no place \(0 missing, 24 left over\)")
    refused({"modules_to_save": ("norm",)}, r"norm.weight is missing \(1 missing, 0 left over\)")
    refused({"alpha": 1.0}, r"scaled by 1.625, .* scaled by 0.25")
    refused({"kind": "dora"}, r"is lora scaled by .* is dora")
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    last = sorted(tensors)[-1]
    save_file(tensors | {last: tensors[last][:-1].clone()}, weights)
    refused({}, r"has shape \(\d+, 4\), the model needs|has shape")


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter, task = base_model("plain")
    ours(model, adapter)
    save_adapter(model, tmp_path, base_name=None, adapter=adapter, task=task)

    def full(_tensors: object, path: Path, **_rest: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter_files, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_adapter(model, tmp_path, base_name=None, adapter=adapter, task=task)
    # The old weights are whole, and without a config nothing takes them for the new adapter.
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_model.safetensors"]
    with pytest.raises(ConfigError, match="export the merged model"):
        save_adapter(
            model, tmp_path, base_name=None, adapter=Adapter(kind="expand"), task="causal-lm"
        )
