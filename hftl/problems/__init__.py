"""What the label of a row may be: a class, several labels, a number, a tag for each word, one of its choices, what
it is like."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hftl.problems.base import LabelCells, Problem
from hftl.problems.choice import Choice
from hftl.problems.multi_label import LabelsPrediction, MultiLabel
from hftl.problems.regression import Regression, ValuePrediction
from hftl.problems.similarity import (
    EmbeddingPrediction,
    Gallery,
    Neighbour,
    NeighboursPrediction,
    Similarity,
)
from hftl.problems.single_label import Prediction, SingleLabel, is_uneven
from hftl.problems.word_tags import Entity, TagsPrediction, WordTags

if TYPE_CHECKING:
    from hftl.arguments import TransferArguments

#: by the names of `--problem_type`
PROBLEMS: dict[str, type[Problem]] = {
    kind.name: kind for kind in (SingleLabel, MultiLabel, Regression, WordTags, Choice, Similarity)
}


def problem_of(arguments: TransferArguments) -> Problem:
    """The problem that `--problem_type` names."""
    if arguments.problem_type == MultiLabel.name:
        return MultiLabel(separator=arguments.label_separator)
    if arguments.problem_type == Similarity.name:
        settings: Any = arguments
        return Similarity(settings.embedding_size, settings.temperature)
    return PROBLEMS[arguments.problem_type]()


__all__ = [
    "PROBLEMS",
    "Choice",
    "EmbeddingPrediction",
    "Entity",
    "Gallery",
    "LabelCells",
    "LabelsPrediction",
    "MultiLabel",
    "Neighbour",
    "NeighboursPrediction",
    "Prediction",
    "Problem",
    "Regression",
    "Similarity",
    "SingleLabel",
    "TagsPrediction",
    "ValuePrediction",
    "WordTags",
    "is_uneven",
    "problem_of",
]
