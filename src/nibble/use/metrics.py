"""Scores of predictions: GLUE's metrics and ROUGE, from the libraries that define them.

scikit-learn gives accuracy, F1 and Matthews' correlation, scipy Pearson's and Spearman's, Google's
rouge-score ROUGE: the extra `nibble[eval]`. Which metric a GLUE task reports is the GLUE paper's
table (arXiv 1804.07461, table 1).
"""

from __future__ import annotations

from collections.abc import Sequence

from nibble.errors import ConfigError

GLUE_METRICS: dict[str, tuple[str, ...]] = {
    "cola": ("matthews", "accuracy"),
    "sst-2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "sts-b": ("pearson", "spearman"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
}


def classification_scores(
    predictions: Sequence[float], targets: Sequence[float], *, num_labels: int
) -> dict[str, float]:
    """Every metric that makes sense for the number of labels (1 is regression).

    Predictions are class ids (or values when `num_labels` is 1). A constant prediction, whose
    correlation is undefined, scores 0 there.
    """
    try:
        from scipy import stats
        from sklearn import metrics
    except ImportError as error:
        raise ConfigError(
            "metrics of a classification task need scikit-learn, which is not installed: "
            'pip install "nibble[eval]"'
        ) from error
    if num_labels == 1:
        if len(set(predictions)) < 2 or len(set(targets)) < 2:
            return {"pearson": 0.0, "spearman": 0.0}
        return {
            "pearson": float(stats.pearsonr(predictions, targets).statistic),
            "spearman": float(stats.spearmanr(predictions, targets).statistic),
        }
    scores = {"accuracy": float(metrics.accuracy_score(targets, predictions))}
    if num_labels == 2:
        scores["f1"] = float(metrics.f1_score(targets, predictions, zero_division=0.0))
        scores["matthews"] = float(metrics.matthews_corrcoef(targets, predictions))
    else:
        scores["macro_f1"] = float(
            metrics.f1_score(targets, predictions, average="macro", zero_division=0.0)
        )
    return scores


def rouge(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F1 of ROUGE-1, -2 and -L (stemmed), in percent (Lin 2004)."""
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise ConfigError(
            'ROUGE needs rouge-score, which is not installed: pip install "nibble[eval]"'
        ) from error
    names = ("rouge1", "rouge2", "rougeL")
    scorer = rouge_scorer.RougeScorer(list(names), use_stemmer=True)
    rows = [scorer.score(r, a) for a, r in zip(answers, references, strict=True)]
    return {name: 100 * sum(row[name].fmeasure for row in rows) / len(rows) for name in names}
