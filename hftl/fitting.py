"""From a plan to a finished run: one training, or several of which the best one stands."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hftl import backbones, folder, merging
from hftl.answers import write_answers
from hftl.arguments import TransferArguments, parse, stage_arguments
from hftl.auto import TRIALS, check, search
from hftl.callbacks import StopSignals
from hftl.compute import wait_for_all
from hftl.data import Splits, labels_of
from hftl.errors import UsageError
from hftl.folder import FOUND_IN_DATA, LOGS, METRICS, PREDICTIONS, say
from hftl.known_rows import look, read_splits
from hftl.lr_find import FEWEST, check_one_process, draw, report, sweep
from hftl.methods import Plan, build_plan
from hftl.repeats import repeat
from hftl.report import write_report
from hftl.run import Run, load_run
from hftl.tasks import find_task
from hftl.tasks.classification import ClassificationTask
from hftl.training import prepare, reach_searched_stage, scores_of, train_plan


def fit(task: ClassificationTask, plan: Plan, splits: Splits, arguments: TransferArguments) -> Run:
    """Run the stages of a plan, evaluate, and write the run folder.

    Args:
        task: what is predicted from what; its model is the plan's.
        plan: the model and its stages.
        splits: the data with its label map.
        arguments: the settings; those left open are resolved in place.

    Returns:
        The finished run.

    Raises:
        UsageError: something that was asked for cannot be done.
        Interrupted: SIGTERM or Ctrl-C; a checkpoint to go on from is written.
    """
    saves = _pushes(arguments) if arguments.push_to_hub else []
    _say_what_stays(arguments)
    if arguments.method == "auto":
        run = _search(task, plan, splits, arguments)
    elif arguments.repeats > 1:
        run = _repeat(task, plan, splits, arguments)
    else:
        path = train_plan(task, plan, splits, arguments, saves)
        # What several processes share out, or an adapter is around, is read from the folder when it is needed.
        apart = arguments.world_size > 1 or (path / merging.BASE).is_dir()
        run = Run(path, task, None if apart else backbones.without_adapters(plan.model))
    conclude(run, splits, arguments)
    return run


def _pushes(arguments: TransferArguments) -> list[Any]:
    """What pushes the checkpoints, where that was asked for.

    Raises:
        UsageError: the run may not be pushed.
    """
    from hftl.push import PushSaves, check_base  # no other training waits for what it needs

    check_base(arguments)
    return [PushSaves(arguments)] if arguments.hub_strategy == "every_save" else []


def conclude(run: Run, splits: Splits, arguments: TransferArguments) -> None:
    """What comes when the run is whole: its summary, the report, the push to the Hub where that was asked for."""
    if not folder.is_main_process():
        return
    say(run.summary())
    examples = None
    if run.is_one_of_several:
        # Another seed may have drawn other rows.
        examples = look(run, read_splits(run) if arguments.repeats > 1 else splits)
    say(f"report:     {write_report(run, examples)}")
    if arguments.push_to_hub:
        where = {"private": arguments.hub_private_repo, "revision": arguments.hub_revision}
        say(f"pushed to:  {run.push(folder.repository_of(arguments), token=arguments.hub_token, **where)}")


def _search(task: ClassificationTask, plan: Plan, splits: Splits, arguments: TransferArguments) -> Run:
    """`--method auto`: the best run that fits into the time, scored on test once it is chosen."""
    check(arguments)
    settings = folder.settings_with_data(arguments, splits.fingerprint())
    path = Path(str(arguments.output_dir))
    signals = StopSignals()
    try:
        with folder.explained_disk_errors(path):
            folder.start_folder(arguments, settings)
            try:
                search(task, plan, splits, arguments)
            except UsageError:
                if not (path / METRICS).is_file():  # not even the first rung
                    folder.discard_first(path, TRIALS)
                raise
            run = score_on_test(type(task), splits, arguments)
            folder.finish(path)
    finally:
        signals.close()
    return run


def _repeat(task: ClassificationTask, plan: Plan, splits: Splits, arguments: TransferArguments) -> Run:
    """`--repeats`: the best run on validation, with the scores of all."""
    from hftl.card import write_card

    path = Path(str(arguments.output_dir))
    with folder.explained_disk_errors(path):
        repeat(task, plan, splits, arguments)
        run = load_run(path, type(task))
        if folder.is_main_process():
            write_card(path, run.task, run.task.arguments, splits, run.metrics)
            folder.finish(path)
    wait_for_all()
    return run


def _say_what_stays(arguments: TransferArguments) -> None:
    """A recipe has the rates and epochs that its method chose too; beside another method they stay as given."""
    names = ("learning_rate", "head_learning_rate", "num_train_epochs")
    kept = [f"{name} {getattr(arguments, name):g}" for name in names if name in arguments.given - arguments.typed]
    if arguments.old_method and kept and arguments.method != "auto":
        say(f"from the configuration of --method {arguments.old_method}: {', '.join(kept)} (or give others)")


def score_on_test(task_class: type[ClassificationTask], splits: Splits, arguments: TransferArguments) -> Run:
    """The run in the folder of a search, scored on the test split, which nothing before has seen."""
    from hftl.card import write_card

    path = Path(str(arguments.output_dir))
    run = load_run(path, task_class)
    if splits.test is not None:
        logits, labels = run.logits(splits.test), labels_of(splits.test)
        scores = scores_of(run.task, run.task.loss(splits), logits, labels)
        write_answers(path / PREDICTIONS, run.task.problem, splits, "test", logits, labels)
        run.metrics["test"] = scores
        if run.probe is not None:
            plain = Run(path, run.task, run.model)  # whose own head answers
            plain.probe = None
            run.metrics["ordinary_head_test"] = scores_of(
                run.task, run.task.loss(splits), plain.logits(splits.test), labels
            )
        folder.write_json(path / METRICS, run.metrics)
    write_card(path, run.task, run.task.arguments, splits, run.metrics)
    folder.write_json(path / LOGS / FOUND_IN_DATA, splits.found())  # that of a trial knows no test split
    return run


def find_learning_rate(task_name: str, tokens: Sequence[str], output: Path, steps: int) -> None:
    """`hftl lr-find`: the range test, behind the stage of the head where there is one; only the picture is saved.

    Raises:
        UsageError: bad input.
    """
    if steps < FEWEST:
        raise UsageError(f"--steps {steps} are too few for a curve: take {FEWEST} or more.")
    task_class = find_task(task_name)
    arguments = parse(task_class.arguments_class, tokens)
    if "output_dir" in arguments.typed:
        raise UsageError("--output_dir: hftl lr-find writes no run but a picture. Name that with --output.")
    folder.check_not_data(output, arguments.dataset_name)
    # A rate is what is looked for: a head alone is then trained, not solved.
    object.__setattr__(arguments, "given", arguments.given | {"learning_rate"})
    arguments = stage_arguments(arguments, report_to=[])
    check_one_process(arguments)
    if arguments.method == "auto":
        raise UsageError("--method auto chooses its rates itself. Name a method.")
    if arguments.method == "zero_shot":
        raise UsageError("--method zero_shot trains nothing, and has no rate. Name another method.")
    if arguments.method == "setfit":
        raise UsageError("--method setfit has no loss of answers, which a range test needs. Name another method.")
    with tempfile.TemporaryDirectory() as place:
        arguments.output_dir = str(Path(place, "run"))
        task = task_class(arguments)
        splits = dataclasses.replace(task.load_splits(), test=None)
        plan = build_plan(task.build_model(splits), arguments)
        stages, data = prepare(task, plan, splits, arguments)
        found = sweep(task, plan, reach_searched_stage(task, plan, stages, splits, data), splits, data, steps)
    say(f"\n{report(found)}")
    with folder.explained_disk_errors(output.parent):
        draw(found, output)
    say(f"\nnext: --learning_rate {found.valley:.2g} (--learning_rate auto does both)")
