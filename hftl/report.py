"""report.html: one page that shows what a run did, what came out, and where the model is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hftl import charts, data, folder, merging, pages
from hftl.answers import Answers, read_answers, write_answers
from hftl.arguments import read_yaml, stage_arguments
from hftl.charts import Line
from hftl.cut import NoCut
from hftl.data import Splits
from hftl.errors import UsageError
from hftl.feature_map import draw_rows, feature_map, features_of
from hftl.folder import FOUND_IN_DATA, LOGS, PREDICTIONS, RECIPE
from hftl.inert import visible
from hftl.label_errors import likely_label_errors
from hftl.metrics import share_interval
from hftl.tasks.classification import Shown

if TYPE_CHECKING:
    from hftl.run import Run

REPORT = "report.html"
#: examples in the gallery …
_EXAMPLES = 12
#: … and how many of them with what the answer rests on, which takes some passes of the model for each
_EXPLAINED = 6
#: right answers, of as many classes
_RIGHT = 3
#: more classes than this make no readable table of all pairs: the most frequent confusions are listed
_MOST_CLASSES = 20
#: lines of other lists
_LINES = 20
#: curves of single classes
_MOST_CURVES = charts.COLOURS
_BINS = 10


def write_report(run: Run, splits: Splits | None) -> Path:
    """Write report.html into the run folder; see `render_report`."""
    path = run.folder / REPORT
    page = render_report(run, splits)
    with folder.explained_disk_errors(run.folder):
        folder.write_text(path, page)
    return path


def render_report(run: Run, splits: Splits | None, shared: bool = False) -> str:
    """The page.

    Args:
        run: a finished run.
        splits: its data, for the examples; None leaves them out.
        shared: leave out everything that is about single rows of the data, their names too.

    Raises:
        UsageError: the run has no predictions.
    """
    answers = answers_of(run)
    split = scored_split(run)
    names = run.label_names
    recipe = pages.settings(read_yaml(run.folder / RECIPE))
    known = KnownRows(run, splits)
    return pages.render(
        "report",
        title=run.folder.resolve().name,
        task=run.task.name,
        split=split,
        rows=len(answers.ids),
        at_hand=bool(known.places),
        scores=run.metrics[split],
        interval=share_interval(int(answers.correct.sum()), len(answers.ids)),
        metrics=run.metrics,
        training={"versions": {}, "hardware": "", **run.metrics["train"]},  # older runs have none
        blocks=_blocks(run.metrics["train"]["stages"]),
        curves=_training_curves(run.folder / LOGS / "log.jsonl"),
        data=found_in_data(run),
        shared=shared,
        classes=_classes(run.metrics[split], answers, names),
        confusion=_confusion(answers, names),
        reliability=_reliability(answers),
        ranking=_ranking_curves(answers, names),
        map=_map(answers, known),
        mistakes=[] if shared else _examples(answers, known, _surest_mistakes(answers)),
        right=[] if shared else _examples(answers, known, _surest_of_classes(answers)),
        explained=_EXPLAINED,
        label_errors={} if shared else _label_errors(answers, known),
        settings=recipe,
    )


def scored_split(run: Run) -> str:
    """The split whose rows are in predictions.csv."""
    return "test" if "test" in run.metrics else "validation"


def answers_of(run: Run) -> Answers:
    """What the run says of every row of that split.

    Raises:
        UsageError: as `read_answers`.
    """
    counts = found_in_data(run)["rows"].get(scored_split(run))
    return read_answers(run.folder / PREDICTIONS, run.label_names, sum(counts.values()) if counts else None)


def ensure_answers(run: Run, splits: Splits | None) -> None:
    """Make predictions.csv where it is missing and the data are at hand.

    Raises:
        UsageError: they are not what they were, or the file cannot be written.
    """
    path = run.folder / PREDICTIONS
    if path.is_file() or splits is None:
        return
    if path.exists():
        raise UsageError(f"{str(path)!r} is no file. Remove it, and `hftl report` makes it anew.")
    if not KnownRows(run, splits).places:
        raise UsageError(f"{str(run.folder)!r} has no {path.name}, and its data are not those that it was scored on.")
    split = scored_split(run)
    folder.say(f"{path.name} is missing: {len(splits.scored):,} rows are predicted")
    labels = np.asarray(splits.scored["label"][:])
    logits = run.logits(splits.scored)
    with folder.explained_disk_errors(run.folder):
        write_answers(path, run.label_names, splits, split, logits, labels)


def read_splits(run: Run) -> Splits | None:
    """The data of a finished run, read again; None where that cannot be done, which is said."""
    arguments = run.task.arguments
    if "repeats" in run.metrics:
        arguments = stage_arguments(arguments, seed=run.metrics["repeats"]["best_seed"])
    try:
        return data.load_splits(arguments, run.task.modality)
    except UsageError as error:
        folder.say(f"no examples are shown, since the data cannot be read: {error}")
        return None


class KnownRows:
    """The rows of predictions.csv in the data.

    Attributes:
        run: the finished run.
        splits: its data; None where they are not at hand, or not what they were.
        places: numbers in the split that was scored, by id as `visible` gives it; empty without the data.
    """

    def __init__(self, run: Run, splits: Splits | None) -> None:
        """Compare the data with those that the run was scored on."""
        same = splits is not None and found_in_data(run).get("scored") == splits.scored_digest
        self.run, self.splits = run, splits if same else None
        ids = [] if self.splits is None else self.splits.scored["id"][:]
        self.places = {visible(row): place for place, row in enumerate(ids)}

    def shown(self, row: str, *explained: Any) -> Shown:
        """A row as a person sees it, `explained` as for the task's own; nothing where it is not known."""
        if self.splits is None or row not in self.places:
            return Shown()
        return self.run.task.shown(self.splits.scored[self.places[row]], *explained)


