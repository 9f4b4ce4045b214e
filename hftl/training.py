"""One training of a plan: what the arguments leave open, the stages one after the other, the scores."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from transformers import EarlyStoppingCallback, IntervalStrategy, SchedulerType

from hftl import backbones, compute, folder, penalties
from hftl.adaptation import adapt_batch_norm
from hftl.arguments import TransferArguments, averaged_views, is_sharded, set_precision, stage_arguments
from hftl.averaging import (
    changing_tensors,
    check_averaging,
    check_length,
    interpolate,
    keep_ingredient,
    pretrained_weights,
    put,
    soup_of_runs,
)
from hftl.callbacks import EveryFewEpochs, Interrupted, LogFile, ReadableProgress, StopSignals, TimeLimit
from hftl.compute import of_all_processes, wait_for_all
from hftl.data import JOINED, Splits
from hftl.errors import Diverged, UsageError, without_worker
from hftl.feature_map import keep_features_of
from hftl.features import (
    KeptFeatures,
    check_wishes,
    headless,
    keep_features,
    longest_stage,
    mostly_frozen,
    sees_plain_rows,
)
from hftl.folder import CHECKPOINTS, LOGS, RECIPE, read_json, say
from hftl.losses import check_loss
from hftl.lr_find import PICTURE, STEPS, check_one_process, draw, report, scaled, sweep
from hftl.methods import Plan, Stage
from hftl.methods.plan import (
    epochs_between_evaluations,
    fresh_parameters,
    prepare_modules,
    whole_epochs,
    with_least_steps,
)
from hftl.probes.beside import FOLDER as PROBE
from hftl.probes.beside import Probe, load_probe
from hftl.problems import Regression, problem_of
from hftl.saving import write_run
from hftl.side_by_side import side_by_side
from hftl.tasks.classification import ClassificationTask
from hftl.trainer import TransferTrainer, diverged
from hftl.workers import data_workers, most_workers
from hftl.yaml_files import read_yaml

if TYPE_CHECKING:
    from torch import nn

#: between the name of a stage and the number of one of its runs
_RUN = ", run "
#: from the seed of one run to that of the next: seeds that people give are nearer to each other
_RUN_SEEDS = 1_000_003
#: of a solved head that a stage starts from, see `KeptFeatures.gain`: a tenth of one has 0.7 to 0.9 for texts (MiniLM),
#: 3 for photos and 11 to 19 for digits (EfficientNet-Lite0), and trains well; a random BERT's has thousands
_MOST_GAIN = 20.0
#: batches by which a stage chooses what trains: enough for an order of blocks, and done in seconds
_CHOOSING_BATCHES = 8
#: seconds behind a time limit by which a run beside another has been evaluated and written
_TO_FINISH = 60.0
#: of a stage in which the model gives no answers
_UNEVALUATED = {"eval_strategy": IntervalStrategy.NO, "load_best_model_at_end": False}


def train_plan(
    task: ClassificationTask, plan: Plan, splits: Splits, arguments: TransferArguments, callbacks: Sequence[Any] = ()
) -> Path:
    """Run the stages of a plan, evaluate, and write the run folder, which is returned."""
    settings = folder.settings_with_data(arguments, splits.fingerprint())
    limit = _limit(callbacks)
    stages, data = prepare(task, plan, splits, arguments, 1 if limit is None else limit.at_once)
    path = Path(str(arguments.output_dir))
    settings[folder.CHOSEN_PRECISION] = arguments.precision
    if arguments.resume and arguments.finds_learning_rate:
        settings[folder.FOUND_RATE] = _found_rate(path)
    wait_for_all()  # every process has checked the folder before the first one writes into it
    if folder.is_main_process():
        with folder.explained_disk_errors(path):
            folder.start_folder(arguments, settings)
    wait_for_all()
    signals = StopSignals()
    try:
        with folder.explained_disk_errors(path):
            try:
                trainer, records, results = _run_stages(
                    task, plan, stages, splits, data, [signals, *plan.callbacks, *callbacks]
                )
            except UsageError as error:
                folder.discard_start(path)
                raise without_worker(error) from None
            except Exception as error:
                if folder.disk_error(error) is None:  # behind which --resume goes on
                    folder.discard_start(path)
                raise
            results = task.of_rows(results, splits, data)
            results = task.problem.conclude(trainer.bare_model(), results, task.label_names)
            wait_for_all()  # every process has read what its stages kept, which goes when the run is written
            if folder.is_main_process():
                write_run(task, trainer, splits, data, records, results)
            wait_for_all()
    finally:
        signals.close()
    return path


def check_plan(plan: Plan, arguments: TransferArguments) -> None:
    """Refuse what a plan cannot give, before anything is written.

    Raises:
        UsageError: as said.
    """
    problem_of(arguments).check(arguments)
    check_loss(arguments)
    if plan.stages[-1].headless or any(stage.headless and stage.loss is None for stage in plan.stages):
        raise UsageError(
            f"--method {arguments.method}: a headless stage gives no answers: it needs a loss of its own, and a stage "
            "behind it."
        )
    if arguments.problem_type == Regression.name and any(stage.loss is not None for stage in plan.stages):
        raise UsageError(
            f"--method {arguments.method} brings a loss of its own, which would get numbers in another unit: give it "
            "as --loss module:function."
        )
    if arguments.finds_learning_rate:
        check_one_process(arguments)
    check_wishes(plan, arguments)
    check_averaging(plan, arguments)


def prepare(
    task: ClassificationTask, plan: Plan, splits: Splits, arguments: TransferArguments, at_once: int = 1
) -> tuple[list[Stage], dict[str, Any]]:
    """The stages with their epochs, and the data sets of the splits; what the arguments leave open is filled in.

    Args:
        task: whose arguments become these.
        plan: what trains.
        splits: the data.
        arguments: of the run.
        at_once: trainings that will stand on the disk side by side.

    Raises:
        UsageError: something that was asked for cannot be done, or the disk is too small.
    """
    task.arguments = arguments
    check_plan(plan, arguments)
    stages = _resolve(task, plan, splits, arguments)
    path = Path(str(arguments.output_dir))
    folder.check_space(path, bytes_needed(plan, arguments, at_once))
    AcceleratorState._reset_state()  # or another run in this process would dictate its precision
    compute.share_threads(on_cpu=arguments.device.type == "cpu")
    data: dict[str, Any] = {"train": task.dataset(splits.train, training=True)}
    for name, rows in (("validation", splits.validation), ("test", splits.test)):
        if rows is not None:
            data[name] = task.dataset(rows, training=False)
    backbones.to_channels_last(plan.model)
    if isinstance(task.problem, Regression):
        few = range(min(2, len(data["validation"])))
        task.problem.check_model(plan.model, task.collate([data["validation"][row] for row in few]))
    if any(stage.batch_norm == "adapt" for stage in stages):
        adapt_batch_norm(task, plan.model, splits)
        for stage in stages:
            if stage.reference is not None:  # what a penalty compares with has the same statistics
                stage.reference.load_state_dict(dict(plan.model.named_buffers()), strict=False)
    longest = longest_stage(stages, plan.model)
    if arguments.device.type == "cpu" and not mostly_frozen(longest, plan.model):
        compute.keep_freed_memory()
    _settle_precision(task, longest, plan.model, data["train"], splits)
    return stages, data


def _found_rate(path: Path) -> float | None:
    """What `--learning_rate auto` found before an interruption; None if that came before."""
    return read_yaml(path / CHECKPOINTS / RECIPE).get(folder.FOUND_RATE)


def searched_stage(plan: Plan, arguments: TransferArguments) -> int:
    """Number of the stage at whose beginning `--learning_rate auto` looks for the rate: the first beyond the head.

    A range test with a head that knows nothing would find the rate of the head: in `lp_ft` the second stage's rate is
    chosen from where the first ends.
    """
    fresh = set(fresh_parameters(plan.model, arguments))
    return next((number for number, stage in enumerate(plan.stages) if not stage.trainable <= fresh), 0)


def reach_searched_stage(
    task: ClassificationTask, plan: Plan, stages: list[Stage], splits: Splits, data: dict[str, Any]
) -> Stage:
    """The stage of `searched_stage`, once those before it are trained."""
    number = searched_stage(plan, task.arguments)
    if number:
        Path(str(task.arguments.output_dir), LOGS).mkdir(parents=True)
        _run_stages(task, plan, stages, splits, data, plan.callbacks, until=number)
    return stages[number]


def _with_rate(
    task: ClassificationTask,
    plan: Plan,
    stages: list[Stage],
    splits: Splits,
    data: dict[str, Any],
    keeps_head: bool,
) -> list[Stage]:
    """Stages, of which the first begins now, at the rate in the valley; an interrupted run keeps what it found.

    The head's rate stays where an earlier stage has had it: the recipe has one for all, and is to repeat the run.
    """
    arguments = task.arguments
    path = Path(str(arguments.output_dir))
    rate = _found_rate(path)
    if rate is None:
        say(f"learning rate: {STEPS} steps with a growing rate")
        found = sweep(task, plan, stages[0], splits, data)
        say(report(found))
        draw(found, path / LOGS / PICTURE)
        rate = float(f"{found.valley:.2g}")  # as it is said, so that giving it repeats the run
        folder.remember(path, folder.FOUND_RATE, rate)
    stages, changed = scaled(plan, stages, rate, keeps_head=keeps_head or "head_learning_rate" in arguments.given)
    for name, value in changed.items():
        setattr(arguments, name, value)
    return stages


def _resolve(task: ClassificationTask, plan: Plan, splits: Splits, arguments: TransferArguments) -> list[Stage]:
    """Fill in what the arguments leave open, and the epochs of each stage."""
    arguments.per_device_train_batch_size = task.rows_a_batch
    arguments.metric_for_best_model, better = task.best_metric(splits)
    arguments.greater_is_better = better  # type: ignore[assignment]
    rows = task.rows_a_step
    steps = math.ceil(len(splits.train) / rows)
    if arguments.dataloader_drop_last and len(splits.train) < rows:
        raise UsageError(f"--dataloader_drop_last leaves none of {len(splits.train)} rows in batches of {rows}.")
    if arguments.dataloader_prefetch_factor is not None and not most_workers(task):
        raise UsageError("--dataloader_prefetch_factor is for data workers, and there are none: leave it out.")
    stages = [with_least_steps(stage, steps) for stage in plan.stages]
    check_length(stages[-1], len(splits.train) // rows if arguments.dataloader_drop_last else steps, arguments)
    if arguments.soup_runs > 1:
        last = stages.pop()
        runs = range(1, arguments.soup_runs + 1)
        stages += [dataclasses.replace(last, name=f"{last.name}{_RUN}{run}") for run in runs]
    for name, value in plan.settings.items():
        setattr(arguments, name, value)
    epochs = plan.settings.get("num_train_epochs", stages[-1].epochs)
    arguments.num_train_epochs = epochs or None  # of a stage that only scores there are none to repeat
    if arguments.eval_strategy == "epoch":
        arguments.eval_epochs = arguments.eval_epochs or epochs_between_evaluations(stages[-1])
    if arguments.average == "swa" and "lr_scheduler_type" not in arguments.given:
        # A rate that falls to nothing would leave nothing to average (Izmailov et al. 2018, section 3.2).
        arguments.lr_scheduler_type = SchedulerType.CONSTANT_WITH_WARMUP
    if arguments.head_epochs is not None:
        arguments.head_epochs = stages[0].epochs
    for role, column in splits.columns.items():
        if hasattr(arguments, f"{role}_column") and not getattr(arguments, JOINED.get(role, ""), None):
            setattr(arguments, f"{role}_column", column)
    return stages


def _settle_precision(task: ClassificationTask, stage: Stage, model: nn.Module, rows: Any, splits: Splits) -> None:
    """Choose the precision of the whole run by its longest stage; an interrupted run keeps its own.

    Accelerate knows one precision a process, and one is what the recipe can say.
    """
    arguments = task.arguments
    checks = arguments.bf16_is_unasked and not is_sharded(arguments)  # no process may have room for the whole model
    measures = arguments.precision == "auto" and arguments.mixed_precision == "no"  # fp8: the launcher asks for it
    if not checks and not measures:
        return
    if arguments.resume:
        path = Path(str(arguments.output_dir), CHECKPOINTS, RECIPE)
        precision = read_yaml(path)[folder.CHOSEN_PRECISION]
    else:
        prepare_modules(model, stage)
        batch = compute.typical_batch(rows, task.collate)
        loss = task.loss(splits) if stage.headless else stage.loss or task.loss(splits)
        if checks:
            on_device = {name: value.to(arguments.device) for name, value in batch.items()}
            precision = compute.checked_bf16(model.to(arguments.device), on_device, loss)
        else:
            rows_given = arguments.max_steps * task.rows_a_step
            precision = compute.choose_precision(
                model,
                batch,
                loss,
                training=not mostly_frozen(stage, model),
                rows=(rows_given if arguments.max_steps > 0 else len(rows) * stage.epochs) / arguments.world_size,
                arguments=arguments,
            )
    set_precision(arguments, precision)


def _limit(callbacks: Sequence[Any]) -> TimeLimit | None:
    return next((callback for callback in callbacks if isinstance(callback, TimeLimit)), None)


def bytes_needed(plan: Plan, arguments: TransferArguments, at_once: int = 1) -> int:
    """Disk for three checkpoints (best, last, the one being written) with two moments each, and two whole models.

    Trainings side by side have three checkpoints each.
    """
    parameters = list(plan.model.parameters())
    everything = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    names = set().union(*(stage.trainable for stage in plan.stages))
    trained = sum(4 * parameter.numel() for name, parameter in plan.model.named_parameters() if name in names)
    kept = trained if hasattr(plan.model, "peft_config") else everything
    averages = 3 * trained if arguments.average != "none" else 0  # in each checkpoint, or the three of a soup
    runs = (arguments.soup_runs - 1) * (kept + trained) + trained if arguments.soup_runs > 1 else 0
    return at_once * 3 * (kept + 2 * trained) + 2 * everything + averages + runs


def _run_stages(
    task: ClassificationTask,
    plan: Plan,
    stages: list[Stage],
    splits: Splits,
    data: dict[str, Any],
    callbacks: Sequence[Any],
    until: int | None = None,
) -> tuple[TransferTrainer, list[dict[str, Any]], dict[str, Any]]:
    """Train every stage that is not finished yet, or those before `until`; the results are those of the last one."""
    model = plan.model
    records: list[dict[str, Any]] = []
    results: dict[str, Any] = {}
    apart: set[int] = set()  # numbers of the runs that other processes train
    finals: list[Path] = []
    pretrained = pretrained_weights(plan) if task.arguments.wise_ft else {}
    searched = searched_stage(plan, task.arguments) if task.arguments.finds_learning_rate else None
    limit = _limit(callbacks)
    at_once = 1 if limit is None else limit.at_once

    @functools.cache
    def inputs(plain: bool) -> dict[str, Any]:
        view = {"train": task.views(splits.train, 1, data["train"])[0]} if plain else {}
        return task.kept_for_epochs(data | view)

    start: dict[str, torch.Tensor] = {}
    first_run = len(stages) - task.arguments.soup_runs  # of the last stage, which mostly has one
    begin_together = range(first_run, len(stages), at_once)  # runs, each with those behind it

    def train(
        index: int, after: contextlib.ExitStack, beside: str = "", held: int = 0
    ) -> tuple[TransferTrainer, KeptFeatures | None, Any, Path]:
        """Train a stage, or load it: its trainer, what is kept for it, its rows, and the folder of its result.

        In a process beside that of another run, what the record says of it: its name, and what both hold in common.
        """
        stage, is_last = stages[index], index + 1 == len(stages)
        kept = keep_features(task, stage, model, splits, data, alone=len(stages) == 1, last=is_last)
        stage = stage if kept is None else kept.stage
        rows = inputs(sees_plain_rows(task, stage, model)) if kept is None else kept.data
        if kept is not None:
            after.callback(kept.release)  # also where the stage fails, or a second fit would keep what stubs give
        if stage.headless:
            after.enter_context(headless(task, model, data["train"]))
        trainer = _stage_trainer(task, stage, model, splits, rows, index, kept, run=index - first_run)
        after.callback(trainer.end_workers)
        _check_sharding(task.arguments, trainer, plan)
        for callback in callbacks:
            trainer.add_callback(callback)
        final = Path(str(trainer.args.output_dir), "final")
        if final.is_dir():
            trainer._load_from_checkpoint(str(final))
            if kept is not None:
                kept.probe = load_probe(final / PROBE)
        elif index not in apart:
            say(_announcement(stage, model, index, len(stages), task.arguments.max_steps, kept))
            try:
                record = _stage_record(task, trainer, stage, kept)
            except (Diverged, torch.OutOfMemoryError) as error:
                is_spare = limit is not None or isinstance(error, Diverged)
                if index <= first_run or not is_spare:  # the last stage needs a run that comes to its end
                    raise
                say(f"{stage.name} is left out: {error}")
            else:
                if beside:
                    record |= {"beside": beside, "peak_memory_mb": (compute.peak_memory() - held) / 1e6}
                _keep_result(trainer, record, final, None if kept is None else kept.probe, as_ingredient=bool(start))
        return trainer, kept, rows, final

    def train_apart(index: int, beside: str) -> None:
        """Train a run in a process of its own."""
        held = compute.peak_memory()
        apart.discard(index)
        for callback in callbacks:
            if isinstance(callback, StopSignals):
                callback.listen_here()
        stages[index] = _chosen(task, stages[index], model, splits, taught=min(index, first_run) > 0)
        try:
            with contextlib.ExitStack() as after:
                train(index, after, beside, held)
        except Interrupted as signal:
            raise SystemExit(128 + signal.number) from None

    for index in range(len(stages)):
        is_last = index + 1 == len(stages)
        if records and "penalty" in records[-1]:
            backbones.scale_output_layer(model, _head_scale(stages[index], records[-1].get("gain", 0.0)))
        if index == first_run and not is_last:
            start = {
                name: tensor.to("cpu", copy=True) for name, tensor in changing_tensors(model, stages[index]).items()
            }
        elif start:
            put(changing_tensors(model, stages[index]), start)
        stages[index] = _chosen(task, stages[index], model, splits, taught=min(index, first_run) > 0)
        if index == until:
            break
        if index == searched:
            trained = any("learning_rate" in record for record in records)  # a head that was not solved
            stages[index:] = _with_rate(task, plan, stages[index:], splits, data, keeps_head=trained)
        others = _others(task.arguments, stages, index, at_once) if index in begin_together else []
        apart.update(others)
        if others:
            inputs(sees_plain_rows(task, stages[index], model))  # once for all of them
        with contextlib.ExitStack() as after:
            with side_by_side(1 + len(others)) as processes:
                for other in others:
                    processes.begin(other, functools.partial(train_apart, other, stages[index].name))
                trainer, kept, rows, final = train(index, after)
                codes = processes.wait(math.inf if limit is None else limit.until + _TO_FINISH)
            for other in (other for other, code in codes.items() if code):
                say(f"{stages[other].name} is left out: its process ended with {codes[other]}")
            if final.is_dir():
                records.append(read_json(final / folder.STAGE_RECORD))
                finals.append(final)
            if start and limit is not None and not is_last and index + 1 in begin_together:
                is_last = not _plan_further_runs(task.arguments, stages, index + 1, records[-1], limit)
            if is_last and start and finals[first_run:] != [final]:
                records[-1] |= soup_of_runs(trainer, finals[first_run:])
            if is_last and pretrained:
                records[-1] |= interpolate(trainer, pretrained)
            if is_last and averaged_views(task.arguments):
                if kept is not None:
                    kept.release()
                results = _evaluate_views(task, trainer, data)
            elif is_last:
                results = _evaluate(task, trainer, rows, kept)
            is_shown = is_last and task.problem.is_one_of_several and folder.is_main_process()
            if is_shown and kept is not None and kept.solved:
                keep_features_of(kept.data, Path(str(task.arguments.output_dir), LOGS))
        if is_last:
            break
        trainer.bare_model()  # the next trainer puts its own around the model
    if start and limit is not None:
        task.arguments.soup_runs = len(finals[first_run:])  # so that the recipe says how many there were
    return trainer, records, results


def _others(arguments: TransferArguments, stages: list[Stage], index: int, at_once: int) -> list[int]:
    """Numbers of the runs that are to train beside one of a number, where it is to train itself."""
    group = [
        number
        for number in range(index, min(index + at_once, len(stages)))
        if not (_place(arguments, stages[number], number) / "final").is_dir()
    ]
    return group[1:] if group[:1] == [index] else []


def _plan_further_runs(
    arguments: TransferArguments, stages: list[Stage], index: int, last: dict[str, Any], limit: TimeLimit
) -> bool:
    """Give the next runs, as many as train at once, the epochs that there is time for; whether it is enough for one.

    By what an epoch of the last run took; no more of them than the stage has. A run that an interruption left with a
    checkpoint, or finished, keeps its own. Runs for which there is no time are taken off the stages.
    """
    for number in range(index, min(index + limit.at_once, len(stages))):
        place = _place(arguments, stages[number], number)
        known = place / "epochs.json"
        if folder.last_checkpoint(place) is None and not (place / "final").is_dir():
            epochs = min(stages[number].epochs, whole_epochs(limit.epochs_left(last["seconds_an_epoch"])))
            if epochs < limit.least_epochs:
                say(f"{stages[number].name}: there is no time for it")
                del stages[number:]
                break
            place.mkdir(parents=True, exist_ok=True)
            folder.write_json(known, epochs)
        if known.is_file():
            stages[number] = dataclasses.replace(stages[number], epochs=read_json(known))
    return len(stages) > index


def _place(arguments: TransferArguments, stage: Stage, index: int) -> Path:
    """Where the checkpoints of a stage stand."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", stage.name)
    return Path(str(arguments.output_dir), CHECKPOINTS, f"{index + 1}-{name}")


