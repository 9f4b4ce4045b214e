"""`hftl rank`: from models and data to a table, without the test split."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_data import write_images, write_texts
from tiny_models import write_timm_folder, write_tiny_image_model, write_tiny_text_model
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

import hftl
from hftl import cli, folder, machine, pretrained, ranked, ranking, transferability
from hftl.tasks.image_classification import ImageClassification


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    torch.manual_seed(0)
    write_timm_folder(folder / "resnet", "resnet18", channels=[8, 8, 8, 8], stem_width=8)
    write_tiny_image_model(folder / "vit")
    write_images(folder / "data", {"train": 12, "validation": 4, "test": 5})
    return folder


def rank(*arguments: Any) -> None:
    cli._run(["rank", *map(str, arguments)])


def test_a_table_from_train_alone(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: set[int] = set()
    dataset = ImageClassification.dataset
    monkeypatch.setattr(
        ImageClassification, "dataset", lambda *all, **more: seen.add(len(all[1])) or dataset(*all, **more)
    )
    models = [images / "vit", images / "resnet", f"{images / 'resnet'}@32"]
    flags = ["--task=image-classification", "--dataset", images / "data", "--output", tmp_path / "table.csv"]
    rank(*flags, "--models", *models)
    assert seen == {36}  # of 12 a class; validation and test have other numbers
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    assert {row["model"] for row in rows} == set(map(str, models))
    scores = [float(row["logme"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 3  # another size gives other features
    for row in rows:
        assert (row["leep"] == "") == (row["nce"] == "") == row["model"].endswith("vit")
        assert float(row["features_per_second"]) > 0
        assert 1 / 3 < float(row["probe"]) <= 1
    printed = capsys.readouterr().out
    assert f"recommended: {rows[0]['model']} (highest LogME" in printed
    assert [line.split()[4] == "-" for line in printed.splitlines() if line.strip()[:1] in "123" and "/vit" in line]

    rank(*flags, "--models", *models, "--by", "probe")
    again = capsys.readouterr().out
    assert "ranked before, from the same files and versions: " in again
    assert "features: " not in again  # no model was looked at
    with (tmp_path / "table.csv").open() as file:
        by_probe = {row["model"]: row for row in csv.DictReader(file)}
    for row in rows:
        assert {**by_probe[row["model"]], "rank": row["rank"]} == row


def test_the_task_is_that_of_the_files(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(images)
    rank("--models", "resnet", "--dataset=data")
    assert "task: image-classification (--task names another)" in capsys.readouterr().out
    rank("--models", "resnet", "--dataset=data", "--task=image-classification")
    assert "ranked before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "task"),
    [
        (["digits/a/1.wav", "digits/.cache/1.png", "digits/__MACOSX/1.png"], "audio-classification"),
        (["digits/a/1.mp4"], "video-classification"),
        (["digits/train.csv", "digits/images/1.JPG"], "image-classification"),
        (["digits/train.csv"], "text-classification"),
    ],
)
def test_files_name_their_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(hftl.UsageError):  # the files are empty
        rank("--models", "random:resnet18", "--dataset=digits")
    assert f"task: {task} (--task names another)" in capsys.readouterr().out
    monkeypatch.setattr(ranking, "rank", lambda task, *others: pytest.fail(task))
    with pytest.raises(pytest.fail.Exception, match="audio-classification"):
        rank("--models", "random:resnet18", "--dataset=builtin:pitches")


def test_a_configuration_names_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "settings.yaml").write_text("task: multiple-choice\ndataset: builtin:riddles\n")
    monkeypatch.setattr(ranking, "rank", lambda task, *others: pytest.fail(task))
    with pytest.raises(pytest.fail.Exception, match="multiple-choice"):
        rank("--models", "random:bert", "--config", tmp_path / "settings.yaml")


def test_scores_are_those_of_the_models_own_outputs(images: Path) -> None:
    """LEEP from the probabilities that plain transformers gives, LogME from what enters its output layer."""
    tokens = [f"--dataset={images / 'data'}", "--feature_cache_dtype=float32"]
    (found,) = ranking.rank("image-classification", [str(images / "resnet")], tokens)
    assert found.rows == 36
    model = AutoModelForImageClassification.from_pretrained(images / "resnet").eval()
    task = ImageClassification(
        ranking.parse(ImageClassification.arguments_class, [f"--model={images / 'resnet'}", *tokens])
    )
    splits = ranking.load_rows(task.arguments, task.modality)
    task.build_model(splits)
    data: Any = task.dataset(splits.train, training=False)
    batch = task.collate([data[index] for index in range(36)])
    labels = batch.pop("labels").numpy()
    entered: list[torch.Tensor] = []
    model.get_submodule("timm_model.fc").register_forward_pre_hook(lambda _, values: entered.append(values[0]))
    with torch.no_grad():
        probabilities = model(**batch).logits.softmax(dim=1).numpy()
    assert probabilities.shape == (36, 5)
    assert found.leep == pytest.approx(transferability.leep(probabilities, labels), abs=1e-4)
    assert found.nce == pytest.approx(transferability.nce(probabilities.argmax(axis=1), labels), abs=1e-6)
    spectrum = transferability.decompose(transferability.with_constant(entered[0].numpy()))
    assert found.transrate == pytest.approx(transferability.transrate(spectrum, labels), rel=1e-2)


def test_scores_are_kept_for_the_same_features_labels_and_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    write_timm_folder(tmp_path / "model", "resnet18", channels=[8, 8, 8, 8], stem_width=8)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")  # as it is saved below
    write_images(tmp_path / "data", {"train": 6})
    decomposed: list[int] = []
    decompose = transferability.decompose
    monkeypatch.setattr(transferability, "decompose", lambda found: decomposed.append(len(found)) or decompose(found))
    tokens = [f"--dataset={tmp_path / 'data'}"]
    monkeypatch.setenv("HFTL_HOME", str(tmp_path / "home"))

    def scored() -> ranking.Candidate:
        (found,) = ranking.rank("image-classification", [str(tmp_path / "model")], tokens)
        return found

    first = scored()
    assert scored() == first
    assert len(decomposed) == 1
    (kept,) = (tmp_path / "home").rglob("scores.json")
    kept.write_text("{")
    assert scored() == first
    assert len(decomposed) == 2
    assert "scores.json' is damaged and is made again" in capsys.readouterr().out

    with torch.no_grad():
        model.get_submodule("timm_model.fc").weight.neg_()
    model.save_pretrained(tmp_path / "model")  # another trained head on the same features
    other = scored()
    assert len(decomposed) == 3
    assert first.leep is not None
    assert other.leep not in (first.leep, None)
    assert other.logme == first.logme
    one, two = sorted((tmp_path / "data" / "train").iterdir())[:2]
    moved = next(one.iterdir())
    moved.rename(two / f"moved-{moved.name}")  # a row has another label
    assert scored().logme != other.logme
    assert len(decomposed) == 4
    assert len(json.loads(kept.read_text())) == 3  # no other folder of features was begun


RANKED_AGAIN = """
import sys
from hftl import cli
cli.main(sys.argv[1:])
print("IMPORTED", *sorted({"torch", "transformers", "datasets", "sklearn"} & set(sys.modules)))
"""


def test_a_known_answer_needs_no_model_no_data_and_no_torch(images: Path, tmp_path: Path) -> None:
    """The first of two processes ranks two models, the second these and a third, the third process all of them."""
    flags = ["rank", "--task=image-classification", f"--dataset={images / 'data'}"]
    models = [f"{images / 'resnet'}@32", str(images / "vit"), str(images / "resnet")]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", RANKED_AGAIN, *flags, *more]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    environment = {**os.environ, "PYTHONPATH": str(Path(ranking.__file__).parent.parent), "HFTL_HOME": str(tmp_path)}
    first = run("--models", *models[:2], f"--output={tmp_path / '1.csv'}")
    assert "2 models ranked on 36 rows" in first.stdout, first.stdout + first.stderr
    second = run("--models", *models, f"--output={tmp_path / '2.csv'}")
    assert f"ranked before, from the same files and versions: {', '.join(models[:2])}\n" in second.stdout
    assert "1 models ranked on 36 rows" in second.stdout
    third = run("--models", *models, models[0], "--by=probe", f"--output={tmp_path / '3.csv'}")
    assert f"ranked before, from the same files and versions: {', '.join(models)}\n" in third.stdout
    assert third.stdout.splitlines()[-1] == "IMPORTED"
    tables = [list(csv.DictReader((tmp_path / f"{number}.csv").open())) for number in (1, 2, 3)]
    by_model = [{row.pop("model"): row for row in rows if row.pop("rank")} for rows in tables]
    assert by_model[1] == by_model[2]
    assert by_model[0] == {model: by_model[1][model] for model in models[:2]}
    refused = run("--models", *models, "--by=leep")
    assert refused.returncode == 2
    assert "--by leep: " in refused.stderr


CHANGES = ["content", "name", "empty class", "model", "flag", "precision", "threads", "package", "code", "cores"]
CHANGES += ["accelerator", "swap"]


@pytest.mark.parametrize("change", CHANGES)
def test_an_answer_is_found_anew_when_anything_has_changed(
    change: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, dataset = tmp_path / "vit", tmp_path / "size=32"
    shutil.copytree(images / "vit", model)
    shutil.copytree(images / "data", dataset)
    flags = ["--dataset", str(dataset)]
    files = sorted((dataset / "train").rglob("*.png"))

    shutil.copytree(Path(ranked.__file__).parent, tmp_path / "hftl")
    monkeypatch.setattr(ranked, "__file__", str(tmp_path / "hftl" / "ranked.py"))

    def identity() -> str:
        return ranked.identify("image-classification", [f"{model}@32"], flags)[f"{model}@32"]

    before = identity()
    assert identity() == before
    if change == "content":  # of the same size, with the time of its last change set back
        status, content = files[0].stat(), files[0].read_bytes()
        files[0].write_bytes(content[::-1])
        os.utime(files[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "name":
        files[0].rename(files[0].with_name("other.png"))
    elif change == "empty class":
        (dataset / "train" / "fourth").mkdir()
    elif change == "model":
        (model / "config.json").write_text((model / "config.json").read_text() + " ")
    elif change == "flag":
        flags.append("--seed=1")
    elif change == "precision":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    elif change == "threads":
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
    elif change == "package":
        (tmp_path / "transformers-9.9.dist-info").mkdir()
        monkeypatch.syspath_prepend(tmp_path)
    elif change == "code":
        code = tmp_path / "hftl" / "data.py"
        code.write_text(code.read_text() + "\n")
    elif change == "cores":
        monkeypatch.setattr(machine, "cores", lambda: 64)
    elif change == "accelerator":
        monkeypatch.setattr(machine, "accelerators", lambda: ["Model: H100"])
    else:
        one, two = files[0].parent, files[-1].parent
        one.rename(tmp_path / "aside")
        two.rename(one)
        (tmp_path / "aside").rename(two)
    assert identity() != before


RESTS = ["model of torchvision", "hub data", "table", "table within", "link", "text model", "flags", "code", "loss"]


@pytest.mark.parametrize("rests", RESTS)
def test_no_answer_is_kept_that_rests_on_more_than_files_that_flags_name(
    rests: str, images: Path, tmp_path: Path
) -> None:
    model, dataset, more = str(images / "vit"), tmp_path / "data", []
    shutil.copytree(images / "data", dataset)
    assert ranked.identify("image-classification", [model, "google/vit"], [f"--dataset={dataset}"]).keys() == {model}
    if rests == "model of torchvision":
        model = "torchvision:resnet18"
    elif rests == "hub data":
        dataset = Path("cifar10")
    elif rests.startswith("table"):
        table = (dataset if rests == "table within" else tmp_path) / "train.csv"
        table.write_text(f"image,label\n{images},green\n")
        dataset = dataset if rests == "table within" else table
    elif rests == "link":
        one = next((dataset / "train").iterdir())
        one.rename(tmp_path / "aside")
        one.symlink_to(tmp_path / "aside")
    elif rests == "text model":
        more = ["--text_model", "google/bert"]
    elif rests == "flags":
        more = ["--config", "flags.yaml"]
    elif rests == "code":
        more = ["--trust-remote-code"]
    else:
        more = ["--loss", "my_loss.py:loss"]
    assert ranked.identify("image-classification", [model], [f"--dataset={dataset}", *more]) == {}


def test_what_rests_on_other_files_is_ranked_each_time(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [path for path in (images / "data" / "train").rglob("*") if path.is_file()]
    table = tmp_path / "table.csv"
    table.write_text("image,label\n" + "".join(f"{path},{path.parent.name}\n" for path in files))
    for _ in range(2):
        rank("--task=image-classification", "--models", images / "vit", f"--dataset={table}")
        printed = capsys.readouterr().out
        assert "1 models ranked on " in printed
        assert "ranked before" not in printed


def test_texts_in_tables_are_known_by_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_text_model(tmp_path / "bert", "bert")
    write_texts(tmp_path / "data", {"train": 24, "validation": 8})
    for again in (False, True):
        rank("--task", "text-classification", "--models", tmp_path / "bert", "--dataset", tmp_path / "data")
        assert ("ranked before" in capsys.readouterr().out) == again


def test_a_damaged_answer_is_said_and_found_anew(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HFTL_HOME", str(tmp_path))
    flags = ["--task=image-classification", "--models", images / "vit", f"--dataset={images / 'data'}"]
    rank(*flags)
    (kept,) = tmp_path.rglob(ranked.ANSWERS)
    content = json.loads(kept.read_text())
    for damage in ("[1", json.dumps({key: {"rank": 1} for key in content}), json.dumps(dict.fromkeys(content, "x"))):
        kept.write_text(damage)
        capsys.readouterr()
        rank(*flags)
        printed = capsys.readouterr().out
        assert ("is damaged and is made again" in printed) == (damage == "[1")
        assert "1 models ranked on 36 rows" in printed
        assert list(json.loads(kept.read_text())) == list(content)
        rank(*flags)
        assert "ranked before" in capsys.readouterr().out


def test_scores_that_cannot_be_kept_are_said_and_not_lost(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = folder.write_json

    def full(path: Path, content: Any) -> None:
        if path.name in ("scores.json", "speeds.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(folder, "write_json", full)
    monkeypatch.setenv("HFTL_HOME", str(tmp_path))
    (found,) = ranking.rank("image-classification", [str(images / "vit")], [f"--dataset={images / 'data'}"])
    assert found.probe > 1 / 3
    assert capsys.readouterr().out.count("cannot be kept (No space left on device)") == 2


def test_a_model_at_several_sizes_is_read_once_and_changed_by_none(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []
    load = pretrained._load_model
    monkeypatch.setattr(pretrained, "_load_model", lambda *all: read.append(all[1]) or load(*all))
    tokens = [f"--dataset={images / 'data'}"]
    models = [f"{images / 'vit'}@{side}" for side in (40, 56)]
    together = ranking.rank("image-classification", models, tokens)
    assert len(read) == 1
    alone = [ranking.rank("image-classification", [model], tokens)[0] for model in models]
    assert len(read) == 3  # outside of a ranking of several nothing is held
    by_name = {entry.model: entry for entry in together}
    assert [by_name[entry.model].logme for entry in alone] == [entry.logme for entry in alone]
    assert [by_name[entry.model].parameters for entry in alone] == [entry.parameters for entry in alone]


def test_a_recommended_model_that_knows_nothing_of_the_classes_is_no_secret() -> None:
    scores: dict[str, Any] = {"logme": -0.2, "h_score": 0.4, "transrate": 0.1, "leep": None, "nce": None}
    entry = ranked.Candidate(
        1, "tiny", **scores, probe=0.53, parameters=9, features_per_second=1.0, flags=[], rows=100, chance=0.5
    )
    said = "no better than always naming the largest class (0.5000)"
    assert said in ranked.recommendation([entry], "logme", "text-classification", [])
    better = dataclasses.replace(entry, probe=0.7)
    assert said not in ranked.recommendation([better], "logme", "text-classification", [])


@pytest.mark.parametrize(
    ("by", "score", "told"), [("h_score", 1.0, True), ("h_score", 0.999, False), ("logme", 1.0, False)]
)
def test_an_h_score_that_tells_nothing_is_said(by: str, score: float, told: bool) -> None:
    scores: dict[str, Any] = {"logme": -0.2, "h_score": score, "transrate": 0.1, "leep": None, "nce": None}
    entry = ranked.Candidate(
        1, "tiny", **scores, probe=0.9, parameters=9, features_per_second=1.0, flags=[], rows=8, chance=0.5
    )
    assert ("features outnumber the rows" in ranked.recommendation([entry], by, "text-classification", [])) == told


def test_features_that_outnumber_the_rows(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rank("--models", images / "vit@40", "--dataset", images / "data", "--by", "h_score", "--max_train_samples", "8")
    assert "features outnumber the rows" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "gpt2"])
def test_text_models_whatever_their_head(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_text_model(tmp_path / kind, kind)
    write_texts(tmp_path / "data", {"train": 24, "validation": 8, "test": 8})
    rank("--task", "text-classification", "--models", tmp_path / kind, "--dataset", tmp_path / "data")
    printed = capsys.readouterr().out
    assert "recommended: " in printed
    assert "24 examples" in printed


def test_what_enters_a_head_of_several_layers_is_the_mean_of_the_real_tokens(tmp_path: Path) -> None:
    write_tiny_text_model(tmp_path / "roberta", "roberta")
    write_texts(tmp_path / "data", {"train": 24, "validation": 8})
    from hftl.tasks.text_classification import TextClassification

    flags = [f"--model={tmp_path / 'roberta'}", f"--dataset={tmp_path / 'data'}", "--feature_cache_dtype=float32"]
    task = TextClassification(ranking.parse(TextClassification.arguments_class, flags))
    splits = ranking.load_rows(task.arguments, task.modality)
    found = ranking.features_of(task, splits)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "roberta").eval()
    for row in range(3):
        inputs = task.processor(splits.train[row]["text"], return_tensors="pt")
        with torch.no_grad():
            tokens = plain.roberta(**inputs).last_hidden_state[0]
        assert np.allclose(found.features[row], tokens.mean(dim=0).numpy(), atol=1e-5)


def test_help_names_the_command_and_imports_no_torch() -> None:
    code = "import sys; from hftl import cli; cli.main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "hftl rank --models A B C" in done.stdout
    assert done.stdout.split()[-1] == "False"


def test_the_command_that_is_recommended_ends_with_the_model() -> None:
    """Of a flag that stands twice the last one holds."""
    scores: dict[str, Any] = {"logme": -0.2, "h_score": 0.4, "transrate": 0.1, "leep": None, "nce": None}
    flags = ["--model=tiny", "--image_size=32"]
    entry = ranked.Candidate(
        1, "tiny@32", **scores, probe=0.9, parameters=9, features_per_second=1.0, flags=flags, rows=100, chance=0.5
    )
    said = ranked.recommendation([entry], "logme", "image-classification", ["--dataset=pets", "--image_size=64"])
    assert "hftl train image-classification --dataset=pets --image_size=64 --model=tiny --image_size=32," in said


def test_two_rows_of_a_class_are_enough_to_check_labels(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "few", {"train": 2})
    cli._run(["check-labels", "image-classification", f"--model={images / 'vit'}", f"--dataset={tmp_path / 'few'}"])
    assert "of 6 rows" in capsys.readouterr().out
