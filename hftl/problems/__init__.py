"""What the label of a row may be: a class, several labels, a number, a tag for each word, or one of its choices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hftl.problems.base import LabelCells, Problem
from hftl.problems.choice import Choice
from hftl.problems.multi_label import LabelsPrediction, MultiLabel
from hftl.problems.regression import Regression, ValuePrediction
from hftl.problems.single_label import Prediction, SingleLabel, is_uneven
from hftl.problems.word_tags import Entity, TagsPrediction, WordTags

if TYPE_CHECKING:
    from hftl.arguments import TransferArguments

#: by the names of `--problem_type`
PROBLEMS: dict[str, type[Problem]] = {
    kind.name: kind for kind in (SingleLabel, MultiLabel, Regression, WordTags, Choice)
}


def problem_of(arguments: TransferArguments) -> Problem:
    """The problem that `--problem_type` names."""
    if arguments.problem_type == MultiLabel.name:
        return MultiLabel(separator=arguments.label_separator)
    return PROBLEMS[arguments.problem_type]()


__all__ = [
    "PROBLEMS",
    "Choice",
    "Entity",
    "LabelCells",
    "LabelsPrediction",
    "MultiLabel",
    "Prediction",
    "Problem",
    "Regression",
    "SingleLabel",
    "TagsPrediction",
    "ValuePrediction",
    "WordTags",
    "is_uneven",
    "problem_of",
]
