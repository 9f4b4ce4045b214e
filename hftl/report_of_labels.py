"""The report of runs whose rows have several labels, or a number."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from hftl import charts, pages
from hftl.charts import Line
from hftl.errors import UsageError
from hftl.finished import Finished
from hftl.folder import METRICS, PREDICTIONS
from hftl.inert import as_cell, from_cell
from hftl.metrics import written
from hftl.problems import PROBLEMS, Problem, Regression
from hftl.report_parts import common_values

#: lines of a list
_LINES = 20
#: points of a chart, drawn at random of more rows
_MOST_POINTS = 500
#: by how much a score of predictions.csv may differ from that of metrics.json: answers may have been made anew
_SAME = 0.02
#: what scores mean, in a few words
_MEANINGS = {
    "rmse": "root of the mean square of the differences",
    "mae": "mean of the absolute differences",
    "r2": "part of the variance that is explained",
    "spearman": "correlation of the ranks",
    "mean_average_precision": "area under precision over recall, mean of the labels",
    "f1_macro": "mean over the labels that occur",
    "f1_micro": "of all labels of all rows",
}


def render(run: Finished, shared: bool) -> str:
    """The page.

    Args:
        run: a finished run.
        shared: leave out everything that is about single rows of the data, their names too.

    Raises:
        UsageError: the run has no predictions, or they are damaged.
    """
    problem = PROBLEMS[run.recipe["problem_type"]]
    is_regression = problem is Regression
    rows = _read(run, problem())
    parts = _of_numbers(run, rows, shared) if is_regression else _of_labels(run, rows, shared)
    return pages.render(
        "report_of_labels",
        **common_values(run, shared, problem.headline[:1] if is_regression else problem.headline[:2]),
        rows=len(rows),
        problem=problem.name,
        is_regression=is_regression,
        counted="rows" if is_regression else "labels",
        tiles=_tiles(run.scores, problem),
        on_validation=", ".join(
            f"{words} {written(key, run.metrics['validation'][key])}"
            for key, words in problem.headline
            if key in run.metrics["validation"]
        ),
        **parts,
    )


def _tiles(scores: dict[str, float], problem: type[Problem]) -> list[dict[str, str]]:
    """The scores that a person sees first."""
    return [
        {"name": words, "value": written(key, scores[key]), "note": _MEANINGS[key]}
        for key, words in problem.headline
        if key in scores
    ]


def _read(run: Finished, problem: Problem) -> list[list[str]]:
    """The lines of predictions.csv: id, label, prediction, and what else there is."""
    path = run.folder / PREDICTIONS
    if not path.is_file():
        raise UsageError(f"{str(run.folder)!r} has no {path.name}: train again, or take the one of a copy.")
    with path.open(encoding="utf-8", newline="") as file:
        head, *lines = csv.reader(file)
    expected = [*map(as_cell, ["id", "label", *problem.answer_columns(run.label_names)])]
    if head != expected or not lines or any(len(line) != len(head) for line in lines):
        raise UsageError(
            f"{str(path)!r} is damaged, or not of this run: its columns are not those of the run's labels."
        )
    return lines


def _of_numbers(run: Finished, rows: Sequence[Sequence[str]], shared: bool) -> dict[str, Any]:
    """How far answers are off, and where."""
    labels, predictions = np.array([row[1:3] for row in rows], dtype=float).T
    differences = predictions - labels
    _check_fit(run, "rmse", float(np.sqrt(np.mean(differences**2))))
    order = np.argsort(-np.abs(differences), kind="stable")[:_LINES]
    chosen = np.random.default_rng(0).permutation(len(rows))[:_MOST_POINTS]
    both = float(min(labels.min(), predictions.min())), float(max(labels.max(), predictions.max()))
    lines = [
        Line("right answers", both, both, 0, dashed=True),
        Line("rows", labels[chosen], predictions[chosen], 1, marked=True, joined=False),
    ]
    halves = np.quantile(np.abs(differences), [0.5, 0.9, 1.0])
    about = f"Answers over labels of {len(chosen):,} rows; right ones lie on the diagonal"
    return {
        "chart": charts.line_chart(lines, about, run.label_names[0], "answer", both, both),
        "shown": len(chosen),
        "off": [f"{value:.4g}" for value in halves],
        "worst": []
        if shared
        else [
            {
                "id": pages.row_name(from_cell(rows[row][0])),
                "label": f"{labels[row]:.6g}",
                "prediction": f"{predictions[row]:.6g}",
                "difference": f"{differences[row]:+.4g}",
            }
            for row in order.tolist()
        ],
    }


def _of_labels(run: Finished, rows: Sequence[Sequence[str]], shared: bool) -> dict[str, Any]:
    """Each label's scores, and rows of which many labels are wrong."""
    try:
        sets = [tuple(set(json.loads(from_cell(cell))) for cell in row[1:3]) for row in rows]
    except (ValueError, TypeError) as error:
        raise UsageError(f"{str(run.folder / PREDICTIONS)!r} is damaged: a cell is no list of labels.") from error
    wrong = np.array([len(label ^ prediction) for label, prediction in sets])
    _check_fit(run, "hamming_loss", float(wrong.mean()) / len(run.label_names))
    there = {name: sum(name in label for label, _ in sets) for name in run.label_names}
    order = [row for row in np.argsort(-wrong, kind="stable")[:_LINES].tolist() if wrong[row]]
    return {
        "labels": [
            {
                "name": name,
                "rows": count,
                "threshold": run.metrics["thresholds"][name],
                **{kind: run.scores[f"{kind}/{name}"] if count else None for kind in ("precision", "recall", "f1")},
            }
            for name, count in there.items()
        ],
        "wrong_rows": int((wrong > 0).sum()),
        "worst": []
        if shared
        else [
            {
                "id": pages.row_name(from_cell(rows[row][0])),
                "label": ", ".join(sorted(sets[row][0])) or "–",
                "missed": ", ".join(sorted(sets[row][0] - sets[row][1])) or "–",
                "added": ", ".join(sorted(sets[row][1] - sets[row][0])) or "–",
            }
            for row in order
        ],
    }


def _check_fit(run: Finished, name: str, found: float) -> None:
    """Refuse answers that do not give the score that the run had.

    Raises:
        UsageError: as said.
    """
    before = run.scores[name]
    if not abs(found - before) <= _SAME * max(abs(before), 1e-3):
        raise UsageError(
            f"{str(run.folder / PREDICTIONS)!r} does not fit {METRICS}: its {name} is {found:.4g}, and the run had "
            f"{before:.4g}."
        )