def _chosen(task: ClassificationTask, stage: Stage, model: nn.Module, splits: Splits, taught: bool) -> Stage:
    """The stage with what it chooses by a few batches, the same ones for all processes and after a resume.

    That is what trains, and where the head has been `taught` the weights of the channels that DELTA compares.
    """
    weighs = taught and stage.penalty is penalties.delta
    if stage.choose is None and not weighs:
        return stage
    arguments = task.arguments
    size = task.rows_a_batch
    order = np.random.default_rng(arguments.seed).permutation(len(splits.train))[: _CHOOSING_BATCHES * size]
    dataset = task.dataset(splits.train.select(order), training=False)
    rows = [dataset[row] for row in range(len(order))]
    batches = [task.collate(rows[start : start + size]) for start in range(0, len(rows), size)]
    batches = [{name: value.to(arguments.device) for name, value in batch.items()} for batch in batches]
    loss = stage.loss or task.loss(splits)
    model.to(arguments.device).eval()
    if weighs:
        with compute.autocast(arguments.precision, arguments.device):
            weights = penalties.channel_weights(model, loss, batches)
        stage = dataclasses.replace(stage, channel_weights=of_all_processes(weights)[0])
    if stage.choose is None:
        return stage
    name, trainable = stage.choose(model, loss, batches, stage.trainable)
    name, trainable = of_all_processes((name, trainable))[0]
    _, comma, run = stage.name.rpartition(_RUN)
    return dataclasses.replace(stage, name=f"{name}{comma}{run}" if comma else name, trainable=trainable, choose=None)


