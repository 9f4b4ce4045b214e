"""The solved head: the minimum that scikit-learn finds, its penalty chosen on validation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from hftl import probes
from hftl.losses import CrossEntropyLoss, balanced_class_weights
from hftl.probes import solve_linear_head


def clusters(rows: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clouds on axes of very different scale, far from zero."""
    random = np.random.default_rng(seed)
    labels = random.integers(classes, size=rows)
    centres = np.random.default_rng(99).normal(size=(classes, 6))
    features = (centres[labels] + random.normal(size=(rows, 6)) * 1.5) * [1, 10, 0.1, 1, 1, 1] + [0, 50, 3, 0, 0, 0]
    return torch.tensor(features, dtype=torch.float32), torch.tensor(labels)


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return float((logits.argmax(dim=1) == labels).double().mean())


@pytest.mark.parametrize("classes", [2, 5])
def test_every_penalty_is_solved_as_scikit_learn_does(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = clusters(300, classes)
    mean, deviation = features.mean(0), features.std(0, correction=0)
    for strength in (0.1, 0.001):
        monkeypatch.setattr(probes, "STRENGTHS", (strength,))
        head = solve_linear_head((features, labels), (features, labels), classes, CrossEntropyLoss(), accuracy)
        # Two classes have one row of weights there, for the difference, and with it half of the penalty.
        peer = LogisticRegression(C=(2 if classes == 2 else 1) / (strength * 300), max_iter=5000, tol=1e-10)
        peer.fit(((features - mean) / deviation).numpy(), labels.numpy())
        expected = peer.predict_proba(((features - mean) / deviation).numpy())
        assert head.bias is not None
        found = (features @ head.weight.T + head.bias).softmax(dim=1).numpy()
        assert np.abs(found - expected).max() < 1e-3


def test_the_penalty_is_chosen_on_validation() -> None:
    train, validation = clusters(40, 3), clusters(400, 3, seed=1)
    head = solve_linear_head(train, validation, 3, CrossEntropyLoss(), accuracy)
    best = max(head.path, key=lambda entry: (entry[1], -entry[2]))
    assert head.strength == best[0]
    assert len({score for _, score, _ in head.path}) > 1  # there was something to choose
    assert head.bias is not None
    logits = validation[0] @ head.weight.T + head.bias
    assert accuracy(logits, validation[1]) == pytest.approx(best[1])


def test_pieces_of_rows_give_the_same_head(monkeypatch: pytest.MonkeyPatch) -> None:
    train, validation = clusters(200, 4), clusters(100, 4, seed=1)
    weights = balanced_class_weights(np.bincount(train[1], minlength=4).tolist())
    loss = CrossEntropyLoss(weights, label_smoothing=0.1)
    whole = solve_linear_head(train, validation, 4, loss, accuracy)
    monkeypatch.setattr(probes, "_LOGITS", 4 * 7)
    pieces = solve_linear_head(train, validation, 4, loss, accuracy)
    assert torch.allclose(whole.weight, pieces.weight, atol=1e-4)
    assert whole.strength == pieces.strength


def test_a_layer_without_bias_and_a_feature_that_never_changes() -> None:
    (features, labels), validation = clusters(200, 3), clusters(100, 3, seed=1)
    features[:, 3] = 7.0
    head = solve_linear_head((features, labels), validation, 3, CrossEntropyLoss(), accuracy, intercept=False)
    assert head.bias is None
    assert head.weight[:, 3].abs().max() == 0.0
    assert torch.isfinite(head.weight).all()


def test_class_weights_move_the_border() -> None:
    features, labels = clusters(2000, 2)
    keep = (labels == 0) | (torch.arange(2000) % 20 == 0)
    features, labels = features[keep], labels[keep]
    weights = balanced_class_weights(torch.bincount(labels).tolist())
    recalls = []
    for loss in (CrossEntropyLoss(), CrossEntropyLoss(weights)):
        head = solve_linear_head((features, labels), (features, labels), 2, loss, lambda logits, ids: 0.0)
        assert head.bias is not None
        rare = features[labels == 1] @ head.weight.T + head.bias
        recalls.append(float((rare.argmax(dim=1) == 1).float().mean()))
    assert recalls[1] > recalls[0] + 0.2


def test_the_logits_of_all_rows_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_LOGITS", 10_000)
    monkeypatch.setattr(probes, "STRENGTHS", (0.1,))
    classes, rows = 50, 2_000
    labels = torch.arange(rows) % classes
    features = torch.nn.functional.one_hot(labels % 16, 16).float() + torch.randn(rows, 16) * 0.1
    sizes = []

    class Counting(CrossEntropyLoss):
        def __call__(self, outputs: dict[str, torch.Tensor], *others: object) -> torch.Tensor:  # type: ignore[override]
            sizes.append(outputs["logits"].numel())
            return super().__call__(outputs, *others)  # type: ignore[arg-type]

    few = (features[:100], labels[:100])
    solve_linear_head((features, labels), few, classes, Counting(), accuracy)
    assert max(sizes) == 10_000
    assert sum(sizes) > 5 * rows * classes  # all rows, several times
