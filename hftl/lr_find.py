"""A range test of the learning rate, as in fastai: `hftl lr-find`, and `--learning_rate auto`.

The rate grows exponentially from step to step until the loss runs away (Smith 2017, section 3.3). Model, random
generators and data are afterwards as they were.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from hftl.arguments import TransferArguments, unwatched
from hftl.data import Splits
from hftl.errors import UsageError
from hftl.features import keep_features, sees_plain_rows
from hftl.folder import say
from hftl.methods import Plan, Stage
from hftl.tasks.classification import ClassificationTask
from hftl.trainer import TransferTrainer
from hftl.workers import data_workers

# As `Learner.lr_find` of fastai: 100 steps from 1e-7 to 10, a moving average of 0.98, the end at four times the least.
STEPS, LEAST, MOST = 100, 1e-7, 10.0
_AVERAGE, _RUNS_AWAY = 0.98, 4.0
#: fewer points than this show no valley
FEWEST = 10
#: columns and lines of the plot in a terminal
_WIDTH, _HEIGHT = 72, 14
#: where the picture of `--learning_rate auto` is
PICTURE = "lr_find.png"


@dataclass(frozen=True)
class Sweep:
    """What a range test saw.

    Attributes:
        rates: of each step, as `--learning_rate` means it.
        losses: smoothed, after each step's rows.
        valley: suggestion, see `valley`.
        steepest: suggestion, see `steepest`.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    valley: float
    steepest: float


def valley(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The rate half way down the longest valley: fastai's default suggestion.

    The longest run of losses of which each is below all that were picked before (a longest decreasing subsequence,
    whose length stands for its place as in fastai); its second third's middle.
    """
    longest = [1] * len(losses)
    end = start = 0
    for number, loss in enumerate(losses):
        for before in range(number):
            if loss < losses[before] and longest[number] < longest[before] + 1:
                longest[number] = longest[before] + 1
        if longest[end] < longest[number]:
            end, start = number, number - longest[number]
    third = (end - start) / 3
    return rates[max(0, start + int(third) + int(third / 2))]


def steepest(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The rate at which the loss falls fastest over the logarithm of the rate."""
    return rates[int(np.argmin(np.diff(losses) / np.diff(np.log(rates))))]


class _Recorder(TrainerCallback):
    """The smoothed loss of each step; ends the training when it runs away."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.average = 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> Any:
        if not logs or "loss" not in logs:
            return control
        if not math.isfinite(logs["loss"]):
            control.should_training_stop = True
            return control
        self.average = _AVERAGE * self.average + (1 - _AVERAGE) * logs["loss"]
        self.losses.append(self.average / (1 - _AVERAGE ** (len(self.losses) + 1)))
        if self.losses[-1] > _RUNS_AWAY * min(self.losses):
            control.should_training_stop = True
        return control


class _RangeTrainer(TransferTrainer):
    """A trainer whose rates grow exponentially; a loss that is no number is where it ends, and no error."""

    factor: Callable[[int], float]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler: Any = LambdaLR(optimizer or self.optimizer, self.factor)
        return self.lr_scheduler

    def not_finite(self, loss: torch.Tensor, done: int) -> None:
        """The recorder sees it too, and stops."""


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Give weights, buffers, modes and random generators back as they were."""
    state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    forward = vars(model).get("forward")  # Accelerate leaves one of its own
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        model.load_state_dict(state)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trains[name])
            parameter.grad = None
        for name, module in model.named_modules():
            module.training = modes[name]
        vars(model).pop("forward", None)
        if forward is not None:
            model.forward = forward
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        torch.set_rng_state(generators[2])
        if devices:
            torch.cuda.set_rng_state_all(devices)


def main_rate(plan: Plan) -> float:
    """The rate of a plan that `--learning_rate` stands for."""
    stage = plan.stages[-1]
    return plan.settings.get("learning_rate") or plan.settings.get("head_learning_rate") or stage.learning_rate


