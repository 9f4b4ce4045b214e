"""From folders, tables and built-ins to splits with one label map, and what is said about bad input."""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from PIL import Image, ImageOps

from hftl.data import load_inputs, load_labelled, load_splits
from hftl.errors import UsageError
from hftl.images import open_image
from hftl.modality import IMAGE, TEXT
from hftl.problems.base import stratified_part

MODALITIES = {"image": IMAGE, "text": TEXT}


def arguments(dataset, **options):
    return SimpleNamespace(dataset_name=None if dataset is None else str(dataset), seed=0, **options)


def splits_of(dataset, modality="text", **options):
    return load_splits(arguments(dataset, **options), MODALITIES[modality])


def message_of(dataset, modality="text", **options):
    """The error that a data set gives, which is always one line."""
    with pytest.raises(UsageError) as caught:
        splits_of(dataset, modality, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_image(path, number=0, size=(6, 5)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_classes(folder, counts, start=0):
    numbers = iter(range(start, 10_000))
    for name, count in counts.items():
        for row in range(count):
            write_image(folder / name / f"{row}.png", next(numbers))
    return folder


def write_table(path, rows=None, header="text,label"):
    rows = [f"text number {row},{'good' if row % 2 else 'bad'}" for row in range(20)] if rows is None else rows
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def report_line(splits, start):
    return next(line for line in splits.report if line.startswith(start))


# ---- folders of images


def test_folder_with_split_folders(tmp_path):
    write_classes(tmp_path / "Train", {"dog": 3, "cat": 4})
    write_classes(tmp_path / "dev", {"dog": 2, "cat": 2}, 100)
    write_classes(tmp_path / "testing", {"cat": 1, "dog": 1}, 200)
    splits = splits_of(tmp_path, "image")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (7, 4, 2)
    assert splits.label_names == ["cat", "dog"]
    assert splits.train.column_names == ["id", "image", "label"]
    assert splits.train.features["label"] == datasets.Value("int64")
    row = splits.train[0]
    assert row == {"id": "Train/cat/0.png", "image": str(tmp_path / "Train" / "cat" / "0.png"), "label": 0}
    assert [line.split() for line in splits.report[-4:]] == [
        ["class", "train", "validation", "test"],
        ["cat", "4", "2", "1"],
        ["dog", "3", "2", "1"],
        ["all", "7", "4", "2"],
    ]
    assert len(splits.report) <= 20


def test_folder_without_split_folders(tmp_path):
    splits = splits_of(write_classes(tmp_path, {"10": 10, "2": 10, "1": 10}), "image", validation_fraction=0.2)
    assert splits.test is None
    assert splits.label_names == ["1", "2", "10"]
    assert np.bincount(splits.validation["label"]).tolist() == [2, 2, 2]
    assert not set(splits.train["id"]) & set(splits.validation["id"])


def test_a_class_may_be_named_like_a_split(tmp_path):
    splits = splits_of(write_classes(tmp_path, {"train": 3, "bus": 3}), "image")
    assert splits.label_names == ["bus", "train"]


def test_labels_and_split_do_not_depend_on_the_order_on_disk(tmp_path):
    files = [(name, row) for name in ("zebra", "ant", "Mole") for row in range(8)]
    results = []
    for seed in (1, 2):
        random.Random(seed).shuffle(files)
        for name, row in files:
            write_image(tmp_path / str(seed) / name / f"{row}.png", row + len(name) * 100)
        splits = splits_of(tmp_path / str(seed), "image")
        results.append((splits.label_names, splits.train["id"][:], splits.validation["id"][:]))
    assert results[0] == results[1]
    assert results[0][0] == ["Mole", "ant", "zebra"]


def test_stray_files_are_skipped_and_counted(tmp_path):
    write_classes(tmp_path, {"cat": 4, "dog": 4})
    for name in (".DS_Store", "cat/Thumbs.db", "cat/desktop.ini", "dog/._0.png", "dog/notes.txt", "dog/more.txt"):
        (tmp_path / name).write_text("nothing")
    write_image(tmp_path / "cat" / ".ipynb_checkpoints" / "0-checkpoint.png")
    write_image(tmp_path / "__MACOSX" / "0.png")
    splits = splits_of(tmp_path, "image")
    assert splits.label_names == ["cat", "dog"]
    assert len(splits.train) + len(splits.validation) == 8
    assert report_line(splits, "skipped:") == "skipped: 6 × hidden or system file, 2 × .txt file"


def test_linked_folders_are_read_once(tmp_path):
    """A link in a class folder may lead back to where it stands, or where that was asked for, elsewhere."""
    folder = write_classes(tmp_path / "data", {"cat": 3, "dog": 3})
    write_image(tmp_path / "elsewhere" / "more.png", 99)
    (folder / "cat" / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "cat" / "again").symlink_to(folder / "cat")
    assert "cat/linked' leads by a link out of" in message_of(folder, "image")
    splits = splits_of(folder, "image", follow_links=True)
    ids = sorted([*splits.train["id"], *splits.validation["id"]])
    assert ids == ["cat/0.png", "cat/1.png", "cat/2.png", "cat/linked/more.png", "dog/0.png", "dog/1.png", "dog/2.png"]


@pytest.mark.parametrize("link", ["train", "train/cat", "train/cat/0.png", "train.csv"])
def test_links_do_not_lead_out_of_the_folder(tmp_path, link):
    modality, outside = ("text" if link == "train.csv" else "image"), tmp_path / "outside"
    if modality == "text":
        write_table(outside / "train.csv")
    else:
        write_classes(outside / "train", {"cat": 3, "dog": 3})
    shutil.copytree(outside, tmp_path / "data", ignore=lambda place, names: {Path(link).name} & set(names))
    (tmp_path / "data" / link).symlink_to(outside / link)
    expected = f"leads by a link out of '{tmp_path}/data': --follow_links reads it all the same."
    assert message_of(tmp_path / "data", modality).endswith(expected)
    assert len(splits_of(tmp_path / "data", modality, follow_links=True).train)


def test_a_data_set_of_the_hub_names_no_file_of_this_machine(tmp_path, monkeypatch):
    table = datasets.Dataset.from_dict({"image": [str(write_image(tmp_path / "own.png"))] * 2, "label": ["a", "b"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: {"train": table})
    monkeypatch.setattr("hftl.data.check_hub", lambda: None)
    assert "holds names of files" in message_of("someone/pictures", "image")


def test_a_long_strip_is_no_picture(tmp_path):
    write_classes(tmp_path, {"cat": 3, "dog": 3})
    strip = write_image(tmp_path / "cat" / "strip.png", size=(1010, 10))
    assert "strip.png (a strip of 1010 x 10 pixels; the limit is 100 to 1)" in message_of(tmp_path, "image")
    with pytest.raises(UsageError, match="a strip of"):
        open_image(strip)
    write_image(strip, size=(1000, 10))
    assert splits_of(tmp_path, "image")


def test_bad_images(tmp_path):
    write_classes(tmp_path, {"cat": 6, "dog": 6})
    (tmp_path / "cat" / "0.png").write_bytes(b"this is not an image")
    (tmp_path / "dog" / "0.png").write_bytes(b"")
    whole = write_image(tmp_path / "dog" / "big.jpg", size=(200, 200)).read_bytes()
    (tmp_path / "dog" / "big.jpg").write_bytes(whole[: len(whole) // 2])
    message = message_of(tmp_path, "image")
    assert message.startswith("3 of 13 images cannot be read: ")
    assert "--skip_bad_files" in message
    for name in ("cat/0.png (not an image)", "dog/0.png", "dog/big.jpg"):
        assert name in message
    splits = splits_of(tmp_path, "image", skip_bad_files=True)
    assert len(splits.train) + len(splits.validation) == 10
    line = report_line(splits, "images: 3 of 13 cannot be read and are left out")
    assert all(name in line for name in ("cat/0.png", "dog/0.png", "dog/big.jpg"))


def test_a_split_of_bad_images_only(tmp_path):
    write_classes(tmp_path / "train", {"cat": 2, "dog": 2})
    write_classes(tmp_path / "val", {"cat": 1})
    (tmp_path / "val" / "cat" / "0.png").write_bytes(b"this is not an image")
    assert "none of the images of validation can be read" in message_of(tmp_path, "image", skip_bad_files=True)


def test_many_images_are_checked_by_their_headers(tmp_path, monkeypatch):
    monkeypatch.setattr("hftl.data.FULL_DECODE_LIMIT", 5)
    write_classes(tmp_path, {"cat": 6, "dog": 6})
    splits = splits_of(tmp_path, "image")
    assert "images: 12, only their headers checked (--skip_bad_files reads them whole)" in splits.report
    (tmp_path / "cat" / "0.png").write_bytes(b"this is not an image")
    assert "cat/0.png (not an image)" in message_of(tmp_path, "image")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], "is empty"),
        (["one.png", "two.png"], "holds images but no class folders"),
        (["train/one.png", "test/two.png"], "train holds images but no class folders"),
        (["cat/one.txt"], "holds no images in class folders"),
        (["cat/one.png", "cat/two.png"], "one class only, 'cat'"),
        (["train/a/1.png", "train/b/1.png", "val/a/2.png", "valid/a/3.png"], "val and valid could both be the valid"),
        (["test/a/1.png", "test/b/1.png", "val/a/1.png", "val/b/1.png"], "no train split, only test, val"),
        (["train/a/1.png", "train/b/1.png", "val/a/2.png", "val/c/7.png"], "'c' does not occur in train: val/c/7.png"),
    ],
)
def test_bad_image_folders(tmp_path, files, expected):
    folder = tmp_path / "data"
    folder.mkdir()
    for number, name in enumerate(files):
        write_image(folder / name, number) if name.endswith(".png") else write_table(folder / name)
    assert expected in message_of(folder, "image")


# ---- tables


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_table_kinds(tmp_path, kind):
    rows = [{"text": f"line, {row}" if row else "null", "label": "NA" if row % 2 else "null"} for row in range(20)]
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8-sig")
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        mark = "," if kind == "csv" else "\t"
        lines = [f'"{row["text"]}"{mark}{row["label"]}' for row in rows]
        path.write_text("\r\n".join([f"text{mark}label", *lines]), encoding="utf-8-sig")
    splits = splits_of(path)
    assert splits.label_names == ["NA", "null"]
    assert splits.train.column_names == ["id", "text", "label"]
    texts = {row["id"]: row["text"] for part in (splits.train, splits.validation) for row in part}
    assert len(texts) == 20
    assert (texts["0"], texts["7"]) == ("null", "line, 7")
    assert "columns: text ← 'text' (guessed), label ← 'label' (guessed)" in splits.report


def test_folder_of_tables(tmp_path):
    write_table(tmp_path / "train-00000-of-00002.csv", ["a,1", "b,2"])
    write_table(tmp_path / "train-00001-of-00002.csv", ["c,10", "d,10"])
    write_table(tmp_path / "movies_dev.csv", ["e,2"])
    write_table(tmp_path / "extra.csv", ["f,3"])
    splits = splits_of(tmp_path)
    assert splits.label_names == ["1", "2", "10"]
    assert splits.train["text"][:] == ["a", "b", "c", "d"]
    assert splits.validation[:] == {"id": ["0"], "text": ["e"], "label": [1]}
    assert "not used: extra" in splits.report


def test_validation_is_taken_from_train_and_never_from_test(tmp_path):
    write_table(tmp_path / "train.csv", [f"train {row},{'ab'[row % 2]}" for row in range(40)])
    write_table(tmp_path / "test.csv", [f"test {row},{'ab'[row % 2]}" for row in range(10)])
    splits = splits_of(tmp_path)
    assert len(splits.validation) == 4
    taken = [*splits.train["text"], *splits.validation["text"]]
    assert sorted(taken) == sorted(f"train {row}" for row in range(40))  # each once
    assert splits.test["text"][:] == [f"test {row}" for row in range(10)]


def test_splits_by_name(tmp_path):
    for name in ("first", "second", "train"):
        write_table(tmp_path / f"{name}.csv", [f"{name} one,a", f"{name} two,b"])
    splits = splits_of(tmp_path, train_split="first", validation_split="second")
    assert splits.train["text"][0] == "first one"
    assert splits.validation["text"][0] == "second one"
    message = message_of(tmp_path, train_split="frist")
    assert "Did you mean 'first'?" in message
    assert "first, second, train" in message


def test_image_table_with_paths_beside_the_file(tmp_path):
    for row in range(6):
        write_image(tmp_path / "data" / "images" / f"{row}.png", row)
    rows = [f"images/{row}.png,{'x' if row < 3 else 'y'}" for row in range(6)]
    table = write_table(tmp_path / "data" / "train.csv", rows, "img_name,kind")
    splits = splits_of(table, "image", label_column="kind")
    assert splits.columns == {"image": "img_name", "label": "kind"}
    assert all(path.startswith(str(tmp_path / "data" / "images")) for path in splits.train["image"])
    assert len(splits_of(tmp_path / "data", "image", label_column="kind").train) == len(splits.train)
    write_table(table, [*rows, "images/lost.png,y"], "img_name,kind")
    assert "lost.png" in message_of(table, "image", label_column="kind")
    splits = splits_of(table, "image", label_column="kind", skip_bad_files=True)
    assert len(splits.train) + len(splits.validation) == 6


def test_images_inside_a_parquet_file(tmp_path):
    content = [write_image(tmp_path / "image.png", row).read_bytes() for row in range(8)]
    images = [{"bytes": value, "path": None} for value in content]
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=["z", "a"])})
    data = datasets.Dataset.from_dict({"picture": images, "label": [0, 1] * 4}, features=features)
    data.to_parquet(tmp_path / "train.parquet")
    splits = splits_of(tmp_path / "train.parquet", "image")
    assert splits.label_names == ["z", "a"]
    assert splits.train.column_names == ["id", "image", "label"]
    assert open_image(splits.train[0]["image"]).size == (6, 5)
    assert "use image-classification" in message_of(tmp_path / "train.parquet", "text")