def _announcement(
    stage: Stage, model: nn.Module, index: int, count: int, max_steps: int, kept: KeptFeatures | None
) -> str:
    length = f"{stage.epochs:g} epoch{'' if stage.epochs == 1 else 's'}" if max_steps < 0 else f"{max_steps} steps"
    trained = sum(parameter.numel() for name, parameter in model.named_parameters() if name in stage.trainable)
    total = sum(parameter.numel() for parameter in model.parameters())
    number = f" {index + 1} of {count}" if count > 1 else ""
    how = f"{length}, rate {stage.learning_rate:.2g}"
    how += "" if stage.headless else f", head {stage.head_learning_rate:.2g}"
    if kept is not None and kept.solved:
        how = "solved on the features"
    if not stage.trainable:
        return f"stage{number}: {stage.name}, none of {total:,} parameters train"
    return f"stage{number}: {stage.name}, {trained:,} of {total:,} parameters train ({trained / total:.1%}), {how}"


def _stage_trainer(
    task: ClassificationTask,
    stage: Stage,
    model: nn.Module,
    splits: Splits,
    data: dict[str, Any],
    index: int,
    kept: KeptFeatures | None,
    run: int,
) -> TransferTrainer:
    arguments = task.arguments
    place = _place(arguments, stage, index)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(str(arguments.output_dir), LOGS))
    workers = 0 if kept else data_workers(task, stage, model, data["train"], splits)  # nothing is left to decode
    settings = stage_arguments(
        arguments,
        output_dir=str(place),
        num_train_epochs=stage.epochs,
        learning_rate=stage.learning_rate,
        seed=arguments.seed + index + _RUN_SEEDS * max(run, 0),  # another order in each stage and run
        push_to_hub=False,  # the finished run is pushed, not its checkpoints
        disable_tqdm=True,  # our own progress takes the place of Trainer's
        label_smoothing_factor=0.0,  # it is in the loss
        dataloader_num_workers=workers,
        dataloader_prefetch_factor=arguments.dataloader_prefetch_factor if workers else None,
        dataloader_persistent_workers=workers > 0,
        restore_callback_states_from_checkpoint=True,  # or early stopping would count anew after an interruption
        **(_UNEVALUATED if stage.headless else {}),
    )
    callbacks: list[Any] = [
        EveryFewEpochs(arguments.eval_epochs or 1),
        ReadableProgress(stage.name, task.problem.headline),
        LogFile(Path(str(arguments.output_dir), LOGS, "log.jsonl"), stage.name),
    ]
    if arguments.early_stopping_patience and not stage.headless:
        callbacks.append(EarlyStoppingCallback(arguments.early_stopping_patience))
    validation = data["validation"] if kept else task.test_data(data["validation"])
    trainer: TransferTrainer = TransferTrainer(
        stage=stage,
        loss=stage.loss or task.loss(splits),
        model=model,
        args=settings,
        train_dataset=data["train"],
        eval_dataset=validation,
        data_collator=kept.collate if kept else task.collate,
        cut=kept.cut if kept else None,
        items=task.problem.items,
        mixing=None if stage.headless else task.mixing(),
        average=arguments.average if run >= 0 else "none",
        compute_metrics=lambda result: _finite_scores(task, stage, place, result, trainer.evaluated),
        preprocess_logits_for_metrics=_first,
        callbacks=callbacks,
    )
    # Windows are other parts of a row, without which the best weights would be chosen blindly; a mirror image shows the
    # same, and would double each evaluation for little.
    if validation is not data["validation"]:
        trainer.test_views = task.test_views
    return trainer


