"""Rows of several labels, and numbers: read, trained, saved, answered."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import small_data
import tiny_models
import torch
from browser import chromium
from peft import PeftModel
from PIL import Image
from refusal import refused
from sklearn import metrics as theirs
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification, pipeline

import hftl
from hftl import backbones, cli, data, saving
from hftl.errors import UsageError
from hftl.losses import BinaryCrossEntropyLoss, NumberLoss
from hftl.metrics import multi_label_metrics, regression_metrics, sigmoid
from hftl.modality import TEXT
from hftl.probes import logistic
from hftl.problems import MultiLabel, Regression
from hftl.problems.multi_label import best_thresholds
from hftl.report import render_report

QUICK = ["--report_to=none", "--precision=fp32", "--dataloader_num_workers=0", "--per_device_train_batch_size=8"]
LABELS, NUMBERS = "--problem_type=multi_label_classification", "--problem_type=regression"
NAMES = ["good", "long", "warm"]
SPLITS = {"train": 32, "val": 12, "test": 12}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of made-up words and pictures of three stripes, with what is in them: labels, and a number of them."""
    folder = tmp_path_factory.mktemp("problems")
    random = np.random.default_rng(0)
    for split, count in SPLITS.items():
        rows = []
        for index in range(count):
            there = random.random(3) < 0.4
            words = [name for name, has in zip(NAMES, there, strict=True) if has]
            others = random.choice(["the", "film", "was", "it", "a"], 4).tolist()
            pixels = np.zeros((32, 30, 3), np.uint8) + random.integers(0, 40, (32, 30, 3), dtype=np.uint8)
            for stripe in np.flatnonzero(there):
                pixels[:, 10 * stripe : 10 * stripe + 10] += 180
            path = folder / "pictures" / f"{split}-{index}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(path)
            text = " ".join(random.permutation([*words, *others]))
            weight = 5_000 + 100 * float(there @ [1, 2, 4]) + random.normal(0, 1)
            rows.append({"text": text, "image": str(path), "labels": words, "weight": weight})
        for kind in ("texts", "images", "both"):
            columns = {"texts": ["text"], "images": ["image"], "both": ["text", "image"]}[kind]
            for target in ("labels", "weight"):
                place = folder / f"{kind}-{target}"
                place.mkdir(exist_ok=True)
                lines = [json.dumps({name: row[name] for name in [*columns, target]}) for row in rows]
                (place / f"{split}.jsonl").write_text("\n".join(lines))
    torch.manual_seed(0)
    tiny_models.write_tiny_cnn(folder / "cnn")
    tiny_models.write_tiny_image_model(folder / "vit")
    tiny_models.write_tiny_text_model(folder / "bert")
    tiny_models.write_tiny_text_model(folder / "gpt2", kind="gpt2")
    small_data.write_sounds(folder / "sounds", {"train": 8, "val": 3, "test": 3})
    for split in ("train", "val", "test"):
        files = sorted((folder / "sounds" / split).rglob("*.wav"))
        lines = [
            json.dumps({"audio": str(path), "labels": [path.parent.name], "weight": len(path.parent.name) + number / 9})
            for number, path in enumerate(files)
        ]
        for target in ("labels", "weight"):
            (folder / f"sounds-{target}").mkdir(exist_ok=True)
            (folder / f"sounds-{target}" / f"{split}.jsonl").write_text("\n".join(lines))
    small_data.write_videos(folder / "videos", {"train": 8, "val": 3, "test": 3})
    tiny_models.write_tiny_video_model(folder / "videomae")
    for split in ("train", "val", "test"):
        files = sorted((folder / "videos" / split).rglob("*.mkv"))
        lines = [
            json.dumps({"video": str(path), "labels": [path.parent.name], "weight": number / 3})
            for number, path in enumerate(files)
        ]
        for target in ("labels", "weight"):
            (folder / f"videos-{target}").mkdir(exist_ok=True)
            (folder / f"videos-{target}" / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


#: recipe's task, data, and models that are in the folder
KINDS = {
    "cnn": ("image-classification", "images", ["--model=cnn"]),
    "vit": ("image-classification", "images", ["--model=vit"]),
    "bert": ("text-classification", "texts", ["--model=bert"]),
    "gpt2": ("text-classification", "texts", ["--model=gpt2"]),
    "sounds": ("audio-classification", "sounds", ["--model=cnn", "--clip_seconds=0.5"]),
    "video": ("video-classification", "videos", ["--model=videomae"]),
    "both": ("image-text-classification", "both", ["--model=cnn", "--text_model=bert"]),
}


def trained(place: Path, kind: str, problem: str, output: Path, *flags: str) -> hftl.Run:
    task, name, models = KINDS[kind]
    target = "labels" if problem == LABELS else "weight"
    models = [re.sub(r"(?<=model=)", f"{place}/", flag) for flag in models]
    words = [problem, f"--label_column={target}", f"--dataset={place / f'{name}-{target}'}", *models, *QUICK, *flags]
    cli._run(["train", task, *words, f"--output_dir={output}"])
    return hftl.load_run(output)


def answers_of(run: hftl.Run) -> list[dict[str, str]]:
    with (run.folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def inputs_of(place: Path, run: hftl.Run, kind: str) -> list[Any]:
    lines = (place / f"{KINDS[kind][1]}-labels" / "test.jsonl").read_text().splitlines()
    names = {"text-classification": "text", "image-classification": "image", "audio-classification": "audio"}
    names["video-classification"] = "video"
    rows = [json.loads(line) for line in lines]
    return [row[names[run.task.name]] if run.task.name in names else row for row in rows]


def check_scores(place: Path, run: hftl.Run, kind: str) -> None:
    """metrics.json is what predictions.csv gives, what `hftl evaluate` says, and what the loaded run predicts."""
    rows, scores = answers_of(run), run.metrics["test"]
    # On a random network a solved head has weights of hundreds, which magnify rounding.
    solved = "learning_rate" not in run.metrics["train"]["stages"][-1]
    predictions = run.predict(inputs_of(place, run, kind))
    if isinstance(run.task.problem, Regression):
        found = np.array([float(row["prediction"]) for row in rows])
        close = (0.05 if solved else 0.005) * np.std([float(row["label"]) for row in rows])
        assert [entry.value for entry in predictions] == pytest.approx(found, abs=close)
        expected = regression_metrics(found, np.array([float(row["label"]) for row in rows]))
        assert scores["rmse"] == pytest.approx(expected["rmse"], rel=1e-3)
    else:
        names, thresholds = run.label_names, run.metrics["thresholds"]
        found = np.array([[float(row[f"probability_{name}"]) for name in names] for row in rows])
        close = 0.02 if solved else 1e-3
        np.testing.assert_allclose([list(entry.probabilities.values()) for entry in predictions], found, atol=close)
        truth = np.array([[name in json.loads(row["label"]) for name in names] for row in rows])
        for entry in predictions:
            assert entry.labels == [name for name in names if entry.probabilities[name] >= thresholds[name]]
        taken = found >= [thresholds[name] for name in names]
        assert scores["f1_micro"] == pytest.approx(theirs.f1_score(truth, taken, average="micro"), abs=1e-6)
        assert scores["subset_accuracy"] == pytest.approx(theirs.accuracy_score(truth, taken), abs=1e-6)
    of_command = run.evaluate(str(run.recipe["dataset_name"]))
    assert set(of_command) == set(scores) - {"loss"}
    for name in ("rmse", "mae") if isinstance(run.task.problem, Regression) else ("f1_micro", "hamming_loss"):
        assert of_command[name] == pytest.approx(scores[name], rel=0.02 if solved else 1e-3)


@pytest.mark.parametrize("problem", [LABELS, NUMBERS])
@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("cnn", ["--method=full", "--max_steps=3"]),
        ("vit", ["--method=lora", "--max_steps=3"]),
        ("bert", ["--method=full", "--max_steps=3", "--average=ema", "--ema_decay=0.5"]),
        ("gpt2", ["--method=frozen"]),
        ("gpt2", ["--method=lp_ft", "--num_train_epochs=1"]),
        ("sounds", ["--method=frozen"]),
        ("both", ["--method=frozen"]),
        ("video", ["--method=full", "--max_steps=2"]),
    ],
)
def test_every_task_learns_labels_and_numbers(
    place: Path, tmp_path: Path, kind: str, flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(place, kind, problem, tmp_path / "run", *flags)
    check_scores(place, run, kind)
    config = json.loads((run.folder / "config.json").read_text())
    assert config["problem_type"] == problem.partition("=")[2]
    card = (run.folder / "README.md").read_text()
    assert ("| class | training rows | threshold |" in card) == (problem == LABELS)
    assert ("learned from numbers between" in card) == (problem == NUMBERS)
    if run.task.name in ("image-classification", "text-classification"):
        (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        example = inputs_of(place, run, kind)[0]
        code = code.replace('"run"', repr(str(run.folder)))
        code = re.sub(r'"(image\.jpg|A text\.)"', lambda _: repr(example), code).replace("print(", "said.append(")
        said: list[Any] = []
        exec(code, {"said": said})
        mine = run.predict([example])[0]
        expected = mine.probabilities if problem == LABELS else {"weight": mine.value}
        assert {entry["label"]: entry["score"] for entry in said[0]} == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_a_number_is_learned_alike_in_any_unit(place: Path, tmp_path: Path) -> None:
    """And in the unit of the data the saved model answers."""
    found = {}
    for name, (factor, offset) in {"plain": (1.0, 0.0), "other": (0.001, -7.0)}.items():
        folder = tmp_path / name
        folder.mkdir()
        for path in (place / "texts-weight").iterdir():
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            lines = [json.dumps(row | {"weight": row["weight"] * factor + offset}) for row in rows]
            (folder / path.name).write_text("\n".join(lines))
        flags = [NUMBERS, "--label_column=weight", f"--dataset={folder}", f"--model={place / 'bert'}", *QUICK]
        output = tmp_path / f"run-{name}"
        cli._run(["train", "text-classification", *flags, "--num_train_epochs=30", "--learning_rate=3e-3",
                  "--weight_decay=0", f"--output_dir={output}"])  # fmt: skip
        run = hftl.load_run(output)
        values = [entry.value for entry in run.predict(place / "texts-labels" / "test.jsonl")]
        found[name] = (np.array(values) - offset) / factor
        assert run.metrics["test"]["r2"] > 0.5
    np.testing.assert_allclose(found["plain"], found["other"], rtol=2e-3)


def test_separated_labels_are_read_alike_later(place: Path, tmp_path: Path) -> None:
    """What separates them was found in training; a later table may not tell."""
    rows = [[f"text {n} {'good' * (n % 2)}", ["good;long", "warm", "", "long"][n % 4]] for n in range(40)]
    table = write_csv(tmp_path / "t.csv", [["text", "label"], *rows])
    flags = [LABELS, f"--dataset={table}", f"--model={place / 'bert'}", *QUICK, "--max_steps=2"]
    cli._run(["train", "text-classification", *flags, f"--output_dir={tmp_path / 'run'}"])
    run = hftl.load_run(tmp_path / "run")
    assert run.label_names == ["good", "long", "warm"]
    scores = run.evaluate(str(table))
    answers = [set(entry.labels) for entry in run.predict(table)]
    right = np.mean([found == set(filter(None, row[1].split(";"))) for found, row in zip(answers, rows, strict=True)])
    assert scores["subset_accuracy"] == pytest.approx(right)


def test_numbers_are_computed_in_float32_whatever_is_asked(place: Path, tmp_path: Path) -> None:
    run = trained(place, "bert", NUMBERS, tmp_path / "run", "--max_steps=2")
    texts = inputs_of(place, run, "bert")
    exact = [entry.value for entry in run.predict(texts)]
    run.precision = "bf16"
    assert [entry.value for entry in run.predict(texts, batch_size=2)] == pytest.approx(exact, rel=1e-5)


def test_the_loss_has_the_same_unit_before_and_after_the_end(place: Path, tmp_path: Path) -> None:
    run = trained(place, "bert", NUMBERS, tmp_path / "run", "--max_steps=2")
    splits = data.load_splits(run.task.arguments, run.task.modality, run.task.problem)
    logits, labels = torch.from_numpy(run.logits(splits.test)), torch.from_numpy(data.labels_of(splits.test))
    loss = float(run.task.loss(splits)({"logits": logits}, labels))
    assert loss == pytest.approx(run.metrics["test"]["loss"], rel=1e-3)
    assert loss == pytest.approx((run.metrics["test"]["rmse"] / splits.train_labels.std()) ** 2, rel=1e-3)


def test_a_split_that_lacks_a_score_is_scored_without_it(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for path in (place / "texts-labels").iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [row | {"labels": []} for row in rows] if path.stem == "test" else rows
        (folder / path.name).write_text("\n".join(map(json.dumps, rows)))
    flags = [LABELS, f"--dataset={folder}", f"--model={place / 'bert'}", *QUICK, "--max_steps=1"]
    cli._run(["train", "text-classification", *flags, f"--output_dir={tmp_path / 'run'}"])
    assert "mean_average_precision" not in hftl.load_run(tmp_path / "run").metrics["test"]


@pytest.mark.parametrize("problem", [LABELS, NUMBERS])
def test_a_trained_head_may_be_kept(place: Path, tmp_path: Path, problem: str) -> None:
    """At a rate of nothing the model stays what it was, in its own unit."""
    first = trained(place, "bert", problem, tmp_path / "first", "--max_steps=3")
    name = "labels" if problem == LABELS else "weight"
    words = [problem, f"--label_column={name}", f"--dataset={place / f'texts-{name}'}", f"--model={first.folder}"]
    cli._run(["train", "text-classification", *words, *QUICK, "--keep_head", "--max_steps=1", "--learning_rate=1e-12",
              "--head_learning_rate=1e-12", f"--output_dir={tmp_path / 'second'}"])  # fmt: skip
    second = hftl.load_run(tmp_path / "second")
    texts = inputs_of(place, first, "bert")
    rows = first.task.read_inputs(texts)
    np.testing.assert_allclose(second.logits(rows), first.logits(rows), rtol=1e-4)


def test_a_damaged_threshold_is_told(place: Path, tmp_path: Path) -> None:
    run = trained(place, "bert", LABELS, tmp_path / "run", "--max_steps=1")
    path = run.folder / "metrics.json"
    for kept in ({"good": "high"}, [0.5]):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"thresholds": kept}))
        with pytest.raises(UsageError, match="is damaged"):
            hftl.load_run(run.folder)