def test_builtin_digits():
    splits = splits_of("builtin:digits", "image", max_train_samples=100, max_eval_samples=20)
    assert splits.label_names == [str(digit) for digit in range(10)]
    assert np.bincount(splits.train["label"]).tolist() == [10] * 10
    assert (len(splits.validation), len(splits.test)) == (20, 20)
    assert splits.train["id"][0].startswith("train-")
    assert open_image(splits.test[0]["image"]).mode == "RGB"


def test_pairs_and_other_columns(tmp_path):
    rows = [f"one {row},two {row},{row % 2},{row % 4}" for row in range(20)]
    table = write_table(tmp_path / "pairs.csv", rows, "Premise,Hypothesis,label,fine_label")
    splits = splits_of(table)
    assert splits.columns == {"text": "Premise", "text_pair": "Hypothesis", "label": "label"}
    assert splits.train.column_names == ["id", "text", "text_pair", "label"]
    splits = splits_of(table, text_column="Hypothesis", label_column="fine_label")
    assert splits.columns == {"text": "Hypothesis", "label": "fine_label"}
    assert splits.label_names == ["0", "1", "2", "3"]
    assert "columns: text ← 'Hypothesis', label ← 'fine_label'" in splits.report


def test_the_other_of_two_columns(tmp_path):
    table = write_table(tmp_path / "data.csv", header="utterances,label")
    assert splits_of(table).columns == {"text": "utterances", "label": "label"}
    table = write_table(tmp_path / "data.csv", header="text,mood")
    assert splits_of(table).columns == {"text": "text", "label": "mood"}


