"""A few rows of each class, drawn by the seed; several seeds, their mean, and the best of them on validation."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_data
import tiny_models
import torch
from refusal import refused
from safetensors.torch import load_file
from scipy import stats

import hftl
from hftl import backbones, cli, data, repeats
from hftl.losses import CosinePairLoss
from hftl.modality import TEXT
from hftl.tasks.classification import ClassificationTask


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few_shot")
    small_data.write_texts(folder / "texts", {"train": 32, "dev": 21, "test": 25})
    small_data.write_texts(folder / "no_validation", {"train": 32, "test": 25})
    tiny_models.write_tiny_text_model(folder / "bert", kind="bert")
    return folder


# --- shots -----------------------------------------------------------------------------------------------------------


def drawn(folder: Path, shots: int, seed: int = 1) -> data.Splits:
    return data.load_splits({"dataset_name": str(folder), "shots": shots, "seed": seed}, TEXT)


@pytest.mark.parametrize("name", ["texts", "no_validation"])
def test_so_many_rows_of_each_class_are_drawn(place: Path, name: str) -> None:
    splits = drawn(place / name, 4)
    assert np.bincount(splits.train["label"]).tolist() == [4, 4]
    assert np.bincount(splits.validation["label"]).tolist() == [4, 4]
    assert splits.test is not None
    assert len(splits.test) == 25  # whole
    assert not set(splits.train["text"]) & set(splits.validation["text"])
    assert any("at most 4 of each class too" in line for line in splits.report)


def test_the_seed_draws(place: Path) -> None:
    one, same, other = (drawn(place / "no_validation", 4, seed) for seed in (1, 1, 2))
    assert one.train["id"] == same.train["id"]
    assert one.validation["id"] == same.validation["id"]
    assert one.train["id"] != other.train["id"]
    assert set(one.train["id"]) < set(drawn(place / "no_validation", 6, 1).train["id"])  # more hold those of fewer


def test_validation_takes_what_is_left(place: Path) -> None:
    splits = drawn(place / "no_validation", 13)
    assert np.bincount(splits.train["label"]).tolist() == [13, 13]
    assert np.bincount(splits.validation["label"]).tolist() == [3, 3]
    with pytest.raises(hftl.UsageError, match="train has 16 rows of the class 'bad'"):
        drawn(place / "no_validation", 17)


# --- evaluations -----------------------------------------------------------------------------------------------------


def test_many_short_epochs_are_evaluated_ten_times(place: Path, tmp_path: Path) -> None:
    flags = {"model": place / "bert", "dataset": place / "texts", "shots": 4, "report_to": "none"}
    flags |= {"per_device_train_batch_size": 4, "precision": "fp32", "method": "full"}  # 2 steps an epoch: 40 epochs
    run = hftl.finetune("text-classification", **flags, output_dir=tmp_path / "run")
    entries = [json.loads(line) for line in (tmp_path / "run" / "logs" / "log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in entries if "eval_loss" in entry] == list(range(4, 41, 4))
    assert run.task.arguments.eval_epochs == 4
    again = {"eval_epochs": 3, "num_train_epochs": 4}
    hftl.finetune("text-classification", **flags, **again, output_dir=tmp_path / "again")
    entries = [json.loads(line) for line in (tmp_path / "again" / "logs" / "log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in entries if "eval_loss" in entry] == [3, 4]


def test_of_equal_scores_the_latest_counts(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = iter([0.45, 0.5, 0.5, 0.45])
    score = ClassificationTask.score

    def scores(self: Any, *values: Any) -> dict[str, float]:
        found = score(self, *values)
        return found | {"accuracy": next(given, found["accuracy"])}

    monkeypatch.setattr(ClassificationTask, "score", scores)
    flags = {"model": place / "bert", "dataset": place / "texts", "report_to": "none", "num_train_epochs": 4}
    run = hftl.finetune("text-classification", **flags, method="full", output_dir=tmp_path / "run")
    assert run.metrics["train"]["stages"][-1]["best_metric"] == 0.5
    assert run.metrics["validation"]["accuracy"] == 0.5
    entries = [json.loads(line) for line in (run.folder / "logs" / "log.jsonl").read_text().splitlines()]
    losses = [entry["eval_loss"] for entry in entries if "eval_loss" in entry]
    assert run.metrics["validation"]["loss"] == losses[2] != losses[1]


# --- repeats ---------------------------------------------------------------------------------------------------------


def command(place: Path, run: Path, *flags: str) -> list[str]:
    words = ["train", "text-classification", f"--model={place / 'bert'}", f"--dataset={place / 'texts'}"]
    words += ["--shots=4", "--repeats=3", "--seed=5", "--report_to=none", "--precision=fp32", f"--output_dir={run}"]
    return [*words, *flags]


FLAGS = ["--method=full", "--num_train_epochs=2", "--learning_rate=1e-3", "--per_device_train_batch_size=4"]


def read(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.json").read_text())


def test_seeds_are_summed_up_and_the_best_on_validation_is_kept(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli._run(command(place, tmp_path / "run", *FLAGS, "--hub_model_id=someone/mine"))
    assert "(mean and 95 % interval of 3 seeds" in capsys.readouterr().out
    metrics = read(tmp_path / "run")
    every = {seed: read(tmp_path / "run" / "repeats" / str(seed)) for seed in (5, 6, 7)}
    found = metrics["repeats"]["test"]["log_loss"]
    values = [scores["test"]["log_loss"] for scores in every.values()]
    assert found["values"] == values
    assert len(set(values)) == 3
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (found["mean"] - found["half_width_95"], found["mean"] + found["half_width_95"]) == pytest.approx(
        (low, high)
    )
    best = max(every, key=lambda seed: (every[seed]["validation"]["accuracy"], -every[seed]["validation"]["loss"]))
    assert metrics["repeats"]["best_seed"] == best
    assert metrics["test"] == every[best]["test"]
    assert not list((tmp_path / "run" / "repeats").rglob("*.safetensors"))
    # Its model is the one that a single run with this seed gives, and so are its scores.
    cli._run(command(place, tmp_path / "alone", *FLAGS, "--repeats=1", f"--seed={best}"))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "alone"))
    assert all(value.equal(other[name]) for name, value in one.items())
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"the model of seed {best}" in card
    assert "# someone/mine" in card.splitlines()
    # The recipe repeats all of them.
    cli._run(["train", f"--config={tmp_path / 'run' / 'recipe.yaml'}", f"--output_dir={tmp_path / 'again'}"])
    assert read(tmp_path / "again")["repeats"] == metrics["repeats"]
    run = hftl.load_run(tmp_path / "run")
    assert run.evaluate(str(place / "texts"))["log_loss"] == pytest.approx(metrics["test"]["log_loss"], abs=1e-5)


@pytest.mark.parametrize("moment", ["_run_seed", "_keep_best", "_finish"])
def test_interrupted_repeats_go_on(place: Path, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--method=frozen"]
    cli._run(command(place, tmp_path / "whole", *flags))
    work, calls = getattr(repeats, moment), []

    def stops(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == (1 if moment == "_finish" else 2):
            raise KeyboardInterrupt
        return work(*arguments)

    monkeypatch.setattr(repeats, moment, stops)
    with pytest.raises(KeyboardInterrupt):
        cli._run(command(place, tmp_path / "run", *flags))
    monkeypatch.setattr(repeats, moment, work)
    with pytest.raises(hftl.UsageError, match="holds an interrupted run"):
        cli._run(command(place, tmp_path / "run", *flags))
    cli._run(command(place, tmp_path / "run", *flags, "--resume"))
    one, other = (read(tmp_path / name) for name in ("whole", "run"))
    assert one["repeats"] == other["repeats"]
    assert one["test"] == other["test"]
    weights = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(value.equal(other) for value, other in zip(*(entry.values() for entry in weights), strict=True))
    assert not (tmp_path / "run" / "checkpoints").exists()


# --- tuned on pairs --------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_all_pairs() -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(5, 4), torch.tensor([0, 1, 0, 2, 1])
    errors = [
        (float(torch.cosine_similarity(features[one], features[other], dim=0)) - float(labels[one] == labels[other]))
        ** 2
        for one in range(5)
        for other in range(one)
    ]
    loss = CosinePairLoss()
    assert float(loss({"logits": features}, labels)) == pytest.approx(np.mean(errors), rel=1e-5)
    parts = sum(float(loss({"logits": features}, labels, 10)) for _ in range(2))  # two accumulated parts
    assert parts == pytest.approx(np.mean(errors), rel=1e-5)
    assert float(loss({"logits": features[:1]}, labels[:1])) == 0.0


def few_shot(place: Path, run: Path, *flags: str) -> hftl.Run:
    words = [f"--model={place / 'bert'}", f"--dataset={place / 'texts'}", "--shots=8", f"--output_dir={run}"]
    words += ["--report_to=none", "--precision=fp32", "--pooling=mean", *flags]
    return cli.run_recipe(cli.find_recipe("text_few_shot"), words)


def test_pairs_tune_the_encoder_and_then_the_head_is_solved(place: Path, tmp_path: Path) -> None:
    tuning = ["--learning_rate=1e-2", "--num_train_epochs=12"]
    run = few_shot(place, tmp_path / "run", *tuning)
    assert run.task.arguments.method == "setfit"
    probe = few_shot(place, tmp_path / "probe", "--method=frozen")
    tuned, before = (load_file(entry.folder / "model.safetensors") for entry in (run, probe))
    moved = {name for name, value in tuned.items() if not value.equal(before[name])}
    last = max(int(name.split(".layer.")[1].split(".")[0]) for name in tuned if ".layer." in name)
    assert any("layer.0." in name for name in moved)
    assert not any(f".layer.{last}." in name for name in moved)  # the mean of the tokens stays it
    assert {"classifier.weight", "classifier.bias"} <= moved
    first, second = run.metrics["train"]["stages"]
    assert (first["name"], first["steps"], first["best_metric"]) == ("pairs", 12, None)
    assert "penalty" in second
    rows = drawn(place / "texts", 8, run.task.arguments.seed).train
    assert separation(run, rows) > separation(probe, rows) + 0.05
    plain = hftl.load_run(run.folder)  # by the task's own class, without the recipe
    assert plain.evaluate(str(place / "texts"))["log_loss"] == pytest.approx(run.metrics["test"]["log_loss"], abs=1e-3)
    again = tmp_path / "repeated"
    cli._run(["train", f"--config={run.folder / 'recipe.yaml'}", f"--output_dir={again}"])
    assert all(value.equal(load_file(again / "model.safetensors")[name]) for name, value in tuned.items())
    for moment in ("hftl.training.write_run", "hftl.training.keep_features"):
        again = tmp_path / moment
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(moment, stops_late())
            with pytest.raises(KeyboardInterrupt):
                few_shot(place, again, *tuning)
        few_shot(place, again, *tuning, "--resume")
        assert all(value.equal(load_file(again / "model.safetensors")[name]) for name, value in tuned.items())


def stops_late() -> Callable[..., Any]:
    """What is for the head alone, or for the run."""

    def stop(*arguments: Any, **settings: Any) -> None:
        if settings.get("last", True):
            raise KeyboardInterrupt

    return stop


def separation(run: hftl.Run, rows: Any) -> float:
    """How much closer texts of one class are than those of two, by the cosine of what the head reads."""
    batch = run.task.collate([run.task.dataset(rows, training=False)[index] for index in range(len(rows))])
    labels = batch.pop("labels")
    features = torch.nn.functional.normalize(backbones.head_input(run.model.cpu(), "classifier", batch), dim=1)
    cosines, same = features @ features.T, labels.unsqueeze(0) == labels.unsqueeze(1)
    return float(cosines[same].mean() - cosines[~same].mean())


def test_a_model_without_one_vector_a_text_makes_no_pairs(place: Path, tmp_path: Path) -> None:
    tiny_models.write_tiny_text_model(tmp_path / "roberta", kind="roberta")
    with pytest.raises(hftl.UsageError, match=r"--method setfit: .* the head is more than one linear layer"):
        few_shot(place, tmp_path / "run", f"--model={tmp_path / 'roberta'}", "--pooling=architecture")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--learning_rate=auto"], ("--method setfit", "range test")),
        (["--wise_ft"], ("--wise_ft: --method setfit ends with the head alone",)),
        (["--soup_runs=2"], ("--soup_runs: --method setfit ends with the head alone",)),
        (["--head_learning_rate=1"], ("--method setfit does not use --head_learning_rate",)),
        (["--per_device_train_batch_size=1"], ("--method setfit: pairs are those of a batch", "batch_size 1.")),
        (["--auto_find_batch_size"], ("--method setfit: pairs are those of a batch", "--auto_find_batch_size.")),
        (["--problem_type=regression"], ("--method setfit is for rows of one class each",)),
    ],
)
def test_what_does_not_go_with_pairs(
    place: Path, tmp_path: Path, flags: list[str], said: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "text-classification", f"--model={place / 'bert'}", f"--dataset={place / 'texts'}"]
    line = refused([*words, "--method=setfit", *flags, f"--output_dir={tmp_path / 'run'}"], capsys)
    assert all(part in line for part in said), line
    assert not (tmp_path / "run").exists()


def test_other_heads_are_fitted_behind_pairs(place: Path, tmp_path: Path) -> None:
    run = few_shot(place, tmp_path / "run", "--head=svm", "--max_steps=2")
    pairs, head = run.metrics["train"]["stages"]
    assert (pairs["name"], pairs["steps"], head["name"], head["head"]) == ("pairs", 2, "head", "svm")
    body = pairs["trainable_parameters"]
    assert run.metrics["train"]["trainable_parameters"] == body  # what trained most stands for the run
    assert f"{body:,} of" in run.summary()
    assert "head_learning_rate" not in pairs
    assert "| pairs |" in (run.folder / "README.md").read_text()
    assert "Too few steps were logged" not in (run.folder / "report.html").read_text()


def test_a_stage_without_a_head_has_another_behind_it(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = """
        import dataclasses
        from hftl.methods.parts import setfit

        def only_pairs(model, arguments):
            plan = setfit(model, arguments)
            return dataclasses.replace(plan, stages=plan.stages[:1])
    """
    (tmp_path / "own.py").write_text(textwrap.dedent(code))
    words = ["train", "text-classification", f"--model={place / 'bert'}", f"--dataset={place / 'texts'}"]
    line = refused([*words, f"--method={tmp_path / 'own.py'}:only_pairs", f"--output_dir={tmp_path / 'run'}"], capsys)
    assert "a headless stage gives no answers" in line


def test_the_curves_of_a_report_are_of_one_loss(place: Path, tmp_path: Path) -> None:
    flags = ["--loss=focal", "--num_train_epochs=12", "--logging_steps=1"]  # the head is trained, then
    run = few_shot(place, tmp_path / "run", *flags)
    entries = [json.loads(line) for line in (run.folder / "logs" / "log.jsonl").read_text().splitlines()]
    of_head = [entry["loss"] for entry in entries if entry["stage"] == "head" and "loss" in entry]
    of_pairs = [entry["loss"] for entry in entries if entry["stage"] == "pairs" and "loss" in entry]
    assert len(of_head) == len(of_pairs) == 12
    page = (run.folder / "report.html").read_text()
    assert f"training {of_head[0]:.3g} to {of_head[-1]:.3g}" in page
    assert f"training {of_pairs[0]:.3g}" not in page
