"""Rows whose label is likely wrong, by what a model says of them that has not trained on them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def likely_label_errors(
    scores: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Numbers of the suspicious rows, the likeliest first, and what they rather are (Northcutt et al. 2021).

    "Confident learning": a row is suspicious if its score of another class is as high as that class's own rows have it
    on average, and higher than that of the given label. They are ordered by the margin between the two.

    Args:
        scores: of every class, held out or out of fold, shape (rows, classes); probabilities or the like.
        labels: the given class ids, shape (rows,).
    """
    rows, classes = scores.shape
    thresholds = np.full(classes, np.inf)
    for number in np.unique(labels):
        thresholds[number] = scores[labels == number, number].mean()
    own = scores[np.arange(rows), labels]
    others = np.where(scores >= thresholds, scores, -np.inf)
    others[np.arange(rows), labels] = -np.inf
    margin = others.max(axis=1) - own
    suspicious = np.flatnonzero(margin > 0)
    suspicious = suspicious[np.argsort(-margin[suspicious], kind="stable")]
    return suspicious, others[suspicious].argmax(axis=1)
