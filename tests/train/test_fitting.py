"""`fit: auto` in a run: decided before anything is placed, kept in the folder, and not again."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import SPECIAL, save_llama, save_tokenizer

from nibble import run
from nibble.errors import CheckpointError, PlanError
from nibble.place import Group
from nibble.spec.config import Recipe
from nibble.spec.load import load_recipe
from nibble.train import fitting

WORDS = [*SPECIAL, *(f"w{i}" for i in range(40)), "a", "b", "is", "the"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_tokenizer(folder, WORDS)
    save_llama(folder, len(WORDS))
    rows = [
        {"prompt": f"the a w{i % 40} is", "completion": f" w{(i * 7 + 1) % 40} b"}
        for i in range(32)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words(base: Path, out: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(base), "data.train": str(base / "rows.jsonl"), "max_length": 32,
        "cache_dir": str(base / "cache"), "adapter": "lora", "optim.learning_rate": 1e-2,
        "optim.schedule": "constant", "precision": "fp32", "max_steps": 2, "device": "cpu",
        "report.sinks": ["plain"], "output_dir": str(out), "fit": {"batch_rows": 4}, **more,
    }  # fmt: skip


def losses(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_a_run_decides_once_and_goes_on_with_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(None, base=words(base, tmp_path / "run"))
    assert recipe.fit is not None
    shown = io.StringIO()
    run.train(recipe, stream=shown)
    stored = load_recipe(tmp_path / "run")
    assert stored.fit is None and stored.place.kind == "single"
    rows = stored.train.micro_batch_size * stored.train.gradient_accumulation_steps
    assert rows == 4
    # On a CPU, where no speed is known, all that costs FLOPs again is kept.
    assert stored.train.activation_checkpointing == "none" or stored.train.keep_blocks == 2
    assert "fit chose " in shown.getvalue()
    plain = load_recipe(tmp_path / "run", [f"output_dir={tmp_path / 'plain'}"])
    run.train(plain, stream=io.StringIO())
    assert losses(tmp_path / "plain") == losses(tmp_path / "run")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr(fitting, "search", never)
    longer = load_recipe(None, base=words(base, tmp_path / "run", max_steps=3))
    run.train(longer, resume=True, stream=io.StringIO())
    again = load_recipe(tmp_path / "run")
    assert again.train.max_steps == 3 and again.fit is None
    assert again.train.micro_batch_size == stored.train.micro_batch_size
    assert len(losses(tmp_path / "run")) == 3
    # What is given now is what is meant: another micro-batch would be another run.
    other = words(base, tmp_path / "run", max_steps=4, micro_batch_size=2, fit="auto",
                  gradient_accumulation_steps=1)  # fmt: skip
    with pytest.raises(CheckpointError, match="differs from"):
        run.train(load_recipe(None, base=other), resume=True, stream=io.StringIO())


def test_what_does_not_fit_leaves_nothing_behind(base: Path, tmp_path: Path) -> None:
    recipe = load_recipe(None, base=words(base, tmp_path / "run", ram="300MiB"))
    with pytest.raises(PlanError, match=r"nothing fits into 300\.0 MiB of the host"):
        run.train(recipe, stream=io.StringIO())
    assert not (tmp_path / "run").exists()


def test_a_family_without_table_and_weights_is_fitted_as_built(tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "olmo2", vocab_size=96, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=112, max_position_embeddings=64,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    values = words(tmp_path, tmp_path / "run", adapter="none")
    values["model"] = {"path": str(tmp_path), "from_scratch": True}
    recipe, lines = fitting.fitted(load_recipe(None, base=values), Group.alone(torch.device("cpu")))
    assert recipe.fit is None and lines
    assert recipe.train.micro_batch_size * recipe.train.gradient_accumulation_steps == 4


def test_choices_are_adopted_and_gifts_are_kept(base: Path, tmp_path: Path) -> None:
    given = load_recipe(None, base=words(base, tmp_path, loss_chunk_tokens=64, fit="auto"))
    stored = Recipe.model_validate(
        yaml.safe_load(
            """
            model: {path: other}
            train: {micro_batch_size: 2, gradient_accumulation_steps: 8, keep_blocks: 1,
                    loss_chunk_tokens: 512, seed: 7}
            quant: {format: nf4}
            place: {kind: stream, resident_blocks: 3, num_devices: 4}
            """
        )
    )
    adopted = fitting.adopt(given, stored)
    assert adopted.fit is None
    assert (adopted.train.micro_batch_size, adopted.train.gradient_accumulation_steps) == (2, 8)
    assert (adopted.place.kind, adopted.place.resident_blocks) == ("stream", 3)
    assert adopted.train.keep_blocks == 1 and adopted.train.loss_chunk_tokens == 64
    assert adopted.quant.format == "none" and adopted.train.seed == 0, "not among the choices"
    assert adopted.model.path == given.model.path
