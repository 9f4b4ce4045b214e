"""Images with texts: two backbones in one model, either input may be missing, and everything else as for one."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import small_data
import tiny_models
import torch
from refusal import refused
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

import hftl
from hftl import backbones, cli
from hftl.builtin import captions
from hftl.errors import UsageError
from hftl.fusion import FusionModel, Table

QUICK = ["--report_to=none", "--dataloader_num_workers=0", "--per_device_train_batch_size=8", "--num_train_epochs=1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of class folders, in tables with a text for each; some have none, or no picture."""
    folder = tmp_path_factory.mktemp("both")
    small_data.write_pairs(folder / "tables", {"train": 16, "val": 6, "test": 6})
    tiny_models.write_tiny_cnn(folder / "cnn")
    tiny_models.write_tiny_image_model(folder / "vit")
    tiny_models.write_tiny_text_model(folder / "bert")
    tiny_models.write_tiny_text_model(folder / "gpt2", kind="gpt2")
    return folder


def write_table(path: Path, rows: list[list[Any]], header: tuple[str, ...] = ("photo", "caption", "label")) -> Path:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def train(place: Path, output: Path, *flags: str, image: str = "cnn", text: str = "bert") -> hftl.Run:
    words = [f"--model={place / image}", f"--text_model={place / text}", f"--dataset={place / 'tables'}", *QUICK]
    cli._run(["train", "image-text-classification", *words, f"--output_dir={output}", *flags])
    return hftl.load_run(output)


@pytest.fixture(scope="module")
def run(place: Path, tmp_path_factory: pytest.TempPathFactory) -> hftl.Run:
    return train(place, tmp_path_factory.mktemp("run") / "run", "--method=full")


def start_of(place: Path, image: str, text: str) -> dict[str, torch.Tensor]:
    """The tensors of both backbones as they were loaded, by their names in the joined model."""
    parts = {"image": AutoModel.from_pretrained(place / image), "text": AutoModel.from_pretrained(place / text)}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


@pytest.mark.parametrize(
    ("method", "image", "text"),
    [("full", "vit", "gpt2"), ("frozen", "cnn", "gpt2"), ("partial", "cnn", "bert"), ("lora", "vit", "bert")],
)  # fmt: skip
def test_every_method_trains_what_it_says(place: Path, tmp_path: Path, method: str, image: str, text: str) -> None:
    flags = [f"--method={method}", "--learning_rate=0.001", "--head_learning_rate=0.001"]
    run = train(place, tmp_path / "run", *flags, image=image, text=text)
    before, after = start_of(place, image, text), run.model.state_dict()
    moved = {name for name, value in before.items() if name in after and not torch.equal(value, after[name])}
    blocks = backbones.parameter_blocks(run.model)
    trained = {name for name in moved if name in blocks}
    if method == "frozen":
        assert not moved
    elif method == "full":
        assert {name.split(".")[0] for name in trained} == {"image", "text"}
        assert len(trained) > 0.8 * sum(name in before for name in blocks)
    elif method == "partial":
        assert moved <= {name for name, block in blocks.items() if block >= max(blocks.values()) - 2}
        assert {name.split(".")[0] for name in moved} == {"image", "text"}
    else:
        assert moved
        assert all(before[name].ndim > 1 for name in moved)
        assert (run.folder / "adapter" / "adapter_model.safetensors").is_file()
    assert any(name.startswith("fusion_head.") for name in after)


def test_a_run_reloads_with_equal_logits_and_its_backbones_are_plain_models(place: Path, run: hftl.Run) -> None:
    rows = list(csv.DictReader((place / "tables" / "test.csv").open(encoding="utf-8", newline="")))
    answers = {row["id"]: row for row in csv.DictReader((run.folder / "predictions.csv").open(encoding="utf-8"))}
    inputs = [
        {"image": str(place / "tables" / row["photo"]) if row["photo"] else "", "text": row["caption"]} for row in rows
    ]
    for number, answer in enumerate(run.predict(inputs)):
        for name, probability in answer.probabilities.items():
            assert probability == pytest.approx(float(answers[str(number)][f"probability_{name}"]), abs=1e-5)
    assert str(place) not in (run.folder / "config.json").read_text(encoding="utf-8")
    image = AutoModel.from_pretrained(run.folder / "image").eval()
    text = AutoModel.from_pretrained(run.folder / "text", add_pooling_layer=False).eval()
    picture = AutoImageProcessor.from_pretrained(run.folder / "image")
    both = next(row for row in inputs if row["image"] and row["text"])
    pixels = run.task.image.plain_transform(run.task.image.open_image(both["image"]))[None]
    tokens = AutoTokenizer.from_pretrained(run.folder / "text")(both["text"], return_tensors="pt")
    assert picture is not None
    with torch.no_grad():
        model = FusionModel.from_pretrained(run.folder).eval()
        features = [
            image(pixel_values=pixels).pooler_output.flatten(1),
            text(**tokens).last_hidden_state.mean(dim=1),
            torch.ones(1, 2),
        ]
        joined = model.fusion_head(torch.cat(features, dim=1))
        assert torch.allclose(joined, model(pixel_values=pixels, **tokens).logits, atol=1e-5)


