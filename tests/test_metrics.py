"""Scores against calculations by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import f1_score
from tiny_models import TINY, write_tiny_text_model
from tiny_training import tiny_arguments

import hftl
from hftl.data import Splits
from hftl.errors import UsageError
from hftl.metrics import (
    SINGLE_LABEL_METRICS,
    ExtraMetrics,
    classification_metrics,
    expected_calibration_error,
    share_interval,
    softmax,
    swapped_answers,
)
from hftl.tasks.text_classification import TextClassification

NAMES = ["ant", "bee", "cat"]
LABELS = np.array([0, 0, 0, 1, 1, 2])
PREDICTED = np.array([0, 0, 1, 1, 2, 2])


def logits_for(predicted: np.ndarray, classes: int = 3, sure: float = 3.0) -> np.ndarray:
    return np.eye(classes)[predicted] * sure


def test_scores_by_hand() -> None:
    scores = classification_metrics(logits_for(PREDICTED), LABELS, NAMES)
    # ant: 2 of 2 found right, 2 of 3 rows found; bee: 1 of 2, 1 of 2; cat: 1 of 2, 1 of 1
    precision, recall = {"ant": 1.0, "bee": 0.5, "cat": 0.5}, {"ant": 2 / 3, "bee": 0.5, "cat": 1.0}
    f1 = {name: 2 * precision[name] * recall[name] / (precision[name] + recall[name]) for name in NAMES}
    for name in NAMES:
        assert scores[f"precision/{name}"] == pytest.approx(precision[name])
        assert scores[f"recall/{name}"] == pytest.approx(recall[name])
        assert scores[f"f1/{name}"] == pytest.approx(f1[name])
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert scores["precision_macro"] == pytest.approx(2 / 3)
    assert scores["recall_macro"] == pytest.approx((2 / 3 + 0.5 + 1) / 3)
    assert scores["f1_macro"] == pytest.approx(sum(f1.values()) / 3)
    assert scores["f1_weighted"] == pytest.approx((3 * f1["ant"] + 2 * f1["bee"] + f1["cat"]) / 6)
    right, wrong = math.exp(3) / (math.exp(3) + 2), 1 / (math.exp(3) + 2)
    assert scores["log_loss"] == pytest.approx(-(4 * math.log(right) + 2 * math.log(wrong)) / 6)
    assert scores["expected_calibration_error"] == pytest.approx(abs(right - 4 / 6))
    # Gorodkin 2004: rows × right less Σ predicted × true, over the root of two such differences of squares
    expected = (6 * 4 - (2 * 3 + 2 * 2 + 2 * 1)) / math.sqrt((36 - 12) * (36 - 14))
    assert scores["matthews_correlation"] == pytest.approx(expected)
    assert set(SINGLE_LABEL_METRICS) <= set(scores)


def test_roc_auc_of_two_classes_counts_pairs() -> None:
    labels, scores = np.array([0, 0, 1, 1, 1]), np.array([0.1, 0.6, 0.4, 0.7, 0.6])
    logits = np.stack([np.zeros(5), np.log(scores / (1 - scores))], axis=1)
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels == 1] for b in scores[labels == 0]]
    found = classification_metrics(logits, labels, ["no", "yes"])["roc_auc"]
    assert found == pytest.approx(sum(pairs) / len(pairs))


def test_roc_auc_of_many_classes_is_the_mean_of_one_against_the_rest() -> None:
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(40, 3)), np.arange(40) % 3
    probabilities = softmax(logits)
    areas = []
    for index in range(3):
        inside, outside = probabilities[labels == index, index], probabilities[labels != index, index]
        areas.append(np.mean(inside[:, None] > outside[None, :]))
    assert classification_metrics(logits, labels, NAMES)["roc_auc"] == pytest.approx(np.mean(areas))


def test_a_class_without_a_row_does_not_count_as_zero() -> None:
    labels = np.array([0, 0, 1, 1])
    scores = classification_metrics(logits_for(np.array([0, 0, 1, 0])), labels, NAMES)
    assert scores["recall_macro"] == pytest.approx((1.0 + 0.5) / 2)
    assert scores["precision_macro"] == pytest.approx((2 / 3 + 1.0) / 2)
    assert scores["f1_macro"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert scores["recall/cat"] == 0.0
    assert "roc_auc" not in scores
    assert all(math.isfinite(value) for value in scores.values())


def test_one_class_only() -> None:
    scores = classification_metrics(logits_for(np.array([0, 0]), classes=2), np.array([0, 0]), ["no", "yes"])
    assert scores["accuracy"] == scores["f1_macro"] == 1.0
    assert scores["matthews_correlation"] == 0.0


@pytest.mark.parametrize("hits", [0, 1, 40, 99, 100])
def test_the_interval_of_a_share_is_that_of_scipy(hits: int) -> None:
    expected = binomtest(hits, 100).proportion_ci(method="wilson")
    assert share_interval(hits, 100) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("metric", ["accuracy", "f1_macro", "f1_weighted", "precision_macro", "recall_macro"])
def test_an_answer_of_the_other_model_changes_the_score_by_what_is_said(metric: str) -> None:
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1, 3], [40, 15, 5])  # and none of the class 2
    before, now = (np.where(random.random(60) < 0.8, labels, random.integers(0, 4, 60)) for _ in range(2))

    def score(predictions: np.ndarray) -> float:
        return classification_metrics(np.eye(4)[predictions], labels, list("abcd"))[metric]

    expected = []
    for row in range(60):
        lost, won = now.copy(), before.copy()
        lost[row], won[row] = before[row], now[row]
        expected.append((score(now) - score(lost) + score(won) - score(before)) / 2)
    found = swapped_answers(metric, labels, before, now)
    assert found == pytest.approx([value for value in expected if abs(value) > 1e-12])
    assert len(found) > 5


def test_chance_in_the_difference_of_two_accuracies_is_that_of_mcnemar() -> None:
    labels = np.repeat([0, 1, 2], 20)
    before, now = labels.copy(), labels.copy()
    before[:3], now[25:32], before[40], now[40] = 1, 2, 0, 1  # of the last both are wrong
    assert np.linalg.norm(swapped_answers("accuracy", labels, before, now)) == pytest.approx(math.sqrt(10) / 60)
    assert not len(swapped_answers("accuracy", labels, now, now))


@pytest.mark.parametrize("right", [(0.97, 0.97), (0.97, 0.6), (0.6, 0.97)])
def test_chance_in_the_difference_of_two_macro_f1_is_that_of_random_swaps(right: tuple[float, float]) -> None:
    """Of few rows of a class, where the rows that differ say too little by their number alone (Yeh 2000)."""
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [900, 50, 50])
    before, now = (np.where(random.random(1000) < share, labels, random.integers(0, 3, 1000)) for share in right)
    swaps = random.random((200, 1000)) < 0.5
    one, other = np.where(swaps, before, now), np.where(swaps, now, before)
    drawn = [[f1_score(labels, part, average="macro") for part in pair] for pair in zip(one, other, strict=True)]
    found = np.linalg.norm(swapped_answers("f1_macro", labels, before, now))
    assert found == pytest.approx(np.std(np.diff(drawn)), rel=0.3)
    assert found > 1.5 * math.sqrt(np.sum(before != now)) / 1000


def test_softmax_of_large_logits() -> None:
    assert softmax(np.array([[1e4, 0.0], [-1e4, -1e4]], dtype=np.float32)).tolist() == [[1.0, 0.0], [0.5, 0.5]]


def slow_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int) -> float:
    """Guo et al. 2017, equations 2 and 3, as written there: bins are open below and closed above."""
    total = 0.0
    for index in range(bins):
        low, high = index / bins, (index + 1) / bins
        inside = [row for row in range(len(labels)) if low < probabilities[row].max() <= high]
        if inside:
            accuracy = sum(probabilities[row].argmax() == labels[row] for row in inside) / len(inside)
            confidence = sum(probabilities[row].max() for row in inside) / len(inside)
            total += len(inside) / len(labels) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 10.0])
def test_calibration_error_against_its_definition(bins: int, sharpness: float) -> None:
    random = np.random.default_rng(0)
    probabilities = softmax(random.normal(size=(500, 4)) * sharpness)
    labels = random.integers(0, 4, 500)
    expected = slow_calibration_error(probabilities, labels, bins)
    assert expected_calibration_error(probabilities, labels, bins) == pytest.approx(expected)


def test_calibration_error_of_certain_and_right_is_zero() -> None:
    assert expected_calibration_error(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 1])) == 0.0
    assert expected_calibration_error(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([1, 0])) == 1.0


# --- metrics of the person's own -------------------------------------------------------------------------------------

SCRIPT = """
import datasets
import evaluate


