"""A finished run: what is in its folder, what plain libraries make of it, and what can be done with it."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small_data
import tiny_models
import torch
import transformers
import yaml
from forked import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, modeling_utils, pipeline

import hftl
from hftl import cli
from hftl.folder import check_output_folder, check_space, default_output_dir, promote, resume_settings
from hftl.inert import public_name
from hftl.pretrained import save_model
from hftl.tasks.text_classification import TextClassification


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    small_data.write_images(folder / "images", {"train": 6, "val": 3, "test": 3})
    small_data.write_texts(folder / "texts", {"train": 24, "dev": 8, "test": 8})
    tiny_models.write_timm_folder(folder / "convnet", "tf_efficientnet_lite0")
    tiny_models.write_tiny_text_model(folder / "bert", kind="bert")
    return folder


@pytest.fixture(scope="module")
def image_run(place: Path) -> hftl.Run:
    return hftl.finetune(
        "image-classification",
        model=place / "convnet",
        dataset=place / "images",
        method="full",
        horizontal_flip=False,
        num_train_epochs=1,
        output_dir=place / "image",
    )


@pytest.fixture(scope="module")
def lora_run(place: Path) -> hftl.Run:
    return hftl.finetune(
        task="text-classification",
        model=place / "bert",
        dataset=place / "texts",
        method="lora",
        lora_r=4,
        num_train_epochs=2,
        learning_rate=1e-2,
        output_dir=place / "lora",
    )


def pictures(place: Path) -> list[Path]:
    return sorted((place / "images" / "test").glob("*/*.png"))


def test_folder_is_whole(place: Path, image_run: hftl.Run) -> None:
    names = {path.name for path in image_run.folder.iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "README.md",
        "recipe.yaml",
        "metrics.json",
        "predictions.csv",
        "report.html",
        "logs",
    }
    metrics = json.loads((image_run.folder / "metrics.json").read_text())
    assert set(metrics["validation"]) == set(metrics["test"])  # scores, and nothing of the training beside them
    wanted = {"seconds", "samples_per_second", "peak_memory_mb", "trainable_parameters", "total_parameters"}
    assert wanted <= metrics["train"].keys()
    assert {"accuracy", "f1_macro", "loss"} <= metrics["validation"].keys() & metrics["test"].keys()
    with (image_run.folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    assert rows[0].keys() == {"id", "label", "prediction", *(f"probability_{name}" for name in small_data.COLOURS)}
    accuracy = np.mean([row["label"] == row["prediction"] for row in rows])
    assert accuracy == pytest.approx(metrics["test"]["accuracy"])
    assert list((image_run.folder / "logs").glob("events.out.tfevents*"))


def test_the_default_folder_has_a_name(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    for dataset, name in ((".", place.name), ("../", place.parent.name), ("a/b.csv", "b")):
        arguments = hftl.parse(hftl.ImageArguments, ["--model=some/model", f"--dataset={dataset}"])
        assert default_output_dir(arguments) == f"runs/{name}-model-lp_ft"


def test_a_task_of_ones_own_is_loaded_in_python(image_run: hftl.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"(try: hftl predict {image_run.folder} INPUT)" in image_run.summary()
    monkeypatch.setattr(image_run.task, "name", "even-light")
    assert f"(try: hftl.load_run('{image_run.folder}', ImageClassification).predict(…))" in image_run.summary()


def test_plain_transformers_and_timm_agree(place: Path, image_run: hftl.Run) -> None:
    import timm
    from timm.data import create_transform, resolve_data_config

    classify = pipeline("image-classification", str(image_run.folder))
    network = timm.create_model(f"local-dir:{image_run.folder}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config({}, model=network))
    mine = image_run.predict([str(path) for path in pictures(place)])
    for path, prediction in zip(pictures(place), mine, strict=True):
        theirs = {entry["label"]: entry["score"] for entry in classify(str(path))}
        assert prediction.probabilities == pytest.approx(theirs, abs=1e-4)
        with torch.inference_mode():
            timms = network(transform(Image.open(path).convert("RGB"))[None]).softmax(-1)[0]
        assert list(prediction.probabilities.values()) == pytest.approx(timms.tolist(), abs=1e-4)


def test_adapter_and_merged_model_agree(place: Path, lora_run: hftl.Run) -> None:
    from peft import PeftModel

    torch.manual_seed(1)
    base = AutoModelForSequenceClassification.from_pretrained(place / "bert", num_labels=2)
    adapted = PeftModel.from_pretrained(base, lora_run.folder / "adapter").eval()
    texts = ["the film was good", "a long bad day with some people"]
    encoded = lora_run.task.processor(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = adapted(**encoded).logits.softmax(-1)
    assert json.loads((lora_run.folder / "adapter" / "config.json").read_text())["id2label"] == {
        "0": "bad",
        "1": "good",
    }
    mine = lora_run.predict(texts)
    assert [list(entry.probabilities.values()) for entry in mine] == [
        pytest.approx(row, abs=1e-4) for row in expected.tolist()
    ]
    theirs = pipeline("text-classification", str(lora_run.folder), top_k=None)(texts)
    for prediction, entries in zip(mine, theirs, strict=True):
        assert prediction.probabilities == pytest.approx(
            {entry["label"]: entry["score"] for entry in entries}, abs=1e-4
        )


def test_predict_takes_paths_folders_pictures_and_arrays(place: Path, image_run: hftl.Run) -> None:
    paths = pictures(place)
    from_paths = image_run.predict(paths)
    from_folder = image_run.predict(place / "images" / "test")
    from_pictures = image_run.predict([Image.open(path) for path in paths], batch_size=2)
    from_arrays = image_run.predict([np.asarray(Image.open(path)) for path in paths])
    expected = [entry.probability for entry in from_paths]
    for other in (from_folder, from_pictures, from_arrays):
        assert [entry.probability for entry in other] == pytest.approx(expected, abs=1e-5)
    assert image_run.predict([]) == []


def test_evaluate_gives_the_metrics_of_training(place: Path, image_run: hftl.Run, lora_run: hftl.Run) -> None:
    for run, data in ((hftl.load_run(image_run.folder), "images"), (hftl.load_run(lora_run.folder), "texts")):
        for split, name in (("test", "test"), ("validation", "val" if data == "images" else "dev")):
            scores = run.evaluate(str(place / data), split=name)
            assert scores["accuracy"] == pytest.approx(run.metrics[split]["accuracy"])
            assert scores["log_loss"] == pytest.approx(run.metrics[split]["log_loss"], rel=1e-4)


def test_predict_command_writes_a_table(place: Path, lora_run: hftl.Run, capsys: pytest.CaptureFixture[str]) -> None:
    output = place / "out.csv"
    cli._run(["predict", str(lora_run.folder), str(place / "texts" / "test.csv"), "--output", str(output)])
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert {row["prediction"] for row in rows} <= {"bad", "good"}
    capsys.readouterr()
    cli._run(["predict", str(lora_run.folder), "the film was good"])
    assert capsys.readouterr().out.splitlines()[0] == "id,prediction,probability_bad,probability_good"
    cli._run(["evaluate", str(lora_run.folder), "--dataset", str(place / "texts")])
    assert f"{lora_run.metrics['test']['accuracy']:.4f}" in capsys.readouterr().out


def test_recipe_file_repeats_the_run(place: Path, lora_run: hftl.Run) -> None:
    cli._run(["train", "--config", str(lora_run.folder / "recipe.yaml"), "--output_dir", str(place / "again")])
    first, second = (load_file(place / name / "model.safetensors") for name in ("lora", "again"))
    assert [name for name in first if not first[name].equal(second[name])] == []
    assert (place / "again" / "recipe.yaml").read_text() == (lora_run.folder / "recipe.yaml").read_text()


def test_card_has_what_the_hub_reads(image_run: hftl.Run) -> None:
    from huggingface_hub import ModelCard

    found = ModelCard.load(image_run.folder / "README.md")
    assert found.data.pipeline_tag == "image-classification"
    assert found.data.eval_results[0].metric_value == pytest.approx(image_run.metrics["test"]["accuracy"], abs=1e-4)
    assert str(image_run.folder.parent) not in found.content
    assert "Accuracy on 9 rows of test: with 95 % confidence between" in found.content
    assert "Fewer than 20 training rows: blue, green, red." in found.content
    stage = image_run.metrics["train"]["stages"][0]
    assert f"{stage['steps']} steps of 32 rows, rate {stage['learning_rate']:.2g}" in found.content


def test_names_have_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    names = {
        ".": tmp_path.name,
        "data/": "data",
        "../gone": "../gone",
        f"{tmp_path}/gone/x": "x",
        "~/m": "m",
        "a/b": "a/b",
    }
    assert {name: public_name(name) for name in names} == names


def test_ls_cp_version_help(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli._run(["ls"])
    assert "image_classification" in capsys.readouterr().out
    cli._run(["cp", "image_classification", str(tmp_path / "my.py")])
    assert "def main" in (tmp_path / "my.py").read_text()
    cli._run(["cp", "configs/text_classification_lora.yaml", str(tmp_path)])
    assert (tmp_path / "text_classification_lora.yaml").is_file()
    capsys.readouterr()
    cli._run(["--version"])
    assert capsys.readouterr().out == f"hftl {hftl.__version__}\n"


@pytest.mark.slow
@pytest.mark.parametrize(("task", "model"), [("image-classification", "convnet"), ("text-classification", "bert")])
def test_a_run_says_little_and_warns_of_nothing(place: Path, tmp_path: Path, task: str, model: str) -> None:
    """Of a process that begins from nothing: libraries warn when they are imported, too."""
    data = "images" if model == "convnet" else "texts"
    command = [sys.executable, "-m", "hftl", "train", task, f"--model={place / model}", f"--dataset={place / data}"]
    command += [f"--output_dir={tmp_path / 'run'}", "--num_train_epochs=1", "--method=full"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    before = done.stdout[: done.stdout.index("epoch 1")].splitlines()
    assert len(before) <= 15


def test_help_imports_no_torch() -> None:
    check = "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    code = f"import sys\nfrom hftl.cli import _run\n_run(['--help'])\n{check}"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=30)


def test_bad_images_are_left_out_on_request(place: Path, image_run: hftl.Run, capsys: Any) -> None:
    folder = place / "some-bad"
    shutil.copytree(place / "images" / "test" / "red", folder)
    (folder / "torn.png").write_bytes((folder / "0.png").read_bytes()[:200])
    with pytest.raises(hftl.UsageError, match=r"torn\.png"):
        image_run.predict(folder)
    cli._run(["predict", str(image_run.folder), str(folder), "--skip_bad_files"])
    assert len(capsys.readouterr().out.splitlines()) == 1 + 3


def test_run_trained_elsewhere_is_loaded(place: Path, lora_run: hftl.Run) -> None:
    """How it was trained (half precision on a GPU, several processes) may not be possible here."""
    folder = place / "elsewhere"
    shutil.copytree(lora_run.folder, folder)
    with (folder / "recipe.yaml").open("a") as file:
        file.write("fp16: true\ntf32: true\nfsdp: full_shard\n")
    assert hftl.load_run(folder).predict("the film was good")[0].label in ("bad", "good")


def test_columns_of_another_table(place: Path, image_run: hftl.Run, lora_run: hftl.Run, capsys: Any) -> None:
    table = place / "other.csv"
    table.write_text("number,remark,verdict\n1,the film was good,good\n2,a bad day,bad\n")
    with pytest.raises(hftl.UsageError, match="--text_column"):
        lora_run.predict(table)
    assert len(lora_run.predict(table, text="remark")) == 2
    cli._run(
        ["evaluate", str(lora_run.folder), "--dataset", str(table), "--text_column=remark", "--label_column=verdict"]
    )
    assert "accuracy" in capsys.readouterr().out
    listed = place / "images" / "list.csv"  # the run was trained on class folders
    listed.write_text("file\n" + "\n".join(str(path) for path in pictures(place)))
    assert len(image_run.predict(listed)) == 9
    many = np.stack([np.asarray(Image.open(path)) for path in pictures(place)])
    assert [entry.label for entry in image_run.predict(many)] == [entry.label for entry in image_run.predict(listed)]


def test_pairs_from_a_file(place: Path) -> None:
    table = place / "pairs.csv"
    rows = [f"the film {index},was {word},{word}" for index, word in enumerate(["good", "bad"] * 8)]
    table.write_text("premise,hypothesis,label\n" + "\n".join(rows))
    run = hftl.finetune(
        "text-classification", model=place / "bert", dataset=table, num_train_epochs=1, output_dir=place / "pairs"
    )
    run = hftl.load_run(run.folder)
    from_file = [entry.probability for entry in run.predict(table)]
    in_memory = [entry.probability for entry in run.predict([tuple(row.split(",")[:2]) for row in rows])]
    assert from_file == pytest.approx(in_memory, abs=1e-5)
    as_pipeline = run.predict([{"text": first, "text_pair": second} for first, second, _ in csv.reader(rows)])
    assert [entry.probability for entry in as_pipeline] == pytest.approx(in_memory, abs=1e-5)
    with pytest.raises(hftl.UsageError, match="pairs of texts"):
        run.predict([("the film", 3)])
    with pytest.raises(hftl.UsageError, match="--dataset is a name, a path or a number, and not a list_iterator"):
        hftl.finetune("text-classification", model=place / "bert", dataset=iter(rows))
    single = place / "single.csv"
    single.write_text("text\nthe film\n")
    with pytest.raises(hftl.UsageError, match="pairs of texts"):
        run.predict(single)


def test_a_column_of_no_role_is_refused(place: Path, lora_run: hftl.Run) -> None:
    with pytest.raises(hftl.UsageError, match="'lable' is no role of a column; there are label"):
        lora_run.evaluate(str(place / "texts"), lable="sentiment")


def test_resume_needs_the_same_processes_and_settings(place: Path, lora_run: hftl.Run) -> None:
    folder = place / "interrupted"
    (folder / "checkpoints").mkdir(parents=True)
    arguments = hftl.parse(
        hftl.TextArguments, ["--model=m", "--dataset=d", f"--output_dir={folder}", "--resume", "--seed=0"]
    )
    settings = resume_settings(arguments)
    for change in ({"processes": 2}, {"seed": 42}):
        (folder / "checkpoints" / "recipe.yaml").write_text(yaml.safe_dump({**settings, **change}))
        with pytest.raises(hftl.UsageError, match=next(iter(change))):
            check_output_folder(arguments)
    (folder / "checkpoints" / "recipe.yaml").write_text(yaml.safe_dump(settings))
    check_output_folder(arguments)


def test_sharded_model_is_saved_from_what_was_gathered(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP and DeepSpeed need GPUs; this takes their way from the gathered weights to the run."""
    monkeypatch.setattr(hftl.TransferTrainer, "is_sharded", True)
    common = {"model": place / "bert", "dataset": place / "texts", "num_train_epochs": 1}
    run = hftl.finetune("text-classification", **common, output_dir=place / "sharded")
    assert hftl.load_run(run.folder).evaluate(str(place / "texts"))["accuracy"] == run.metrics["test"]["accuracy"]
    with pytest.raises(hftl.UsageError, match="lora does not work with FSDP"):
        hftl.finetune("text-classification", **common, method="lora", output_dir=place / "sharded-lora")
    assert not (place / "sharded-lora").exists()
    for flags, words in (({"method": "surgical"}, "--method surgical"), ({"penalty": "bss"}, "--penalty")):
        with pytest.raises(hftl.UsageError, match=f"{words} does not work with FSDP"):
            hftl.finetune("text-classification", **common, **flags, output_dir=place / "sharded-other")
        assert not (place / "sharded-other").exists()


