"""Scores of features: against the papers' formulas written out, and what must not change them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier

from hftl import transferability as scores
from hftl.transferability import Array, decompose


def clusters(rows: int = 60, classes: int = 3, width: int = 6, seed: int = 0) -> tuple[Array, Array]:
    """Overlapping clouds far from zero, classes of different size."""
    random = np.random.default_rng(seed)
    labels = np.sort(random.choice(classes, size=rows, p=np.arange(1, classes + 1) / sum(range(1, classes + 1))))
    centres = random.normal(size=(classes, width))
    return centres[labels] + random.normal(size=(rows, width)) + 2.0, labels


def source_head(rows: int, classes: int = 4) -> Array:
    logits = np.random.default_rng(1).normal(size=(rows, classes)) * 2
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def evidence(features: Array, targets: Array, alpha: float, beta: float) -> float:
    """Equation 2 of the LogME paper, as the density of a normal distribution that it is."""
    rows = len(targets)
    covariance = np.eye(rows) / beta + features @ features.T / alpha
    _, log_determinant = np.linalg.slogdet(covariance)
    return -0.5 * (rows * math.log(2 * math.pi) + log_determinant + targets @ np.linalg.solve(covariance, targets))


@pytest.mark.parametrize("shape", [(60, 3, 6), (20, 2, 12)])
def test_logme_is_the_largest_evidence(shape: tuple[int, int, int]) -> None:
    features, labels = clusters(*shape)
    total = 0.0
    for number in np.unique(labels):
        targets = (labels == number).astype(float)
        found = minimize(
            lambda logs, targets=targets: -evidence(features, targets, *np.exp(logs)),
            [0.0, 0.0],
            method="Nelder-Mead",
            options={"xatol": 1e-7, "fatol": 1e-10, "maxiter": 2000},
        )
        total += -found.fun / len(labels)
    assert scores.logme(decompose(features), labels) == pytest.approx(total / len(np.unique(labels)), abs=1e-5)


def test_h_score_is_the_trace_of_the_paper() -> None:
    features, labels = clusters()
    means = np.stack([features[labels == number].mean(axis=0) for number in labels])
    expected = np.trace(np.linalg.pinv(np.cov(features.T, bias=True)) @ np.cov(means.T, bias=True))
    assert scores.h_score(decompose(features), labels) == pytest.approx(expected, abs=1e-9)
    assert scores.h_score(decompose(scores.with_constant(features)), labels) == pytest.approx(expected, abs=1e-9)
    wide, labels = clusters(10, 3, 30)
    assert scores.h_score(decompose(wide), labels) == pytest.approx(len(np.unique(labels)) - 1)


@pytest.mark.parametrize("shape", [(60, 3, 6), (20, 3, 30)])
def test_transrate_is_the_difference_of_coding_rates(shape: tuple[int, int, int]) -> None:
    features, labels = clusters(*shape)
    centred = features - features.mean(axis=0)
    centred /= math.sqrt((centred**2).sum() / len(labels))

    def rate(rows: Array) -> float:
        return 0.5 * np.linalg.slogdet(np.eye(rows.shape[1]) + rows.T @ rows / (len(rows) * 1e-4))[1]

    classes = [centred[labels == number] for number in np.unique(labels)]
    expected = rate(centred) - sum(len(rows) / len(labels) * rate(rows) for rows in classes)
    assert scores.transrate(decompose(features), labels) == pytest.approx(expected, abs=1e-8)


def test_leep_and_nce_written_out() -> None:
    _, labels = clusters(40)
    theta = source_head(40)
    classes = sorted(set(labels))
    joint = {
        (y, z): sum(theta[i, z] for i in range(40) if labels[i] == y) / 40
        for y in classes
        for z in range(theta.shape[1])
    }
    of_source = {z: sum(joint[y, z] for y in classes) for z in range(theta.shape[1])}
    expected = 0.0
    for i in range(40):
        expected += math.log(sum(joint[labels[i], z] / of_source[z] * theta[i, z] for z in of_source)) / 40
    assert scores.leep(theta, labels) == pytest.approx(expected)

    source = theta.argmax(axis=1)
    entropy = 0.0
    for z in set(source):
        for y in classes:
            both = sum((source == z) & (labels == y)) / 40
            if both:
                entropy -= both * math.log(both / (sum(source == z) / 40))
    assert scores.nce(source, labels) == pytest.approx(-entropy)
    assert scores.nce(labels, labels) == pytest.approx(0.0)
    assert scores.leep(np.eye(3)[labels], labels) == pytest.approx(0.0)


def test_the_probe_leaves_each_row_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against as many fits as there are rows."""
    features, labels = clusters(50, 3, 4)
    features = scores.with_constant(features)
    penalties = [0.01, 1.0]
    mean = decompose(features).values.mean()
    right = []
    for penalty in penalties:
        answers = []
        for row in range(50):
            others = np.arange(50) != row
            model = Ridge(penalty * mean, fit_intercept=False, solver="cholesky")
            model.fit(features[others], np.eye(3)[labels][others])
            answers.append(model.predict(features[row : row + 1]).argmax() == labels[row])
        right.append(float(np.mean(answers)))
    assert 0.5 < min(right) < 1.0
    for penalty, accuracy in zip(penalties, right, strict=True):
        monkeypatch.setattr(scores, "_PENALTIES", (penalty,))
        assert scores.linear_probe(decompose(features), labels) == pytest.approx(accuracy)


