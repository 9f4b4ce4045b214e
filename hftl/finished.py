"""What lies in the folder of a finished run, without its model."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from packaging.version import Version

from hftl import __version__
from hftl.answers import Answers, read_answers
from hftl.errors import UsageError
from hftl.folder import FOUND_IN_DATA, LOGS, METRICS, PREDICTIONS, RECIPE, REPLACED, read_json, scored_split
from hftl.problems import PROBLEMS, SingleLabel
from hftl.yaml_files import read_yaml

#: a score of each kind of problem
_ALWAYS_THERE = ("accuracy", "subset_accuracy", "rmse", "recall_at_1")
#: of an accuracy that is computed anew in another precision, or on another machine
_SAME = 0.01


def require_one_of_several(problem_type: str, what: str) -> None:
    """Refuse a command that is made for rows of one class each.

    Raises:
        UsageError: as said.
    """
    if problem_type != SingleLabel.name:
        raise UsageError(f"{what}: this is for rows of one class each, and not yet for {PROBLEMS[problem_type].words}.")


class Finished:
    """The files of a finished run: what a report or a comparison needs, in a moment and without torch.

    Attributes:
        folder: of the run.
        task_name: of what it was trained for.
        label_names: of the classes, by class id.
    """

    def __init__(self, folder: Path, task_name: str, label_names: list[str]) -> None:
        """Keep what is known; the files are read when they are needed."""
        self.folder, self.task_name, self.label_names = folder, task_name, label_names

    @functools.cached_property
    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json."""
        return _read_metrics(self.folder)

    @functools.cached_property
    def recipe(self) -> dict[str, Any]:
        """The content of recipe.yaml."""
        return read_yaml(self.folder / RECIPE)

    @property
    def is_one_of_several(self) -> bool:
        """Whether a row has one class."""
        return self.recipe.get("problem_type", SingleLabel.name) == SingleLabel.name

    def require_one_of_several(self, what: str) -> None:
        """As the function of that name."""
        require_one_of_several(self.recipe.get("problem_type", SingleLabel.name), what)

    @property
    def scored_split(self) -> str:
        """The split whose rows are in predictions.csv."""
        return scored_split(self.metrics)

    @functools.cached_property
    def found_in_data(self) -> dict[str, Any]:
        """What the run kept of its data, see `Splits.found`; older ones have nothing.

        Raises:
            UsageError: it is damaged.
        """
        path = self.folder / LOGS / FOUND_IN_DATA
        if not path.is_file():
            return {"rows": {}}
        try:
            found = read_json(path)
            _check_found(found)
        except ValueError as error:
            raise UsageError(f"{str(path)!r} is damaged ({error}). Remove it: `hftl report` does without.") from error
        return found

    @property
    def scores(self) -> dict[str, float]:
        """Those of `scored_split`."""
        return self.metrics[self.scored_split]

    @functools.cached_property
    def answers(self) -> Answers:
        """What the run says of every row of `scored_split`.

        Raises:
            UsageError: as `read_answers`, or they are not what metrics.json has the scores of.
        """
        with explained_damage(self.folder):
            return self._read_answers()

    def _read_answers(self) -> Answers:
        counts = self.found_in_data["rows"].get(self.scored_split)
        path = self.folder / PREDICTIONS
        answers = read_answers(path, self.label_names, counts)
        scored = {"accuracy": (answers.correct, self.scores["accuracy"])}
        for number, name in enumerate(self.label_names):
            if (own := answers.labels == number).any() and f"recall/{name}" in self.scores:
                scored[f"recall of {name!r}"] = (answers.correct[own], self.scores[f"recall/{name}"])
        for what, (right, before) in scored.items():
            if not is_near(float(right.mean()), before, len(right)):
                raise UsageError(
                    f"{str(path)!r} does not fit {METRICS}: its {what} is {float(right.mean()):.4f}, and the run had "
                    f"{before:.4f}. Remove it, and `hftl report` makes it anew, where the run's data are at hand."
                )
        return answers

    @property
    def deviation(self) -> float:
        """By how much the accuracy of predictions.csv differs from that of the scores: it may have been made anew."""
        return round(float(self.answers.correct.mean()) - self.scores["accuracy"], 6)


