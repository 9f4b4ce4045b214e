"""Averaged weights are the averages that the papers say, of what trains alone, and what is scored and saved."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small_data
import tiny_models
import torch
from safetensors.torch import load_file
from tiny_models import TINY
from tiny_training import TinyData, every_tensor, tiny_arguments, tiny_trainer
from transformers import TrainerCallback

import hftl
from hftl import averaging, backbones, callbacks, cli, methods, side_by_side, training
from hftl.errors import Diverged
from hftl.trainer import TransferTrainer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFTL_HOME", str(tmp_path / "home"))


# --- the averages, by hand -------------------------------------------------------------------------------------------


class Steps(TrainerCallback):
    """The model's tensors after each step."""

    def __init__(self) -> None:
        self.kept: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.kept.append(every_tensor(model))


def trained(name: str, folder: Path, *flags: str, average: str, scores: list[float] | None = None) -> tuple[Any, Any]:
    """A trainer after training on six rows, two a step, and what the model was after each step.

    `scores` are what its evaluations give, one after the other, in place of its accuracy.
    """
    model = TINY[name]()
    common = ["--learning_rate=1e-2", f"--average={average}"]
    common += ["--batch_norm=train"] if backbones.batch_norms(model) else []
    common += ["--eval_strategy=epoch", "--save_strategy=epoch", "--load_best_model_at_end=true"]
    common += ["--metric_for_best_model=accuracy", "--greater_is_better=true", "--save_total_limit=1"]
    flags = (*common, *flags)
    (stage,) = methods.build_plan(model, tiny_arguments(model, *flags)).stages
    given = iter(scores or [])

    def metrics(result: Any) -> dict[str, float]:
        return {"accuracy": next(given) if scores else float((result.predictions.argmax(1) == result.label_ids).mean())}

    trainer = tiny_trainer(
        model,
        stage,
        folder,
        *flags,
        rows=6,
        average=average,
        eval_dataset=TinyData(model, 6),
        compute_metrics=metrics,
    )
    steps = Steps()
    trainer.callback_handler.callbacks.insert(0, steps)
    trainer.train()
    return trainer, steps.kept


def averaged_names(trainer: TransferTrainer) -> set[str]:
    buffers = {name for name, _ in trainer.model.named_buffers() if name.endswith(("running_mean", "running_var"))}
    return set(trainer.stage.trainable) | buffers


def assert_model_is(trainer: TransferTrainer, expected: dict[str, torch.Tensor]) -> None:
    found = every_tensor(trainer.model)
    for name in averaged_names(trainer):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["bert", "timm_resnet18"])
@pytest.mark.parametrize(("decay", "best"), [(0.999, 2), (0.2, 3)])
def test_moving_average(name: str, decay: float, best: int, tmp_path: Path) -> None:
    scores = [float(epoch == best) for epoch in (1, 2, 3)]
    flags = ["--num_train_epochs=3", f"--ema_decay={decay}"]
    trainer, steps = trained(name, tmp_path, *flags, average="ema", scores=scores)
    assert trainer.state.best_global_step == 3 * best
    expected = {key: value.clone().double() for key, value in steps[0].items() if value.is_floating_point()}
    for number, step in enumerate(steps[: 3 * best], start=1):
        share = min(decay, (1 + number) / (10 + number))
        expected = {key: share * value + (1 - share) * step[key].double() for key, value in expected.items()}
    trainer.average.finish()
    assert_model_is(trainer, {key: value.float() for key, value in expected.items()})


@pytest.mark.parametrize(("patience", "best"), [([], 2), (["--early_stopping_patience=5"], 1)])
def test_of_equal_evaluations_the_latest_counts(patience: list[str], best: int, tmp_path: Path) -> None:
    flags = ["--num_train_epochs=3", *patience]
    trainer, steps = trained("bert", tmp_path, *flags, average="none", scores=[0.5, 0.5, 0.4])
    assert trainer.state.best_global_step == 3 * best
    assert trainer.state.best_metric == 0.5
    found = every_tensor(trainer.model)
    assert [name for name in found if not found[name].equal(steps[3 * best - 1][name])] == []


