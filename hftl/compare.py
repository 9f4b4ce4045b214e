"""Runs beside each other, on the test rows that all have: settings, scores with intervals, who is right where."""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hftl import folder, pages
from hftl.answers import Answers
from hftl.errors import UsageError
from hftl.examples import Shown
from hftl.finished import Finished, find_run
from hftl.folder import say
from hftl.launch import quick_imports
from hftl.metrics import class_score
from hftl.tables import aligned
from hftl.tasks import TASKS

if TYPE_CHECKING:
    from hftl.known_rows import KnownRows

#: draws of the test rows for an interval; with more, its ends move by less than a tenth of its width
_DRAWS = 1_000
#: examples of each kind of disagreement
_EXAMPLES = 6
#: scores that are compared
SCORES = ("accuracy", "f1_macro", "log_loss")


@dataclass
class Compared:
    """A run among others.

    Attributes:
        name: its folder.
        values: each score on the shared rows, with the ends of its 95 % interval.
        gains: the same of the difference to the first run; empty for that.
        won: shared rows on which it is right and the first is wrong.
        lost: the reverse.
        probability: of so uneven a count of both if the two runs were alike (McNemar's exact test); 1 for the first.
        examples: the surest of the rows won, then of those lost.
    """

    name: str
    values: dict[str, tuple[float, float, float]]
    gains: dict[str, tuple[float, float, float]]
    won: int
    lost: int
    probability: float
    examples: list[dict[str, Any]]


#: a row of a table, which has no name of its own
_NUMBERED = re.compile(r"(.*-)?\d+")


def main(paths: Sequence[str], output: str | None, trust_remote_code: bool = False) -> None:
    """`hftl compare`: the table in the terminal, and a page where one is asked for.

    Raises:
        UsageError: there are fewer than two runs, or they cannot be compared.
    """
    if len(paths) < 2:
        raise UsageError("hftl compare takes two runs or more.")
    runs = [find_run(path) for path in paths]
    for run in runs:
        run.require_one_of_several("hftl compare")
    names = _names(paths)
    known = functools.cache(lambda number: _known_rows(runs[number], trust_remote_code))
    rows, answers = shared_answers(runs, names, known)
    splits = list(dict.fromkeys(run.scored_split for run in runs))
    settings = different_settings([run.recipe for run in runs])
    first = None if output is None else known(0)
    if output is not None and first is None:
        say(f"no examples are shown: the task {runs[0].task_name} is of a recipe of its own")
    shown = None if first is None else first.shown
    compared = compare(answers, names, runs[0].label_names, rows, shown)
    say(_as_text(compared, settings, len(rows), splits))
    if output is not None:
        page = pages.render("compare", runs=compared, settings=settings, rows=len(rows), scores=SCORES, splits=splits)
        with folder.explained_disk_errors(Path(output).parent):
            folder.write_text(Path(output), page)
        say(f"\nwritten to {output}")


def _known_rows(found: Finished, trust_remote_code: bool) -> KnownRows | None:
    """The rows of a run in its data; None where only a recipe of its own could read these."""
    if found.task_name not in TASKS:
        return None
    with quick_imports():  # only where the rows must be seen
        from hftl.known_rows import KnownRows, read_splits
        from hftl.run import load_run

    run = load_run(found.folder, trust_remote_code=trust_remote_code)
    return KnownRows(run, read_splits(run))


def shared_answers(
    runs: Sequence[Finished], names: Sequence[str], known_rows: Callable[[int], KnownRows | None]
) -> tuple[list[str], list[Answers]]:
    """Ids of the test rows that all runs have, and the answers of each run to those.

    Args:
        runs: finished runs.
        names: of them, in messages.
        known_rows: from the number of a run to its rows in the data, read when they are needed.

    Raises:
        UsageError: the classes differ, no row is shared, or a shared row has different labels.
    """
    first = runs[0].label_names
    for run, name in zip(runs, names, strict=True):
        if run.label_names != first:
            raise UsageError(
                f"{name} has other classes than {names[0]} ({', '.join(run.label_names[:5])}; {', '.join(first[:5])}): "
                "such runs cannot be compared."
            )
    every = [run.answers for run in runs]
    known_by = _known_by(runs, every, names, known_rows)
    counts = [len(answers.ids) for answers in every]
    common = set(known_by[0]).intersection(*known_by[1:])
    shared = [row for row in known_by[0] if row in common]
    if not shared:
        raise UsageError(f"{', '.join(names)} share no test row: compare runs on the same data.")
    if max(counts) > len(shared):
        say(f"compared on the {len(shared):,} rows that all have (of {', '.join(f'{count:,}' for count in counts)})")
    rows = [row for row, known in zip(every[0].ids, known_by[0], strict=True) if known in common]
    chosen = [_part(answers, known, shared) for answers, known in zip(every, known_by, strict=True)]
    for answers, name in zip(chosen[1:], names[1:], strict=True):
        differ = np.flatnonzero(answers.labels != chosen[0].labels)
        if len(differ):
            raise UsageError(
                f"{len(differ)} of {len(rows)} rows have another label in {name} than in {names[0]} (the first: "
                f"{rows[differ[0]]}): these are not the same rows."
            )
    return rows, chosen


