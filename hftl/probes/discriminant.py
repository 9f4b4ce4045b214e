"""A projection solved instead of trained: regularised linear discriminant analysis, for vectors to search by."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from hftl.probes.logistic import LinearHead

#: what is added to the variances within the classes, in units of their mean, from little (each direction in which the
#: rows of a class differ is divided by how much) to much (features as they are, turned)
_STRENGTHS = (0.03, 0.1, 0.3, 1.0, 10.0)
#: directions that are tried beside one fewer than there are classes, which are all that tell those apart, and as many
#: as there is room for, which serve classes to come
_DIRECTIONS = (32, 64)
#: rows that are converted to double precision at once
_PIECE = 2**14


def solve_discriminant(
    train: tuple[torch.Tensor, torch.Tensor],
    validation: tuple[torch.Tensor, torch.Tensor],
    size: int,
    score: Callable[[torch.Tensor, torch.Tensor], float],
    intercept: bool = True,
) -> LinearHead:
    """An output layer under which rows of a class are near to each other, and far from the rest (Fisher 1936).

    The directions in which all rows vary most for how little those of a class do: x of S_t x = μ (S_w + λI) x with the
    largest μ, S_t being the covariance of the rows, S_w that around the means of their classes, and λ in units of its
    mean variance (Friedman 1989, "Regularized Discriminant Analysis"). Their features less the mean, turned so, are the
    vectors. Validation chooses λ and how many directions there are; further outputs are 0.

    On features of EfficientNet-Lite0, recall@1 of digits: as they are 0.796, so 0.967, by SGD and the contrastive loss
    0.956. Learned from the digits 0 to 5, of 6 to 9: 0.903, 0.948, and 0.788.

    Args:
        train: features of shape (rows, features) and class ids of shape (rows,).
        validation: the same of the rows that choose.
        size: outputs of the layer.
        score: of vectors of shape (rows, size) and class ids; more is better.
        intercept: whether the layer has a bias, which the mean needs.
    """
    from scipy.linalg import eigh

    mean, total, within = _covariances(*train)
    largest = min(size, len(mean))
    classes = len(train[1].unique())
    counts = sorted({min(count, largest) for count in (classes - 1, *_DIRECTIONS, size)})
    # Where the rows of a class are all the same, or all rows are, something has to be added all the same.
    variance = max(float(within.trace()), 1e-6 * float(total.trace()), 1e-12) / len(mean)
    unit = variance * torch.eye(len(mean), dtype=torch.float64)
    path: list[tuple[float, float, float]] = []
    best, best_score = None, -math.inf
    for strength in _STRENGTHS:
        places = [len(mean) - largest, len(mean) - 1]
        _, found = eigh(total.numpy(), (within + strength * unit).numpy(), subset_by_index=places)
        directions = torch.from_numpy(found).flip(1).T.float()
        for count in counts:
            weight = torch.zeros(size, len(mean))
            weight[:count] = directions[:count]
            bias = -weight @ mean.float() if intercept else None
            vectors = validation[0].float() @ weight.T + (0.0 if bias is None else bias)
            path.append((strength, score(vectors, validation[1]), math.nan))
            if best is None or path[-1][1] > best_score:
                best, best_score = (weight, bias, strength), path[-1][1]
    assert best is not None
    return LinearHead(*best, tuple(path), len(_STRENGTHS))


def _covariances(features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mean, the covariance, and that around the mean of each row's class; in double precision."""
    numbers = labels.unique(return_inverse=True)[1]
    counts = numbers.bincount()
    sums = torch.zeros(len(counts), features.shape[1], dtype=torch.float64)
    for rows, own in zip(features.split(_PIECE), numbers.split(_PIECE), strict=True):
        sums.index_add_(0, own, rows.double())
    mean, means = sums.sum(0) / len(features), sums / counts[:, None]
    total, within = (torch.zeros(len(mean), len(mean), dtype=torch.float64) for _ in range(2))
    for rows, own in zip(features.split(_PIECE), numbers.split(_PIECE), strict=True):
        for middle, squares in ((mean, total), (means[own], within)):
            apart = rows.double() - middle
            squares += apart.T @ apart
    return mean, total / len(features), within / len(features)
