"""Scores of a classifier over a whole split."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from hftl.errors import UsageError

#: the scores that `classification_metrics` always gives, for `--metric_for_best_model`
SINGLE_LABEL_METRICS = (
    "accuracy", "f1_macro", "f1_weighted", "precision_macro", "recall_macro", "roc_auc", "log_loss",
    "expected_calibration_error", "matthews_correlation",
)  # fmt: skip
#: those of `multi_label_metrics`
MULTI_LABEL_METRICS = (
    "mean_average_precision", "f1_macro", "f1_micro", "precision_macro", "recall_macro", "roc_auc", "subset_accuracy",
    "hamming_loss",
)  # fmt: skip
#: those of `regression_metrics`
REGRESSION_METRICS = ("rmse", "mae", "r2", "spearman", "pearson")
#: those of `tag_metrics`
TAG_METRICS = ("f1", "precision", "recall", "f1_macro", "accuracy")
#: those of `similarity_metrics`
SIMILARITY_METRICS = ("map_at_r", "recall_at_1", "recall_at_5", "recall_at_10")
_IN_OWN_UNIT = ("rmse", "mae")
#: scores of rows of one class each, between 0 and 1, which chance moves by about the standard error of a share
SHARES = ("accuracy", "f1_macro", "f1_weighted", "precision_macro", "recall_macro")
#: scores of which less is better
LOWER_IS_BETTER = ("loss", "log_loss", "expected_calibration_error", "hamming_loss", "rmse", "mae")


def written(name: str, value: float) -> str:
    """A score as a person reads it: errors in a unit of their own with four digits, others with four decimals."""
    return f"{value:.4g}" if name in _IN_OWN_UNIT else f"{value:.4f}"


def softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Probabilities, shape (rows, classes), from logits of the same shape."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def sigmoid(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The probability of each label by itself, of the shape of the logits."""
    return 1 / (1 + np.exp(-np.clip(logits.astype(np.float64), -500, 500)))


