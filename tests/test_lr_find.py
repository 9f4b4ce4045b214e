"""The range test of the learning rate: what it suggests, and that nothing else changes by it."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_data import write_images, write_tagged, write_texts
from tiny_models import write_timm_folder, write_tiny_text_model

import hftl
from hftl import cli, lr_find, training
from hftl.arguments import parse
from hftl.methods import build_plan
from hftl.tasks import find_task
from hftl.trainer import TransferTrainer
from hftl.yaml_files import read_yaml


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    write_tiny_text_model(folder / "bert")
    write_timm_folder(folder / "resnet", "resnet18", channels=[8, 8, 8, 8], stem_width=8)
    write_texts(folder / "texts", {"train": 48, "validation": 12, "test": 8})
    write_images(folder / "images", {"train": 8, "validation": 2})
    return folder


def test_suggestions_are_those_of_fastai() -> None:
    """`valley` and `steep` of fastai's `callback/schedule.py`, written out."""
    noise = np.random.default_rng(0)
    for _ in range(20):
        rates = np.logspace(-7, 1, 60)
        losses = (
            2 - 1.5 / (1 + np.exp(-2 * (np.log10(rates) + 3))) + 3 * (np.log10(rates) > 0) + noise.normal(0, 0.05, 60)
        )
        lengths = [1] * 60
        end = start = 0
        for i in range(1, 60):
            for j in range(i):
                if losses[i] < losses[j] and lengths[i] < lengths[j] + 1:
                    lengths[i] = lengths[j] + 1
                if lengths[end] < lengths[i]:
                    end = i
                    start = end - lengths[end]
        sections = (end - start) / 3
        expected = rates[start + int(sections) + int(sections / 2)]
        assert lr_find.valley(rates.tolist(), losses.tolist()) == expected
        assert 1e-5 < expected < 1.0
        slopes = [(losses[i + 1] - losses[i]) / (np.log(rates[i + 1]) - np.log(rates[i])) for i in range(59)]
        assert lr_find.steepest(rates.tolist(), losses.tolist()) == rates[int(np.argmin(slopes))]


def settings(world: Path, kind: str, *flags: str) -> list[str]:
    model, data = {"text": ("bert", "texts"), "image": ("resnet", "images")}[kind]
    return [f"--model={world / model}", f"--dataset={world / data}", "--report_to=none", *flags]


def state_of(model: Any) -> dict[str, Any]:
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "trains": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "forwards": [name for name, module in model.named_modules() if "forward" in vars(module)],
        "gradients": [name for name, parameter in model.named_parameters() if parameter.grad is not None],
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
    }


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("text", ["--method=full"]),
        ("text", ["--method=lora"]),
        ("text", ["--method=partial", "--unfreeze_blocks=1", "--feature_cache=on"]),
        ("image", ["--method=full", "--batch_norm=train"]),
        ("image", ["--method=lp_ft"]),
    ],
)
def test_everything_is_afterwards_as_it_was(world: Path, tmp_path: Path, kind: str, flags: list[str]) -> None:
    task_class = find_task(f"{kind}-classification")
    arguments = parse(task_class.arguments_class, settings(world, kind, *flags, f"--output_dir={tmp_path / 'run'}"))
    task = task_class(arguments)
    splits = task.load_splits()
    plan = build_plan(task.build_model(splits), arguments)
    stages, rows = training.prepare(task, plan, splits, arguments)
    before = state_of(plan.model)
    found = lr_find.sweep(task, plan, stages[-1], splits, rows, 20)
    after = state_of(plan.model)
    for name, value in before.pop("weights").items():
        assert torch.equal(after["weights"].pop(name), value), name
    assert after.pop("weights") == {}
    assert after == before
    assert len(set(found.losses)) == len(found.losses)  # it trained, on rows that differ
    assert not (tmp_path / "run").exists()


