"""A linear head trained on kept features without the model: as Trainer would train it, with all that surrounds it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import small_data
import tiny_models
import torch
from safetensors.torch import load_file
from transformers import TimmWrapperForImageClassification, TrainerCallback

import hftl
from hftl import head_steps
from hftl.callbacks import TimeLimit
from hftl.errors import Diverged
from hftl.head_steps import HeadSteps


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("head_steps")
    small_data.write_images(folder / "images", {"train": 20, "val": 8, "test": 4})
    torch.manual_seed(0)
    tiny_models.write_tiny_cnn(folder / "cnn")
    tiny_models.write_tiny_cnn(folder / "dropout", drop_rate=0.5)
    return folder


@pytest.fixture
def epochs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The epochs that ran without the model."""
    monkeypatch.setenv("HFTL_HOME", str(tmp_path / "home"))
    ran: list[int] = []
    run_epoch = HeadSteps.run_epoch

    def counted(steps: HeadSteps, trainer: Any, epoch: int, *others: Any) -> None:
        ran.append(epoch)
        run_epoch(steps, trainer, epoch, *others)

    monkeypatch.setattr(HeadSteps, "run_epoch", counted)
    return ran


def train(place: Path, run: Path, *flags: str, model: str = "cnn", callbacks: Any = ()) -> list[dict[str, Any]]:
    """Lines of the log of a run of `frozen` by SGD."""
    words = [f"--model={place / model}", f"--dataset={place / 'images'}", f"--output_dir={run}", "--method=frozen"]
    words += ["--head_solver=sgd", "--num_train_epochs=3", "--per_device_train_batch_size=8", "--report_to=none"]
    words += ["--feature_cache_dtype=float32", "--precision=fp32", "--logging_steps=2", *flags]
    arguments = hftl.parse(hftl.ImageArguments, words)
    task = hftl.ImageClassification(arguments)
    splits = task.load_splits()
    plan = hftl.build_plan(task.build_model(splits), arguments)
    hftl.fit(task, dataclasses.replace(plan, callbacks=tuple(callbacks)), splits, arguments)
    lines = (run / "logs" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def assert_alike(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    """The same entries with the same figures, but for the time that they took."""
    assert [line.keys() for line in one] == [line.keys() for line in other]
    for line, expected in zip(one, other, strict=True):
        for name, value in expected.items():
            if isinstance(value, float) and not name.endswith(("_runtime", "_per_second", "_flos")):
                assert line[name] == pytest.approx(value, rel=1e-3, abs=1e-6), (name, expected)


SETTINGS = {
    "default": [],
    "each step is logged": ["--logging_steps=1", "--logging_first_step"],
    "evaluated between epochs": ["--eval_strategy=steps", "--save_strategy=steps", "--eval_steps=3", "--save_steps=3"],
    "ends within an epoch": ["--max_steps=7"],
    "plain SGD, no clipping, constant rate": ["--max_grad_norm=0", "--optim=sgd", "--lr_scheduler_type=constant"],
    "clipped": ["--max_grad_norm=0.01", "--weight_decay=0.1"],
    "waits for an evaluation": ["--lr_scheduler_type=reduce_lr_on_plateau"],
    "soft labels, weighted": ["--label_smoothing_factor=0.1", "--class_weights=balanced"],
    "balanced, rest left out": ["--sampler=balanced", "--dataloader_drop_last"],
    "soup": ["--average=soup"],
    "early stop": ["--early_stopping_patience=1", "--num_train_epochs=30"],
    "ends within an epoch, evaluated there": ["--num_train_epochs=1.6"],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_it_trains_as_trainer_does(place: Path, tmp_path: Path, epochs: list[int], name: str) -> None:
    flags = SETTINGS[name]
    found = train(place, tmp_path / "kept", *flags)
    assert epochs
    epochs.clear()
    expected = train(place, tmp_path / "whole", "--feature_cache=off", "--augmentation=none", *flags)
    assert epochs == []
    assert_alike(found, expected)
    assert max(line["step"] for line in found) < 30 * 8  # stopped early, where that was asked for
    one, other = (load_file(tmp_path / run / "model.safetensors") for run in ("kept", "whole"))
    before = load_file(place / "cnn" / "model.safetensors")
    changed = {name for name, value in one.items() if not value.equal(before[name])}
    assert changed
    assert all("fc" in name or "classifier" in name for name in changed)
    for key, value in other.items():
        torch.testing.assert_close(one[key], value, rtol=1e-4, atol=1e-5)


def test_several_views_take_turns(place: Path, tmp_path: Path, epochs: list[int]) -> None:
    still = ["--lr_scheduler_type=constant", "--head_learning_rate=1e-12", "--logging_strategy=epoch"]
    lines = train(place, tmp_path / "run", "--feature_views=2", "--per_device_train_batch_size=60", *still)
    assert epochs == [0, 1, 2]
    first, second, third = (line["loss"] for line in lines if "loss" in line)  # of all pictures, by a head that stays
    assert third == pytest.approx(first, rel=1e-6)
    assert second != pytest.approx(first, rel=1e-5)


def test_in_half_precision_the_head_takes_its_steps_too(place: Path, tmp_path: Path, epochs: list[int]) -> None:
    found = train(place, tmp_path / "run", "--precision=bf16")
    assert epochs == [0, 1, 2]
    exact = train(place, tmp_path / "exact")
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (found, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_labels_of_another_shape(place: Path, tmp_path: Path, epochs: list[int]) -> None:
    table = tmp_path / "table"
    table.mkdir()
    for split, folder in (("train", "train"), ("validation", "val"), ("test", "test")):
        paths = sorted((place / "images" / folder).rglob("*.png"))
        rows = [f"{path},{'a b' if number % 3 else 'b'}" for number, path in enumerate(paths)]
        (table / f"{split}.csv").write_text("\n".join(["image,label", *rows]) + "\n", encoding="utf-8")
    several = ["--problem_type=multi_label_classification", "--label_separator= ", f"--dataset={table}"]
    found = train(place, tmp_path / "kept", *several)
    assert epochs == [0, 1, 2]
    expected = train(place, tmp_path / "whole", "--feature_cache=off", "--augmentation=none", *several)
    assert_alike(found, expected)


class EachStep(TrainerCallback):
    """Counts the steps that it is told of."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)


class OwnLimit(TimeLimit):
    """Counts the steps that it is told of, as a callback of hftl's does not."""

    def __init__(self) -> None:
        super().__init__(until=math.inf)
        self.steps: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)


class Stops(TrainerCallback):
    """Ends the process, as far as a test can, behind a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", [EachStep, OwnLimit])
def test_a_callback_that_wants_each_step_is_told_of_each(
    place: Path, tmp_path: Path, epochs: list[int], kind: Any
) -> None:
    callback = kind()
    train(place, tmp_path / "run", "--max_steps=5", callbacks=[callback])
    assert callback.steps == [1, 2, 3, 4, 5]
    assert epochs == []


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("dropout", []),
        ("cnn", ["--gradient_accumulation_steps=2"]),
        ("cnn", ["--average=ema"]),
    ],
)
def test_what_needs_more_than_the_head_has_trainers_steps(
    place: Path, tmp_path: Path, epochs: list[int], model: str, flags: list[str]
) -> None:
    train(place, tmp_path / "run", "--num_train_epochs=1", *flags, model=model)
    assert epochs == []


def test_features_over_the_bound_stay_on_disk(
    place: Path, tmp_path: Path, epochs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_steps, "_MOST_BYTES", 1)
    train(place, tmp_path / "run", "--num_train_epochs=1")
    assert epochs == []


def test_outputs_that_are_made_of_the_layers_own_are_the_models(
    place: Path, tmp_path: Path, epochs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = TimmWrapperForImageClassification.forward

    def colder(model: Any, *others: Any, **named: Any) -> Any:
        outputs = forward(model, *others, **named)
        outputs.logits = outputs.logits / 10
        return outputs

    monkeypatch.setattr(TimmWrapperForImageClassification, "forward", colder)
    train(place, tmp_path / "run", "--num_train_epochs=1")
    assert epochs == []


@pytest.mark.parametrize("step", [6, 19])
def test_an_interrupted_epoch_goes_on_bit_for_bit(
    place: Path, tmp_path: Path, epochs: list[int], capsys: pytest.CaptureFixture[str], step: int
) -> None:
    flags = ["--save_strategy=steps", "--eval_strategy=steps", "--save_steps=3", "--eval_steps=3", "--max_steps=19"]
    train(place, tmp_path / "whole", *flags)
    with pytest.raises(KeyboardInterrupt):
        train(place, tmp_path / "cut", *flags, callbacks=[Stops(step)])
    epochs.clear()
    train(place, tmp_path / "cut", *flags, "--resume")
    assert f"going on from checkpoint-{step}" in capsys.readouterr().out
    assert epochs == ([0, 1, 2] if step == 6 else [2])  # each has eight steps
    one, other = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "cut"))
    assert all(value.equal(other[name]) for name, value in one.items())


def test_a_loss_that_is_no_number_stops_it(place: Path, tmp_path: Path, epochs: list[int]) -> None:
    flags = ["--head_learning_rate=1e38", "--optim=sgd", "--max_grad_norm=0", "--logging_steps=50"]
    said = []
    for name, others in (("kept", []), ("whole", ["--feature_cache=off", "--augmentation=none"])):
        with pytest.raises(Diverged, match="The loss is nan at step") as error:
            train(place, tmp_path / name, *flags, *others)
        said.append(str(error.value).partition(":")[0])
    assert said[0] == said[1]  # the same step
    assert epochs == [0]