CSV = "data.csv"
ROWS = ["one,a", "two,b", "three,a"]


@pytest.mark.parametrize(
    ("name", "content", "options", "expected"),
    [
        (CSV, b"", {}, "data.csv is empty"),
        (CSV, b"text,label\n", {}, "data.csv has no rows"),
        (CSV, "text,label\ncaf\xe9,a\n".encode("latin-1"), {}, "not UTF-8 (line 2): convert it"),
        (CSV, "text,label\none,a\n".encode("utf-16"), {}, "iconv -f UTF-16"),
        (CSV, b"text;label\none;a\ntwo, too;b\n", {}, "the separator seems to be ';', and a .csv file has ','"),
        (CSV, b"text\tlabel\none\ta\n", {}, r"the separator seems to be '\t', and a .csv file has ','"),
        ("data.tsv", b"text,label\none,a\n", {}, r"the separator seems to be ',', and a .tsv file has '\t'"),
        (CSV, b'text,label\n" ",a\n"",b\n' + b" ,a\n ,b\n ,a\n ,b\n", {}, "every text of train is empty"),
        ("data.json", b"[" * 100_000, {}, "nested too deeply"),
        (CSV, b"text,label\none,a\ntwo, too,b\n", {}, "line 3 has 3 fields, the header 2"),
        (CSV, b"text,label\none,a\ntwo\n", {}, "line 3 has 1 fields, the header 2"),
        (CSV, b"text,label,text\none,a,b\n", {}, "'text' more than once"),
        (CSV, b"text,label\none,a\ntwo,\nthree,b\nfour,nan\n", {}, "no label (rows counting from 0: 1, 3)"),
        (CSV, b"text,label\none,a\ntwo,a\n", {}, "one class only, 'a'"),
        (CSV, b"text,label\none,1.5\ntwo,2\n", {}, "numbers such as 1.5"),
        (CSV, b"text,label\none,a\ntwo,b\n", {}, "no class has two rows"),
        (CSV, b"x,y,z\none,a,b\n", {}, "which column is the text? Say --text_column NAME. The columns are: 'x', 'y'"),
        (CSV, b"text,label\none,a\n", {"text_column": "txt"}, "no such column. Did you mean 'text'? The columns are"),
        (CSV, b"image,label\na.png,a\nb.jpg,b\n", {}, "holds images, not texts: use image-classification"),
        (CSV, b"text,label\none,a\ntwo,b\n", {"validation_fraction": 1.5}, "between 0 and 1"),
        ("data.jsonl", b'{"text": "a", "label": 1}\n{"text": "b", "lab\n', {}, "line 2 is not valid JSON"),
        ("data.jsonl", b'{"text": "a", "label": 1}\n[1, 2]\n', {}, "line 2 is not an object"),
        ("data.jsonl", b'{"text": "a", "label": 1.5}\n{"text": "b", "label": 2}\n', {}, "numbers such as 1.5"),
        ("data.jsonl", b'{"text": "a", "label": NaN}\n{"text": "b"}\n', {}, "2 of 2 rows have no label"),
        ("data.jsonl", b'{"text": "a", "label": ["x", "y"]}\n', {}, "holds list values where a label should be"),
        ("data.jsonl", b'{"text": ["a"], "label": "x"}\n{"text": ["b"], "label": "y"}\n', {}, "list values, not texts"),
        ("data.parquet", b"not parquet at all", {}, "cannot be read as Parquet"),
        ("data.xlsx", b"anything", {}, "hftl reads tables as .csv"),
    ],
)
def test_bad_tables(tmp_path, name, content, options, expected):
    (tmp_path / name).write_bytes(content)
    assert expected in message_of(tmp_path / name, **options)


