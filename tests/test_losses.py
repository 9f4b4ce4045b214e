"""The loss does not depend on how a batch is cut into parts, and is what its formula says."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tiny_models import TINY, tiny_inputs
from tiny_training import TinyData, tiny_arguments, tiny_trainer
from transformers import PreTrainedModel

import hftl
from hftl.data import Splits
from hftl.losses import CrossEntropyLoss, FocalLoss, LogitAdjustedLoss, balanced_class_weights
from hftl.methods import build_plan
from hftl.tasks.text_classification import TextClassification

WEIGHTS = torch.tensor([0.2, 1.0, 3.0])
LOSSES = {
    "plain": CrossEntropyLoss(),
    "weighted": CrossEntropyLoss(WEIGHTS),
    "smoothed": CrossEntropyLoss(label_smoothing=0.1),
    "both": CrossEntropyLoss(WEIGHTS, 0.1),
    "focal": FocalLoss(),
    "weighted focal": FocalLoss(WEIGHTS),
    "logit-adjusted": LogitAdjustedLoss([6, 3, 1]),
    "smoothed logit-adjusted": LogitAdjustedLoss([6, 3, 1], 0.1),
}


def model_without_dropout(name: str) -> PreTrainedModel:
    model = TINY[name]()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model


def train(name: str, loss: CrossEntropyLoss, folder: Path, *flags: str) -> dict[str, list[float]]:
    """Losses and gradient norms of two steps of 16 rows, and the loss of an evaluation on 22 rows."""
    model = model_without_dropout(name)
    (stage,) = build_plan(model, tiny_arguments(model, "--learning_rate=1e-3")).stages
    trainer = tiny_trainer(
        model, stage, folder, "--max_steps=2", *flags, rows=32, loss=loss, eval_dataset=TinyData(model, 22)
    )
    trainer.train()
    history = trainer.state.log_history
    return {
        "loss": [entry["loss"] for entry in history if "loss" in entry],
        "grad_norm": [entry["grad_norm"] for entry in history if "grad_norm" in entry],
        "eval_loss": [trainer.evaluate()["eval_loss"]],
    }


@pytest.mark.parametrize("loss", ["plain", "weighted", "smoothed", "both", "weighted focal", "smoothed logit-adjusted"])
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_accumulated_parts_give_the_loss_and_the_gradient_of_the_whole(name: str, loss: str, tmp_path: Path) -> None:
    whole = train(name, LOSSES[loss], tmp_path, "--per_device_train_batch_size=16", "--per_device_eval_batch_size=22")
    parts = train(
        name,
        LOSSES[loss],
        tmp_path,
        "--per_device_train_batch_size=4",
        "--gradient_accumulation_steps=4",
        "--per_device_eval_batch_size=4",  # five batches of four rows and one of two
    )
    assert len(whole["loss"]) == len(whole["grad_norm"]) == 2
    for key, values in whole.items():
        assert parts[key] == pytest.approx(values, rel=1e-6), key


def test_the_logged_loss_is_the_mean_over_the_rows(tmp_path: Path) -> None:
    model = model_without_dropout("bert")
    (stage,) = build_plan(model, tiny_arguments(model)).stages
    flags = ["--max_steps=1", "--per_device_train_batch_size=4", "--gradient_accumulation_steps=4"]
    trainer = tiny_trainer(model, stage, tmp_path, *flags, rows=16, eval_dataset=TinyData(model, 16))
    labels = torch.tensor(TinyData(model, 16).labels)
    with torch.no_grad():
        logits = model.eval()(**tiny_inputs(model, batch=16)).logits
    expected = float(torch.nn.functional.cross_entropy(logits, labels))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    trainer.train()
    (logged,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(expected, rel=1e-6)


def by_hand(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None, smoothing: float) -> torch.Tensor:
    """Row by row: the weighted cross entropy against a target that is spread by `smoothing`."""
    targets = torch.nn.functional.one_hot(labels, logits.shape[1]) if labels.ndim == 1 else labels
    rows = []
    for row, target in zip(logits.double(), targets.double(), strict=True):
        probabilities = row.exp() / row.exp().sum()
        target = target * (1 - smoothing) + smoothing / len(row)
        spread = target if weights is None else target * weights.double()
        rows.append(-(spread * probabilities.log()).sum())
    return torch.stack(rows).mean()


def focal_by_hand(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Equation 5 of Lin et al. with gamma 2; a row of several classes has the mean of their losses, by share."""
    targets = torch.nn.functional.one_hot(labels, logits.shape[1]) if labels.ndim == 1 else labels
    rows = []
    for row, target in zip(logits.double(), targets.double(), strict=True):
        probabilities = row.exp() / row.exp().sum()
        losses = [-((1 - p) ** 2) * torch.log(p) for p in probabilities]
        each = torch.ones(len(row)) if weights is None else weights
        rows.append(sum(float(t * w) * value for t, w, value in zip(target, each, losses, strict=True)))
    return torch.stack(rows).mean()


