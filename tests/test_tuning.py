"""`hftl tune`: what is searched, what is kept, how it goes on, and that test is seen by the best trial alone."""

from __future__ import annotations

import csv
import fcntl
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from safetensors.torch import load_file
from small_data import write_texts
from tiny_models import write_tiny_text_model
from tiny_training import failing_trainings
from transformers import AutoModelForSequenceClassification

import hftl
from hftl import cli, tuning
from hftl.arguments import TextArguments, flag_names
from hftl.run import Run
from hftl.tasks.text_classification import TextClassification
from hftl.trainer import TransferTrainer
from hftl.tuning import Dimension, Search, read_space
from hftl.yaml_files import read_yaml


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_tiny_text_model(folder / "bert")
    write_texts(folder / "texts", {"train": 32, "validation": 12, "test": 10})
    return folder


def tune(world: Path, run: Path, trials: int, search: str, *flags: str) -> None:
    settings = [f"--model={world / 'bert'}", f"--dataset={world / 'texts'}", f"--output_dir={run}", "--report_to=none"]
    cli._run(["tune", "text-classification", *settings, f"--trials={trials}", "--search", search, *flags])


def trials_of(run: Path) -> list[dict[str, str]]:
    with (run / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_search_space_is_read() -> None:
    names = flag_names(TextArguments)
    found = read_space("learning_rate=log(1e-5, 1e-3) method=lora,partial --weight-decay=uniform(0,0.1)", names)
    assert found == [
        Dimension("method", "list", ("lora", "partial")),
        Dimension("learning_rate", "log", ("1e-5", "1e-3")),
        Dimension("weight_decay", "uniform", ("0", "0.1")),
    ]
    assert read_space("lora_r=int(2,16)", names) == [Dimension("lora_r", "int", ("2", "16"))]
    (found,) = read_space("""peft_config='{"r": 4, "lora_alpha": 8}',{"r":2}""", names)
    assert found.values == ('{"r": 4, "lora_alpha": 8}', '{"r":2}')
    (found,) = read_space("lora_layers_pattern='layer[.](0|1)[.]',(0|2)$", names)
    assert found.values == ("layer[.](0|1)[.]", "(0|2)$")
    assert read_space("model=a,b", names) == [Dimension("model_name_or_path", "list", ("a", "b"))]


def test_the_best_trial_is_the_run_and_alone_sees_test(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared: list[int] = []
    dataset = TextClassification.dataset
    monkeypatch.setattr(
        TextClassification,
        "dataset",
        lambda self, rows, training: prepared.append(len(rows)) or dataset(self, rows, training),
    )
    search = "learning_rate=log(1e-4,1e-1) method=full,lora lora_r=int(1,4)"
    tune(world, tmp_path / "run", 4, search, "--num_train_epochs=1", "--hub_model_id=someone/mine")
    assert prepared.index(10) == len(prepared) - 2  # of the test rows, after the last trial: scores, the report's map
    assert prepared[-2:] == [10, 10]
    monkeypatch.undo()

    rows = trials_of(tmp_path / "run")
    assert [row["trial"] for row in rows] == ["1", "2", "3", "4"]
    assert {row["method"] for row in rows} <= {"full", "lora"}
    assert all((row["lora_r"] == "") == (row["method"] == "full") for row in rows)
    assert all(1e-4 <= float(row["learning_rate"]) <= 1e-1 for row in rows)
    run = hftl.load_run(tmp_path / "run")
    done = [row for row in rows if row["state"] == "complete"]
    best = max(done, key=lambda row: float(row["accuracy"]))
    assert run.metrics["validation"]["accuracy"] == pytest.approx(float(best["accuracy"]))
    assert run.task.arguments.method in {row["method"] for row in done if row["accuracy"] == best["accuracy"]}
    assert set(run.metrics) == {"train", "validation", "test"}
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names & {"trials", "checkpoints"} == set()
    assert {"tune.db", "trials.csv", "recipe.yaml", "model.safetensors"} <= names
    assert (tmp_path / "run" / "adapter").is_dir() == (run.task.arguments.method == "lora")
    assert "best" in capsys.readouterr().out
    assert "# someone/mine" in (tmp_path / "run" / "README.md").read_text().splitlines()
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    with pytest.raises(hftl.UsageError, match="holds a finished search"):
        tune(world, tmp_path / "run", 4, search, "--num_train_epochs=1", "--hub_model_id=someone/mine")


def test_the_same_command_goes_on(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the midst of the second trial, which goes on from its checkpoint; all is as if it had not been."""
    search, flags = "learning_rate=log(1e-4,1e-2)", ["--num_train_epochs=3", "--save_strategy=steps", "--save_steps=1"]
    tune(world, tmp_path / "whole", 3, search, *flags)
    step, steps = TransferTrainer.training_step, []

    def stop(self: Any, *others: Any) -> Any:
        steps.append(self.state.global_step)
        if len(steps) == 10:
            raise KeyboardInterrupt
        return step(self, *others)

    with monkeypatch.context() as patch:
        patch.setattr(TransferTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            tune(world, tmp_path / "run", 3, search, *flags)
    assert steps[-4:] == [0, 1, 2, 3]  # six steps a trial
    assert hftl.load_run(tmp_path / "run").metrics.keys() == {"train", "validation"}  # the first trial
    with pytest.raises(hftl.UsageError, match="with another weight_decay: repeat its command"):
        tune(world, tmp_path / "run", 3, search, *flags, "--weight_decay=0.5")
    steps.clear()
    monkeypatch.setattr(
        TransferTrainer, "training_step", lambda self, *all: steps.append(self.state.global_step) or step(self, *all)
    )
    tune(world, tmp_path / "run", 3, search, *flags)
    assert steps[:3] == [3, 4, 5]
    expected, found = trials_of(tmp_path / "whole"), trials_of(tmp_path / "run")
    for row in (*expected, *found):
        del row["seconds"]
    assert found == expected
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    for name, value in load_file(tmp_path / "run" / "model.safetensors").items():
        assert value.equal(weights[name]), name


def test_a_search_is_alone_in_its_folder(world: Path, tmp_path: Path) -> None:
    """A second one would take the trial that runs for one that was interrupted."""
    run = tmp_path / "run"
    run.mkdir()
    other = os.open(run, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(hftl.UsageError, match="another process"):
        tune(world, run, 1, "learning_rate=1e-3,1e-2")
    os.close(other)
    tune(world, run, 1, "learning_rate=1e-3,1e-2", "--num_train_epochs=1")
    assert len(trials_of(run)) == 1
    other = os.open(run, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back
    os.close(other)


def test_a_trial_that_falls_behind_is_stopped_and_one_that_diverges_fails(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optuna.pruners, "MedianPruner", lambda: optuna.pruners.ThresholdPruner(lower=2.0))
    with pytest.raises(hftl.UsageError, match="None of the 2 trials finished: all fell behind"):
        tune(world, tmp_path / "pruned", 2, "learning_rate=1e-4,1e-3", "--num_train_epochs=3")
    rows = trials_of(tmp_path / "pruned")
    assert [(row["state"], row["epochs"]) for row in rows] == [("pruned", "1")] * 2
    assert not any((tmp_path / "pruned" / "trials").iterdir())
    monkeypatch.undo()

    tune(world, tmp_path / "run", 4, "learning_rate=1e-4,1e30", "--num_train_epochs=1")
    rows = trials_of(tmp_path / "run")
    assert {(row["state"], float(row["learning_rate"])) for row in rows} == {("complete", 1e-4), ("failed", 1e30)}
    assert read_yaml(tmp_path / "run" / "recipe.yaml")["learning_rate"] == pytest.approx(1e-4)


def test_below_the_median_of_the_others_a_trial_ends_after_an_epoch(world: Path, tmp_path: Path) -> None:
    """Optuna's own pruner, which lets five trials come to their end first."""
    tune(world, tmp_path / "run", 9, "learning_rate=1e-2,1e-9", "--num_train_epochs=2", "--metric_for_best_model=loss")
    rows = trials_of(tmp_path / "run")
    assert [row["state"] for row in rows[:5]] == ["complete"] * 5
    ended = [row for row in rows if row["state"] == "pruned"]
    assert ended
    assert {(row["epochs"], float(row["learning_rate"])) for row in ended} == {("1", 1e-2)}  # which blows the loss up


def test_values_that_do_not_go_together_fail_a_trial(world: Path, tmp_path: Path) -> None:
    tune(world, tmp_path / "run", 4, "method=full,lora", "--wise_ft", "--num_train_epochs=1", "--seed=2")
    rows = trials_of(tmp_path / "run")
    assert {(row["state"], row["method"]) for row in rows} == {("complete", "full"), ("failed", "lora")}
    with pytest.raises(hftl.UsageError, match="Unknown loss 'fo"):
        tune(world, tmp_path / "none", 1, "loss=focla,fokal", "--num_train_epochs=1")
    with pytest.raises(hftl.UsageError, match="--wise_ft: --method lora leaves the backbone's weights alone"):
        tune(world, tmp_path / "none", 2, "lora_r=int(1,4)", "--method=lora", "--wise_ft")
    assert not (tmp_path / "none").exists()


def test_a_trial_that_the_memory_does_not_hold_fails_and_no_other(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_plan = tuning.train_plan

    def little_memory(task: Any, plan: Any, splits: Any, arguments: Any, callbacks: Any) -> Any:
        if arguments.per_device_train_batch_size == 8:
            raise torch.OutOfMemoryError("full")
        return train_plan(task, plan, splits, arguments, callbacks)

    monkeypatch.setattr(tuning, "train_plan", little_memory)
    tune(world, tmp_path / "run", 4, "per_device_train_batch_size=4,8", "--num_train_epochs=1", "--seed=2")
    rows = [(row["state"], row["per_device_train_batch_size"]) for row in trials_of(tmp_path / "run")]
    assert set(rows) == {("complete", "4"), ("failed", "8")}
    assert "trial: failed: full" in capsys.readouterr().out


def test_what_a_failed_trial_held_is_gone_before_the_next(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with failing_trainings(tuning, lambda arguments: arguments.per_device_train_batch_size == 8) as alive:
        tune(world, tmp_path / "run", 4, "per_device_train_batch_size=4,8", "--num_train_epochs=1", "--seed=2")
    assert alive
    assert not any(alive)


def test_a_flag_is_searched_where_another_one_allows_it(world: Path, tmp_path: Path) -> None:
    search = "ema_decay=uniform(0.5,0.9) average=none,ema"
    tune(world, tmp_path / "run", 4, search, "--num_train_epochs=1", "--seed=1")
    rows = trials_of(tmp_path / "run")
    assert {row["state"] for row in rows} == {"complete"}
    assert {(row["average"], bool(row["ema_decay"])) for row in rows} == {("none", False), ("ema", True)}
    with pytest.raises(hftl.UsageError, match="--ema_decay is for --average ema"):
        tune(world, tmp_path / "none", 1, "ema_decay=uniform(0.5,0.9) average=none,swa")


@pytest.mark.parametrize(
    ("space", "chosen", "suggested"),
    [
        ("penalty=l2_sp,bss method=lora,full", {"method": "lora", "penalty": "bss"}, {"method"}),
        ("penalty=l2_sp,bss method=lora,full", {"method": "full", "penalty": "bss"}, {"method", "penalty"}),
        ("batch_norm=adapt,train method=frozen,full", {"method": "frozen", "batch_norm": "adapt"}, {"method"}),
        ("eval_strategy=no,epoch load_best_model_at_end=true,false",
         {"eval_strategy": "no", "load_best_model_at_end": "true"}, {"load_best_model_at_end"}),
        ("eval_strategy=no,epoch load_best_model_at_end=true,false",
         {"eval_strategy": "no", "load_best_model_at_end": "false"}, {"load_best_model_at_end", "eval_strategy"}),
    ],
)  # fmt: skip
def test_a_flag_is_left_out_where_one_of_its_values_is_refused(
    world: Path, tmp_path: Path, space: str, chosen: dict[str, str], suggested: set[str]
) -> None:
    tokens = [f"--model={world / 'bert'}", f"--dataset={world / 'texts'}", f"--output_dir={tmp_path / 'run'}"]
    search = Search("text-classification", tokens, space, 1)
    assert set(search._suggest(optuna.trial.FixedTrial(chosen))) == suggested


def test_the_default_method_is_that_of_every_trial(world: Path, tmp_path: Path) -> None:
    settings = [f"--model={world / 'bert'}", f"--dataset={world / 'texts'}", f"--output_dir={tmp_path / 'run'}"]
    search = Search("text-classification", settings, "keep_head=true,false head_epochs=1,2", 2)
    assert {search._settings({"keep_head": value}).method for value in ("true", "false")} == {"lp_ft"}
    (tmp_path / "head.yaml").write_text("head_solver: sgd\n")
    search = Search("text-classification", [*settings, f"--config={tmp_path / 'head.yaml'}"], "weight_decay=0,0.1", 2)
    assert search._settings({"weight_decay": "0"}).head_solver == "sgd"


def test_a_flag_that_is_left_out_is_an_entry_of_a_list(world: Path, tmp_path: Path) -> None:
    search = """penalty=default,l2_sp template='A film, {text}',{text}"""
    tune(world, tmp_path / "run", 4, search, "--num_train_epochs=1", "--seed=1")
    rows = trials_of(tmp_path / "run")
    assert {row["penalty"] for row in rows} == {"default", "l2_sp"}
    assert {row["template"] for row in rows} == {"A film, {text}", "{text}"}
    best = max(rows, key=lambda row: float(row["accuracy"]))
    recipe = read_yaml(tmp_path / "run" / "recipe.yaml")
    assert (recipe.get("penalty") or "default", recipe["template"]) == (best["penalty"], best["template"])


def test_a_run_whose_trial_was_not_told_is_not_trained_again(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the end of a training and the study's knowing of it."""
    tell = optuna.Study.tell
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "tell", lambda *all, **more: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tune(world, tmp_path / "run", 1, "learning_rate=1e-4,1e-3", "--num_train_epochs=1")
    assert tell is optuna.Study.tell
    monkeypatch.setattr(TransferTrainer, "train", None)
    tune(world, tmp_path / "run", 1, "learning_rate=1e-4,1e-3", "--num_train_epochs=1")
    assert [(row["state"], row["epochs"]) for row in trials_of(tmp_path / "run")] == [("complete", "1")]
    assert "test" in json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert isinstance(hftl.load_run(tmp_path / "run"), Run)


def test_a_trial_that_goes_on_counts_its_evaluations_from_where_its_stage_began(tmp_path: Path) -> None:
    """Killed behind the second evaluation of a second stage, of which a checkpoint was written behind the first."""
    study = optuna.create_study()
    study.enqueue_trial({}, user_attrs={"reported": [[1000, 0.5], [2000, 0.6], [3000, 0.7]], "starts": {"2-all": 1000}})
    trial = study.ask()
    pruning = tuning._Pruning(trial, "accuracy")
    for folder, epoch, wanted in (("2-all", 2.0, 3000), ("2-all", 3.0, 4000), ("3-all", 1.0, 5000)):
        pruning.on_train_begin(SimpleNamespace(output_dir=str(tmp_path / folder)), SimpleNamespace(epoch=0.0), None)
        pruning.on_evaluate(None, SimpleNamespace(epoch=epoch), None, metrics={"eval_accuracy": 0.8})
        assert pruning.evaluations == wanted
    assert list(study.trials[0].intermediate_values) == [1000, 2000, 3000, 4000, 5000]
