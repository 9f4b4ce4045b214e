"""predictions.csv: what a run says of every row of its test split, else of validation."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hftl import folder
from hftl.data import Splits
from hftl.errors import UsageError
from hftl.inert import as_cell, from_cell, visible
from hftl.metrics import softmax
from hftl.tables import as_csv


@dataclass
class Answers:
    """The content of predictions.csv.

    Attributes:
        ids: of the rows, as `visible` gives them.
        labels: class ids, shape (rows,).
        predictions: class ids, shape (rows,); of classes that are equal to six digits the file knows which.
        probabilities: shape (rows, classes).
    """

    ids: list[str]
    labels: npt.NDArray[np.int64]
    predictions: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float64]

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Whether the prediction is the label, shape (rows,)."""
        return self.predictions == self.labels

    def surest(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Some rows, those first of whose answers the model is surest."""
        return rows[np.argsort(-self.probabilities[rows].max(axis=1), kind="stable")]


def write_answers(path: Path, label_names: Sequence[str], splits: Splits, split: str, logits: Any, labels: Any) -> None:
    """A line for each row of a split: its id, what it is, what the model says, and the probability of every class."""
    rows: Any = splits.test if split == "test" else splits.validation
    probabilities = softmax(np.asarray(logits))
    lines = (
        [row_id, label_names[label], label_names[int(row.argmax())], *(f"{p:.6f}" for p in row)]
        for row_id, label, row in zip(rows["id"][:], labels, probabilities, strict=True)
    )
    folder.write_text(path, as_csv([_head(label_names), *lines]))


def read_answers(path: Path, label_names: Sequence[str], rows: int | None = None) -> Answers:
    """The content of a run's predictions.csv.

    Args:
        path: the file.
        label_names: of the run.
        rows: how many it must have; None where that is not known.

    Raises:
        UsageError: there is none, it is not of these classes, or it is damaged.
    """
    if not path.is_file():
        raise UsageError(
            f"{str(path.parent)!r} has no {path.name}: `hftl report` makes it anew, where the run's data are at hand."
        )
    numbers = {visible(name): number for number, name in enumerate(label_names)}
    csv.field_size_limit(sys.maxsize)  # names of rows are of any length
    try:
        with path.open(encoding="utf-8", newline="") as file:
            head, *lines = csv.reader(file)
    except (ValueError, csv.Error) as error:
        raise UsageError(f"{str(path)!r} is damaged: {error}") from error
    if head != [*map(as_cell, _head(label_names))] or not lines:
        raise UsageError(f"{str(path)!r} is not of this run: its columns are not those of the run's classes.")
    try:
        answers = Answers(
            ids=[from_cell(line[0]) for line in lines],
            labels=np.array([numbers[from_cell(line[1])] for line in lines]),
            predictions=np.array([numbers[from_cell(line[2])] for line in lines]),
            probabilities=np.array([line[3:] for line in lines], dtype=float),
        )
    except (KeyError, IndexError, ValueError) as error:  # an unknown class, a line that is cut, no number
        raise UsageError(f"{str(path)!r} is damaged: {type(error).__name__} {error}") from error
    if not np.isfinite(answers.probabilities).all():
        raise UsageError(f"{str(path)!r} is damaged: a probability is no number.")
    rounding = 1e-3 + 5e-7 * len(label_names)  # of thousands of classes most are written as nothing
    sums_hold = np.allclose(answers.probabilities.sum(axis=1), 1, rtol=0, atol=rounding)
    if not sums_hold or len(set(answers.ids)) < len(lines):
        raise UsageError(f"{str(path)!r} is damaged: probabilities do not sum to 1, or a row comes twice.")
    if rows is not None and len(lines) != rows:
        raise UsageError(
            f"{str(path)!r} is damaged: it has {len(lines):,} rows, and the run answered {rows:,}. Remove it, and "
            "`hftl report` makes it anew."
        )
    return answers


def _head(label_names: Sequence[str]) -> list[str]:
    return ["id", "label", "prediction", *(f"probability_{name}" for name in label_names)]