def expected_loss(loss: CrossEntropyLoss, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if isinstance(loss, FocalLoss):
        return focal_by_hand(logits, labels, loss.class_weights)
    if isinstance(loss, LogitAdjustedLoss):
        logits = logits.double() + torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()
    return by_hand(logits, labels, loss.class_weights, loss.label_smoothing)


@pytest.mark.parametrize("name", list(LOSSES))
def test_formula(name: str) -> None:
    loss = LOSSES[name]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(10, 3, generator=generator) * 2
    labels = torch.randint(0, 3, (10,), generator=generator)
    expected = expected_loss(loss, logits, labels)
    assert float(loss({"logits": logits}, labels)) == pytest.approx(float(expected), rel=1e-6)
    soft = torch.rand(10, 3, generator=generator).softmax(dim=1)
    expected = expected_loss(loss, logits, soft)
    assert float(loss({"logits": logits}, soft)) == pytest.approx(float(expected), rel=1e-6)
    hard = torch.nn.functional.one_hot(labels, 3).float()
    assert float(loss({"logits": logits}, hard)) == pytest.approx(float(loss({"logits": logits}, labels)), rel=1e-6)


def test_the_focal_loss_of_a_certain_row_has_a_gradient_that_is_a_number() -> None:
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    FocalLoss()({"logits": logits}, torch.tensor([0, 0])).backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0].abs().max() == 0.0
    torch.testing.assert_close(logits.grad[1], torch.tensor([-0.5, 0.5]))  # cross entropy's, of a row that is wrong


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("cut", [[10], [5, 5], [1, 2, 7], [1] * 10])
def test_parts_add_up_to_the_whole(name: str, cut: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(10, 3, generator=generator), torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 2, 2])
    loss = LOSSES[name]
    ends = [0, *itertools.accumulate(cut)]
    parts = [
        loss({"logits": logits[start:end]}, labels[start:end], num_items_in_batch=torch.tensor(10))
        for start, end in itertools.pairwise(ends)
    ]
    assert float(sum(parts)) == pytest.approx(float(loss({"logits": logits}, labels)), rel=1e-6)


def test_half_precision_logits_are_raised_to_float32() -> None:
    logits = torch.tensor([[40.0, 40.25], [40.25, 40.0]], dtype=torch.bfloat16)
    labels = torch.tensor([0, 0])
    loss = CrossEntropyLoss()({"logits": logits}, labels)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(by_hand(logits.double(), labels, None, 0.0)), rel=1e-6)


def test_the_flags_give_the_loss() -> None:
    flags = ["--class_weights=balanced", "--label_smoothing_factor=0.1"]
    task = TextClassification(hftl.parse(hftl.TextArguments, flags))
    counts = [6, 3, 1]
    rows = datasets.Dataset.from_dict({"label": np.repeat([0, 1, 2], counts)})
    loss = task.loss(Splits(rows, rows, None, ["a", "b", "c"], columns={}))
    assert type(loss) is CrossEntropyLoss
    assert loss.label_smoothing == 0.1
    torch.testing.assert_close(loss.class_weights, balanced_class_weights(counts), rtol=0, atol=0)


def test_balanced_weights_have_mean_1_over_the_rows() -> None:
    counts = [6, 3, 1]
    weights = balanced_class_weights(counts)
    torch.testing.assert_close(weights, torch.tensor([10 / 18, 10 / 9, 10 / 3]))
    mean: Any = sum(count * float(weight) for count, weight in zip(counts, weights, strict=True)) / 10
    assert mean == pytest.approx(1.0)
