"""Low-rank recipes from a user's command to a checkpoint: they learn, stop, go on, and classify."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from same_state import assert_equal

from nibble import run
from nibble.errors import ConfigError
from nibble.spec.config import MethodName, Recipe
from nibble.spec.load import load_recipe

WORDS = ["the cat", "sat on", "a mat", "and saw", "the dog", "run to", "a tree", "by night"]
CHANCE = 5.55
"""ln 257: the loss of a model that knows nothing."""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("nibble.data.stream.BLOCK_ROWS", 32)
        yield


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = (" ".join(WORDS[(i * k) % 8] for k in range(1, 30)) + "." for i in range(1, 60))
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory, cache: None) -> Path:
    """A Llama smaller than any of the built-in ones, as a folder without weights."""
    from nibble.spec.builtin_models import config_of

    folder = tmp_path_factory.mktemp("shape")
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "vocab_size": 320, "eos_token_id": 256}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**config_of("builtin:llama-9m"), **small}))
    return folder


def recipe(shape: Path, texts: Path, out: Path, *words: str, steps: int = 12) -> Recipe:
    gap = () if "optim.rank=null" in words else ("optim.rank=8", "optim.refresh_every=4")
    return load_recipe(
        "pretrain",
        [
            f"model.path={shape}", "model.tokenizer=builtin:bytes", f"data.train={texts}",
            "data.max_length=32", "data.eval_tokens=512", *gap,
            "train.precision=fp32", "train.micro_batch_size=4",
            "train.gradient_accumulation_steps=2", f"train.max_tokens={steps * 8 * 32}",
            "train.eval_every=null", "train.save_every=5", "place.device=cpu",
            "report.sinks=plain", f"output_dir={out}", *words,
        ],
    )  # fmt: skip


def trained(given: Recipe) -> run.RunResult:
    return run.train(given, stream=io.StringIO())


METHODS = [name for name in MethodName.__args__ if name != "none"]
LORA = ("optim.method=none", "optim.rank=null", "adapter.kind=lora", "adapter.rank=8",
        "adapter.modules_to_save=[embed_tokens,lm_head,norm,input_layernorm,"
        "post_attention_layernorm]")  # fmt: skip
ROWS: dict[str, tuple[str, ...]] = {
    **{name: (f"optim.method={name}",) for name in METHODS},
    "apollo-mini": ("optim.method=apollo-mini", "optim.rank=1"),
    "full": ("optim.method=none", "optim.rank=null"),
    "full-8bit": ("optim.method=none", "optim.rank=null", "optim.name=adamw8bit"),
    "adafactor": ("optim.name=adafactor",),
    "lion": ("optim.name=lion", "optim.learning_rate=5e-3", "optim.betas=[0.9, 0.99]"),
    "randomised": ("optim.basis=randomised",),
    "layerwise-8bit": ("optim.method=galore8bit", "optim.layerwise=true"),
    "layerwise-bf16": ("optim.layerwise=true", "train.precision=bf16"),
    "lora": (*LORA, "optim.learning_rate=1e-2"),
    "relora": (
        *LORA,
        "optim.restart_every=4",
        "optim.restart_warmup_steps=2",
        "optim.learning_rate=1e-2",
    ),
    "factorised": (
        "optim.method=none",
        "optim.rank=null",
        "adapter.kind=factorised",
        "adapter.rank=8",
        "optim.learning_rate=2e-2",
    ),
    "int8": ("optim.method=q-galore", "optim.weights=int8", "train.precision=bf16"),
    "int8-layerwise": ("optim.weights=int8", "optim.layerwise=true", "optim.basis=randomised"),
    "lazy-int4": ("optim.lazy_threshold=0.3", "optim.basis_storage=int4", "optim.layerwise=true"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_learns_and_resumes_to_the_byte(
    name: str, shape: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at step 5 of 12, between two refreshes, and across the next."""
    result = trained(recipe(shape, texts, tmp_path / "a", *ROWS[name]))
    assert result.outcome.step == 12
    before, after = result.outcome.eval_loss_before, result.outcome.eval_loss_after
    assert before is not None and after is not None
    assert abs(before - CHANCE) < 0.4 and after < 4.2

    from nibble.train.loop import _Run

    step = _Run.step

    def interrupted(self: _Run, batches: Any) -> Any:
        if self.state.step == 4:
            signal.raise_signal(signal.SIGINT)
        return step(self, batches)

    again = recipe(shape, texts, tmp_path / "b", *ROWS[name])
    monkeypatch.setattr(_Run, "step", interrupted)
    assert trained(again).outcome.step == 5
    monkeypatch.undo()
    assert run.train(again, resume=True, stream=io.StringIO()).outcome.step == 12
    one, two = (tmp_path / x / "checkpoint-12" for x in "ab")
    assert {file.name for file in one.iterdir()} == {file.name for file in two.iterdir()}
    for file in one.glob("*.safetensors"):
        assert_equal(load_file(file), load_file(two / file.name))
    numbers = [json.loads((x / "optimizer.json").read_text()) for x in (one, two)]
    assert numbers[0] == numbers[1]