def _known_by(
    runs: Sequence[Finished],
    every: Sequence[Answers],
    names: Sequence[str],
    known_rows: Callable[[int], KnownRows | None],
) -> list[list[str]]:
    """By what the rows of each run are told: their ids where the data are the same, else the content too.

    Raises:
        UsageError: rows of other data have numbers alone, and the data of a run are not at hand.
    """
    ids = [answers.ids for answers in every]
    digests = {run.found_in_data.get("scored") for run in runs}
    if len(digests) == 1 and None not in digests:
        return ids
    numbered = all(_NUMBERED.fullmatch(row) for rows in ids for row in rows)
    known = [known_rows(number) for number in range(len(runs))]
    there = [
        rows
        for rows, answers in zip(known, every, strict=True)
        if rows is not None and rows.splits is not None and rows.places.keys() >= set(answers.ids)
    ]
    if len(there) == len(known):
        return [_contents(rows, answers, numbered) for rows, answers in zip(there, every, strict=True)]
    unknown = [name for name, rows in zip(names, known, strict=True) if rows not in there]
    problem = f"the runs were not scored on the same data, and those of {', '.join(unknown)} are gone or have changed"
    if numbered:
        raise UsageError(
            f"{problem}: rows that have numbers alone cannot be told. Compare runs on the same test split."
        )
    say(f"warning: {problem}: rows are told by their names alone")
    return ids


def _contents(known: KnownRows, answers: Answers, numbered: bool) -> list[str]:
    """What stands for each row: its content, with its name, or with its label where it has a number alone."""
    assert known.splits is not None
    rows = known.splits.scored.select([known.places[row] for row in answers.ids])
    times: Counter[str] = Counter()
    contents = []
    for row, label, content in zip(answers.ids, answers.labels, known.splits.contents(rows), strict=True):
        name = f"{label if numbered else row} {content}"
        times[name] += 1
        contents.append(f"{times[name]} {name}")
    return contents


def _part(answers: Answers, known_by: Sequence[str], rows: Sequence[str]) -> Answers:
    """The answers to some rows, in their order; `known_by` says which row is which."""
    places = {row: number for number, row in enumerate(known_by)}
    order = [places[row] for row in rows]
    ids = [answers.ids[place] for place in order]
    return Answers(ids, answers.labels[order], answers.predictions[order], answers.probabilities[order])


def compare(
    answers: Sequence[Answers], names: Sequence[str], classes: Sequence[str], rows: Sequence[str], shown: Any = None
) -> list[Compared]:
    """Each run against the first.

    The intervals are percentiles over draws of the test rows with replacement (Efron 1979), the same draws for all
    runs: a difference is then known better than the scores that it is of.

    Args:
        answers: of each run to the same rows.
        names: of the runs.
        classes: names by class id.
        rows: ids of the rows.
        shown: `(id) -> Shown` of a row, for the examples.
    """
    drawn = [_draws(one, len(classes)) for one in answers]
    compared = []
    for number, (one, name) in enumerate(zip(answers, names, strict=True)):
        gains = {score: _interval(drawn[number][score] - drawn[0][score]) for score in SCORES} if number else {}
        won = np.flatnonzero(one.correct & ~answers[0].correct)
        lost = np.flatnonzero(~one.correct & answers[0].correct)
        examples = [
            _example(one, answers[0], row, classes, rows, shown)
            for group in (won, lost)
            for row in one.surest(group)[:_EXAMPLES]
        ]
        values = {score: _interval(drawn[number][score]) for score in SCORES}
        compared.append(Compared(name, values, gains, len(won), len(lost), _mcnemar(len(won), len(lost)), examples))
    return compared


