"""`--method auto`: a ladder of methods within a time limit, on which nothing that was done is lost.

The first rung solves the head on features that run once: a usable model after seconds, and what the features cost says
what a pass over the rows costs. What trains more of the model follows where a step, measured, fits into the time left:
few texts teach it by their pairs; then come short trials of several ways where there is much time, the better half of
them on and on, or the most promising one alone where there is little; then that one goes on for longer, with a soup of
its runs or epochs. Each rung is a finished run of its own, and the best so far stands in the run folder at every
moment. Validation decides, and where it cannot tell, what is better as a rule; the test split is touched once, at the
end.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import gc
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from safetensors.torch import load_file
from torch import nn

from hftl import backbones, compute, folder
from hftl.answers import read_answers
from hftl.arguments import (
    TransferArguments,
    is_pretrained,
    seconds_of,
    set_precision,
    stage_arguments,
    views_of_a_row,
)
from hftl.averaging import INGREDIENTS, MIXES, KeepWeights, changing_tensors, put
from hftl.batches import decoding_threads
from hftl.callbacks import TimeLimit
from hftl.data import Splits
from hftl.errors import Diverged, UsageError
from hftl.features import OF_KEPT_FEATURES, gives_features
from hftl.folder import CHECKPOINTS, METRICS, PREDICTIONS, RECIPE, read_json, say
from hftl.launch import started
from hftl.lr_find import main_rate, scaled
from hftl.methods import Plan, build_plan
from hftl.methods.plan import (
    LEAST_STEPS,
    MOST_EVALUATIONS,
    PAIR_EPOCHS,
    PAIR_STEPS,
    PARTIAL_BLOCKS,
    later_half,
    least_epochs,
    whole_epochs,
)
from hftl.metrics import SHARES, swapped_answers
from hftl.side_by_side import most_at_once
from hftl.tables import aligned, as_csv
from hftl.tasks.classification import ClassificationTask
from hftl.training import bytes_needed, check_plan, train_plan
from hftl.yaml_files import read_yaml

#: the table of what was tried, in the run folder, and the folder of the trial that trains
TABLE, TRIALS = "trials.csv", "trials"
#: in that folder: seconds of the whole run when an interrupted trial went on
_SPENT = "spent.json"
#: budgets, and nothing else
PRESETS = {"fast": "1m", "medium": "10m", "best": "1h"}
#: what the ladder sets itself
_CHOSEN = {"num_train_epochs", "max_steps", "head_solver", "early_stopping_patience"}
#: what changes the rows in each epoch: the probe, whose rows run once, does without, and so do pairs
_PLAIN = {"mixup": None, "cutmix": None, "random_erasing": None, "word_dropout": None, "augmentation": "none"}
#: of the time left, what planned work may take: machines are noisy, and what takes longer is ended at the limit. With
#: 0.85 most runs of 400 s left a quarter to a third over: whole epochs took less still
_PLANNED = 0.95
#: from this part of an epoch on, one more is planned than fits: the rate falls with the time, which is used that way
_BEGUN = 0.25
#: time for more goes into further runs of the last training, whose mean is better than any of them (with 16 rows a
#: class too: three of `lp_ft` 0.5 points more than one, four data sets, three draws each); a third adds little, and a
#: fourth is made only beside it
_MOST_RUNS = 3
#: least epochs of one of several runs, and most of any: three to five score alike on a few thousand rows (MiniLM on
#: movie reviews), eight overfit them …
_EPOCHS_OF_RUN = (3.0, 5.0)
#: … and of a run that goes on from a trial of an epoch (movie reviews, MiniLM, four runs, scored on 6,056 others: with
#: two epochs 0.858, with three or four 0.856; anew with three 0.857 in a third more time)
_EPOCHS_BEHIND_TRIALS = (2.0, 2.0)
#: of each such run, whose epochs make no soup: it ends by its best evaluation still, and time goes into steps instead
_EVALUATIONS_OF_SEVERAL = 2
#: with fewer epochs of the whole model left than this, trials would eat what the last training needs …
_EPOCHS_FOR_TRIALS = 12.0
#: … and so would trials of all ways, which take 13 epochs, and not 3
_EPOCHS_FOR_ALL = 24.0
#: ways that are tried where there is less time
_FEW_WAYS = 3
#: with fewer validation rows than this, by which an accuracy of 0.85 is known to 0.025, trials would choose by chance
_LEAST_TO_TELL = 200
#: of few texts pairs teach more than their labels: `setfit` is 3 points better on test than `full` with 16 a class and
#: 2 with 64 (SST-2, movie reviews, TREC; three and two draws), as good with 200; of images it is worse
_PAIRS = "setfit"
#: a soup needs some epochs to choose from
_LEAST_FOR_SOUP = 2.0
#: of the usual epochs, from which on a training counts as one of usual length. Where those are three, two of `lp_ft`
#: are 8 points better on test than the solved head on movie reviews, 6 on SST-2 and on digits, 1.4 on blood cells
#: (macro F1), and 1.1 worse on cats and dogs; one is 6, 5, 3.5 and 1.8 better, and 1.3 worse (two draws, all rows).
#: Pairs of which the limit left so many too: on TREC with 16 a class a third of `setfit` has 0.886 on test, all of it
#: 0.916, the solved head 0.60
_LONG = 1 / 2
#: a training shorter than this is not worth its start
_LEAST_EPOCHS = 0.5
#: seconds for the files of a run and for reading them back
_WRITING = 3.0
#: several runs side by side must take less than this part of their time one after the other
_PAYS = 0.9
#: `partial` runs the frozen part once, as the probe did, and trains the last blocks on what it gave
_PARTIAL_COSTS = 2.0


class Way(NamedTuple):
    """How to train.

    Attributes:
        method: as `--method`.
        factor: of the method's default rates.
        blocks: of `partial`, the last ones that train; 0 where that is the method's affair.
    """

    method: str
    factor: float = 1.0
    blocks: int = 0


#: ways to train more than the head; the first is taken unseen where there is time for one (2,000 movie reviews, MiniLM,
#: scored on 6,056 others: three runs of `full` 0.853, of `lp_ft` 0.848 at most), and with less time than for one run
#: the second, whose first stage is the probe, done already; and with few rows to choose by: 1.5 points better with 16 a
#: class, as good with all, means over six data sets (benchmarks/quality.md)
_WAYS = (Way("full"), Way("lp_ft"), Way("lora"), Way("full", 2.0), Way("lp_ft", 2.0), Way("partial"))


@dataclass
class Costs:
    """What was measured of the model.

    Attributes:
        training: seconds to train all of it on a row.
        prediction: seconds to predict one.
        at_once: trainings that go best side by side; 1 where they do not.
        slower: times as long as alone that each of them takes.
        of_pairs: whether it can and should be tuned on pairs: a few texts, several in a batch.
    """

    training: float
    prediction: float
    at_once: int
    slower: float
    of_pairs: bool


@dataclass
class Trial:
    """One training of the ladder, and what came out.

    Attributes:
        rung: probe, pairs, trial or final.
        method: as `--method`.
        factor: of the method's default rates.
        blocks: as in `Way`.
        runs: trainings from the same start, whose weights are averaged.
        epochs: passes over the training rows, of the first of them; 0 where the head was solved.
        score: on validation, of `--metric_for_best_model`; infinitely bad where it diverged.
        seconds: from its start to its saved run.
        best: whether it took the place of the best before it.
    """

    rung: str
    method: str
    factor: float
    blocks: int
    runs: int
    epochs: float
    score: float
    seconds: float
    best: bool

    @property
    def way(self) -> Way:
        """How it trained."""
        return Way(self.method, self.factor, self.blocks)


class _NotForTheModel(UsageError):
    """A method that the model does not take."""


class Budget:
    """The time limit; what was spent before an interruption counts."""

    def __init__(self, seconds: float, spent: float = 0.0) -> None:
        """Start the clock: in a command of hftl's own it has been running since the process began."""
        self.seconds, self.started = seconds, started() - spent

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.time() - self.started

    @property
    def ends(self) -> float:
        """The limit, as `time.time()` counts."""
        return self.started + self.seconds

    @property
    def left(self) -> float:
        """Seconds to the limit."""
        return self.ends - time.time()


