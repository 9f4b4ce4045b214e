"""Killed at any moment, then `--resume`: the same weights, bit for bit, as a run that nobody disturbed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import small_data
import tiny_models
from forked import Command, Done, run_command
from safetensors.torch import load_file

import hftl

# A method that is lp_ft (or full), and that ends its own process at a chosen moment: `stage:step:signal`, the step
# counted over calls of the loss in training; `writing:N`, in the middle of the N-th checkpoint; or `publishing:N`,
# before the N-th file of the finished run is moved to its place.
METHOD = """
import dataclasses, os, signal, subprocess
import torch, transformers
from hftl import folder
from hftl.losses import CrossEntropyLoss
from hftl.methods import METHODS

WHEN = os.environ.get("STOP_AT", "")
written = 0
write = transformers.Trainer._save_optimizer_and_scheduler

def torn(self, folder):
    global written
    written += 1
    if WHEN == f"writing:{written}":
        open(os.path.join(folder, "optimizer.pt"), "wb").write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, folder)

transformers.Trainer._save_optimizer_and_scheduler = torn
published = 0
move = os.replace

def moved(source, target):
    global published
    published += os.path.basename(os.path.dirname(source)) == folder.PARTIAL
    if WHEN == f"publishing:{published}":
        os.kill(os.getpid(), signal.SIGKILL)
    move(source, target)

folder.os.replace = moved

class Stopping(CrossEntropyLoss):
    def __init__(self, stage):
        super().__init__()
        self.stage, self.calls = stage, 0

    def __call__(self, outputs, labels, num_items_in_batch=None):
        if torch.is_grad_enabled():
            self.calls += 1
            if WHEN.rpartition(":")[0] == f"{self.stage}:{self.calls}":
                number = WHEN.rpartition(":")[2]
                if number == "group":  # as a job scheduler does: from outside, to every process
                    subprocess.run(["kill", "-TERM", "--", f"-{os.getpgrp()}"])
                else:
                    os.kill(os.getpid(), int(number))
        return super().__call__(outputs, labels, num_items_in_batch)

def stopping(model, arguments):
    inner = os.environ.get("INNER_METHOD", "lp_ft")
    plan = METHODS["full" if inner == "six" else inner](model, arguments)
    short = {"epochs": 6.0 if inner == "six" else 2.0, "least_steps": 0}
    stages = [dataclasses.replace(stage, **short, loss=Stopping(index)) for index, stage in enumerate(plan.stages)]
    return dataclasses.replace(plan, stages=tuple(stages))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    (folder / "stopping.py").write_text(METHOD, encoding="utf-8")
    small_data.write_images(folder / "images", {"train": 8, "val": 4})
    small_data.write_texts(folder / "texts", {"train": 24, "dev": 8})
    tiny_models.write_tiny_cnn(folder / "convnet", drop_path_rate=0.2)
    tiny_models.write_tiny_text_model(folder / "bert", kind="bert")
    return folder


def run(place: Path, name: str, task: str, stop_at: str = "", inner: str = "lp_ft", *flags: str) -> Done:
    data, model = ("images", "convnet") if task == "image-classification" else ("texts", "bert")
    words = ["train", task, f"--model={model}", f"--dataset={data}", f"--output_dir={name}", *flags]
    words += ["--method=stopping.py:stopping", "--per_device_train_batch_size=8", "--logging_steps=1"]
    words += ["--save_total_limit=2", *(["--image_size=64"] if task == "image-classification" else [])]
    return run_command(words, place, STOP_AT=stop_at, INNER_METHOD=inner)