def test_several_tables_without_split_names(tmp_path):
    write_table(tmp_path / "a.csv")
    write_table(tmp_path / "b.csv")
    assert "several tables (a.csv, b.csv)" in message_of(tmp_path)


def test_wrong_modality(tmp_path):
    write_table(tmp_path / "tables" / "train.csv")
    assert "use text-classification" in message_of(tmp_path / "tables", "image")
    write_classes(tmp_path / "images", {"cat": 2, "dog": 2})
    assert "use image-classification" in message_of(tmp_path / "images", "text")


def test_no_such_data(tmp_path, monkeypatch):
    write_table(tmp_path / "reviews.csv")
    assert "Did you mean 'reviews.csv'?" in message_of(tmp_path / "review.csv")
    assert "no such file or folder: './nothing/here'" in message_of("./nothing/here")
    assert "no such file or folder: 'nothing.csv'" in message_of("nothing.csv")
    assert "no data: say which with --dataset" in message_of(None)
    assert "Did you mean 'digits'?" in message_of("builtin:digit")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    message = message_of("nobody/nothing-such")
    assert "could not be loaded from the Hub (offline)" in message


def test_hub_data_set(monkeypatch):
    def load_dataset(name, config):
        assert (name, config) == ("somebody/something", "small")
        label = datasets.ClassLabel(names=["no", "yes"])
        features = datasets.Features({"sentence": datasets.Value("string"), "label": label})
        rows = {"sentence": [f"words {row}" for row in range(10)], "label": [0, 1] * 5}
        train = datasets.Dataset.from_dict(rows, features=features)
        test = datasets.Dataset.from_dict({**rows, "label": [-1] * 10}, features=features)
        return datasets.DatasetDict({"train": train, "test": test})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    splits = splits_of("somebody/something", dataset_config_name="small")
    assert splits.label_names == ["no", "yes"]
    assert splits.columns["text"] == "sentence"
    assert splits.test is None
    assert report_line(splits, "test: somebody/something (test) has no labels and is left out")


