"""`--repeats r`: the same run with r seeds, for a score with an interval rather than the luck of one draw.

Every seed draws its own rows (`--shots`, validation), head and order. What each scored stays in `RUN/repeats/SEED`; the
run folder holds the model of the seed that validation likes best; test is not asked which that is.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from hftl import folder
from hftl.arguments import TransferArguments, stage_arguments
from hftl.compute import wait_for_all
from hftl.data import Splits
from hftl.errors import UsageError
from hftl.folder import CHECKPOINTS, LOGS, METRICS, PREDICTIONS, RECIPE, read_json, say
from hftl.methods import Plan, build_plan
from hftl.tasks.classification import ClassificationTask
from hftl.training import check_plan, train_plan
from hftl.yaml_files import read_yaml

REPEATS = "repeats"
#: what stays of each repeat; the weights of the best are in the run folder
_KEPT = {METRICS, PREDICTIONS, RECIPE, LOGS, CHECKPOINTS}


def repeat(task: ClassificationTask, plan: Plan, splits: Splits, arguments: TransferArguments) -> None:
    """Train with every seed; the best run on validation stands in the run folder.

    The first seed takes the plan and the splits as given. For the others they are made as a recipe does: by the task's
    `load_splits` and `build_model`, and by `--method`.

    Raises:
        UsageError: as a single run.
    """
    settings = folder.settings_with_data(arguments, splits.fingerprint())
    path = Path(str(arguments.output_dir))
    seeds = range(arguments.seed, arguments.seed + arguments.repeats)
    check_plan(plan, arguments)
    _as_one(folder.start_folder, arguments, settings)
    try:
        for number, seed in enumerate(seeds, start=1):
            say(f"\nrepeat {number} of {len(seeds)}: seed {seed}")
            place = path / REPEATS / str(seed)
            _run_seed(task, plan, splits, arguments, place)
            metric, larger = task.best_metric(splits)
            _as_one(_keep_best, path, place, metric, 1 if larger else -1)
    except UsageError:
        if not (path / METRICS).is_file():  # not even the first seed
            folder.discard_first(path, REPEATS)
        raise
    task.arguments = arguments
    _as_one(_finish, path, arguments, seeds)


def _as_one(work: Callable[..., Any], *arguments: Any) -> None:
    """What one process does with files while the others wait."""
    wait_for_all()
    if folder.is_main_process():
        work(*arguments)
    wait_for_all()


def _run_seed(task: ClassificationTask, plan: Plan, splits: Splits, arguments: TransferArguments, place: Path) -> None:
    """Train with the seed that names the folder, unless an interrupted run has done so."""
    interrupted = (place / CHECKPOINTS / RECIPE).is_file()
    if (place / METRICS).is_file() and not interrupted:
        return
    seed = int(place.name)
    own = stage_arguments(arguments, seed=seed, repeats=1, output_dir=str(place), overwrite=False, resume=interrupted)
    if seed != arguments.seed:
        task.arguments = own
        splits = task.load_splits()
        plan = build_plan(task.build_model(splits), own)
    train_plan(task, plan, splits, own)


def _keep_best(path: Path, place: Path, metric: str, sign: int) -> None:
    """Put a finished repeat into the run folder if it is the best so far; of the others the scores are kept."""
    if not (place / "config.json").is_file():
        return  # done before an interruption
    if not (path / METRICS).is_file() or _key(place, metric, sign) > _key(path, metric, sign):
        folder.promote(place, path)
    for entry in place.iterdir():
        if entry.name not in _KEPT:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _key(place: Path, metric: str, sign: int) -> tuple[float, float]:
    """What the best has most of: the metric on validation, among equal ones the lower loss."""
    scores = read_json(place / METRICS)["validation"]
    return sign * scores[metric], -scores["loss"]


def _finish(path: Path, arguments: TransferArguments, seeds: range) -> None:
    """Add mean and interval to the scores; the recipe repeats all seeds."""
    every = [read_json(path / REPEATS / str(seed) / METRICS) for seed in seeds]
    recipe = read_yaml(path / RECIPE)
    metrics = read_json(path / METRICS)
    metrics["repeats"] = {
        "seeds": list(seeds),
        "best_seed": metrics.get("repeats", recipe).get(
            "best_seed", recipe["seed"]
        ),  # there after an interruption here
        **{split: summarise([run[split] for run in every]) for split in ("validation", "test") if split in metrics},
    }
    recipe |= {"seed": arguments.seed, "repeats": arguments.repeats}
    folder.write_json(path / METRICS, metrics)
    folder.write_text(path / RECIPE, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))


def summarise(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Of every score that all runs have (those of single classes left out): mean, interval and values.

    The interval of 95 % is that of Student's t for the mean of a few values: mean ± `half_width_95`.
    """
    from scipy.stats import t

    names = [name for name in runs[0] if "/" not in name and all(name in scores for scores in runs)]
    summary = {}
    for name in names:
        values = [scores[name] for scores in runs]
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
        half_width = float(t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))
        summary[name] = {"mean": mean, "half_width_95": half_width, "values": values}
    return summary
