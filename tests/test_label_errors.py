"""`hftl check-labels`: training rows whose label the others deny."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import small_data
import tiny_models
from forked import run_command
from sklearn.linear_model import Ridge

from hftl import transferability


def test_leaving_one_out_is_fitting_to_the_others() -> None:
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(30, 4)), random.integers(0, 3, 30)
    spectrum = transferability.decompose(features)
    scores = transferability.leave_one_out(spectrum, labels)
    size = spectrum.values.mean()
    errors = []
    for penalty in transferability._PENALTIES:
        unseen = []
        for row in range(30):
            others = np.arange(30) != row
            model = Ridge(alpha=penalty * size, fit_intercept=False).fit(features[others], np.eye(3)[labels[others]])
            unseen.append(model.predict(features[[row]])[0])
        errors.append(np.abs(np.array(unseen) - scores).max())
    assert min(errors) < 1e-8


@pytest.mark.slow
def test_pictures_in_the_wrong_folder_come_first(tmp_path: Path) -> None:
    small_data.write_images(tmp_path / "images", {"train": 20, "val": 2})
    tiny_models.write_tiny_cnn(tmp_path / "convnet")
    moved = [("blue", "red", 3), ("green", "blue", 7), ("red", "green", 11)]
    for number, (colour, wrong, index) in enumerate(moved):
        source = tmp_path / "images" / "train" / colour / f"{index}.png"
        shutil.move(source, tmp_path / "images" / "train" / wrong / f"moved{number}.png")
    flags = ["--dataset=images", "--model=convnet", "--output=suspects.csv"]
    done = run_command(["check-labels", "image-classification", *flags], tmp_path)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "suspects.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["row"].rpartition("/")[2], row["label"], row["rather"]) for row in rows[:3]}
    assert found == {(f"moved{number}.png", wrong, colour) for number, (colour, wrong, _) in enumerate(moved)}
    assert {row["sure"] for row in rows} <= {"yes", ""}
    assert f"of 60 rows {len(rows)} look like another class" in done.stdout
    assert not (tmp_path / "runs").exists()
    shutil.rmtree(tmp_path / "images" / "val")  # a part of train is drawn in its place, and looked at all the same
    done = run_command(["check-labels", "image-classification", *flags], tmp_path)
    assert "of 60 rows" in done.stdout

    (tmp_path / "table.csv").write_text("text,label\n")
    words = ["check-labels", "text-classification", "--dataset=table.csv", "--model=x", "--output=table.csv"]
    for same in (words, [word.replace("--dataset=table.csv", "--dataset=.") for word in words]):
        refused = run_command(same, tmp_path)
        assert (refused.returncode, "is a part of the data" in refused.stderr) == (2, True), refused.stderr
    again = run_command(["check-labels", "image-classification", *flags[:-1], "--output=none/x.csv"], tmp_path)
    assert (again.returncode, "there is no folder" in again.stderr) == (2, True)
    task = run_command(["check-labels", "--dataset=images"], tmp_path)
    assert (task.returncode, "Name the task" in task.stderr) == (2, True)
