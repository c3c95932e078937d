"""Scores against direct computation with transformers, scikit-learn and rouge-score."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small_models as small
import torch
import torch.nn.functional as F
from torch import nn

from nibble.data import Splits, prepare
from nibble.errors import ConfigError, DataError
from nibble.place.activations import Activations
from nibble.place.base import Placement
from nibble.place.single import one_device
from nibble.spec.config import Recipe
from nibble.use import evaluate
from nibble.use.assemble import Assembly, assemble, fill
from nibble.use.evaluate import answers_rouge, rows_scores, text_perplexity


@dataclass(frozen=True)
class Ready:
    recipe: Recipe
    assembly: Assembly
    model: nn.Module
    place: Placement
    splits: Splits


def ready(kind: str, root: Path, rows: Path, **sections: Any) -> Ready:
    base = root / kind
    if not base.exists():
        small.save_model(kind, base)
    recipe = small.recipe(base, rows, root / "run", **sections)
    place = one_device(recipe.place)
    made = assemble(recipe, to_train=False)
    model = fill(made, place, activations=Activations(policy="none")).eval()
    splits = prepare(
        recipe.data, made.tokenizer, task=recipe.model.task, seed=0,
        can_pack=made.built.family.can_pack, num_labels=recipe.model.num_labels,
    )  # fmt: skip
    return Ready(recipe, made, model, place, splits)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


def loaded(path: Path, *, classify: bool = False) -> Any:
    import transformers as t

    auto = t.AutoModelForSequenceClassification if classify else t.AutoModelForCausalLM
    return auto.from_pretrained(path)


@pytest.mark.parametrize("kind", ["llama", "bloom", "gpt2"])
def test_perplexity_is_exp_of_the_mean_loss_over_windows(kind: str, root: Path) -> None:
    given = ready(kind, root, small.rows_file(root))
    text = root / "text.txt"
    generator = torch.Generator().manual_seed(5)
    words = torch.randint(3, small.VOCAB, (101,), generator=generator).tolist()
    text.write_text(" ".join(small.WORDS[i] for i in words))
    found = text_perplexity(given.model, given.assembly, given.place, path=text, context_length=20)
    theirs = loaded(root / kind)
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(words), 20):
            ids = torch.tensor([words[start : start + 20]])
            if ids.shape[1] > 1:
                loss = theirs(input_ids=ids, labels=ids).loss
                total, count = total + float(loss) * (ids.shape[1] - 1), count + ids.shape[1] - 1
    assert found["tokens"] == count == 95  # the 101st token stands alone
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found["context_length"] == 20


def test_a_text_that_cannot_be_measured_is_refused(root: Path, tmp_path: Path) -> None:
    given = ready("llama", root, small.rows_file(root))
    one = tmp_path / "one.txt"
    one.write_text("w1")
    raw = tmp_path / "raw.txt"
    raw.write_bytes(b"\xff\xfe\x00")
    words = (given.model, given.assembly, given.place)
    with pytest.raises(DataError, match="1 tokens: there is nothing to predict"):
        text_perplexity(*words, path=one)
    with pytest.raises(DataError, match="cannot be read as UTF-8"):
        text_perplexity(*words, path=raw)
    with pytest.raises(ConfigError, match="the model has 64 positions"):
        text_perplexity(*words, path=one, context_length=65)


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_loss_on_rows_is_transformers_over_all_targets(kind: str, root: Path) -> None:
    given = ready(kind, root, small.rows_file(root))
    found = rows_scores(given.model, given.assembly, given.place, splits=given.splits)
    theirs, rows = loaded(root / kind), given.splits.eval
    assert rows is not None and found["rows"] == len(rows) == 8
    total, count = 0.0, 0
    for i in range(len(rows)):
        row = rows.row(i)
        ids = row.ids[None].long()
        labels = ids.masked_fill(~row.targets[None].bool(), -100)
        with torch.no_grad():
            targets = int((labels[:, 1:] != -100).sum())
            total += float(theirs(input_ids=ids, labels=labels).loss) * targets
        count += targets
    assert found["tokens"] == count
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    few = rows_scores(given.model, given.assembly, given.place, splits=given.splits, num_rows=3)
    assert few["rows"] == 3 and few["loss"] != found["loss"]


def test_scores_of_a_classifier_are_those_of_its_own_predictions(root: Path) -> None:
    from sklearn.metrics import accuracy_score, f1_score

    given = ready(
        "bert", root, small.labelled_file(root),
        model={"path": str(root / "bert"), "task": "classification", "num_labels": 3},
        data={"eval_rows": 20},
    )  # fmt: skip
    found = rows_scores(given.model, given.assembly, given.place, splits=given.splits)
    theirs, rows = loaded(root / "bert", classify=True), given.splits.eval
    assert rows is not None and rows.labels is not None
    with torch.no_grad():
        logits = torch.cat(
            [theirs(input_ids=rows.row(i).ids[None].long()).logits for i in range(len(rows))]
        )
    labels = rows.labels.long()
    best = logits.argmax(-1)
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, best))
    assert found["macro_f1"] == pytest.approx(
        f1_score(labels, best, average="macro", zero_division=0.0)
    )
    assert found["rows"] == 20


def test_scores_of_a_regression_are_correlations(root: Path) -> None:
    from scipy.stats import pearsonr, spearmanr
    from transformers import BertForSequenceClassification

    torch.manual_seed(1)
    config = small.config_of("bert")
    config.num_labels, config.problem_type = 1, "regression"
    base = root / "regression"
    BertForSequenceClassification(config).save_pretrained(base)
    small.save_tokenizer(base)
    path = root / "scores.jsonl"
    rows = [{"text": f"w{i} a w{i + 1}", "label": i / 7 + 0.5} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ready(
        "regression", root, path, data={"eval_rows": 20},
        model={"path": str(base), "task": "classification", "num_labels": 1},
    )  # fmt: skip
    found = rows_scores(given.model, given.assembly, given.place, splits=given.splits)
    theirs, held = loaded(base, classify=True), given.splits.eval
    assert held is not None and held.labels is not None
    with torch.no_grad():
        values = [
            theirs(input_ids=held.row(i).ids[None].long()).logits.item() for i in range(len(held))
        ]
    targets = held.labels.tolist()
    assert found["pearson"] == pytest.approx(pearsonr(values, targets).statistic, abs=1e-5)
    assert found["spearman"] == pytest.approx(spearmanr(values, targets).statistic, abs=1e-5)


def test_rouge_compares_greedy_answers_with_the_held_out_ones(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rouge_score import rouge_scorer

    given = ready("llama", root, small.rows_file(root))
    asked: list[str] = []
    answers = iter(["w1 b", "nothing like it"])

    def generated(model: Any, tokenizer: Any, prompts: Any, *, sampling: Any) -> list[str]:
        asked.extend(map(tokenizer.decode, prompts))
        assert sampling.temperature == 0 and sampling.stop_ids == given.splits.stop_ids
        assert {sampling.max_new_tokens} == {64 - len(ids) for ids in prompts}
        return [f" {next(answers)}\n" for _ in prompts]

    monkeypatch.setattr(evaluate, "generate_batch", generated)
    found = answers_rouge(given.model, given.assembly, splits=given.splits, num_rows=2)
    assert given.splits.eval_records is not None
    records = list(given.splits.eval_records)[:2]
    assert asked == [record.prompt for record in records]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    pairs = zip(records, ["w1 b", "nothing like it"], strict=True)
    each = [scorer.score(record.reference, answer) for record, answer in pairs]
    for name in ("rouge1", "rouge2", "rougeL"):
        assert found[name] == pytest.approx(50 * sum(one[name].fmeasure for one in each))
    assert found["answers"] == 2


def test_questions_of_any_length_get_their_own_answers(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = root / "lengths.jsonl"
    rows = [{"prompt": "w1 " * (70 - 13 * i), "completion": f" w{i}"} for i in range(5)]
    rows = [row for row in rows for _ in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ready("bloom", root, path, data={"max_length": 80, "eval": [{"path": str(path)}],
                                            "eval_rows": None})  # fmt: skip
    companies: list[list[int]] = []

    def generated(model: Any, tokenizer: Any, prompts: Any, *, sampling: Any) -> list[str]:
        assert sampling.max_new_tokens == evaluate.MAX_ANSWER_TOKENS  # BLOOM has no table
        companies.append([len(ids) for ids in prompts])
        return [f"w{(70 - len(ids)) // 13}" for ids in prompts]

    monkeypatch.setattr(evaluate, "generate_batch", generated)
    monkeypatch.setattr(evaluate, "ANSWERS_AT_ONCE", 4)
    found = answers_rouge(given.model, given.assembly, splits=given.splits, num_rows=10)
    assert companies == [[18, 18, 31, 31], [44, 44, 57, 57], [70, 70]]
    assert found == {"rouge1": 100.0, "rouge2": 0.0, "rougeL": 100.0, "answers": 10}


def test_a_question_without_room_for_an_answer_is_named(root: Path) -> None:
    path = root / "long.jsonl"
    row = {"prompt": "w1 " * 64, "completion": " w2"}
    path.write_text((json.dumps(row) + "\n") * 3)
    given = ready("llama", root, path, data={"max_length": 80, "eval_rows": 1})
    with pytest.raises(DataError, match=r"long.jsonl:\d: the question has 64 tokens"):
        answers_rouge(given.model, given.assembly, splits=given.splits, num_rows=1)