def test_evaluations_see_the_moving_average_and_training_does_not(tmp_path: Path) -> None:
    plain, plain_steps = trained("bert", tmp_path / "plain", "--num_train_epochs=2", average="none")
    moving, moving_steps = trained("bert", tmp_path / "ema", "--num_train_epochs=2", average="ema")
    for one, other in zip(plain_steps, moving_steps, strict=True):
        assert [name for name in one if not one[name].equal(other[name])] == []
    losses = [[e["eval_loss"] for e in t.state.log_history if "eval_loss" in e] for t in (plain, moving)]
    assert losses[0] != losses[1]
    best = moving.state.best_global_step
    moving.average.finish()
    assert moving.validate()[1] == pytest.approx(losses[1][best // 3 - 1], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "epochs", "last"),
    [(name, *case) for name in ("bert", "timm_resnet18") for case in ((2, [3, 6]), (3, [6, 9]), (9, [21, 24, 27]))],
)
def test_mean_of_the_last_epochs(name: str, epochs: int, last: list[int], tmp_path: Path) -> None:
    trainer, steps = trained(name, tmp_path, f"--num_train_epochs={epochs}", average="swa")
    assert len(steps) == 3 * epochs
    assert trainer.average.finish()["average"]["epochs"] == len(last)
    mean = {key: sum(steps[step - 1][key] for step in last) / len(last) for key in averaged_names(trainer)}
    assert_model_is(trainer, mean)


def test_a_mean_of_one_epoch_is_refused() -> None:
    model = TINY["bert"]()
    stage = methods.Stage("all", frozenset({"classifier.bias"}), 1e-3, 1e-3, epochs=1.0)
    changes: dict[str, Any]
    for changes, flags in (({}, []), ({"epochs": 9.0}, ["--max_steps=3"])):
        with pytest.raises(hftl.UsageError, match="num_train_epochs 2 or more"):
            averaging.check_length(replace(stage, **changes), 3, tiny_arguments(model, "--average=swa", *flags))
    for changes, flags in (({"epochs": 2.0}, []), ({}, ["--max_steps=4"]), ({"trainable": frozenset()}, [])):
        averaging.check_length(replace(stage, **changes), 3, tiny_arguments(model, "--average=swa", *flags))


@pytest.mark.parametrize("name", ["bert", "timm_resnet18"])
def test_soup(name: str, tmp_path: Path) -> None:
    # Five epochs, then the three best: 4, which is known, with 2 (worse: left out), with 3 (as good).
    scores = [0.1, 0.6, 0.5, 0.9, 0.2, 0.8, 0.9, 0.9]
    trainer, steps = trained(name, tmp_path, "--num_train_epochs=5", average="soup", scores=scores)
    assert sorted(int(path.stem) for path in trainer.average.place.iterdir()) == [6, 9, 12]
    record = trainer.average.finish()["average"]
    assert record == {"kind": "soup", "steps": [12, 9], "tried": 3, "score": 0.9}
    mean = {key: (steps[11][key] + steps[8][key]) / 2 for key in averaged_names(trainer)}
    assert_model_is(trainer, mean)
    logits = trainer.evaluation_of_the_best.predictions
    np.testing.assert_allclose(logits, trainer.predict(trainer.eval_dataset).predictions, rtol=1e-4, atol=1e-5)


def test_a_soup_needs_the_memory_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the ingredients one tensor at a time is in memory."""
    trainer, _ = trained("bert", tmp_path, "--num_train_epochs=3", average="soup", scores=[0.1, 0.2, 0.3, 0.4, 0.5])
    read: list[weakref.ref[torch.Tensor]] = []
    most = 0
    opened = averaging.safe_open

    @contextlib.contextmanager
    def noted(path: Path, framework: str) -> Iterator[Any]:
        def get_tensor(name: str) -> torch.Tensor:
            nonlocal most
            tensor = file.get_tensor(name)
            read.append(weakref.ref(tensor))
            most = max(most, sum(one() is not None for one in read))
            return tensor

        with opened(path, framework) as file:
            yield SimpleNamespace(get_tensor=get_tensor, metadata=file.metadata)

    monkeypatch.setattr(averaging, "safe_open", noted)
    assert trainer.average.finish()["average"]["steps"] == [9, 6, 3]
    assert len(read) >= 6 * len(averaged_names(trainer))
    assert most == 1


def test_frozen_statistics_are_left_alone(tmp_path: Path) -> None:
    flags = ["--num_train_epochs=2", "--batch_norm=frozen"]
    before = every_tensor(TINY["timm_resnet18"]())
    trainer, _ = trained("timm_resnet18", tmp_path, *flags, average="swa")
    trainer.average.finish()
    after = every_tensor(trainer.model)
    assert [name for name, _ in trainer.model.named_buffers() if not before[name].equal(after[name])] == []
    assert all(not before[name].equal(after[name]) for name in trainer.stage.trainable)


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small_data.write_both(tmp_path_factory.mktemp("averaging"))
    tiny_models.write_tiny_cnn(folder / "cnn")
    tiny_models.write_tiny_text_model(folder / "bert", kind="bert")
    return folder


def train(place: Path, model: str, run: Path, *flags: str) -> hftl.Run:
    task = "text" if model == "bert" else "image"
    common = [f"--dataset={place / f'{task}s'}", f"--model={place / model}", f"--output_dir={run}", "--overwrite"]
    common += ["--per_device_train_batch_size=8", "--report_to=none", "--precision=fp32", "--num_train_epochs=3"]
    return cli.run_recipe(ROOT / "recipes" / f"{task}_classification.py", [*common, *flags])


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("bert", ["--average=ema", "--method=lora", "--learning_rate=0.05"]),
        ("bert", ["--average=swa", "--method=partial", "--unfreeze_blocks=1"]),  # on kept features
        ("cnn", ["--average=soup", "--wise_ft", "--method=lp_ft", "--batch_norm=train"]),
        ("bert", ["--average=soup", "--method=frozen"]),  # a head that would be solved
    ],
)
def test_the_average_is_scored_saved_and_repeated(
    place: Path, tmp_path: Path, model: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(place, model, tmp_path / "run", *flags)
    output = capsys.readouterr().out
    assert output.count("average: ") == 1
    (kind,) = (flag.partition("=")[2] for flag in flags if flag.startswith("--average"))
    stage = run.metrics["train"]["stages"][-1]
    assert stage["average"]["kind"] == kind
    assert ("lr_scheduler_type: constant_with_warmup" in (tmp_path / "run" / "recipe.yaml").read_text()) == (
        kind == "swa"
    )
    loaded = hftl.load_run(tmp_path / "run")
    data = str(place / ("texts" if model == "bert" else "images"))
    for split, name in (("validation", {"bert": "dev", "cnn": "val"}[model]), ("test", "test")):
        scores = loaded.evaluate(data, split=name)
        assert scores["accuracy"] == run.metrics[split]["accuracy"]
    again = cli.run_recipe(
        ROOT / "recipes" / f"{'text' if model == 'bert' else 'image'}_classification.py",
        [f"--config={tmp_path / 'run' / 'recipe.yaml'}", f"--output_dir={tmp_path / 'again'}"],
    )
    assert again.metrics["train"]["stages"][-1]["average"] == stage["average"]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "again"))
    assert [name for name in one if not one[name].equal(other[name])] == []


# --- several runs of the last stage ----------------------------------------------------------------------------------


def ingredients(run: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(path) for path in sorted(run.glob("checkpoints/*/final/ingredient.safetensors"))]


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("bert", ["--method=lp_ft", "--learning_rate=1e-3"]),
        ("bert", ["--method=adalora", "--average=ema"]),
        ("bert", ["--method=surgical"]),  # what it chooses is chosen by the start
        ("bert", ["--method=partial", "--unfreeze_blocks=1"]),  # on kept features
        ("cnn", ["--method=full", "--batch_norm=train"]),
    ],
)
def test_runs_start_alike_and_give_their_mean(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, flags: list[str]
) -> None:
    starts: list[dict[str, torch.Tensor]] = []
    whole = TransferTrainer.train

    def watched(self: Any, *others: Any, **settings: Any) -> Any:
        if ", run " in self.stage.name:
            starts.append(every_tensor(self.model))
        return whole(self, *others, **settings)

    monkeypatch.setattr(TransferTrainer, "train", watched)
    run = train(place, model, tmp_path / "run", *flags, "--soup_runs=2", "--keep_checkpoints", "--warmup_steps=0")
    first, second = starts
    assert [name for name in first if not first[name].equal(second[name])] == []
    record, found = run.metrics["train"]["stages"][-1]["soup"], ingredients(tmp_path / "run")
    assert record["tried"] == len(found) == 2
    assert found[0].keys() == found[1].keys()
    assert any(not found[0][name].equal(found[1][name]) for name in found[0])  # another order
    saved = load_file(tmp_path / "run" / "model.safetensors")
    for name in saved.keys() & found[0].keys():
        mean = torch.stack([found[number - 1][name] for number in record["runs"]]).mean(dim=0)
        torch.testing.assert_close(saved[name], mean)
    assert record["score"] == run.metrics["validation"]["accuracy"]


@contextlib.contextmanager
def failing_runs(error: BaseException, after: dict[int, float]) -> Iterator[None]:
    """Runs, by their numbers, fail at their first step behind so much of their epochs."""
    step = TransferTrainer.training_step

    def failing(self: Any, *others: Any, **settings: Any) -> Any:
        run = int(self.stage.name.rpartition(" ")[2])
        if run in after and self.state.epoch > after[run]:
            raise error
        return step(self, *others, **settings)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TransferTrainer, "training_step", failing)
        yield


def test_an_interrupted_second_run_goes_on(place: Path, tmp_path: Path) -> None:
    flags = [f"--dataset={place / 'texts'}", f"--model={place / 'bert'}", "--per_device_train_batch_size=8"]
    flags += ["--report_to=none", "--precision=fp32", "--num_train_epochs=3", "--learning_rate=1e-3", "--soup_runs=2"]
    recipe = ROOT / "recipes" / "text_classification.py"
    cli.run_recipe(recipe, [*flags, f"--output_dir={tmp_path / 'whole'}"])
    with failing_runs(KeyboardInterrupt(), {2: 0.9}), pytest.raises(KeyboardInterrupt):
        cli.run_recipe(recipe, [*flags, f"--output_dir={tmp_path / 'run'}"])
    table = place / "texts" / "train.csv"
    rows = table.read_text()
    table.write_text(rows + "one row more,good\n")
    with pytest.raises(hftl.UsageError, match="--resume: the data are not those of the interrupted run"):
        cli.run_recipe(recipe, [*flags, f"--output_dir={tmp_path / 'run'}", "--resume"])
    table.write_text(rows)
    cli.run_recipe(recipe, [*flags, f"--output_dir={tmp_path / 'run'}", "--resume"])
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert [name for name in one if not one[name].equal(other[name])] == []


def test_time_that_is_up_makes_the_soup_of_what_there_is(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run is begun in time, a third is not; a run that diverges is left out."""
    arguments = hftl.parse(
        hftl.TextArguments,
        [f"--dataset={place / 'texts'}", f"--model={place / 'bert'}", f"--output_dir={tmp_path / 'run'}",
         "--method=full", "--report_to=none", "--precision=fp32", "--num_train_epochs=1", "--soup_runs=4",
         "--keep_checkpoints"],
    )  # fmt: skip
    step = TransferTrainer.training_step
    limit = callbacks.TimeLimit(until=time.time() + 3600)

    def told(self: Any, *others: Any, **settings: Any) -> Any:
        if self.stage.name == "all, run 2":
            raise Diverged("no number")
        if self.stage.name == "all, run 3":
            limit.until = 0.0
        return step(self, *others, **settings)

    monkeypatch.setattr(TransferTrainer, "training_step", told)
    task = hftl.TextClassification(arguments)
    splits = task.load_splits()
    training.train_plan(task, hftl.build_plan(task.build_model(splits), arguments), splits, arguments, [limit])
    names = [path.parent.parent.name for path in sorted((tmp_path / "run").glob("checkpoints/*/final/stage.json"))]
    assert names == ["1-all-run-1", "3-all-run-3"]
    stages = json.loads((tmp_path / "run" / "metrics.json").read_text())["train"]["stages"]
    assert [stage["name"] for stage in stages] == ["all, run 1", "all, run 3"]
    assert stages[-1]["soup"]["tried"] == 2


class LimitThatFits(callbacks.TimeLimit):
    """A limit that says for how many epochs there is time, one number for each run that it is asked about."""

    def __init__(self, *epochs: float, at_once: int = 1) -> None:
        super().__init__(until=time.time() + 3600, at_once=at_once)
        self.epochs = list(epochs)

    def epochs_left(self, seconds: float) -> float:
        self.seconds = seconds
        return self.epochs.pop(0)


def train_until(place: Path, run: Path, limit: TrainerCallback, *flags: str) -> hftl.Run:
    settings = [f"--dataset={place / 'texts'}", f"--model={place / 'bert'}", f"--output_dir={run}", "--method=full"]
    settings += ["--report_to=none", "--precision=fp32", "--num_train_epochs=3", "--soup_runs=3", *flags]
    arguments = hftl.parse(hftl.TextArguments, [*settings, "--per_device_train_batch_size=8"])
    task = hftl.TextClassification(arguments)
    splits = task.load_splits()
    training.train_plan(task, hftl.build_plan(task.build_model(splits), arguments), splits, arguments, [limit])
    return hftl.load_run(run)


@pytest.mark.parametrize(
    ("left", "epochs"), [((5.1, 2.9), [3, 3, 2]), ((1.5, 0.9), [3, 1.5]), ((0.9,), [3])], ids=["three", "two", "one"]
)
def test_a_further_run_has_the_epochs_that_fit(
    place: Path, tmp_path: Path, left: tuple[float, ...], epochs: list[float]
) -> None:
    """At most those of the first; with none there is nothing to average; the recipe says how many runs there were."""
    run = train_until(place, tmp_path / "run", LimitThatFits(*left), "--keep_checkpoints")
    stages = run.metrics["train"]["stages"]
    assert [stage["epochs"] for stage in stages] == epochs
    assert [stage["steps"] / stages[0]["steps"] * 3 for stage in stages] == pytest.approx(epochs)
    assert [stage["soup"]["tried"] for stage in stages if "soup" in stage] == [len(epochs)] * (len(epochs) > 1)
    assert run.task.arguments.soup_runs == len(epochs)
    chosen = stages[-1]["soup"]["runs"] if len(epochs) > 1 else [1]
    found = ingredients(tmp_path / "run")
    assert len(found) == len(epochs)
    saved = load_file(tmp_path / "run" / "model.safetensors")
    for name in saved.keys() & found[0].keys():
        mean = torch.stack([found[number - 1][name] for number in chosen]).mean(dim=0)
        torch.testing.assert_close(saved[name], mean)


def test_a_further_run_that_was_begun_keeps_its_epochs(place: Path, tmp_path: Path) -> None:
    """One and a half fit when it begins, none when it goes on."""
    whole = train_until(place, tmp_path / "whole", LimitThatFits(1.5, 0))
    with failing_runs(KeyboardInterrupt(), {2: 1}), pytest.raises(KeyboardInterrupt):
        train_until(place, tmp_path / "run", LimitThatFits(1.5))
    run = train_until(place, tmp_path / "run", LimitThatFits(0), "--resume")
    assert [stage["epochs"] for stage in run.metrics["train"]["stages"]] == [3, 1.5]
    one, other = (load_file(found.folder / "model.safetensors") for found in (whole, run))
    assert [name for name in one if not one[name].equal(other[name])] == []


def test_an_epoch_takes_as_long_as_before_an_interruption(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the run that went on for its last epoch, a second a step, four steps an epoch."""
    step, now = TransferTrainer.training_step, [0.0]

    def timed(self: Any, *others: Any, **settings: Any) -> Any:
        if self.state.epoch > 2 and len(now) == 1:
            raise KeyboardInterrupt
        now[0] += 1.0
        return step(self, *others, **settings)

    monkeypatch.setattr(TransferTrainer, "training_step", timed)
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])
    with pytest.raises(KeyboardInterrupt):
        train_until(place, tmp_path / "run", LimitThatFits())
    now.append(0.0)
    limit = LimitThatFits(0)
    train_until(place, tmp_path / "run", limit, "--resume")
    assert limit.seconds == pytest.approx(4.0)


def test_a_further_run_without_a_checkpoint_is_planned_anew(place: Path, tmp_path: Path) -> None:
    with failing_runs(KeyboardInterrupt(), {2: -1}), pytest.raises(KeyboardInterrupt):
        train_until(place, tmp_path / "run", LimitThatFits(3))
    run = train_until(place, tmp_path / "run", LimitThatFits(0.9), "--resume")
    assert [stage["epochs"] for stage in run.metrics["train"]["stages"]] == [3]


def test_a_further_run_for_which_there_is_no_memory_is_left_out(place: Path, tmp_path: Path) -> None:
    with failing_runs(torch.OutOfMemoryError("full"), {2: -1}):
        run = train_until(place, tmp_path / "run", LimitThatFits(3, 0))
        with pytest.raises(torch.OutOfMemoryError):  # runs that were asked for
            train_until(place, tmp_path / "asked", TrainerCallback())
    assert [stage["name"] for stage in run.metrics["train"]["stages"]] == ["all, run 1"]
    assert run.task.arguments.soup_runs == 1


@contextlib.contextmanager
def trained_here() -> Iterator[list[str]]:
    """Names of the stages that this process trains."""
    names: list[str] = []
    train = TransferTrainer.train

    def noted(self: Any, *others: Any, **settings: Any) -> Any:
        names.append(self.stage.name)
        return train(self, *others, **settings)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TransferTrainer, "train", noted)
        yield names


def same_weights(one: hftl.Run, other: hftl.Run) -> bool:
    mine, theirs = (load_file(run.folder / "model.safetensors") for run in (one, other))
    return mine.keys() == theirs.keys() and all(mine[name].equal(theirs[name]) for name in mine)


@pytest.mark.parametrize("at_once", [2, 3])
def test_runs_side_by_side_are_those_one_after_the_other(place: Path, tmp_path: Path, at_once: int) -> None:
    """The same weights; where two train at once the third has a time of its own."""
    alone = train_until(place, tmp_path / "alone", LimitThatFits(3, 2), "--learning_rate=1e-3")
    with trained_here() as names:
        limit = LimitThatFits(*[2.0] * (3 - at_once), at_once=at_once)
        beside = train_until(place, tmp_path / "beside", limit, "--learning_rate=1e-3")
    assert names == ["all, run 1", "all, run 3"][: 4 - at_once]
    stages = beside.metrics["train"]["stages"]
    assert [stage["epochs"] for stage in stages] == [3, 3, 2 if at_once == 2 else 3]
    assert stages[-1]["soup"]["tried"] == 3
    assert beside.task.arguments.soup_runs == 3
    assert same_weights(alone, beside) == (at_once == 2)  # whose third run is as long


@pytest.mark.parametrize("at_once", [1, 2])
def test_runs_side_by_side_go_on_after_an_interruption(place: Path, tmp_path: Path, at_once: int) -> None:
    """The first stops in its second epoch, and with it the one beside it, wherever that is."""
    whole = train_until(place, tmp_path / "whole", LimitThatFits(at_once=2), "--soup_runs=2")
    with failing_runs(KeyboardInterrupt(), {1: 1}), pytest.raises(KeyboardInterrupt):
        train_until(place, tmp_path / "run", LimitThatFits(at_once=2), "--soup_runs=2")
    run = train_until(place, tmp_path / "run", LimitThatFits(3, at_once=at_once), "--soup_runs=2", "--resume")
    assert same_weights(whole, run)


def test_a_run_beside_another_that_stops_early_keeps_its_epochs(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third and the fourth are begun for one and a half epochs, and both go on with them."""
    flags = ["--soup_runs=4"]
    whole = train_until(place, tmp_path / "whole", LimitThatFits(1.5, 1.5, at_once=2), *flags)
    monkeypatch.setattr(side_by_side.SideBySide, "end", side_by_side.SideBySide.wait)  # so that the fourth ends
    with failing_runs(KeyboardInterrupt(), {3: 1}), pytest.raises(KeyboardInterrupt):
        train_until(place, tmp_path / "run", LimitThatFits(1.5, 1.5, at_once=2), *flags)
    with trained_here() as names:
        run = train_until(place, tmp_path / "run", LimitThatFits(at_once=2), *flags, "--resume")
    assert names == ["all, run 3"]
    assert [stage["epochs"] for stage in run.metrics["train"]["stages"]] == [3, 3, 1.5, 1.5]
    assert same_weights(whole, run)


def test_further_runs_of_which_one_was_begun(place: Path, tmp_path: Path) -> None:
    """It goes on; for the one beside it, which has no checkpoint, there is no time any more."""
    flags = ["--soup_runs=4"]
    with failing_runs(KeyboardInterrupt(), {3: 1, 4: -1}), pytest.raises(KeyboardInterrupt):
        train_until(place, tmp_path / "run", LimitThatFits(1.5, 1.5, at_once=2), *flags)
    run = train_until(place, tmp_path / "run", LimitThatFits(0, at_once=2), *flags, "--resume")
    assert [stage["epochs"] for stage in run.metrics["train"]["stages"]] == [3, 3, 1.5]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), Diverged("no numbers")], ids=type)
