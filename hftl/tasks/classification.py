"""What all tasks share whose rows have a label: one class, several, or a number; loss and scores."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate
from transformers import PreTrainedModel, set_seed

from hftl import data, folder, methods, pretrained, weights
from hftl.arguments import TransferArguments
from hftl.data import Splits
from hftl.errors import UsageError, did_you_mean
from hftl.examples import Shown
from hftl.losses import Loss
from hftl.metrics import LOWER_IS_BETTER, ExtraMetrics
from hftl.modality import Modality
from hftl.probes import LinearHead
from hftl.problems import Problem, problem_of
from hftl.problems.base import Result

_USAGE = """from transformers import pipeline
classify = pipeline("{task}", {title})
print(classify({example}))"""
#: a training batch, mixed: `(batch) -> batch`, with `labels` of shape (rows, classes)
Mixing = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


class ClassificationTask:
    """A task with a label a row, of the kind that `problem` says.

    Subclasses say how inputs are read, prepared and put together. A subclass sets the class attributes and writes
    `load_model` and `dataset`; where it has a processor also
    `load_processor`; and `collate` and `read_inputs` where theirs is not the way of one file a row.
    """

    name: ClassVar[str]
    #: what the Hub calls it, where that is not its name
    hub_name: ClassVar[str | None] = None
    modality: ClassVar[Modality]
    auto_class: Any
    arguments_class: ClassVar[type[TransferArguments]]
    #: whether `shown` says what an answer rests on
    explains: ClassVar[bool] = False
    #: rows a step and device when nothing is said
    batch_size: ClassVar[int]

    def __init__(self, arguments: TransferArguments) -> None:
        """Keep the arguments; `label_names` come with the data or with a finished run."""
        self.arguments = arguments
        self.problem: Problem = problem_of(arguments)
        self.processor: Any = None
        #: whether `dataset` says how many texts it cut
        self.says_cut = True
        #: whether it is for rows to train with, or to be measured by; not of a finished run, which predicts
        self.is_training = True
        self.label_names: list[str] = []
        #: what the output layer that was solved last follows from, and the layer
        self.last_solution: tuple[bytes, LinearHead] | None = None

    @property
    def rows_a_batch(self) -> int:
        """Rows of a training batch on one device."""
        return self.arguments.per_device_train_batch_size or self.batch_size

    @property
    def rows_a_step(self) -> int:
        """Rows of a training step, of all devices and accumulated parts together."""
        return self.rows_a_batch * self.arguments.world_size * self.arguments.gradient_accumulation_steps

    @functools.cached_property
    def _extra_metrics(self) -> ExtraMetrics:
        return ExtraMetrics(self.arguments.metrics or [], self.problem.metric_names)

    def load_splits(self) -> Splits:
        """Check everything that needs no data, then read the data, check it, and print what was found.

        Raises:
            UsageError: the output folder, the method or the data cannot be used as they are.
        """
        if not self.arguments.dataset_name:
            raise UsageError("--dataset is missing: name a folder, a table, a Hub id or builtin:NAME.")
        folder.check_output_folder(self.arguments)
        self.problem.check(self.arguments)
        methods.check_method(self.arguments)
        pretrained.check_model_name(self.arguments.model_name_or_path, self.arguments.trust_remote_code)
        if self.arguments.weights is not None:
            weights.check_file(self.arguments.weights, self.arguments.allow_pickle)
        self._extra_metrics  # noqa: B018 - a metric that cannot be loaded is an error now, not after training
        splits = data.load_splits(self.arguments, self.modality, self.problem)
        for line in splits.report:
            folder.say(line)
        return splits

    def build_model(self, splits: Splits) -> PreTrainedModel:
        """The model with a fresh head for the labels of `splits`; the processor is loaded with it.

        Raises:
            UsageError: the model cannot be used.
        """
        self.label_names, self.problem = splits.label_names, splits.problem
        set_seed(self.arguments.seed)  # before the head is drawn
        model = self.load_model(splits)
        model.config.problem_type = self.problem.name if self.problem.in_transformers else None
        if self.arguments.weights is not None:
            weights.fill(model, self.arguments.weights)
        self.problem.prepare(model, splits.train_labels, self.arguments.keep_head)
        return model

    def loss(self, splits: Splits) -> Loss:
        """The loss that was asked for, of outputs and labels."""
        return self.problem.loss(self.arguments, splits.train_labels, splits.label_names)

    def score(self, logits: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> dict[str, float]:
        """Scores of a whole split; logits of shape (rows, classes), labels as `hftl.data.labels_of` gives them."""
        scores = self.problem.metrics(logits, labels, self.label_names)
        if self._extra_metrics.metrics:
            scores |= self._extra_metrics(self.problem.decided(logits), labels)
        return scores

    def of_rows(self, results: dict[str, Result], splits: Splits, data: Mapping[str, Any]) -> dict[str, Result]:
        """The results of training as those of the rows of each split, where they are not of these yet.

        Args:
            results: by split.
            splits: the data.
            data: what `dataset` made of each split.
        """
        return results

    def by_row(self, logits: np.ndarray[Any, Any], dataset: Any, rows: Sequence[int]) -> np.ndarray[Any, Any]:
        """The outputs for some rows of a data set as `problem` takes them.

        Args:
            logits: of these rows, as the model gives them.
            dataset: what `dataset` made.
            rows: their numbers in it.
        """
        return logits

    def best_metric(self, splits: Splits) -> tuple[str, bool]:
        """The score that chooses the best checkpoint, and whether more of it is better.

        Raises:
            UsageError: `--metric_for_best_model` is no score of this task.
        """
        wanted = self.arguments.metric_for_best_model
        if wanted is None:
            wanted = self.problem.default_metric(splits.train_labels, splits.label_names)
        wanted = wanted.removeprefix("eval_")
        known = (*self.problem.metric_names, "loss", *self._extra_metrics.names)
        if wanted not in known:
            raise UsageError(
                f"--metric_for_best_model {wanted!r} is not known.{did_you_mean(wanted, known)} There are: "
                f"{', '.join(known)}; others through --metrics."
            )
        better, is_ours = wanted not in LOWER_IS_BETTER, wanted in (*self.problem.metric_names, "loss")
        if "greater_is_better" in self.arguments.given:
            if is_ours and self.arguments.greater_is_better != better:
                raise UsageError(f"--greater_is_better: of {wanted} {'more' if better else 'less'} is. Leave it out.")
            return wanted, bool(self.arguments.greater_is_better)
        if not is_ours and not self.problem.is_one_of_several:
            raise UsageError(f"--metric_for_best_model {wanted}: say --greater_is_better true or false too.")
        return wanted, better

    def choosing_score(self, scores: Mapping[str, float]) -> float:
        """The one of a split's scores that chooses the best weights.

        Raises:
            UsageError: the split does not give it.
        """
        metric = str(self.arguments.metric_for_best_model)
        if metric not in scores:
            raise UsageError(
                f"--metric_for_best_model {metric}: validation does not give it, since {self.problem.without_score}. "
                "Take another metric, or a larger validation split."
            )
        return scores[metric]

    # What a task defines

    def load_model(self, splits: Splits) -> PreTrainedModel:
        """The model, with the labels of `splits`; sets `self.processor`."""
        raise NotImplementedError

    def load_processor(self, source: str | Path) -> None:
        """Set `self.processor` from a finished run; by default there is none."""

    def save_processor(self, target: Path) -> None:
        """Save what plain transformers needs beside the model."""
        if self.processor is not None:
            self.processor.save_pretrained(target)

    def dataset(self, rows: Any, training: bool) -> Dataset[dict[str, Any]]:
        """The examples of a split, ready for `collate`; augmented in training."""
        raise NotImplementedError

    def kept_for_epochs(self, data: dict[str, Any]) -> dict[str, Any]:
        """The data sets of the splits, for a stage that goes over the rows again and again: perhaps prepared once."""
        return data

    def views(self, rows: Any, count: int, training: Any) -> list[Any]:
        """What is kept of the training rows: a data set, or one for each of `count` fixed augmentations.

        `training` is what `dataset(rows, training=True)` gave.

        Raises:
            UsageError: the task has no augmentation.
        """
        if count > 1:
            raise UsageError(f"--feature_views: the task {self.name} has no augmentation. Leave it out.")
        return [training]

    def mixing(self) -> Mixing | None:
        """What mixes the rows of a training batch, where that was asked for."""
        return None

    def test_data(self, dataset: Any) -> Any:
        """What the final scores and all answers after them read: `dataset`, or more of each row, for `test_views`.

        More is read in validation during the training too, but for that on kept features.
        """
        return dataset

    def test_views(self, inputs: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """What is predicted of a batch of `test_data`: inputs whose logits are averaged."""
        return [inputs]

    def preprocessing(self) -> Any:
        """What determines a row's inputs beside its content and this class, for the key of kept activations."""
        return None

    def inputs_in_words(self, splits: Splits, rows: Any) -> tuple[str, str]:
        """What the inputs are like, for `hftl advise`, and what to change about how they are read.

        Args:
            splits: the data.
            rows: what `dataset` makes of the training split.
        """
        return self.modality.plural, ""

    def usage(self, title: str) -> str:
        """The lines of Python in the card that load the saved model, by its name, and use it."""
        example = self.modality.example
        if not self.problem.is_one_of_several:
            example += ", top_k=None"  # all that it says, not the best alone
        return _USAGE.format(task=self.name, title=json.dumps(title), example=example)

    def shown(self, row: Mapping[str, Any], model: Any = None, label: int = 0) -> Shown:
        """What a report shows of a row; with a model also what speaks for a class in it."""
        return Shown()

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch: what the model's forward takes, and `labels` of shape (rows,) or (rows, labels) if there are any."""
        batch = default_collate([{name: row[name] for name in row if name != "labels"} for row in examples])
        if "labels" in examples[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in examples])
        return batch

    def read_inputs(self, inputs: Any, columns: Mapping[str, str] | None = None) -> Any:
        """What `Run.predict` got, as rows for `dataset`: a path of a file, folder or table, or inputs, one or a list.

        Args:
            inputs: as said.
            columns: the columns of a table by role.
        """
        name = self.modality.name
        if isinstance(inputs, str | os.PathLike):
            known = {name: getattr(self.arguments, f"{name}_column", None)}
            return data.load_inputs(str(inputs), self.modality, columns or {}, known, self.arguments.follow_links)
        values = inputs if isinstance(inputs, list | tuple) else [inputs]
        return [
            {"id": str(value) if isinstance(value, str | os.PathLike) else str(index), name: value}
            for index, value in enumerate(values)
        ]

    def iter_inputs(self, inputs: Any, columns: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
        """The rows of `read_inputs` one by one; those of a folder are found on the way, so that it may be of any size.

        A task that reads folders in a way of its own overrides this too.
        """
        named = isinstance(inputs, Path) or (not self.modality.is_text and isinstance(inputs, str | os.PathLike))
        if named and os.path.isdir(os.path.expanduser(inputs)):
            yield from data.iter_folder(inputs, self.modality, self.arguments.follow_links)
            return
        rows = self.read_inputs(inputs, columns)
        yield from (rows[index] for index in range(len(rows)))