def _finite_scores(task: ClassificationTask, stage: Stage, place: Path, result: Any, split: str) -> dict[str, float]:
    """Scores of an evaluation; before its checkpoint is written, a model that gives no numbers stops the run."""
    if not np.isfinite(result.predictions).all():
        raise diverged(f"The model's outputs are no finite numbers after training in stage {stage.name!r}", str(place))
    scores = task.score(result.predictions, result.label_ids)
    if split != "test":
        task.choosing_score({"loss": 0.0, **scores})  # which Trainer adds
    return scores


def _first(logits: Any, labels: Any) -> torch.Tensor:
    """Models that give more than logits put them first."""
    return logits[0] if isinstance(logits, tuple | list) else logits


def _stage_record(
    task: ClassificationTask, trainer: TransferTrainer, stage: Stage, kept: KeptFeatures | None
) -> dict[str, Any]:
    """Solve the head or train the stage; what metrics.json says of it."""
    if kept is not None and kept.solved:
        return _solve_stage(task, trainer, kept)
    if not stage.trainable:
        return _score_stage(trainer, stage)
    return _train_stage(trainer, stage, task.arguments.resume, 0.0 if kept is None else kept.seconds)


def _train_stage(trainer: TransferTrainer, stage: Stage, resume: bool, preparing: float) -> dict[str, Any]:
    """Train one stage, from its last whole checkpoint if there is one; its features took seconds of `preparing`.

    Weights of its steps or epochs are averaged behind it.
    """
    place = Path(str(trainer.args.output_dir))
    wait_for_all()
    checkpoint = folder.last_checkpoint(place) if resume and place.is_dir() else None
    wait_for_all()  # nobody may write a new checkpoint while another still looks for the last
    if checkpoint is not None:
        say(f"going on from {checkpoint.name} of stage {stage.name!r}")
    started = time.perf_counter()
    output = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    averaged = {} if trainer.average is None else trainer.average.finish()
    trained = time.perf_counter() - started
    seconds = trained + preparing
    share = max(1, trainer.state.global_step - trainer._initial_global_step) / trainer.state.global_step
    runtime = output.metrics["train_runtime"]
    patience = trainer.args.early_stopping_patience
    if patience and not stage.headless and trainer.state.global_step < trainer.state.max_steps:
        say(f"{stage.name}: stopped early, no better evaluation in {patience}")
    return {
        "name": stage.name,
        "seconds": seconds,
        "seconds_an_epoch": trained / (trainer.state.epoch * share),  # without what was before an interruption
        "samples_per_second": output.metrics["train_samples_per_second"] * runtime / (runtime + preparing),
        "steps": trainer.state.global_step,
        "planned_steps": trainer.state.max_steps,
        "epochs": stage.epochs,
        "rows_a_step": trainer.rows_together * trainer.args.world_size,
        "learning_rate": stage.learning_rate,
        **({} if stage.headless else {"head_learning_rate": stage.head_learning_rate}),
        "best_metric": trainer.state.best_metric,
        **averaged,
        **_parameters(trainer),
    }