def normalised(vectors: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Vectors of length 1, shape (rows, size); zeros stay zeros."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)


def expected_calibration_error(probabilities: npt.NDArray[Any], labels: npt.NDArray[Any], bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equally wide bins of confidence (Guo et al. 2017, 15 bins)."""
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.zeros(bins)
    np.add.at(gaps, index, confidence - correct)
    return float(np.abs(gaps).sum() / len(labels))


def share_interval(hits: int, rows: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927): unlike the usual one it stays between 0 and 1.

    As of scipy.stats, which takes a second to import.
    """
    share, few = hits / rows, NormalDist().inv_cdf(0.975) ** 2 / rows
    middle = (share + few / 2) / (1 + few)
    half = math.sqrt(few * share * (1 - share) + few**2 / 4) / (1 + few)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def swapped_answers(
    metric: str, labels: npt.NDArray[Any], before: npt.NDArray[Any], now: npt.NDArray[Any]
) -> npt.NDArray[np.float64]:
    """What one answer of the model `now` in place of that of `before` adds to a score, for every row where it adds any.

    Were the two alike, each such row might as well have been answered the other way round (Yeh 2000), so that the root
    of the sum of squares is about the standard error of the difference of their scores: for accuracy that of McNemar
    (1947), where a row counts as much as any other; with few rows of some class, macro F1 moves much further by one.
    A row's part is the mean of what it adds to the answers of one and takes from those of the other.

    Args:
        metric: one of `SHARES`.
        labels: class ids, shape (rows,).
        before: predicted class ids of the same shape.
        now: those of the other model.
    """
    differences = (_effects(metric, labels, before, now) - _effects(metric, labels, now, before)) / 2
    return differences[np.abs(differences) > 1e-12]


def _effects(
    metric: str, labels: npt.NDArray[Any], answers: npt.NDArray[Any], others: npt.NDArray[Any]
) -> npt.NDArray[np.float64]:
    """How much each single answer of `others` raises the score of `answers`, for the rows on which they differ."""
    classes = 1 + int(max(part.max() for part in (labels, answers, others)))
    right = labels[answers == labels]
    hits, said, rows = (np.bincount(part, minlength=classes) for part in (right, answers, labels))
    whole = class_score(metric, hits, said, rows)
    changed = np.flatnonzero(answers != others)
    effects = np.empty(len(changed))
    for number, row in enumerate(changed):
        own, given = hits.copy(), said.copy()
        own[labels[row]] += int(others[row] == labels[row]) - int(answers[row] == labels[row])
        given[others[row]] += 1
        given[answers[row]] -= 1
        effects[number] = class_score(metric, own, given, rows) - whole
    return effects


def class_score(metric: str, hits: npt.NDArray[Any], said: npt.NDArray[Any], rows: npt.NDArray[Any]) -> float:
    """A score from how many rows of each class are right, were given that class, and are of it; see `SHARES`."""
    if metric in ("f1_macro", "f1_weighted"):
        of_class = 2 * hits / np.maximum(said + rows, 1)
    elif metric == "precision_macro":
        of_class = hits / np.maximum(said, 1)
    elif metric == "recall_macro":
        of_class = hits / np.maximum(rows, 1)
    else:
        return float(hits.sum() / rows.sum())
    return float(np.average(of_class, weights=rows if metric == "f1_weighted" else rows > 0))


def classification_metrics(
    logits: npt.NDArray[Any], labels: npt.NDArray[Any], label_names: Sequence[str]
) -> dict[str, float]:
    """Every score of one split; a score that this split cannot give (ROC AUC with one class only) is left out.

    Args:
        logits: shape (rows, classes).
        labels: class ids, shape (rows,).
        label_names: name of each class id.
    """
    from sklearn import metrics  # here, because it costs half a second that training need not wait for

    probabilities = softmax(logits)
    predictions = probabilities.argmax(axis=1)
    classes = np.arange(len(label_names))
    precision, recall, f1, rows = metrics.precision_recall_fscore_support(
        labels, predictions, labels=classes, zero_division=0.0
    )
    present = rows > 0  # a class without a row here has no recall; it must not count as 0 in the macro averages
    scores = {
        "accuracy": float((predictions == labels).mean()),
        "f1_macro": float(f1[present].mean()),
        "f1_weighted": float(np.average(f1, weights=rows)),
        "precision_macro": float(precision[present].mean()),
        "recall_macro": float(recall[present].mean()),
        "log_loss": float(metrics.log_loss(labels, probabilities, labels=classes)),
        "expected_calibration_error": expected_calibration_error(probabilities, labels),
        "matthews_correlation": float(metrics.matthews_corrcoef(labels, predictions)),
    }
    if present.all():
        scores["roc_auc"] = _roc_auc(labels, probabilities)
    for name, values in (("precision", precision), ("recall", recall), ("f1", f1)):
        scores.update({f"{name}/{label}": float(value) for label, value in zip(label_names, values, strict=True)})
    return scores


def multi_label_metrics(
    probabilities: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    label_names: Sequence[str],
    thresholds: npt.NDArray[np.float64],
) -> dict[str, float]:
    """Every score of one split; macro averages are those of the labels that some row of it has.

    Args:
        probabilities: shape (rows, labels).
        labels: 0 or 1, of the same shape.
        label_names: name of each label.
        thresholds: the probability from which on a row has a label, shape (labels,).
    """
    from sklearn import metrics

    truth, found = labels > 0, probabilities >= thresholds
    hits, taken, rows = (part.sum(axis=0) for part in (truth & found, found, truth))
    precision, recall = hits / np.maximum(taken, 1), hits / np.maximum(rows, 1)
    f1 = 2 * hits / np.maximum(taken + rows, 1)
    present = rows > 0
    scores = {
        "f1_micro": float(2 * hits.sum() / max(taken.sum() + rows.sum(), 1)),
        "subset_accuracy": float((truth == found).all(axis=1).mean()),
        "hamming_loss": float((truth != found).mean()),
    }
    if present.any():
        own = [(truth[:, row], probabilities[:, row]) for row in np.flatnonzero(present)]
        scores |= {
            "mean_average_precision": float(np.mean([metrics.average_precision_score(*pair) for pair in own])),
            "f1_macro": float(f1[present].mean()),
            "precision_macro": float(precision[present].mean()),
            "recall_macro": float(recall[present].mean()),
        }
    both = np.flatnonzero(present & (rows < len(labels)))
    if len(both):
        areas = [metrics.roc_auc_score(truth[:, row], probabilities[:, row]) for row in both]
        scores["roc_auc"] = float(np.mean(areas))
    for name, values in (("precision", precision), ("recall", recall), ("f1", f1)):
        scores.update({f"{name}/{label}": float(value) for label, value in zip(label_names, values, strict=True)})
    return scores


def regression_metrics(predictions: npt.NDArray[Any], labels: npt.NDArray[Any]) -> dict[str, float]:
    """Every score of one split; those that numbers which are all alike do not have are left out.

    Args:
        predictions: shape (rows,).
        labels: of the same shape.
    """
    from scipy import stats
    from sklearn import metrics

    scores = {
        "rmse": float(metrics.root_mean_squared_error(labels, predictions)),
        "mae": float(metrics.mean_absolute_error(labels, predictions)),
    }
    if np.ptp(labels) > 0:
        scores["r2"] = float(metrics.r2_score(labels, predictions))
        if np.ptp(predictions) > 0:
            scores["spearman"] = float(stats.spearmanr(labels, predictions).statistic)
            scores["pearson"] = float(stats.pearsonr(labels, predictions).statistic)
    return scores


def tag_metrics(
    labels: Sequence[Sequence[str]],
    predictions: Sequence[Sequence[str]],
    reads: Callable[[Sequence[str]], list[str]] | None,
) -> dict[str, float]:
    """Every score of one split; those of entities are left out where there are none, found or to be found.

    Args:
        labels: the tags of each row.
        predictions: as many for each.
        reads: where tags say where something begins and ends, what makes seqeval's tags of them: precision, recall and
            F1 are then those of whole entities, as the conlleval script of CoNLL-2000 and seqeval count them. Else of
            tags; F1 is their mean.

    Raises:
        UsageError: no row has a word.
    """
    if not any(labels):
        raise UsageError("None of the rows has a word: there is nothing to score.")
    right = [label == said for row in zip(labels, predictions, strict=True) for label, said in zip(*row, strict=True)]
    scores = {"accuracy": float(np.mean(right))}
    if reads is None:
        return scores | _scores_of_tags(labels, predictions)
    from seqeval.metrics import classification_report

    labels, predictions = ([reads(tags) for tags in rows] for rows in (labels, predictions))
    if not any(tag != "O" for rows in (labels, predictions) for row in rows for tag in row):
        return scores
    table = classification_report(labels, predictions, output_dict=True, zero_division=0)
    names = {"precision": "precision", "recall": "recall", "f1": "f1-score"}
    scores |= {name: float(table["micro avg"][key]) for name, key in names.items()}
    scores["f1_macro"] = float(table["macro avg"]["f1-score"])
    for kind, row in table.items():
        if not kind.endswith(" avg"):
            scores |= {f"{name}/{kind}": float(row[key]) for name, key in names.items()}
    return scores


def _scores_of_tags(labels: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of each tag that occurs, and the mean of the last."""
    from sklearn import metrics

    flat = [[tag for row in rows for tag in row] for rows in (labels, predictions)]
    names = sorted(set(flat[0]))
    each = metrics.precision_recall_fscore_support(*flat, labels=names, zero_division=0.0)
    scores = {"f1_macro": float(each[2].mean())}
    for name, values in zip(("precision", "recall", "f1"), each[:3], strict=True):
        scores |= {f"{name}/{tag}": float(value) for tag, value in zip(names, values, strict=True)}
    return scores


@dataclass(frozen=True)
class Ranking:
    """How the score of a class tells its rows from others, where one takes all rows with at least some score.

    Attributes:
        false: part of the other rows that are taken, from none to all, as that score falls.
        true: part of its own rows that are taken: the recall.
        precision: of the taken rows, how many are its own; one less, since of none it is no number.
        roc_auc: area under `true` over `false`.
        average_precision: mean of `precision` by the rise of `true`.
    """

    false: npt.NDArray[np.float64]
    true: npt.NDArray[np.float64]
    precision: npt.NDArray[np.float64]
    roc_auc: float
    average_precision: float


def ranking(own: npt.NDArray[np.bool_], scores: npt.NDArray[Any]) -> Ranking:
    """The curves of one class, and the areas under them: as scikit-learn has them, whose import takes a second.

    Args:
        own: whether a row is of the class, shape (rows,); some are and some are not.
        scores: of the class, shape (rows,).
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # equal scores are taken together
    hits = np.cumsum(own[order])[ends]
    taken = ends + 1
    true = np.append(0, hits) / hits[-1]
    false = np.append(0, taken - hits) / (taken[-1] - hits[-1])
    precision = hits / taken
    area = float((np.diff(false) * (true[1:] + true[:-1]) / 2).sum())
    return Ranking(false, true, precision, area, float((np.diff(true) * precision).sum()))


def _roc_auc(labels: npt.NDArray[Any], probabilities: npt.NDArray[Any]) -> float:
    from sklearn import metrics

    if probabilities.shape[1] == 2:
        return float(metrics.roc_auc_score(labels, probabilities[:, 1]))
    return float(metrics.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro"))


def similarity_metrics(embeddings: npt.NDArray[Any], labels: npt.NDArray[Any], piece: int = 2**22) -> dict[str, float]:
    """How well each row finds those with its label among all others, by cosine.

    recall@k is the part of the rows that have one of them among the k nearest; MAP@R the mean over the R nearest, R
    being how many there are, of the precision up to each that is right (Musgrave et al. 2020, "A Metric Learning
    Reality Check", 3.2). A row without another of its label is searched through, and no query; `queries` counts those.
    Of rows that are equally near, to five digits, those of other labels come first: copies must not be right by chance.

    Args:
        embeddings: shape (rows, size), of any length but 0.
        labels: class numbers, shape (rows,).
        piece: cosines that are held at once.
    """
    import torch

    vectors, wanted = torch.from_numpy(normalised(embeddings)), torch.from_numpy(np.asarray(labels))
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    others = torch.from_numpy(counts[inverse] - 1)
    queries = torch.nonzero(others > 0).flatten()
    if not len(queries):
        return {"queries": 0.0}
    most = min(len(vectors) - 1, max(10, int(others.max())))
    places = torch.arange(1, most + 1)
    found: list[torch.Tensor] = []
    for rows in queries.split(max(1, piece // len(vectors))):
        alike = wanted == wanted[rows, None]
        cosines = (vectors[rows] @ vectors.T).round(decimals=5) - 5e-6 * alike
        cosines[torch.arange(len(rows)), rows] = -torch.inf  # not itself
        right = alike.gather(1, cosines.topk(most).indices)
        precision = right.cumsum(1) / places
        average = (precision * right * (places <= others[rows, None])).sum(1) / others[rows]
        found.append(torch.stack([average, *(right[:, :count].any(1) for count in (1, 5, 10))], dim=1).double())
    scores = torch.cat(found).mean(0).tolist()
    return {**dict(zip(SIMILARITY_METRICS, scores, strict=True)), "queries": float(len(queries))}


class ExtraMetrics:
    """Scores computed by the `evaluate` library: Hub ids or local folders, given to `--metrics`."""

    def __init__(self, names: Sequence[str], known: Sequence[str]) -> None:
        """Load them before training, so that a wrong name costs nothing; those that are `known` are computed anyway.

        Raises:
            UsageError: a metric cannot be found.
        """
        others = [name for name in names if name not in known]
        self.metrics = {re.split(r"[\\/]", name.rstrip("\\/"))[-1]: _load_metric(name, known) for name in others}
        # A score may be called otherwise than its metric: a trial tells, and that the metric takes class ids at all.
        self.names = tuple(self(np.array([0, 1]), np.array([0, 1])))

    def __call__(self, predictions: npt.NDArray[Any], labels: npt.NDArray[Any]) -> dict[str, float]:
        """The scores of predicted class ids against labels, both of shape (rows,)."""
        scores = {}
        for name, metric in self.metrics.items():
            try:
                result = metric.compute(predictions=predictions.tolist(), references=labels.tolist())
            except Exception as error:
                why = " ".join(str(error).split()) or type(error).__name__
                raise UsageError(f"Metric {name!r} cannot score such answers: {why}") from error
            numbers = {key: value for key, value in result.items() if isinstance(value, int | float | np.number)}
            scores.update({key: float(value) for key, value in numbers.items()})
        return scores


def _load_metric(name: str, known: Sequence[str]) -> Any:
    import evaluate

    try:
        return evaluate.load(name)
    except (OSError, ImportError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"Metric {name!r} is none of hftl's own ({', '.join(known)}), and evaluate.load cannot load it: "
            f"{(str(error) or type(error).__name__).splitlines()[0]}"
        ) from error