# ---- labels, checks


def test_unseen_label_names_the_rows(tmp_path):
    write_table(tmp_path / "train.csv", ROWS)
    write_table(tmp_path / "test.csv", ["four,a", "five,C", "six,C", "seven,d"])
    message = message_of(tmp_path)
    assert (
        "test.csv: the label 'C' does not occur in train (and 1 other such labels): rows counting from 0: 1, 2"
        in message
    )


def test_test_without_labels_is_left_out(tmp_path):
    write_table(tmp_path / "train.csv")
    write_table(tmp_path / "test.csv", ["one", "two"], header="text")
    splits = splits_of(tmp_path)
    assert splits.test is None
    assert report_line(splits, "test: ").endswith("has no column 'label' and is left out")
    assert "test.csv has no column 'label', which train has" in message_of(tmp_path, test_split="test")


def test_labels_spelled_in_two_ways(tmp_path):
    write_table(tmp_path / "train.csv", [f"text {row},{label}" for row in range(4) for label in ("Pos", "pos", "neg")])
    warning = "warning: labels that differ in case or spaces alone: 'Pos', 'pos'"
    assert report_line(splits_of(tmp_path), "warning: labels") == warning


def test_report(tmp_path):
    rows = [f"text {row},big" for row in range(40)] + [f"other {row},small" for row in range(4)] + ["alone,lone"]
    write_table(tmp_path / "train.csv", [*rows, " ,big"])
    write_table(tmp_path / "val.csv", ["text 1,big", "new,small", '"",small'])
    write_table(tmp_path / "test.csv", ["text 1,big", "text 2,big", "newer,small"])
    report = splits_of(tmp_path).report
    assert "warning: empty texts: 1 in train, 1 in validation" in report
    assert "labels that differ" not in report
    assert (
        "warning: duplicates: 1 of validation also in train, 2 of test also in train, 1 of test also in validation"
        in report
    )
    assert "imbalance in train: 41.0 to 1 ('big' to 'lone')" in report
    assert "warning: only one row in train for: lone" in report
    assert len(report) <= 20


