"""Scores on cases small enough to count by hand."""

from __future__ import annotations

import pytest

from nibble.use.metrics import GLUE_METRICS, classification_scores, rouge


def test_binary_scores_by_hand() -> None:
    # 2 true positives, 1 false positive, 1 false negative, 1 true negative.
    scores = classification_scores([1, 1, 1, 0, 0], [1, 1, 0, 1, 0], num_labels=2)
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert scores["matthews"] == pytest.approx((2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5)


def test_regression_scores() -> None:
    scores = classification_scores([1.0, 2.0, 3.0], [1.0, 4.0, 9.0], num_labels=1)
    assert scores["spearman"] == pytest.approx(1.0)
    assert scores["pearson"] == pytest.approx(0.9897433186)


def test_a_constant_prediction_scores_zero() -> None:
    assert classification_scores([0.5, 0.5], [1.0, 2.0], num_labels=1)["pearson"] == 0.0
    assert classification_scores([1, 1], [0, 1], num_labels=2)["matthews"] == 0.0


def test_three_classes_have_no_binary_metric() -> None:
    assert set(classification_scores([0, 1, 2], [0, 1, 1], num_labels=3)) == {
        "accuracy",
        "macro_f1",
    }


def test_rouge_by_hand() -> None:
    scores = rouge(["the cat sat"], ["the cat ran fast"])
    assert scores["rouge1"] == pytest.approx(100 * 2 * 2 / (3 + 4))
    assert scores["rouge2"] == pytest.approx(100 * 2 * 1 / (2 + 3))
    assert scores["rougeL"] == pytest.approx(100 * 2 * 2 / (3 + 4))


def test_every_glue_metric_is_one_that_is_computed() -> None:
    binary = classification_scores([1, 0], [1, 0], num_labels=2)
    regression = classification_scores([1.0, 0.0], [1.0, 0.0], num_labels=1)
    assert {m for ms in GLUE_METRICS.values() for m in ms} == set(binary) | set(regression)
