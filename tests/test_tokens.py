"""Texts are split into tokens once: in a later run they come from the disk, and are the same."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_data
from safetensors.torch import load_file
from tiny_models import write_tiny_text_model

import hftl
from hftl import cli
from hftl.tasks.text_classification import Template, TextDataset

#: more than are worth a file, and no multiple of what is tokenised at once
ROWS = 1_300


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder for this test alone."""
    monkeypatch.setenv("HFTL_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "tokens"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT."""
    return write_tiny_text_model(tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every call of the tokenizer how many texts it was given."""
    calls: list[int] = []
    before, filled = TextDataset._tokenised, Template.filled

    def counting(dataset: TextDataset, *texts: Any, **settings: Any) -> Any:
        calls.append(len(texts[0]))
        return before(dataset, *texts, **settings)

    def counting_filled(template: Template, rows: Any) -> Any:
        calls.append(len(rows))
        return filled(template, rows)

    monkeypatch.setattr(TextDataset, "_tokenised", counting)
    monkeypatch.setattr(Template, "filled", counting_filled)
    return calls


def rows_of(kind: str, count: int = ROWS) -> list[dict[str, Any]]:
    """Rows as a task reads them, some of them long."""
    random = np.random.default_rng(0)
    words = ["good", "bad", "fine", "dull", "slow", "fast", "warm", "zzz", "€"]
    texts = [" ".join(random.choice(words, size=size)) for size in random.integers(1, 30, size=count)]
    if kind == "words":
        return [{"text": text.replace(" ", "\n"), "label": [0] * len(text.split())} for text in texts]
    rows: list[dict[str, Any]] = [{"text": text, "label": row % 2} for row, text in enumerate(texts)]
    if kind == "pairs":
        return [{**row, "text_pair": text} for row, text in zip(rows, reversed(texts), strict=True)]
    return [{**row, "choices": ["good", row["text"]]} for row in rows] if kind == "choices" else rows


def task_of(kind: str, model: Path, *flags: str) -> Any:
    task_class, arguments_class = {
        "words": (hftl.TokenClassification, hftl.TokenArguments),
        "choices": (hftl.MultipleChoice, hftl.ChoiceArguments),
    }.get(kind, (hftl.TextClassification, hftl.TextArguments))
    template = ["--template=It says {text} and is"] if kind == "template" else []
    task = task_class(hftl.parse(arguments_class, [f"--model={model}", "--output_dir=unused", *template, *flags]))
    task.load_processor(model)
    task.processor.model_max_length = 16
    task.says_cut = False
    return task


def contents(dataset: Any) -> list[Any]:
    return [dataset.examples, dataset.lengths, dataset.cut, getattr(dataset, "first_tokens", None)]


@pytest.mark.parametrize("kind", ["texts", "pairs", "template", "words", "choices"])
def test_a_second_run_splits_nothing(kind: str, model: Path, home: Path, split: list[int]) -> None:
    expected = contents(task_of(kind, model, "--feature_cache=off").dataset(rows_of(kind), training=False))
    assert not home.exists()
    assert 0 < expected[2] < ROWS  # some are cut
    first = task_of(kind, model).dataset(rows_of(kind), training=True)
    assert len([*home.iterdir()]) == 2
    split.clear()
    assert contents(first) == contents(task_of(kind, model).dataset(rows_of(kind), training=False)) == expected
    assert split == []


def test_only_what_grew_or_changed_is_split(model: Path, split: list[int]) -> None:
    rows = rows_of("texts")
    task_of("texts", model).dataset(rows[:1_000], training=True)
    split.clear()
    task_of("texts", model).dataset(rows, training=True)
    assert split == [300]
    rows[0]["text"] += "."
    task_of("texts", model).dataset(rows, training=True)
    assert split == [300, 1_000]
    for task in (task_of("texts", model), task_of("texts", model)):
        task.processor.truncation_side = "left"
        task.dataset(rows, training=True)
    assert split == [300, 1_000, 1_000, 300]


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: setattr(tokenizer, "model_max_length", 12),
        lambda tokenizer: tokenizer.add_tokens(["zzz"]),
        lambda tokenizer: setattr(tokenizer, "model_input_names", ["input_ids", "attention_mask"]),
    ],
)
def test_another_tokenizer_has_tokens_of_its_own(model: Path, change: Any) -> None:
    task_of("texts", model).dataset(rows_of("texts"), training=True)
    task, other = task_of("texts", model), task_of("texts", model, "--feature_cache=off")
    change(task.processor)
    change(other.processor)
    found = task.dataset(rows_of("texts"), training=True)
    assert contents(found) == contents(other.dataset(rows_of("texts"), training=True))


def test_few_texts_and_those_to_predict_are_not_kept(model: Path, home: Path) -> None:
    task_of("texts", model).dataset(rows_of("texts", 100), training=True)
    run = hftl.Run(Path("unused"), task_of("texts", model))
    run.task.dataset(rows_of("texts"), training=False)
    both = hftl.ImageTextClassification(hftl.parse(hftl.ImageTextArguments, ["--model=unused", "--output_dir=unused"]))
    both.text, both.image = task_of("texts", model), hftl.ImageClassification(both.arguments)
    hftl.Run(Path("unused"), both)
    both._texts(rows_of("texts"), training=False)
    assert not home.exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped bit"])
def test_a_damaged_file_is_made_again(model: Path, home: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected = contents(task_of("texts", model).dataset(rows_of("texts"), training=True))
    path = sorted(home.iterdir())[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"cut": content[:-50], "empty": b""}.get(damage, content))
    assert contents(task_of("texts", model).dataset(rows_of("texts"), training=True)) == expected
    assert f"tokens: {path} is made again" in capsys.readouterr().out
    assert contents(task_of("texts", model).dataset(rows_of("texts"), training=True)) == expected
    assert "made again" not in capsys.readouterr().out


def test_a_full_disk_ends_the_keeping_not_the_run(
    model: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    expected = contents(task_of("texts", model, "--feature_cache=off").dataset(rows_of("texts"), training=True))
    monkeypatch.setattr(os, "replace", full)
    assert contents(task_of("texts", model).dataset(rows_of("texts"), training=True)) == expected
    task_of("texts", model).dataset(rows_of("texts"), training=False)
    assert capsys.readouterr().out.count("tokens: not kept in") == 1
    assert not [*home.iterdir()]


def test_files_of_somebody_else_are_read(model: Path, split: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    task_of("texts", model).dataset(rows_of("texts"), training=True)
    split.clear()
    monkeypatch.setattr(os, "utime", refused)
    task_of("texts", model).dataset(rows_of("texts"), training=True)
    assert split == []


def test_what_nobody_read_for_a_month_is_removed(model: Path, home: Path) -> None:
    home.mkdir(parents=True)
    for name, days in (("old.npz", 31), ("new.npz", 29)):
        (home / name).write_bytes(b"")
        os.utime(home / name, (time.time() - 86_400 * days,) * 2)
    task_of("texts", model).dataset(rows_of("texts"), training=True)
    assert not (home / "old.npz").exists()
    assert len([*home.iterdir()]) == 3
    for path in home.iterdir():
        os.utime(path, (0, 0))
    task_of("texts", model).dataset(rows_of("texts"), training=True)
    assert sum(path.stat().st_mtime > 0 for path in home.iterdir()) == 2  # which were read


def test_a_run_is_the_same_from_kept_tokens(
    model: Path, home: Path, tmp_path: Path, split: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    small_data.write_texts(tmp_path / "data", {"train": 256, "validation": 20})
    weights = []
    for name in ("first", "second"):
        split.clear()
        run = hftl.finetune(
            "text-classification", model=model, dataset=tmp_path / "data", output_dir=tmp_path / name, max_steps=4,
            report_to="none",
        )  # fmt: skip
        weights.append(load_file(run.folder / "model.safetensors"))
    assert 256 not in split
    assert all(tensor.equal(weights[1][name]) for name, tensor in weights[0].items())
    capsys.readouterr()
    cli._run(["cache", "ls"])
    assert "texts as tokens" in capsys.readouterr().out
    cli._run(["cache", "rm", "tokens"])
    assert not home.exists()