def test_report_of_many_classes_fits_on_a_screen(tmp_path):
    table = write_table(tmp_path / "data.csv", [f"text {row},{row % 100}" for row in range(400)])
    splits = splits_of(table)
    assert len(splits.report) <= 20
    assert "… and 96 more" in splits.report
    assert splits.label_names == [str(label) for label in range(100)]


def test_duplicate_images_across_splits(tmp_path):
    write_classes(tmp_path / "train", {"cat": 3, "dog": 3})
    write_classes(tmp_path / "val", {"cat": 2, "dog": 2}, 100)
    copied = (tmp_path / "train" / "cat" / "0.png").read_bytes()
    (tmp_path / "val" / "dog" / "copy.png").write_bytes(copied)
    assert "warning: duplicates: 1 of validation also in train" in splits_of(tmp_path, "image").report


def test_limits_are_stratified_and_seeded(tmp_path):
    table = write_table(tmp_path / "data.csv", [f"text {row},{'a' if row % 4 else 'b'}" for row in range(400)])
    first, second, other = (
        load_splits(SimpleNamespace(dataset_name=str(table), max_train_samples=40, max_eval_samples=8, seed=seed), TEXT)
        for seed in (1, 1, 2)
    )
    assert np.bincount(first.train["label"]).tolist() == [30, 10]
    assert np.bincount(first.validation["label"]).tolist() == [6, 2]
    assert first.train["id"][:] == second.train["id"][:]
    assert first.train["id"][:] != other.train["id"][:]


@pytest.mark.parametrize("modality", ["image", "text"])
def test_columns_are_read_at_once(tmp_path, monkeypatch, modality):
    """Row by row, as a column of datasets is iterated, takes a hundred times as long."""
    if modality == "image":
        write_classes(tmp_path / "train", {"cat": 12, "dog": 12})
    else:
        write_table(tmp_path / "train.csv")
        write_table(tmp_path / "test.csv", ["a text,good", "one more,bad"])

    def refuse(*_):
        raise AssertionError("a column is read row by row")

    monkeypatch.setattr(datasets.arrow_dataset.Column, "__iter__", refuse)
    splits = splits_of(tmp_path, modality, max_train_samples=8)
    assert splits.found()["rows"]["train"] in ({"cat": 4, "dog": 4}, {"bad": 4, "good": 4})
    assert len(splits.report) > 3


def test_validation_has_a_row_of_every_class(tmp_path):
    table = write_table(tmp_path / "data.csv", [f"text {row},{'abc'[row % 3]}" for row in range(24)])
    splits = splits_of(table)
    assert np.bincount(splits.validation["label"]).tolist() == [1, 1, 1]
    assert "validation: 3 of 24 train rows, some of each class (seed 0)" in splits.report


