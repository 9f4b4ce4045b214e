"""predictions.csv: what a run says of every row of its test split, else of validation."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hftl import folder
from hftl.errors import UsageError
from hftl.inert import as_cell, from_cell, visible
from hftl.problems import SingleLabel

if TYPE_CHECKING:
    from hftl.data import Splits
    from hftl.problems import Problem


#: rows whose answers are held at once: with thousands of classes those of all take gigabytes
_AT_ONCE = 256


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


def write_answers(path: Path, problem: Problem, splits: Splits, split: str, logits: Any, labels: Any) -> None:
    """A line for each row of a split: its id, what it is, what the model says, and the probability of every class."""
    rows: Any = splits.test if split == "test" else splits.validation
    rows = rows.select_columns([name for name in ("id", "text") if name in rows.column_names])
    names, logits = splits.label_names, np.asarray(logits)
    with folder.replacing(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(map(as_cell, ["id", "label", *problem.answer_columns(names)]))
        for start in range(0, len(rows), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            answers = problem.answers(rows.select(range(len(rows))[part]).to_list(), logits[part], names)
            for answer, label in zip(answers, labels[part], strict=True):
                said, *numbers = answer.cells()
                writer.writerow([*map(as_cell, (answer.id, problem.label_cell(label, names), said)), *numbers])


def read_answers(path: Path, label_names: Sequence[str], rows: Mapping[str, int] | None = None) -> Answers:
    """The content of a run's predictions.csv.

    Args:
        path: the file.
        label_names: of the run.
        rows: how many of each class it must have; None where that is not known.

    Raises:
        UsageError: there is none, it is not of these classes, or it is damaged.
    """
    if not path.is_file():
        raise UsageError(
            f"{str(path.parent)!r} has no {path.name}: `hftl report` makes it anew, where the run's data are at hand."
        )
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.reader(file)
        try:
            head = next(lines, [])
            if head != [*map(as_cell, ["id", "label", *SingleLabel().answer_columns(label_names)])]:
                raise UsageError(f"{str(path)!r} is not of this run: its columns are not those of the run's classes.")
            answers = _read_lines(lines, label_names)
        except (ValueError, csv.Error) as error:
            raise UsageError(
                f"{str(path)!r} is damaged ({error}). Remove it, and `hftl report` makes it anew."
            ) from error
    counts = np.bincount(answers.labels, minlength=len(label_names)).tolist()
    if rows and counts != [rows.get(name) for name in label_names]:
        raise UsageError(
            f"{str(path)!r} is damaged: it has {len(answers.ids):,} rows, and the run answered {sum(rows.values()):,}, "
            "or they are of other classes. Remove it, and `hftl report` makes it anew."
        )
    return answers


def _read_lines(lines: Iterable[list[str]], label_names: Sequence[str]) -> Answers:
    """The answers in the lines behind the head; ValueError says what is wrong with them."""
    numbers = {visible(name): number for number, name in enumerate(label_names)}
    ids, classes, probabilities = [], [], []
    for number, line in enumerate(lines, start=2):
        if len(line) != 3 + len(label_names):
            raise ValueError(f"line {number} has {len(line)} columns")
        named = [numbers.get(from_cell(cell), -1) for cell in line[1:3]]
        if min(named) < 0:
            raise ValueError(f"line {number} names another class")
        ids.append(from_cell(line[0]))
        classes.append(named)
        probabilities.append(np.array(line[3:], dtype=float))
    if not ids:
        raise ValueError("it has no rows")
    labels, predictions = np.array(classes).T
    answers = Answers(ids, labels, predictions, np.stack(probabilities))
    rounding = 1e-3 + 5e-7 * len(label_names)  # of thousands of classes most are written as nothing
    if not np.allclose(answers.probabilities.sum(axis=1), 1, rtol=0, atol=rounding):
        raise ValueError("probabilities do not sum to 1")
    predicted = answers.probabilities[np.arange(len(ids)), predictions]
    if (predicted < answers.probabilities.max(axis=1) - 1e-6).any():  # equal to six digits they may be
        raise ValueError("a prediction is not the most probable class")
    if answers.probabilities.min() < 0 or len(set(ids)) < len(ids):
        raise ValueError("a probability is below 0, or a row comes twice")
    return answers
