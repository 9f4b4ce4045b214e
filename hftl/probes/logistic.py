"""A linear output layer solved instead of trained: logistic regression, or least squares, by its loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hftl.compute import one_thread_if_small
from hftl.losses import RowLoss

#: weights of the penalty, from strong to weak: λ of mean loss + λ/2 ‖W‖² on standardised features. scikit-learn's C is
#: 1 / (λ rows), so that for a thousand rows this covers C = 0.001 to 100, as linear evaluations of features use
#: (Radford et al. 2021, appendix A.3, sweep as widely)
STRENGTHS = tuple(10.0 ** (-half / 2) for half in range(11))
#: before them, where the penalty pulls to a layer that knows the classes, which a few rows should hardly move
_NEAR_START = tuple(10.0 ** (half / 2) for half in range(4, 0, -1))
#: a feature that hardly varies in training (a channel behind a ReLU that one picture wakes) is not stretched to a
#: deviation of one, or the rows in which it does vary would get extreme answers. A part of the mean deviation; accuracy
#: on test, EfficientNet-Lite0, without it and with a tenth: digits, 150 rows 0.881 and 0.911, 400 rows 0.896 and 0.926;
#: MNIST, 16 a class 0.787 and 0.810; macro F1 on blood cells, 16 a class 0.903 and 0.945. Texts have no such features
_LEAST_DEVIATION = 0.1
#: the path ends when validation loss was worse than before so many penalties in a row
WORSE = 3
#: numbers of logits held at once: a thousand classes are solved in pieces of 16,000 rows
_LOGITS = 2**24
#: below so many numbers of features the loss is computed in double precision, in which L-BFGS stops where it should …
_DOUBLE = 5e7
#: … and below so many they are held in it, rather than converted in pieces for every evaluation
_HELD = 2**22
#: numbers of features that are converted at once (a fit to 20,000 rows of 1,280 takes 2.8 s and next to no memory; with
#: pieces four times as large it takes 4.7 s and 46 MB)
_PIECE = 2**20


@dataclass(frozen=True)
class LinearHead:
    """A solved output layer.

    Attributes:
        weight: shape (classes, features); standardisation is folded in.
        bias: shape (classes,), or None for a layer without.
        strength: the λ that validation chose; infinite where it is the layer that the search started from.
        path: λ, validation score and validation log loss of every candidate; no number where there is no such loss.
        steps: evaluations of the loss over all rows, or fits, for the whole path.
        temperature: what the scores were divided by to become log probabilities; None where they were made as such.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    strength: float
    path: tuple[tuple[float, float, float], ...]
    steps: int
    temperature: float | None = None


