"""A search for settings with Optuna: `hftl tune`.

Every trial is a run of its own on train and validation; those that fall behind are stopped after an evaluation. The
best so far stands in the output folder, beside the study (SQLite), and is scored on test once, at the end. The same
command goes on with an interrupted search, and with the trial in whose midst it stopped.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from hftl import data, folder, pretrained
from hftl.arguments import TransferArguments, flag_names, parse, stage_arguments
from hftl.data import Splits
from hftl.errors import DiskError, Diverged, UsageError, did_you_mean
from hftl.fitting import conclude, score_on_test
from hftl.folder import CHECKPOINTS, METRICS, RECIPE, read_json, say
from hftl.methods import METHOD_ARGUMENTS, arguments_of, build_plan, check_method, find_method
from hftl.metrics import written
from hftl.problems import problem_of
from hftl.run import Run
from hftl.tables import aligned, as_csv
from hftl.tasks import find_task
from hftl.training import train_plan

#: the study, the table, and the runs of trials, in the output folder
STUDY, TABLE, TRIALS = "tune.db", "trials.csv", "trials"
#: what says which rows are compared by which score, and where: the same for all trials
_FIXED = {
    "task", "dataset_name", "dataset_config_name", "train_split", "validation_split", "test_split", "label_column",
    "text_column", "text_pair_column", "image_column", "validation_fraction", "max_train_samples", "max_eval_samples",
    "problem_type", "label_separator", "label_columns",
    "skip_bad_files", "shots", "repeats", "seed", "metric_for_best_model", "greater_is_better", "metrics",
    "output_dir", "resume", "overwrite", "time_budget", "preset", "push_to_hub",
}  # fmt: skip
_RANGE = re.compile(r"(log|uniform|int)\(\s*([^,()\s]+)\s*,\s*([^,()\s]+)\s*\)")
_CALL, _VALUE = r"\w+\([^()]*\)", r"(?:'[^']*'|[^\s',]*)"
_SETTING = re.compile(rf"\s*([^=\s]+)=({_CALL}|{_VALUE}(?:,{_VALUE})*)(?=\s|$)")
#: an entry of a list by which its flag is not given
_NOT_GIVEN = "default"


@dataclass(frozen=True)
class Dimension:
    """A flag that is searched.

    Attributes:
        name: of the argument.
        kind: log, uniform, int or list.
        values: both ends of a range, or the entries of a list.
    """

    name: str
    kind: str
    values: tuple[str, ...]

    def suggest(self, trial: Any) -> str:
        """The value for a trial, as on the command line, or `default`."""
        if self.kind == "list":
            return trial.suggest_categorical(self.name, list(self.values))
        if self.kind == "int":
            return str(trial.suggest_int(self.name, *map(int, self.values)))
        # Three digits: what a person would write, and no run differs by more of them.
        return f"{trial.suggest_float(self.name, *map(float, self.values), log=self.kind == 'log'):.3g}"


def read_space(text: str, names: dict[str, str]) -> list[Dimension]:
    """The searched flags of `learning_rate=log(1e-5,1e-3) method=lora,partial`; the method comes first.

    Args:
        text: `log(a,b)`, `uniform(a,b)`, `int(a,b)` or a list of values for each flag; a value with commas or blanks
            stands in single quotes, and `default` leaves the flag out.
        names: every name of a flag → the argument's.

    Raises:
        UsageError: an unknown flag, one that all trials must share, or a range that is none.
    """
    found, position = [], 0
    while match := _SETTING.match(text, position):
        found.append(_dimension(match[1].lstrip("-").replace("-", "_"), match[2], names))
        position = match.end()
    if text[position:].strip() or not found:
        raise UsageError(
            f"--search {text!r} cannot be read{f' at {text[position:].strip()!r}' if found else ''}: write "
            "'learning_rate=log(1e-5,1e-3) method=lora,partial'; a value with commas, blanks or brackets stands in "
            "single quotes."
        )
    twice = {entry.name for entry in found if [other.name for other in found].count(entry.name) > 1}
    if twice:
        raise UsageError(f"--search names {min(twice)} more than once.")
    return sorted(found, key=lambda entry: entry.name != "method")


def _dimension(name: str, values: str, names: dict[str, str]) -> Dimension:
    if name not in names:
        raise UsageError(f"--search: there is no flag --{name}.{did_you_mean(name, names)}")
    name = names[name]
    if name in _FIXED:
        raise UsageError(f"--search: {name} must be the same in all trials, or their scores would not compare.")
    if not re.fullmatch(_CALL, values):
        listed = tuple(quoted or bare for quoted, bare in re.findall(r"'([^']*)'|([^',]+)", values) if quoted or bare)
        if not listed:
            raise UsageError(f"--search {name}={values}: the list is empty.")
        if _NOT_GIVEN in listed and name in ("method", "model_name_or_path"):
            raise UsageError(f"--search {name}={values}: it cannot be left out: name what stands for {_NOT_GIVEN}.")
        return Dimension(name, "list", listed)
    match = _RANGE.fullmatch(values)
    if not match:
        kinds = ("log", "uniform", "int")
        kind = values.partition("(")[0]
        near = "" if kind in kinds else did_you_mean(kind, kinds)
        raise UsageError(f"--search {name}={values}: a range is log(a,b), uniform(a,b) or int(a,b).{near}")
    kind = match[1]
    try:
        ends = [(int if kind == "int" else float)(end) for end in match.groups()[1:]]
    except ValueError as error:
        raise UsageError(f"--search {name}={values}: {error}.") from error
    if not ends[0] < ends[1] or (kind == "log" and ends[0] <= 0):
        raise UsageError(f"--search {name}={values}: the first end must be below the second, for log above 0 too.")
    return Dimension(name, kind, match.groups()[1:])


class _Pruning(TrainerCallback):
    """Tells the study each evaluation, and stops a trial that falls behind."""

    def __init__(self, trial: Any, metric: str) -> None:
        self.trial, self.metric = trial, f"eval_{metric}"
        self.evaluations = self.before = 0
        for self.evaluations, value in trial.user_attrs.get("reported", ()):  # before an interruption
            trial.report(value, self.evaluations)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        starts = self.trial.user_attrs.get("starts", {})  # of its stages: one that was interrupted began where it did
        self.before = starts.setdefault(Path(args.output_dir).name, self.evaluations)
        self.trial.set_user_attr("starts", starts)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        import optuna

        self.evaluations = self.before + round(1000 * (state.epoch or 0.0))  # Optuna's steps are whole numbers
        self.trial.report(metrics[self.metric], self.evaluations)
        if self.trial.should_prune():
            raise optuna.TrialPruned


class Search:
    """A study and the runs of its trials."""

    def __init__(self, task_name: str, tokens: Sequence[str], space: str, trials: int) -> None:
        """Check everything that needs no data, and open the study, or the one of an interrupted search.

        Raises:
            UsageError: bad input.
        """
        if importlib.util.find_spec("optuna") is None:
            raise UsageError('hftl tune needs Optuna: pip install "hftl[tune]".')
        self.task_class, self.tokens, self.trials = find_task(task_name), list(tokens), trials
        self.arguments = parse(self.task_class.arguments_class, tokens)
        self.space = read_space(space, flag_names(self.task_class.arguments_class))
        _check(self.arguments, self.space)
        if "method" not in {dimension.name for dimension in self.space}:  # the default may depend on another flag
            self.tokens.append(f"--method={self.arguments.method}")
        #: flags that are left out where another searched one has not the value that goes with all of theirs
        self.dependent = {dimension.name for dimension in self.space if self._depends(dimension)}
        self.space.sort(key=lambda dimension: dimension.name in self.dependent)
        if self.arguments.output_dir is None:
            self.arguments.output_dir = folder.default_output_dir(stage_arguments(self.arguments, method="tune"))
        self.path = Path(self.arguments.output_dir)
        self.settings = {
            "search": sorted(match[0].strip() for match in _SETTING.finditer(space)),
            **folder.resume_settings(self.arguments),
        }

    def _settings(self, values: dict[str, str]) -> Any:
        given = [f"--{name}={value}" for name, value in values.items() if value != _NOT_GIVEN]
        return parse(self.task_class.arguments_class, [*self.tokens, *given])

    def _depends(self, dimension: Dimension) -> bool:
        """Whether a value of a flag is refused with a method that uses it, unless another searched flag allows it.

        Raises:
            UsageError: a value that is refused whatever one other flag is.
        """
        name = dimension.name
        methods = next((entry.values for entry in self.space if entry.name == "method"), (self.arguments.method,))
        used = [{"method": method} for method in methods if name == "method" or _is_used(name, method)]
        others = [{other.name: one} for other in self.space if other is not dimension for one in other.values]
        refused = False
        for value in dimension.values:
            alone = [self._refusal({**method, name: value}) for method in used]
            refused = refused or any(alone)
            pairs = [{**method, **other} for method in used for other in others]
            if all(alone) and all(self._refusal({**pair, name: value}) for pair in pairs):
                # With another flag beside it more is said of the value than that this other one is missing.
                beside = (self._refusal({**pair, name: value}) for pair in pairs if not self._refusal(pair))
                said = {str(reason) for reason in alone}
                raise next((one for one in beside if one and str(one) not in said), None) or next(filter(None, alone))
        return refused

    def _refusal(self, values: dict[str, str]) -> UsageError | None:
        """Why values do not go together, as far as no model is needed to say."""
        try:
            settings = self._settings(values)
            problem_of(settings).check(settings)
            check_method(settings)
        except UsageError as error:
            return error
        return None

    def run(self) -> Run:
        """Every trial that is still to be done, then the best one's score on test.

        Raises:
            UsageError: the folder cannot be used, or no trial finished.
        """
        try:
            return self._search()
        finally:
            folder.release(self.path)

    def _search(self) -> Run:
        self._check_folder()
        task = self.task_class(self.arguments)
        task.problem.check(self.arguments)
        splits = data.load_splits(self.arguments, task.modality, task.problem)
        for line in splits.report:
            say(line)
        task.label_names = splits.label_names
        self.metric, self.greater = task.best_metric(splits)
        self.study = self._open()
        self._continue_interrupted()
        with folder.explained_disk_errors(self.path):
            while len(self._done()) < self.trials:
                try:
                    self._trial(dataclasses.replace(splits, test=None))
                    gc.collect()  # what it held, or a larger trial behind it would not fit
                except UsageError:
                    trained = any((self.path / TRIALS).glob(f"*/{CHECKPOINTS}/*/*"))
                    if not self._done() and not trained:  # nothing to go on with
                        shutil.rmtree(self.path)
                    raise
            if not self._complete():
                reason = next(
                    (trial.user_attrs["reason"] for trial in self._done() if "reason" in trial.user_attrs),
                    "all fell behind",
                )
                raise UsageError(f"None of the {self.trials} trials finished: {reason}")
            shutil.rmtree(self.path / TRIALS, ignore_errors=True)
            run = score_on_test(self.task_class, splits, self.arguments)
        self.study.set_user_attr("finished", True)
        say(f"\n{self.table()}\n")
        conclude(run, splits, self.arguments)
        return run

    def _check_folder(self) -> None:
        """Refuse a folder that is not this search's; `--overwrite` empties it."""
        if self.arguments.overwrite and (self.path / STUDY).is_file():
            folder.hold(self.path)
            folder.empty(self.path)
        if self.path.is_dir() and any(self.path.iterdir()) and not (self.path / STUDY).is_file():
            raise UsageError(f"--output_dir {str(self.path)!r} is not empty and holds no search: name another folder.")
        if (self.path / STUDY).is_file():
            study = self._open()
            before = study.user_attrs["settings"]
            now = json.loads(json.dumps(self.settings))
            changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
            if changed:
                raise UsageError(
                    f"{str(self.path)!r} holds a search with another {', '.join(changed)}: repeat its command to go "
                    "on, --overwrite replaces it, or name another folder."
                )
            if study.user_attrs.get("finished"):
                raise UsageError(
                    f"{str(self.path)!r} holds a finished search, whose test score is known: --overwrite replaces it, "
                    "or name another folder."
                )

    def _open(self) -> Any:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.path.mkdir(parents=True, exist_ok=True)
        folder.hold(self.path)
        study = optuna.create_study(
            storage=f"sqlite:///{self.path / STUDY}",
            study_name="tune",
            direction="maximize" if getattr(self, "greater", True) else "minimize",
            # Optuna's default: below the median of the other trials after as many epochs, from the sixth trial on.
            pruner=optuna.pruners.MedianPruner(),
            load_if_exists=True,
        )
        if "settings" not in study.user_attrs:
            study.set_user_attr("settings", json.loads(json.dumps(self.settings)))
        return study

    def _in(self, *states: str) -> list[Any]:
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.name in states]

    def _complete(self) -> list[Any]:
        return self._in("COMPLETE")

    def _done(self) -> list[Any]:
        """Trials that count: an interrupted one goes on under another number."""
        failed = [trial for trial in self._in("FAIL") if "reason" in trial.user_attrs]
        return sorted([*self._in("COMPLETE", "PRUNED"), *failed], key=lambda trial: trial.number)

    def _place(self, trial: Any) -> Path:
        """The run folder of a trial; of one that goes on, where it began: checkpoints know their path."""
        return self.path / TRIALS / str(trial.user_attrs.get("continues", trial.number))

    def _continue_interrupted(self) -> None:
        """Let the trial in whose midst the search stopped go on as the next one."""
        import optuna

        for trial in self._in("RUNNING"):
            number = trial.user_attrs.get("continues", trial.number)
            self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            seen = {"reported": sorted(trial.intermediate_values.items())}
            self.study.enqueue_trial(trial.params, user_attrs={**trial.user_attrs, **seen, "continues": number})
        if self._complete():
            self._keep_best()

    def _trial(self, splits: Splits) -> None:
        import optuna

        # A function of the seed and the trials before: an interrupted search goes on as if it had not been.
        self.study.sampler = optuna.samplers.TPESampler(seed=self.arguments.seed + len(self._done()))
        trial = self.study.ask()
        values, pruning = self._suggest(trial), _Pruning(trial, self.metric)
        say(f"\ntrial {len(self._done()) + 1} of {self.trials}: {_shown(values)}")
        place = self._place(trial)
        try:
            if not (place / METRICS).is_file():  # else it was stopped between its end and the study's knowing of it
                arguments = self._settings(values)
                arguments.output_dir, arguments.overwrite = str(place), False
                arguments.resume = (place / CHECKPOINTS / RECIPE).is_file()
                if not arguments.resume:
                    shutil.rmtree(place, ignore_errors=True)
                task = self.task_class(arguments)
                plan = build_plan(task.build_model(splits), arguments)
                train_plan(task, plan, splits, arguments, [pruning])
            score = float(read_json(place / METRICS)["validation"][self.metric])
            if math.isnan(score):
                raise Diverged(f"{self.metric} is no number")
            self.study.tell(trial, score)
            found, best = (written(self.metric, value) for value in (score, self.study.best_value))
            say(f"trial: {self.metric} {found}, best {best}")
            self._keep_best()
        except optuna.TrialPruned:
            self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            say("trial: stopped, it falls behind")
        except (UsageError, torch.OutOfMemoryError) as error:
            # What the first trial is refused for is likely wrong for all.
            of_its_own = isinstance(error, (Diverged, torch.OutOfMemoryError))
            if isinstance(error, DiskError) or not (self._done() or of_its_own):
                raise
            trial.set_user_attr("reason", str(error))
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
            say(f"trial: failed: {error}")
        shutil.rmtree(place, ignore_errors=True)
        folder.write_text(self.path / TABLE, self.csv())

    def _suggest(self, trial: Any) -> dict[str, str]:
        """A value for every searched flag that the trial's method uses, and that goes with the others."""
        values: dict[str, str] = {}
        for dimension in self.space:
            name = dimension.name
            if not _is_used(name, values.get("method", self.arguments.method)):
                continue
            every = dimension.values if name in self.dependent else ()
            if not any(self._refusal({**values, name: value}) for value in every):
                values[name] = dimension.suggest(trial)
        return values

    def _keep_best(self) -> None:
        """Put the best trial's run into the output folder, unless it is there; the others are removed."""
        place = self._place(self.study.best_trial)
        if (place / METRICS).is_file():
            folder.promote(place, self.path)
            shutil.rmtree(place)

    def _lines(self) -> list[list[str]]:
        """Number, state, score, evaluated epochs, seconds and values of every trial that is done."""
        lines = []
        for number, trial in enumerate(self._done(), start=1):
            score = trial.value if trial.value is not None else next(reversed(trial.intermediate_values.values()), None)
            epochs = f"{max(trial.intermediate_values, default=0) / 1000:g}"
            values = [str(trial.params.get(dimension.name, "")) for dimension in self.space]
            shown = "" if score is None else f"{score:.6f}"
            seconds = f"{trial.duration.total_seconds():.1f}"
            state = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}[trial.state.name]
            lines.append([str(number), state, shown, epochs, seconds, *values])
        return lines

    def _head(self) -> list[str]:
        return ["trial", "state", self.metric, "epochs", "seconds", *(dimension.name for dimension in self.space)]

    def csv(self) -> str:
        """The trials as CSV."""
        return as_csv([self._head(), *self._lines()])

    def table(self) -> str:
        """The trials, one a line, the best marked."""
        best = next(row for row, trial in enumerate(self._done()) if trial.number == self.study.best_trial.number)
        marks = ["", *("best" if row == best else "" for row in range(len(self._done())))]
        lines = [[*line, mark] for line, mark in zip([self._head(), *self._lines()], marks, strict=True)]
        return "\n".join(aligned(lines, left=range(len(lines[0]))))


