"""`--method auto`: what it tries, what it keeps, how it is interrupted, and that the test split is touched once."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_data import write_images, write_texts
from test_methods import plan_of
from tiny_models import TINY, write_tiny_cnn, write_tiny_text_model
from tiny_training import failing_trainings, tiny_trainer
from transformers import (
    AutoModelForSequenceClassification,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    get_cosine_schedule_with_warmup,
)

import hftl
from hftl import auto, averaging, callbacks, cli, features, probes
from hftl.folder import PREDICTIONS
from hftl.run import Run
from hftl.trainer import TransferTrainer
from hftl.training import train_plan
from hftl.yaml_files import read_yaml


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_tiny_text_model(folder / "bert")
    write_texts(folder / "texts", {"train": 48, "validation": 24, "test": 20})
    return folder


def train(world: Path, run: Path, *flags: str) -> None:
    settings = [f"--model={world / 'bert'}", f"--dataset={world / 'texts'}", f"--output_dir={run}", "--method=auto"]
    cli._run(["train", "text-classification", *settings, "--report_to=none", *flags])


@pytest.fixture
def many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the few rows of these tests were many."""
    monkeypatch.setattr(auto, "LEAST_STEPS", 1)
    monkeypatch.setattr(callbacks, "STEPS_WORTH_KEEPING", 1)
    monkeypatch.setattr(auto, "_LEAST_TO_TELL", 1)


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def tried(run: Path) -> list[tuple[str, str]]:
    return [(row["rung"], row["method"]) for row in rows_of(run)]


@pytest.mark.parametrize(
    ("epochs", "shape"),
    [
        (0.3, (1, 0.3)),
        (1.9, (1, 1.9)),
        (2.2, (1, 2)),
        (2.3, (1, 3)),
        (5.9, (1, 5)),
        (6, (2, 3)),
        (8.9, (2, 4)),
        (9, (3, 3)),
        (99, (3, 5)),
    ],
)
def test_time_for_more_epochs_goes_into_further_runs(epochs: float, shape: tuple[int, float]) -> None:
    assert auto._shape(epochs) == shape


@pytest.mark.parametrize(
    ("epochs", "shape"), [(5.2, (1, 5)), (7.3, (1, 8)), (11.9, (1, 8)), (12, (2, 6)), (99, (3, 8))]
)
def test_a_task_that_learns_late_has_longer_runs(epochs: float, shape: tuple[int, float]) -> None:
    later = auto._later(hftl.parse(hftl.AudioArguments, ["--model=a", "--dataset=b"]))
    assert later == 3
    assert auto._shape(epochs, later) == shape


@pytest.mark.parametrize(
    ("epochs", "at_once", "shape"),
    [
        (2.2, 2, (2, 2)),
        (2.9, 2, (2, 3)),
        (5.9, 2, (2, 5)),
        (6, 2, (4, 3)),
        (99, 2, (4, 5)),
        (6, 3, (3, 5)),
        (4, 3, (3, 4)),
    ],
)
def test_runs_side_by_side_have_the_epochs_that_fit_into_one(
    epochs: float, at_once: int, shape: tuple[int, float]
) -> None:
    assert auto._shape(epochs, 0.0, at_once) == shape


@pytest.mark.parametrize(("lengths", "most"), [((3.0, 5.0), 5), ((2.0, 2.0), 2)])
def test_runs_behind_trials_are_shorter(lengths: tuple[float, float], most: float) -> None:
    assert auto._shape(99, 0.0, 2, lengths) == (4, most)
    assert auto._shape(4.0, 0.0, 2, lengths) == ((4, 2) if most == 2 else (2, 4))


@pytest.mark.parametrize(
    ("left", "shape"),
    [(22.0, (1, 2.0, 1)), (27.0, (1, 3.0, 1)), (29.0, (2, 2.0, 2)), (45.0, (2, 3.0, 2)), (99.0, (4, 3.0, 2))],
)
def test_runs_go_side_by_side_from_two_epochs_on(
    monkeypatch: pytest.MonkeyPatch, left: float, shape: tuple[int, float, int]
) -> None:
    """Of ten seconds alone, and of fourteen beside another."""
    ladder: Any = object.__new__(auto.Ladder)
    ladder.trials = []
    ladder.arguments, ladder.stretch = hftl.parse(hftl.TextArguments, ["--model=a", "--dataset=b"]), 1.0
    monkeypatch.setattr(auto.Ladder, "left", left)
    monkeypatch.setattr(auto.Ladder, "_seconds_an_epoch", lambda *_, of_several=0.0: 10.0)
    costs = auto.Costs(training=1.0, prediction=1.0, at_once=2, slower=1.4, of_pairs=False)
    assert ladder._last_training(costs, auto.Way("full")) == shape
    ladder.arguments = hftl.parse(hftl.AudioArguments, ["--model=a", "--dataset=b"])  # which take twice the epochs
    assert ladder._last_training(costs, auto.Way("full"))[2] == (2 if left > 90 else 1)


def test_partial_has_one_run_of_usual_length_behind_trials_too(monkeypatch: pytest.MonkeyPatch) -> None:
    ladder: Any = object.__new__(auto.Ladder)
    ladder.arguments, ladder.stretch = hftl.parse(hftl.TextArguments, ["--model=a", "--dataset=b"]), 1.0
    monkeypatch.setattr(auto.Ladder, "left", 999.0)
    monkeypatch.setattr(auto.Ladder, "_seconds_an_epoch", lambda *_, of_several=0.0: 10.0)
    monkeypatch.setattr(auto.Ladder, "_goes_on", lambda *_: True)
    costs = auto.Costs(training=1.0, prediction=1.0, at_once=1, slower=1.0, of_pairs=False)
    lengths = [ladder._last_training(costs, auto.Way(method))[1] for method in ("full", "partial")]
    assert lengths == [auto._EPOCHS_BEHIND_TRIALS[1], auto._EPOCHS_OF_RUN[1]]


@pytest.mark.parametrize(
    ("left", "flags", "shape"),
    [
        (50.0, [], (1, 4.0, 1)),
        (68.0, [], (2, 3.0, 1)),
        (91.0, [], (2, 4.0, 1)),
        (102.0, [], (3, 3.0, 1)),
        (102.0, ["--eval_epochs=1"], (2, 4.0, 1)),
        (102.0, ["--eval_strategy=steps", "--save_strategy=steps"], (2, 4.0, 1)),
    ],
)
def test_several_runs_are_planned_with_fewer_evaluations(
    monkeypatch: pytest.MonkeyPatch, left: float, flags: list[str], shape: tuple[int, float, int]
) -> None:
    """Rows take ten seconds an epoch, an evaluation two: twelve in a single run, 11.3 in one of several."""
    ladder: Any = object.__new__(auto.Ladder)
    ladder.trials = []
    ladder.arguments, ladder.stretch = hftl.parse(hftl.TextArguments, ["--model=a", "--dataset=b", *flags]), 1.0
    ladder.splits = SimpleNamespace(train=range(100), validation=range(100))
    monkeypatch.setattr(auto.Ladder, "left", left)
    costs = auto.Costs(training=0.1, prediction=0.02, at_once=1, slower=1.0, of_pairs=False)
    assert ladder._last_training(costs, auto.Way("full")) == shape