def test_what_is_missing_is_said_and_does_not_count(
    place: Path, run: hftl.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = str(next((place / "tables" / "pictures" / "test").rglob("*.*")))
    table = write_table(tmp_path / "new.csv", [[picture, "cat"], [picture, ""], ["", "cat"]], ("photo", "caption"))
    cli._run(["predict", str(run.folder), str(table), f"--output={tmp_path / 'answers.csv'}"])
    said = capsys.readouterr().err
    assert "rows without image, answered by the rest: 1" in said
    assert "rows without text, answered by the rest: 1" in said
    alone = write_table(tmp_path / "texts.csv", [["cat"], ["dog"]], ("caption",))
    cli._run(["predict", str(run.folder), str(alone)])
    assert "rows without image, answered by the rest: 2" in capsys.readouterr().err
    # What stands in the place of a missing input does not matter.
    model = run.model
    size = run.task.image.plain_transform(run.task.image.open_image(picture)).shape
    tokens = dict(run.task.text.processor(["cat", "dog"], return_tensors="pt"))
    there = {"image_present": torch.tensor([False, False]), "text_present": torch.tensor([True, True])}
    with torch.no_grad():
        one, other = (model(pixel_values=torch.randn(2, *size), **tokens, **there).logits for _ in range(2))
    assert torch.equal(one, other)


def test_a_modality_is_left_out_in_training_but_never_both() -> None:
    config = FusionModel.config_class(feature_sizes=(3, 4), fusion_width=8, modality_dropout=0.2)
    head = hftl.fusion.FusionHead(config)
    present = torch.ones(4_000, 2, dtype=torch.bool)
    dropped = head._dropped(present)
    assert not dropped.all(dim=1).any()
    assert dropped.float().mean(dim=0).tolist() == pytest.approx([0.2, 0.2], abs=0.03)
    present[:, 0] = False
    assert not head._dropped(present).any()


@pytest.mark.parametrize(
    ("rows", "header", "flags", "said"),
    [
        ([["", "", "a"], ["", "x", "b"]], ("photo", "caption", "label"), [], "0 (neither image nor text)"),
        ([["A text", "p.png", "a"], ["B", "q.png", "b"]], ("image", "caption", "label"), [], "--image_column caption"),
        ([["p.png", "a"], ["q.png", "b"]], ("image", "label"), [], "which column is the text"),
        ([["p", "a"], ["q", "b"]], ("text", "label"), [], "holds texts, not images: use text-classification"),
        ([["p.png", "x", "a"]], ("image", "text", "label"), ["--text_pair_column=text"], "it reads one text a row"),
        ([["p.png", "x", "a"]], ("image", "text", "label"), ["--mixup=0.2"], "and their texts not"),
        ([["p.png", "x", "a"]], ("image", "text", "label"), ["--weights=x.pth"], "it has two backbones"),
    ],
)
def test_bad_input_gives_one_line(
    place: Path, tmp_path: Path, rows: Any, header: Any, flags: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_table(tmp_path / "data.csv", rows, header)
    words = [f"--model={place / 'cnn'}", f"--text_model={place / 'bert'}", f"--dataset={table}", *QUICK]
    error = refused(["train", "image-text-classification", *words, f"--output_dir={tmp_path / 'run'}", *flags], capsys)
    assert said in error
    assert not (tmp_path / "run").exists()


def test_a_model_without_its_other_half_is_refused(
    place: Path, tmp_path: Path, run: hftl.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "image-text-classification", f"--dataset={place / 'tables'}", f"--output_dir={tmp_path / 'run'}"]
    assert "--text_model is missing" in refused([*words, f"--model={place / 'cnn'}"], capsys)
    error = refused([*words, f"--model={run.folder}", f"--text_model={place / 'bert'}"], capsys)
    assert "--model has a text backbone already" in error
    error = refused([*words, f"--model={place / 'bert'}", f"--text_model={place / 'bert'}"], capsys)
    assert "AutoModelForImageClassification does not take it" in error
    error = refused([*words, f"--model={place / 'cnn'}", "--text_model=nosuch/dir/x"], capsys)
    assert "--text_model 'nosuch/dir/x': there is no such folder" in error
    error = refused([*words, f"--model={place / 'cnn'}", f"--text_model={place / 'bert'}", "--keep_head"], capsys)
    assert "no head in common" in error
    error = refused([*words, f"--model={run.folder}", "--image_size=64"], capsys)
    assert "which has its own" in error
    error = refused([*words, f"--model={place / 'cnn'}", "--text_model=x", "--modality_dropout=0.5"], capsys)
    assert "between 0 and 0.3" in error


def test_a_run_is_a_start_for_another(place: Path, run: hftl.Run, tmp_path: Path) -> None:
    words = [f"--model={run.folder}", f"--dataset={place / 'tables'}", "--method=frozen", *QUICK]
    cli._run(["train", "image-text-classification", *words, f"--output_dir={tmp_path / 'next'}"])
    before, after = (load_file(folder / "model.safetensors") for folder in (run.folder, tmp_path / "next"))
    assert all(torch.equal(value, after[name]) for name, value in before.items() if "fusion_head" not in name)
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    recipe = str(tmp_path / "next" / "recipe.yaml")
    cli._run(["train", "--config", recipe, f"--output_dir={tmp_path / 'again'}"])
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in after.items())


def test_report_and_card_tell_of_both(run: hftl.Run) -> None:
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") > 2
    assert "where it looked" in page
    card = (run.folder / "README.md").read_text(encoding="utf-8")
    assert "library_name: hftl" in card
    assert "pipeline_tag" not in card
    assert "cnn and bert" in card
    assert json.loads((run.folder / "config.json").read_text())["model_type"] == "hftl_image_text"


def test_neither_picture_nor_sentence_of_the_builtin_tells_the_class() -> None:
    for part in captions().values():
        figures = [row["image"]["path"].partition("-")[0] for row in part]
        named = [row["caption"].rstrip(".").split()[-1] for row in part]
        for values in (figures, named):
            for value in set(values):
                labels = [label for other, label in zip(values, part["label"][:], strict=True) if other == value]
                assert labels.count(0) == labels.count(1)
        assert all(
            (one == other) == bool(label) for one, other, label in zip(figures, named, part["label"][:], strict=True)
        )


@pytest.fixture(scope="module")
def priced(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, hftl.Run]:
    """Tables in which a number and a category tell the class, and a run on them."""
    folder = tmp_path_factory.mktemp("priced")
    for split in ("train", "val", "test"):
        rows = list(csv.DictReader((place / "tables" / f"{split}.csv").open(encoding="utf-8", newline="")))
        names = sorted({row["label"] for row in rows})
        lines = [
            [
                str(place / "tables" / row["photo"]) if row["photo"] else "",
                f"{number}",
                "" if number % 7 == 0 else 100 * names.index(row["label"]) + number % 10,
                "" if number % 4 == 0 else f"shop {row['label']}",
                row["label"],
            ]
            for number, row in enumerate(rows)
        ]
        write_table(folder / f"{split}.csv", lines, ("photo", "caption", "price", "shop", "label"))
    words = [f"--model={place / 'cnn'}", f"--text_model={place / 'bert'}", f"--dataset={folder}", "--method=frozen"]
    words += [*QUICK, "--num_train_epochs=20", "--number_columns", "price", "--category_columns", "shop"]
    cli._run(["train", "image-text-classification", *words, f"--output_dir={folder / 'run'}"])
    return folder, hftl.load_run(folder / "run")


def test_numbers_and_categories_are_read_too(priced: tuple[Path, hftl.Run]) -> None:
    folder, run = priced
    assert run.metrics["test"]["accuracy"] > 0.9
    number, category = run.model.config.table["numbers"][0], run.model.config.table["categories"][0]
    rows = list(csv.DictReader((folder / "train.csv").open(encoding="utf-8", newline="")))
    prices = [float(row["price"]) for row in rows if row["price"]]
    assert number["mean"] == pytest.approx(sum(prices) / len(prices))
    assert category["values"] == ["shop blue", "shop green", "shop red"]
    scores = run.evaluate(str(folder), "test")
    assert scores["accuracy"] == pytest.approx(run.metrics["test"]["accuracy"])
    told = run.predict(
        [{"text": "3", "price": 203, "shop": "shop red"}, {"text": "3", "price": 3, "shop": "shop blue"}, {"text": "3"}]
    )
    assert [answer.label for answer in told[:2]] == ["red", "blue"]
    assert told[2].probability < told[0].probability
    assert +run.missing == {"image": 3, "other columns": 1}
    with pytest.raises(UsageError, match="'much', which is no number"):
        run.predict({"text": "3", "price": "much"})
    assert "price: " in (run.folder / "report.html").read_text(encoding="utf-8")


def test_a_table_is_a_vector() -> None:
    names = {"numbers": ["a", "b"], "categories": ["c"]}
    nan = float("nan")
    settings = Table.learn(names, [[1.0, nan], [3.0, nan]], [["x"], [""]])
    table = Table(json.loads(json.dumps(settings)))
    assert table.width == 5
    assert table.vector([3.0, nan], ["x"]) == [1.0, 0.0, 0.0, 1.0, 1.0]
    assert table.vector([nan, 7.0], ["new"]) == [0.0, 1.0, 7.0, 0.0, 0.0]
    assert all(value != value for value in table.vector([nan, nan], [""]))


def test_a_column_that_is_missing_is_not_another(priced: Any, run: hftl.Run, tmp_path: Path) -> None:
    """The only column left is taken for the text in training, where nothing else is known."""
    picture = str(next((priced[0] / "..").resolve().rglob("red/*.png"), "")) or "x.png"
    table = write_table(tmp_path / "labelled.csv", [[picture, "red"]], ("photo", "label"))
    (row,) = run.task.read_inputs(table)
    assert (row["image"], row.get("text", "")) == (picture, "")
    table = write_table(tmp_path / "priced.csv", [[picture, "7"]], ("photo", "price"))
    (row,) = priced[1].task.read_inputs(table)
    assert row.get("text", "") == ""
    assert row["numbers"] == [7.0]


def test_either_kind_of_other_columns_is_enough() -> None:
    one = Table.learn({"numbers": [], "categories": ["c"]}, [""] * 2, [["x"], ["y"]])
    assert Table(one).vector([], ["y"]) == [0.0, 1.0]
    other = Table.learn({"numbers": ["a"], "categories": []}, [[1.0], [3.0]], [""] * 2)
    assert Table(other).vector([3.0], []) == [1.0, 0.0]


def test_what_is_left_out_is_not_counted(run: hftl.Run, tmp_path: Path) -> None:
    table = write_table(tmp_path / "new.csv", [["", ""], ["", "cat"]], ("photo", "caption"))
    assert len(run.predict(table, skip_bad_files=True)) == 1
    assert +run.missing == {"image": 1}


@pytest.mark.parametrize("wrong", [3, {"text": 5}, {"sound": "x"}, [{"image": float("nan"), "text": None}]])
def test_inputs_that_are_none(run: hftl.Run, wrong: Any) -> None:
    with pytest.raises(UsageError):
        run.predict(wrong)


def test_advice_for_rows_without_a_picture(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = list(csv.reader((place / "tables" / "train.csv").open(encoding="utf-8", newline="")))[1:]
    lines = [
        ["" if number == 0 else str(place / "tables" / row[0]) if row[0] else "", *row[1:]]
        for number, row in enumerate(rows)
    ]
    table = write_table(tmp_path / "first.csv", lines)
    words = [f"--model={place / 'cnn'}", f"--text_model={place / 'bert'}", f"--dataset={table}"]
    cli._run(["advise", "image-text-classification", *words])
    assert "hftl train image-text-classification" in capsys.readouterr().out


def test_columns_that_hold_no_numbers(place: Path, priced: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"--model={place / 'cnn'}", f"--text_model={place / 'bert'}", f"--dataset={priced[0]}", "--output_dir=x"]
    error = refused(["train", "image-text-classification", *words, "--number_columns", "shop"], capsys)
    assert "the column 'shop' holds 'shop blue', which is no number" in error
    error = refused(["train", "image-text-classification", *words, "--category_columns", "shops"], capsys)
    assert "has no such column. Did you mean 'shop'?" in error
    words[0] = f"--model={priced[1].folder}"
    error = refused(["train", "image-text-classification", words[0], *words[2:]], capsys)
    assert "--number_columns: --model reads price" in error
