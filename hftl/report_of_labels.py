"""The report of runs whose rows have not one class each: several labels, a number, tags, choices, what is alike."""

from __future__ import annotations

import csv
import json
from collections import Counter
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
from hftl.problems import PROBLEMS, Choice, Problem, Regression, Similarity, WordTags
from hftl.problems.word_tags import entities_of, is_entities
from hftl.report_parts import common_values

#: lines of a list
_LINES = 20
#: points of a chart, drawn at random of more rows
_MOST_POINTS = 500
#: by how much a score of predictions.csv may differ from that of metrics.json: answers may have been made anew
_SAME = 0.02
#: characters of a text
_SHOWN = 200
#: rows whose cosines with all others are held at once, and by how much those of copies may differ, of six digits each
_AT_ONCE, _EQUAL = 512, 1e-5
#: what scores mean, in a few words
_MEANINGS = {
    "rmse": "root of the mean square of the differences",
    "mae": "mean of the absolute differences",
    "r2": "part of the variance that is explained",
    "spearman": "correlation of the ranks",
    "mean_average_precision": "area under precision over recall, mean of the labels",
    "f1_macro": "mean over the labels that occur",
    "f1_micro": "of all labels of all rows",
    "f1": "of whole entities: kind and both ends are right",
    "accuracy": "part of what is answered that is right",
    "recall_at_1": "part of the rows whose nearest other row is alike",
    "map_at_r": "precision up to each that is alike, among the nearest",
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
    rows = _read(run, problem())
    made = {Regression: _of_numbers, WordTags: _of_tags, Choice: _of_choices, Similarity: _of_vectors}
    parts = made.get(problem, _of_labels)(run, rows, shared)
    return pages.render(
        "report_of_labels",
        **common_values(run, shared, problem.headline[:1] if problem is Regression else problem.headline[:2]),
        rows=len(rows),
        problem=problem.words,
        is_regression=problem is Regression,
        has_class_scores=problem.has_class_scores,
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
        "counted": "rows",
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
        "labels": _scored(run, there),
        "what": "label",
        "counted": "labels",
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


def _scored(run: Finished, there: dict[str, int]) -> list[dict[str, Any]]:
    """A line for each label, with how often it is there and its scores."""
    thresholds = run.metrics.get("thresholds", {})
    return [
        {
            "name": name,
            "rows": count,
            "threshold": thresholds.get(name),
            **{kind: run.scores[f"{kind}/{name}"] if count else None for kind in ("precision", "recall", "f1")},
        }
        for name, count in there.items()
    ]


def _of_tags(run: Finished, rows: Sequence[Sequence[str]], shared: bool) -> dict[str, Any]:
    """Scores of each kind of entity or tag, and rows in which most is wrong."""
    pairs = [tuple(from_cell(cell).split(" ") if cell else [] for cell in row[1:3]) for row in rows]
    words = [json.loads(row[4]) for row in rows]
    if any(len(label) != len(said) for label, said in pairs):
        raise UsageError(f"{str(run.folder / PREDICTIONS)!r} is damaged: a row has not as many tags as it should have.")
    same = [one == other for label, said in pairs for one, other in zip(label, said, strict=True)]
    _check_fit(run, "accuracy", float(np.mean(same)))
    entities = is_entities(run.label_names)
    found = [tuple(set(_named(tags, entities)) for tags in pair) for pair in pairs]
    wrong = np.array([len(label ^ said) for label, said in found])
    there = Counter(kind for label, _ in found for kind, _, _ in label)
    order = [row for row in np.argsort(-wrong, kind="stable")[:_LINES].tolist() if wrong[row]]
    return {
        "labels": _scored(run, dict(sorted(there.items()))),
        "what": "entity" if entities else "tag",
        "counted": "entities" if entities else "tags",
        "wrong_rows": int((wrong > 0).sum()),
        "worst": []
        if shared
        else [
            {
                "id": pages.row_name(from_cell(rows[row][0])),
                "label": _shortened(" ".join(words[row])),
                "missed": _in_words(found[row][0] - found[row][1], words[row]),
                "added": _in_words(found[row][1] - found[row][0], words[row]),
            }
            for row in order
        ],
    }


def _of_choices(run: Finished, rows: Sequence[Sequence[str]], shared: bool) -> dict[str, Any]:
    """Scores of each place of the right choice, and rows whose wrong answer the model is surest of."""
    labels, said = ([from_cell(row[place]) for row in rows] for place in (1, 2))
    right = np.array(labels) == np.array(said)
    _check_fit(run, "accuracy", float(right.mean()))
    surest = np.array([max(map(float, row[3:])) for row in rows])
    order = [row for row in np.argsort(-surest, kind="stable").tolist() if not right[row]][:_LINES]
    return {
        "labels": _scored(run, {name: labels.count(name) for name in run.label_names}),
        "what": "choice",
        "counted": "answers",
        "wrong_rows": int((~right).sum()),
        "worst": []
        if shared
        else [
            {
                "id": pages.row_name(from_cell(rows[row][0])),
                "label": f"{surest[row]:.1%} sure",
                "missed": labels[row],
                "added": said[row],
            }
            for row in order
        ],
    }


def _of_vectors(run: Finished, rows: Sequence[Sequence[str]], shared: bool) -> dict[str, Any]:
    """Rows whose nearest other row is of another class, those first that are most like it."""
    try:
        vectors = np.array([json.loads(row[2]) for row in rows], dtype=np.float32)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{str(run.folder / PREDICTIONS)!r} is damaged: a cell is no vector.") from error
    ids, labels = ([from_cell(row[place]) for row in rows] for place in (0, 1))
    numbers = np.unique(labels, return_inverse=True)[1]
    alike, cosine, other = (np.empty(len(rows)) for _ in range(3))  # of the nearest that is alike, and that is not
    for start in range(0, len(rows), _AT_ONCE):
        part = np.arange(start, min(start + _AT_ONCE, len(rows)))
        cosines = vectors[part] @ vectors.T
        cosines[np.arange(len(part)), part] = -np.inf  # not itself
        same = numbers[part, None] == numbers
        alike[part] = np.where(same, cosines, -np.inf).max(axis=1)
        apart = np.where(same, -np.inf, cosines)
        other[part], cosine[part] = apart.argmax(axis=1), apart.max(axis=1)
    queries = np.flatnonzero(np.isfinite(alike))
    wrong = queries[cosine[queries] >= alike[queries] - _EQUAL]  # of two that are equally near the run took this one
    near = np.abs(cosine[queries] - alike[queries]) <= 2 * _EQUAL  # but for rounding
    low, most = 1 - len(wrong) / max(1, len(queries)), float(near.sum()) / max(1, len(queries))
    _check_fit(run, "recall_at_1", float(np.clip(run.scores["recall_at_1"], low - most, low + most)))
    order = wrong[np.argsort(-cosine[wrong], kind="stable")][:_LINES].tolist()
    return {
        "wrong_rows": len(wrong),
        "queries": len(queries),
        "counted": "rows",
        "worst": []
        if shared
        else [
            {
                "id": pages.row_name(ids[row]),
                "label": labels[row],
                "nearest": pages.row_name(ids[int(other[row])]),
                "other": labels[int(other[row])],
                "similarity": f"{cosine[row]:.3f}",
            }
            for row in order
        ],
    }


def _named(tags: Sequence[str], entities: bool) -> list[tuple[str, int, int]]:
    """Kind, first and last word of what tags name: of each entity, or of each word by itself."""
    return entities_of(tags) if entities else [(tag, place, place) for place, tag in enumerate(tags)]


def _in_words(named: set[tuple[str, int, int]], words: Sequence[str]) -> str:
    """What is named, in the order of the text."""
    in_order = sorted(named, key=lambda one: one[1:])
    return ", ".join(f"{' '.join(words[start : end + 1])} ({kind})" for kind, start, end in in_order) or "–"


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _check_fit(run: Finished, name: str, found: float) -> None:
    """Refuse answers that do not give the score that the run had.

    Raises:
        UsageError: as said.
    """
    before = run.scores[name]
    if not abs(found - before) <= _SAME * max(abs(before), 1e-3):
        raise UsageError(
            f"{str(run.folder / PREDICTIONS)!r} does not fit {METRICS}: its {name} is {found:.4g}, and the run had "
            f"{before:.4g}. Train again, or take both of a copy."
        )
