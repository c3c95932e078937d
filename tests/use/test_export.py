"""Exports, loaded by transformers and peft themselves, compute what was trained."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import small_models as small
import torch
from torch import Tensor, nn

from nibble.errors import ConfigError
from nibble.models.family import describe
from nibble.nn.adapters import adapters, dense_weight
from nibble.spec.config import Recipe
from nibble.use.divergence import divergence
from nibble.use.export import Exported, check_kind, export

CPU = torch.device("cpu")
# What float32 may lose, as a share of the largest logit: these models' own float32 logits lie up to
# 1.4e-5 from those of float64 (their norms divide by small numbers), and either side may round so.
# Training moves them by more than 1e-2.
ROUNDING = 5e-5
LORA = {"kind": "lora", "rank": 4, "dropout": 0.1}
DORA = {"kind": "dora", "rank": 4}
EXPAND = {"kind": "expand", "num_new_blocks": 1}
EXPERTS = {"keep": ["experts"]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-lora": ("llama", {"adapter": LORA}),
    "llama-dora-nf4": ("llama", {"adapter": DORA, "quant": {"format": "nf4"}}),
    "llama-lora-hqq": ("llama", {"adapter": LORA, "quant": {"format": "hqq"}}),
    "llama-expand-nf4": ("llama", {"adapter": EXPAND, "quant": {"format": "nf4"}}),
    "llama-tied-full": ("llama-tied", {}),
    "gpt2-lora-nf4": ("gpt2", {"adapter": LORA, "quant": {"format": "nf4"}}),
    "gpt2-full": ("gpt2", {}),
    "gpt2-expand": ("gpt2", {"adapter": EXPAND}),
    "bloom-lora-int8": (
        "bloom", {"adapter": {**LORA, "targets": ["query_key_value"]}, "quant": {"format": "int8"}}
    ),
    "mixtral-dora-nf4": ("mixtral", {"adapter": DORA, "quant": {"format": "nf4", **EXPERTS}}),
    "mixtral-full": ("mixtral", {}),
    "qwen3-moe-expand": ("qwen3_moe", {"adapter": EXPAND}),
    "bert-lora": ("bert", {"adapter": LORA}),
    "bert-dora-nf4": ("bert", {"adapter": DORA, "quant": {"format": "nf4"}}),
    "bert-full": ("bert", {}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


def trained_run(case: str, root: Path) -> tuple[Recipe, Path]:
    """Three steps; the settled recipe and the checkpoint. Trained once for all tests here."""
    kind, sections = CASES[case]
    base, out = root / kind, root / f"run-{case}"
    if not base.exists():
        small.save_model(kind, base)
    classify = kind == "bert"
    rows = small.labelled_file(root) if classify else small.rows_file(root)
    model = {"path": str(base), "task": "classification" if classify else "causal-lm"}
    if not out.exists():
        small.train(small.recipe(base, rows, out, model=model, **sections))
    from nibble.train.folder import read_recipe

    return read_recipe(out / "recipe.yaml"), out / "checkpoint-3"


def in_memory(recipe: Recipe) -> nn.Module:
    """The trained model as `nibble chat` loads it."""
    from nibble.cli.loading import load, resolve

    return load(resolve(recipe.output_dir, device="cpu")).model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=small.sample_ids()).logits.float()


def exported(recipe: Recipe, checkpoint: Path, kind: str, folder: Path, **more: Any) -> Exported:
    words: dict[str, Any] = {"max_divergence": 1e-3, **more}
    return export(
        recipe, small.trained_tensors(checkpoint), kind=kind, folder=folder,
        batches=small.held_out(recipe), device=CPU, **words,
    )  # fmt: skip


def loaded_by_transformers(folder: Path, task: str) -> nn.Module:
    import transformers as t

    classify = task == "classification"
    auto = t.AutoModelForSequenceClassification if classify else t.AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.float32
    return model


def loaded_by_peft(folder: Path, recipe: Recipe, trained: nn.Module) -> nn.Module:
    """peft's model over the base as transformers loads it, with the frozen weights as they were
    stored in training."""
    import transformers as t

    classify = recipe.model.task == "classification"
    auto = t.AutoModelForSequenceClassification if classify else t.AutoModelForCausalLM
    with warnings.catch_warnings():
        # peft's own words: about transformers' names, and about Conv1D's orientation.
        warnings.simplefilter("ignore")
        from peft import PeftModel

        base = auto.from_pretrained(recipe.model.path)
        with torch.no_grad():
            for name, adapter in adapters(trained).items():
                weight = dense_weight(adapter.base, torch.float32)
                module = base.get_submodule(name)
                is_conv1d = type(module).__name__ == "Conv1D"
                module.weight.copy_(weight.t() if is_conv1d else weight)
        return PeftModel.from_pretrained(base, str(folder)).eval()


@pytest.mark.parametrize("case", CASES)
def test_what_is_exported_is_what_was_trained(case: str, root: Path, tmp_path: Path) -> None:
    recipe, checkpoint = trained_run(case, root)
    trained = in_memory(recipe)
    expected = logits(trained)
    has_adapter = recipe.adapter.kind in ("lora", "dora")
    done = exported(recipe, checkpoint, "merged" if has_adapter else "hf", tmp_path / "model")
    model = loaded_by_transformers(done.folder, recipe.model.task)
    found = logits(model)
    if recipe.quant.format == "int8":
        # The trained model also rounds activations to 8 bits; a merged one cannot.
        kl = (expected.softmax(-1) * (expected.log_softmax(-1) - found.log_softmax(-1))).sum(-1)
        assert 0 < float(kl.mean()) < 1e-3
    else:
        scale = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING * max(1.0, scale))
    assert done.divergence.mean < (1e-3 if recipe.quant.format == "int8" else 1e-6)
    assert done.divergence.same_best == 1.0
    assert not [path for path in tmp_path.iterdir() if path.name != "model"]
    if has_adapter:
        peft = exported(recipe, checkpoint, "adapter", tmp_path / "adapter")
        assert peft.divergence.mean == peft.divergence.largest == 0
        if recipe.quant.format != "int8":
            theirs = logits(loaded_by_peft(peft.folder, recipe, trained))
            torch.testing.assert_close(theirs, expected, rtol=0, atol=ROUNDING * max(1.0, scale))


def test_training_changed_the_model(root: Path) -> None:
    """Else the test above would prove nothing."""
    for case in ("llama-lora", "gpt2-full", "bert-lora"):
        recipe, _ = trained_run(case, root)
        base = loaded_by_transformers(Path(recipe.model.path), recipe.model.task)
        assert float((logits(base) - logits(in_memory(recipe))).abs().max()) > 0.05


def test_the_divergence_is_the_mean_kl_over_targets(root: Path, tmp_path: Path) -> None:
    """Between two models that differ, against logits computed directly; largest and agreement
    too."""
    recipe, _ = trained_run("llama-lora", root)
    trained = in_memory(recipe)
    base = loaded_by_transformers(Path(recipe.model.path), recipe.model.task)
    batches = small.held_out(recipe)
    found = divergence(trained, base, family=describe(base), batches=batches)
    values, same = [], []
    with torch.no_grad():
        for batch in batches:
            words = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            targets = batch.labels != -100
            p = trained(**words).logits[targets].double().log_softmax(-1)
            q = base(**words).logits[targets].double().log_softmax(-1)
            values.append((p.exp() * (p - q)).sum(-1))
            same.append(p.argmax(-1) == q.argmax(-1))
    kl, best = torch.cat(values), torch.cat(same)
    assert found.num_targets == kl.numel() == sum(batch.num_targets for batch in batches)
    assert found.mean == pytest.approx(float(kl.mean()), rel=1e-4) and found.mean > 1e-3
    assert found.largest == pytest.approx(float(kl.max()), rel=1e-4)
    assert found.same_best == pytest.approx(float(best.double().mean()))


def test_a_classifier_says_what_its_classes_mean(root: Path, tmp_path: Path) -> None:
    recipe, checkpoint = trained_run("bert-full", root)
    assert recipe.model.num_labels == 3
    names = ("no", "perhaps", "yes")
    done = exported(recipe, checkpoint, "hf", tmp_path / "m", label_names=names)
    config = json.loads((done.folder / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "perhaps", "2": "yes"}
    assert config["architectures"] == ["BertForSequenceClassification"]


def test_tied_embeddings_are_written_once(root: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    recipe, checkpoint = trained_run("llama-tied-full", root)
    done = exported(recipe, checkpoint, "hf", tmp_path / "m")
    with safe_open(done.folder / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    model: Any = loaded_by_transformers(done.folder, "causal-lm")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_16_bit_runs_are_exported_in_16_bits(root: Path, tmp_path: Path) -> None:
    """The one type that merging rounds to; the divergence stays within the default bound."""
    base = root / "llama-bf16"
    small.save_model("llama", base, dtype=torch.bfloat16)
    given = small.recipe(
        base, small.rows_file(root), tmp_path / "run", adapter=LORA, train={"precision": "bf16"}
    )
    recipe, checkpoint = small.train(given)
    done = exported(recipe, checkpoint, "merged", tmp_path / "m", max_divergence=0.05)
    import transformers as t

    model = t.AutoModelForCausalLM.from_pretrained(done.folder)
    assert model.dtype == torch.bfloat16
    assert 0 < done.divergence.mean < 0.05
    assert done.num_bytes >= sum(p.numel() * 2 for p in model.parameters())


@pytest.mark.parametrize(
    ("adapter", "kind", "message"),
    [
        ("lora", "hf", r"--to hf is for runs that trained the model itself.*--to merged"),
        ("none", "merged", r"--to merged needs a LoRA or DoRA adapter.*whole model: use --to hf"),
        ("expand", "adapter", r"--to adapter needs a LoRA.*new blocks: use --to hf"),
        ("lora", "gguf", r"--to gguf is none of adapter, merged, hf"),
    ],
)
def test_an_export_that_a_run_does_not_have_is_refused(
    adapter: str, kind: str, message: str
) -> None:
    recipe = Recipe.model_validate({"model": {"path": "m"}, "adapter": {"kind": adapter}})
    with pytest.raises(ConfigError, match=message):
        check_kind(kind, recipe)
