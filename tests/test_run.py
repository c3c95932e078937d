"""The whole path on a tiny model: learn, stop, go on, and refuse what cannot be meant."""

from __future__ import annotations

import io
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import WORDS, save_llama, save_tokenizer

from nibble import run
from nibble.errors import CheckpointError, ConfigError, DataError
from nibble.spec.config import Recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a word tokenizer, as a checkpoint folder."""
    folder = tmp_path_factory.mktemp("base")
    save_tokenizer(folder)
    save_llama(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [
        {"prompt": f"the a of w{i % 40} is", "completion": f" w{(i * 7 + 1) % 40} b"}
        for i in range(48)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def recipe(base: Path, rows: Path, out: Path, **sections: Any) -> Recipe:
    words: dict[str, Any] = {
        "model": {"path": str(base)},
        "data": {"train": [{"path": str(rows)}], "eval_rows": 8, "max_length": 32,
                 "cache_dir": str(rows.parent / "cache")},
        "optim": {"learning_rate": 2e-2, "warmup_steps": 1},
        "train": {"precision": "fp32", "micro_batch_size": 4, "gradient_accumulation_steps": 2,
                  "max_steps": 6},
        "place": {"device": "cpu"},
        "report": {"sinks": ["plain"]},
        "output_dir": str(out),
    }  # fmt: skip
    for name, section in sections.items():
        words[name] = {**words.get(name, {}), **section}
    return Recipe.model_validate(words)


def lora(**more: Any) -> dict[str, Any]:
    return {"adapter": {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.1}, **more}


def losses(folder: Path) -> dict[int, float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["loss"] for r in rows if "loss" in r}


@pytest.mark.parametrize(
    "sections",
    [
        {},
        lora(quant={"format": "nf4"}),
        lora(data={"packing": True}),
        {"adapter": {"kind": "expand", "num_new_blocks": 1}, "quant": {"format": "int8"}},
        lora(train={"precision": "bf16"}),
        {"train": {"precision": "fp16"}},
    ],
    ids=["full", "qlora", "packed", "expand-int8", "bf16", "fp16-full"],
)
def test_a_recipe_learns_and_leaves_a_whole_folder(
    sections: dict[str, Any], base: Path, data: Path, tmp_path: Path
) -> None:
    out = io.StringIO()
    given = recipe(base, data, tmp_path / "run", **sections)
    result = run.train(given, stream=out)
    outcome = result.outcome
    assert outcome.step == 6 and not outcome.interrupted
    assert outcome.eval_loss_before is not None and outcome.eval_loss_after is not None
    assert outcome.eval_loss_after < outcome.eval_loss_before - 0.3
    folder = tmp_path / "run"
    names = {p.name for p in folder.iterdir()}
    assert {"recipe.yaml", "versions.json", "metrics.jsonl", "plan.json", "data.json"} <= names
    checkpoint = folder / "checkpoint-6"
    has_adapter = (checkpoint / "adapter_model.safetensors").is_file()
    assert has_adapter == (given.adapter.kind == "lora")
    assert sorted(losses(folder)) == [1, 2, 3, 4, 5, 6]
    planned = json.loads((folder / "plan.json").read_text())
    assert planned["measured"]["host_bytes"] > 0 and planned["num_trainable"] == (
        result.summary.num_trainable
    )
    measured = planned["measured"]["phases"]
    assert list(measured) == ["load", "first step", "steady step", "evaluation", "save"]
    assert set(measured) <= set(planned["phases"])
    assert "held-out loss" in out.getvalue() and "parameters" in out.getvalue()


def test_interrupted_and_resumed_is_the_run_that_was_not(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recipe(base, data, tmp_path / "a", **lora(quant={"format": "nf4"}))
    run.train(whole, stream=io.StringIO())

    from nibble.train.loop import _Run

    step = _Run.step

    def interrupted(self: _Run, batches: Any) -> Any:
        if self.state.step == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, batches)

    monkeypatch.setattr(_Run, "step", interrupted)
    parts = recipe(base, data, tmp_path / "b", **lora(quant={"format": "nf4"}))
    out = io.StringIO()
    first = run.train(parts, stream=out)
    assert first.outcome.interrupted and first.outcome.step == 3
    assert f"nibble train {tmp_path / 'b'} --resume" in out.getvalue()
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="already holds a run"):
        run.train(parts, stream=io.StringIO())
    second = run.train(parts, resume=True, stream=io.StringIO())
    assert second.outcome.step == 6
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    for name in ("trained.safetensors", "optimizer.safetensors", "adapter_model.safetensors"):
        a, b = ((tmp_path / x / "checkpoint-6" / name).read_bytes() for x in "ab")
        assert a == b, name


def test_a_classifier_takes_its_labels_from_the_data(base: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path / "bert"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    rows = [
        {"text": f"the {'a' if i % 3 else 'b'} w{i % 40}", "label": i % 3 > 0} for i in range(60)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({**r, "label": "yes" if r["label"] else "no"}) + "\n" for r in rows)
    )
    given = recipe(
        folder, path, tmp_path / "run",
        model={"path": str(folder), "tokenizer": str(base), "task": "classification"},
        data={"max_length": 16}, train={"max_steps": 30, "activation_checkpointing": "none"},
        optim={"learning_rate": 1e-2},
    )  # fmt: skip
    result = run.train(given, stream=io.StringIO())
    assert result.outcome.eval_loss_after is not None
    assert result.outcome.eval_loss_after < 0.4
    assert json.loads((tmp_path / "run" / "data.json").read_text())["label_names"] == ["no", "yes"]


def test_rows_beyond_a_table_of_positions_are_refused(base: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(WORDS), n_embd=32, n_layer=1, n_head=2, n_positions=16)
    ).save_pretrained(folder)
    path = tmp_path / "rows.jsonl"
    long = " ".join(["w1"] * 20)
    path.write_text(json.dumps({"prompt": long, "completion": " w2"}) + "\n" * 1)
    given = recipe(
        folder, path, tmp_path / "run", model={"path": str(folder), "tokenizer": str(base)},
        data={"eval_rows": None},
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"gpt2 has 16 positions: set data.max_length=16"):
        run.train(given, stream=io.StringIO())


def test_bad_data_is_told_before_a_weight_is_read(base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    broken = tmp_path / "weights"
    broken.mkdir()
    for path in base.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    given = recipe(broken, tmp_path / "empty.jsonl", tmp_path / "run")
    with pytest.raises(DataError):
        run.train(given, stream=io.StringIO())
    run_again = recipe(base, tmp_path / "empty.jsonl", tmp_path / "run")
    with pytest.raises(DataError):  # and the folder is free again
        run.train(run_again, stream=io.StringIO())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_gpu_runs_packed_qlora_and_goes_on(
    precision: str, base: Path, data: Path, tmp_path: Path
) -> None:
    def part(max_steps: int, **more: Any) -> Recipe:
        train = {"precision": precision, "max_steps": max_steps, **more}
        sections = lora(quant={"format": "nf4"}, data={"packing": True}, train=train)
        return recipe(base, data, tmp_path / "run", **sections, place={"device": "cuda"})

    first = run.train(part(3, profile={"start_step": 2, "num_steps": 1}), stream=io.StringIO())
    second = run.train(part(6), resume=True, stream=io.StringIO())
    assert second.outcome.step == 6 and first.outcome.eval_loss_before is not None
    assert second.outcome.eval_loss_after is not None
    assert second.outcome.eval_loss_after < first.outcome.eval_loss_before - 0.3
    assert second.memory.reserved_bytes > 0
    files = {p.name for p in (tmp_path / "run" / "profile").iterdir()}
    assert files == {"trace.json.gz", "operators.txt", "memory.csv", "memory.pickle"}


def test_what_is_kept_of_activations_changes_no_loss(
    base: Path, data: Path, tmp_path: Path
) -> None:
    settings: list[dict[str, Any]] = [
        {"activation_checkpointing": "none"},
        {"activation_checkpointing": "selective", "activation_offload": True},
        {"keep_blocks": "auto"},
    ]
    found = []
    for number, train in enumerate(settings):
        folder = tmp_path / str(number)
        words = recipe(base, data, folder, **lora(), train={"max_steps": 2, **train})
        run.train(words, stream=io.StringIO())
        found.append(losses(folder))
    assert found[0] == found[1] == found[2] and len(found[0]) == 2