def sweep(
    task: ClassificationTask, plan: Plan, stage: Stage, splits: Splits, rows: dict[str, Any], steps: int = STEPS
) -> Sweep:
    """Train a stage with a growing rate, and give everything back as it was.

    All groups grow by the same factor: those of the head and of earlier blocks keep their ratio to the main rate.

    Args:
        task: with resolved arguments.
        plan: its model is trained.
        stage: what trains.
        splits: the data with its labels.
        rows: the data sets of the splits, for the task's collator.
        steps: at most; with fewer the curve is coarser.

    Raises:
        UsageError: the loss runs away at once.
    """
    main = main_rate(plan)
    rates = [LEAST * (MOST / LEAST) ** (step / max(1, steps - 1)) for step in range(steps)]
    recorder = _Recorder()
    with _unchanged(plan.model), contextlib.ExitStack() as after:
        kept = keep_features(task, stage, plan.model, splits, rows, alone=len(plan.stages) == 1, last=True)
        if kept is not None:
            after.callback(kept.release)
        if kept is not None:
            rows = kept.data
        elif sees_plain_rows(task, stage, plan.model):
            rows = {"train": task.views(splits.train, 1, rows["train"])[0]}
        workers = 0 if kept else data_workers(task, stage, plan.model, rows["train"], splits)
        place = after.enter_context(tempfile.TemporaryDirectory())
        trainer = _RangeTrainer(
            stage=stage if kept is None else kept.stage,
            loss=stage.loss or task.loss(splits),
            model=plan.model,
            args=_settings(task, stage, place, steps, workers),
            cut=None if kept is None else kept.cut,
            train_dataset=rows["train"],
            data_collator=task.collate if kept is None else kept.collate,
            items=task.problem.items,
            mixing=None if stage.headless else task.mixing(),
            callbacks=[recorder],
        )
        trainer.factor = lambda step: rates[min(step, steps - 1)] / main
        after.callback(trainer.end_workers)
        trainer.train()
        trainer.bare_model()
    losses = recorder.losses
    if len(losses) < FEWEST:
        raise UsageError(
            f"The range test of the learning rate ended after {len(losses)} steps: the loss runs away at once. Give a "
            "--learning_rate (with --overwrite, if a stage is behind it), and look at the data."
        )
    # As in fastai: the first steps, in which nothing moves, and the last, where it has run away, suggest nothing.
    inner = slice(min(steps // 10, len(losses) // 4), max(len(losses) - 5, len(losses) * 3 // 4))
    chosen = rates[: len(losses)][inner], losses[inner]
    return Sweep(tuple(rates[: len(losses)]), tuple(losses), valley(*chosen), steepest(*chosen))


def check_one_process(arguments: TransferArguments) -> None:
    """Refuse several processes.

    Raises:
        UsageError: as said.
    """
    if arguments.world_size > 1:
        raise UsageError(
            "The range test of the learning rate works in one process: start it without accelerate launch, and give "
            "--learning_rate what it says."
        )


def _settings(task: ClassificationTask, stage: Stage, place: str, steps: int, workers: int) -> Any:
    """A training that is only watched."""
    return unwatched(
        task.arguments,
        output_dir=place,
        max_steps=steps,
        num_train_epochs=stage.epochs,
        learning_rate=stage.learning_rate,
        logging_strategy=IntervalStrategy.STEPS,
        logging_steps=1,
        logging_first_step=False,
        auto_find_batch_size=False,
        label_smoothing_factor=0.0,  # it is in the loss
        dataloader_num_workers=workers,
    )


def scaled(plan: Plan, stages: list[Stage], rate: float, keeps_head: bool) -> tuple[list[Stage], dict[str, float]]:
    """The stages and settings of a plan for another rate, in the way in which a given `--learning_rate` scales them."""
    factor = rate / main_rate(plan)
    head = 1.0 if keeps_head else factor

    def moved(stage: Stage) -> Stage:
        has_one_rate = stage.head_learning_rate == stage.learning_rate != plan.settings.get("head_learning_rate")
        heads = stage.head_learning_rate * (factor if has_one_rate else head)
        return replace(stage, learning_rate=stage.learning_rate * factor, head_learning_rate=heads)

    stages = [moved(stage) for stage in stages]
    given = {"learning_rate": factor, "head_learning_rate": head}
    return stages, {name: plan.settings[name] * by for name, by in given.items() if plan.settings.get(name)}


def plot(found: Sweep, width: int = _WIDTH, height: int = _HEIGHT) -> str:
    """Loss over rate for a terminal, both suggestions marked below: V and S, or * where they are one column."""
    logs = np.log10(found.rates)
    columns = np.rint((logs - logs[0]) / (logs[-1] - logs[0]) * (width - 1)).astype(int)
    losses = np.minimum(found.losses, max(2 * found.losses[0], 1.5 * min(found.losses)))
    top, bottom = losses.max(), losses.min()
    lines = np.rint((top - losses) / max(top - bottom, 1e-12) * (height - 1)).astype(int)
    canvas = [[" "] * width for _ in range(height)]
    for column, line in zip(columns, lines, strict=True):
        canvas[line][column] = "•"
    marks = [" "] * width
    for letter, rate in (("V", found.valley), ("S", found.steepest)):
        column = columns[found.rates.index(rate)]
        marks[column] = letter if marks[column] == " " else "*"
    labels = [f"{top:8.3f} ", *[" " * 9] * (height - 2), f"{bottom:8.3f} "]
    body = [f"{label}│{''.join(line).rstrip()}" for label, line in zip(labels, canvas, strict=True)]
    left, right = f"{found.rates[0]:.0e}", f"{found.rates[-1]:.0e}"
    body += [f"{' ' * 9}└{'─' * width}", f"{' ' * 10}{''.join(marks).rstrip()}"]
    return "\n".join([*body, f"{' ' * 10}{left}{right.rjust(width - len(left))}"])


def draw(found: Sweep, path: Path) -> None:
    """The picture, where matplotlib is installed; else it is said how to get it."""
    if importlib.util.find_spec("matplotlib") is None:
        say(f'{path.name} is not drawn: that needs matplotlib (pip install "hftl[plots]")')
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(found.rates, found.losses, color="0.25")
    for name, rate, colour in (("valley", found.valley, "C0"), ("steepest", found.steepest, "C1")):
        loss = found.losses[found.rates.index(rate)]
        axes.plot([rate], [loss], "o", color=colour, label=f"{name}: {rate:.2g}")
    axes.set_xscale("log")
    axes.set_ylim(top=min(max(found.losses), max(2 * found.losses[0], 1.5 * min(found.losses))) * 1.05)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("smoothed training loss")
    axes.legend()
    figure.savefig(path, dpi=120)


def report(found: Sweep) -> str:
    """The plot and both suggestions."""
    return f"{plot(found)}\n\nvalley (V):   {found.valley:.2g}\nsteepest (S): {found.steepest:.2g}"