def assert_equal_weights(first: Path, second: Path) -> None:
    a, b = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert a.keys() == b.keys()
    assert [name for name in a if not a[name].equal(b[name])] == []


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> dict[str, Path]:
    names = {"image-classification": "image", "text-classification": "text"}
    for task, name in names.items():
        result = run(place, name, task)
        assert result.returncode == 0, result.stderr
    return {task: place / name for task, name in names.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "stop_at"),
    [
        ("image-classification", "0:2:9"),  # in the first epoch: there is no checkpoint yet
        ("image-classification", "1:5:9"),  # in the second epoch of the second stage
        ("image-classification", "writing:3"),  # while the first checkpoint of the second stage is written
        ("text-classification", "1:4:9"),  # dropout, and rows grouped by length
        ("text-classification", "publishing:3"),  # while the files of the finished run come to their places
    ],
)
def test_killed_and_resumed(place: Path, undisturbed: dict[str, Path], task: str, stop_at: str) -> None:
    name = f"killed-{task}-{stop_at}".replace(":", "-")
    killed = run(place, name, task, stop_at)
    assert killed.returncode == -signal.SIGKILL
    assert not (place / name / "metrics.json").exists()
    with pytest.raises(hftl.UsageError, match="is no finished run"):
        hftl.load_run(place / name)
    resumed = run(place, name, task, "", "lp_ft", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert_equal_weights(undisturbed[task], place / name)
    assert not (place / name / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "number", "code"),
    [
        ("text-classification", "15", 143),
        ("text-classification", "2", 130),
        ("image-classification", "group", 143),  # data workers too
    ],
)
def test_signals_write_a_checkpoint(
    place: Path, undisturbed: dict[str, Path], task: str, number: str, code: int
) -> None:
    name = f"stopped-{number}"
    workers = ["--dataloader_num_workers=1"] if task == "image-classification" else []
    stopped = run(place, name, task, f"1:2:{number}", "lp_ft", *workers)
    assert stopped.returncode == code, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert "--resume" in stopped.stderr.strip().splitlines()[-1]
    assert list((place / name / "checkpoints").glob("2-*/checkpoint-2/model.safetensors"))  # in the middle of an epoch
    resumed = run(place, name, task, "", "lp_ft", *workers, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert_equal_weights(undisturbed[task], place / name)


def test_a_signal_before_there_is_anything_to_keep(tmp_path: Path) -> None:
    """While the imports run, say: a line, the usual exit code, and no folder."""
    recipe = "import os, signal\n\n\ndef main(argv):\n    os.kill(os.getpid(), signal.SIGTERM)\n"
    (tmp_path / "recipe.py").write_text(recipe)
    stopped = run_command(["train", "recipe.py"], tmp_path)
    assert (stopped.returncode, stopped.stderr) == (143, "Stopped by SIGTERM.\n")
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["recipe.py"]


@pytest.mark.slow
def test_two_runs_at_once_do_not_share_a_folder(place: Path) -> None:
    words = ["train", "text-classification", "--model=bert", "--dataset=texts", "--num_train_epochs=8"]
    words += ["--output_dir=shared", "--per_device_train_batch_size=8", "--report_to=none"]
    both = [Command([*words, f"--seed={seed}"], place) for seed in (1, 2)]
    done = {seed: command.wait() for seed, command in enumerate(both, start=1)}
    assert sorted(entry.returncode for entry in done.values()) == [0, 2]
    winner = next(seed for seed, entry in done.items() if entry.returncode == 0)
    assert "'shared': another process is training into it" in done[3 - winner].stderr
    assert len(done[3 - winner].stderr.splitlines()) == 1
    alone = run_command([*words, f"--seed={winner}", "--output_dir=alone"], place)
    assert alone.returncode == 0, alone.stderr
    assert_equal_weights(place / "shared", place / "alone")


@pytest.mark.slow
def test_early_stopping_goes_on_counting(place: Path) -> None:
    # A rate of nearly nothing: no evaluation is better than the first, so that the third epoch is the last.
    flags = ("--num_train_epochs=6", "--early_stopping_patience=2", "--learning_rate=1e-12")
    whole = run(place, "early-whole", "text-classification", "", "six", *flags)
    assert whole.returncode == 0, whole.stderr
    killed = run(place, "early-killed", "text-classification", "0:7:9", "six", *flags)
    assert killed.returncode == -signal.SIGKILL
    resumed = run(place, "early-killed", "text-classification", "", "six", *flags, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    steps = [
        json.loads((place / name / "metrics.json").read_text())["train"]["stages"][0]["steps"]
        for name in ("early-whole", "early-killed")
    ]
    assert steps == [9, 9]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "flags"),
    [
        ("text-classification", ("--average=ema", "--wise_ft", "--sampler=balanced", "--word_dropout=0.2")),
        ("image-classification", ("--average=soup", "--mixup=0.4", "--cutmix=1", "--augmentation=trivial")),
    ],
)
def test_averages_and_draws_killed_and_resumed(place: Path, task: str, flags: tuple[str, ...]) -> None:
    name = flags[0].rpartition("=")[2]
    whole = run(place, f"{name}-whole", task, "", "six", *flags)
    assert whole.returncode == 0, whole.stderr
    killed = run(place, f"{name}-killed", task, "0:17:9", "six", *flags)  # in the last epoch
    assert killed.returncode == -signal.SIGKILL
    resumed = run(place, f"{name}-killed", task, "", "six", *flags, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert_equal_weights(place / f"{name}-whole", place / f"{name}-killed")
    stages = [
        json.loads((place / f"{name}-{kind}" / "metrics.json").read_text())["train"]["stages"][0]
        for kind in ("whole", "killed")
    ]
    assert stages[0]["average"] == stages[1]["average"]
    assert stages[0].get("wise_ft") == stages[1].get("wise_ft")


@pytest.mark.slow
def test_a_chosen_block_with_a_penalty_killed_and_resumed(place: Path) -> None:
    flags = ("--penalty=delta", "--lr_scheduler_type=slanted_triangular")
    whole = run(place, "surgical-whole", "image-classification", "", "surgical", *flags)
    assert whole.returncode == 0, whole.stderr
    # The loss is called three times to weigh channels, three times to choose the block, and three times an epoch: this
    # is in the second epoch.
    killed = run(place, "surgical-killed", "image-classification", "1:11:9", "surgical", *flags)
    assert killed.returncode == -signal.SIGKILL
    resumed = run(place, "surgical-killed", "image-classification", "", "surgical", *flags, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "going on from checkpoint-3" in resumed.stdout
    assert_equal_weights(place / "surgical-whole", place / "surgical-killed")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_adapters_killed_and_resumed(place: Path, kind: str) -> None:
    # AdaLoRA decides by averages over all steps which ranks are left.
    flags = (f"--peft_type={kind}", "--learning_rate=1e-2", *(["--average=swa"] if kind == "lora" else []))
    whole = run(place, f"{kind}-whole", "text-classification", "", "lora", *flags)
    assert whole.returncode == 0, whole.stderr
    killed = run(place, f"{kind}-killed", "text-classification", "0:5:9", "lora", *flags)
    assert killed.returncode == -signal.SIGKILL
    resumed = run(place, f"{kind}-killed", "text-classification", "", "lora", *flags, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert_equal_weights(place / f"{kind}-whole", place / f"{kind}-killed")