def found_in_data(run: Run) -> dict[str, Any]:
    """What the run kept of its data, see `Splits.found`; older ones have nothing."""
    path = run.folder / LOGS / FOUND_IN_DATA
    if not path.is_file():
        return {"rows": {}}
    try:
        found = folder.read_json(path)
        if not isinstance(found, dict) or not isinstance(found.get("rows"), dict):
            raise ValueError("it names no rows")
    except ValueError as error:
        raise UsageError(f"{str(path)!r} is damaged ({error}). Remove it: `hftl report` does without.") from error
    return found


def _training_curves(path: Path) -> dict[str, Any]:
    """Losses and scores over the steps of all stages, one after the other."""
    nothing: tuple[list[float], list[float]] = ([], [])
    points: dict[str, tuple[list[float], list[float]]] = {}
    offset, last, stage = 0, 0, None
    for entry in _log_entries(path):
        if entry["stage"] != stage:
            offset, stage = offset + last, entry["stage"]
        last = entry["step"]
        for name in ("loss", "eval_loss", "eval_accuracy", "eval_f1_macro"):
            if name in entry and math.isfinite(entry[name]):
                xs, ys = points.setdefault(name, ([], []))
                xs.append(offset + last)
                ys.append(entry[name])
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
            ends = ", ".join(f"{line.name} {line.ys[0]:.3g} to {line.ys[-1]:.3g}" for line in filled)
            drawn[name] = charts.line_chart(filled, f"{name} over the steps of training: {ends}", "step", name)
    return drawn


def _log_entries(path: Path) -> list[dict[str, Any]]:
    """The lines of a training log; what was done again after an interruption counts once."""
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
            key = entry["stage"], entry["step"], "eval_loss" in entry
        except (ValueError, KeyError, TypeError):  # cut by a crash, or of another program
            continue
        kept.setdefault(key, entry)  # the same, bit for bit
    return list(kept.values())


