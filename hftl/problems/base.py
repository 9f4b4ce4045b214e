"""What the label of a row may be, and what follows from it: the part that all problems share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from hftl.errors import UsageError, did_you_mean
from hftl.tables import aligned

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hftl.arguments import TransferArguments
    from hftl.losses import Loss

_SEVERAL = "multi_label_classification"
#: logits, labels and scores of a split
Result = tuple[npt.NDArray[Any], npt.NDArray[Any], dict[str, float]]


@dataclass(frozen=True)
class LabelCells:
    """The label column of one split, as it was read.

    Attributes:
        origin: what messages call the split.
        column: the name of the column.
        values: one a row.
        declared: the names of the classes or labels, and their order, where the data say them.
        ids: of the rows.
        are_folders: whether the values are names of class folders.
        choices: those of each row, where rows bring choices.
    """

    origin: str
    column: str
    values: list[Any]
    declared: list[str] | None
    ids: list[str]
    are_folders: bool
    choices: list[list[str]] = field(default_factory=list)

    def places(self, positions: Sequence[int]) -> str:
        """Some rows, in the words of a message."""
        named = ", ".join(self.ids[row] for row in positions[:5])
        more = f" and {len(positions) - 5} more" if len(positions) > 5 else ""
        if self.are_folders:
            return f"{named}{more}"
        first = " counting from 0" if self.ids[0] == "0" else ""
        return f"row{'s' if len(positions) > 1 else ''}{first}: {named}{more}"

    def check_all_there(self, found: Sequence[Any]) -> None:
        """Refuse a column with empty cells.

        Raises:
            UsageError: with the rows whose entry in `found` is None.
        """
        missing = [row for row, label in enumerate(found) if label is None]
        if missing:
            raise UsageError(
                f"{self.origin}: {len(missing)} of {len(found)} rows have no label ({self.places(missing)}): "
                "fill them in or take the rows out"
            )


class Problem:
    """What a row's label is, of which data, loss, scores and answers depend; the names are transformers' own.

    A task has one, with what it knows of the training data.
    """

    #: as `problem_type` in a configuration of transformers
    name: ClassVar[str]
    #: whether that is so; transformers has no name for some
    in_transformers: ClassVar[bool] = True
    #: what messages call it
    words: ClassVar[str]
    #: why no row may be spared to validate on
    nothing_to_spare: ClassVar[str] = "no class has two rows"
    #: whether a model whose head is fresh gives answers already
    answers_untrained: ClassVar[bool] = False
    #: how a part of the rows is drawn, in words
    share: ClassVar[str]
    #: the scores that it always gives, for `--metric_for_best_model`
    metric_names: ClassVar[tuple[str, ...]]
    #: the scores that a person sees first, and what they are called
    headline: ClassVar[tuple[tuple[str, str], ...]]
    #: the scores of the card's metadata: type, name, and key in metrics.json
    hub_metrics: ClassVar[tuple[tuple[str, str, str], ...]]
    #: names of `--loss`
    losses: ClassVar[tuple[str, ...]]
    #: why a split may lack one of the scores
    without_score: ClassVar[str] = "not every class is there"
    #: what is behind the logits in lines of Python that give answers
    activation: ClassVar[str]
    #: what a linear head that is solved on features is called
    head: ClassVar[str] = "logistic"
    #: whether a row has one class of several
    is_one_of_several: ClassVar[bool] = False
    #: whether there are scores of each class
    has_class_scores: ClassVar[bool] = True
    #: whether the outputs themselves are the answer, of which half precision keeps three digits
    is_exact: ClassVar[bool] = False

    def check(self, arguments: TransferArguments) -> None:
        """Refuse settings that do not go with it.

        Raises:
            UsageError: as said.
        """
        if ":" not in arguments.loss and arguments.loss not in self.losses:
            raise UsageError(
                f"Unknown loss {arguments.loss!r} for {self.words}.{did_you_mean(arguments.loss, self.losses)} There "
                f"are: {', '.join(self.losses)}, and module:function."
            )
        for name in ("label_separator", "label_columns") if self.name != _SEVERAL else ():
            if getattr(arguments, name) is not None:
                raise UsageError(f"--{name} is for several labels a row: say --problem_type {_SEVERAL} too.")
        for flag, given in {
            "--class_weights": arguments.class_weights != "none",
            "--label_smoothing_factor": bool(arguments.label_smoothing_factor),
        }.items():
            if given and not self.has_class_scores:
                raise UsageError(f"{flag} is for classes, not for {self.words}. Leave it out.")
        for flag, given in _of_one_class(arguments).items():
            if given and not self.is_one_of_several:
                raise UsageError(f"{flag} is for rows of one class each, not for {self.words}. Leave it out.")

    # Data

    def look_at(self, cells: LabelCells) -> list[str]:
        """What the column of the training rows says beside its labels, as notes for the person."""
        return []

    def read(self, cells: LabelCells) -> list[Any]:
        """The label of each row, None where it is missing.

        Raises:
            UsageError: a cell is no label.
        """
        raise NotImplementedError

    def names(self, found: Sequence[Any], cells: LabelCells) -> list[str]:
        """The names of the outputs, from the training rows."""
        raise NotImplementedError

    def encode(self, found: Sequence[Any], names: Sequence[str], cells: LabelCells) -> npt.NDArray[Any]:
        """Labels as numbers, one or several a row.

        Raises:
            UsageError: a label is missing, or was not there in training.
        """
        raise NotImplementedError

    def require_enough(self, labels: npt.NDArray[Any], names: Sequence[str], origin: str) -> None:
        """Refuse labels from which nothing can be learned.

        Raises:
            UsageError: as said.
        """
        raise NotImplementedError

    def require_scorable(self, labels: npt.NDArray[Any], origin: str) -> None:
        """Refuse rows that no score can be made of.

        Raises:
            UsageError: as said.
        """

    def held_out(self, labels: npt.NDArray[Any], fraction: float, seed: int) -> tuple[npt.NDArray[np.int64], str]:
        """Sorted places of the training rows to validate on, and what they are; none where none can be spared."""
        strata, count = self.strata(labels), round(len(labels) * fraction)
        # A class that validation does not have would not count in choosing the best checkpoint.
        enough = max(len(np.unique(strata)) if self.is_one_of_several else 1, count)
        share = self.share if enough == count else "some of each class"
        return stratified_part(strata, enough, seed, leave_one=True), share

    def part(self, labels: npt.NDArray[Any], count: int, seed: int) -> npt.NDArray[np.int64]:
        """Sorted places of about so many rows, fewer than there are."""
        return stratified_part(self.strata(labels), count, seed)

    def strata(self, labels: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """A number a row, shape (rows,): a part of the rows is drawn with each number in proportion."""
        raise NotImplementedError

    def counts(self, labels: npt.NDArray[Any], names: Sequence[str]) -> list[int]:
        """Rows of each name."""
        raise NotImplementedError

    def classes(self, labels: npt.NDArray[Any], names: Sequence[str]) -> dict[str, int]:
        """How often there is each class of which there are scores, by the name that it has there."""
        return dict(zip(names, self.counts(labels, names), strict=True))

    def table(self, parts: Mapping[str, npt.NDArray[Any]], names: Sequence[str]) -> list[str]:
        """What the labels of each split are like, as the lines of a table and warnings."""
        counts = {role: self.classes(labels, names) for role, labels in parts.items()}
        rows = {role: len(labels) for role, labels in parts.items()}
        lines = class_table({role: [*each.values()] for role, each in counts.items()}, rows, list(counts["train"]))
        return [*lines, *self.notes(parts["train"], names)]

    def notes(self, train: npt.NDArray[Any], names: Sequence[str]) -> list[str]:
        """What is noteworthy about the labels to learn from."""
        return []

    # Training

    def prepare(self, model: nn.Module, labels: npt.NDArray[Any], keeps_head: bool) -> None:
        """Take what is needed of the training labels before `model` is trained, perhaps with a head that is trained.

        Raises:
            UsageError: the model's output cannot be used for it.
        """

    def loss(self, arguments: TransferArguments, labels: npt.NDArray[Any], names: Sequence[str]) -> Loss:
        """The loss that was asked for, of outputs and labels.

        Args:
            arguments: the settings.
            labels: of the training rows.
            names: of the outputs.
        """
        raise NotImplementedError

    def items(self, labels: torch.Tensor) -> int:
        """How many of what the loss is a mean over: rows."""
        return len(labels)

    def default_metric(self, labels: npt.NDArray[Any], names: Sequence[str]) -> str:
        """The score that chooses the best checkpoint, by the training labels."""
        return self.metric_names[0]

    def metrics(self, logits: npt.NDArray[Any], labels: npt.NDArray[Any], names: Sequence[str]) -> dict[str, float]:
        """Every score of one split; logits of shape (rows, outputs)."""
        raise NotImplementedError

    def decided(self, logits: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The answers in the form of labels, for metrics of others."""
        raise NotImplementedError

    def conclude(self, model: nn.Module, results: dict[str, Result], names: Sequence[str]) -> dict[str, Result]:
        """What the end of the training adds, to the model in place, and the results anew."""
        return results

    def kept(self, names: Sequence[str]) -> dict[str, Any]:
        """What metrics.json holds of it."""
        return {}

    def restore(self, metrics: Mapping[str, Any], names: Sequence[str]) -> None:
        """Take what `kept` gave."""

    # Answers

    def scale_of(self, logits: torch.Tensor) -> float:
        """What is a large difference of logits."""
        return max(1.0, float(logits.abs().max()))

    def unsure(self, logits: torch.Tensor, rounding: float) -> torch.Tensor:
        """Whether an answer may be another one where each logit is off by `rounding`, shape (rows,).

        Of `is_exact` all of them: half precision gives three digits.
        """
        import torch

        if not self.is_exact:
            raise NotImplementedError
        return torch.ones(len(logits), dtype=torch.bool)

    def comparable(
        self, logits: npt.NDArray[Any], labels: npt.NDArray[Any]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Logits and labels of a whole split as a loss takes them."""
        return logits, labels

    def answers(self, rows: Sequence[Mapping[str, Any]], logits: npt.NDArray[Any], names: Sequence[str]) -> list[Any]:
        """What a person gets of each row; of the rows their `id`, and `text` where there is one, are needed."""
        raise NotImplementedError

    def answer_columns(self, names: Sequence[str]) -> list[str]:
        """The columns of a table of answers, behind the id."""
        return ["prediction", *(f"probability_{name}" for name in names)]

    def label_cell(self, label: Any, names: Sequence[str]) -> str:
        """A label of the data in predictions.csv."""
        raise NotImplementedError

    def limits(
        self, scores: Mapping[str, float], rows: int, split: str, labels: npt.NDArray[Any], names: Sequence[str]
    ) -> list[str]:
        """What one should know before relying on the answers, as sentences of the card.

        Args:
            scores: of the rows that were scored.
            rows: how many they are.
            split: where they are from.
            labels: of the rows that it has learned from; none where nothing was trained.
            names: of the outputs, as they may stand in Markdown.
        """
        raise NotImplementedError


def _of_one_class(arguments: TransferArguments) -> dict[str, Any]:
    """Flags that mean something for rows of one class each, and whether they were given."""
    return {
        f"--method {arguments.method}": arguments.method in ("auto", "setfit"),
        "--shots": arguments.shots is not None,
        f"--head {arguments.head}": arguments.head is not None,
        "--feature_layers": arguments.feature_layers is not None,
        "--feature_pooling": arguments.feature_pooling is not None,
        "--soup_runs": arguments.soup_runs > 1,
        "--sampler balanced": arguments.sampler == "balanced",
        "--penalty r_drop": arguments.penalty == "r_drop",
        "--mixup": getattr(arguments, "mixup", None) is not None,
        "--cutmix": getattr(arguments, "cutmix", None) is not None,
    }


def class_table(counts: Mapping[str, Sequence[int]], rows: Mapping[str, int], names: Sequence[str]) -> list[str]:
    """Rows by class and split."""
    shown = 6 if len(names) <= 6 else 4  # with the stages that follow the report stays on one screen
    head = ["class", *counts]
    short = [name if len(name) <= 30 else f"{name[:29]}…" for name in names[:shown]]
    body = [[name, *(str(part[row]) for part in counts.values())] for row, name in enumerate(short)]
    lines = aligned([head, *body, ["all", *map(str, rows.values())]], left=[0])
    if len(names) > shown:
        lines.insert(-1, f"… and {len(names) - shown} more")
    return lines


def class_notes(train: Sequence[int], names: Sequence[str]) -> list[str]:
    """Names that are nearly one, and classes with a single row."""
    lines = []
    spellings: dict[str, list[str]] = {}
    for name in names:
        spellings.setdefault(" ".join(name.casefold().split()), []).append(repr(name))
    alike = [", ".join(written) for written in spellings.values() if len(written) > 1]
    lines += [f"warning: labels that differ in case or spaces alone: {'; '.join(alike[:3])}"] if alike else []
    for count, what in ((0, "no row"), (1, "only one row")):
        few = [names[row] for row, there in enumerate(train) if there == count]
        if few:
            more = f" and {len(few) - 5} more" if len(few) > 5 else ""
            lines.append(f"warning: {what} in train for: {', '.join(few[:5])}{more}")
    return lines


def stratified_part(labels: npt.NDArray[Any], count: int, seed: int, leave_one: bool = False) -> npt.NDArray[np.int64]:
    """Sorted positions of about `count` rows with each class in proportion; `leave_one` keeps a row of each back.

    Every class gets at least one row where `count` allows it.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    limits = sizes - 1 if leave_one else sizes
    exact = np.minimum(sizes * count / len(labels), limits)
    takes = np.floor(exact).astype(int)
    if count >= len(classes):
        takes = np.minimum(np.maximum(takes, 1), limits)
    while takes.sum() < min(count, limits.sum()):
        takes[np.argmax(np.where(takes < limits, exact - takes, -np.inf))] += 1
    while takes.sum() > count:
        takes[np.argmax(np.where(takes > 1, takes - exact, -np.inf))] -= 1
    return drawn(labels, classes, takes, np.random.default_rng(seed))


def drawn(
    labels: npt.NDArray[Any], classes: npt.NDArray[Any], sizes: npt.NDArray[Any], random: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Sorted positions of so many rows of each of some classes."""
    each = zip(classes, sizes, strict=True)
    return np.sort(np.concatenate([random.permutation(np.flatnonzero(labels == name))[:size] for name, size in each]))
