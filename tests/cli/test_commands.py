"""Every command, from its words to its files, on a model that trains in a second."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import Nibble, write_recipe, write_rows

HEAVY = ("torch", "transformers", "numpy", "safetensors", "datasets")


def numbers(out: str) -> dict[str, float]:
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def test_train_shows_plan_progress_and_what_to_do_next(
    nibble: Nibble, world: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    done = nibble(
        "train", world / "recipe.yaml", f"output_dir={out}", "--train.max_steps", "2",
        "adapter.rank=2",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    stored = (out / "recipe.yaml").read_text()
    assert "max_steps: 2" in stored and "rank: 2" in stored
    assert (out / "checkpoint-2" / "adapter_model.safetensors").is_file()
    for text in ("held-out loss", "planned", f"nibble chat {out}", f"nibble export {out} --to"):
        assert text in done.out
    assert "parameters" in done.out and "Warning" not in done.out


def test_a_second_run_into_the_same_folder_is_refused(
    nibble: Nibble, world: Path, run: Path
) -> None:
    before = sorted(run.iterdir())
    done = nibble("train", world / "recipe.yaml")
    assert done.code == 1 and done.err.count("\n") == 1
    assert "already holds a run: go on with --resume" in done.err
    assert sorted(run.iterdir()) == before


def test_dry_run_and_plan_read_no_weights(nibble: Nibble, world: Path, tmp_path: Path) -> None:
    broken = tmp_path / "headless"
    broken.mkdir()
    for name in ("config.json",):
        (broken / name).write_bytes((world / "base" / name).read_bytes())
    words = (world / "recipe.yaml", f"model.path={broken}", f"output_dir={tmp_path / 'x'}")
    dry = nibble("train", *words, "--dry-run")
    assert dry.code == 0 and f"path: {broken}" in dry.out and "MiB" in dry.out
    assert not (tmp_path / "x").exists()
    shown = nibble("plan", *words)
    assert shown.code == 0 and "MiB" in shown.out
    told = nibble("plan", *words, "--json")
    plan = json.loads(told.out)
    assert plan["num_trainable"] == 2 * 4 * sum((64 + 64, 64 + 32, 64 + 32, 64 + 64, 3 * 192))


def test_interrupted_and_resumed_equals_the_straight_run(world: Path, tmp_path: Path) -> None:
    """A real Ctrl-C to a real process: exit code 130, and then every byte as if it had not been."""
    command = [sys.executable, "-m", "nibble", "train", str(world / "recipe.yaml")]
    more = ["train.max_steps=40", "adapter.dropout=0.1"]
    straight = [*command, *more, f"output_dir={tmp_path / 'a'}"]
    assert subprocess.run(straight, capture_output=True, timeout=240).returncode == 0
    parts = [*command, *more, f"output_dir={tmp_path / 'b'}"]
    process = subprocess.Popen(parts, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "b" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.is_file() and '"step": 3,' in metrics.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert f"go on with: nibble train {tmp_path / 'b'} --resume" in out
    assert "Traceback" not in err
    resumed = [sys.executable, "-m", "nibble", "train", str(tmp_path / "b"), "--resume"]
    done = subprocess.run(resumed, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stdout
    for name in (
        "trained.safetensors",
        "optimizer.safetensors",
        "rng.pt",
        "adapter_model.safetensors",
    ):
        a, b = (tmp_path / x / "checkpoint-40" / name for x in "ab")
        assert a.read_bytes() == b.read_bytes(), name


def test_eval_of_held_out_rows_text_and_a_data_set(nibble: Nibble, world: Path, run: Path) -> None:
    own = nibble("eval", run, "--json")
    assert own.code == 0
    scores = numbers(own.out)
    assert scores["rows"] == 8 and scores["perplexity"] == pytest.approx(
        float(torch.tensor(scores["loss"], dtype=torch.float64).exp())
    )
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert scores["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    base = numbers(nibble("eval", run, "--base", "--json").out)
    assert base["loss"] > scores["loss"] + 0.1
    text = nibble("eval", run, "--text", world / "text.txt", "--context-length", "32", "--json")
    assert numbers(text.out)["context_length"] == 32 and text.err == ""
    shown = nibble("eval", run, "--text", world / "text.txt")
    assert shown.out.startswith("perplexity") and "tokens" in shown.out
    rows = nibble("eval", run, "--data", world / "rows.jsonl", "--num-rows", "5", "--json")
    assert numbers(rows.out)["rows"] == 5
    plain = nibble("eval", world / "plain", "--data", world / "rows.jsonl", "--json")
    assert plain.code == 0 and numbers(plain.out)["rows"] == 48


def test_eval_answers_rows_for_rouge(nibble: Nibble, run: Path) -> None:
    done = nibble("eval", run, "--rouge", "2", "--json")
    scores = numbers(done.out)
    assert scores["answers"] == 2 and 0 <= scores["rougeL"] <= 100


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_export_says_where_how_large_and_how_far(
    kind: str, nibble: Nibble, run: Path, tmp_path: Path
) -> None:
    done = nibble("export", run, "--to", kind, "--out", tmp_path / kind)
    assert (done.code, done.err) == (0, "")
    assert f"{tmp_path / kind}: " in done.out and "MiB" in done.out
    assert "distance from the trained model on 24 held-out tokens" in done.out
    again = nibble("eval", tmp_path / kind, "--text", run.parent / "text.txt", "--json")
    own = nibble("eval", run, "--text", run.parent / "text.txt", "--json")
    # The adapter stands on the original base there, and on the quantised one in the run.
    near = 1e-2 if kind == "merged" else 0.5
    assert numbers(again.out)["loss"] == pytest.approx(numbers(own.out)["loss"], abs=near)


def test_export_of_a_run_trained_in_full(nibble: Nibble, world: Path, tmp_path: Path) -> None:
    out = tmp_path / "full"
    words = ("quant.format=none", "adapter.kind=none", f"output_dir={out}")
    assert nibble("train", world / "recipe.yaml", *words).code == 0
    measured = ("--text", world / "text.txt", "--json")
    asked = numbers(nibble("eval", out, *measured).out)
    untrained = numbers(nibble("eval", world / "base", *measured).out)
    assert abs(asked["loss"] - untrained["loss"]) > 0.1
    assert numbers(nibble("eval", out, "--base", *measured).out) == untrained
    done = nibble("export", out, "--to", "hf")
    assert done.code == 0 and (out / "export-hf" / "model.safetensors").is_file()
    assert numbers(nibble("eval", out / "export-hf", *measured).out) == asked


def test_a_checkpoint_of_a_run_can_be_named(nibble: Nibble, run: Path) -> None:
    whole = numbers(nibble("eval", run, "--json").out)
    part = numbers(nibble("eval", run / "checkpoint-3", "--json").out)
    assert part == whole


def test_a_classifier_is_trained_measured_and_exported(
    nibble: Nibble, classifier: Path, tmp_path: Path
) -> None:
    own = numbers(nibble("eval", classifier, "--json").out)
    assert own["rows"] == 12 and own["accuracy"] == 1.0 and "macro_f1" in own
    # A set that lacks a class keeps the ids of the others.
    two = tmp_path / "two.jsonl"
    lines = (classifier.parent / "labelled.jsonl").read_text().splitlines(keepends=True)
    two.write_text("".join(line for line in lines if '"no"' not in line))
    assert numbers(nibble("eval", classifier, "--data", two, "--json").out)["accuracy"] == 1.0
    strange = tmp_path / "strange.jsonl"
    strange.write_text(two.read_text().replace('"yes"', '"sure"'))
    refused = nibble("eval", classifier, "--data", strange)
    assert refused.code == 1 and "'sure' is none of the model's: no, perhaps, yes" in refused.err
    talk = nibble("chat", classifier, "--prompt", "hi")
    assert talk.code == 2 and "classifies and cannot talk" in talk.err
    for kind in ("merged", "adapter"):
        done = nibble("export", classifier, "--to", kind, "--out", tmp_path / kind)
        assert done.code == 0 and "on 8 held-out rows" in done.out
    found = numbers(nibble("eval", tmp_path / "merged", "--data", two, "--json").out)
    assert found["accuracy"] == 1.0
    # peft's files have no place for the classes' names: two words for three classes say nothing.
    refused = nibble("eval", tmp_path / "adapter", "--data", two)
    assert refused.code == 1 and "3 classes without names" in refused.err
    whole = ("--data", classifier.parent / "labelled.jsonl", "--json")
    assert numbers(nibble("eval", tmp_path / "adapter", *whole).out)["accuracy"] == 1.0
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "perhaps", "2": "yes"}


def test_a_decoder_classifies_by_its_last_token(
    nibble: Nibble, world: Path, tmp_path: Path
) -> None:
    """Its config names no padding, as those of most decoders; rows of different length, so that
    reading at the padding would show."""
    folder = tmp_path / "decoder"
    shutil.copytree(world / "base", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    rows = [
        {"text": "w3 " * (i % 4) + f"the w{i % 40} {'abc'[i % 3]}", "label": "xyz"[i % 3]}
        for i in range(60)
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    recipe = write_recipe(
        tmp_path / "recipe.yaml", folder, data, tmp_path / "run", model={"task": "classification"},
        data={"eval_rows": 12, "max_length": 16}, adapter={"kind": "lora", "rank": 4},
        train={"max_steps": 30}, optim={"learning_rate": 1e-2},
    )  # fmt: skip
    assert nibble("train", recipe).code == 0
    batched = numbers(nibble("eval", tmp_path / "run", "--data", data, "--json").out)
    assert batched["accuracy"] > 0.6
    assert nibble("export", tmp_path / "run").code == 0
    merged = tmp_path / "run" / "export-merged"
    assert json.loads((merged / "config.json").read_text())["pad_token_id"] == 0
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    tokenizer = AutoTokenizer.from_pretrained(merged)
    right = 0
    for row in rows:
        best = model(**tokenizer([row["text"]], return_tensors="pt")).logits.argmax(-1)
        right += model.config.id2label[int(best)] == row["label"]
    assert right / 60 == pytest.approx(batched["accuracy"])


def test_recipes_fields_doctor_and_version(nibble: Nibble) -> None:
    listed = nibble("recipes")
    assert listed.code == 0 and "qlora" in listed.out
    text = nibble("recipes", "qlora")
    assert text.code == 0 and "adapter:" in text.out
    fields = nibble("recipes", "--fields")
    assert "train.micro_batch_size: " in fields.out and "Rows in one pass" in fields.out
    unknown = nibble("recipes", "qlorra")
    assert unknown.code == 2 and "qlora" in unknown.err
    from nibble import __version__

    assert nibble("version").out == f"{__version__}\n"
    doctor = nibble("doctor")
    assert "torch" in doctor.out


@pytest.mark.parametrize(
    "words",
    [
        ["--help"], [], ["train", "--help"], ["chat", "--help"], ["eval", "--help"], ["version"],
        ["export", "--help"], ["tran"], ["train"], ["train", "nowhere.yaml"],
        ["train", "qlora", "trian.max_steps=3"], ["plan", "qlora", "train.max_steps=many"],
        ["chat", "x", "--temperature", "hot"], ["recipes"], ["recipes", "qlora"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_help_and_usage_errors_import_nothing_heavy(words: list[str]) -> None:
    program = (
        "import sys\n"
        "from nibble.cli import main\n"
        f"code = main({words!r})\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60,
        env={**os.environ, "COLUMNS": "100"},
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == "[]"
    is_error = words in ([], ["tran"], ["train"]) or any(
        word in ("nowhere.yaml", "trian.max_steps=3", "train.max_steps=many", "hot")
        for word in words
    )
    assert done.returncode == (2 if is_error else 0)
    assert "Traceback" not in done.stderr


def test_nothing_but_the_run_speaks(world: Path, tmp_path: Path) -> None:
    """In a process of its own, as a person starts it: no library's bar, hint or warning."""
    out = str(tmp_path / "run")
    commands = [
        ["train", str(world / "recipe.yaml"), f"output_dir={out}"],
        ["chat", out, "--prompt", "the a", "--max-new-tokens", "3", "--temperature", "1"],
        ["export", out, "--to", "merged"],
        ["export", out, "--to", "adapter"],
        ["eval", out, "--text", str(world / "text.txt")],
    ]
    program = f"from nibble.cli import main\nfor words in {commands!r}: assert main(words) == 0"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=240
    )
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("Warning", "it/s", "Loading", "Materializing", "Writing"):
        assert word not in done.stdout
