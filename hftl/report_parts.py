"""What the reports of all kinds of runs show alike: the training."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hftl import charts, pages
from hftl.charts import Line
from hftl.finished import Finished
from hftl.folder import LOGS

#: that a number of the log can be
_LARGEST = 1e100


def common_values(run: Finished, shared: bool, scores: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """What every template of a report takes.

    Args:
        run: a finished run.
        shared: leave out everything that is about single rows of the data, their names too.
        scores: those of validation to draw over the steps, and what they are called.
    """
    train = {"versions": {}, "hardware": "", **run.metrics["train"]}  # older runs have none
    return {
        "title": run.folder.resolve().name,
        "task": run.task_name,
        "split": run.scored_split,
        "scores": run.scores,
        "metrics": run.metrics,
        "training": train,
        "blocks": trained_blocks(train["stages"]),
        "curves": training_curves(run.folder / LOGS / "log.jsonl", scores),
        "data": run.found_in_data,
        "shared": shared,
        "settings": pages.settings(run.recipe),
    }


def training_curves(path: Path, scores: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Losses and scores over the steps of all stages, one after the other.

    Args:
        path: of the training log.
        scores: which to draw in one chart, and what they are called.
    """
    nothing: tuple[list[float], list[float]] = ([], [])
    points: dict[str, tuple[list[float], list[float]]] = {}
    offset, last, stage = 0, 0, None
    names = [f"eval_{name}" for name, _ in scores]
    entries = _log_entries(path, ["eval_loss", *names])
    order = list(dict.fromkeys(entry["stage"] for entry in entries))
    entries.sort(key=lambda entry: order.index(entry["stage"]))  # trainings side by side write in turns
    evaluated = {entry["stage"] for entry in entries if "eval_loss" in entry}
    for entry in entries:
        if evaluated and entry["stage"] not in evaluated:  # whose loss is another one, such as that of pairs
            continue
        if entry["stage"] != stage:
            offset, stage = offset + last, entry["stage"]
        last = entry["step"]
        for name in ("loss", "eval_loss", *names):
            if name in entry and math.isfinite(entry[name]):
                xs, ys = points.setdefault(name, ([], []))
                xs.append(offset + last)
                ys.append(entry[name])
    wanted = {
        "loss": [
            Line("training", *points.get("loss", nothing)),
            Line("validation", *points.get("eval_loss", nothing), 2, marked=True),
        ],
        f"{scores[0][1] if len(scores) == 1 else 'score'} on validation": [
            Line(words, *points.get(name, nothing), 3 + number, dashed=bool(number), marked=True)
            for number, (name, (_, words)) in enumerate(zip(names, scores, strict=True))
        ],
    }
    drawn = {}
    for name, lines in wanted.items():
        filled = [line for line in lines if line.xs]
        if any(len(line.xs) > 1 for line in filled):
            ends = ", ".join(f"{line.name} {line.ys[0]:.3g} to {line.ys[-1]:.3g}" for line in filled)
            drawn[name] = charts.line_chart(filled, f"{name} over the steps of training: {ends}", "step", name)
    return drawn


def _log_entries(path: Path, scores: Sequence[str]) -> list[dict[str, Any]]:
    """The lines of a training log; what was done again after an interruption counts once."""
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
            key = entry["stage"], entry["step"], "eval_loss" in entry
            numbers = [entry.get(name, 0) for name in ("step", "loss", *scores)]
            if not isinstance(entry["stage"], str) or not all(abs(value) < _LARGEST for value in numbers):
                continue
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
        ):  # cut by a crash, or of another program
            continue
        kept.setdefault(key, entry)  # the same, bit for bit
    return list(kept.values())


def trained_blocks(stages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each block its parameters, and how many of them each stage trained."""
    counted = [stage["blocks"] for stage in stages if "blocks" in stage]
    if len(counted) < len(stages):
        return []
    return [
        {"name": same[0]["name"], "total": same[0]["total"], "trainable": [block["trainable"] for block in same]}
        for same in zip(*counted, strict=True)
    ]
