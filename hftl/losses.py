"""Losses that Trainer calls with the model's outputs; the same value however a batch is cut into parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class CrossEntropyLoss:
    """Cross entropy over class ids, with class weights and label smoothing.

    Trainer passes `num_items_in_batch`, the number of rows over all accumulated parts and processes. Dividing the sum
    by it gives the same loss and gradient for 1 part of 16 rows, 4 parts of 4 and 2 processes; the loss inside the
    models does not (https://github.com/huggingface/transformers/issues/47688). Class weights have mean 1 over the
    training rows, and the sum is not divided by them: the usual weighted mean depends on how a batch is cut.

    Args:
        class_weights: one weight a class, shape (classes,); None weighs all alike.
        label_smoothing: part of the target spread over all classes (Szegedy et al. 2016).
    """

    def __init__(self, class_weights: torch.Tensor | None = None, label_smoothing: float = 0.0) -> None:
        """Keep the settings."""
        self.class_weights = class_weights
        self.label_smoothing = label_smoothing

    def __call__(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The loss of `outputs["logits"]`, shape (rows, classes), against `labels`, shape (rows,)."""
        logits = outputs["logits"]
        if logits.dtype is not torch.float64:  # half precision loses the small differences between large logits
            logits = logits.float()
        weights = None if self.class_weights is None else self.class_weights.to(logits)
        total = nn.functional.cross_entropy(
            logits, labels, weight=weights, label_smoothing=self.label_smoothing, reduction="sum"
        )
        return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)


def balanced_class_weights(counts: list[int]) -> torch.Tensor:
    """Weights inversely proportional to the class counts, with mean 1 over the training rows (King and Zeng 2001).

    A class without a training row weighs nothing.
    """
    rows = torch.tensor(counts, dtype=torch.float64)
    present = rows > 0
    return torch.where(present, rows.sum() / (present.sum() * rows.clamp(min=1)), 0.0).float()
