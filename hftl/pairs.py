"""Contrastive tuning of a sentence encoder on a few labelled texts (SetFit, Tunstall et al. 2022)."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
from torch.nn import functional

from hftl import backbones
from hftl.arguments import unwatched
from hftl.callbacks import ReadableProgress
from hftl.cut import NoCut
from hftl.data import Splits
from hftl.errors import UsageError
from hftl.features import PooledFeatures
from hftl.folder import say
from hftl.methods import Stage
from hftl.trainer import TransferTrainer


class CosinePairLoss:
    """Squared difference between the cosine of two rows' features and 1 (same class) or 0 (another), over all pairs.

    SetFit's loss, on every pair of a batch rather than on pairs drawn beforehand: each row goes through the encoder
    once for all pairs that it is in. It reads features of shape (rows, features) from `outputs["logits"]`.
    """

    def __call__(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The mean over the pairs of this part of a step, weighed by its part of the rows."""
        features = functional.normalize(outputs["logits"].float(), dim=1)
        first, second = torch.triu_indices(len(labels), len(labels), offset=1, device=labels.device)
        errors = (features[first] * features[second]).sum(dim=1) - (labels[first] == labels[second]).float()
        rows = len(labels) if num_items_in_batch is None else num_items_in_batch
        return errors.square().sum() / max(1, len(first)) * len(labels) / rows


def tune_on_pairs(task: Any, model: Any, splits: Splits, steps: int, learning_rate: float) -> Any:
    """Train the encoder of a text classifier so that texts of one class have like features; the head stays as it is.

    Every process of a run sees all of its own pairs of a step. The same arguments give the same weights again, so that
    an interrupted run that starts over here goes on from the same model.

    Args:
        task: a text task.
        model: the model of `task.build_model`; its encoder is changed in place.
        splits: of which the training rows are used.
        steps: optimizer steps, each on a batch of texts.
        learning_rate: of AdamW, with the schedule of the arguments.

    Raises:
        UsageError: the head is not one linear layer on the features of a text.
    """
    started = time.perf_counter()
    dataset = task.dataset(splits.train, training=True)
    rows = [dataset[index] for index in range(len(dataset))]  # drawn at random, not with those of like length
    probe = backbones.inputs_of(task.collate(rows[:2]), model.device)
    try:
        head = PooledFeatures(model.eval(), probe)
    except NoCut as error:
        raise UsageError(
            f"--model {task.arguments.model_name_or_path}: no pairs can be made, since {error}."
        ) from error
    fixed = (head.name, *backbones.pooling_layer(model))  # the mean stays a mean
    names = [name for name, _ in model.named_parameters() if not backbones.is_below_any(name, fixed)]
    stage = Stage("pairs", frozenset(names), learning_rate, learning_rate, epochs=1)
    batch_size = task.arguments.per_device_train_batch_size or task.batch_size
    say(f"pairs: {steps} steps on every pair of {batch_size} texts, rate {learning_rate:.2g}")
    with tempfile.TemporaryDirectory() as folder:
        settings = unwatched(
            task.arguments,
            output_dir=folder,
            max_steps=steps,
            num_train_epochs=1,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            dataloader_num_workers=0,
            sampler="random",  # pairs of different classes are in every batch anyway
        )
        trainer = TransferTrainer(
            stage=stage,
            loss=CosinePairLoss(),
            model=model,
            args=settings,
            train_dataset=rows,
            data_collator=task.collate,
            callbacks=[ReadableProgress(stage.name)],
        )
        layer: Any = head.layer
        layer.forward = lambda features: features  # what the model calls logits are the features, then
        try:
            trainer.train()
        finally:
            del layer.forward
    say(f"pairs: done in {time.perf_counter() - started:.0f} s")
    return trainer.bare_model().eval()