def _blocks(stages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each block its parameters, and how many of them each stage trained."""
    counted = [stage["blocks"] for stage in stages if "blocks" in stage]
    if len(counted) < len(stages):
        return []
    return [
        {"name": same[0]["name"], "total": same[0]["total"], "trainable": [block["trainable"] for block in same]}
        for same in zip(*counted, strict=True)
    ]


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
    from sklearn import metrics

    counts = np.bincount(answers.labels, minlength=len(names))
    numbers = [1] if len(names) == 2 else range(len(names))
    occurring = [number for number in numbers if 0 < counts[number] < len(answers.labels)]
    frequent = np.argsort(-counts, kind="stable")[:_MOST_CLASSES]
    there = [number for number in occurring if number in frequent]
    if not there:
        return {}
    roc, precision, table = [], [], []
    for colour, number in enumerate(there, start=1):
        truth, values = answers.labels == number, answers.probabilities[:, number]
        areas = metrics.roc_auc_score(truth, values), metrics.average_precision_score(truth, values)
        table.append({"name": names[number], "roc_auc": areas[0], "average_precision": areas[1]})
        if colour <= _MOST_CURVES:
            false, true, _ = metrics.roc_curve(truth, values)
            roc.append(Line(names[number], false, true, colour))
            exact, hit, _ = metrics.precision_recall_curve(truth, values, drop_intermediate=True)
            precision.append(Line(names[number], hit[::-1], exact[::-1], colour))
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


def _surest_mistakes(answers: Answers) -> list[int]:
    """Rows of the wrong answers of which the model is surest."""
    return answers.surest(np.flatnonzero(~answers.correct))[:_EXAMPLES].tolist()


def _surest_of_classes(answers: Answers) -> list[int]:
    """Of the classes with most right answers the row of which the model is surest."""
    order = answers.surest(np.flatnonzero(answers.correct))
    _, first, counts = np.unique(answers.labels[order], return_index=True, return_counts=True)
    return order[first[np.argsort(-counts, kind="stable")]][:_RIGHT].tolist()


def _examples(answers: Answers, known: KnownRows, order: list[int]) -> list[dict[str, Any]]:
    """Rows with what the model saw, and what its answers to the first of them rest on."""
    run = known.run
    model = run.model if known.places and order and run.is_explainable else None
    return [
        {
            "id": pages.row_name(answers.ids[row]),
            "label": run.label_names[answers.labels[row]],
            "prediction": run.label_names[answers.predictions[row]],
            "probability": float(answers.probabilities[row].max()),
            "shown": known.shown(
                answers.ids[row], model if place < _EXPLAINED else None, int(answers.predictions[row])
            ),
        }
        for place, row in enumerate(order)
    ]


def _map(answers: Answers, known: KnownRows) -> dict[str, Any]:
    """Where the features put some of the rows; nothing where the data are not there, or few bits are for inference."""
    run, places = known.run, known.places
    if known.splits is None or len(places) < 2 or merging.is_quantised(run.model):
        return {}
    there = np.array([number for number, row in enumerate(answers.ids) if row in places])
    chosen = there[draw_rows(len(there))]
    labels = answers.labels[chosen]
    try:
        features = features_of(run, known.splits, np.array([places[answers.ids[number]] for number in chosen]))
    except NoCut:  # the head reads more than one vector a row
        return {}
    found = feature_map(features, labels)
    about = f"Rows by the two directions of most variance; {found.pure:.0%} have one of their own class as the nearest"
    chart = charts.map_chart(found.points, labels, ~answers.correct[chosen], run.label_names, about)
    return {"rows": len(chosen), "explained": found.explained, "pure": found.pure, "chart": chart}


def _label_errors(answers: Answers, known: KnownRows) -> dict[str, Any]:
    """Rows of the split whose label is likely wrong, the first of them with what they hold."""
    names = known.run.label_names
    found, rather = likely_label_errors(answers.probabilities, answers.labels)
    lines = [
        {
            "shown": known.shown(answers.ids[row]) if number < _EXAMPLES else Shown(),
            "id": pages.row_name(answers.ids[row]),
            "label": names[answers.labels[row]],
            "rather": names[other],
            "own": float(answers.probabilities[row, answers.labels[row]]),
            "other": float(answers.probabilities[row, other]),
        }
        for number, (row, other) in enumerate(zip(found[:_LINES].tolist(), rather.tolist(), strict=False))
    ]
    return {"count": len(found), "lines": lines}
