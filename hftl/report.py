"""report.html: one page that shows what a run did, what came out, and where the model is wrong."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hftl import charts, folder, pages, report_of_labels
from hftl.answers import Answers
from hftl.charts import Line
from hftl.examples import EXPLAINED, Examples, Places, Shown, surest_mistakes, surest_of_classes, suspicious
from hftl.finished import Finished
from hftl.metrics import ranking, share_interval
from hftl.problems import SingleLabel
from hftl.report_parts import common_values

REPORT = "report.html"
#: more classes than this make no readable table of all pairs: the most frequent confusions are listed
_MOST_CLASSES = 20
#: lines of other lists
_LINES = 20
#: curves of single classes
_MOST_CURVES = charts.COLOURS
_BINS = 10


def write_report(run: Finished, examples: Examples | None) -> Path:
    """Write report.html into the run folder; see `render_report`."""
    path = run.folder / REPORT
    page = render_report(run, examples)
    with folder.explained_disk_errors(run.folder):
        folder.write_text(path, page)
    return path


def render_report(run: Finished, examples: Examples | None, shared: bool = False) -> str:
    """The page.

    Args:
        run: a finished run.
        examples: what single rows hold, of its answers; None leaves it out.
        shared: leave out everything that is about single rows of the data, their names too.

    Raises:
        UsageError: the run has no predictions.
    """
    if not run.is_one_of_several:
        return report_of_labels.render(run, shared)
    answers, names = run.answers, run.label_names
    mistakes, right = surest_mistakes(answers), surest_of_classes(answers)
    return pages.render(
        "report",
        **common_values(run, shared, SingleLabel.headline),
        counted="rows",
        rows=len(answers.ids),
        at_hand=examples is not None,
        deviation=run.deviation,
        interval=share_interval(int(answers.correct.sum()), len(answers.ids)),
        classes=_classes(run.scores, answers, names),
        confusion=_confusion(answers, names),
        reliability=_reliability(answers),
        ranking=_ranking_curves(answers, names),
        map=_map(answers, names, examples.map) if examples and examples.map else {},
        mistakes=[] if shared else _examples(run, answers, mistakes, examples.mistakes if examples else None),
        right=[] if shared else _examples(run, answers, right, examples.right if examples else None),
        explained=EXPLAINED,
        label_errors={} if shared else _label_errors(answers, names, examples.label_errors if examples else None),
    )


def _classes(scores: Mapping[str, float], answers: Answers, names: Sequence[str]) -> list[dict[str, Any]]:
    """A line for each class; one without a row has no recall."""
    there = np.bincount(answers.labels, minlength=len(names)).tolist()
    return [
        {
            "name": name,
            "rows": count,
            **{kind: scores.get(f"{kind}/{name}") if count else None for kind in ("precision", "recall", "f1")},
        }
        for name, count in zip(names, there, strict=True)
    ]


def _confusion(answers: Answers, names: Sequence[str]) -> dict[str, Any]:
    """Every pair of classes where they are few, else the most frequent confusions."""
    there = np.maximum(np.bincount(answers.labels, minlength=len(names)), 1)
    if len(names) <= _MOST_CLASSES:
        counts = np.zeros((len(names), len(names)), dtype=int)
        np.add.at(counts, (answers.labels, answers.predictions), 1)
        return {"table": True, "names": names, "counts": counts.tolist(), "shares": (counts / there[:, None]).tolist()}
    # A table of all pairs of thousands of classes would not fit: those that occur are counted.
    pairs, times = np.unique(
        np.stack([answers.labels, answers.predictions], axis=1)[~answers.correct], axis=0, return_counts=True
    )
    order = np.argsort(-times, kind="stable")[:_LINES]
    return {
        "table": False,
        "pairs": [
            {"label": names[row], "other": names[column], "count": count, "share": count / int(there[row])}
            for (row, column), count in zip(pairs[order].tolist(), times[order].tolist(), strict=True)
        ],
    }


def _reliability(answers: Answers) -> dict[str, Any]:
    """How often the model is right where it is so sure."""
    confidence = answers.probabilities.max(axis=1)
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    filled = [number for number in range(_BINS) if (bins == number).any()]
    means = [float(confidence[bins == number].mean()) for number in filled]
    accuracies = [float(answers.correct[bins == number].mean()) for number in filled]
    lines = [
        Line("as sure as right", (0.0, 1.0), (0.0, 1.0), 0, dashed=True),
        Line("this model", means, accuracies, 1, marked=True),
    ]
    about = "Accuracy over confidence; a calibrated model lies on the diagonal; the table beside it has the values"
    chart = charts.line_chart(lines, about, "confidence", "accuracy", (0, 1), (0, 1))
    counts = [
        {"from": number / _BINS, "to": (number + 1) / _BINS, "rows": int((bins == number).sum()), "accuracy": accuracy}
        for number, accuracy in zip(filled, accuracies, strict=True)
    ]
    return {"chart": chart, "bins": counts}


def _ranking_curves(answers: Answers, names: Sequence[str]) -> dict[str, Any]:
    """ROC and precision-recall curves: of the second of two classes, else of each against the rest."""
    counts = np.bincount(answers.labels, minlength=len(names))
    numbers = [1] if len(names) == 2 else range(len(names))
    occurring = [number for number in numbers if 0 < counts[number] < len(answers.labels)]
    frequent = np.argsort(-counts, kind="stable")[:_MOST_CLASSES]
    there = [number for number in occurring if number in frequent]
    if not there:
        return {}
    roc, precision, table = [], [], []
    for colour, number in enumerate(there, start=1):
        found = ranking(answers.labels == number, answers.probabilities[:, number])
        table.append({"name": names[number], "roc_auc": found.roc_auc, "average_precision": found.average_precision})
        if colour <= _MOST_CURVES:
            roc.append(Line(names[number], found.false, found.true, colour))
            precision.append(Line(names[number], found.true[1:], found.precision, colour))
    chance = Line("", (0, 1), (0, 1), 0, dashed=True)
    about = "the table below has the areas under them"
    axes: list[tuple[float, float]] = [(0, 1), (0, 1)]
    return {
        "roc": charts.line_chart(
            [chance, *roc], f"ROC curves; {about}", "false positive rate", "true positive rate", *axes
        ),
        "precision": charts.line_chart(precision, f"Precision-recall curves; {about}", "recall", "precision", *axes),
        "table": table,
        "shown": len(roc),
        "left_out": len(occurring) - len(there),
    }


def _examples(run: Finished, answers: Answers, order: list[int], shown: list[Shown] | None) -> list[dict[str, Any]]:
    """Rows with what the model saw."""
    return [
        {
            "id": pages.row_name(answers.ids[row]),
            "label": run.label_names[answers.labels[row]],
            "prediction": run.label_names[answers.predictions[row]],
            "probability": float(answers.probabilities[row].max()),
            "shown": seen,
        }
        for row, seen in zip(order, shown or [Shown()] * len(order), strict=True)
    ]


def _map(answers: Answers, names: Sequence[str], places: Places) -> dict[str, Any]:
    """Where the features put some of the rows."""
    chosen = np.array(places.numbers)
    about = f"Rows by the two directions of most variance; {places.pure:.0%} have one of their own class as the nearest"
    chart = charts.map_chart(np.array(places.points), answers.labels[chosen], ~answers.correct[chosen], names, about)
    return {"rows": len(chosen), "explained": places.explained, "pure": places.pure, "chart": chart}


def _label_errors(answers: Answers, names: Sequence[str], shown: list[Shown] | None) -> dict[str, Any]:
    """Rows of the split whose label is likely wrong, the first of them with what they hold."""
    found, rather, _ = suspicious(answers)
    lines = [
        {
            "shown": seen or Shown(),
            "id": pages.row_name(answers.ids[row]),
            "label": names[answers.labels[row]],
            "rather": names[other],
            "own": float(answers.probabilities[row, answers.labels[row]]),
            "other": float(answers.probabilities[row, other]),
        }
        for (row, other), seen in itertools.zip_longest(
            zip(found[:_LINES].tolist(), rather[:_LINES].tolist(), strict=True), shown or []
        )
    ]
    return {"count": len(found), "lines": lines}