def _head_scale(stage: Stage, gain: float) -> float:
    """What a solved head is multiplied with when `stage` begins: its scale, or less where a step would go too far.

    Where features hardly vary, a solved head has huge weights, and the first step of the backbone blows the loss up.
    """
    scale = stage.solved_head_scale
    return scale if scale >= 1 else min(scale, _MOST_GAIN / max(gain, _MOST_GAIN))


def _solve_stage(task: ClassificationTask, trainer: TransferTrainer, kept: KeptFeatures) -> dict[str, Any]:
    """Solve the head on the features of train, its penalty chosen on those of validation."""
    started = time.perf_counter()
    solution = kept.solve(trainer)
    seconds = time.perf_counter() - started
    logits, labels = kept.logits("validation")
    scores = {
        f"eval_{name}": value for name, value in scores_of(task, trainer.compute_loss_func, logits, labels).items()
    }
    stays = math.isinf(solution.strength)  # no penalty gave a better head than the one that knew the classes
    solved: dict[str, Any] = {"head": "as it was" if stays else task.arguments.head or task.problem.head}
    solved |= {} if stays else {"penalty": solution.strength, "gain": kept.gain}
    trainer.log({**scores, **solved, "seconds": seconds})
    return {
        "name": trainer.stage.name,
        "seconds": seconds + kept.seconds,
        "samples_per_second": len(kept.data["train"]) / (seconds + kept.seconds),
        "steps": solution.steps,
        "epochs": 1,
        **solved,
        **({} if solution.temperature is None else {"temperature": solution.temperature}),
        **({} if kept.probe is None else {"probe": kept.probe.settings}),
        "best_metric": scores[f"eval_{trainer.args.metric_for_best_model}"],
        **_parameters(trainer),
    }