def test_an_adapter_by_itself_gives_the_number(place: Path, tmp_path: Path) -> None:
    run = trained(place, "bert", NUMBERS, tmp_path / "run", "--method=lora", "--max_steps=3")
    config = AutoConfig.from_pretrained(run.folder / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(
        place / "bert", config=config, ignore_mismatched_sizes=True
    )
    adapted = PeftModel.from_pretrained(base, run.folder / "adapter").eval()
    ids = torch.randint(5, 30, (2, 7))
    with torch.no_grad():
        merged = AutoModelForSequenceClassification.from_pretrained(run.folder).eval()(ids).logits
        assert torch.allclose(adapted(ids).logits, merged, rtol=1e-4)
    assert merged.mean() > 1_000


def test_an_interruption_at_the_very_end_changes_no_unit_twice(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--method=full", "--max_steps=3"]
    whole = trained(place, "bert", NUMBERS, tmp_path / "whole", *flags)

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(saving, "save_checked", fails)
        with pytest.raises(UsageError, match="the disk is full"):
            trained(place, "bert", NUMBERS, tmp_path / "run", *flags)
    resumed = trained(place, "bert", NUMBERS, tmp_path / "run", *flags, "--resume")
    assert answers_of(resumed) == answers_of(whole)


def test_heads_are_solved_as_others_solve_them(place: Path, tmp_path: Path) -> None:
    """The penalised least squares of scikit-learn, at the strength that was chosen."""
    from sklearn.linear_model import Ridge

    run = trained(place, "cnn", NUMBERS, tmp_path / "run", "--method=frozen")
    assert "solved on the features" in (run.folder / "README.md").read_text()
    record = run.metrics["train"]["stages"][0]
    assert record["head"] == "least squares"
    splits = data.load_splits(run.task.arguments, run.task.modality, run.task.problem)
    model, answers = run.model, run.logits(splits.train)
    rows = run.task.dataset(splits.train, training=False)
    pixels = torch.stack([rows[index]["pixel_values"] for index in range(len(rows))])
    with torch.no_grad():
        features = backbones.head_input(model, "timm_model.fc", {"pixel_values": pixels}).double().numpy()
    deviation = features.std(axis=0)
    stretch = np.maximum(deviation, logistic._LEAST_DEVIATION * deviation.mean())
    scaled = ((features - features.mean(axis=0)) / stretch)[:, deviation > 1e-6]
    target = data.labels_of(splits.train)
    # Ours is mean squares + λ/2 ‖w‖² of a target of deviation 1: theirs the sum of squares + alpha ‖w‖².
    ridge = Ridge(alpha=record["penalty"] / 2 * len(target)).fit(scaled, (target - target.mean()) / target.std())
    expected = ridge.predict(scaled) * target.std() + target.mean()
    np.testing.assert_allclose(answers[:, 0], expected, atol=0.02 * target.std())


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--class_weights=balanced"], LABELS),
        (["--loss=focal"], LABELS),
        (["--label_smoothing_factor=0.1"], LABELS),
        (["--loss=mae"], NUMBERS),
        (["--penalty=l2_sp"], NUMBERS),
        (["--repeats=2"], LABELS),
        (["--repeats=2"], NUMBERS),
        (["--test_time_flip"], NUMBERS),
        (["--learning_rate=auto"], NUMBERS),
    ],
)
def test_settings_that_go_with_them(place: Path, tmp_path: Path, flags: list[str], problem: str) -> None:
    run = trained(place, "cnn", problem, tmp_path / "run", "--max_steps=2", *flags)
    splits = data.load_splits(run.task.arguments, run.task.modality, run.task.problem)
    loss: Any = run.task.loss(splits)
    expected = {
        "--class_weights=balanced": lambda: loss.label_weights is not None and float(loss.label_weights.min()) > 1,
        "--loss=focal": lambda: loss.gamma == 2,
        "--label_smoothing_factor=0.1": lambda: loss.label_smoothing == 0.1,
        "--loss=mae": lambda: loss.absolute,
    }
    assert expected.get(flags[0], lambda: True)()
    if "--repeats=2" in flags:
        key = run.task.problem.headline[0][0]
        assert len(run.metrics["repeats"]["test"][key]["values"]) == 2
        assert run.task.problem.headline[0][1] in run.summary()
    check_scores(place, run, "cnn")


