"""What the label of a row may be: one class of several, any number of labels, or a number."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hftl.problems.base import LabelCells, Problem
from hftl.problems.multi_label import LabelsPrediction, MultiLabel
from hftl.problems.regression import Regression, ValuePrediction
from hftl.problems.single_label import Prediction, SingleLabel, is_uneven

if TYPE_CHECKING:
    from hftl.arguments import TransferArguments

#: by the names of `--problem_type`
PROBLEMS: dict[str, type[Problem]] = {kind.name: kind for kind in (SingleLabel, MultiLabel, Regression)}


def problem_of(arguments: TransferArguments) -> Problem:
    """The problem that `--problem_type` names."""
    if arguments.problem_type == MultiLabel.name:
        return MultiLabel(separator=arguments.label_separator)
    return PROBLEMS[arguments.problem_type]()


__all__ = [
    "PROBLEMS",
    "LabelCells",
    "LabelsPrediction",
    "MultiLabel",
    "Prediction",
    "Problem",
    "Regression",
    "SingleLabel",
    "ValuePrediction",
    "is_uneven",
    "problem_of",
]