def _score_stage(trainer: TransferTrainer, stage: Stage) -> dict[str, Any]:
    """Nothing trains: the model is scored on validation as it is."""
    started = time.perf_counter()
    score, _ = trainer.validate()
    seconds = time.perf_counter() - started
    scores = (trainer.chosen_evaluation.metrics or {}).items()
    trainer.log({name.replace("validation_", "eval_", 1): value for name, value in scores} | {"seconds": seconds})
    return {
        "name": stage.name,
        "seconds": seconds,
        "samples_per_second": len(trainer.eval_dataset) / seconds,
        "steps": 0,
        "epochs": 0,
        "best_metric": score,
        **_parameters(trainer),
    }


def _parameters(trainer: TransferTrainer) -> dict[str, Any]:
    """How many train in this stage and how many there are: in all, and of each block from the input on."""
    model: Any = trainer.model
    if trainer.is_sharded:  # no process knows the blocks
        return {
            "trainable_parameters": sum(entry.numel() for entry in model.parameters() if entry.requires_grad),
            "total_parameters": sum(entry.numel() for entry in model.parameters()),
        }
    parts, block_of = backbones.structure(model), backbones.parameter_blocks(model)
    blocks = [{"name": names[0], "trainable": 0, "total": 0} for names in (*parts.blocks, parts.head)]
    for name, parameter in model.named_parameters():
        block = blocks[block_of[name]]
        block["total"] += parameter.numel()
        block["trainable"] += parameter.numel() * parameter.requires_grad
    return {
        "trainable_parameters": sum(block["trainable"] for block in blocks),
        "total_parameters": sum(block["total"] for block in blocks),
        "blocks": blocks,
    }


