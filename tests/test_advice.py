"""`hftl advise`: what it sees, what it makes of it, and that its command works."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from small_data import write_images, write_sounds, write_texts
from tiny_models import write_timm_folder, write_tiny_text_model

from hftl import cli
from hftl.advice import Figures, choose
from hftl.machine import processor

SEEN = Figures(
    counts=(500, 400),
    inputs="",
    hint="",
    hardware="",
    probe=0.99,
    neighbours=0.98,
    silhouette=0.2,
    logme=0.5,
    blocks=13,
    adaptable=True,
    pairs=False,
    forward=0.01,
)
FEW, FAR, HELD = {"counts": (40, 30)}, {"probe": 0.80, "neighbours": 0.79}, {"probe": 0.80, "neighbours": 0.70}


@pytest.mark.parametrize(
    ("changes", "method", "blocks", "figures"),
    [
        (FEW | {"pairs": True}, "setfit", "all 13, on pairs", ("30 rows", "0.990")),
        (FEW | FAR | {"pairs": True}, "setfit", "all 13, on pairs", ("30 rows", "0.800")),
        ({"pairs": True}, "lp_ft", "all 13", ("400 rows",)),
        (FEW, "frozen", "the head alone", ("30 rows", "0.990")),
        ({}, "lp_ft", "all 13", ("400 rows", "0.990")),
        (FEW | HELD, "lora", "all 13 but the first", ("30 rows", "0.800", "10.0 points", "lp_ft scores 3 points more")),
        (FEW | HELD | {"adaptable": False}, "partial", "the last 6 of 13", ("10.0 points",)),
        (FEW | FAR, "partial", "the last 6 of 13", ("30 rows", "0.800", "1.0 points", "and 6 more than partial")),
        (FAR, "full", "all 13", ("400 rows", "0.800")),
        (HELD, "full", "all 13", ("400 rows", "0.800")),
        ({"probe": 0.52}, "full", "all 13", ("from scratch", "0.520")),
        # right on 0.99, but nearly always the same answer would be too
        ({"counts": (9_800, 200)}, "full", "all 13", ("200 rows", "0.980")),
    ],
)
def test_each_rule_and_the_figures_that_it_names(
    changes: dict[str, Any], method: str, blocks: str, figures: tuple[str, ...]
) -> None:
    choice = choose(dataclasses.replace(SEEN, **changes))
    assert choice.method == method
    assert blocks in choice.blocks
    for figure in figures:
        assert figure in " ".join(choice.reasons)


def test_a_class_without_rows_is_not_the_smallest() -> None:
    assert dataclasses.replace(SEEN, counts=(10, 0, 30)).smallest == 10


def advice(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[str, list[str]]:
    cli._run(["advise", *map(str, arguments)])
    printed = capsys.readouterr().out
    return printed, shlex.split(printed.splitlines()[-1])


def test_the_command_for_texts_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_text_model(tmp_path / "bert")
    write_texts(tmp_path / "my texts", {"train": 40, "validation": 8, "test": 8})
    flags = ["--model", tmp_path / "bert", "--dataset", tmp_path / "my texts", "--max_length=10"]
    printed, command = advice(capsys, "text-classification", *flags)
    assert "40 rows, 2 classes, 20 to 20 rows a class (1.0 to 1); texts of 10 tokens (median)" in printed
    assert "of the texts are cut at 10 tokens" in printed
    assert "small: 20 rows in the smallest class" in printed
    assert "chance 0.500" in printed
    assert command[:3] == ["hftl", "train", "text-classification"]
    assert "method:    setfit\n" in printed
    assert {"--method=setfit", "--num_train_epochs=10", "--learning_rate=0.0001"} <= set(command)
    cli._run([*command[1:], f"--output_dir={tmp_path / 'run'}", "--report_to=none"])
    assert "test" in json.loads((tmp_path / "run" / "metrics.json").read_text())


def test_epochs_are_only_said_to_be_added_where_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A task of sounds has six epochs as a rule."""
    write_timm_folder(tmp_path / "resnet", "resnet18", channels=[8, 8, 8, 8], stem_width=8)
    write_sounds(tmp_path / "data", {"train": 20, "validation": 2})
    flags = ["--model", tmp_path / "resnet", "--dataset", tmp_path / "data", "--per_device_train_batch_size=2"]
    printed, command = advice(capsys, "audio-classification", *flags)
    assert "--num_train_epochs=6" in command
    assert "6 epochs (more gained nothing on a few thousand rows)" in printed
    assert f"({processor()[0]})" in printed


def test_pictures_that_are_enlarged_and_classes_of_different_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_timm_folder(tmp_path / "resnet", "resnet18", channels=[8, 8, 8, 8], stem_width=8)
    write_images(tmp_path / "data", {"train": 16, "validation": 2}, size=20)
    for path in sorted((tmp_path / "data" / "train" / "red").iterdir())[4:]:
        path.unlink()
    flags = ["--model", tmp_path / "resnet", "--dataset", tmp_path / "data", "--learning_rate=0.01"]
    printed, command = advice(capsys, "image-classification", *flags)
    assert "pictures of 20 x 20 (median), read at 64" in printed
    assert "drawn 3.2 times as large" in printed
    assert "classes are 4 to 1: macro F1" in printed
    assert "4 to 16 rows a class (4.0 to 1)" in printed
    assert command.count("--learning_rate=0.01") == 1
    assert not any(token.startswith("--learning_rate=0.0001") for token in command)
