"""report.html: one page that shows what a run did, what came out, and where the model is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hftl import charts, data, folder, pages
from hftl.answers import Answers, read_answers
from hftl.arguments import read_yaml
from hftl.charts import Line
from hftl.errors import UsageError
from hftl.folder import FOUND_IN_DATA, LOGS, PREDICTIONS, RECIPE
from hftl.label_errors import likely_label_errors
from hftl.pretrained import public_name
from hftl.run import Run, load_run
from hftl.tasks.classification import Shown

REPORT = "report.html"
#: examples in a gallery
_EXAMPLES = 12
#: more classes than this make no readable table of all pairs: the most frequent confusions are listed
_MOST_CLASSES = 20
#: curves of single classes
_MOST_CURVES = charts.COLOURS
_CONFUSIONS = 20
_BINS = 10
#: of them with what the answer rests on: some passes of the model for each
_EXPLAINED = 6


def write_report(run: Run, rows: Any = None) -> Path:
    """Write report.html into the run folder.

    Args:
        run: a finished run.
        rows: the split that predictions.csv is of, for the examples; None leaves them out.

    Raises:
        UsageError: the run has no predictions.
    """
    answers = read_answers(run.folder / PREDICTIONS, run.label_names)
    split = "test" if "test" in run.metrics else "validation"
    names = run.label_names
    recipe = read_yaml(run.folder / RECIPE)
    found = run.folder / LOGS / FOUND_IN_DATA
    found_in_data = folder.read_json(found) if found.is_file() else {}
    page = pages.render(
        "report",
        title=run.folder.resolve().name,
        task=run.task.name,
        model=public_name(str(recipe["model_name_or_path"])),
        dataset=public_name(str(recipe["dataset_name"])),
        method=recipe["method"],
        split=split,
        rows=len(answers.ids),
        scores=run.metrics[split],
        interval=wilson(int(answers.correct.sum()), len(answers.ids)),
        metrics=run.metrics,
        training=run.metrics["train"],
        blocks=_blocks(run.metrics["train"]["stages"]),
        data=found_in_data,
        curves=_training_curves(run.folder / LOGS / "log.jsonl"),
        classes=_classes(run, answers, split, found_in_data),
        confusion=_confusion(answers, names),
        reliability=_reliability(answers),
        ranking=_ranking_curves(answers, names),
        mistakes=_mistakes(run, answers, rows),
        label_errors=_label_errors(answers, names),
        has_rows=rows is not None,
        settings=pages.settings(recipe),
    )
    path = run.folder / REPORT
    with folder.explained_disk_errors(run.folder):
        folder.write_text(path, page)
    return path


def remake_report(path: Path) -> Path:
    """report.html of a finished run, whose data are read again for the examples.

    Raises:
        UsageError: there is no finished run, or it has no predictions.
    """
    run = load_run(path)
    try:
        splits = data.load_splits(run.task.arguments, run.task.modality)
        rows = splits.validation if splits.test is None else splits.test
    except UsageError as error:
        folder.say(f"the report has no examples, since its data cannot be read: {error}")
        rows = None
    return write_report(run, rows)


def wilson(hits: int, rows: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927): unlike the usual one it stays between 0 and 1."""
    z = 1.959964
    share = hits / rows
    centre = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return centre - half, centre + half


def _training_curves(path: Path) -> dict[str, Any]:
    """Losses and scores over the steps of all stages, one after the other."""
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    points: dict[str, tuple[list[float], list[float]]] = {}
    offset, last, stage = 0, 0, None
    for entry in entries:
        if entry["stage"] != stage:
            offset, stage = offset + last, entry["stage"]
        last = entry["step"]
        for name in ("loss", "eval_loss", "eval_accuracy", "eval_f1_macro"):
            if name in entry and math.isfinite(entry[name]):
                xs, ys = points.setdefault(name, ([], []))
                xs.append(offset + last)
                ys.append(entry[name])
    nothing: tuple[list[float], list[float]] = ([], [])
    wanted = {
        "loss": [
            Line("training", *points.get("loss", nothing)),
            Line("validation", *points.get("eval_loss", nothing), 2, marked=True),
        ],
        "score on validation": [
            Line("accuracy", *points.get("eval_accuracy", nothing), 3, marked=True),
            Line("macro F1", *points.get("eval_f1_macro", nothing), 4, dashed=True, marked=True),
        ],
    }
    drawn = {}
    for name, lines in wanted.items():
        filled = [line for line in lines if line.xs]
        if any(len(line.xs) > 1 for line in filled):
            drawn[name] = charts.line_chart(filled, f"{name} over the steps of training", "step", name)
    return drawn