# ---- the data --------------------------------------------------------------------------------------------------------


def splits_of(folder: Path, **settings: Any) -> data.Splits:
    return data.load_splits({"dataset_name": str(folder), **settings}, TEXT, settings.get("problem") or MultiLabel())


def write_csv(path: Path, rows: list[list[Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.mark.parametrize("separator", [";", "|", ",", " / "])
def test_labels_of_a_cell(tmp_path: Path, separator: str) -> None:
    cells = [f"b{separator}a", "a", "", f" b {separator} c ", '["a", "c"]', f"a{separator}a", "b", "c"]
    table = write_csv(tmp_path / "t.csv", [["text", "label"], *([f"text {n}", cell] for n, cell in enumerate(cells))])
    problem = MultiLabel(separator=separator if separator == " / " else None)
    splits = data.load_splits({"dataset_name": str(table), "validation_fraction": 0.25}, TEXT, problem)
    found = {
        row["text"]: "".join(name for name, has in zip(splits.label_names, row["label"], strict=True) if has)
        for part in (splits.train, splits.validation)
        for row in part
    }
    assert splits.label_names == ["a", "b", "c"]
    assert [found[f"text {n}"] for n in range(8)] == ["ab", "a", "", "bc", "ac", "a", "b", "c"]
    in_train = "text 2" in splits.train["text"][:]
    assert any("1 of 6 have none" in line for line in splits.report) == in_train
    if separator != " / ":
        assert any(f"separated by {separator!r}" in line for line in splits.report)


def test_labels_in_columns_of_their_own(place: Path, tmp_path: Path) -> None:
    rows = [[f"text {n}", n % 2, "yes" if n % 3 else "no", n] for n in range(12)]
    table = write_csv(tmp_path / "t.csv", [["text", "toxic", "rude", "other"], *rows])
    flags = [LABELS, f"--dataset={table}", f"--model={place / 'bert'}", *QUICK, "--max_steps=1"]
    flags += ["--label_columns", "toxic", "rude", "--text_column=text"]
    cli._run(["train", "text-classification", *flags, f"--output_dir={tmp_path / 'run'}"])
    run = hftl.load_run(tmp_path / "run")
    assert run.label_names == ["toxic", "rude"]
    answers = {entry.id: entry.labels for entry in run.predict(table)}
    truth = {str(n): [name for name, has in (("toxic", n % 2), ("rude", n % 3)) if has] for n in range(12)}
    wrong = sum(len(set(answers[row]) ^ set(truth[row])) for row in truth) / 24
    assert run.evaluate(str(table))["hamming_loss"] == pytest.approx(wrong)
    other = write_csv(
        tmp_path / "other.csv", [["text", "found"], *([f"text {n}", json.dumps(truth[str(n)])] for n in range(12))]
    )
    assert run.evaluate(str(other), label="found")["hamming_loss"] == pytest.approx(wrong)
    untold = tmp_path / "untold"
    untold.mkdir()
    write_csv(untold / "train.csv", [["text", "toxic", "rude"], *(row[:3] for row in rows)])
    write_csv(untold / "test.csv", [["text"], *([row[0]] for row in rows)])
    settings = {"dataset_name": str(untold), "label_columns": ["toxic", "rude"]}
    splits = data.load_splits(settings, TEXT, MultiLabel())
    assert splits.test is None
    assert any("it has no column 'toxic' and is left out" in line for line in splits.report)
    cli._run(["train", "text-classification", f"--config={tmp_path / 'run' / 'recipe.yaml'}", *QUICK,
              f"--output_dir={tmp_path / 'again'}", f"--dataset={table}", f"--model={place / 'bert'}"])  # fmt: skip
    assert answers_of(hftl.load_run(tmp_path / "again")) == answers_of(run)


def test_labels_that_a_data_set_declares(tmp_path: Path) -> None:
    kinds = datasets.Sequence(datasets.ClassLabel(names=["x", "y", "z"]))
    features = datasets.Features({"text": datasets.Value("string"), "labels": kinds})
    rows = {"text": [f"text {n}" for n in range(10)], "labels": [[n % 2, 2] if n % 3 else [] for n in range(10)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    splits = splits_of(tmp_path)
    assert splits.label_names == ["x", "y", "z"]
    assert splits.counts == data.labels_of(splits.train).sum(axis=0).tolist()
    assert len(splits.train) + len(splits.validation) == 10


def test_parts_are_drawn_by_rare_labels_and_by_size(tmp_path: Path) -> None:
    rows = [[f"text {n}", "a;rare" if n % 25 == 0 else "a" if n % 2 else "b"] for n in range(100)]
    splits = splits_of(write_csv(tmp_path / "labels.csv", [["text", "label"], *rows]), validation_fraction=0.25)
    assert (data.labels_of(splits.validation)[:, splits.label_names.index("rare")]).sum() == 1
    table = write_csv(tmp_path / "numbers.csv", [["text", "label"], *([f"text {n}", n * n] for n in range(100))])
    splits = splits_of(table, validation_fraction=0.2, problem=Regression())
    found = np.sqrt(data.labels_of(splits.validation)) // 10
    assert np.unique(found, return_counts=True)[1].tolist() == [2] * 10


TABLE = [["text", "label"]]


@pytest.mark.parametrize(
    ("flags", "rows", "words"),
    [
        ([LABELS], [["a", '["x", '], ["b", "y"]], ("'[\"x\", ' in the column 'label' is no list of labels", "row")),
        ([LABELS], [["a", "x"], ["b", "x"]], ("the same labels in every row",)),
        ([LABELS, "--label_columns", "labell"], [["a", 1]], ("--label_columns 'labell'", "Did you mean 'label'")),
        ([LABELS, "--label_columns", "label"], [["a", 2], ["b", 1]], ("'2' in the column 'label' (row 0)", "1 or 0")),
        ([LABELS, "--label_columns", "label", "--label_column=x"], [["a", 1]], ("both say where the labels are",)),
        (
            ["--label_columns", "label"],
            [["a", 1], ["b", 0]],
            ("--label_columns is for several labels a row: say --problem_type multi_label_classification",),
        ),
        ([NUMBERS], [["a", 1], ["b", "many"]], ("'many' in the column 'label' is no number (row counting from 0: 1)",)),
        ([NUMBERS], [["a", 1], ["b", ""]], ("1 of 2 rows have no label",)),
        ([NUMBERS], [["a", 1], ["b", "inf"]], ("'inf' in the column 'label' is no number", "write it as 1234.5")),
        ([NUMBERS], [["a", 1], ["b", "1_000"]], ("'1_000' in the column 'label' is no number",)),
        ([NUMBERS], [["a", 1.7e9], ["b", 1.7e9 + 1]], ("that differ by 0.5", "Subtract a constant")),
        ([NUMBERS], [["a", 1e39], ["b", 1e38]], ("take another unit",)),
        ([NUMBERS, "--label_separator=;"], [["a", 1]], ("--label_separator is for several labels a row",)),
        ([NUMBERS, "--soup_runs=2"], [["a", 1]], ("--soup_runs is for rows of one class each",)),
        (
            [NUMBERS, "--metric_for_best_model=r2", "--greater_is_better=false"],
            [["a", n] for n in range(9)],
            ("--greater_is_better: of r2 more is",),
        ),
        ([LABELS, "--label_columns", "label", "label"], [["a", 1]], ("--label_columns names a column twice",)),
        ([LABELS, "--label_separator="], [["a", "x"]], ("--label_separator is what stands between",)),
        ([LABELS], [["a", "[]"], ["b", "[]"]], ("the same labels in every row",)),
        ([LABELS], [["a", "[1, 0]"], ["b", "[null, 1]"]], ("a label is missing among those of row",)),
        ([NUMBERS], [["a", 1], ["b", 1]], ("the number 1 in every row",)),
        ([], [["a", 1.5], ["b", 2.5]], ("--problem_type regression",)),
        ([NUMBERS, "--shots=4"], [["a", 1]], ("--shots is for rows of one class each, not for a number a row",)),
        ([LABELS, "--method=auto"], [["a", 1]], ("--method auto is for rows of one class each",)),
        ([LABELS, "--method=frozen", "--head=knn"], [["a", 1]], ("--head knn is for rows of one class each",)),
        ([LABELS, "--sampler=balanced"], [["a", 1]], ("--sampler balanced is for rows of one class each",)),
        ([NUMBERS, "--penalty=r_drop"], [["a", 1]], ("--penalty r_drop is for rows of one class each",)),
        (
            [NUMBERS, "--loss=focal"],
            [["a", 1]],
            (
                "Unknown loss 'focal' for a number a row.",
                "mse, mae, and module",
            ),
        ),
        ([LABELS, "--loss=mse"], [["a", 1]], ("Unknown loss 'mse' for rows of several labels",)),
        (["--loss=mse"], [["a", 1]], ("Unknown loss 'mse' for rows of one class each",)),
        ([NUMBERS, "--class_weights=balanced"], [["a", 1]], ("--class_weights is for classes",)),
        ([NUMBERS, "--label_smoothing_factor=0.1"], [["a", 1]], ("--label_smoothing_factor is for classes",)),
        ([NUMBERS, "--metric_for_best_model=accuracy"], [["a", n] for n in range(9)], ("rmse, mae, r2",)),
        ([NUMBERS], [["a", 1], ["b", 2]], ("without its validation rows has the number",)),
        ([LABELS, "--metrics=accuracy"], [["a", 1]], ("--metrics of other libraries",)),
        ([NUMBERS, "--push_to_hub", "--hub_strategy=every_save"], [["a", 1]], ("--hub_strategy end",)),
    ],
)
def test_bad_input_is_one_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], rows: list[Any], words: Any
) -> None:
    table = write_csv(tmp_path / "t.csv", [*TABLE, *rows])
    command = ["train", "text-classification", f"--dataset={table}", f"--model={place / 'bert'}", *QUICK, *flags]
    error = refused([*command, f"--output_dir={tmp_path / 'run'}"], capsys)
    for word in words:
        assert word in error
    assert not (tmp_path / "run").exists()


def test_lists_of_zeros_and_ones_are_no_names(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"t {n}", "labels": [n % 2, 1, 0]}) for n in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(UsageError, match="holds lists of 0 and 1, which do not say what the labels are called"):
        splits_of(tmp_path)
    kinds = datasets.Sequence(datasets.ClassLabel(names=["x", "y"]))
    features = datasets.Features({"text": datasets.Value("string"), "labels": kinds})
    for entry in (-1, None):
        rows = {"text": ["a", "b"], "labels": [[0, 1], [entry, 1]]}
        (tmp_path / "declared").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "declared" / "train.parquet")
        with pytest.raises(UsageError, match="a label is missing among those of row"):
            splits_of(tmp_path / "declared")


def test_a_loss_of_the_plan_is_refused_for_numbers(place: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import dataclasses\nfrom hftl.methods import METHODS\n"
        "def mine(model, arguments):\n"
        "    plan = METHODS['full'](model, arguments)\n"
        "    stage = dataclasses.replace(plan.stages[0], loss=lambda *others: 0)\n"
        "    return dataclasses.replace(plan, stages=(stage,))\n"
    )
    with pytest.raises(UsageError, match="brings a loss of its own"):
        trained(place, "bert", NUMBERS, tmp_path / "run", f"--method={tmp_path / 'mine.py'}:mine", "--max_steps=1")


def test_labels_that_training_does_not_have(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", [*TABLE, ["a", "x;y"], ["b", "y"], ["c", "x"], ["d", "y;x"]])
    write_csv(tmp_path / "test.csv", [*TABLE, ["a", "x;zz"], ["b", "y"]])
    with pytest.raises(UsageError, match=r"the label 'zz' does not occur in train: row counting from 0: 0"):
        splits_of(tmp_path)


def test_commands_that_are_made_for_classes_say_so(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(place, "bert", NUMBERS, tmp_path / "run", "--max_steps=1")
    capsys.readouterr()
    folder, common = str(run.folder), [NUMBERS, f"--model={place / 'bert'}", f"--dataset={place / 'texts-weight'}"]
    for words in (
        ["compare", folder, folder],
        ["demo", folder],
        ["rank", "--task=text-classification", "--models", str(place / "bert"), *common[0:1], *common[2:]],
        ["advise", "text-classification", *common],
        ["check-labels", "text-classification", *common],
    ):
        assert "one class" in refused(words, capsys), words


def test_reports_show_labels_and_numbers(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No message, request or serious fault of accessibility; made anew alike; names are harmless, damage is told."""
    from axe_playwright_python.sync_playwright import Axe

    hostile = '<img src=x onerror="alert(1)">'
    folder = tmp_path / "data"
    folder.mkdir()
    for path in (place / "texts-labels").iterdir():
        (folder / path.name).write_text(path.read_text().replace('"warm"', json.dumps(hostile)))
    flags = [LABELS, f"--dataset={folder}", f"--model={place / 'bert'}", *QUICK, "--logging_steps=1"]
    cli._run(["train", "text-classification", *flags, "--num_train_epochs=2", f"--output_dir={tmp_path / 'labels'}"])
    trained(place, "bert", NUMBERS, tmp_path / "numbers", "--num_train_epochs=2", "--logging_steps=1")
    with chromium() as browser:
        for name, width, scheme in (("labels", 390, "dark"), ("numbers", 390, "light"), ("numbers", 1280, "dark")):
            file = tmp_path / name / "report.html"
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page, seen = context.new_page(), []
            page.on("console", lambda message, seen=seen: seen.append(message.text))
            page.on("dialog", lambda dialog, seen=seen: (seen.append(dialog.message), dialog.dismiss()))
            page.on("request", lambda request, seen=seen: seen.append(request.url))
            page.goto(file.as_uri())
            page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
            found = Axe().run(page).response["violations"]
            assert not [fault for fault in found if fault["impact"] in ("serious", "critical")]
            assert seen == [file.as_uri()]
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            context.close()
    runs = {name: hftl.load_run(tmp_path / name) for name in ("labels", "numbers")}
    pages = {name: (run.folder / "report.html").read_text() for name, run in runs.items()}
    assert "<img src=x" not in pages["labels"]
    assert "RMSE on validation" in pages["numbers"]
    assert pages["numbers"].count("<circle") > 12
    for name, run in runs.items():
        cli._run(["report", str(run.folder)])
        assert (run.folder / "report.html").read_text() == pages[name]
        shared = render_report(run, None, shared=True)
        assert "look whether" in pages[name]
        assert "look whether" not in shared
        table = run.folder / "predictions.csv"
        lines = table.read_text().splitlines()
        for content in (lines[:1], lines[:4], [line[:-3] for line in lines], ["id,label", *lines[1:]]):
            table.write_text("\n".join(content))
            assert str(table) in refused(["report", str(run.folder)], capsys)


@pytest.mark.parametrize(("problem", "score"), [(NUMBERS, "rmse"), (LABELS, "mean_average_precision")])
def test_tune_takes_any_score(
    place: Path, tmp_path: Path, problem: str, score: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "labels" if problem == LABELS else "weight"
    words = [problem, f"--label_column={name}", f"--model={place / 'bert'}", f"--dataset={place / f'texts-{name}'}"]
    words += [*QUICK, "--max_steps=2", "--trials=2", f"--output_dir={tmp_path / 'tuned'}"]
    cli.main(["tune", "text-classification", *words, "--search", "learning_rate=1e-4,1e-3"])
    assert score in capsys.readouterr().out
    run = hftl.load_run(tmp_path / "tuned")
    assert score in run.metrics["validation"]
    assert run.metrics["test"]["loss"] < 10 * run.metrics["validation"]["loss"]
    check_scores(place, run, "bert")
    error = refused(["tune", "text-classification", *words, "--overwrite", "--search", "penalty=l2_sp,r_drop"], capsys)
    assert "--penalty r_drop is for rows of one class each" in error


# ---- losses, scores, thresholds --------------------------------------------------------------------------------------


def test_losses_are_those_of_torch() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 4), (torch.rand(6, 4) > 0.5).float()
    outputs = {"logits": logits}
    plain = torch.nn.functional.binary_cross_entropy_with_logits
    assert BinaryCrossEntropyLoss()(outputs, labels) == pytest.approx(float(plain(logits, labels)))
    weights = torch.tensor([1.0, 2.0, 3.0, 0.5])
    assert BinaryCrossEntropyLoss(weights)(outputs, labels) == pytest.approx(
        float(plain(logits, labels, pos_weight=weights))
    )
    from torchvision.ops import sigmoid_focal_loss

    expected = sigmoid_focal_loss(logits, labels, alpha=-1, gamma=2, reduction="mean")
    assert BinaryCrossEntropyLoss(gamma=2)(outputs, labels) == pytest.approx(float(expected), rel=1e-5)
    halves = [BinaryCrossEntropyLoss()({"logits": logits[part]}, labels[part], 6) for part in (slice(4), slice(4, 6))]
    assert float(sum(halves)) == pytest.approx(float(BinaryCrossEntropyLoss()(outputs, labels)))
    numbers = torch.tensor([3.0, 5.0, -100.0])
    found = NumberLoss((4.0, 2.0), 2.0)({"logits": torch.tensor([[0.0], [1.0], [0.5]])}, numbers)
    assert float(found) == pytest.approx((0.25 + 0.25 + 52.5**2) / 3)
    assert float(NumberLoss((0.0, 1.0), 1.0, absolute=True)({"logits": torch.zeros(3, 1)}, numbers)) == pytest.approx(
        36
    )


@pytest.mark.parametrize("problem", [LABELS, NUMBERS])
def test_a_batch_in_portions_is_the_batch(place: Path, tmp_path: Path, problem: str) -> None:
    """Trainer counts the numbers of a label that are not -100: a row may have ten, or be that number."""
    found = []
    for name, flags in {
        "one": ["--per_device_train_batch_size=8"],
        "two": ["--per_device_train_batch_size=2", "--gradient_accumulation_steps=4"],
    }.items():
        flags += ["--max_steps=2", "--logging_steps=1", "--augmentation=none"]
        run = trained(place, "vit", problem, tmp_path / name, *flags)
        lines = (run.folder / "logs" / "log.jsonl").read_text().splitlines()
        logs = [json.loads(line) for line in lines]
        found.append([(entry["loss"], entry["grad_norm"]) for entry in logs if "grad_norm" in entry])
        assert run.metrics["validation"]["loss"] < 3
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3)
    assert found[0][0][0] == pytest.approx({LABELS: 0.69, NUMBERS: 1.0}[problem], rel=0.5)


def test_scores_are_those_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    truth = random.random((40, 4)) < [0.5, 0.3, 0.1, 0.0]
    probabilities = np.clip(truth * 0.4 + random.random((40, 4)) * 0.6, 0, 1)
    taken = probabilities >= 0.5
    found = multi_label_metrics(probabilities, truth.astype(float), ["a", "b", "c", "d"], np.full(4, 0.5))
    three = truth[:, :3], probabilities[:, :3], taken[:, :3]
    assert found["mean_average_precision"] == pytest.approx(theirs.average_precision_score(three[0], three[1]))
    assert found["roc_auc"] == pytest.approx(theirs.roc_auc_score(three[0], three[1]))
    assert found["f1_macro"] == pytest.approx(theirs.f1_score(three[0], three[2], average="macro"))
    assert found["f1_micro"] == pytest.approx(theirs.f1_score(truth, taken, average="micro"))
    assert found["hamming_loss"] == pytest.approx(theirs.hamming_loss(truth, taken))
    assert found["precision/b"] == pytest.approx(theirs.precision_score(truth[:, 1], taken[:, 1]))
    one = multi_label_metrics(probabilities[:, :1], truth[:, :1].astype(float), ["a"], np.array([0.5]))
    assert one["f1_macro"] == one["f1_micro"] == pytest.approx(theirs.f1_score(truth[:, 0], taken[:, 0]))
    assert set(regression_metrics(np.ones(3), np.ones(3))) == {"rmse", "mae"}
    numbers, guesses = random.normal(size=30), random.normal(size=30)
    scores = regression_metrics(guesses, numbers)
    assert scores["r2"] == pytest.approx(theirs.r2_score(numbers, guesses))
    assert scores["rmse"] == pytest.approx(np.sqrt(np.mean((numbers - guesses) ** 2)))


@pytest.mark.parametrize("ties", [False, True])
def test_thresholds_are_the_best_of_all(ties: bool) -> None:
    random = np.random.default_rng(1)
    labels = random.random((300, 3)) < [0.5, 0.3, 0.02]
    probabilities = sigmoid(labels + random.normal(0, 1, (300, 3)) - 1)
    probabilities = np.round(probabilities, 1) if ties else probabilities
    thresholds = best_thresholds(probabilities, labels.astype(float))

    def best(probability: Any, label: Any) -> float:
        return max(theirs.f1_score(label, probability >= least) for least in np.unique(probability))

    for number in (0, 1):
        found = theirs.f1_score(labels[:, number], probabilities[:, number] >= thresholds[number])
        assert found == pytest.approx(best(probabilities[:, number], labels[:, number]))
    common = theirs.f1_score(labels.ravel(), probabilities.ravel() >= thresholds[2])
    assert common == pytest.approx(best(probabilities.ravel(), labels.ravel()))
    assert best_thresholds(probabilities, np.zeros((300, 3))).tolist() == [0.5, 0.5, 0.5]


def test_a_model_whose_last_layer_is_not_its_answer_is_refused(place: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(place / "cnn", num_labels=1, ignore_mismatched_sizes=True)
    problem, batch = Regression(), {"pixel_values": torch.randn(2, 3, 64, 64)}
    problem.prepare(model, np.array([1.0, 2.0, 4.0]), keeps_head=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    problem.check_model(model, batch)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.timm_model.fc.register_forward_hook(lambda *others: others[-1].tanh())
    with pytest.raises(UsageError, match="something follows the output layer"):
        problem.check_model(model, batch)
    model.timm_model.fc = torch.nn.Identity()
    with pytest.raises(UsageError):
        problem.prepare(model, np.array([1.0, 2.0]), keeps_head=False)


def test_pipelines_know_what_the_model_gives(place: Path, tmp_path: Path) -> None:
    run = trained(place, "bert", LABELS, tmp_path / "run", "--max_steps=1")
    classify = pipeline("text-classification", str(run.folder), top_k=None)
    total = sum(entry["score"] for entry in classify(["the film was good"])[0])
    assert total != pytest.approx(1, abs=1e-3)
