"""Losses that Trainer calls with the model's outputs; the same value however a batch is cut into parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from hftl.arguments import TransferArguments
from hftl.errors import UsageError
from hftl.loading import import_scalar_function

#: `(outputs, labels, num_items_in_batch=None) -> scalar`
Loss = Callable[..., torch.Tensor]


class RowLoss:
    """A loss that is the sum over rows, divided by how many there are.

    Trainer passes `num_items_in_batch`, the number of rows over all accumulated parts and processes. Dividing the sum
    by it gives the same loss and gradient for 1 part of 16 rows, 4 parts of 4 and 2 processes; the loss inside the
    models does not (https://github.com/huggingface/transformers/issues/47688).
    """

    def __call__(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The loss of `outputs["logits"]`, shape (rows, outputs), and labels as the class says."""
        logits = outputs["logits"]
        if logits.dtype is not torch.float64:  # half precision loses the small differences between large logits
            logits = logits.float()
        labels = labels.to(logits) if labels.is_floating_point() else labels
        return self._total(logits, labels) / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    def _total(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The sum over the rows."""
        raise NotImplementedError


class CrossEntropyLoss(RowLoss):
    """Cross entropy over class ids, shape (rows,), or of mixed rows a share of each class, shape (rows, classes).

    Class weights have mean 1 over the training rows, and the sum is not divided by them: the usual weighted mean
    depends on how a batch is cut.

    Args:
        class_weights: one weight a class, shape (classes,); None weighs all alike.
        label_smoothing: part of the target spread over all classes (Szegedy et al. 2016).
    """

    def __init__(self, class_weights: torch.Tensor | None = None, label_smoothing: float = 0.0) -> None:
        """Keep the settings."""
        self.class_weights = class_weights
        self.label_smoothing = label_smoothing

    def _total(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        weights = None if self.class_weights is None else self.class_weights.to(logits)
        return nn.functional.cross_entropy(
            logits, labels, weight=weights, label_smoothing=self.label_smoothing, reduction="sum"
        )


class FocalLoss(CrossEntropyLoss):
    """Cross entropy in which a row counts the less, the surer the model is of its class (Lin et al. 2017).

    -w (1 - p)^gamma log p, with p the probability of the row's class and w its weight; gamma 2, their best. Soft labels
    mix the losses of their classes, as mixup does with any loss. Label smoothing is not defined for it.
    """

    def __init__(self, class_weights: torch.Tensor | None = None, gamma: float = 2.0) -> None:
        """Keep the settings."""
        super().__init__(class_weights)
        self.gamma = gamma

    def _total(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logs = logits.log_softmax(dim=1)
        modulated = (1 - logs.exp()).clamp(min=0) ** self.gamma * logs
        weights = None if self.class_weights is None else self.class_weights.to(logits)
        if labels.is_floating_point():
            return -(labels * (modulated if weights is None else modulated * weights)).sum()
        return nn.functional.nll_loss(modulated, labels, weight=weights, reduction="sum")


class LogitAdjustedLoss(CrossEntropyLoss):
    """Cross entropy of logits raised by tau times the log of the class's frequency (Menon et al. 2021, equation 10).

    The model learns what it would say of classes that are alike frequent: its own logits, without the addition,
    predict. tau 1, for which balanced error is minimal. Convex in the logits, as cross entropy is.

    Args:
        counts: training rows of each class; a class without any counts as one row.
        label_smoothing: as for `CrossEntropyLoss`.
        tau: the weight of the addition.
    """

    def __init__(self, counts: Sequence[int], label_smoothing: float = 0.0, tau: float = 1.0) -> None:
        """Keep the settings."""
        super().__init__(None, label_smoothing)
        rows = torch.tensor(counts, dtype=torch.float64).clamp(min=1)
        self.addition = tau * (rows / rows.sum()).log()

    def _total(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return super()._total(logits + self.addition.to(logits), labels)


class WordLoss:
    """A loss of rows with one class each, for words: each word that has a label is a row.

    Args:
        inner: the loss.
    """

    def __init__(self, inner: Loss) -> None:
        """Keep it."""
        self.inner = inner

    def __call__(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Of logits of shape (rows, tokens, tags) and labels of shape (rows, tokens), -100 where there is no word.

        `num_items_in_batch` is the number of words.
        """
        own = labels != -100
        words = own.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        # Rows without a word may make a whole step.
        return self.inner({**outputs, "logits": outputs["logits"][own]}, labels[own], words.clamp(min=1))


class ContrastiveLoss:
    """Rows of one class near to each other, and far from the others of a batch (Khosla et al. 2020, L_out).

    Of each row with another of its class: the mean, over those, of minus the log of its share, exp(cosine / t), of all
    other rows of the batch. A row is compared with those of its own part of a step alone, so that parts and processes
    count: give as many rows as there is memory for.

    Args:
        temperature: t; 0.1 is theirs.
        piece: cosines that are held at once, where a whole split is scored.
    """

    def __init__(self, temperature: float = 0.1, piece: int = 2**24) -> None:
        """Keep the settings."""
        self.temperature, self.piece = temperature, piece

    def __call__(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Of vectors of shape (rows, size) in `outputs["logits"]` and class ids of shape (rows,).

        The sum over rows (0 of one that is like no other), divided by how many there are, or by `num_items_in_batch`,
        those of the whole step.
        """
        vectors = nn.functional.normalize(outputs["logits"].float(), dim=1)
        pieces = torch.arange(len(labels), device=labels.device).split(max(1, self.piece // len(labels)))
        total = torch.stack([self._total(vectors, labels, rows) for rows in pieces]).sum()
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    def _total(self, vectors: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The sum over some of the rows."""
        cosines = vectors[rows] @ vectors.T / self.temperature
        itself = rows[:, None] == torch.arange(len(labels), device=labels.device)
        logs = cosines.masked_fill(itself, torch.finfo(cosines.dtype).min).log_softmax(1)
        alike = (labels[rows, None] == labels) & ~itself
        return -(logs.masked_fill(~alike, 0).sum(1) / alike.sum(1).clamp(min=1)).sum()


class CosinePairLoss:
    """Squared difference between the cosine of two rows' features and 1 (same class) or 0 (another), over all pairs.

    SetFit's loss, on every pair of a batch rather than on pairs drawn beforehand: each row goes through the encoder
    once for all pairs that it is in. It reads features of shape (rows, features) from `outputs["logits"]`.
    """

    def __call__(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The mean over the pairs of this part of a step, weighed by its part of the rows."""
        features = nn.functional.normalize(outputs["logits"].float(), dim=1)
        first, second = torch.triu_indices(len(labels), len(labels), offset=1, device=labels.device)
        errors = (features[first] * features[second]).sum(dim=1) - (labels[first] == labels[second]).float()
        rows = len(labels) if num_items_in_batch is None else num_items_in_batch
        return errors.square().sum() / max(1, len(first)) * len(labels) / rows


class BinaryCrossEntropyLoss(RowLoss):
    """Cross entropy of every label by itself, its mean over the labels; labels of 0 and 1, shape (rows, labels).

    Args:
        label_weights: what a row that has the label counts for, shape (labels,); None counts all alike.
        label_smoothing: how far targets are moved from 0 and 1 to a half.
        gamma: of the focal loss (Lin et al. 2017); 0 is plain cross entropy.
    """

    def __init__(
        self, label_weights: torch.Tensor | None = None, label_smoothing: float = 0.0, gamma: float = 0.0
    ) -> None:
        """Keep the settings."""
        self.label_weights, self.label_smoothing, self.gamma = label_weights, label_smoothing, gamma

    def _total(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        targets = labels * (1 - self.label_smoothing) + self.label_smoothing / 2
        weights = None if self.label_weights is None else self.label_weights.to(logits)
        each = nn.functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="none")
        if self.gamma:
            wrong = (targets - logits.sigmoid()).abs()
            each = wrong**self.gamma * each
        return each.mean(dim=1).sum()


class NumberLoss(RowLoss):
    """Squared or absolute differences of numbers, shape (rows,), in a unit of their own.

    Args:
        scale: what the output means: a number is mean + deviation * output.
        unit: of the differences.
        absolute: absolute differences, which outliers pull less.
    """

    def __init__(self, scale: tuple[float, float], unit: float, absolute: bool = False) -> None:
        """Keep the settings."""
        self.scale, self.unit, self.absolute = scale, unit, absolute

    def _total(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found, wanted = in_units(logits.squeeze(1), labels, self.scale, self.unit)
        differences = found - wanted
        return differences.abs().sum() if self.absolute else differences.square().sum()


def in_units(
    outputs: torch.Tensor, labels: torch.Tensor, scale: tuple[float, float], unit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and labels in the unit of the differences, the mean taken off."""
    mean, deviation = scale
    return outputs * (deviation / unit), (labels.to(outputs) - mean) / unit


#: names of `--loss`, and whether a linear head is solved rather than trained by it: where that is a smooth convex
#: problem; and vectors to search by have a solution of their own
LOSSES = {
    "cross_entropy": True, "focal": False, "logit_adjusted": True, "mse": True, "mae": False, "contrastive": True,
}  # fmt: skip
#: the classes of those under which it is
SOLVABLE = (CrossEntropyLoss, LogitAdjustedLoss, BinaryCrossEntropyLoss, NumberLoss, ContrastiveLoss)


def is_solvable(loss: Loss) -> bool:
    """Whether a linear head can be solved for."""
    return type(loss.inner if isinstance(loss, WordLoss) else loss) in SOLVABLE


def check_loss(arguments: TransferArguments) -> None:
    """Refuse a loss that cannot be imported, and settings that it cannot be combined with.

    Raises:
        UsageError: as said.
    """
    name, weights = arguments.loss, arguments.class_weights != "none"
    if ":" in name:
        import_scalar_function(name, "--loss")
    if arguments.label_smoothing_factor and (name == "focal" or ":" in name):
        raise UsageError(f"--label_smoothing_factor: not defined for --loss {name}. Leave one of them out.")
    if weights and ":" in name:
        raise UsageError(f"--class_weights: --loss {name} weighs classes itself. Leave it out.")
    corrections = ["--class_weights balanced"] if weights else []
    corrections += ["--loss logit_adjusted"] if name == "logit_adjusted" else []
    corrections += ["--sampler balanced"] if arguments.sampler == "balanced" else []
    if len(corrections) > 1:
        raise UsageError(f"{' and '.join(corrections)} each make up for rare classes: leave all but one out.")


def own_loss(arguments: TransferArguments) -> Loss | None:
    """A function of the person's own, where `--loss` names one; its outputs are those of a model of transformers."""
    if ":" not in arguments.loss:
        return None
    function = import_scalar_function(arguments.loss, "--loss")
    return lambda outputs, *others, **counts: function(ModelOutput(outputs), *others, **counts)


def make_multi_label_loss(arguments: TransferArguments, counts: list[int], rows: int) -> Loss:
    """The loss of `--loss` for rows of several labels.

    Args:
        arguments: the settings.
        counts: training rows that have each label.
        rows: training rows.
    """
    there = torch.tensor(counts, dtype=torch.float32)
    weights = (rows - there).clamp(min=1) / there.clamp(min=1) if arguments.class_weights == "balanced" else None
    gamma = 2.0 if arguments.loss == "focal" else 0.0
    return own_loss(arguments) or BinaryCrossEntropyLoss(weights, arguments.label_smoothing_factor, gamma)


def make_regression_loss(arguments: TransferArguments, scale: tuple[float, float], unit: float) -> Loss:
    """The loss of `--loss` for numbers; see `NumberLoss`. One's own gets logits and labels in the unit."""
    own = own_loss(arguments)
    if own is None:
        return NumberLoss(scale, unit, arguments.loss == "mae")

    def loss(outputs: Any, labels: torch.Tensor, *count: Any, **counts: Any) -> torch.Tensor:
        logits, labels = in_units(outputs["logits"], labels, scale, unit)
        return own({**outputs, "logits": logits}, labels, *count, **counts)

    return loss


def make_single_label_loss(arguments: TransferArguments, counts: list[int]) -> Loss:
    """The loss of `--loss` with the class weights and label smoothing that were asked for.

    Args:
        arguments: the settings.
        counts: training rows of each class.
    """
    if own := own_loss(arguments):
        return own
    weights = balanced_class_weights(counts) if arguments.class_weights == "balanced" else None
    if arguments.loss == "focal":
        return FocalLoss(weights)
    if arguments.loss == "logit_adjusted":
        return LogitAdjustedLoss(counts, arguments.label_smoothing_factor)
    return CrossEntropyLoss(weights, arguments.label_smoothing_factor)


def balanced_class_weights(counts: list[int]) -> torch.Tensor:
    """Weights inversely proportional to the class counts, with mean 1 over the training rows (King and Zeng 2001).

    A class without a training row weighs nothing.
    """
    rows = torch.tensor(counts, dtype=torch.float64)
    present = rows > 0
    return torch.where(present, rows.sum() / (present.sum() * rows.clamp(min=1)), 0.0).float()