def test_a_prediction_is_measured_in_a_batch_of_evaluation(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a row takes less than in one of training: evaluations were planned a third too long by those."""
    measured: list[tuple[bool, int]] = []
    seconds_a_row = auto.compute.seconds_a_row

    def noted(model: Any, batch: Any, loss: Any, training: bool, *others: Any) -> float:
        measured.append((training, len(batch["labels"])))
        return seconds_a_row(model, batch, loss, training, *others)

    monkeypatch.setattr(auto.compute, "seconds_a_row", noted)
    train(world, tmp_path / "run", "--time_budget=20s", "--per_device_eval_batch_size=24")
    assert [size for training, size in measured if not training][:1] == [24]


@pytest.mark.skipif(sys.platform != "linux", reason="processes with threads are copied on Linux alone")
@pytest.mark.usefixtures("many_rows", "two_threads")
@pytest.mark.parametrize(("beside", "count"), [(0.0, 4), (9.0, 1)], ids=["pays", "does not"])
def test_the_last_training_has_runs_side_by_side_where_that_pays(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    beside: float,
    count: int,
) -> None:
    """With two threads two at a time, and in each process one thread."""
    seen = tmp_path / "seen"
    step = TransferTrainer.training_step

    def noted(self: Any, *others: Any, **settings: Any) -> Any:
        with seen.open("a") as file:
            file.write(f"{self.stage.name}: {os.getpid() == here}, {torch.get_num_threads()}\n")
        return step(self, *others, **settings)

    here = os.getpid()
    monkeypatch.setattr(TransferTrainer, "training_step", noted)
    monkeypatch.setattr(auto, "_EPOCHS_FOR_TRIALS", 1e9)
    monkeypatch.setattr(auto.compute, "seconds_a_row_beside", lambda *_: beside)
    monkeypatch.setattr(auto, "_shape", lambda epochs, later, at_once, *_: (at_once, 3.0))
    monkeypatch.setattr(auto.TimeLimit, "epochs_left", lambda self, seconds: 2.0 if self.at_once > 1 else 0.0)
    monkeypatch.setattr(auto.Ladder, "_is_better", lambda *_: True)
    train(world, tmp_path / "run", "--time_budget=1h")
    assert torch.get_num_threads() == 2
    last = rows_of(tmp_path / "run")[-1]
    assert (last["rung"], last["runs"], last["epochs"]) == ("final", str(count), "3.0")
    run = hftl.load_run(tmp_path / "run")
    stages = run.metrics["train"]["stages"]
    assert [stage["epochs"] for stage in stages] == [3, 3, 2, 2][:count]
    printed = sorted(re.findall(r"all, run (\d): epoch (\d), validation", capfd.readouterr().out))
    evaluated = [(1, 1), (1, 2), (1, 3)] if count == 1 else [(1, 2), (1, 3), (2, 2), (2, 3), (3, 2), (4, 2)]
    assert [(int(run), int(epoch)) for run, epoch in printed] == evaluated
    where = sorted({line for line in seen.read_text().splitlines() if line.startswith("all, run")})
    if count == 1:
        assert where == ["all, run 1: True, 2"]
    else:
        assert where == [f"all, run {number}: {number % 2 == 1}, 1" for number in (1, 2, 3, 4)]
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    rows = [row["text"] for row in csv.DictReader((world / "texts" / "test.csv").open())]
    encoded = run.task.processor(rows, padding=True, return_tensors="pt")
    labels = [plain.config.id2label[int(row)] for row in plain(**encoded).logits.argmax(dim=1)]
    assert labels == [prediction.label for prediction in run.predict(rows)]


def test_runs_side_by_side_need_room_on_the_disk(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three times the checkpoints of one."""
    arguments = hftl.parse(hftl.TextArguments, [f"--model={world / 'bert'}", f"--dataset={world / 'texts'}"])
    task = hftl.TextClassification(arguments)
    plan = hftl.build_plan(task.build_model(task.load_splits()), arguments)
    one, three = (auto.bytes_needed(plan, arguments, count) for count in (1, 3))
    assert three > 2 * one
    monkeypatch.setattr(auto, "most_at_once", lambda: 8)
    for free, count in ((three, 3), (three - 1, 1)):
        disk = SimpleNamespace(free=free)
        monkeypatch.setattr(auto.folder.shutil, "disk_usage", lambda _, disk=disk: disk)
        assert auto._fitting(tmp_path, plan, arguments, 3) == count
    assert "the disk has no room for several trainings at a time" in capsys.readouterr().out


def test_what_does_not_go_side_by_side(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tracker's library has open; and more trainings than the memory holds."""
    flags = [f"--model={world / 'bert'}", "--dataset=b"]
    arguments: Any = hftl.parse(hftl.TextArguments, flags)
    model = torch.nn.Linear(4, 4)
    monkeypatch.setattr(auto, "most_at_once", lambda: 8)
    held = auto.psutil.Process().memory_info().rss
    monkeypatch.setattr(auto.compute, "peak_memory", lambda: 2 * held)
    for free, count in ((99, auto._MOST_RUNS), (4, 2), (0, 1)):
        monkeypatch.setattr(auto.compute, "free_memory", lambda free=free: free * held)
        assert auto._most_at_once(model, arguments) == count
    monkeypatch.setattr(auto.compute, "free_memory", lambda: 99 * held)
    arguments.report_to = ["wandb"]
    assert auto._most_at_once(model, arguments) == 1


@pytest.mark.usefixtures("many_rows")
def test_the_whole_ladder(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Short trials, the best of them longer, the winner in the run folder, and test seen by it alone."""
    predicted: list[int] = []
    logits = Run.logits
    monkeypatch.setattr(Run, "logits", lambda self, rows: predicted.append(len(rows)) or logits(self, rows))
    judged: list[tuple[str, bool]] = []
    is_better = auto.Ladder._is_better

    def judge(self: Any, place: Path, whole: bool) -> bool:
        judged.append((place.name.split("-")[1], whole))
        return is_better(self, place, whole)

    monkeypatch.setattr(auto.Ladder, "_is_better", judge)
    train(world, tmp_path / "run", "--time_budget=100s", "--hub_model_id=someone/mine")
    assert [rung for rung, whole in judged if whole] == ["final"]
    rungs = tried(tmp_path / "run")
    ways = [way.method for way in auto._WAYS]
    assert rungs[0] == ("probe", "frozen")
    assert rungs[1:7] == [("trial", method) for method in ways]
    assert [rung for rung, _ in rungs[7:]] == ["trial"] * 3 + ["final"]  # the better half again, then the best of it
    lengths = [(row["epochs"], row["factor"]) for row in rows_of(tmp_path / "run")]
    assert [epochs for epochs, _ in lengths[1:10]] == ["1.0"] * 6 + ["2.0"] * 3
    assert float(lengths[10][0]) == auto._EPOCHS_BEHIND_TRIALS[1]
    printed = capsys.readouterr().out
    assert printed.count("soup: the mean of") == 1
    table = printed[printed.index("\nrung ") :].splitlines()[1:13]
    assert table[0].split() == ["rung", "method", "rates", "epochs", "validation", "accuracy", "seconds"]
    assert [line.split()[:2] for line in table[1:]] == [list(trial) for trial in rungs]
    assert sum(line.endswith(" kept") for line in table) == 1
    assert [factor for _, factor in lengths[1:7]] == [str(way.factor) for way in auto._WAYS]
    assert predicted == [20]

    run = hftl.load_run(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} & {"trials", "checkpoints"} == set()
    kept = [row for row in rows_of(tmp_path / "run") if row["best"] == "True"][-1]
    assert run.task.arguments.soup_runs == (auto._MOST_RUNS if kept["rung"] == "final" else 1)
    assert float(kept["score"]) == run.metrics["validation"]["accuracy"]
    assert run.task.arguments.method == kept["method"]
    assert (tmp_path / "run" / "adapter").is_dir() == (kept["method"] == "lora")
    monkeypatch.undo()
    rows = [row["text"] for row in csv.DictReader((world / "texts" / "test.csv").open())]
    with (tmp_path / "run" / "predictions.csv").open() as file:
        written = [row["prediction"] for row in csv.DictReader(file)]
    assert [prediction.label for prediction in run.predict(rows)] == written
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    encoded = run.task.processor(rows, padding=True, return_tensors="pt")
    assert [plain.config.id2label[int(row)] for row in plain(**encoded).logits.argmax(dim=1)] == written
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"{run.metrics['test']['accuracy']:.3f}" in card
    assert "# someone/mine" in card.splitlines()


@pytest.mark.usefixtures("many_rows")
@pytest.mark.parametrize("winner", ["full-2", "lp_ft-1", "lora-1"])
def test_trials_go_on_where_they_ended(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, winner: str
) -> None:
    """Two ways of a first round train on in the second, and the winner's runs begin where that ended."""
    ways = ("full-1", "full-2", "lp_ft-1", "lora-1")
    monkeypatch.setattr(auto, "_WAYS", tuple(auto.Way(way[:-2], float(way[-1])) for way in ways))
    second = ways[(ways.index(winner) + 1) % 4]
    order = {winner: 2.0, second: 1.0}
    monkeypatch.setattr(auto.Ladder, "_score", lambda self, place: order.get("-".join(place.name.split("-")[2:4]), 0.0))
    monkeypatch.setattr(auto.Ladder, "_is_better", lambda *_: True)
    monkeypatch.setattr(auto, "_shape", lambda *_: (1, 3.0))
    monkeypatch.setattr(auto.TimeLimit, "epochs_left", lambda *_: 1e9)
    trained = Trained(monkeypatch)
    train(world, tmp_path / "run", "--preset=best", "--seed=3")
    assert [(name, length) for name, length, *_ in trained.trainings] == [
        *((way, 1.0) for way in ways),
        *((way, 2.0) for way in (winner, second)),
        (winner, 3.0),
    ]
    ends: dict[str, dict[str, torch.Tensor]] = {}
    for way, _, stages, before, after in trained.trainings:
        if way in ends:
            assert len(stages) == 1
            assert set(before) == set(ends[way])
            assert [name for name, tensor in before.items() if not tensor.equal(ends[way][name])] == []
        else:
            assert len(stages) == (2 if way == "lp_ft-1" else 1)
        assert any(not tensor.equal(after[name]) for name, tensor in before.items())
        ends[way] = after
    assert not (tmp_path / "run" / auto.TRIALS).exists()
    arguments = hftl.load_run(tmp_path / "run").task.arguments
    assert (arguments.method, arguments.head_epochs) == (winner[:-2], None)
    assert read_yaml(tmp_path / "run" / auto.RECIPE)["num_train_epochs"] == 1 + 2 + 3


@pytest.mark.usefixtures("many_rows")
@pytest.mark.parametrize("room", [True, False])
def test_trials_of_a_convolutional_model_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: bool) -> None:
    """Its tensors lie with the channels last. Where the disk has no room for them, the last training begins anew."""
    write_tiny_cnn(tmp_path / "cnn")
    write_images(tmp_path / "images", {"train": 12, "validation": 6})
    monkeypatch.setattr(auto, "_WAYS", (auto.Way("full"), auto.Way("lp_ft")))
    monkeypatch.setattr(auto.Ladder, "_score", lambda self, place: float("-full-" in place.name))
    monkeypatch.setattr(auto.Ladder, "_is_better", lambda *_: True)
    monkeypatch.setattr(auto, "_shape", lambda *_: (1, 3.0))
    monkeypatch.setattr(averaging, "has_space", lambda *_: room)
    trained = Trained(monkeypatch)
    settings = [f"--model={tmp_path / 'cnn'}", f"--dataset={tmp_path / 'images'}", f"--output_dir={tmp_path / 'run'}"]
    cli._run(["train", "image-classification", *settings, "--method=auto", "--preset=best", "--report_to=none"])
    lengths = [(name, length) for name, length, *_ in trained.trainings]
    assert lengths == [("full-1", 1), ("lp_ft-1", 1), ("partial-1", 1), ("full-1", 3)]
    first, last = trained.trainings[0], trained.trainings[-1]
    assert any(tensor.ndim == 4 for tensor in last[3].values())
    begins = last[3] if room else first[3]
    ends = first[4] if room else last[3]
    assert [name for name, tensor in begins.items() if not tensor.equal(ends[name])] == []


@pytest.mark.usefixtures("many_rows")
@pytest.mark.parametrize("rung", ["trial", "final"])
def test_a_trial_that_goes_on_is_interrupted(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rung: str
) -> None:
    """It ends where it would have without."""
    monkeypatch.setattr(auto, "_WAYS", (auto.Way("full"), auto.Way("full", 2.0), auto.Way("lora"), auto.Way("partial")))
    monkeypatch.setattr(auto.Ladder, "_score", lambda self, place: float("-full-2-" in place.name))
    monkeypatch.setattr(auto.Ladder, "_is_better", lambda *_: True)
    monkeypatch.setattr(auto, "_shape", lambda *_: (1, 3.0))
    monkeypatch.setattr(auto.TimeLimit, "epochs_left", lambda *_: 0.0)
    flags = ["--preset=best", "--per_device_train_batch_size=16"]
    train(world, tmp_path / "whole", *flags)

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        length, place = (2.0, "-trial-full-2-") if rung == "trial" else (3.0, "-final-full-2-")
        if place in args.output_dir and args.num_train_epochs == length and state.global_step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(auto.TimeLimit, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            train(world, tmp_path / "run", *flags)
    train(world, tmp_path / "run", *flags, "--resume")
    assert tried(tmp_path / "run") == tried(tmp_path / "whole")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run")]
    assert [name for name, tensor in files[0].items() if not tensor.equal(files[1][name])] == []


class Trained:
    """What each training beyond the head begins with and ends with.

    Attributes:
        trainings: way, epochs, stages, and what trains, before and after.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trainings: list[tuple[str, float, Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
        monkeypatch.setattr(auto, "train_plan", self.train)
        self.after: dict[str, torch.Tensor] = {}

    def train(self, task: Any, plan: Any, splits: Any, arguments: Any, given: list[Any]) -> Any:
        here = self

        class End(TrainerCallback):
            def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                here.after = here.tensors(kwargs["model"], plan)

        before, epochs = self.tensors(plan.model, plan), float(arguments.num_train_epochs or 0)
        result = train_plan(task, plan, splits, arguments, [*given, End()])
        if arguments.method != "frozen":
            method, factor = Path(arguments.output_dir).name.split("-")[2:4]
            self.trainings.append((f"{method}-{factor}", epochs, plan.stages, before, self.after))
        return result

    def tensors(self, model: Any, plan: Any) -> dict[str, torch.Tensor]:
        names = plan.stages[-1].trainable
        return {name: tensor.detach().clone() for name, tensor in model.named_parameters() if name in names}


@pytest.mark.usefixtures("many_rows")
def test_the_later_half_of_the_blocks_is_a_way(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_text_model(tmp_path / "deep", num_hidden_layers=6)
    monkeypatch.setattr(auto, "_WAYS", (auto.Way("partial"),))
    monkeypatch.setattr(auto.Ladder, "_score", lambda self, place: float("-partial-1-3-" in place.name))
    monkeypatch.setattr(auto.Ladder, "_is_better", lambda *_: True)
    train(world, tmp_path / "run", "--time_budget=100s", f"--model={tmp_path / 'deep'}")
    tries = [(row["rung"], row["method"], row["blocks"]) for row in rows_of(tmp_path / "run")]
    assert tries[1:] == [("trial", "partial", "0"), ("trial", "partial", "3"), ("final", "partial", "3")]
    printed = capsys.readouterr().out
    assert "\nfinal  partial, 3 blocks " in printed
    assert "not kept" not in printed
    arguments = hftl.load_run(tmp_path / "run").task.arguments
    assert (arguments.unfreeze_blocks, arguments.average) == (3, "soup")
    before = load_file(tmp_path / "deep" / "model.safetensors")
    after = load_file(tmp_path / "run" / "model.safetensors")
    moved = {
        name for name, tensor in before.items() if f"bert.{name}" in after and not tensor.equal(after[f"bert.{name}"])
    }
    layers = {name.split(".")[2] for name in moved if name.startswith("encoder.layer.")}
    assert layers == {"3", "4", "5"}
    assert not any(name.startswith("embeddings.") for name in moved)


def test_few_rows_have_runs_of_many_epochs_and_no_trials(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """48 rows are 12 steps of 4, of which 80 are 7 epochs; by 24 rows no way can be told from another."""
    shapes: list[float] = []

    def shape(epochs: float, *_: Any) -> tuple[int, float]:
        shapes.append(epochs)
        return 2, 3.0

    monkeypatch.setattr(auto, "_shape", shape)
    train(world, tmp_path / "run", "--time_budget=1h", "--per_device_train_batch_size=4")
    rows = [(row["rung"], row["method"], row["epochs"]) for row in rows_of(tmp_path / "run")]
    assert rows == [("probe", "frozen", "0.0"), ("pairs", "setfit", "10.0"), ("final", "lp_ft", "7.0")]
    assert shapes[0] > auto._EPOCHS_FOR_TRIALS
    printed = capsys.readouterr().out
    assert "auto: to train the whole model for 2 epochs takes about" in printed
    assert "all, run 2: epoch 7, validation" in printed
    assert "wise_ft: " not in printed  # the best of eleven would be no fair test against pairs


@pytest.mark.parametrize("fewest", [200, 1])
def test_where_few_rows_judge_the_last_training_is_mixed_with_the_pretrained_model(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fewest: int
) -> None:
    """After its runs are averaged; where many rows judge, nothing is mixed."""
    monkeypatch.setattr(auto, "_LEAST_TO_TELL", fewest)
    monkeypatch.setattr(auto, "_EPOCHS_FOR_TRIALS", math.inf)
    monkeypatch.setattr(auto, "_EPOCHS_OF_RUN", (math.inf, 5.0))  # lp_ft, whoever judges
    monkeypatch.setattr(auto, "gives_features", lambda *_: False)  # no pairs
    monkeypatch.setattr(auto, "_shape", lambda *_: (2, 3.0))
    monkeypatch.setattr(auto.Ladder, "_is_better", lambda *_: True)
    train(world, tmp_path / "run", "--time_budget=1h")
    final = rows_of(tmp_path / "run")[-1]
    run = hftl.load_run(tmp_path / "run")
    stage = run.metrics["train"]["stages"][-1]
    assert (final["method"], stage["soup"]["tried"]) == ("lp_ft", 3)
    assert run.task.arguments.wise_ft == (fewest == 200)
    if fewest == 1:
        assert "wise_ft" not in stage
        return
    tried = stage["wise_ft"]["tried"]
    assert tried[-1]["score"] == stage["soup"]["score"]
    assert float(final["score"]) == max(entry["score"] for entry in tried)


@pytest.mark.parametrize("method", ["lp_ft", "full"])
@pytest.mark.parametrize("epochs", [0.6, 3.0])
def test_time_for_mixes_is_kept_also_behind_a_short_training(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, epochs: float
) -> None:
    reserves: list[float] = []
    monkeypatch.setattr(auto.Ladder, "_most_promising", lambda *_: auto.Way(method))
    monkeypatch.setattr(auto, "gives_features", lambda *_: False)  # no pairs

    def last_training(self: auto.Ladder, *_: Any) -> tuple[int, float, int]:
        reserves.append(self.reserve)
        return 1, epochs, 1

    monkeypatch.setattr(auto.Ladder, "_last_training", last_training)
    train(world, tmp_path / "run", "--time_budget=1h")
    if method == "lp_ft" or epochs > 2:
        assert reserves[-1] > reserves[0]
    else:
        assert len(reserves) == 1


def test_an_untrained_model_is_mixed_with_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "images", {"train": 16, "val": 8, "test": 8})
    monkeypatch.setattr(auto, "_shape", lambda *_: (1, 1.0))
    settings = ["--model=random:resnet18", "--image_size=32", f"--output_dir={tmp_path / 'run'}", "--method=auto"]
    words = ["train", "image-classification", f"--dataset={tmp_path / 'images'}", *settings, "--time_budget=1h"]
    cli._run([*words, "--report_to=none"])
    assert [row[1] for row in tried(tmp_path / "run")] == ["frozen", "lp_ft"]
    assert "failed" not in capsys.readouterr().out


@pytest.mark.usefixtures("many_rows")
@pytest.mark.parametrize(("left", "runs"), [((2, 0), 2), ((0,), 1)])
def test_time_that_is_left_over_goes_into_further_runs(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: tuple[int, ...], runs: int
) -> None:
    """What a training took says how many epochs there is time for, where the measured step said for one training."""
    fits = iter(left)
    monkeypatch.setattr(auto, "_EPOCHS_FOR_TRIALS", 1e9)
    monkeypatch.setattr(auto, "_shape", lambda *_: (1, 3.0))
    monkeypatch.setattr(auto.TimeLimit, "epochs_left", lambda self, seconds: next(fits))
    monkeypatch.setattr(auto.Ladder, "_is_better", lambda *_: True)
    train(world, tmp_path / "run", "--time_budget=1h")
    last = rows_of(tmp_path / "run")[-1]
    assert (last["rung"], last["runs"], last["epochs"]) == ("final", str(runs), "3.0")
    assert [row["runs"] for row in rows_of(tmp_path / "run")[:-1]] == ["1"]
    run = hftl.load_run(tmp_path / "run")
    assert run.task.arguments.soup_runs == runs
    assert [stage["epochs"] for stage in run.metrics["train"]["stages"]] == [3, 2][:runs]


def test_the_head_is_solved_once(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[Any] = []

    def solve(*arguments: Any) -> Any:
        solved.append(probes.fit_linear_head(*arguments))
        return solved[-1]

    monkeypatch.setattr(features, "fit_linear_head", solve)
    monkeypatch.setattr(auto, "_shape", lambda *_: (1, 2.0))
    monkeypatch.setattr(auto, "gives_features", lambda *_: False)  # no pairs
    train(world, tmp_path / "run", "--time_budget=1h")
    assert tried(tmp_path / "run") == [("probe", "frozen"), ("final", "lp_ft")]
    assert len(solved) == 1


def test_an_interrupted_ladder_leaves_a_run_and_goes_on(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = auto.Ladder._train

    def stop(self: Any, rung: str, *others: Any) -> None:
        if rung != "probe":
            raise KeyboardInterrupt
        whole(self, rung, *others)

    monkeypatch.setattr(auto.Ladder, "_train", stop)
    monkeypatch.setattr(auto, "_EPOCHS_FOR_TRIALS", 1e9)
    with pytest.raises(KeyboardInterrupt):
        train(world, tmp_path / "run", "--preset=fast")
    usable = hftl.load_run(tmp_path / "run")
    assert usable.predict("a good film").pop().label in ("bad", "good")

    monkeypatch.setattr(auto.Ladder, "_train", whole)
    table = world / "texts" / "train.csv"
    rows = table.read_text()
    table.write_text(rows + "one row more,good\n")
    with pytest.raises(hftl.UsageError, match="the data are not those of the interrupted run"):
        train(world, tmp_path / "run", "--preset=fast", "--resume")
    table.write_text(rows)
    capsys.readouterr()
    train(world, tmp_path / "run", "--preset=fast", "--resume")
    assert tried(tmp_path / "run") == [("probe", "frozen"), ("pairs", "setfit"), ("final", "lp_ft")]
    assert "auto: probe" not in capsys.readouterr().out
    assert "test" in hftl.load_run(tmp_path / "run").metrics


@pytest.mark.slow
def test_killed_in_the_last_training(world: Path, tmp_path: Path) -> None:
    """By the signal that no program sees, in a process of its own."""
    command = [sys.executable, "-m", "hftl", "train", "text-classification", f"--model={world / 'bert'}"]
    command += [f"--dataset={world / 'texts'}", f"--output_dir={tmp_path / 'run'}", "--method=auto", "--preset=medium"]
    with subprocess.Popen(
        [*command, "--report_to=none"], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        late = threading.Timer(200, process.kill)
        late.start()
        printed = ""
        while ": epoch " not in printed.partition("auto: final")[2]:
            line = process.stdout.readline()
            assert line, f"it ended before: {printed}"
            printed += line
        os.killpg(process.pid, signal.SIGKILL)
        late.cancel()
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "run" / "trials").is_dir()
    usable = hftl.load_run(tmp_path / "run")
    assert usable.predict("a good film").pop().label in ("bad", "good")
    assert "test" not in usable.metrics
    train(world, tmp_path / "run", "--preset=medium", "--resume")
    assert tried(tmp_path / "run") == [("probe", "frozen"), ("pairs", "setfit"), ("final", "lp_ft")]
    assert "test" in hftl.load_run(tmp_path / "run").metrics
    assert not (tmp_path / "run" / "trials").exists()


@pytest.mark.slow
def test_the_least_budget_that_is_named_is_enough(world: Path, tmp_path: Path) -> None:
    """In processes of their own, whose limit holds from their start; twice as much, for a busy machine."""
    command = [sys.executable, "-m", "hftl", "train", "text-classification", f"--model={world / 'bert'}"]
    command += [f"--dataset={world / 'texts'}", f"--output_dir={tmp_path / 'run'}", "--method=auto", "--report_to=none"]

    def limited(seconds: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, f"--time_budget={seconds}s"], capture_output=True, text=True, timeout=300)

    refused = limited(1)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    least = re.search(r"--time_budget: 1 s are too short for anything: .* take about (\d+) s", line)
    assert least, line
    assert not (tmp_path / "run").exists()
    done = limited(2 * int(least[1]))
    assert done.returncode == 0, done.stderr
    assert "test" in hftl.load_run(tmp_path / "run").metrics


@pytest.mark.parametrize("moment", ["compared", "half in its place", "in its place"])
def test_a_finished_trial_is_not_trained_again(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moment: str
) -> None:
    """Stopped between the end of the last training and the table's knowing of it, at whatever is done there."""
    flags = ["--preset=fast", "--per_device_train_batch_size=4"]
    monkeypatch.setattr(auto, "_shape", lambda *_: (1, 3.0))
    monkeypatch.setattr(auto.TimeLimit, "epochs_left", lambda *_: 0.0)
    monkeypatch.setattr(auto.Ladder, "_is_better", lambda self, place, whole: "setfit" not in place.name)
    train(world, tmp_path / "whole", *flags)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    move, is_better = os.replace, auto.Ladder._is_better

    def half(source: Path, target: Path) -> None:
        if source.name == "metrics.json" and target == tmp_path / "run" / "metrics.json" and target.is_file():
            stop()
        move(source, target)

    with monkeypatch.context() as patch:
        if moment == "compared":
            last = lambda self, place, whole: stop() if "final" in place.name else is_better(self, place, whole)  # noqa: E731
            patch.setattr(auto.Ladder, "_is_better", last)
        elif moment == "half in its place":
            patch.setattr(os, "replace", half)
        else:
            write = auto._write_table
            patch.setattr(auto, "_write_table", lambda *given: stop() if len(given[1]) == 3 else write(*given))
        with pytest.raises(KeyboardInterrupt):
            train(world, tmp_path / "run", *flags)
    assert len(rows_of(tmp_path / "run")) == 2
    assert hftl.load_run(tmp_path / "run").predict("a good film").pop().label in ("bad", "good")
    capsys.readouterr()
    if moment != "compared":
        monkeypatch.setattr(auto.Ladder, "_is_better", lambda *_: False)  # it has been found better
    train(world, tmp_path / "run", *flags, "--resume")
    assert ": epoch " not in capsys.readouterr().out
    rows = [rows_of(tmp_path / name) for name in ("whole", "run")]
    same = ("rung", "method", "factor", "runs", "epochs", "score", "best")
    assert [[row[name] for name in same] for row in rows[0]] == [[row[name] for name in same] for row in rows[1]]
    assert float(rows[1][-1]["seconds"]) > 0
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run")]
    assert [name for name, tensor in files[0].items() if not tensor.equal(files[1][name])] == []
    metrics = [hftl.load_run(tmp_path / name).metrics for name in ("whole", "run")]
    assert metrics[0]["test"] == metrics[1]["test"]


def test_a_finished_probe_is_one_after_an_interruption_too(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a training of the epochs that its recipe names for where the head is not solved."""
    monkeypatch.setattr(auto, "_shape", lambda *_: (1, 0.0))
    write = auto._write_table
    with monkeypatch.context() as patch:
        patch.setattr(auto, "_write_table", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(world, tmp_path / "run", "--preset=fast")
    assert auto._write_table is write
    train(world, tmp_path / "run", "--preset=fast", "--resume")
    probe = rows_of(tmp_path / "run")[0]
    assert (probe["rung"], probe["epochs"], probe["best"]) == ("probe", "0.0", "True")


def test_few_steps_leave_no_checkpoint_between_evaluations() -> None:
    """An epoch that is not evaluated leaves one 80 steps behind the last, counted from where the training begins."""
    few, state, written = callbacks.EveryFewEpochs(100), TrainerState(), []
    state.global_step = 50  # of a checkpoint that the training goes on from
    few.on_train_begin(None, state, None)
    for epoch in range(1, 31):
        state.epoch, state.global_step = float(epoch), 50 + 10 * epoch
        control = few.on_epoch_end(None, state, TrainerControl(should_save=True, should_evaluate=True))
        assert not control.should_evaluate
        if control.should_save:
            written.append(state.global_step)
            few.on_save(None, state, control)
    assert written == [130, 210, 290]
    control = few.on_epoch_end(None, state, TrainerControl(should_save=True, should_training_stop=True))
    assert control.should_save


@pytest.mark.usefixtures("many_rows")
def test_a_trial_goes_on_from_its_checkpoint(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An interruption in the midst of the last training: it is finished with the epochs that were planned for it."""
    monkeypatch.setattr(auto, "_EPOCHS_FOR_TRIALS", 1e9)
    seen: list[int] = []

    def after(self: Any, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        seen.append(state.global_step)
        if state.global_step == 4:  # in the second epoch of two steps each
            raise KeyboardInterrupt

    limit = auto.TimeLimit.on_step_end
    monkeypatch.setattr(auto.TimeLimit, "on_step_end", after)
    with pytest.raises(KeyboardInterrupt):
        train(world, tmp_path / "run", "--preset=fast", "--per_device_train_batch_size=16")
    monkeypatch.setattr(auto.TimeLimit, "on_step_end", limit)
    capsys.readouterr()
    (recipe,) = (tmp_path / "run" / auto.TRIALS).glob(f"*/{auto.CHECKPOINTS}/{auto.RECIPE}")
    os.utime(recipe, (recipe.stat().st_mtime - 20,) * 2)  # as if the trial had taken so many seconds more
    train(world, tmp_path / "run", "--preset=fast", "--per_device_train_batch_size=16", "--resume")
    rows = rows_of(tmp_path / "run")
    assert float(rows[-1]["seconds"]) > 20
    assert float(rows[-1]["spent"]) > sum(float(row["seconds"]) for row in rows)
    printed = capsys.readouterr().out
    assert "going on from checkpoint-3 of stage 'all, run 1'" in printed  # though the third epoch is evaluated first
    assert re.findall(r"all, run 1: epoch (\d),", printed) == ["3", "5"]
    assert "soup: the mean of" in printed
    assert tried(tmp_path / "run") == [("probe", "frozen"), ("final", "full")]


@pytest.mark.parametrize("seconds", [10.0, 1e6])
def test_the_rate_falls_with_the_time_where_that_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Twenty steps of a second each, of which eleven fit behind the first: the rate follows the clock, a step later."""
    clock = iter(range(1_000))
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(time=lambda: float(next(clock)), monotonic=time.monotonic))
    rates: dict[int, float] = {}

    class Rates(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rates[state.global_step] = kwargs["lr_scheduler"].get_last_lr()[-1]

    model = TINY["bert"]()
    (stage,) = plan_of("full", model).stages
    flags = ["--max_steps=20", "--lr_scheduler_type=linear", "--warmup_steps=0"]
    limit = auto.TimeLimit(until=seconds)
    trainer = tiny_trainer(model, stage, tmp_path, *flags, rows=12, callbacks=[limit, Rates()])
    trainer.train()
    start = rates[0]
    short = seconds == 10
    assert len(rates) == trainer.state.global_step == (12 if short else 20)
    for step in range(2, len(rates)):
        share = 0.05 + 0.95 * (step - 2) / 10  # of the time when the step before ended
        passed = 20 * share + 1 if short and step > 2 else step
        assert rates[step] == pytest.approx(start * (1 - min(20, passed) / 20))


@pytest.mark.parametrize("ahead", [0, 6], ids=["from the start", "resumed where the rate had fallen further"])
def test_a_slow_start_does_not_carry_the_schedule_beyond_its_end(monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    """Some steps are slow, the others fast: the rate never rises, and the last step is the schedule's last."""
    seconds = [50.0] + [4.0] * 5 + [0.01] * 14
    clock = iter(np.cumsum(seconds))
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(time=lambda: float(next(clock))))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, 20)
    schedule.last_epoch = ahead
    limit, state, control = auto.TimeLimit(until=100.0), TrainerState(max_steps=20), TrainerControl()
    limit.on_train_begin(None, state, control)
    rates, places = [], []
    for step in range(1, 21):
        optimizer.step()
        schedule.step()
        state.global_step = step
        limit.on_step_end(None, state, control, lr_scheduler=schedule)
        rates.append(schedule.get_last_lr()[0])
        places.append(schedule.last_epoch)
    assert rates == sorted(rates, reverse=True)
    assert places[0] == ahead + 1  # a first step may compile, and counts for nothing
    assert places[5] > 8
    assert places[-1] == 20


def test_the_time_limit_ends_a_training_with_an_evaluated_model(world: Path, tmp_path: Path) -> None:
    arguments = hftl.parse(
        hftl.TextArguments,
        [f"--model={world / 'bert'}", f"--dataset={world / 'texts'}", f"--output_dir={tmp_path / 'run'}",
         "--method=full", "--num_train_epochs=3", "--report_to=none"],
    )  # fmt: skip
    task = hftl.TextClassification(arguments)
    splits = task.load_splits()
    plan = hftl.build_plan(task.build_model(splits), arguments)
    train_plan(task, plan, splits, arguments, [auto.TimeLimit(until=0.0)])
    entries = [json.loads(line) for line in (tmp_path / "run" / "logs" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "eval_loss" in entry] == [1]


@pytest.mark.usefixtures("many_rows")
def test_a_trial_that_diverges_does_not_end_the_ladder(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(auto, "_EPOCHS_FOR_TRIALS", 1e9)
    rates = hftl.methods.plan.Rates(1e30, 1e30, 1e30)
    monkeypatch.setattr(hftl.methods.plan, "default_rates", lambda *_: rates)
    train(world, tmp_path / "run", "--max_grad_norm=0", "--warmup_steps=0", "--time_budget=60s")
    rows = [(row["rung"], row["score"], row["best"]) for row in rows_of(tmp_path / "run")]
    assert rows[1] == ("final", "-inf", "False")
    assert "auto: full failed: " in capsys.readouterr().out
    assert "test" in hftl.load_run(tmp_path / "run").metrics


@pytest.mark.usefixtures("many_rows")
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), hftl.UsageError("takes no such layer")], ids=type)
def test_a_method_that_the_model_does_not_take_does_not_end_the_ladder(
    world: Path, tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = auto.build_plan

    def fails(model: Any, arguments: Any) -> Any:
        if arguments.method == "full":
            raise error
        return plan(model, arguments)

    monkeypatch.setattr(auto, "_EPOCHS_FOR_TRIALS", 1e9)
    monkeypatch.setattr(auto, "build_plan", fails)
    train(world, tmp_path / "run", "--time_budget=60s")
    assert f"auto: full failed: {error}" in capsys.readouterr().out
    assert tried(tmp_path / "run") == [("probe", "frozen"), ("final", "full"), ("final", "partial")]
    assert rows_of(tmp_path / "run")[1]["score"] == "-inf"
    assert hftl.load_run(tmp_path / "run").metrics["test"]


@pytest.mark.usefixtures("many_rows")
def test_a_last_training_that_fails_when_it_goes_on_leaves_its_time_to_another(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "_EPOCHS_FOR_TRIALS", 1e9)
    errors: list[BaseException] = [KeyboardInterrupt(), torch.OutOfMemoryError("full")]

    def on_step_end(self: Any, *arguments: Any, **kwargs: Any) -> None:
        if errors:
            raise errors.pop(0)

    monkeypatch.setattr(auto.TimeLimit, "on_step_end", on_step_end)
    with pytest.raises(KeyboardInterrupt):
        train(world, tmp_path / "run", "--time_budget=60s")
    train(world, tmp_path / "run", "--time_budget=60s", "--resume")
    assert tried(tmp_path / "run") == [("probe", "frozen"), ("final", "full"), ("final", "partial")]
    assert hftl.load_run(tmp_path / "run").metrics["test"]


@pytest.mark.usefixtures("many_rows")
def test_what_a_failed_training_held_is_gone_before_the_next(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "_EPOCHS_FOR_TRIALS", 1e9)
    with failing_trainings(auto, lambda arguments: arguments.method == "full") as alive:
        train(world, tmp_path / "run", "--time_budget=60s")
    assert alive == [False]


@pytest.mark.usefixtures("many_rows")
def test_an_error_that_is_no_fault_of_the_method_ends_the_ladder(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(hftl.UsageError, match="lr_scheduler_kwargs"):
        train(world, tmp_path / "run", "--time_budget=60s", '--lr_scheduler_kwargs={"wrong": 1}')


def test_few_rows_at_once_are_measured_where_more_may_not_fit(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them: where BatchNorm sees one number a channel, a single row ends a training."""
    measured: list[int] = []
    seconds_a_row = auto.compute.seconds_a_row

    def noted(model: Any, batch: Any, *others: Any) -> float:
        measured.append(len(batch["labels"]))
        return seconds_a_row(model, batch, *others)

    monkeypatch.setattr(auto.compute, "seconds_a_row", noted)
    write_tiny_cnn(tmp_path / "cnn")
    write_images(tmp_path / "images", {"train": 6, "validation": 3})
    flags = [f"--model={tmp_path / 'cnn'}", f"--dataset={tmp_path / 'images'}", "--image_size=8", "--report_to=none"]
    flags += ["--method=auto", "--time_budget=60s", "--auto_find_batch_size", f"--output_dir={tmp_path / 'run'}"]
    cli._run(["train", "image-classification", *flags])
    assert set(measured[:2]) == {2}


def test_a_model_too_large_to_train_has_its_end_trained(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds_a_row = auto.compute.seconds_a_row

    def little_memory(model: Any, batch: Any, loss: Any, training: bool, *others: Any) -> float:
        if training:
            raise torch.OutOfMemoryError
        return seconds_a_row(model, batch, loss, training, *others)

    monkeypatch.setattr(auto.compute, "seconds_a_row", little_memory)
    train(world, tmp_path / "run", "--time_budget=60s")
    assert "auto: the memory does not hold a training of the whole model" in capsys.readouterr().out
    assert tried(tmp_path / "run") == [("probe", "frozen"), ("final", "partial")]
    assert hftl.load_run(tmp_path / "run").metrics["test"]


@pytest.mark.usefixtures("many_rows")
def test_without_evaluations_there_is_no_soup(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "_shape", lambda *_: (1, 3.0))
    monkeypatch.setattr(auto, "_EPOCHS_FOR_TRIALS", 1e9)
    train(world, tmp_path / "run", "--time_budget=60s", "--eval_strategy=no", "--load_best_model_at_end=false")
    assert [(row["rung"], row["epochs"]) for row in rows_of(tmp_path / "run")][-1] == ("final", "3.0")


@pytest.mark.usefixtures("many_rows")
def test_trials_stop_where_the_time_for_them_is_over(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measured costs are too low by far: after the first trial nothing is left."""
    trained: list[str] = []
    train_one = auto.Ladder._train

    def slow(self: auto.Ladder, rung: str, *others: Any) -> None:
        train_one(self, rung, *others)
        trained.append(rung)
        if rung == "trial":
            self.budget.started -= 1e6

    monkeypatch.setattr(auto.Ladder, "_train", slow)
    train(world, tmp_path / "run", "--time_budget=100s")
    assert trained == ["probe", "trial"]
    assert hftl.load_run(tmp_path / "run").metrics["test"]


@pytest.mark.parametrize(("preset", "seconds"), [("fast", 60), ("medium", 600), ("best", 3600), (None, 600)])
def test_presets_are_budgets(preset: str | None, seconds: float) -> None:
    flags = [] if preset is None else [f"--preset={preset}"]
    arguments = hftl.parse(hftl.TextArguments, ["--model=a", "--dataset=b", "--method=auto", *flags])
    assert auto.budget_seconds(arguments) == seconds


def run_folder(folder: Path, score: float, right: list[int], bad: int = 0, metric: str = "accuracy") -> Path:
    """What a comparison of two runs reads: a score, and which predictions are right; the last rows are bad ones."""
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"validation": {metric: score}}))
    labels = ["good"] * (len(right) - bad) + ["bad"] * bad
    said = [
        label if entry else {"good": "bad", "bad": "good"}[label] for label, entry in zip(labels, right, strict=True)
    ]
    rows = [f"{row},{label},{answer},0.5,0.5" for row, (label, answer) in enumerate(zip(labels, said, strict=True))]
    head = "id,label,prediction,probability_bad,probability_good"
    (folder / PREDICTIONS).write_text("\n".join([head, *rows]) + "\n")
    return folder


@pytest.mark.parametrize(
    ("gains", "losses", "short", "usual"),
    [(1, 0, False, True), (2, 0, False, True), (3, 0, True, True), (3, 2, False, True), (9, 2, True, True),
     (0, 1, False, True), (0, 2, False, True), (0, 5, False, False), (2, 9, False, False)],
)  # fmt: skip
def test_only_more_than_chance_takes_the_place_or_keeps_it(
    tmp_path: Path, gains: int, losses: int, short: bool, usual: bool
) -> None:
    before = np.array([0] * gains + [1] * losses + [1] * (40 - gains - losses))
    now = np.array([1] * gains + [0] * losses + [1] * (40 - gains - losses))
    ladder = object.__new__(auto.Ladder)
    ladder.path = run_folder(tmp_path / "run", before.mean(), before.tolist())
    ladder.task = SimpleNamespace(label_names=["bad", "good"])  # type: ignore[assignment]
    arguments: Any = type("Arguments", (), {"metric_for_best_model": "accuracy", "greater_is_better": True})
    ladder.arguments = arguments
    trial = run_folder(tmp_path / "trial", now.mean(), now.tolist())
    assert [ladder._is_better(trial, whole) for whole in (False, True)] == [short, usual]


@pytest.mark.parametrize(
    ("metric", "gain", "better"),
    [("accuracy", -1 / 40, (False, True)), ("f1_macro", -0.0779, (False, True)), ("f1_macro", -0.16, (False, False)),
     ("accuracy", 0.06, (True, True)), ("f1_macro", 0.15, (False, True)), ("f1_macro", 0.16, (True, True))],
)  # fmt: skip
def test_a_row_of_a_small_class_counts_as_much_as_it_moves_the_score(
    tmp_path: Path, metric: str, gain: float, better: tuple[bool, bool]
) -> None:
    """Of four rows one moves macro F1 by 0.078, three times as far as accuracy."""
    places = [[1] * 40, [1] * 39 + [0]][:: 1 if gain < 0 else -1]
    ladder = object.__new__(auto.Ladder)
    ladder.path = run_folder(tmp_path / "run", 0.5, places[0], 4, metric)
    ladder.task = SimpleNamespace(label_names=["bad", "good"])  # type: ignore[assignment]
    arguments: Any = type("Arguments", (), {"metric_for_best_model": metric, "greater_is_better": True})
    ladder.arguments = arguments
    trial = run_folder(tmp_path / "trial", 0.5 + gain, places[1], 4, metric)
    assert tuple(ladder._is_better(trial, whole) for whole in (False, True)) == better


@pytest.mark.parametrize(("now", "better"), [(0.28, True), (0.31, False)])
def test_a_loss_is_not_weighed_by_how_many_answers_are_right(tmp_path: Path, now: float, better: bool) -> None:
    right = [0] * 10 + [1] * 30
    places = [run_folder(tmp_path / name, 0.75, right if name == "run" else right[::-1]) for name in ("run", "trial")]
    for place, loss in zip(places, (0.3, now), strict=True):
        (place / "metrics.json").write_text(json.dumps({"validation": {"loss": loss}}))
    ladder = object.__new__(auto.Ladder)
    ladder.path, ladder.task = places[0], SimpleNamespace(label_names=["bad", "good"])  # type: ignore[assignment]
    arguments: Any = type("Arguments", (), {"metric_for_best_model": "loss", "greater_is_better": False})
    ladder.arguments = arguments
    assert [ladder._is_better(places[1], whole) for whole in (False, True)] == [better, better]


@pytest.mark.parametrize(
    "flag", ["--num_train_epochs=3", "--feature_cache=on", "--average=ema", "--wise_ft", "--soup_runs=2"]
)
def test_what_is_refused_leaves_the_run_that_was_to_be_replaced(world: Path, tmp_path: Path, flag: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("recipe.yaml", "metrics.json"):
        (run / name).write_text("{}")
    with pytest.raises(hftl.UsageError, match="auto"):
        train(world, run, "--overwrite", flag)
    assert {path.name for path in run.iterdir()} == {"recipe.yaml", "metrics.json"}


def test_a_probe_that_is_kept_of_few_rows_loads_again(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The epochs between evaluations of a training are none of the probe's."""
    strategy = ["--eval_strategy=steps", "--eval_steps=2", "--save_strategy=steps", "--save_steps=2"]
    monkeypatch.setattr(
        auto.Ladder, "_is_better", lambda self, place, whole: not (self.path / "metrics.json").is_file()
    )
    train(world, tmp_path / "run", "--time_budget=30s", "--max_train_samples=16", *strategy)
    assert [row["best"] for row in rows_of(tmp_path / "run")] == ["True", "False", "False"]
    assert hftl.load_run(tmp_path / "run").predict("a good film").pop().label in ("bad", "good")


@pytest.mark.parametrize(
    ("cut", "pairs", "epochs", "is_whole"),
    [(1.0, False, 3.0, True), (1.0, False, 1.5, True), (1.0, False, 1.0, False), (0.0, False, 3.0, False),
     (0.6, False, 3.0, True), (0.4, False, 3.0, False), (1.0, True, 3.0, False), (0.6, True, 3.0, False),
     (0.4, True, 3.0, False)],
)  # fmt: skip
def test_a_training_that_the_limit_ended_early_is_no_whole_one(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cut: float,
    pairs: bool,
    epochs: float,
    is_whole: bool,
) -> None:
    """One that was over before the limit is, also where the limit passes while its run is written; a short one is none.

    Behind pairs of few texts the others have to be better by more than chance. `cut` is the share of the steps behind
    which the time is up.
    """
    judged: list[tuple[str, bool]] = []

    def is_better(self: Any, place: Path, whole: bool) -> bool:
        judged.append((place.name.split("-")[1], whole))
        return not (self.path / "metrics.json").is_file()

    limit = auto.TimeLimit

    def passing(until: float, *others: Any) -> auto.TimeLimit:
        made = limit(until, *others)

        def on_step_begin(args: Any, state: TrainerState, control: TrainerControl, **others: Any) -> None:
            made.until = until if state.global_step + 1 < cut * state.max_steps else 0.0

        monkeypatch.setattr(made, "on_step_begin", on_step_begin)
        return made

    monkeypatch.setattr(auto.Ladder, "_is_better", is_better)
    monkeypatch.setattr(auto, "_shape", lambda *_: (1, epochs))
    monkeypatch.setattr(auto, "TimeLimit", passing)
    if not pairs:
        monkeypatch.setattr(auto, "gives_features", lambda *_: False)
    train(world, tmp_path / "run", "--time_budget=1h", "--per_device_train_batch_size=4")
    if pairs:  # of ten epochs
        assert float(rows_of(tmp_path / "run")[1]["epochs"]) == pytest.approx(10 * cut, abs=1)
    assert judged == [("probe", False), *([("pairs", cut >= 0.5)] if pairs else []), ("final", is_whole)]


def test_pairs_are_for_texts_and_a_linear_head(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "_shape", lambda *_: (1, 0.0))  # nothing behind it
    write_tiny_text_model(tmp_path / "roberta", kind="roberta")
    flags = [f"--model={tmp_path / 'roberta'}", "--pooling=architecture", "--time_budget=1h"]
    train(world, tmp_path / "run", *flags)
    assert ("pairs", "setfit") not in tried(tmp_path / "run")
    train(world, tmp_path / "dropped", "--word_dropout=0.1", "--time_budget=1h")
    assert ("pairs", "setfit") in tried(tmp_path / "dropped")
    write_images(tmp_path / "images", {"train": 4, "val": 2}, size=16)
    write_tiny_cnn(tmp_path / "cnn")
    words = [f"--model={tmp_path / 'cnn'}", f"--dataset={tmp_path / 'images'}", "--report_to=none", "--image_size=32"]
    cli._run(["train", "image-classification", *words, "--method=auto", f"--output_dir={tmp_path / 'of_images'}"])
    assert ("pairs", "setfit") not in tried(tmp_path / "of_images")