def solve_linear_head(
    train: tuple[torch.Tensor, torch.Tensor],
    validation: tuple[torch.Tensor, torch.Tensor],
    classes: int,
    loss: RowLoss,
    score: Callable[[torch.Tensor, torch.Tensor], float],
    intercept: bool = True,
    start: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> LinearHead:
    """The output layer of least penalised loss by L-BFGS (Liu and Nocedal 1989), its penalty chosen on validation.

    The penalties form a path from strong to weak, each solved from the one before. The best by `score` is taken, of
    equal ones that with the lowest validation loss. Features are standardised within the weights, not in a copy.
    A layer that knows the classes already is a candidate too, and the penalty pulls to it and not to zero (L2-SP, Li et
    al. 2018), so that a few rows move it only as far as validation finds it better.
    Memory: the features as they are given, and a piece of them and of the logits.

    Args:
        train: features of shape (rows, features) and labels, as the loss takes them.
        validation: the same of the rows that choose the penalty.
        classes: number of classes.
        loss: smooth and convex in the logits: multinomial logistic regression is that of cross entropy.
        score: of logits of shape (rows, classes) and labels; more is better.
        intercept: whether the layer has a bias.
        start: weight and bias of a layer that knows the classes; None where there is none.
    """
    features, labels = train
    dtype = torch.float64 if features.numel() < _DOUBLE else torch.float32
    features = features.to(dtype) if features.numel() < _HELD else features
    mean, scale = (value.to(dtype) for value in standardisation(features, intercept))
    held_out = validation[0].to(dtype)
    problem = _Problem(features, labels, loss, (mean, scale), intercept, start)
    parameters = torch.zeros(classes, features.shape[1] + intercept, dtype=dtype)
    path, best, best_key = [], parameters, (-math.inf, -math.inf)
    chosen = STRENGTHS[0]
    for strength in STRENGTHS if start is None else (math.inf, *_NEAR_START, *STRENGTHS):
        if math.isfinite(strength):
            with one_thread_if_small(features.numel() * classes):
                parameters = problem.solve(parameters, strength)
        weight, bias = problem.layer(parameters)
        logits = held_out @ weight.T + (0.0 if bias is None else bias)
        found = score(logits, validation[1])
        # A metric that is no number (one class alone in validation, say) chooses nothing.
        key = (-math.inf if math.isnan(found) else found, -float(loss({"logits": logits}, validation[1])))
        path.append((strength, key[0], -key[1]))
        if key > best_key:
            best, best_key, chosen = parameters, key, strength
        if len(path) > WORSE and all(loss > path[-WORSE - 1][2] for _, _, loss in path[-WORSE:]):
            break  # weaker penalties overfit more, and take the longest
    weight, bias = problem.layer(best)
    return LinearHead(weight.float(), None if bias is None else bias.float(), chosen, tuple(path), problem.steps)


def standardisation(features: torch.Tensor, intercept: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What is taken off each feature, of shape (rows, features), and what the rest is multiplied by; in float64."""
    pieces = features.split(max(1, _PIECE // features.shape[1]))
    mean = torch.stack([piece.double().sum(dim=0) for piece in pieces]).sum(dim=0) / len(features)
    squares = torch.stack([(piece.double() - mean).square().sum(dim=0) for piece in pieces])
    deviation = (squares.sum(dim=0) / len(features)).sqrt()
    # A layer without a bias has nowhere to put the mean; a feature that never changes says nothing.
    mean = mean if intercept else torch.zeros_like(mean)
    least = max(1e-6, _LEAST_DEVIATION * float(deviation.mean()))
    return mean, torch.where(deviation > 1e-6, 1 / deviation.clamp(min=least), 0.0)


def unscaled(
    parameters: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor, intercept: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The layer for features as they are, from one for standardised features."""
    weight = parameters[:, : len(scale)] * scale
    return weight, (parameters[:, -1] - weight @ mean if intercept else None)


class _Problem:
    """The penalised loss over all rows, and its minimum."""

    def __init__(
        self,
        features: torch.Tensor,
        labels: torch.Tensor,
        loss: RowLoss,
        standardised: tuple[torch.Tensor, torch.Tensor],
        intercept: bool,
        start: tuple[torch.Tensor, torch.Tensor | None] | None,
    ) -> None:
        self.features, self.labels, self.loss = features, labels, loss
        self.standardised, self.intercept = standardised, intercept
        dtype = standardised[0].dtype
        self.known = None if start is None else (start[0].to(dtype), None if start[1] is None else start[1].to(dtype))
        self.steps = 0

    def layer(self, parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias for features as they are; zero parameters are the layer to start from."""
        weight, bias = unscaled(parameters, *self.standardised, self.intercept)
        if self.known is None:
            return weight, bias
        known, own = self.known
        assert (bias is None) == (own is None)
        return weight + known, None if bias is None or own is None else bias + own

    def solve(self, start: torch.Tensor, strength: float) -> torch.Tensor:
        """The parameters (classes, features [+ 1]) of least loss, searched from `start`."""
        parameters = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [parameters],
            max_iter=200,
            history_size=10,
            tolerance_grad=1e-6,
            tolerance_change=1e-10,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(lambda: self._value_and_gradient(parameters, strength))
        return parameters.detach()

    def _value_and_gradient(self, parameters: torch.Tensor, strength: float) -> torch.Tensor:
        self.steps += 1
        rows, width = self.features.shape
        value = strength / 2 * parameters[:, :width].square().sum()
        parameters.grad = None
        value.backward()
        total = value.detach()
        piece = max(1, min(_LOGITS // len(parameters), _PIECE // width))
        for start in range(0, rows, piece):
            part = slice(start, start + piece)
            weight, bias = self.layer(parameters)
            logits = self.features[part].to(parameters.dtype) @ weight.T
            logits = logits if bias is None else logits + bias
            loss = self.loss({"logits": logits}, self.labels[part], rows)
            loss.backward()
            total = total + loss.detach()
        return total