def _check_found(found: Any) -> None:
    """Refuse what is no content of data.json.

    Raises:
        ValueError: as said.
    """
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, dict) or not all(isinstance(counts, dict) for counts in rows.values()):
        raise ValueError("it names no rows")
    if not all(type(count) is int and count >= 0 for counts in rows.values() for count in counts.values()):
        raise ValueError("a number of rows is none")
    if not isinstance(found.get("scored"), str | None):
        raise ValueError("it does not say which rows were scored")
    if not isinstance(found.get("notes"), list):
        raise ValueError("it has no notes")


def is_near(accuracy: float, before: float, rows: int) -> bool:
    """Whether an accuracy may be the same, computed anew in another precision or on another machine."""
    return abs(accuracy - before) <= max(_SAME, 2 / rows)


@contextlib.contextmanager
def explained_damage(folder: str | Path) -> Iterator[None]:
    """Say of a run whose files hold other things than they should that it is damaged.

    Raises:
        UsageError: as said.
    """
    try:
        yield
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        TemplateError,
    ) as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UsageError(
            f"The run in {str(folder)!r} is damaged: its files hold other things than a run's ({what})."
        ) from error


def find_run(folder: str | Path) -> Finished:
    """A finished run by its folder.

    Raises:
        UsageError: the folder holds no finished run, or one of a newer hftl.
    """
    path = Path(os.path.expanduser(folder))
    try:
        with explained_damage(path):
            return _find_run(path)
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error.strerror}.") from error


def _find_run(path: Path) -> Finished:
    for name in (METRICS, RECIPE, "config.json"):
        if not (path / name).is_file():
            state = f"has no {name}" if path.is_dir() else "does not exist"
            if (path / REPLACED).is_dir():
                state += f"; the run that was to be replaced lies in its folder {REPLACED}"
            raise UsageError(f"{str(path)!r} is no finished run: the folder {state}.")
    _check_version(path)
    recipe = read_yaml(path / RECIPE)
    found = Finished(path, str(recipe.get("task")), _label_names(path))
    found.recipe = recipe  # a hundred lines, read once
    return found


def _label_names(folder: Path) -> list[str]:
    """The names of the classes of a run, by class id."""
    try:
        config = read_json(folder / "config.json")
    except ValueError as error:
        raise UsageError(f"The run in {str(folder)!r} is damaged: its config.json is no JSON ({error}).") from error
    try:
        labels = config.get("label_names") or [
            name for _, name in sorted(config["id2label"].items(), key=lambda item: int(item[0]))
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"The run in {str(folder)!r} is damaged: its config.json names no classes.") from error
    return [str(name) for name in labels]


def _read_metrics(folder: Path) -> dict[str, Any]:
    try:
        metrics = read_json(folder / METRICS)
    except ValueError as error:
        raise UsageError(f"The run in {str(folder)!r} is damaged: its {METRICS} is no JSON ({error}).") from error
    missing = [name for name in ("train", "validation") if not isinstance(metrics, dict) or name not in metrics]
    if missing:
        raise UsageError(f"The run in {str(folder)!r} is damaged: its {METRICS} has no {missing[0]!r}.")
    scores = metrics[scored_split(metrics)]
    if not isinstance(scores, dict) or not any(isinstance(scores.get(name), int | float) for name in _ALWAYS_THERE):
        raise UsageError(f"The run in {str(folder)!r} is damaged: its {METRICS} has no scores.")
    if "repeats" in metrics and type(metrics["repeats"]["best_seed"]) is not int:
        raise UsageError(f"The run in {str(folder)!r} is damaged: in its {METRICS} the best seed is no number.")
    return metrics


def _check_version(folder: Path) -> None:
    """Refuse a run of a newer hftl, whose files may mean something else."""
    made = str(_read_metrics(folder)["train"].get("versions", {}).get("hftl", __version__))
    if Version(made).release[:2] > Version(__version__).release[:2]:
        raise UsageError(
            f"{str(folder)!r} was made by hftl {made}, and this is {__version__}: pip install --upgrade hftl."
        )