def test_a_run_beside_another_may_be_left_out(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], error: Exception
) -> None:
    with failing_runs(error, {2: -1}):
        run = train_until(place, tmp_path / "run", LimitThatFits(0, at_once=2))
    assert [stage["name"] for stage in run.metrics["train"]["stages"]] == ["all, run 1"]
    assert run.task.arguments.soup_runs == 1
    assert f"all, run 2 is left out: {error}" in capfd.readouterr().out


def test_a_run_beside_another_that_the_system_ends_is_left_out(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As it does for want of memory."""
    step = TransferTrainer.training_step

    def ended(self: Any, *others: Any, **settings: Any) -> Any:
        if self.stage.name == "all, run 2":
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *others, **settings)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TransferTrainer, "training_step", ended)
        run = train_until(place, tmp_path / "run", LimitThatFits(0, at_once=2))
    assert [stage["name"] for stage in run.metrics["train"]["stages"]] == ["all, run 1"]
    assert "all, run 2 is left out: its process ended with -9" in capfd.readouterr().out


def test_an_error_beside_a_run_leaves_that_one_alone_out(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with failing_runs(ValueError("no such row"), {2: -1}):
        run = train_until(place, tmp_path / "run", LimitThatFits(0, at_once=2))
    assert [stage["name"] for stage in run.metrics["train"]["stages"]] == ["all, run 1"]
    printed = capfd.readouterr()
    assert "ValueError: no such row" in printed.err
    assert "all, run 2 is left out: its process ended with 1" in printed.out


@pytest.mark.parametrize("done", [5, 3], ids=["in an epoch", "in the last step of one"])
def test_a_signal_leaves_checkpoints_of_all_that_train_side_by_side(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    """Of the step in which it comes, of three epochs of four; at the end of an epoch with its evaluation."""
    flags = ["--soup_runs=2"]
    whole = train_until(place, tmp_path / "whole", LimitThatFits(at_once=2), *flags)
    step, waits = TransferTrainer.training_step, tmp_path / "waits"

    def stopping(self: Any, *others: Any, **settings: Any) -> Any:
        (signals,) = (found for found in self.callback_handler.callbacks if isinstance(found, callbacks.StopSignals))
        if self.state.global_step == done and self.stage.name == "all, run 2":
            waits.touch()
            wait_for(lambda: signals.received)
        elif self.state.global_step == done:
            wait_for(waits.exists)
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *others, **settings)

    monkeypatch.setattr(TransferTrainer, "training_step", stopping)
    with pytest.raises(callbacks.Interrupted):
        train_until(place, tmp_path / "run", LimitThatFits(at_once=2), *flags)
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob(f"*/checkpoint-{done + 1}"))
    assert len(left) == 2
    monkeypatch.setattr(TransferTrainer, "training_step", step)
    run = train_until(place, tmp_path / "run", LimitThatFits(at_once=2), *flags, "--resume")
    assert same_weights(whole, run)


def wait_for(what: Callable[[], object]) -> None:
    end = time.time() + 60
    while not what():
        assert time.time() < end
        time.sleep(0.01)


def test_what_a_run_beside_another_took_is_no_time_of_its_own(place: Path, tmp_path: Path) -> None:
    """Its memory is."""
    train = train_until(place, tmp_path / "run", LimitThatFits(2, at_once=2)).metrics["train"]
    one, beside, third = train["stages"]
    assert train["seconds"] == pytest.approx(one["seconds"] + third["seconds"])
    assert beside["beside"] == "all, run 1"
    assert 0 <= beside["peak_memory_mb"] < train["peak_memory_mb"]


@pytest.mark.parametrize(("until", "epochs"), [(90.0, 4.5), (3.0, 0.15), (-50.0, -2.5)])
def test_the_time_that_is_left_in_epochs(monkeypatch: pytest.MonkeyPatch, until: float, epochs: float) -> None:
    monkeypatch.setattr(callbacks.time, "time", lambda: 0.0)
    assert callbacks.TimeLimit(until).epochs_left(20.0) == pytest.approx(epochs)


def test_chance_in_the_score_of_a_soup_is_that_of_its_metric() -> None:
    """Of 40 rows one of a class of four: it moves accuracy by 0.025 and macro F1 by 0.078."""
    labels = np.repeat([0, 1], [36, 4])
    answers = [labels, np.where(np.arange(40) == 39, 0, labels)]
    evaluations = [SimpleNamespace(predictions=np.eye(2)[part], label_ids=labels) for part in answers]
    assert averaging._standard_error("accuracy", *evaluations) == pytest.approx(0.025)
    assert averaging._standard_error("f1_macro", *evaluations) == pytest.approx(0.0782, abs=1e-4)


def test_runs_of_a_head_alone_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(hftl.UsageError, match="--soup_runs: --method frozen ends with the head alone"):
        train(place, "bert", tmp_path / "run", "--method=frozen", "--soup_runs=2")


# --- with the pretrained weights -------------------------------------------------------------------------------------


def test_the_mix_is_the_best_on_validation(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--seed=1", "--keep_checkpoints", "--method=full"]
    plain = train(place, "cnn", tmp_path / "plain", *flags)
    mixed = train(place, "cnn", tmp_path / "mixed", *flags, "--wise_ft")
    assert "of the fine-tuned and" in capsys.readouterr().out
    record = mixed.metrics["train"]["stages"][0]["wise_ft"]
    assert [entry["mix"] for entry in record["tried"]] == [round(number / 10, 1) for number in range(11)]
    best = max(record["tried"], key=lambda entry: (entry["score"], -entry["loss"]))
    assert record["mix"] == best["mix"]
    assert mixed.metrics["validation"]["accuracy"] == best["score"]
    assert mixed.metrics["validation"]["loss"] == pytest.approx(best["loss"], rel=1e-5)
    end = record["tried"][-1]
    assert plain.metrics["validation"]["loss"] == pytest.approx(end["loss"], rel=1e-4)
    start = load_file(place / "cnn" / "model.safetensors")
    tuned, mix = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "mixed"))
    for name, value in mix.items():
        share = 1.0 if name.startswith(("fc.", "timm_model.fc.")) else record["mix"]
        first = start.get(name.removeprefix("timm_model."), value)
        expected = value if first.shape != value.shape else torch.lerp(first.float(), tuned[name].float(), share)
        if name.startswith(("fc.", "timm_model.fc.")):
            expected = tuned[name]
        torch.testing.assert_close(value.float(), expected.float(), rtol=1e-5, atol=1e-6, msg=name)


def test_runs_are_averaged_before_they_are_mixed(place: Path, tmp_path: Path) -> None:
    run = train(place, "bert", tmp_path / "run", "--soup_runs=2", "--wise_ft")
    stage = run.metrics["train"]["stages"][-1]
    assert stage["wise_ft"]["tried"][-1]["score"] == stage["soup"]["score"]
    scores = hftl.load_run(tmp_path / "run").evaluate(str(place / "texts"), split="dev")
    assert scores["accuracy"] == max(entry["score"] for entry in stage["wise_ft"]["tried"])


def test_a_mix_that_was_interrupted_is_made_again(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training is finished then, and is not repeated."""

    def power_cut(*_: Any) -> None:
        raise OSError("no power")

    run = train(place, "bert", tmp_path / "run", "--wise_ft")
    with monkeypatch.context() as patch:
        patch.setattr(training, "interpolate", power_cut)
        with pytest.raises(OSError, match="no power"):
            train(place, "bert", tmp_path / "cut", "--wise_ft")
    monkeypatch.setattr(TransferTrainer, "train", power_cut)
    again = train(place, "bert", tmp_path / "cut", "--wise_ft", "--overwrite=false", "--resume")
    first, second = (one.metrics["train"]["stages"][-1]["wise_ft"] for one in (run, again))
    assert second == first
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "cut"))
    assert [name for name in one if not one[name].equal(other[name])] == []