def test_restarts_change_the_base_and_begin_again(shape: Path, texts: Path, tmp_path: Path) -> None:
    words = (*ROWS["relora"], "train.save_every=1", "train.keep_checkpoints=20")
    trained(recipe(shape, texts, tmp_path / "a", *words))
    at = {n: load_file(tmp_path / f"a/checkpoint-{n}/trained.safetensors") for n in range(1, 13)}
    base = "model.layers.0.self_attn.q_proj.base.weight"
    a, b = (base.replace("base.weight", f"lora_{x}") for x in "AB")
    assert torch.equal(at[1][base], at[3][base])
    assert not torch.equal(at[3][base], at[4][base]) and torch.equal(at[4][base], at[7][base])
    assert not at[4][b].any() and at[6][b].any() and not at[8][b].any()
    assert not torch.equal(at[4][a], at[8][a])
    assert torch.linalg.matrix_rank(at[8][base] - at[1][base]) == 16  # two updates of rank 8
    assert at[12][b].any()  # nothing is begun at the end
    rows = [json.loads(x) for x in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    rates = [row["learning_rate"] for row in rows if "learning_rate" in row]
    assert rates[4] == 0 and rates[5] == pytest.approx(rates[6] / 2, rel=0.3) and rates[8] == 0


def test_an_evaluation_reports_perplexity_and_tokens(
    shape: Path, texts: Path, tmp_path: Path
) -> None:
    out = io.StringIO()
    given = recipe(shape, texts, tmp_path / "a", "train.eval_every=2", steps=4)
    run.train(given, stream=out)
    rows = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    evals = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evals] == [0, 2, 4]
    assert [row["tokens_seen"] for row in evals] == [0, 2 * 256, 4 * 256]
    for row in evals:
        assert row["eval_perplexity"] == pytest.approx(2.718281828 ** row["eval_loss"])
    text = out.getvalue()
    assert "perplexity" in text
    assert "projected to rank 8 (basis svd, residual none): 14 tensors" in text
    assert "not projected, embeddings and heads: 2 tensors" in text
    assert "not projected, vectors and biases: 5 tensors" in text