def test_neighbours_as_scikit_learn_finds_them() -> None:
    features, labels = clusters(51, 2)  # two classes and five votes: no ties
    answers = []
    for row in range(51):
        others = np.arange(51) != row
        model = KNeighborsClassifier(5, metric="cosine").fit(features[others], labels[others])
        answers.append(model.predict(features[row : row + 1])[0] == labels[row])
    assert scores.nearest_neighbours(features, labels) == pytest.approx(np.mean(answers))


def of_features(score: Callable[..., float]) -> Callable[[Array, Array], float]:
    return lambda features, labels: score(decompose(features), labels)


SCORES = {
    "logme": of_features(scores.logme),
    "h_score": of_features(scores.h_score),
    "transrate": of_features(scores.transrate),
    "probe": of_features(scores.linear_probe),
    "neighbours": scores.nearest_neighbours,
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("shape", [(60, 3, 6), (20, 3, 30)])
def test_what_does_not_change_a_score(name: str, shape: tuple[int, int, int]) -> None:
    features, labels = clusters(*shape)
    score = SCORES[name](features, labels)
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(shape[2], shape[2])))[0]
    order = np.random.default_rng(3).permutation(len(labels))
    # abs: the guard of LogME against a perfect fit has a scale
    assert SCORES[name](features @ rotation, labels) == pytest.approx(score, abs=1e-6)
    assert SCORES[name](features * 37.0, labels) == pytest.approx(score, abs=1e-6)
    assert SCORES[name](features[order], labels[order]) == pytest.approx(score, abs=1e-6)
    assert SCORES[name](features, np.array([2, 0, 1])[labels]) == pytest.approx(score, abs=1e-6)
    assert SCORES[name](features, 10 * labels + 3) == pytest.approx(score, abs=1e-6)  # classes that never occur


def test_h_score_ignores_any_linear_map() -> None:
    features, labels = clusters()
    mixed = features @ np.random.default_rng(4).normal(size=(6, 6)) + 5.0
    assert scores.h_score(decompose(mixed), labels) == pytest.approx(scores.h_score(decompose(features), labels))


def test_leep_and_nce_do_not_depend_on_the_order_of_classes() -> None:
    _, labels = clusters(40)
    theta = source_head(40)
    swapped = np.array([1, 2, 0])[labels]
    assert scores.leep(theta[:, ::-1], swapped) == pytest.approx(scores.leep(theta, labels))
    assert scores.nce((7 - theta.argmax(axis=1)) * 5, swapped) == pytest.approx(
        scores.nce(theta.argmax(axis=1), labels)
    )


@pytest.mark.parametrize("name", SCORES)
def test_features_that_know_the_classes_score_higher(name: str) -> None:
    features, labels = clusters(200)
    noise = np.random.default_rng(5).normal(size=features.shape)
    assert SCORES[name](features, labels) > SCORES[name](noise, labels)
