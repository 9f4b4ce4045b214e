"""How well features suit a classification before anything is trained: LogME, H-score, TransRate, LEEP, NCE, a probe.

Functions over features of shape (rows, features), class ids of shape (rows,), and for LEEP and NCE what the model's own
trained head says. More is better everywhere. What needs the spectrum of the features shares one decomposition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

#: directions in which features vary by less than a hundred-thousandth of their largest are noise: they are kept in 16
#: bits, of which 11 are digits
_NOISE = 1e-10
#: weights of the probe's penalty, relative to the mean square of a direction; the best of a wider grid lay between 0.01
#: and 1 on six data sets of 600 to 2,000 rows (EfficientNet-Lite0 on pictures, MiniLM on texts)
_PENALTIES = tuple(10.0**power for power in range(-4, 3))
#: the fixed point of LogME: relative change at which it stands, and the most rounds (it takes 5 to 30)
_STANDS, _MOST_ROUNDS = 1e-6, 200


@dataclass(frozen=True)
class Spectrum:
    """Features F (rows, features) as F Fᵀ = left · diag(values) · leftᵀ, without the directions that are noise.

    Attributes:
        left: orthonormal columns, shape (rows, rank).
        values: squared singular values of F, shape (rank,).
    """

    left: Array
    values: Array


def decompose(features: Array) -> Spectrum:
    """The spectrum of features of shape (rows, features), from the smaller of their two Gram matrices."""
    features = features.astype(np.float64)
    rows, width = features.shape
    values, vectors = np.linalg.eigh(features.T @ features if width <= rows else features @ features.T)
    counts = values > _NOISE * values[-1]
    values, vectors = values[counts], vectors[:, counts]
    return Spectrum(features @ vectors / np.sqrt(values) if width <= rows else vectors, values)


def with_constant(features: Array) -> Array:
    """Features with one more that never changes, as large as the others together: for a layer with a bias."""
    size = np.sqrt(np.square(features, dtype=np.float64).sum(axis=1).mean())
    return np.concatenate([features, np.full((len(features), 1), size, features.dtype)], axis=1)


def scores(features: Array, labels: Array, probabilities: Array | None) -> dict[str, float | None]:
    """All scores by name; LEEP and NCE are None without what a trained head says.

    Args:
        features: shape (rows, features).
        labels: shape (rows,).
        probabilities: of the trained head, shape (rows, its classes).
    """
    spectrum = decompose(with_constant(features))
    return {
        "logme": logme(spectrum, labels),
        "h_score": h_score(spectrum, labels),
        "transrate": transrate(spectrum, labels),
        "leep": None if probabilities is None else leep(probabilities, labels),
        "nce": None if probabilities is None else nce(probabilities.argmax(axis=1), labels),
        "probe": linear_probe(spectrum, labels),
    }


def logme(spectrum: Spectrum, labels: Array) -> float:
    """Log of maximum evidence, a row and a class (You et al. 2021, "LogME", algorithms 1 and 3).

    For the 0/1 vector y of each class: Bayesian linear regression y = F w + noise, w ~ N(0, 1/α), noise ~ N(0, 1/β).
    The evidence log p(y | F, α, β) = n/2 log β + d/2 log α - n/2 log 2π - β/2 ‖F m - y‖² - α/2 ‖m‖² - 1/2 log |A|, with
    A = α I + β FᵀF and m = β A⁻¹ Fᵀ y, is raised by the fixed point γ = Σ βσ²/(α + βσ²), α = γ/‖m‖²,
    β = (n - γ)/‖F m - y‖². Does not change with the order of the classes, a rotation of the features or their scale.
    """
    targets = _one_hot(labels)
    rows = len(labels)
    values = (spectrum.values / spectrum.values.mean())[:, None]  # α takes up the scale
    parts = np.square(spectrum.left.T @ targets)  # of ‖y‖², along each direction, shape (rank, classes)
    rest = np.maximum(targets.sum(axis=0) - parts.sum(axis=0), 0.0)
    alpha, beta = np.ones(targets.shape[1]), np.ones(targets.shape[1])
    for _ in range(_MOST_ROUNDS):
        ratio = alpha / beta
        known = (values / (values + ratio)).sum(axis=0)
        size = (values * parts / np.square(values + ratio)).sum(axis=0)
        error = (parts * np.square(ratio / (values + ratio))).sum(axis=0) + rest
        alpha = known / (size + 1e-12)
        beta = (rows - known) / (error + 1e-5)  # their guard: as many features as rows fit anything
        if np.all(np.abs(alpha / beta - ratio) <= _STANDS * ratio):
            break
    evidence = rows * np.log(beta) + len(values) * np.log(alpha) - rows * np.log(2 * np.pi)
    evidence -= beta * error + alpha * size + np.log(alpha + beta * values).sum(axis=0)
    return float((evidence / 2 / rows).mean())


def h_score(spectrum: Spectrum, labels: Array) -> float:
    """tr(cov(f)⁻¹ cov(E[f | y])) (Bao et al. 2019, "An information-theoretic approach to transferability").

    Between 0 and the number of classes less one; with no more rows than features it is always the latter, and says
    nothing. In terms of projections: of the class indicators onto the features and a constant, less the constant.
    Does not change with the order of the classes nor any invertible linear map of the features.
    """
    targets = _one_hot(labels)
    targets /= np.sqrt(targets.sum(axis=0))
    constant = np.full(len(labels), 1 / np.sqrt(len(labels)))
    outside = constant - spectrum.left @ (spectrum.left.T @ constant)
    found = np.square(spectrum.left.T @ targets).sum() - 1.0
    size = np.square(outside).sum()
    return float(found + (np.square(outside @ targets).sum() / size if size > _NOISE else 0.0))


def transrate(spectrum: Spectrum, labels: Array, precision: float = 1e-4) -> float:
    """R(Z) - Σ n_c/n R(Z_c), R(Z) = 1/2 log det(I + ZᵀZ / (n ε)) (Huang et al. 2022, "Frustratingly easy …").

    The coding rate of all features over that within the classes; Z is centred. Their listing weighs all classes alike
    (1/K), which is the same for classes of one size. Z is scaled to a mean square of 1 a row, or models whose features
    differ in size would not compare at one ε (theirs, 1e-4). Does not change with the order of the classes, a rotation
    or the scale.
    """
    features = spectrum.left * np.sqrt(spectrum.values)
    mean = features.mean(axis=0)
    size = spectrum.values.sum() / len(labels) - np.square(mean).sum()  # mean square of a centred row
    # In these directions ZᵀZ is diagonal, but for the centring: with D diagonal and c = 1 / (precision · size),
    # det(D - c m mᵀ) = det(D) (1 - c mᵀ D⁻¹ m).
    stretched = 1 + spectrum.values / (len(labels) * precision * size)
    total = np.log(stretched).sum() + np.log(1 - np.square(mean) @ (1 / stretched) / (precision * size))
    centred = (features - mean) / np.sqrt(size)
    within = 0.0
    for number in np.unique(labels):
        rows = centred[labels == number]
        within += len(rows) / len(labels) * _coding_rate(rows, precision)
    return float(total) / 2 - within


def _coding_rate(features: Array, precision: float) -> float:
    rows, width = features.shape
    gram = features.T @ features if width <= rows else features @ features.T
    gram /= rows * precision
    gram[np.diag_indices_from(gram)] += 1.0
    return float(np.log(np.diag(np.linalg.cholesky(gram))).sum())


def leep(probabilities: Array, labels: Array) -> float:
    """Log expected empirical prediction (Nguyen et al. 2020, "LEEP").

    1/n Σ_i log Σ_z P(y_i | z) θ(x_i)_z, where θ(x)_z is what the trained head gives for its own class z, and
    P(y | z) = Σ_{i: y_i = y} θ(x_i)_z / Σ_i θ(x_i)_z. At most 0. Does not change with the order of either classes.

    Args:
        probabilities: θ, shape (rows, classes of the head).
        labels: shape (rows,).
    """
    joint = _one_hot(labels).T @ probabilities.astype(np.float64)
    total = joint.sum(axis=0)
    conditional = np.divide(joint, total, out=np.zeros_like(joint), where=total > 0)
    _, numbers = np.unique(labels, return_inverse=True)
    expected = (conditional[numbers] * probabilities).sum(axis=1)
    return float(np.log(expected).mean())


def nce(source: Array, labels: Array) -> float:
    """Negative conditional entropy -H(Y | Z) of the labels given the head's own answers (Tran et al. 2019), in nats.

    Between minus the entropy of the labels and 0. Does not change with the order of either classes.

    Args:
        source: the head's most probable class of each row, shape (rows,).
        labels: shape (rows,).
    """
    joint = _one_hot(labels).T @ _one_hot(source) / len(labels)
    conditional = joint / joint.sum(axis=0)
    there = joint > 0
    return float((joint[there] * np.log(conditional[there])).sum())


def linear_probe(spectrum: Spectrum, labels: Array) -> float:
    """Accuracy of a linear layer on rows that it has not seen, see `leave_one_out`."""
    _, numbers = np.unique(labels, return_inverse=True)
    return float((leave_one_out(spectrum, labels).argmax(axis=1) == numbers).mean())


def leave_one_out(spectrum: Spectrum, labels: Array) -> Array:
    """What a linear layer says of each row when it is fitted to all others, shape (rows, classes that occur).

    About 1 for the class that it takes the row for and 0 for the others. The layer is ridge regression onto the 0/1
    vectors of the classes, its penalty the best of seven by accuracy; the answer for a row left out follows from the
    fit to all rows: e_i / (1 - h_ii), with h the diagonal of the hat matrix (Allen 1974; as scikit-learn's
    RidgeClassifierCV). Give features `with_constant` for a bias. Does not change with the order of the classes, a
    rotation or the scale.
    """
    targets = _one_hot(labels)
    _, numbers = np.unique(labels, return_inverse=True)
    projected = spectrum.left.T @ targets
    squared = np.square(spectrum.left)
    best, best_accuracy = targets, -1.0
    for penalty in _PENALTIES:
        shrunk = spectrum.values / (spectrum.values + penalty * spectrum.values.mean())
        own = np.minimum(squared @ shrunk, 1 - 1e-9)[:, None]
        unseen = (spectrum.left @ (shrunk[:, None] * projected) - own * targets) / (1 - own)
        accuracy = float((unseen.argmax(axis=1) == numbers).mean())
        if accuracy > best_accuracy:
            best, best_accuracy = unseen, accuracy
    return best


def nearest_neighbours(features: Array, labels: Array, count: int = 5) -> float:
    """Accuracy of the majority of each row's nearest other rows by cosine; of equal ones the class of the nearest.

    Five: scikit-learn's default; a few dozen rows a class have hardly more that are near.
    """
    from sklearn.neighbors import NearestNeighbors

    _, numbers = np.unique(labels, return_inverse=True)
    count = min(count, len(labels) - 1)
    search = NearestNeighbors(n_neighbors=count, metric="cosine").fit(features)
    order = search.kneighbors(return_distance=False)  # without an argument: of each row, itself left out
    votes = np.zeros((len(labels), numbers.max() + 1))
    for place in range(count):
        # Each vote counts a little less than the one of the next nearer: only ties are decided by it.
        votes[np.arange(len(labels)), numbers[order[:, place]]] += 1 - 1e-3 * place
    return float((votes.argmax(axis=1) == numbers).mean())


def _one_hot(labels: Array) -> npt.NDArray[np.float64]:
    """Shape (rows, classes), of the classes that occur."""
    names, numbers = np.unique(labels, return_inverse=True)
    return np.eye(len(names))[numbers]
