"""What changes the rows of training, or their weight: mixing, augmentation, the sampler, losses; never evaluation."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_data
import tiny_models
import torch
from safetensors.torch import load_file

import hftl
from hftl import cli
from hftl.mixing import MixedImages
from hftl.trainer import EpochSampler

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFTL_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small_data.write_both(tmp_path_factory.mktemp("data-side"))
    tiny_models.write_tiny_cnn(folder / "cnn")
    tiny_models.write_tiny_text_model(folder / "bert", kind="bert")
    return folder


def train(place: Path, model: str, run: Path, *flags: str) -> hftl.Run:
    task = "text" if model == "bert" else "image"
    common = [f"--dataset={place / f'{task}s'}", f"--model={place / model}", f"--output_dir={run}", "--overwrite"]
    common += ["--logging_steps=1", "--per_device_train_batch_size=8", "--report_to=none", "--precision=fp32"]
    return cli.run_recipe(ROOT / "recipes" / f"{task}_classification.py", [*common, *flags])


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "logs" / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


# --- mixing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_labels_are_mixed_as_the_pictures_are(flags: dict[str, float]) -> None:
    """Pictures that are all of one value, their class: what a picture has of each value is its label."""
    mixing = MixedImages(4, flags.get("mixup"), flags.get("cutmix"))
    labels = torch.tensor([0, 1, 2, 3, 1])
    pixels = torch.eye(4)[labels][:, :3, None, None].expand(5, 3, 12, 12).contiguous(memory_format=torch.channels_last)
    kinds = set()
    for seed in range(20):
        torch.manual_seed(seed)
        batch = mixing({"pixel_values": pixels, "labels": labels})
        torch.testing.assert_close(batch["labels"].sum(dim=1), torch.ones(5))
        torch.testing.assert_close(batch["pixel_values"].mean(dim=(2, 3)), batch["labels"][:, :3])
        assert batch["pixel_values"].is_contiguous(memory_format=torch.channels_last)
        values = batch["pixel_values"].unique()
        kinds.add("cutmix" if set(values.tolist()) <= {0.0, 1.0} else "mixup")
    assert labels.tolist() == [0, 1, 2, 3, 1]
    assert "mixup" not in kinds if "mixup" not in flags else "mixup" in kinds
    assert len(kinds) == len(flags) or flags == {"mixup": 0.4}  # a weight of 0 or 1 looks like cutmix


def test_mixing_changes_training_alone(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = train(place, "cnn", tmp_path / "plain", "--max_steps=1", "--learning_rate=1e-12")
    mixed = train(place, "cnn", tmp_path / "mixed", "--max_steps=1", "--learning_rate=1e-12", "--mixup=1")
    assert losses(tmp_path / "mixed") != losses(tmp_path / "plain")
    # at a rate of nothing both are the same model
    assert mixed.metrics["test"]["loss"] == pytest.approx(plain.metrics["test"]["loss"], rel=1e-5)


@pytest.mark.parametrize("loss", ["cross_entropy", "focal", "logit_adjusted"])
def test_mixed_batches_train_with_every_loss(place: Path, tmp_path: Path, loss: str) -> None:
    flags = ["--cutmix=1", "--mixup=0.2", f"--loss={loss}", "--num_train_epochs=1"]
    run = train(place, "cnn", tmp_path / "run", *flags)
    assert np.isfinite(losses(tmp_path / "run")).all()
    reloaded = hftl.load_run(tmp_path / "run")
    assert reloaded.metrics == run.metrics
    again = cli.run_recipe(
        ROOT / "recipes" / "image_classification.py",
        [f"--config={tmp_path / 'run' / 'recipe.yaml'}", f"--output_dir={tmp_path / 'again'}"],
    )
    assert again.metrics["test"] == run.metrics["test"]
    assert [k for k, v in weights(tmp_path / "run").items() if not v.equal(weights(tmp_path / "again")[k])] == []


def test_mixing_needs_the_pictures(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(place, "cnn", tmp_path / "run", "--method=frozen", "--mixup=0.2", "--num_train_epochs=1")
    output = capsys.readouterr().out
    assert "features: not kept, since the rows of a batch are mixed anew in every step" in output
    with pytest.raises(hftl.UsageError, match="mixed anew"):
        train(place, "cnn", tmp_path / "run", "--method=frozen", "--mixup=0.2", "--feature_cache=on")


# --- the sampler -----------------------------------------------------------------------------------------------------

COUNTS = {0: 70, 1: 20, 2: 3}


@pytest.mark.parametrize("lengths", [None, list(range(93))])
def test_balanced_epochs(lengths: list[int] | None) -> None:
    labels = [label for label, count in COUNTS.items() for _ in range(count)]
    sampler = EpochSampler(len(labels), seed=1, lengths=lengths, batch_size=8, labels=labels)
    epochs = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert order == list(sampler)  # a function of seed and epoch
        assert len(order) == len(sampler) == 93
        assert Counter(labels[row] for row in order) == {0: 31, 1: 31, 2: 31}
        times = Counter(order)
        assert {times[row] for row in range(70)} == {0, 1}  # no frequent row twice
        assert {times[row] for row in range(70, 90)} == {1, 2}
        assert {times[row] for row in range(90, 93)} == {10, 11}
        epochs.append(order)
    assert len({tuple(order) for order in epochs}) == 4
    seen = {row for order in epochs for row in order}
    assert len(seen) > 80  # other frequent rows each time


def test_more_classes_than_rows() -> None:
    order = list(EpochSampler(3, seed=0, labels=[0, 5, 9]))
    assert sorted(order) == [0, 1, 2]


@pytest.mark.parametrize("model", ["cnn", "bert"])
def test_balanced_training_keeps_features(
    place: Path, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(place, model, tmp_path / "run", "--method=frozen", "--sampler=balanced", "--num_train_epochs=2")
    output = capsys.readouterr().out
    assert "the frozen part runs once" in output
    assert "trained by SGD, as --sampler balanced asks" in output
    assert run.metrics["train"]["stages"][0]["steps"] > 0


# --- losses in a run -------------------------------------------------------------------------------------------------


def test_a_loss_of_ones_own(place: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def twice(outputs, labels, num_items_in_batch=None):\n"
        "    total = 2 * torch.nn.functional.cross_entropy(outputs['logits'], labels, reduction='sum')\n"
        "    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)\n"
    )
    flags = ["--max_steps=1", "--learning_rate=1e-12"]
    plain = train(place, "bert", tmp_path / "plain", *flags)
    mine = train(place, "bert", tmp_path / "mine", *flags, f"--loss={tmp_path / 'mine.py'}:twice")
    assert losses(tmp_path / "mine")[0] == pytest.approx(2 * losses(tmp_path / "plain")[0], rel=1e-5)
    assert mine.metrics["test"]["loss"] == pytest.approx(2 * plain.metrics["test"]["loss"], rel=1e-4)


@pytest.mark.parametrize(("loss", "solved"), [("logit_adjusted", True), ("focal", False)])
def test_what_is_convex_is_solved(
    place: Path, tmp_path: Path, loss: str, solved: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(place, "bert", tmp_path / "run", "--method=frozen", f"--loss={loss}")
    output = capsys.readouterr().out
    assert ("solved on the features" in output) is solved
    assert ("penalty" in run.metrics["train"]["stages"][0]) is solved
    assert (f"trained by SGD, as --loss {loss} asks" in output) is not solved


def test_the_logit_adjusted_loss_lifts_rare_classes(tmp_path: Path, place: Path) -> None:
    rows = ["text,label", *(f"the film was day {row},{'bad' if row % 8 else 'good'}" for row in range(64))]
    (tmp_path / "rare.csv").write_text("\n".join(rows) + "\n")
    shares: Any = {}
    for loss in ("cross_entropy", "logit_adjusted"):
        flags = [f"--dataset={tmp_path / 'rare.csv'}", f"--loss={loss}", "--method=frozen"]
        run = train(place, "bert", tmp_path / loss, *flags)
        shares[loss] = run.predict("the film was day")[0].probabilities["good"]
    assert shares["cross_entropy"] < 0.25 < 0.35 < shares["logit_adjusted"] < 0.65


# --- augmentation ----------------------------------------------------------------------------------------------------


def image_task(place: Path, *flags: str) -> tuple[Any, Any]:
    argv = [f"--model={place / 'cnn'}", f"--dataset={place / 'images'}", "--output_dir=unused", *flags]
    task = hftl.ImageClassification(hftl.parse(hftl.ImageArguments, argv))
    splits = task.load_splits()
    task.build_model(splits)
    return task, splits


@pytest.mark.parametrize(
    ("flags", "erased"), [([], 0.0), (["--random_erasing=0.6"], 0.6), (["--augmentation=strong"], 0.25)]
)
def test_a_part_of_the_images_is_erased(place: Path, flags: list[str], erased: float) -> None:
    from torchvision.transforms import v2

    task, splits = image_task(place, *flags)
    steps = task.dataset(splits.train, training=True).transform.transforms
    assert [step.p for step in steps if isinstance(step, v2.RandomErasing)] == ([erased] if erased else [])
    assert not any(isinstance(step, v2.RandomErasing) for step in task_steps(task.dataset(splits.train, False)))


def task_steps(dataset: Any) -> list[Any]:
    return list(getattr(dataset.transform, "transforms", []))


def test_trivial_augment_is_a_function_of_seed_epoch_and_row(place: Path) -> None:
    task, splits = image_task(place, "--augmentation=trivial", "--random_erasing=0.5")
    one, other = (task.dataset(splits.train, training=True) for _ in range(2))
    light, _ = image_task(place)
    plain = light.dataset(splits.train, training=True)
    for row in (0, 5):
        assert one[row]["pixel_values"].equal(other[row]["pixel_values"])
        assert one[row]["pixel_values"].shape == plain[row]["pixel_values"].shape
    assert any(not one[row]["pixel_values"].equal(plain[row]["pixel_values"]) for row in range(8))
    first = one[0]["pixel_values"]
    one.set_epoch(1)
    assert not one[0]["pixel_values"].equal(first)


def test_erasing_needs_the_pictures_unless_views_are_kept(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--method=frozen", "--random_erasing=0.5", "--num_train_epochs=1"]
    train(place, "cnn", tmp_path / "run", *flags)
    assert "features: not kept, since --random_erasing changes the images every epoch" in capsys.readouterr().out
    train(place, "cnn", tmp_path / "run", *flags, "--feature_views=2")
    assert "the frozen part runs once" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["full", "frozen", "partial"])
def test_mirror_images_are_scored_and_predicted(
    place: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (
        [f"--method={method}", "--learning_rate=1e-4", "--max_steps=3"] if method != "frozen" else ["--method=frozen"]
    )
    plain = train(place, "cnn", tmp_path / "plain", *flags)
    flipped = train(place, "cnn", tmp_path / "flipped", *flags, "--test_time_flip")
    assert ("the frozen part runs once" in capsys.readouterr().out) is (method != "full")  # nothing changes each epoch
    one, other = (weights(tmp_path / name) for name in ("plain", "flipped"))
    assert [name for name in one if not one[name].equal(other[name])] == []
    assert "plain transformers takes it alone" in (tmp_path / "flipped" / "README.md").read_text()
    run = hftl.load_run(tmp_path / "flipped")
    rows = run.task.read_inputs(str(place / "images" / "test"))
    pixels = torch.stack([run.task.dataset(rows, training=False)[row]["pixel_values"] for row in range(len(rows))])
    with torch.inference_mode():
        expected = (run.model(pixel_values=pixels).logits + run.model(pixel_values=pixels.flip(-1)).logits) / 2
    np.testing.assert_allclose(run.logits(rows), expected.numpy(), rtol=1e-3, atol=1e-4)
    assert not np.allclose(hftl.load_run(tmp_path / "plain").logits(rows), expected.numpy(), rtol=1e-3, atol=1e-4)
    for split, name in (("validation", "val"), ("test", "test")):
        scores = run.evaluate(str(place / "images"), split=name)
        assert scores["accuracy"] == flipped.metrics[split]["accuracy"]
        assert flipped.metrics[split]["loss"] != plain.metrics[split]["loss"]


# --- words -----------------------------------------------------------------------------------------------------------


def test_words_are_masked_anew_in_each_epoch(place: Path) -> None:
    argv = [f"--model={place / 'bert'}", f"--dataset={place / 'texts'}", "--output_dir=unused", "--word_dropout=0.3"]
    task = hftl.TextClassification(hftl.parse(hftl.TextArguments, argv))
    splits = task.load_splits()
    task.build_model(splits)
    training, whole = task.dataset(splits.train, training=True), task.dataset(splits.train, training=False)
    mask, special = task.processor.mask_token_id, set(task.processor.all_special_ids)
    masked = total = 0
    for row in range(len(whole)):
        before, now = whole[row]["input_ids"], training[row]["input_ids"]
        assert now == training[row]["input_ids"]
        for old, new in zip(before, now, strict=True):
            assert new == old or (new == mask and old not in special)
        masked += sum(new != old for old, new in zip(before, now, strict=True))
        total += sum(old not in special for old in before)
        assert {key: value for key, value in training[row].items() if key != "input_ids"} == {
            key: value for key, value in whole[row].items() if key != "input_ids"
        }
    assert 0.2 < masked / total < 0.4
    first = [training[row]["input_ids"] for row in range(len(whole))]
    training.set_epoch(1)
    assert [training[row]["input_ids"] for row in range(len(whole))] != first
    again = task.dataset(splits.train, training=True)
    assert [again[row]["input_ids"] for row in range(len(whole))] == first


def test_masked_words_need_the_texts(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(place, "bert", tmp_path / "run", "--method=frozen", "--word_dropout=0.2", "--num_train_epochs=1")
    output = capsys.readouterr().out
    assert "features: not kept, since --word_dropout changes the texts every epoch" in output