def scores_of(task: ClassificationTask, loss: Any, logits: Any, labels: Any) -> dict[str, float]:
    """The task's scores and the loss of a whole split."""
    found, wanted = task.problem.comparable(logits, labels)
    value = loss({"logits": torch.from_numpy(found)}, torch.from_numpy(wanted))
    return {"loss": float(value), **task.score(logits, labels)}


def _keep_result(
    trainer: TransferTrainer, record: dict[str, Any], final: Path, probe: Probe | None, as_ingredient: bool
) -> None:
    """Keep the weights that a stage ends with: the next one starts from them, also after an interruption."""
    partial = final.with_name("final.partial")
    if folder.is_main_process():
        shutil.rmtree(partial, ignore_errors=True)
    wait_for_all()
    trainer.save_model(str(partial))
    if as_ingredient:
        keep_ingredient(trainer, partial)
    if folder.is_main_process():
        if probe is not None:
            probe.save(partial / PROBE)
        folder.write_json(partial / folder.STAGE_RECORD, record)
        os.replace(partial, final)
        for path in (*final.parent.glob("checkpoint-*"), *final.parent.glob("soup")):
            if not trainer.args.keep_checkpoints:
                shutil.rmtree(path)
    wait_for_all()


def _evaluate_views(
    task: ClassificationTask, trainer: TransferTrainer, data: dict[str, Any]
) -> dict[str, tuple[Any, Any, dict[str, float]]]:
    """As `_evaluate`, of several views of each row, which need the whole model and the inputs."""
    if trainer.test_views != task.test_views:  # what was evaluated is of one view
        trainer.evaluations, trainer.chosen_evaluation = {}, None
    trainer.cut, trainer.data_collator, trainer.test_views = None, task.collate, task.test_views
    return _evaluate(task, trainer, {name: task.test_data(dataset) for name, dataset in data.items()}, None)


