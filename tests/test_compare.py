"""`hftl compare`: scores with intervals, McNemar's test, settings that differ, rows where runs disagree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import small_data
import tiny_models
from forked import run_command
from PIL import Image

import hftl
from hftl import data
from hftl.answers import Answers
from hftl.compare import compare, different_settings


def answers(labels: list[int], predictions: list[int], sure: float = 0.9) -> Answers:
    probabilities = np.full((len(labels), 3), (1 - sure) / 2)
    probabilities[np.arange(len(labels)), predictions] = sure
    ids = [str(row) for row in range(len(labels))]
    return Answers(ids, np.array(labels), np.array(predictions), probabilities)


def test_scores_intervals_and_who_wins() -> None:
    from scipy.stats import binomtest
    from sklearn.metrics import f1_score, log_loss

    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 400)
    first = np.where(random.random(400) < 0.8, labels, (labels + 1) % 3)
    second = np.where(random.random(400) < 0.7, labels, (labels + 2) % 3)
    one, two = (answers(labels.tolist(), found.tolist()) for found in (first, second))
    base, other = compare([one, two], ["one", "two"], ["a", "b", "c"], one.ids)
    assert base.values["accuracy"][0] == pytest.approx((first == labels).mean())
    assert other.values["f1_macro"][0] == pytest.approx(f1_score(labels, second, average="macro"))
    assert other.values["log_loss"][0] == pytest.approx(log_loss(labels, two.probabilities))
    value, low, high = base.values["accuracy"]
    assert low < value < high
    half = 1.96 * np.sqrt(value * (1 - value) / 400)
    assert high - low == pytest.approx(2 * half, rel=0.1)
    won, lost = ((second == labels) & (first != labels)).sum(), ((second != labels) & (first == labels)).sum()
    assert (other.won, other.lost) == (won, lost)
    assert other.probability == pytest.approx(binomtest(int(won), int(won + lost)).pvalue)
    assert other.gains["accuracy"][0] == pytest.approx((second == labels).mean() - (first == labels).mean())
    assert len(other.examples) == 12
    assert all(entry["prediction"] == entry["label"] != entry["first"] for entry in other.examples[:6])
    assert all(entry["first"] == entry["label"] != entry["prediction"] for entry in other.examples[6:])
    _, again = compare([one, one], ["one", "copy"], ["a", "b", "c"], one.ids)
    assert again.gains["accuracy"] == (0.0, 0.0, 0.0)
    assert (again.won, again.lost, again.probability) == (0, 0, 1.0)


def test_settings_that_look_alike_are_shown_from_where_they_differ() -> None:
    recipes = [{"model_name_or_path": f"/runs/{name}/checkpoint-100", "seed": 1, "output_dir": name} for name in "ab"]
    assert different_settings(recipes) == {"model_name_or_path": ["a/checkpoint-100", "b/checkpoint-100"]}
    assert different_settings([{"seed": 1}, {"seed": 1, "lora_r": 8}]) == {"lora_r": ["", "8"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    small_data.write_images(folder / "images", {"train": 8, "val": 3, "test": 5})
    tiny_models.write_tiny_cnn(folder / "convnet")
    for name, flags in {"a": ["--method=frozen"], "b": ["--max_steps=1", "--learning_rate=1e-6"]}.items():
        words = ["train", "image-classification", "--dataset=images", "--model=convnet", f"--output_dir={name}", *flags]
        done = run_command(words, folder)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_two_runs(place: Path) -> None:
    done = run_command(["compare", "a", "b", "--output", "page.html"], place)
    assert done.returncode == 0, done.stderr
    accuracies = [json.loads((place / name / "metrics.json").read_text())["test"]["accuracy"] for name in "ab"]
    for name, accuracy in zip("ab", accuracies, strict=True):
        assert any(line.startswith(name) and f"{accuracy:.4f} (" in line for line in done.stdout.splitlines())
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["method", "frozen", "full"] in lines
    assert not any(line and line[0] in ("dataset_name", "output_dir", "seed") for line in lines)
    page = (place / "page.html").read_text()
    assert "Where b and a disagree" in page
    assert "data:image/jpeg;base64," in page
    assert str(place) not in page


@pytest.mark.slow
def test_other_pictures_of_the_same_names_are_other_rows(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(place / "images", place / "others")
    for path in (place / "others" / "test").rglob("*.png"):
        picture = Image.open(path)
        picture.transpose(Image.Transpose.TRANSPOSE).rotate(7, fillcolor="white").save(path)
    shutil.copytree(place / "a", place / "other")
    recipe = place / "other" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("dataset_name: images", "dataset_name: others"))
    # As a run on that data would have it.
    run = hftl.load_run(place / "other")
    monkeypatch.chdir(place)
    splits = data.load_splits(run.task.arguments, run.task.modality)
    (place / "other" / "logs" / "data.json").write_text(json.dumps(splits.found()))
    done = run_command(["compare", "a", "other"], place)
    assert (done.returncode, done.stderr) == (2, "error: a, other share no test row: compare runs on the same data.\n")
    shutil.move(place / "others", place / "elsewhere")
    done = run_command(["compare", "a", "other"], place)
    assert done.returncode == 0, done.stderr
    assert "those of other are gone or have changed: rows are told by their names alone" in done.stdout


@pytest.mark.slow
def test_runs_that_cannot_be_compared(place: Path) -> None:
    part = Path(shutil.copytree(place / "b", place / "part"))
    lines = (part / "predictions.csv").read_text().splitlines()
    (part / "predictions.csv").write_text("\n".join(lines[:8]) + "\n")
    cut = run_command(["compare", "a", "part"], place)
    assert cut.returncode == 2
    assert "predictions.csv' is damaged: it has 7 rows, and the run answered 15" in cut.stderr
    found = part / "logs" / "data.json"
    content = json.loads(found.read_text())
    labels = [line.split(",")[1] for line in lines[1:8]]
    rows = {name: labels.count(name) for name in ("blue", "green", "red")}
    found.write_text(json.dumps({**content, "rows": {"test": rows}}))

    def fit_scores() -> None:
        """Let the scores be those of the answers that are there."""
        answers = [line.split(",") for line in (part / "predictions.csv").read_text().splitlines()[1:]]
        metrics = json.loads((part / "metrics.json").read_text())
        metrics["test"] = {"accuracy": sum(label == answer for _, label, answer, *_ in answers) / len(answers)}
        (part / "metrics.json").write_text(json.dumps(metrics))

    fit_scores()
    done = run_command(["compare", "a", "part"], place)
    assert done.returncode == 0, done.stderr
    assert "compared on the 7 rows that all have (of 15, 7)" in done.stdout

    def refused(*runs: str) -> str:
        done = run_command(["compare", *runs], place)
        assert (done.returncode, done.stdout) == (2, "")
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "two runs or more" in refused("a")
    assert "is no finished run" in refused("a", "images")
    cells = [line.split(",") for line in lines[1:]]
    found.write_text(json.dumps(content))
    (part / "predictions.csv").write_text(
        "\n".join([lines[0], *(",".join(["x" + c[0], *c[1:]]) for c in cells)]) + "\n"
    )
    fit_scores()
    assert "share no test row" in refused("a", "part")
    other = {"blue": "red", "red": "blue", "green": "green"}
    swapped = [",".join([c[0], other[c[1]], *c[2:]]) for c in cells]
    (part / "predictions.csv").write_text("\n".join([lines[0], *swapped]) + "\n")
    fit_scores()
    assert "10 of 15 rows have another label in part than in a" in refused("a", "part")
    config = part / "config.json"
    config.write_text(config.read_text().replace("green", "olive"))
    assert "part has other classes than a" in refused("a", "part")


@pytest.mark.slow
def test_rows_that_have_numbers_alone_are_compared_on_the_same_data_only(tmp_path: Path) -> None:
    small_data.write_texts(tmp_path / "one", {"train": 24, "dev": 8, "test": 10})
    small_data.write_texts(tmp_path / "two", {"test": 10, "train": 24, "dev": 8})  # other texts, the same labels
    tiny_models.write_tiny_text_model(tmp_path / "bert", kind="bert")
    train = ["train", "text-classification", "--model=bert", "--max_steps=1", "--report_to=none"]
    for table, name, flags in (("one", "a", []), ("one", "b", ["--max_eval_samples=6"]), ("two", "c", [])):
        done = run_command([*train, f"--dataset={table}", f"--output_dir={name}", *flags], tmp_path)
        assert done.returncode == 0, done.stderr
    part = run_command(["compare", "a", "b"], tmp_path)
    assert part.returncode == 0, part.stderr
    assert "compared on the 6 rows that all have (of 10, 6)" in part.stdout
    refused = run_command(["compare", "a", "c"], tmp_path)
    assert refused.returncode == 2
    assert refused.stderr == "error: a, c share no test row: compare runs on the same data.\n"
    shutil.move(tmp_path / "one", tmp_path / "gone")
    refused = run_command(["compare", "a", "b"], tmp_path)
    assert refused.returncode == 2
    assert "those of a, b are gone or have changed" in refused.stderr
