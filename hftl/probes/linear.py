"""Linear heads other than logistic regression: they become the model's ordinary output layer, as that one does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from hftl.errors import UsageError
from hftl.losses import CrossEntropyLoss
from hftl.probes.discriminant import solve_discriminant
from hftl.probes.logistic import STRENGTHS, WORSE, LinearHead, solve_linear_head, standardisation, unscaled

#: e to the power of this is the widest that a temperature may be searched around scores of deviation 1
_WIDEST = 8.0


def fit_linear_head(
    kind: str,
    train: tuple[torch.Tensor, torch.Tensor],
    validation: tuple[torch.Tensor, torch.Tensor],
    label_names: list[str],
    loss: CrossEntropyLoss,
    score: Callable[[torch.Tensor, torch.Tensor], float],
    intercept: bool = True,
    start: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> LinearHead:
    """An output layer of one of these kinds, its penalty chosen on validation as in `solve_linear_head`.

    - logistic, least squares: of least loss; for one class of several multinomial logistic regression.
    - discriminant: of vectors to search by, see `solve_discriminant`.
    - svm: a linear support vector machine for each class against the others (scikit-learn's `LinearSVC`, whose penalty
      includes the bias).
    - ridge: least squares on targets of -1 and 1 (`RidgeClassifier`).
    - nearest_mean: the class whose mean is nearest to the features (Snell et al. 2017, on features that stay as they
      are): ‖x - m‖² = ‖x‖² - 2 m·x + ‖m‖², of which the first term is the same for every class. A layer without a bias
      cannot hold ‖m‖²; there the means have length 1, and the class is that of the largest cosine.

    All work on standardised features. The scores of the last three are no log probabilities: they are divided by a
    temperature, fitted on validation (Guo et al. 2017), which changes no prediction.

    Args:
        kind: as above.
        train: features of shape (rows, features) and class ids of shape (rows,).
        validation: the same of the rows that choose the penalty and the temperature.
        label_names: name of each class id.
        loss: logistic and least squares minimise it; its class weights go to svm and ridge too.
        score: of logits of shape (rows, classes) and class ids; more is better.
        intercept: whether the layer has a bias.
        start: a layer that knows the classes, for logistic.

    Raises:
        UsageError: a class has no training row, of which svm, ridge and nearest_mean have nothing to say.
    """
    classes = len(label_names)
    if kind == "discriminant":
        return solve_discriminant(train, validation, classes, score, intercept)
    if kind in ("logistic", "least squares"):
        return solve_linear_head(train, validation, classes, loss, score, intercept, start)
    features, labels = train[0].double(), train[1].numpy()
    check_every_class(kind, train[1], label_names)
    mean, scale = standardisation(features, intercept)
    rows = ((features - mean) * scale).numpy()
    weights = None if loss.class_weights is None else loss.class_weights.double().numpy()[labels]
    path: list[tuple[float, float, float]] = []
    best, best_key = None, (-math.inf, -math.inf)
    for strength in STRENGTHS if kind in _FITS else (0.0,):
        if kind in _FITS:
            parameters = _as_classes(_FITS[kind](strength, len(rows), intercept), rows, labels, weights)
        else:
            parameters = _class_means(rows, labels, classes, intercept)
        weight, bias = unscaled(torch.from_numpy(parameters), mean, scale, intercept)
        logits = validation[0].double() @ weight.T + (0.0 if bias is None else bias)
        temperature = fit_temperature(logits, validation[1])
        found = score(logits / temperature, validation[1])
        log_loss = float(nn.functional.cross_entropy(logits / temperature, validation[1]))
        key = (-math.inf if math.isnan(found) else found, -log_loss)
        path.append((strength, key[0], log_loss))
        if best is None or key > best_key:
            scaled_bias = None if bias is None else (bias / temperature).float()
            best, best_key = ((weight / temperature).float(), scaled_bias, strength, temperature), key
        if len(path) > WORSE and all(later > path[-WORSE - 1][2] for _, _, later in path[-WORSE:]):
            break
    assert best is not None
    weight, bias, strength, temperature = best
    return LinearHead(weight, bias, strength, tuple(path), len(path), temperature)


def check_every_class(kind: str, labels: torch.Tensor, label_names: list[str]) -> None:
    """Refuse rows of which a class has none.

    Raises:
        UsageError: as said.
    """
    for name, count in zip(label_names, torch.bincount(labels, minlength=len(label_names)).tolist(), strict=True):
        if not count:
            raise UsageError(f"--head {kind}: no training row is left of the class {name!r}. Use --head logistic.")


def _svm(strength: float, rows: int, intercept: bool) -> Any:
    from sklearn.svm import LinearSVC  # here: half a second that a run without it need not wait for

    # Its coordinate descent draws the order of the rows; liblinear's own limit of 1,000 passes is short for few rows.
    return LinearSVC(C=1 / (strength * rows), fit_intercept=intercept, max_iter=10_000, random_state=0)


def _ridge(strength: float, rows: int, intercept: bool) -> Any:
    from sklearn.linear_model import RidgeClassifier

    return RidgeClassifier(alpha=strength * rows, fit_intercept=intercept)


#: the classifier for a penalty, the number of rows, and whether there is a bias
_FITS: dict[str, Callable[[float, int, bool], Any]] = {"svm": _svm, "ridge": _ridge}


def _as_classes(classifier: Any, rows: np.ndarray, labels: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """One row of weights a class, its bias last; of two classes scikit-learn gives the difference."""
    fitted = classifier.fit(rows, labels, sample_weight=weights)
    parameters = np.atleast_2d(fitted.coef_)
    if classifier.fit_intercept:
        parameters = np.concatenate([parameters, np.reshape(fitted.intercept_, (-1, 1))], axis=1)
    return np.concatenate([-parameters / 2, parameters / 2]) if len(parameters) == 1 else parameters


def _class_means(rows: np.ndarray, labels: np.ndarray, classes: int, intercept: bool) -> np.ndarray:
    """The layer that says which mean is nearest; see `fit_linear_head`."""
    means = np.stack([rows[labels == index].mean(axis=0) for index in range(classes)])
    lengths = np.linalg.norm(means, axis=1, keepdims=True)
    return np.concatenate([2 * means, -(lengths**2)], axis=1) if intercept else means / np.maximum(lengths, 1e-12)


def fit_temperature(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """What scores of shape (rows, classes) are divided by for the least log loss (Guo et al. 2017).

    Targets are held back from 0 and 1 by one row in so many (Platt 1999): where every row is right, no temperature
    above zero would be the least.
    """
    from scipy.optimize import minimize_scalar

    unit = float(scores.std()) or 1.0
    smoothing = 1 / (len(labels) + 2)

    def log_loss(logarithm: float) -> float:
        logits = scores / (unit * math.exp(logarithm))
        return float(nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing))

    found = minimize_scalar(log_loss, bounds=(-_WIDEST, _WIDEST), method="bounded")
    return unit * math.exp(found.x)
