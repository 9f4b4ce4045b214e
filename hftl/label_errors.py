"""Rows whose label is likely wrong, by probabilities of a model that has not trained on them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def likely_label_errors(probabilities: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Numbers of the suspicious rows, the likeliest first (Northcutt et al. 2021, "Confident Learning").

    A row is suspicious if its probability of another class is as high as that class's own rows have it on average, and
    higher than that of the given label. They are ordered by the margin between the two.

    Args:
        probabilities: of every class, held out or out of fold, shape (rows, classes).
        labels: the given class ids, shape (rows,).
    """
    rows, classes = probabilities.shape
    thresholds = np.full(classes, np.inf)
    for number in np.unique(labels):
        thresholds[number] = probabilities[labels == number, number].mean()
    own = probabilities[np.arange(rows), labels]
    others = np.where(probabilities >= thresholds, probabilities, -1.0)
    others[np.arange(rows), labels] = -1.0
    margin = others.max(axis=1) - own
    suspicious = np.flatnonzero(margin > 0)
    return suspicious[np.argsort(-margin[suspicious], kind="stable")]