def test_a_built_in_shape_takes_the_tokenizers_vocabulary(texts: Path, tmp_path: Path) -> None:
    given = recipe(Path("builtin:llama-9m"), texts, tmp_path / "a", steps=1)
    result = trained(given)
    stored = load_recipe(tmp_path / "a")
    assert stored.model.vocab_size == 320 and stored.model.path == "builtin:llama-9m"
    assert result.plan is not None and result.plan.num_total == result.summary.num_total
    assert result.summary.num_total == 2 * 320 * 128 + 128 + 4 * (4 * 128**2 + 3 * 128 * 352 + 256)
    # It resumes with the words that it was started with.
    assert run.train(given, resume=True, stream=io.StringIO()).outcome.step == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("optim.rank=65",), "optim.rank=65 projects nothing: .*a side of 64"),
        (("optim.targets=[q_prj]",), "'q_prj' names no trained matrix; there are .*q_proj"),
    ],
)
def test_what_fits_no_matrix_is_refused_before_weights(
    shape: Path, texts: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        trained(recipe(shape, texts, tmp_path / "a", *words))


def test_fine_tuning_and_a_classification_by_galore(
    shape: Path, texts: Path, tmp_path: Path
) -> None:
    """The galore recipe goes on with a pretrained model, and GLUE's shape takes the same words."""
    first = trained(recipe(shape, texts, tmp_path / "a", "optim.method=none", "optim.rank=null"))
    from nibble.cli import main

    assert main(["export", str(tmp_path / "a"), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{WORDS[i % 8]} ", "completion": WORDS[(i + 1) % 8]} for i in range(64)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [f"model.path={tmp_path / 'hf'}", "optim.rank=8", "optim.refresh_every=3",
              "train.precision=fp32", "train.micro_batch_size=8", "place.device=cpu",
              "train.gradient_accumulation_steps=1", "report.sinks=plain",
              f"data.cache_dir={tmp_path / 'cache'}", "train.epochs=2"]  # fmt: skip
    tuned = trained(load_recipe("galore", [
        *common, f"data.train={pairs}", "data.eval_rows=8", "data.max_length=64",
        "optim.learning_rate=1e-2", f"output_dir={tmp_path / 'tuned'}"]))  # fmt: skip
    assert tuned.outcome.eval_loss_before is not None
    assert tuned.outcome.eval_loss_after is not None
    assert tuned.outcome.eval_loss_after < tuned.outcome.eval_loss_before - 0.5
    assert first.outcome.eval_loss_after is not None
    table = tmp_path / "train.tsv"
    lines = [f"{'cat' if i % 2 else 'dog'} {WORDS[i % 8]}\t{i % 2}" for i in range(64)]
    table.write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    classes = trained(load_recipe("glue-sst2", [
        *common, f"data.train={table}", f"data.eval={table}", "optim.method=galore",
        "optim.learning_rate=1e-2", "train.epochs=5", f"output_dir={tmp_path / 'c'}"]))  # fmt: skip
    assert classes.outcome.eval_loss_after is not None and classes.outcome.eval_loss_after < 0.45


@pytest.mark.parametrize("name", ["galore", "layerwise-8bit", "apollo"])
def test_accumulated_passes_are_one_batch(
    name: str, shape: Path, texts: Path, tmp_path: Path
) -> None:
    """Clipping and refreshes included: 1 x 8 rows and 4 x 2 rows take the same steps."""
    fp32 = (*ROWS[name], "optim.state=fp32", "optim.max_grad_norm=0.5")
    losses = []
    for rows, passes in ((8, 1), (2, 4)):
        given = recipe(
            shape, texts, tmp_path / str(rows), *fp32, f"train.micro_batch_size={rows}",
            f"train.gradient_accumulation_steps={passes}", steps=6,
        )  # fmt: skip
        trained(given)
        lines = (tmp_path / str(rows) / "metrics.jsonl").read_text().splitlines()
        losses.append([row["loss"] for row in map(json.loads, lines) if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_int8_weights_are_kept_as_codes_and_used_as_an_ordinary_model(
    shape: Path, texts: Path, tmp_path: Path
) -> None:
    from nibble.cli.exporting import export
    from nibble.cli.loading import load, resolve
    from nibble.numerics import int8_weights

    words = ("optim.method=q-galore", "optim.weights=int8", "train.precision=bf16")
    trained(recipe(shape, texts, tmp_path / "run", *words, steps=3))
    kept = load_file(tmp_path / "run" / "checkpoint-3" / "trained.safetensors")
    stem = "model.layers.1.mlp.down_proj"
    assert f"{stem}.weight" not in kept and kept[f"{stem}.codes"].dtype == torch.int8
    assert sum(name.endswith(".codes") for name in kept) == 14
    folder = str(tmp_path / "run")
    export(folder, to="hf", out=tmp_path / "plain", max_divergence=None, device="cpu")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert all(value.dtype == torch.bfloat16 for value in plain.values())
    weight = int8_weights.decode(
        kept[f"{stem}.codes"], kept[f"{stem}.scales"], dtype=torch.bfloat16
    )
    assert torch.equal(plain[f"{stem}.weight"], weight)
    used = load(resolve(folder, device="cpu")).model
    assert torch.equal(used.get_parameter(f"{stem}.weight"), weight)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("adapter.kind=lora",), "optim.weights=int8 with adapter.kind=lora"),
        (("place.kind=ddp", "place.num_devices=2"), "optim.weights=int8 with place.num_devices=2"),
        (("train.precision=fp16",), "optim.weights=int8 with train.precision=fp16"),
        (("place.kind=fsdp",), "optim.weights=int8 with place.kind=fsdp"),
    ],
)
def test_what_int8_weights_cannot_be_trained_with_is_refused(
    words: tuple[str, ...], message: str, shape: Path, texts: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(shape, texts, tmp_path, "optim.weights=int8", *words)