def _draws(answers: Answers, classes: int) -> dict[str, npt.NDArray[np.float64]]:
    """Each score of all rows, and behind it those of `_DRAWS` draws; the draws are a function of the number of rows."""
    count = len(answers.labels)
    random = np.random.default_rng(0)
    hits = np.where(answers.correct, answers.labels, classes)  # by class, wrong answers behind the last
    own = -np.log(
        np.clip(answers.probabilities[np.arange(count), answers.labels], 1e-6, 1)
    )  # as many digits as there are
    values = np.empty((_DRAWS + 1, 3))
    for number in range(_DRAWS + 1):
        chosen = random.integers(0, count, count) if number else slice(None)
        right = np.bincount(hits[chosen], minlength=classes + 1)[:classes]
        labels = np.bincount(answers.labels[chosen], minlength=classes)
        predicted = np.bincount(answers.predictions[chosen], minlength=classes)
        scores = (class_score(metric, right, predicted, labels) for metric in ("accuracy", "f1_macro"))
        values[number] = *scores, own[chosen].mean()
    return dict(zip(SCORES, values.T, strict=True))


def _interval(values: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return float(values[0]), float(low), float(high)


def _mcnemar(won: int, lost: int) -> float:
    """McNemar's test (1947), exact: of the rows on which two runs differ, each is as likely to win one."""
    from scipy.stats import binomtest

    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def _example(
    one: Answers, first: Answers, row: Any, classes: Sequence[str], rows: Sequence[str], shown: Any
) -> dict[str, Any]:
    return {
        "id": pages.row_name(rows[row]),
        "label": classes[one.labels[row]],
        "prediction": classes[one.predictions[row]],
        "first": classes[first.predictions[row]],
        "shown": Shown() if shown is None else shown(rows[row]),
    }


def different_settings(recipes: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """The settings that are not the same in all runs, with each run's value."""
    names = dict.fromkeys(name for recipe in recipes for name in pages.settings(recipe))
    different = {}
    for name in names:
        values = [recipe.get(name) for recipe in recipes]
        if any(value != values[0] for value in values):
            shown = ["" if value is None else pages.shown(value) for value in values]
            if len(set(shown)) == 1:  # the same name in other folders: from where these differ
                places = [os.path.abspath(os.path.expanduser(str(value))) for value in values]
                shown = [os.path.relpath(place, os.path.commonpath(places)) for place in places]
            different[name] = shown
    return different


def _names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, or all of it where that would not tell them apart."""
    last = [Path(path).resolve().name for path in paths]
    return last if len(set(last)) == len(last) else list(paths)


def _as_text(compared: Sequence[Compared], settings: dict[str, list[str]], rows: int, splits: Sequence[str]) -> str:
    """What the terminal shows."""
    head = ["run", *SCORES, "won", "lost", "p"]
    lines = [head]
    for number, run in enumerate(compared):
        scores = [f"{value:.4f} ({low:.4f} to {high:.4f})" for value, low, high in run.values.values()]
        lines.append(
            [run.name, *scores, *([str(run.won), str(run.lost), f"{run.probability:.2g}"] if number else [""] * 3)]
        )
    about = (
        f"{rows:,} rows of {' and '.join(splits)}; in brackets 95 % intervals; won: right where {compared[0].name} "
        "is wrong; p: McNemar's"
    )
    chosen = ["the models were chosen by their scores on validation: new data may well give lower ones"]
    parts = [about, *(chosen if "validation" in splits else []), *aligned(lines, left=[0])]
    for run in compared[1:]:
        value, low, high = run.gains["accuracy"]
        sure = "more than chance" if run.probability < 0.05 else "not more than chance may do"
        parts.append(
            f"{run.name}: accuracy {value:+.4f} ({low:+.4f} to {high:+.4f}) against {compared[0].name}, {sure}"
        )
    table = [["setting", *(run.name for run in compared)], *([name, *values] for name, values in settings.items())]
    return "\n".join([*parts, "", *(aligned(table, left=range(len(compared) + 1)) if settings else ["same settings"])])