def _blocks(stages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each block its parameters, and how many of them each stage trained."""
    counted = [stage["blocks"] for stage in stages if "blocks" in stage]
    if len(counted) < len(stages):
        return []
    return [
        {"name": same[0]["name"], "total": same[0]["total"], "trainable": [block["trainable"] for block in same]}
        for same in zip(*counted, strict=True)
    ]


def _classes(run: Run, answers: Answers, split: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each class."""
    scores = run.metrics[split]
    trained = found.get("rows", {}).get("train", {})
    there = np.bincount(answers.labels, minlength=len(run.label_names))
    return [
        {
            "name": name,
            "train": trained.get(name),
            "rows": int(there[number]),
            **{score: scores.get(f"{score}/{name}") for score in ("precision", "recall", "f1")},
        }
        for number, name in enumerate(run.label_names)
    ]


def _confusion(answers: Answers, names: Sequence[str]) -> dict[str, Any]:
    """Every pair of classes where they are few, else the most frequent confusions."""
    counts = np.zeros((len(names), len(names)), int)
    np.add.at(counts, (answers.labels, answers.predictions), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    wrong = counts * (1 - np.eye(len(names), dtype=int))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_CONFUSIONS]
    pairs = [divmod(int(number), len(names)) for number in order]
    return {
        "table": len(names) <= _MOST_CLASSES,
        "names": names,
        "counts": counts.tolist(),
        "shares": shares.tolist(),
        "pairs": [
            {
                "label": names[row],
                "prediction": names[column],
                "count": int(wrong[row, column]),
                "share": shares[row, column],
            }
            for row, column in pairs
            if wrong[row, column]
        ],
    }


def _reliability(answers: Answers) -> Any:
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
    chart = charts.line_chart(
        lines,
        "Accuracy over confidence; a calibrated model lies on the diagonal",
        "confidence",
        "accuracy",
        (0, 1),
        (0, 1),
    )
    counts = [
        {"from": number / _BINS, "to": (number + 1) / _BINS, "rows": int((bins == number).sum()), "accuracy": accuracy}
        for number, accuracy in zip(filled, accuracies, strict=True)
    ]
    return {"chart": chart, "bins": counts}


def _ranking_curves(answers: Answers, names: Sequence[str]) -> dict[str, Any]:
    """ROC and precision-recall curves: of the second of two classes, else of each against the rest."""
    from sklearn import metrics

    numbers = [1] if len(names) == 2 else list(range(len(names)))
    there = [number for number in numbers if 0 < (answers.labels == number).sum() < len(answers.labels)]
    roc, precision, table = [], [], []
    for colour, number in enumerate(there, start=1):
        truth, values = answers.labels == number, answers.probabilities[:, number]
        area = {
            "roc_auc": metrics.roc_auc_score(truth, values),
            "average_precision": metrics.average_precision_score(truth, values),
        }
        table.append({"name": names[number], **area})
        if colour <= _MOST_CURVES:
            false, true, _ = metrics.roc_curve(truth, values)
            roc.append(Line(names[number], false, true, colour))
            exact, found, _ = metrics.precision_recall_curve(truth, values)
            precision.append(Line(names[number], found[::-1], exact[::-1], colour))
    if not there:
        return {}
    chance = Line("", (0, 1), (0, 1), 0, dashed=True)
    unit = {"x_range": (0, 1), "y_range": (0, 1)}
    return {
        "roc": charts.line_chart([chance, *roc], "ROC curves", "false positive rate", "true positive rate", **unit),
        "precision": charts.line_chart(precision, "Precision-recall curves", "recall", "precision", **unit),
        "table": table,
        "shown": len(roc),
    }


def _mistakes(run: Run, answers: Answers, rows: Any) -> list[dict[str, Any]]:
    """The wrong answers of which the model is surest, with what it saw."""
    wrong = np.flatnonzero(~answers.correct)
    order = wrong[np.argsort(-answers.probabilities[wrong].max(axis=1), kind="stable")][:_EXAMPLES]
    places = {} if rows is None else {row_id: number for number, row_id in enumerate(rows["id"])}
    names = run.label_names
    examples: list[dict[str, Any]] = []
    for number in order:
        row = rows[places[answers.ids[number]]] if answers.ids[number] in places else {}
        examples.append(
            {
                "id": Path(answers.ids[number]).name,
                "label": names[answers.labels[number]],
                "prediction": names[answers.predictions[number]],
                "probability": float(answers.probabilities[number].max()),
                "shown": _shown(run, row, answers.predictions[number], explained=len(examples) < _EXPLAINED),
            }
        )
    return examples


def _shown(run: Run, row: Any, label: Any, explained: bool) -> Shown:
    """The row, and what its answer rests on, where the model's own head gave it."""
    if not row:
        return Shown()
    return run.task.shown(row, run.model if explained and run.probe is None else None, int(label))


def _label_errors(answers: Answers, names: Sequence[str]) -> dict[str, Any]:
    """Rows of the split whose label is likely wrong."""
    found = likely_label_errors(answers.probabilities, answers.labels)
    return {
        "count": len(found),
        "rows": [
            {
                "id": Path(answers.ids[number]).name,
                "label": names[answers.labels[number]],
                "suggestion": names[answers.predictions[number]],
                "own": float(answers.probabilities[number, answers.labels[number]]),
                "other": float(answers.probabilities[number].max()),
            }
            for number in found[:_CONFUSIONS]
        ],
    }