def test_a_fingerprint_is_that_of_the_rows(tmp_path):
    rows = [f"text {row},{'ab'[row % 2]}" for row in range(20)]
    first = splits_of(write_table(tmp_path / "a.csv", rows)).fingerprint()
    assert splits_of(write_table(tmp_path / "a.csv", rows)).fingerprint() == first
    for other in ([*rows, "one more,a"], [*rows[:-1], "text 19,a"], [*rows[:-1], "text 20,b"]):
        assert splits_of(write_table(tmp_path / "a.csv", other)).fingerprint() != first


def test_stratified_part():
    labels = np.array([0] * 90 + [1] * 9 + [2])
    taken = stratified_part(labels, 10, seed=0, leave_one=True)
    assert np.bincount(labels[taken], minlength=3).tolist() == [9, 1, 0]
    assert np.bincount(labels[stratified_part(labels, 10, seed=0)]).tolist() == [8, 1, 1]
    assert len(stratified_part(np.arange(50), 10, seed=0)) == 10
    assert len(stratified_part(labels, 1000, seed=0)) == 100


# ---- evaluation and prediction


def test_load_labelled(tmp_path):
    write_table(tmp_path / "train.csv", ROWS)
    write_table(tmp_path / "valid.csv", ["four,b"])
    part, name = load_labelled(arguments(tmp_path), None, ["b", "a"], TEXT, {})
    assert (name, part[:]) == ("valid", {"id": ["0"], "text": ["four"], "label": [0]})
    part, name = load_labelled(arguments(tmp_path), "train", ["b", "a"], TEXT, {})
    assert (name, part["label"][:]) == ("train", [1, 0, 1])
    assert load_labelled(arguments(tmp_path), "validation", ["b", "a"], TEXT, {})[1] == "valid"
    with pytest.raises(UsageError, match="'b' does not occur in train"):
        load_labelled(arguments(tmp_path), None, ["a"], TEXT, {})
    with pytest.raises(UsageError, match="no such split"):
        load_labelled(arguments(tmp_path), "test", ["b", "a"], TEXT, {})


def test_load_labelled_images(tmp_path):
    write_classes(tmp_path, {"cat": 2, "dog": 2})
    part, _ = load_labelled(arguments(tmp_path), None, ["dog", "cat"], IMAGE, {})
    assert part["label"][:] == [1, 1, 0, 0]


def test_load_inputs(tmp_path):
    write_image(tmp_path / "images" / "deep" / "b.png")
    write_image(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "note.txt").write_text("nothing")
    inputs = load_inputs(tmp_path / "images", IMAGE, {}, {})
    assert inputs["id"][:] == ["a.png", "deep/b.png"]
    assert load_inputs(tmp_path / "images" / "a.png", IMAGE, {}, {})["id"][:] == ["a.png"]
    (tmp_path / "texts.txt").write_text("first line\n\nthird line\n")
    assert load_inputs(tmp_path / "texts.txt", TEXT, {}, {})[:] == {
        "id": ["0", "2"],
        "text": ["first line", "third line"],
    }
    assert load_inputs(tmp_path / "images", TEXT, {}, {})[:] == {"id": ["note.txt"], "text": ["nothing"]}
    (tmp_path / "images" / "deep.txt").mkdir()
    (tmp_path / "images" / "MORE.TXT").write_text("shouted")
    (tmp_path / "images" / "._note.txt").write_bytes(b"\xff of a Mac")
    assert load_inputs(tmp_path / "images", TEXT, {}, {})["id"][:] == ["MORE.TXT", "note.txt"]
    table = write_table(tmp_path / "texts.csv", ["1,b", "2,c"], "number,words")
    assert load_inputs(table, TEXT, {"text": "words"}, {})[:] == {"id": ["0", "1"], "text": ["b", "c"]}
    assert load_inputs(
        write_table(tmp_path / "pairs.csv", ["p,q"], "text1,text2"), TEXT, {}, {"text_pair": "text2"}
    ).column_names[1:] == [
        "text",
        "text_pair",
    ]
    images = load_inputs(write_table(tmp_path / "images" / "list.csv", ["a.png"], "file"), IMAGE, {}, {})
    assert images["image"][0] == str(tmp_path / "images" / "a.png")
    for path, modality, expected in [
        (tmp_path / "nothing", TEXT, "no such file or folder"),
        (tmp_path / "texts.txt", IMAGE, "is none of the images that are read"),
        (tmp_path / "images" / "deep", TEXT, "has no .txt files"),
        (table, TEXT, "which column is the text"),
    ]:
        with pytest.raises(UsageError, match=expected):
            load_inputs(path, modality, {}, {})