def _is_used(name: str, method: str) -> bool:
    """Whether a method uses a flag; a method of the person's own may use any."""
    known, used = set().union(*METHOD_ARGUMENTS.values()), arguments_of(method)
    return name not in known or used is None or name in used


def _shown(values: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _check(arguments: TransferArguments, space: Sequence[Dimension]) -> None:
    """Refuse what needs no data to be refused.

    Raises:
        UsageError: as said.
    """
    if arguments.world_size > 1:
        raise UsageError("hftl tune works in one process: start it without accelerate launch.")
    if arguments.repeats > 1:
        raise UsageError("hftl tune trains each trial once: leave out --repeats.")
    if arguments.resume:
        raise UsageError("hftl tune goes on by itself where it was stopped: leave out --resume.")
    if arguments.keep_checkpoints:
        raise UsageError("--keep_checkpoints: hftl tune removes its trials as it goes. Leave it out.")
    if not arguments.dataset_name:
        raise UsageError("--dataset is missing: name a folder, a table, a Hub id or builtin:NAME.")
    for name in next((entry.values for entry in space if entry.name == "model_name_or_path"), (None,)):
        pretrained.check_model_name(name or arguments.model_name_or_path)
    methods = next((entry.values for entry in space if entry.name == "method"), (arguments.method,))
    for method in methods:
        find_method(method)
        if method == "auto":
            raise UsageError("hftl tune cannot search with --method auto, which is a search of its own.")
    for dimension in space:
        if dimension.name in arguments.given:
            raise UsageError(f"--{dimension.name} is given and searched: leave one out.")
        if not any(_is_used(dimension.name, method) for method in methods):
            raise UsageError(f"--search: --method {' or '.join(methods)} does not use {dimension.name}. Leave it out.")


def main(task_name: str, tokens: Sequence[str], space: str, trials: int) -> None:
    """`hftl tune`."""
    Search(task_name, tokens, space, trials).run()