def test_any_mix_can_win(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever validation prefers is what the model becomes: here 0.3."""
    validate = TransferTrainer.validate
    calls = []

    def preferring(self: Any) -> tuple[float, float]:
        validate(self)
        calls.append(1)
        return (1.0 if len(calls) == 4 else 0.5), 0.1

    plain = train(place, "bert", tmp_path / "plain")
    monkeypatch.setattr(TransferTrainer, "validate", preferring)
    run = train(place, "bert", tmp_path / "mixed", "--wise_ft")
    assert run.metrics["train"]["stages"][-1]["wise_ft"]["mix"] == 0.3
    start = load_file(place / "bert" / "model.safetensors")
    one, tuned = (load_file(tmp_path / name / "model.safetensors") for name in ("mixed", "plain"))
    moved = 0
    for name, value in one.items():
        first = start.get(name.removeprefix("bert."), start.get(name))
        if name.startswith(("classifier.", "bert.pooler.")):  # the pooler counts as head
            assert value.equal(tuned[name])
        else:
            torch.testing.assert_close(value, torch.lerp(first, tuned[name], 0.3), rtol=1e-6, atol=1e-7)
            moved += not first.equal(tuned[name])
    assert moved > 10
    assert plain.metrics["validation"]["loss"] != run.metrics["validation"]["loss"]