@pytest.mark.parametrize("method", ["full", "lora", "lp_ft"])
def test_half_precision_gives_a_run(place: Path, method: str) -> None:
    """Accelerate leaves its autocast around the model; what is saved is compared without it."""
    common = {"dataset": place / "texts", "model": place / "bert", "num_train_epochs": 1, "bf16": True}
    folder = place / f"bf16-{method}"
    run = hftl.finetune("text-classification", **common, method=method, output_dir=folder)
    texts = ["the film was good", "a bad day"]
    fresh = hftl.load_run(folder).predict(texts)
    assert [entry.probability for entry in run.predict(texts)] == pytest.approx(
        [e.probability for e in fresh], abs=1e-5
    )
    assert next(iter(load_file(folder / "model.safetensors").values())).dtype == torch.float32


def test_a_damaged_run_is_said_to_be_one(lora_run: hftl.Run, place: Path, tmp_path: Path) -> None:
    def copied(name: str) -> Path:
        return Path(shutil.copytree(lora_run.folder, tmp_path / name))

    torn = copied("torn")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:5000])
    empty = copied("empty")
    (empty / "model.safetensors").unlink()
    for folder in (torn, empty):
        with pytest.raises(hftl.UsageError, match="is damaged, its model cannot be loaded"):
            hftl.load_run(folder).predict("the film was good")
    silent = copied("silent")
    for path in silent.glob("*token*"):
        path.unlink()
    with pytest.raises(hftl.UsageError, match="has no vocabulary"):
        hftl.load_run(silent)
    (silent / "tokenizer_config.json").unlink(missing_ok=True)
    with pytest.raises(hftl.UsageError, match="has no vocabulary"):
        hftl.finetune("text-classification", model=silent, dataset=place / "texts", output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_single_step_trains(place: Path, lora_run: hftl.Run) -> None:
    """Warm-up must not leave the only step with rate 0."""
    run = hftl.finetune(
        "text-classification",
        model=place / "lora",
        keep_head=True,
        dataset=place / "texts",
        max_steps=1,
        output_dir=place / "one-step",
    )
    before, after = load_file(place / "lora" / "model.safetensors"), load_file(run.folder / "model.safetensors")
    assert sum(not before[name].equal(after[name]) for name in after) > len(after) / 2


def test_the_best_epoch_is_restored(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the scores that validation is made to give, which is neither the first nor the last."""
    forced = iter([0.1, 0.9, 0.2])
    score = TextClassification.score

    def scored(self: Any, *values: Any) -> dict[str, float]:
        scores = score(self, *values)
        return scores | {"accuracy": next(forced, scores["accuracy"])}

    monkeypatch.setattr(TextClassification, "score", scored)
    run = hftl.finetune(
        "text-classification",
        model=place / "bert",
        dataset=place / "texts",
        method="full",
        num_train_epochs=3,
        per_device_train_batch_size=8,
        metric_for_best_model="accuracy",
        keep_checkpoints=True,
        save_total_limit=3,
        output_dir=place / "best",
    )
    final = load_file(run.folder / "model.safetensors")
    epochs = [load_file(run.folder / f"checkpoints/1-all/checkpoint-{step}/model.safetensors") for step in (3, 6, 9)]
    assert [all(final[name].equal(epoch[name]) for name in final) for epoch in epochs] == [False, True, False]
    assert run.metrics["validation"]["accuracy"] == 0.9


def test_a_model_that_is_saved_wrongly_is_not_published(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(model: Any, folder: Path, written: Path) -> None:
        save_model(model, folder, written=written)
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        weights["classifier.bias"][0] += 1
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    folder = place / "spoiled"
    settings = {"model": place / "bert", "dataset": place / "texts", "num_train_epochs": 1, "output_dir": folder}
    with monkeypatch.context() as patch:
        patch.setattr("hftl.saving.save_model", spoiled)
        with pytest.raises(RuntimeError, match="gives other logits than the trained one"):
            hftl.finetune("text-classification", **settings)
    assert {path.name for path in folder.iterdir() if path.name[0] != "."} == {"checkpoints", "logs"}
    trained = load_file(folder / "checkpoints" / "2-all" / "final" / "model.safetensors")
    hftl.finetune("text-classification", **settings, resume=True)
    saved = load_file(folder / "model.safetensors")
    assert [name for name in trained if not trained[name].equal(saved[name])] == []


@pytest.mark.parametrize("case", ["linked", "no links", "kept", "regression", "lora"])
def test_weights_are_written_once(place: Path, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stage's result, which the run names again where it has the same weights and goes with the checkpoints."""
    written: list[str] = []
    write = modeling_utils.safe_save_file

    def counted(tensors: Any, path: Any, *others: Any, **settings: Any) -> None:
        written.append(Path(path).parent.name)
        write(tensors, path, *others, **settings)

    def refused(*_: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(modeling_utils, "safe_save_file", counted)
    if case == "no links":
        monkeypatch.setattr(os, "link", refused)
    kind = {"problem_type": "regression"} if case == "regression" else {}  # whose head is put into the numbers' unit
    if case == "regression":
        (tmp_path / "data").mkdir()
        for split in ("train", "validation"):
            lines = [f"a {word} film,{100 * row + 7}" for row, word in enumerate(["good", "bad", "dull", "fine"] * 3)]
            (tmp_path / "data" / f"{split}.csv").write_text("\n".join(["text,label", *lines]))
    run = hftl.finetune(
        "text-classification",
        model=place / "bert",
        dataset=tmp_path / "data" if kind else place / "texts",
        method="lora" if case == "lora" else "full",
        max_steps=2,
        keep_checkpoints=case == "kept",
        output_dir=tmp_path / "run",
        **kind,
    )
    assert (".partial" in written) == (case != "linked")
    assert written.count("final.partial") == (case != "lora")
    weights = run.folder / "model.safetensors"
    assert weights.stat().st_nlink == 1
    assert AutoModelForSequenceClassification.from_pretrained(run.folder).config.id2label == run.model.config.id2label
    final = run.folder / "checkpoints" / "1-all" / "final" / "model.safetensors"
    assert final.exists() == (case == "kept")


def test_a_run_that_ends_behind_an_interruption_names_its_architecture(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"model": tmp_path / "body", "dataset": place / "texts", "max_steps": 2}
    transformers.BertModel.from_pretrained(place / "bert").save_pretrained(settings["model"])
    AutoTokenizer.from_pretrained(place / "bert").save_pretrained(settings["model"])

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hftl.training.write_run", killed)
        with pytest.raises(KeyboardInterrupt):
            hftl.finetune("text-classification", output_dir=tmp_path / "run", **settings)
    final = tmp_path / "run" / "checkpoints" / "1-all" / "final" / "model.safetensors"
    inode = final.stat().st_ino
    run = hftl.finetune("text-classification", output_dir=tmp_path / "run", resume=True, **settings)
    assert (run.folder / "model.safetensors").stat().st_ino == inode
    assert json.loads((run.folder / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]


def test_untrained_model_is_the_same_each_time(place: Path) -> None:
    weights = []
    for name in ("untrained-1", "untrained-2"):
        common = {"model": "random:bert", "dataset": place / "texts", "max_steps": 2, "output_dir": place / name}
        weights.append(load_file(hftl.finetune("text-classification", **common).folder / "model.safetensors"))
    assert [name for name in weights[0] if not weights[0][name].equal(weights[1][name])] == []


def test_save_follows_evaluation() -> None:
    steps = hftl.parse(hftl.TextArguments, ["--eval_strategy=steps", "--eval_steps=7"])
    assert (steps.save_strategy, steps.save_steps) == ("steps", 7)
    saves = hftl.parse(hftl.TextArguments, ["--save_strategy=steps", "--save_steps=5"])
    assert (saves.eval_strategy, saves.eval_steps) == ("steps", 5)


def test_room_for_checkpoints_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a stopped run has written is room for the run that goes on."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "weights").write_bytes(bytes(600))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=500))
    check_space(tmp_path / "run", 1000)
    with pytest.raises(hftl.UsageError, match="No space"):
        check_space(tmp_path / "run", 1200)


def test_best_metric_that_validation_does_not_give(tmp_path: Path) -> None:
    small_data.write_texts(tmp_path / "texts", {"train": 12})
    (tmp_path / "texts" / "validation.csv").write_text("text,label\na good day,good\nthe good film,good\n")
    flags = {"metric_for_best_model": "roc_auc", "output_dir": tmp_path / "run", "num_train_epochs": 1}
    with pytest.raises(hftl.UsageError, match="roc_auc: validation does not give it"):
        hftl.finetune("text-classification", model="random:bert", dataset=tmp_path / "texts", **flags)
    assert not (tmp_path / "run").exists()


def test_a_run_in_the_place_of_another_keeps_nothing_of_it(tmp_path: Path) -> None:
    """Old weights beside a new adapter, or an old head beside new weights, would be read as if they belonged to it."""
    for name, files in {"old": ("model.safetensors", "probe/head.json"), "new": ("base/model.safetensors",)}.items():
        for file in ("metrics.json", *files):
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(name)
    (tmp_path / "old" / "trials.csv").touch()
    promote(tmp_path / "new", tmp_path / "old")
    found = {str(path.relative_to(tmp_path / "old")) for path in (tmp_path / "old").rglob("*") if path.is_file()}
    assert found == {"metrics.json", "base/model.safetensors", "trials.csv"}
    assert (tmp_path / "old" / "metrics.json").read_text() == "new"


def test_a_thread_that_is_not_the_first_may_train(place: Path, tmp_path: Path) -> None:
    """Python tells signals to the main thread alone."""
    with ThreadPoolExecutor(1) as pool:
        settings = {"model": str(place / "bert"), "dataset": str(place / "texts"), "num_train_epochs": 1}
        run = pool.submit(hftl.finetune, "text-classification", output_dir=str(tmp_path / "run"), **settings).result()
    assert run.metrics["train"]["seconds"] > 0