class Metric(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        exact = sum(one == other for one, other in zip(predictions, references))
        return {"%s": exact / 10, "note": "text is no score"}
"""


@pytest.fixture
def metric_folder(tmp_path: Path) -> Path:
    """A metric as `evaluate` wants it: a folder with a script of the same name."""
    folder = tmp_path / "tenths"
    folder.mkdir()
    (folder / "tenths.py").write_text(SCRIPT % "tenths")
    return folder


def splits_of(train: list[int]) -> Splits:
    import datasets

    rows = datasets.Dataset.from_dict({"label": train})
    return Splits(train=rows, validation=rows, test=None, label_names=NAMES, columns={})


def task_with(*flags: str) -> TextClassification:
    task = TextClassification(tiny_arguments(TINY["bert"](), *flags))  # type: ignore[arg-type]
    task.label_names = NAMES
    return task


@pytest.mark.parametrize("ending", ["", "/"])
def test_a_local_metric_is_scored_and_chooses_the_best(metric_folder: Path, ending: str) -> None:
    task = task_with(f"--metrics={metric_folder}{ending}", "--metric_for_best_model=tenths")
    scores = task.score(logits_for(PREDICTED), LABELS)
    assert scores["tenths"] == pytest.approx(0.4)
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert "note" not in scores
    assert task.best_metric(splits_of([0, 1, 2])) == ("tenths", True)


def test_a_metric_whose_score_has_another_name_chooses_the_best(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.py").write_text(SCRIPT % "exact_tenths")
    task = task_with(f"--metrics={folder}", "--metric_for_best_model=exact_tenths")
    assert task.score(logits_for(PREDICTED), LABELS)["exact_tenths"] == pytest.approx(0.4)
    assert task.best_metric(splits_of([0, 1, 2])) == ("exact_tenths", True)


def test_a_metric_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="Metric 'acuracy' is none of hftl's own"):
        ExtraMetrics(["acuracy"], SINGLE_LABEL_METRICS)


def test_the_metric_that_chooses_the_best() -> None:
    assert task_with().best_metric(splits_of([0, 0, 0, 1, 2])) == ("accuracy", True)
    assert task_with().best_metric(splits_of([0, 0, 0, 0, 1, 2])) == ("f1_macro", True)
    assert task_with("--metric_for_best_model=eval_log_loss").best_metric(splits_of([0, 1])) == ("log_loss", False)
    with pytest.raises(UsageError, match=r"acuracy' is not known.*accuracy"):
        task_with("--metric_for_best_model=acuracy").best_metric(splits_of([0, 1]))


def test_a_run_chooses_its_checkpoint_by_a_local_metric(metric_folder: Path, tmp_path: Path) -> None:
    rows = [f"{text},{label}" for text, label in [("a good film", "yes"), ("a dull room", "no")] * 12]
    (tmp_path / "table.csv").write_text("\n".join(["text,label", *rows]))
    run = hftl.finetune(
        task="text-classification",
        model=str(write_tiny_text_model(tmp_path / "model")),
        dataset=str(tmp_path / "table.csv"),
        output_dir=str(tmp_path / "run"),
        method="full",
        num_train_epochs=2,
        validation_fraction=0.5,
        metrics=[str(metric_folder)],
        metric_for_best_model="tenths",
    )
    assert run.metrics["validation"]["tenths"] == pytest.approx(run.metrics["validation"]["accuracy"] * 12 / 10)
    (stage,) = run.metrics["train"]["stages"]
    assert stage["best_metric"] == pytest.approx(run.metrics["validation"]["tenths"])
