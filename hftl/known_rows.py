"""The rows of a finished run in its data, and what the model makes of some of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from hftl import backbones, data, folder
from hftl.answers import Answers, write_answers
from hftl.arguments import stage_arguments
from hftl.cut import NoCut
from hftl.data import Splits
from hftl.errors import UsageError
from hftl.examples import (
    EXPLAINED,
    Examples,
    Places,
    Shown,
    digest_of_answers,
    surest_mistakes,
    surest_of_classes,
    suspicious,
    write_examples,
)
from hftl.feature_map import draw_rows, feature_map, features_of
from hftl.finished import is_near
from hftl.folder import PREDICTIONS
from hftl.inert import visible
from hftl.run import Run


class KnownRows:
    """The rows of predictions.csv in the data.

    Attributes:
        run: the finished run.
        splits: its data; None where they are not at hand, or not what they were.
        places: numbers in the split that was scored, by id as `visible` gives it; empty without the data.
    """

    def __init__(self, run: Run, splits: Splits | None) -> None:
        """Compare the data with those that the run was scored on."""
        self.run, self.splits = run, splits if splits is not None and _are_of(run, splits) else None
        ids = [] if self.splits is None else self.splits.scored["id"][:]
        self.places = {visible(row): place for place, row in enumerate(ids)}

    def shown(self, row: str, *explained: Any) -> Shown:
        """A row as a person sees it, `explained` as for the task's own; nothing where it is not known."""
        if self.splits is None or row not in self.places:
            return Shown()
        return self.run.task.shown(self.splits.scored[self.places[row]], *explained)


def _are_of(run: Run, splits: Splits) -> bool:
    """Whether the data are those that a run was scored on: by their content, or where it has not kept that, by rows."""
    digest = run.found_in_data.get("scored")
    if digest is not None:
        return digest == splits.scored_digest
    if not (run.folder / PREDICTIONS).is_file():
        return True  # the answers to be made have to fit the scores
    labels = dict(zip(map(visible, splits.scored["id"][:]), splits.scored["label"][:], strict=True))
    answers = run.answers
    return dict(zip(answers.ids, answers.labels.tolist(), strict=True)) == labels


def read_splits(run: Run) -> Splits | None:
    """The data of a finished run, read again; None where that cannot be done, which is said."""
    arguments = run.task.arguments
    if "repeats" in run.metrics:
        arguments = stage_arguments(arguments, seed=run.metrics["repeats"]["best_seed"])
    try:
        return data.load_splits(arguments, run.task.modality, run.task.problem)
    except UsageError as error:
        folder.say(f"no examples are shown, since the data cannot be read: {error}")
        return None


def look(run: Run, splits: Splits | None) -> Examples | None:
    """What the report shows of single rows, kept beside the log; predictions.csv is made where it is missing.

    Args:
        run: a finished run.
        splits: its data; None where they are not at hand.

    Returns:
        None where the data are not those that the run was scored on.

    Raises:
        UsageError: there are no answers and no such data, or the files cannot be written.
    """
    known = KnownRows(run, splits)
    _ensure_answers(known)
    answers = run.answers
    if not known.places:
        return None
    examples = Examples(
        digest_of_answers(run),
        _shown(known, answers, surest_mistakes(answers)),
        _shown(known, answers, surest_of_classes(answers)),
        [known.shown(answers.ids[row]) for row in suspicious(answers)[2]],
        _map(known, answers),
    )
    with folder.explained_disk_errors(run.folder):
        write_examples(run, examples)
    return examples


def _ensure_answers(known: KnownRows) -> None:
    """Make predictions.csv where it is missing and the data are at hand."""
    run, splits = known.run, known.splits
    path = run.folder / PREDICTIONS
    if path.exists() and not path.is_file():
        raise UsageError(f"{str(path)!r} is no file. Remove it, and `hftl report` makes it anew.")
    if path.is_file():
        return
    if splits is None:
        raise UsageError(f"{str(run.folder)!r} has no {path.name}, and the data that it was scored on are not at hand.")
    folder.say(f"{path.name} is missing: {len(splits.scored):,} rows are predicted")
    labels = np.asarray(splits.scored["label"][:])
    logits = run.logits(splits.scored)
    found, scored = float((logits.argmax(axis=1) == labels).mean()), run.scores["accuracy"]
    if not is_near(found, scored, len(labels)):
        raise UsageError(
            f"{str(run.folder)!r} has no {path.name}, and the data that are there are not those that it was scored on: "
            f"its accuracy on them is {found:.4f}, and was {scored:.4f}."
        )
    with folder.explained_disk_errors(run.folder):
        write_answers(path, run.task.problem, splits, run.scored_split, logits, labels)


def _shown(known: KnownRows, answers: Answers, order: list[int]) -> list[Shown]:
    """Rows with what the model saw, and what its answers to the first of them rest on."""
    run = known.run
    model = run.model if order and run.is_explainable else None
    return [
        known.shown(answers.ids[row], model if place < EXPLAINED else None, int(answers.predictions[row]))
        for place, row in enumerate(order)
    ]


def _map(known: KnownRows, answers: Answers) -> Places | None:
    """Where the features put some of the rows; nothing where few bits of the model are for inference."""
    run, places = known.run, known.places
    if known.splits is None or len(places) < 2 or backbones.is_quantised(run.model):
        return None
    there = np.array([number for number, row in enumerate(answers.ids) if row in places])
    chosen = there[draw_rows(len(there))]
    try:
        features = features_of(run, known.splits, np.array([places[answers.ids[number]] for number in chosen]))
    except NoCut:  # the head reads more than one vector a row
        return None
    found = feature_map(features, answers.labels[chosen])
    points = [(x, y) for x, y in found.points.tolist()]
    return Places(chosen.tolist(), points, found.explained, found.pure)