def test_the_rates_grow_from_group_to_group_in_proportion(world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    seen: list[list[float]] = []
    step = TransferTrainer.training_step

    def watched(self: Any, *others: Any) -> Any:
        seen.append(sorted({group["lr"] for group in self.optimizer.param_groups}))
        return step(self, *others)

    monkeypatch.setattr(TransferTrainer, "training_step", watched)
    monkeypatch.chdir(tmp_path)
    cli._run(["lr-find", "text-classification", *settings(world, "text", "--method=full"), "--steps=25"])
    assert seen[0] == pytest.approx([1e-7, 1e-6])  # the head's default is ten times the backbone's
    ratios = [now[0] / before[0] for before, now in itertools.pairwise(seen)]
    assert ratios == pytest.approx([10 ** (8 / 24)] * len(ratios))
    assert all(head / body == pytest.approx(10) for body, head in seen)


def test_the_loss_of_tags_is_a_mean_over_words(world: Path, tmp_path: Path) -> None:
    place = write_tagged(tmp_path / "tags", {"train": 40, "valid": 12, "test": 14})
    task_class = find_task("token-classification")
    flags = [f"--model={world / 'bert'}", f"--dataset={place}", f"--output_dir={tmp_path / 'run'}", "--report_to=none"]
    task = task_class(parse(task_class.arguments_class, flags))
    splits = task.load_splits()
    plan = build_plan(task.build_model(splits), task.arguments)
    stages, rows = training.prepare(task, plan, splits, task.arguments)
    found = lr_find.sweep(task, plan, stages[-1], splits, rows, 20)
    assert found.losses[0] == pytest.approx(math.log(len(splits.label_names)), rel=0.5)  # nothing was learned before


@pytest.mark.parametrize("flags", [[], ["--mixup=0.4"]])
def test_the_test_mixes_rows_as_the_training_will(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    seen: list[bool] = []
    step = TransferTrainer.training_step
    monkeypatch.setattr(
        TransferTrainer, "training_step", lambda self, *rest: seen.append(bool(self.mixing)) or step(self, *rest)
    )
    monkeypatch.chdir(tmp_path)
    cli._run(["lr-find", "image-classification", *settings(world, "image", "--method=full", *flags), "--steps=12"])
    assert set(seen) == {bool(flags)}


def test_the_command_draws_and_leaves_nothing_else(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = settings(world, "text", "--method=frozen")  # a head that would be solved is trained here
    cli._run(["lr-find", "text-classification", *flags, "--steps=60", "--output=found.png"])
    printed = capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["found.png"]
    with Image.open(tmp_path / "found.png") as picture:
        assert len(set(picture.convert("RGB").getdata())) > 50
    rate = float(printed.split("valley (V):")[1].split()[0])
    assert 1e-6 < rate < 1
    assert f"next: --learning_rate {rate:.2g}" in printed
    assert "V" in printed.splitlines()[-7] or "*" in printed.splitlines()[-7]


def test_without_matplotlib_the_terminal_is_enough(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else find(name, *more)
    )
    monkeypatch.chdir(tmp_path)
    cli._run(["lr-find", "text-classification", *settings(world, "text"), "--steps=30"])
    printed = capsys.readouterr().out
    assert 'lr_find.png is not drawn: that needs matplotlib (pip install "hftl[plots]")' in printed
    assert "steepest (S):" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["full", "lp_ft", "lp_ft --head_solver=sgd"])
def test_auto_is_the_same_as_giving_the_rate_that_it_found(world: Path, tmp_path: Path, method: str) -> None:
    method, *flags = method.split()
    common = settings(world, "text", f"--method={method}", "--num_train_epochs=1", *flags)
    cli._run(["train", "text-classification", *common, "--learning_rate=auto", f"--output_dir={tmp_path / 'auto'}"])
    recipe = read_yaml(tmp_path / "auto" / "recipe.yaml")
    found = recipe["learning_rate"]
    assert f"{found:.2g}" == f"{float(f'{found:.2g}'):.2g}"
    assert (tmp_path / "auto" / "logs" / "lr_find.png").is_file()
    rate = f"--learning_rate={float(f'{found:.2g}')}"
    cli._run(["train", "text-classification", *common, rate, f"--output_dir={tmp_path / 'given'}"])
    repeated = ["train", "--config", str(tmp_path / "auto" / "recipe.yaml"), "--report_to=none"]
    cli._run([*repeated, f"--output_dir={tmp_path / 'repeated'}"])
    assert_equal_weights(tmp_path / "auto", tmp_path / "given", tmp_path / "repeated")


def test_the_rate_of_the_second_stage_is_chosen_from_where_the_first_ends(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept: list[tuple[str, float]] = []
    before = training.sweep

    def recording(task: Any, plan: Any, stage: Any, *others: Any) -> Any:
        swept.append((stage.name, float(plan.model.classifier.weight.abs().max())))
        return before(task, plan, stage, *others)

    monkeypatch.setattr(training, "sweep", recording)
    for method in ("full", "lp_ft"):
        common = settings(world, "text", f"--method={method}", "--num_train_epochs=1", "--learning_rate=auto")
        cli._run(["train", "text-classification", *common, f"--output_dir={tmp_path / method}"])
    (whole, fresh), (second, fitted) = swept
    assert (whole, second) == ("all", "all")
    assert fitted > 3 * fresh  # the head is solved by then
    stages = json.loads((tmp_path / "lp_ft" / "metrics.json").read_text())["train"]["stages"]
    assert stages[1]["learning_rate"] == read_yaml(tmp_path / "lp_ft" / "recipe.yaml")["learning_rate"]
    assert stages[1]["head_learning_rate"] == stages[1]["learning_rate"]  # one rate stays one


@pytest.mark.parametrize("flags", [["--method=full"], ["--method=lp_ft"], ["--method=gradual"], ["--method=surgical"]])
def test_the_command_finds_what_auto_finds(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    """Also behind a head that is fitted first."""
    monkeypatch.chdir(tmp_path)
    common = settings(world, "text", "--num_train_epochs=1", *flags)
    cli._run(["train", "text-classification", *common, "--learning_rate=auto", "--output_dir=run"])
    capsys.readouterr()
    cli._run(["lr-find", "text-classification", *common])
    rate = read_yaml(tmp_path / "run" / "recipe.yaml")["learning_rate"]
    assert f"next: --learning_rate {rate:.2g} (" in capsys.readouterr().out


def assert_equal_weights(run: Path, *others: Path) -> None:
    weights = load_file(run / "model.safetensors")
    for other in others:
        for name, value in load_file(other / "model.safetensors").items():
            assert torch.equal(weights[name], value), (other, name)


def test_an_interrupted_run_keeps_the_rate_that_it_found(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["train", "text-classification", *settings(world, "text", "--num_train_epochs=2", "--learning_rate=auto")]
    cli._run([*common, f"--output_dir={tmp_path / 'whole'}"])
    step = TransferTrainer.training_step

    def stop(self: Any, *others: Any) -> Any:
        if type(self) is TransferTrainer and self.state.global_step == 4:
            raise KeyboardInterrupt
        return step(self, *others)

    with monkeypatch.context() as patch:
        patch.setattr(TransferTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            cli._run([*common, f"--output_dir={tmp_path / 'run'}"])
    monkeypatch.setattr(training, "sweep", None)  # it must not be called again
    with pytest.raises(hftl.UsageError, match=r"learning_rate was 'auto', is 0\.1"):
        cli._run([*common[:-1], "--learning_rate=0.1", f"--output_dir={tmp_path / 'run'}", "--resume"])
    cli._run([*common, f"--output_dir={tmp_path / 'run'}", "--resume"])
    assert_equal_weights(tmp_path / "whole", tmp_path / "run")
    metrics = [json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("whole", "run")]
    assert metrics[0]["test"] == metrics[1]["test"]


def test_the_plot_says_what_it_shows() -> None:
    rates = tuple(np.logspace(-7, 1, 50).tolist())
    losses = tuple((np.abs(np.arange(50) - 30) / 30 + 0.5).tolist())
    lines = lr_find.plot(lr_find.Sweep(rates, losses, rates[20], rates[20]), width=50, height=8).splitlines()
    assert len(lines) == 8 + 3
    assert lines[0].startswith("   1.500 │•")
    assert lines[7].startswith("   0.500 │")
    assert lines[7][10 + 30] == "•"
    assert lines[9].index("*") == 10 + 20
    assert lines[10].split() == ["1e-07", "1e+01"]
