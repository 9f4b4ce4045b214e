"""One class of several for every row."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from hftl.errors import UsageError, did_you_mean
from hftl.metrics import SINGLE_LABEL_METRICS, classification_metrics, share_interval, softmax
from hftl.problems.base import LabelCells, Problem, class_notes

if TYPE_CHECKING:
    import torch

    from hftl.arguments import TransferArguments
    from hftl.losses import Loss

#: mean gap between confidence and accuracy that is worth a word
_UNCALIBRATED = 0.05


@dataclass(frozen=True)
class Prediction:
    """What the model says of one input.

    Attributes:
        id: path or position of the input.
        label: name of the most probable class.
        probability: of that class.
        probabilities: of every class by name.
    """

    id: str
    label: str
    probability: float
    probabilities: dict[str, float]

    def cells(self) -> list[str]:
        """Those of `Problem.answer_columns`."""
        return [self.label, *(f"{probability:.6f}" for probability in self.probabilities.values())]


class SingleLabel(Problem):
    """One class of several for every row."""

    name = "single_label_classification"
    words = "rows of one class each"
    share = "the same share of each class"
    metric_names = SINGLE_LABEL_METRICS
    headline: ClassVar[tuple[tuple[str, str], ...]] = (("accuracy", "accuracy"), ("f1_macro", "macro F1"))
    hub_metrics: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("accuracy", "Accuracy", "accuracy"),
        ("f1", "Macro F1", "f1_macro"),
    )
    losses: ClassVar[tuple[str, ...]] = ("cross_entropy", "focal", "logit_adjusted")
    activation = ".softmax(-1)"
    is_one_of_several = True

    def read(self, cells: LabelCells) -> list[str | None]:
        """The label of each row as its name; None where it is missing."""
        if cells.are_folders:
            return cells.values
        if cells.declared is None or any(isinstance(value, list) for value in cells.values):
            return [label_name(value, cells) for value in cells.values]
        return [None if value is None or value < 0 else cells.declared[value] for value in cells.values]

    def names(self, found: Sequence[str | None], cells: LabelCells) -> list[str]:
        """The classes: as the data set declares them, else those of the training rows, by number or by name."""
        if cells.declared is not None:
            return cells.declared
        names = {name for name in found if name is not None}
        numbers = {name: number for name in names if (number := _number(name)) is not None}
        broken = sorted(name for name, number in numbers.items() if not number.is_integer())
        if broken and not cells.are_folders and len(numbers) == len(names):
            raise UsageError(
                f"{cells.origin}: the labels are numbers such as {broken[0]}, a quantity and not a class: learn it "
                "with --problem_type regression, name the right column with --label_column, or turn them into classes"
            )
        return in_order(names)

    def encode(self, found: Sequence[str | None], names: Sequence[str], cells: LabelCells) -> npt.NDArray[np.int64]:
        """Class ids, shape (rows,)."""
        cells.check_all_there(found)
        index = {name: number for number, name in enumerate(names)}
        check_known([[str(label)] for label in found], index, cells)
        return np.array([index[str(label)] for label in found], dtype=np.int64)

    def require_enough(self, labels: npt.NDArray[np.int64], names: Sequence[str], origin: str) -> None:
        """Refuse fewer than two classes."""
        present = [names[value] for value in np.unique(labels)]
        if len(present) < 2:
            found = f"one class only, {present[0]!r}" if present else "no rows left"
            raise UsageError(f"{origin} has {found}: a classifier needs two or more")

    def strata(self, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The classes."""
        return labels

    def counts(self, labels: npt.NDArray[np.int64], names: Sequence[str]) -> list[int]:
        """Rows of each class."""
        return np.bincount(labels, minlength=len(names)).tolist()

    def notes(self, train: npt.NDArray[np.int64], names: Sequence[str]) -> list[str]:
        """Imbalance, names that are nearly one, and classes with a single row."""
        counts = np.array(self.counts(train, names))
        lines = []
        if is_uneven(counts):
            present = counts[counts > 0]
            most = names[int(counts.argmax())]
            least = names[int(np.where(counts > 0, counts, counts.max()).argmin())]
            lines.append(f"imbalance in train: {present.max() / present.min():.1f} to 1 ({most!r} to {least!r})")
        return lines + class_notes(counts.tolist(), names)

    def loss(self, arguments: TransferArguments, labels: npt.NDArray[np.int64], names: Sequence[str]) -> Loss:
        """Cross entropy, or what was asked for."""
        from hftl.losses import make_single_label_loss

        return make_single_label_loss(arguments, self.counts(labels, names))

    def default_metric(self, labels: npt.NDArray[np.int64], names: Sequence[str]) -> str:
        """Accuracy, and macro F1 where the classes are uneven: accuracy would hardly see it."""
        return "f1_macro" if is_uneven(self.counts(labels, names)) else "accuracy"

    def metrics(self, logits: npt.NDArray[Any], labels: npt.NDArray[Any], names: Sequence[str]) -> dict[str, float]:
        """As `classification_metrics`."""
        return classification_metrics(logits, labels, names)

    def decided(self, logits: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Class ids, shape (rows,)."""
        return logits.argmax(axis=1)

    def unsure(self, logits: torch.Tensor, rounding: float) -> torch.Tensor:
        """Whether the two best classes lie near to one another."""
        best = logits.topk(2, dim=1).values
        return ~(best[:, 0] - best[:, 1] >= rounding)  # what is no number is not far away

    def answers(
        self, rows: Sequence[Mapping[str, Any]], logits: npt.NDArray[Any], names: Sequence[str]
    ) -> list[Prediction]:
        """The most probable class, and the probabilities of all."""
        return [
            Prediction(
                id=row["id"],
                label=names[int(values.argmax())],
                probability=float(values.max()),
                probabilities=dict(zip(names, map(float, values), strict=True)),
            )
            for row, values in zip(rows, softmax(logits) if len(rows) else (), strict=True)
        ]

    def label_cell(self, label: Any, names: Sequence[str]) -> str:
        """The name of the class."""
        return names[int(label)]

    def limits(
        self, scores: Mapping[str, float], rows: int, split: str, labels: npt.NDArray[Any], names: Sequence[str]
    ) -> list[str]:
        """The interval of the accuracy, rare classes, and how far probabilities are off."""
        low, high = share_interval(round(scores["accuracy"] * rows), rows)
        lines = [f"Accuracy on {rows:,} rows of {split}: with 95 % confidence between {low:.3f} and {high:.3f}."]
        if len(labels):
            counts = self.counts(labels, names)
            lines += few_rows(counts, names)
            if is_uneven(counts):
                lines.append("The classes are unevenly frequent in training: look at each, not at the accuracy alone.")
        error = scores.get("expected_calibration_error", 0.0)
        if error > _UNCALIBRATED:
            lines.append(f"Its probabilities are off by {error:.0%} on average: it is not as right as it is sure.")
        return [*lines, "Whatever it is given, it answers with one of its classes."]


#: training rows below which a class is named among the limits, and how many of those
_FEW, _NAMED = 20, 10


def few_rows(counts: Sequence[int], names: Sequence[str], what: str = "rows") -> list[str]:
    """The classes with few training rows, or what is counted, as a sentence."""
    few = [name for name, count in zip(names, counts, strict=True) if count < _FEW]
    more = f" and {len(few) - _NAMED} more" if len(few) > _NAMED else ""
    return [f"Fewer than {_FEW} training {what}: {', '.join(few[:_NAMED])}{more}."] if few else []


def is_uneven(counts: Sequence[int] | npt.NDArray[Any]) -> bool:
    """Whether, of classes with rows, the largest has over three times as many as the smallest.

    Accuracy hardly sees that one.
    """
    return bool(max(counts) > 3 * min(count for count in counts if count))


def label_name(value: Any, cells: LabelCells) -> str | None:
    """A cell as the name of a class; None where it is empty.

    Raises:
        UsageError: it holds several values.
    """
    if value is None:
        return None
    if isinstance(value, float):
        if np.isnan(value):
            return None
        return str(int(value)) if value.is_integer() else str(value)
    if isinstance(value, str | int):
        text = str(value).strip()
        return None if text in ("", "nan", "NaN", "<NA>") else text
    raise UsageError(
        f"{cells.origin}: the column {cells.column!r} holds {type(value).__name__} values where a label should be: "
        "give one class a row, or learn several with --problem_type multi_label_classification"
    )


def in_order(names: set[str]) -> list[str]:
    """Names in an order that files and processes cannot change: by number where all are numbers, else by name."""
    numbers = {name: number for name in names if (number := _number(name)) is not None}
    if len(numbers) < len(names):
        return sorted(names)
    return sorted(names, key=lambda name: (numbers[name], name))


def _number(name: str) -> float | None:
    return float(name) if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", name, re.IGNORECASE) else None


def check_known(found: Sequence[Sequence[str]], known: Mapping[str, int], cells: LabelCells) -> None:
    """Refuse labels that training does not have.

    Raises:
        UsageError: with the first of them, and its rows.
    """
    unseen = {label: row for row in range(len(found) - 1, -1, -1) for label in found[row] if label not in known}
    if not unseen:
        return
    first = min(unseen, key=lambda label: unseen[label])
    same = [row for row, labels in enumerate(found) if first in labels]
    others = f" (and {len(unseen) - 1} other such labels)" if len(unseen) > 1 else ""
    near = did_you_mean(first, known)
    raise UsageError(
        f"{cells.origin}: the label {first!r} does not occur in train{others}: {cells.places(same)}.{near}"
    )