class Ladder:
    """The rungs of one run."""

    def __init__(self, task: ClassificationTask, model: nn.Module, splits: Splits) -> None:
        """Start, or go on where an interrupted run stopped.

        Args:
            task: the task; its arguments are those of the whole run.
            model: as it was loaded; every trial trains a copy.
            splits: the data; the trials do not see the test split.
        """
        self.task, self.model, self.arguments = task, model, task.arguments
        self.splits = dataclasses.replace(splits, test=None)
        self.path = Path(str(self.arguments.output_dir))
        self.trials, spent = _read_table(self.path / TABLE) if self.arguments.resume else ([], 0.0)
        if self.arguments.resume and (self.path / TRIALS / _SPENT).is_file():
            spent = max(spent, float(read_json(self.path / TRIALS / _SPENT)))
        self.budget = Budget(budget_seconds(self.arguments), spent)
        #: seconds that come after the last step of training: evaluations, and writing
        self.reserve = _WRITING
        steps = math.ceil(len(splits.train) / task.rows_a_step)
        #: passes over the rows in which pairs are learned
        self.pair_epochs = max(PAIR_EPOCHS, least_epochs(PAIR_STEPS, steps))
        #: with few rows a run has more epochs, as in every method: so many where there is one for many rows
        self.stretch = max(1.0, least_epochs(LEAST_STEPS, steps) / self.arguments.usual_epochs)

    @property
    def left(self) -> float:
        """Seconds that a rung may plan with."""
        return (self.budget.left - self.reserve) * _PLANNED

    def climb(self, test_rows: int) -> None:
        """Every rung that the time allows; those of an interrupted run are not climbed again."""
        costs = self._measure()
        row = 1.2 * costs.prediction * views_of_a_row(self.arguments)
        self.reserve += row * (test_rows + len(self.splits.validation))
        # Epochs and then runs are scored, and then mixes.
        cooking = row * (INGREDIENTS + 1 + (len(MIXES) if self._judges_by_few else 0)) * len(self.splits.validation)
        self._finish_interrupted(cooking)
        if not self._of("final"):
            self._climb_to_the_last(costs, cooking)
        if any(math.isfinite(trial.score) or trial.method == "partial" for trial in self._of("final")):
            return
        if self.left > _PARTIAL_COSTS * self._of("probe")[0].seconds:
            self._train("final", Way("partial"), self._epochs(3.0), soup=True)

    def _climb_to_the_last(self, costs: Costs, cooking: float) -> None:
        """Probe, pairs, trials, and the last training where it fits, whose soups and mixes take `cooking` seconds."""
        if not self._of("probe"):
            self._check_probe_fits(costs.prediction)
            self._train("probe", Way("frozen"), 0.0)
        epoch = self._seconds_an_epoch(costs)
        length = "an epoch" if self._epochs(1.0) == 1 else f"{self._epochs(1.0):g} epochs"
        left = f"{max(0, self.budget.left):.0f} s are left"
        if math.isfinite(epoch):
            say(f"auto: to train the whole model for {length} takes about {epoch:.0f} s, {left}")
        pairs = (self.pair_epochs * costs.training + costs.prediction) * len(self.splits.train)
        if costs.of_pairs and not self._of("pairs") and self.left > pairs:
            self._train("pairs", Way(_PAIRS), self.pair_epochs)
        way = self._most_promising(self.left / epoch)
        runs, epochs, at_once = self._last_training(costs, way)
        if epochs >= _LEAST_FOR_SOUP or self._mixes(way):
            self.reserve += cooking
            runs, epochs, at_once = self._last_training(costs, way)
        if epochs >= _LEAST_EPOCHS:
            self._train("final", way, self._epochs(epochs), soup=runs == 1 or way.method == "partial", at_once=at_once)

    def _seconds_an_epoch(self, costs: Costs, of_several: float = 0.0) -> float:
        """What stands for an epoch takes with its evaluations, in a single training or in one of several.

        Args:
            costs: as measured.
            of_several: the epochs of one of several trainings; 0 for a single one.
        """
        evaluations = min(self.stretch / (self.arguments.eval_epochs or 1), MOST_EVALUATIONS)
        if of_several and self._evaluates_twice:
            evaluations = _EVALUATIONS_OF_SEVERAL / of_several
        steps = self.stretch * costs.training * len(self.splits.train)
        return steps + evaluations * costs.prediction * len(self.splits.validation)

    def _last_training(self, costs: Costs, way: Way) -> tuple[int, float, int]:
        """Runs, the epochs of each, and how many train side by side."""
        later = _later(self.arguments)
        goes_on = self._goes_on(way) and way.method != "partial"  # which has one run and a soup of its epochs
        lengths = _EPOCHS_BEHIND_TRIALS if goes_on else _EPOCHS_OF_RUN
        fit = self.left / self._seconds_an_epoch(costs, of_several=lengths[0] + later)
        for at_once, slower in ((costs.at_once, costs.slower), (1, 1.0)):
            runs, epochs = _shape(fit / slower, later, at_once, lengths)
            if runs > 1 and fit / slower >= _LEAST_FOR_SOUP + later:
                return runs, epochs, at_once
        return *_shape(self.left / self._seconds_an_epoch(costs), later, 1, lengths), 1

    def _epochs(self, usual: float) -> float:
        """How many epochs of these rows stand for so many of a usual number of rows."""
        return usual if self.stretch == 1 else max(1.0, float(math.floor(usual * self.stretch + 1e-6)))

    def _check_probe_fits(self, prediction: float) -> None:
        """Refuse a budget in which not even the head alone can be fitted.

        Raises:
            UsageError: as said.
        """
        needed = prediction * len(self.splits.train) + self.reserve
        if self.budget.left < needed:
            least = math.ceil(1.2 * (self.budget.spent + needed))
            raise UsageError(
                f"--time_budget: {self.budget.seconds:g} s are too short for anything: running every row through the "
                f"model once, scoring and writing take about {least} s. Give at least that, or --max_train_samples."
            )

    def _of(self, rung: str) -> list[Trial]:
        return [trial for trial in self.trials if trial.rung == rung]

    def _most_promising(self, epochs: float) -> Way:
        """One of the first two ways, or where time and validation rows are enough, the one that short trials leave.

        Successive halving (Jamieson and Talwalkar 2016): all train for one epoch, the better half goes on for two, and
        so on. What an interrupted run has tried is not tried again.
        """
        if self._judges_by_few or (epochs < _EPOCHS_FOR_TRIALS and not self._of("trial")):
            return _WAYS[1] if self._judges_by_few or epochs < _EPOCHS_OF_RUN[0] else _WAYS[0]
        spent = sum(trial.epochs for trial in self._of("trial")) / self.stretch
        ways = self._all_ways() if epochs + spent >= _EPOCHS_FOR_ALL else list(_WAYS[:_FEW_WAYS])
        sign = 1 if self.arguments.greater_is_better else -1
        length = 1.0
        while len(ways) > 1:
            scores = {}
            for way in ways:
                if self._of("trial") and self.left <= 0:  # costs were measured too low: nothing will train any more
                    return ways[0]
                scores[way] = self._trial(way, self._epochs(length)).score
            ranked = sorted(ways, key=lambda way: -sign * scores[way])
            ways = ranked[: len(ways) // 2]
            for way in ranked[len(ways) :]:
                self._weights(way).unlink(missing_ok=True)
            length *= 2
        return ways[0]

    def _all_ways(self) -> list[Way]:
        """Those of every model, and the later half of this one's blocks, where that is more than `partial` takes."""
        half = later_half(max(backbones.parameter_blocks(self.model).values()))
        return [*_WAYS, *([Way("partial", blocks=half)] if half > PARTIAL_BLOCKS else [])]

    def _trial(self, way: Way, epochs: float) -> Trial:
        """A short trial, trained now unless it has been."""
        if not any((trial.way, trial.epochs) == (way, epochs) for trial in self._of("trial")):
            self._train("trial", way, epochs)
        return next(trial for trial in self._of("trial") if (trial.way, trial.epochs) == (way, epochs))

    def _weights(self, way: Way) -> Path:
        """Where the trials of a way leave what they trained, from which it goes on."""
        return self.path / TRIALS / f"{way.method}_{way.factor:g}_{way.blocks}.safetensors"

    def _goes_on(self, way: Way) -> bool:
        """Whether a training begins where trials ended."""
        return self._tried(way) > 0 and self._weights(way).is_file()

    def _tried(self, way: Way) -> float:
        """Epochs of the trials of a way."""
        return sum(trial.epochs for trial in self._of("trial") if trial.way == way)

    def _finish_interrupted(self, cooking: float) -> None:
        """Go on with the trial that an interruption stopped, or that was finished and is not in the table yet.

        The soups and mixes of a final one take `cooking` seconds.
        """
        for place in sorted((self.path / TRIALS).glob("*-*")):
            number, rung, method, factor, blocks, epochs, at_once = place.name.split("-")
            recipe = next((path for path in (place / CHECKPOINTS / RECIPE, place / RECIPE) if path.is_file()), None)
            if recipe is None or int(number) <= len(self.trials):
                continue
            soup = read_yaml(recipe).get("average") == "soup"
            earlier = _seconds_until_interrupted(place)
            self.budget.started -= earlier
            folder.write_json(self.path / TRIALS / _SPENT, self.budget.spent)  # it may be interrupted once more
            self.reserve += cooking if rung == "final" else 0.0
            way = Way(method, float(factor), int(blocks))
            self._train(rung, way, float(epochs), soup, int(at_once), earlier)

    def _train(
        self,
        rung: str,
        way: Way,
        epochs: float,
        soup: bool = False,
        at_once: int = 1,
        earlier: float = 0.0,
    ) -> None:
        """Train one way, and if it is better let it take the run's place.

        Args:
            rung: as in `Trial`; the final one trains from the same start again while the time allows.
            way: as said.
            epochs: of each training.
            soup: average the best epochs of a training, where it has enough of them.
            at_once: runs that train side by side.
            earlier: seconds of it before an interruption.
        """
        started = time.time() - earlier
        method, factor, blocks = way
        name = f"{len(self.trials) + 1}-{rung}-{method}-{factor:g}-{blocks}-{epochs:g}-{at_once}"
        place = self.path / TRIALS / name
        length = f" for {epochs:g} epoch{'' if epochs == 1 else 's'}" if epochs else ""
        length += f" at {factor:g} times its rates" if factor != 1 else ""
        length += f", the last {blocks} blocks" if blocks else ""
        say(f"\nauto: {rung}, {method}{length}; {self.budget.left:.0f} of {self.budget.seconds:.0f} s left")
        again = rung == "final" and method != "partial" and self._runs_again(epochs)
        arguments = stage_arguments(
            self.arguments,
            method=method,
            output_dir=str(place),
            num_train_epochs=epochs or None,
            eval_epochs=self._epochs_between_evaluations(epochs, again and not soup),
            time_budget=None,
            preset=None,
            overwrite=False,
            resume=(place / CHECKPOINTS / RECIPE).is_file(),
            average="soup" if soup and self._cooks(epochs) else "none",
            soup_runs=_most_runs(at_once) if again else 1,
            wise_ft=rung == "final" and self._mixes(way),
            unfreeze_blocks=blocks or None,
            **(self._plain() if rung in ("probe", "pairs") else {}),
            **(OF_KEPT_FEATURES if method == "full" else {}),
        )
        runs, done, better = 1, 1.0, False
        score = -math.inf if self.arguments.greater_is_better else math.inf
        judged = place.with_name(f"{place.name}.better")  # beside it while it takes its place, which may be interrupted
        try:
            if not (place / METRICS).is_file():  # else it was stopped between its end and the table's knowing of it
                self._train_plan(arguments, rung, way, at_once)
            runs, done = _outcome(place)
            epochs = epochs or _epochs_of_head(place)
            long = rung == "final" and self._tried(way) + epochs * done >= self._half
            usual = long and method != "partial" and not self._of("pairs")
            whole = usual or (method == _PAIRS and done >= _LONG)
            score, better = self._score(place), judged.is_file() or self._is_better(place, whole)
        except (Diverged, _NotForTheModel, torch.OutOfMemoryError) as error:
            if not self.trials:
                raise
            say(f"auto: {method} failed: {error}")
        if math.isinf(score):
            gc.collect()  # what the training held; until here the error holds it
        if better:
            judged.touch()
            folder.promote(place, self.path)
        trained = max(0.01, round(epochs * done, 2)) if epochs and rung != "trial" else epochs
        self.trials.append(Trial(rung, *way, runs, trained, score, time.time() - started, better))
        _write_table(self.path / TABLE, self.trials, self.budget.spent)
        shutil.rmtree(place, ignore_errors=True)

    def _train_plan(self, arguments: TransferArguments, rung: str, way: Way, at_once: int) -> None:
        """Train a copy of the model, which nothing holds any longer behind it."""
        plan = self._plan(arguments, way)
        fitting = _fitting(Path(str(arguments.output_dir)), plan, arguments, at_once)
        keep = [KeepWeights(plan.stages[-1], self._weights(way))] if rung == "trial" else []
        limit = TimeLimit(self.budget.ends - self.reserve, self._half, fitting)
        train_plan(self.task, plan, self.splits, arguments, [limit, *keep])

    def _plan(self, arguments: TransferArguments, way: Way) -> Plan:
        """A plan for a copy of the model, or the last stage of one for what trials have made of it.

        Raises:
            _NotForTheModel: the model does not take the method: LoRA where every layer is a grouped convolution, say.
        """
        try:
            plan = build_plan(copy.deepcopy(self.model), arguments)
            check_plan(plan, arguments)
        except UsageError as error:
            raise _NotForTheModel(str(error)) from error
        if way.factor != 1:
            stages, rates = scaled(plan, list(plan.stages), main_rate(plan) * way.factor, keeps_head=False)
            plan = dataclasses.replace(plan, stages=tuple(stages), settings=plan.settings | rates)
        if not self._goes_on(way):
            return plan
        put(changing_tensors(plan.model, plan.stages[-1]), load_file(self._weights(way)))
        settings = {name: value for name, value in plan.settings.items() if name != "head_epochs"}
        settings["num_train_epochs"] = self._tried(way) + plan.stages[-1].epochs  # for the recipe
        return dataclasses.replace(plan, stages=plan.stages[-1:], settings=settings)

    @property
    def _judges_by_few(self) -> bool:
        """Whether validation has too few rows to tell one way from another."""
        return len(self.splits.validation) < _LEAST_TO_TELL

    def _mixes(self, way: Way) -> bool:
        """Whether the last training is mixed with the pretrained model (WiSE-FT, Wortsman et al. 2022).

        By 32 validation rows nobody sees that a training of cats and dogs is worse than the solved head; their mix is
        better than both (three draws with 16 a class: 0.954 and 0.962 on test, mixed 0.966), and where the training is
        better the mix is mostly the training (digits 0.936, mixed the same; blood cells 0.977 and 0.975). Not behind
        pairs, from which another training has to differ by more than chance: the best of eleven would be no fair test.
        """
        return way.method == "lp_ft" and self._judges_by_few and is_pretrained(self.arguments) and not self._of("pairs")

    @property
    def _half(self) -> float:
        """Half as many epochs as are usual, or what stands for them."""
        return self._epochs(_LONG * self.arguments.usual_epochs)

    def _runs_again(self, epochs: float) -> bool:
        """Whether a further run, which has no more epochs than the first, would be worth its time."""
        return epochs >= max(self._half, self._epochs(_LEAST_FOR_SOUP))

    def _cooks(self, epochs: float) -> bool:
        """Whether a run of so many epochs is evaluated often enough for a soup of its checkpoints."""
        return self.arguments.eval_strategy != "no" and epochs >= self._epochs(_LEAST_FOR_SOUP)

    @property
    def _evaluates_twice(self) -> bool:
        """Whether one of several trainings is evaluated less often than a single one: of many rows, unless told how."""
        return self.stretch == 1 and self.arguments.eval_strategy == "epoch" and not self.arguments.eval_epochs

    def _epochs_between_evaluations(self, epochs: float, several: bool) -> int | None:
        """As many as leave ten evaluations of a training of few rows, and two of one of several of many rows.

        None leaves it to the training.
        """
        if several and self._evaluates_twice:
            return math.ceil(epochs / _EVALUATIONS_OF_SEVERAL)
        if self.arguments.eval_epochs or self.stretch == 1 or not epochs or self.arguments.eval_strategy != "epoch":
            return self.arguments.eval_epochs
        return math.ceil(epochs / MOST_EVALUATIONS)

    def _plain(self) -> dict[str, Any]:
        """What probe and pairs do without; augmented views that are kept stay."""
        kept = {"augmentation"} if self.arguments.feature_views > 1 else set()
        return {name: value for name, value in _PLAIN.items() if hasattr(self.arguments, name) and name not in kept}

    def _score(self, place: Path) -> float:
        metric = str(self.arguments.metric_for_best_model)
        return float(read_json(place / METRICS)["validation"][metric])

    def _is_better(self, place: Path, whole: bool) -> bool:
        """Whether a training takes the place of the run so far.

        If it is better by more than chance: by more than one standard error of the paired difference on validation,
        from the rows on which the two disagree (McNemar 1947; of macro F1 and its like Yeh 2000; the one-standard-error
        rule, Breiman et al. 1984), and a row, since rows are whole (the correction for continuity, Edwards 1948). A
        `whole` training, the last one, of more than the last blocks and half the usual length, is taken unless it is
        worse by more than two standard errors: over six data sets, with all rows and with 16 a class, `full` is 6
        points better on test than the solved head on average, and worse on cats and dogs alone, by a point
        (benchmarks/quality.md); by 32 rows of validation it may look 12 points worse. So are pairs, behind which no
        other training counts as one that is better as a rule. Of a score that is no share of the rows, such as a loss,
        those rows do not tell the chance: there the better one is taken.
        """
        if not (self.path / METRICS).is_file():
            return True
        sign = 1 if self.arguments.greater_is_better else -1
        gain = sign * (self._score(place) - self._score(self.path))
        rounding = 1e-9  # what it leaves is no gain
        if self.arguments.metric_for_best_model not in SHARES:
            return gain > rounding
        names = self.task.label_names
        before, now = (read_answers(path / PREDICTIONS, names) for path in (self.path, place))
        metric = str(self.arguments.metric_for_best_model)
        swapped = swapped_answers(metric, now.labels, before.predictions, now.predictions)
        chance, row = float(np.linalg.norm(swapped)) + rounding, float(np.abs(swapped).mean()) if len(swapped) else 0.0
        return gain >= -2 * chance if whole else gain > chance + row

    def _measure(self) -> Costs:
        """What a training and a prediction cost, in the precision that every rung will have."""
        model = copy.deepcopy(self.model).to(self.arguments.device).train()
        data: Any = self.task.dataset(self.splits.train, training=True)
        batch = compute.typical_batch(data, self.task.collate)
        # Beside the model, which may be the faster of the two, by the threads that a prediction has.
        preparing = compute.seconds_to_prepare(data, self.task.collate) / decoding_threads(self.splits.train)
        rows_a_batch = max(2, self.task.rows_a_batch)  # BatchNorm has no statistics of one row
        count = 2 if self.arguments.auto_find_batch_size else rows_a_batch
        batch = {name: value[:count].to(self.arguments.device) for name, value in batch.items()}
        rows = self.stretch * _MOST_RUNS * (_EPOCHS_OF_RUN[1] + _later(self.arguments)) * len(self.splits.train)
        loss = self.task.loss(self.splits)
        at_once, slower = 1, 1.0
        try:
            precision = compute.choose_precision(model, batch, loss, training=True, rows=rows, arguments=self.arguments)
            if precision != self.arguments.precision:
                set_precision(self.arguments, precision)
            training = compute.seconds_a_row(model, batch, loss, True, precision)
            most = _most_at_once(model, self.arguments)
            if most > 1:
                beside = compute.seconds_a_row_beside(model, batch, loss, precision, most) + preparing
                if beside < _PAYS * most * max(training, preparing):
                    at_once, slower = most, beside / max(training, preparing)
        except torch.OutOfMemoryError:
            say("auto: the memory does not hold a training of the whole model: only its end is trained")
            training = math.inf
            model.zero_grad()
        if not self.arguments.auto_find_batch_size:
            batch = compute.typical_batch(
                data, self.task.collate, min(self.arguments.per_device_eval_batch_size, 2 * count)
            )
        batch = {name: value.to(self.arguments.device) for name, value in batch.items()}
        prediction = compute.seconds_a_row(model.eval(), batch, loss, False, self.arguments.precision)
        pairs_fit = self.arguments.per_device_train_batch_size != 1 and not self.arguments.auto_find_batch_size
        few_texts = self.task.modality.is_text and self.stretch > 1
        of_pairs = few_texts and pairs_fit and gives_features(model, backbones.inputs_of(batch))
        return Costs(max(training, preparing), max(prediction, preparing), at_once, slower, of_pairs)


def _most_at_once(model: nn.Module, arguments: TransferArguments) -> int:
    """How many trainings may go side by side: what computes can be copied, and the memory holds them.

    A training holds no more than this process did in the step that it has just trained, and two moments. What follows a
    training elsewhere may not survive a copy of the process.
    """
    reports: Any = arguments.report_to  # a list, once it is parsed
    if not set(reports) <= {"tensorboard"}:
        return 1
    moments = 2 * sum(4 * parameter.numel() for parameter in model.parameters())
    room = compute.free_memory() + psutil.Process().memory_info().rss
    return max(1, min(most_at_once(), _MOST_RUNS, room // (compute.peak_memory() + moments)))


def _fitting(place: Path, plan: Plan, arguments: TransferArguments, at_once: int) -> int:
    """So many trainings side by side, or one where the disk does not hold what they write."""
    at_once = min(at_once, most_at_once())
    if at_once > 1 and not folder.has_space(place, bytes_needed(plan, arguments, at_once)):
        say("auto: the disk has no room for several trainings at a time: they come one after the other")
        return 1
    return at_once


def _seconds_until_interrupted(place: Path) -> float:
    """What a trial took: a finished one says it, another from its settings, which it writes first, to its last file."""
    if (place / METRICS).is_file():
        return float(read_json(place / METRICS)["train"]["seconds"])
    written = [path.stat().st_mtime for path in place.rglob("*")]
    return max(written) - (place / CHECKPOINTS / RECIPE).stat().st_mtime


def _outcome(place: Path) -> tuple[int, float]:
    """How many runs a finished trial has, and the share of its steps that the first made before the limit."""
    stages = read_json(place / METRICS)["train"]["stages"]
    runs = int(stages[-1].get("soup", {"tried": 1})["tried"])
    first = [stage for stage in stages[: len(stages) - runs + 1] if "planned_steps" in stage]
    return runs, min((stage["steps"] / stage["planned_steps"] for stage in first), default=1.0)


def _epochs_of_head(place: Path) -> float:
    """Those of a finished probe: 0 where its head was solved."""
    stage = read_json(place / METRICS)["train"]["stages"][-1]
    return float(stage["epochs"]) if "planned_steps" in stage else 0.0


def _later(arguments: TransferArguments) -> float:
    """Epochs that a task has by default beyond what most have: it learns that much later."""
    return arguments.usual_epochs - TransferArguments.usual_epochs


def _most_runs(at_once: int) -> int:
    """The least multiple of what trains side by side that is enough."""
    return at_once * math.ceil(_MOST_RUNS / at_once)


def _shape(
    epochs: float, later: float = 0.0, at_once: int = 1, lengths: tuple[float, float] = _EPOCHS_OF_RUN
) -> tuple[int, float]:
    """How many runs of how many epochs the last training has, where so many epochs fit in all.

    Args:
        epochs: that fit; of runs side by side, in one of them.
        later: how many more than usual a run needs, see `_later`.
        at_once: runs side by side.
        lengths: the least epochs of one of several runs, and the most of any, without `later`.
    """
    least, most = lengths
    times = min(max(epochs // (least + later), 1), _most_runs(at_once) // at_once)
    each = epochs / times
    if times == 1 and each >= _LEAST_FOR_SOUP:  # nothing follows that would want the time
        each += 1 - _BEGUN
    return int(times) * at_once, whole_epochs(min(most + later, each))


def check(arguments: TransferArguments) -> None:
    """Refuse what does not go with the ladder, before a folder is touched.

    Raises:
        UsageError: a setting that the ladder chooses itself was given, or several processes were started.
    """
    for name in sorted(_CHOSEN & arguments.given):
        raise UsageError(f"--method auto chooses --{name} itself. Leave it out, or name a method.")
    for name, default in (("average", "none"), ("wise_ft", False), ("soup_runs", 1)):
        if getattr(arguments, name) != default:
            raise UsageError(f"--{name} does not go with --method auto, whose time it would use up. Name a method.")
    if arguments.eval_delay:
        raise UsageError("--eval_delay: --method auto places its evaluations itself. Leave it out.")
    if arguments.keep_checkpoints:
        raise UsageError("--keep_checkpoints: --method auto removes its trials as it goes. Leave it out.")
    if arguments.world_size > 1:
        raise UsageError("--method auto works in one process. Start it without accelerate launch, or name a method.")
    if arguments.feature_cache == "on":
        raise UsageError(
            "--feature_cache on: --method auto may train the whole model, which keeps nothing. Leave it out."
        )


def search(task: ClassificationTask, plan: Plan, splits: Splits, arguments: TransferArguments) -> None:
    """Climb the ladder; the best run on validation stands in the run folder."""
    task.arguments = arguments
    arguments.metric_for_best_model, better = task.best_metric(splits)
    arguments.greater_is_better = better  # type: ignore[assignment]
    ladder = Ladder(task, plan.model, splits)
    ladder.climb(0 if splits.test is None else len(splits.test))
    task.arguments = arguments
    shutil.rmtree(ladder.path / TRIALS, ignore_errors=True)
    say(f"\n{_table(ladder.trials, str(arguments.metric_for_best_model))}")


def budget_seconds(arguments: TransferArguments) -> float:
    """Seconds of `--time_budget`, else of `--preset`."""
    return seconds_of(arguments.time_budget or PRESETS[arguments.preset or "medium"])


def _table(trials: list[Trial], metric: str) -> str:
    """What was tried, one line each."""
    lines = [["rung", "method", "rates", "epochs", f"validation {metric}", "seconds", ""]]
    kept = max((number for number, trial in enumerate(trials) if trial.best), default=0)
    for number, trial in enumerate(trials):
        epochs = f"{trial.epochs:g}, {trial.runs} runs" if trial.runs > 1 else f"{trial.epochs:g}"
        length = [f"x{trial.factor:g}", epochs] if trial.epochs else ["", "solved"]
        mark = "kept" if number == kept else ""
        method = f"{trial.method}, {trial.blocks} blocks" if trial.blocks else trial.method
        lines.append([trial.rung, method, *length, f"{trial.score:.4f}", f"{trial.seconds:.0f}", mark])
    return "\n".join(aligned(lines, left=[0, 1, 6]))


def _write_table(path: Path, trials: list[Trial], spent: float) -> None:
    names = [item.name for item in dataclasses.fields(Trial)]
    rows = [[*dataclasses.astuple(trial), ""] for trial in trials]
    rows[-1][-1] = f"{spent:.1f}"
    folder.write_text(path, as_csv([[*names, "spent"], *rows]))


def _read_table(path: Path) -> tuple[list[Trial], float]:
    """The finished trials of an interrupted run, and the seconds that they took in all."""
    if not path.is_file():
        return [], 0.0
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    trials = [
        Trial(
            row["rung"],
            row["method"],
            float(row["factor"]),
            int(row["blocks"]),
            int(row["runs"]),
            float(row["epochs"]),
            float(row["score"]),
            float(row["seconds"]),
            row["best"] == "True",
        )
        for row in rows
    ]
    return trials, float(rows[-1]["spent"])