# ---- opening images


def test_open_image_modes():
    red = Image.new("RGB", (4, 3), (200, 30, 40))
    for mode in ("L", "1", "P", "CMYK", "RGBA", "LA", "YCbCr"):
        image = open_image(red.convert(mode))
        assert (image.mode, image.size) == ("RGB", (4, 3))
    assert open_image(Image.new("RGBA", (2, 2), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.info["transparency"] = 1
    assert open_image(palette).getpixel((0, 0)) == (255, 255, 255)


def test_open_image_deep_pixels(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    expected = np.arange(256).reshape(16, 16)
    assert np.array_equal(np.asarray(open_image(tmp_path / "deep.png"))[..., 0], expected)
    for value in (ramp, Image.fromarray(ramp.astype(np.int32)), Image.fromarray((ramp / 65535).astype(np.float32))):
        assert np.array_equal(np.asarray(open_image(value))[..., 0], expected)
    assert open_image(np.full((2, 2), 65535, np.uint16)).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(np.array([[-2.0, 2.0]], np.float32)).getpixel((1, 0)) == (255, 255, 255)


def test_open_image_kinds(tmp_path):
    path = write_image(tmp_path / "image.png")
    pixels = np.asarray(Image.open(path))
    content = path.read_bytes()
    for value in (
        path,
        str(path),
        content,
        {"bytes": content, "path": None},
        {"bytes": None, "path": str(path)},
        Image.open(io.BytesIO(content)),
        pixels,
        pixels / 255,
    ):
        assert np.array_equal(np.asarray(open_image(value)), pixels)
    assert open_image(pixels[..., :1]).mode == "RGB"
    assert open_image(pixels[..., 0] > 100).mode == "RGB"


@pytest.mark.parametrize(
    ("orientation", "size", "corner"),  # where the marked corner, at the top left of the file, is seen
    [
        (1, (8, 4), (0, 0)),
        (2, (8, 4), (7, 0)),
        (3, (8, 4), (7, 3)),
        (4, (8, 4), (0, 3)),
        (5, (4, 8), (0, 0)),
        (6, (4, 8), (3, 0)),
        (7, (4, 8), (3, 7)),
        (8, (4, 8), (0, 7)),
    ],
)
def test_open_image_applies_the_orientation(tmp_path, orientation, size, corner):
    image = Image.new("RGB", (8, 4))
    image.putpixel((0, 0), (250, 60, 10))
    exif = image.getexif()
    exif[0x0112] = orientation
    for kind in ("jpg", "png"):
        path = tmp_path / f"turned.{kind}"
        image.save(path, exif=exif)
        with Image.open(path) as original:
            expected = np.asarray(ImageOps.exif_transpose(original))
            assert np.array_equal(np.asarray(open_image(original)), expected)
        for value in (path, path.read_bytes()):
            assert np.array_equal(np.asarray(open_image(value)), expected)
    turned = open_image(path)
    assert (turned.size, turned.getpixel(corner)) == (size, (250, 60, 10))


def test_open_image_errors(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    whole = write_image(tmp_path / "cut.jpg", size=(100, 100)).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[:1000])
    for value, expected in [
        (tmp_path / "broken.jpg", r"broken\.jpg cannot be read as an image: not an image"),
        (tmp_path / "cut.jpg", r"cut\.jpg cannot be read as an image: .*truncated"),
        (tmp_path / "lost.jpg", r"no such image file: .*lost\.jpg"),
        (b"abc", "an image given as bytes cannot be read"),
        ("", "no image file is named"),
        (None, "no image file is named"),
        (7, "an image cannot be made from int"),
        (np.zeros((2, 2, 5)), "an image cannot be made from an array of shape"),
    ]:
        with pytest.raises(UsageError, match=expected):
            open_image(value)


def test_classes_of_several_a_row_need_their_problem_type():
    with pytest.raises(UsageError, match=r"holds list values where a label should be.*multi_label_classification"):
        load_splits({"dataset_name": "builtin:several-digits"}, IMAGE)
