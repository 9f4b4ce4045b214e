"""Rows that bring their own choices: read, trained, saved, answered."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import small_data
import tiny_models
import torch
from refusal import refused
from transformers import AutoModelForMultipleChoice, AutoTokenizer

import hftl
from hftl import cli, data
from hftl.builtin import riddles
from hftl.errors import UsageError
from hftl.finished import find_run
from hftl.modality import CHOICES
from hftl.problems import Choice
from hftl.report import render_report

QUICK = ["--report_to=none", "--precision=fp32", "--per_device_train_batch_size=8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("choices")
    small_data.write_choices(folder / "data", {"train": 160, "dev": 12, "test": 14})
    tiny_models.write_tiny_text_model(folder / "bert")
    tiny_models.write_tiny_text_model(folder / "roberta", kind="roberta")
    return folder


def train(place: Path, output: Path, *flags: str, model: str = "bert", dataset: str = "data") -> hftl.Run:
    words = [f"--model={place / model}", f"--dataset={place / dataset}", *QUICK, *flags, f"--output_dir={output}"]
    cli._run(["train", "multiple-choice", *words])
    return hftl.load_run(output)


@pytest.fixture(scope="module")
def run(place: Path, tmp_path_factory: pytest.TempPathFactory) -> hftl.Run:
    flags = ["--learning_rate=0.01", "--num_train_epochs=8"]
    return train(place, tmp_path_factory.mktemp("run") / "run", *flags)


def rows_of(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "data" / "test.jsonl").read_text().splitlines()]


def test_it_learns_and_plain_transformers_answers_alike(place: Path, run: hftl.Run) -> None:
    assert run.metrics["test"]["accuracy"] > 0.6  # one of three, told by a word
    with (run.folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = rows_of(place)
    assert [row["label"] for row in rows] == [str(row["label"]) for row in expected]
    right = np.mean([row["label"] == row["prediction"] for row in rows])
    assert run.metrics["test"]["accuracy"] == pytest.approx(right)
    assert run.evaluate(str(place / "data"))["accuracy"] == pytest.approx(right)
    inputs = [{"text": row["question"], "choices": row["choices"]} for row in expected]
    predictions = run.predict(inputs)
    assert [entry.label for entry in predictions] == [row["prediction"] for row in rows]
    model = AutoModelForMultipleChoice.from_pretrained(run.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    for row, entry in zip(inputs[:3], predictions, strict=False):
        encoded = tokenizer([row["text"]] * 3, row["choices"], padding=True, return_tensors="pt")
        with torch.no_grad():
            found = model(**{name: values[None] for name, values in encoded.items()}).logits.softmax(-1)[0]
        assert [*entry.probabilities.values()] == pytest.approx(found.tolist(), abs=1e-5)


def test_the_order_of_the_choices_does_not_matter(place: Path, run: hftl.Run) -> None:
    rows = [{"text": row["question"], "choices": row["choices"]} for row in rows_of(place)]
    turned = [{**row, "choices": row["choices"][::-1]} for row in rows]
    for one, other in zip(run.predict(rows), run.predict(turned), strict=True):
        assert [*one.probabilities.values()] == pytest.approx([*other.probabilities.values()][::-1], abs=1e-5)


def splits_of(path: Path, **settings: Any) -> data.Splits:
    return data.load_splits({"dataset_name": str(path), "validation_fraction": 0.25, **settings}, CHOICES, Choice())


@pytest.mark.parametrize(
    ("choices", "labels", "names"),
    [
        (["a", "b", "c"], [0, 1, 2, 1], ["0", "1", "2"]),
        (["a", "b", "c"], [1, 1, 0, 1], ["0", "1", "2"]),
        (["a", "b", "c"], ["1", "3", "1", "3"], ["1", "2", "3"]),
        (["a", "b", "c"], ["A", "B", "A", "B"], ["A", "B", "C"]),
        (["x", "y", "z"], ["x", "z", "x", "z"], ["0", "1", "2"]),
        ({"label": ["A", "B", "C"], "text": ["a", "b", "c"]}, ["B", "C", "B", "C"], ["A", "B", "C"]),
        ({"label": ["C", "A", "B"], "text": ["a", "b", "c"]}, ["B", "C", "B", "C"], ["0", "1", "2"]),
    ],
)
def test_labels_are_named_as_people_name_them(tmp_path: Path, choices: Any, labels: Any, names: list[str]) -> None:
    rows = [{"question": f"q{row}", "choices": choices, "answerKey": label} for row, label in enumerate(labels * 4)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = splits_of(tmp_path / "a.jsonl")
    assert splits.label_names == names
    every = [*splits.train, *splits.validation]
    given = {row["question"]: row["answerKey"] for row in rows}
    texts = choices["text"] if isinstance(choices, dict) else choices
    for row in every:
        label = given[row["text"]]
        if isinstance(choices, dict):
            place = choices["label"].index(label)
        else:
            place = texts.index(label) if label in texts else names.index(str(label))
        assert row["label"] == place
        assert row["choices"] == texts


def test_another_table_may_name_the_choices_otherwise(place: Path, run: hftl.Run, tmp_path: Path) -> None:
    expected = run.metrics["test"]["accuracy"]
    for name, key in (("letters", "ABC"), ("ones", "123")):
        rows = [{**row, "label": key[row["label"]]} for row in rows_of(place)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert run.evaluate(str(tmp_path / f"{name}.jsonl"))["accuracy"] == expected
    rows = [{**row, "label": row["choices"][row["label"]]} for row in rows_of(place)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run.evaluate(str(tmp_path / "texts.jsonl"))["accuracy"] == expected


def test_choices_may_stand_in_columns_of_their_own(place: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for split in ("train", "dev", "test"):
        lines = (place / "data" / f"{split}.jsonl").read_text().splitlines()
        with (tmp_path / "data" / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["startphrase", "ending0", "ending1", "ending2", "label"])
            for row in map(json.loads, lines):
                writer.writerow([row["question"], *row["choices"], row["label"]])
    flags = ["--choice_columns", "ending0", "ending1", "ending2", "--max_steps=1"]
    run = train(place, tmp_path / "run", *flags, dataset=str(tmp_path / "data"))
    expected = rows_of(place)
    given = run.predict([{"text": row["question"], "choices": row["choices"]} for row in expected])
    read = run.predict(tmp_path / "data" / "test.csv")
    assert [entry.label for entry in given] == [entry.label for entry in read]
    table = (place / "data" / "test.jsonl").read_text().replace('"choices"', '"mine"')
    (tmp_path / "mine.jsonl").write_text(table)
    columns = {"choices": "mine", "text": "question"}
    assert [one.label for one in run.predict(tmp_path / "mine.jsonl", **columns)] == [one.label for one in given]
    assert run.evaluate(str(tmp_path / "mine.jsonl"), **columns)["accuracy"] == run.metrics["test"]["accuracy"]
    accuracy = run.evaluate(str(tmp_path / "data"))["accuracy"]
    assert accuracy == pytest.approx(run.metrics["test"]["accuracy"])
    again = ["train", "multiple-choice", f"--config={run.folder / 'recipe.yaml'}", f"--output_dir={tmp_path / 'again'}"]
    cli._run(again)
    assert hftl.load_run(tmp_path / "again").metrics["test"]["loss"] == run.metrics["test"]["loss"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([["a", "b"], ["a", "b", "c"], ["a", "b"]], "row 1 has 3 choices, and most have 2"),
        ([["a"], ["b"], ["c"]], "there is nothing to choose from"),
        (["a or b"] * 3, "'a or b' in the column 'choices' is no list of choices (row 0)"),
    ],
)
def test_choices_that_are_none_are_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: Any, said: str
) -> None:
    lines = [json.dumps({"question": "q", "choices": choices, "label": 0}) for choices in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    command = ["train", "multiple-choice", f"--model={place / 'bert'}", f"--dataset={tmp_path / 'a.jsonl'}"]
    assert said in refused([*command, f"--output_dir={tmp_path / 'run'}"], capsys)


@pytest.mark.parametrize(
    ("choices", "labels", "said"),
    [
        (["x", "y"], ("x", "y", "z"), r"'z' in the column 'label' is none of the row's choices \(row counting"),
        (["x", "x"], ("x", "x", "x"), "'x' in the column 'label' is several of the row's choices"),
        (["x", "y", "z"], ("A", "1", "B"), "'1' in the column 'label' is no place among 3 choices"),
        (["x", "y", "z"], (0, 1, 3), "'3' in the column 'label' is no place among 3 choices"),
        (["x", "y", "z"], (0, -1, 2), "'-1' in the column 'label' is no place"),
        ({"text": ["x", "y"], "label": ["B", "A"]}, ("A", "B", "C"), "'C' is none of the names of its choices"),
        (["1", "2", "3"], ("2", "1", "0"), "'2' in the column 'label' may be the place of a choice or the choice '2'"),
        (["x", "y"], ("A", None, "B"), "1 of 3 rows have no label"),
        (["x", None], ("A", "A", "B"), "is no list of choices"),
    ],
)
def test_a_label_that_is_no_choice_is_named(tmp_path: Path, choices: Any, labels: Any, said: str) -> None:
    lines = [json.dumps({"question": "q", "choices": choices, "label": label}) for label in labels]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UsageError, match=said):
        splits_of(tmp_path / "a.jsonl")


def test_another_number_of_choices_is_refused(place: Path, run: hftl.Run, tmp_path: Path) -> None:
    for split, choices in (("train", ["a", "b", "c"]), ("test", ["a", "b"])):
        line = json.dumps({"question": "q", "choices": choices, "label": "A"})
        other = json.dumps({"question": "p", "choices": choices, "label": "B"})
        (tmp_path / f"{split}.jsonl").write_text("\n".join([line, other] * 4))
    with pytest.raises(UsageError, match="its rows have 2 choices, and 3 are chosen from"):
        splits_of(tmp_path)
    with pytest.raises(UsageError, match="its rows have 2 choices, and 3 are chosen from"):
        run.evaluate(str(tmp_path))
    with pytest.raises(UsageError, match="its rows have 2 choices, and the model chooses one of 3"):
        run.predict(tmp_path / "test.jsonl")
    (tmp_path / "a.txt").write_text("what?")
    for source in (tmp_path / "a.txt", tmp_path):
        with pytest.raises(UsageError, match="questions stand in a table"):
            run.predict(source)
    for wrong in (3, "what?", [{"text": "a", "choices": "abc"}], {"choices": ["a", "b", "c"]}, [["a", "b", "c"]]):
        with pytest.raises(UsageError, match="The model chooses one of 3"):
            run.predict(wrong)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method=auto"], "--method auto is for rows of one class each, not for rows with choices of their own"),
        (["--class_weights=balanced"], "--class_weights weighs classes"),
        (["--word_dropout=0.1"], "--word_dropout would leave out other words of each choice"),
        (["--choice_columns", "one", "two"], "--choice_columns 'one'"),
        (["--choices_column=none"], "--choices_column 'none'"),
        (["--choices_column=choices", "--choice_columns", "one", "two"], "leave one out"),
        (["--choice_columns", "one", "one"], "--choice_columns names a column twice"),
        (["--method=frozen", "--feature_views=2"], "--feature_views 2 cannot be"),
        (["--model=random:gpt2"], "is not a model for texts with choices"),
        (["--feature_cache=on", "--method=partial"], "each row is read several times, with one choice after the other"),
    ],
)
def test_what_does_not_go_with_choices_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    command = ["train", "multiple-choice", f"--model={place / 'bert'}", f"--dataset={place / 'data'}"]
    assert said in refused([*command, *flags, f"--output_dir={tmp_path / 'run'}"], capsys)


def test_rows_are_counted_that_were_cut(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(place, tmp_path / "run", "--max_steps=1", "--max_length=9")
    assert "160 of 160 training texts are longer than 9 tokens" in capsys.readouterr().out


def test_a_decoder_is_no_model_for_choices(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_models.write_tiny_text_model(tmp_path / "gpt2", kind="gpt2")
    command = ["train", "multiple-choice", f"--model={tmp_path / 'gpt2'}", f"--dataset={place / 'data'}"]
    assert "AutoModelForMultipleChoice does not take it" in refused(command, capsys)


def test_a_model_without_pretrained_weights(place: Path, tmp_path: Path) -> None:
    words = [
        "--model=random:bert",
        f"--dataset={place / 'data'}",
        *QUICK,
        "--max_steps=1",
        f"--output_dir={tmp_path}/r",
    ]
    cli._run(["train", "multiple-choice", *words])
    assert hftl.load_run(tmp_path / "r").predict({"text": "a", "choices": ["b", "c", "d"]})[0].label in ("0", "1", "2")


def test_the_report_and_the_card(run: hftl.Run) -> None:
    found = find_run(run.folder)
    page, shared = render_report(found, None), render_report(found, None, shared=True)
    assert "part of what is answered that is right" in page
    assert "sure</td>" not in shared
    card = (run.folder / "README.md").read_text()
    assert "AutoModelForMultipleChoice.from_pretrained" in card
    lines = card.partition("```python\n")[2].partition("```")[0].replace('"run"', repr(str(run.folder)))
    exec(lines, {})  # as a reader runs it
    assert "a guess is right in 0.33" in card
    assert "macro F1" not in card
    with pytest.raises(UsageError, match="The model chooses one of 3"):
        run.predict([{"text": "a", "choices": ["b"]}])


def test_built_in_riddles_share_no_answer() -> None:
    parts: dict[str, datasets.Dataset] = riddles()
    words = {name: {word for row in part["choices"][:] for word in row} for name, part in parts.items()}
    assert {name: len(part) for name, part in parts.items()} == {"train": 600, "validation": 150, "test": 250}
    assert not words["train"] & words["test"]
    assert not words["validation"] & (words["train"] | words["test"])
    right = {row["choices"]["ABCD".index(row["answer"])] for row in parts["train"]}
    wrong = {word for row in parts["train"] for word in row["choices"]} - right
    assert not wrong  # every word is now and then the answer