def _evaluate(
    task: ClassificationTask, trainer: TransferTrainer, data: dict[str, Any], kept: KeptFeatures | None
) -> dict[str, tuple[Any, Any, dict[str, float]]]:
    """Logits, labels and scores of validation and test; gathered from all processes."""
    results: dict[str, tuple[Any, Any, dict[str, float]]] = {}
    for name in ("validation", "test"):
        if name in data and kept is not None and kept.solved:
            logits, labels = kept.logits(name)
            results[name] = (logits, labels, scores_of(task, trainer.compute_loss_func, logits, labels))
            if kept.probe is not None:
                logits, _ = kept.logits(name, ordinary=True)
                scores = scores_of(task, trainer.compute_loss_func, logits, labels)
                results[f"ordinary_head_{name}"] = (logits, labels, scores)
        elif name in data:
            output = trainer.evaluation_of_the_best if name == "validation" else None
            output = output or trainer.predict(data[name], metric_key_prefix=name)
            scores = {
                key.removeprefix(f"{name}_").removeprefix("eval_"): value
                for key, value in (output.metrics or {}).items()
                if not key.endswith(("_runtime", "_per_second", "_model_preparation_time")) and key != "epoch"
            }
            results[name] = (output.predictions, output.label_ids, scores)
    return results


def _check_sharding(arguments: TransferArguments, trainer: TransferTrainer, plan: Plan) -> None:
    """Refuse what needs whole weights in each process, where they are sharded.

    Raises:
        UsageError: as said.
    """
    if not trainer.is_sharded:
        return
    needs_all = {
        "--problem_type regression": arguments.problem_type == "regression",
        f"--method {arguments.method}": hasattr(plan.model, "peft_config"),
        "--method surgical": any(stage.choose is not None for stage in plan.stages),
        "--method setfit": any(stage.headless for stage in plan.stages),
        "--penalty": any(stage.penalty is not None for stage in plan.stages),
    }
    for what in (name for name, found in needs_all.items() if found):
        raise UsageError(f"{what} does not work with FSDP or DeepSpeed yet: use multi_gpu.yaml.")
    if arguments.average != "none" or arguments.wise_ft or arguments.soup_runs > 1:
        flag = "--wise_ft" if arguments.wise_ft else f"--average {arguments.average}"
        flag = "--soup_runs" if arguments.soup_runs > 1 else flag
        raise UsageError(
            f"{flag} needs whole weights in each process, not those of FSDP or DeepSpeed: use multi_gpu.yaml."
        )
