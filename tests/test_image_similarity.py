"""Which images are alike: learned, saved, searched by."""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_data
import tiny_models
import torch
from PIL import Image
from refusal import refused
from scipy.spatial.distance import cdist
from tiny_training import every_tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification

import hftl
from hftl import cli, data
from hftl.errors import UsageError
from hftl.finished import find_run
from hftl.losses import ContrastiveLoss
from hftl.metrics import normalised, similarity_metrics
from hftl.modality import IMAGE
from hftl.probes import discriminant
from hftl.probes.discriminant import solve_discriminant
from hftl.problems import Similarity
from hftl.report import render_report
from hftl.trainer import EpochSampler

QUICK = ["--report_to=none", "--precision=fp32", "--per_device_train_batch_size=8", "--dataloader_num_workers=0"]


def write_hues(folder: Path, splits: dict[str, tuple[list[int], int]]) -> Path:
    """Class folders of noisy squares of one hue each: for each split which classes, and how many of each."""
    random = np.random.default_rng(0)
    for split, (classes, count) in splits.items():
        for number in classes:
            place = folder / split / f"hue {number}"
            place.mkdir(parents=True)
            colour = Image.new("HSV", (1, 1), (number * 32, 200, 200)).convert("RGB").getpixel((0, 0))
            for index in range(count):
                own = random.normal(colour, 25)  # so that some are nearer to another class
                pixels = random.normal(own, 30, (32, 32, 3)).clip(0, 255).astype("uint8")
                Image.fromarray(pixels).save(place / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("likeness")
    write_hues(folder / "hues", {"train": ([0, 2, 3, 5, 6], 6), "test": ([1, 4, 7], 5)})
    torch.manual_seed(0)
    tiny_models.write_tiny_cnn(folder / "resnet", zero_init_last=False)
    return folder


def train(place: Path, output: Path, *flags: str) -> hftl.Run:
    words = [f"--model={place / 'resnet'}", f"--dataset={place / 'hues'}", "--embedding_size=8", *QUICK, *flags]
    cli._run(["train", "image-similarity", *words, f"--output_dir={output}"])
    return hftl.load_run(output)


@pytest.fixture(scope="module")
def run(place: Path, tmp_path_factory: pytest.TempPathFactory) -> hftl.Run:
    return train(place, tmp_path_factory.mktemp("run") / "run", "--method=frozen")


def vectors_of(run: hftl.Run) -> tuple[list[str], list[str], np.ndarray[Any, Any]]:
    with (run.folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    vectors = np.array([json.loads(row["embedding"]) for row in rows])
    return [row["id"] for row in rows], [row["label"] for row in rows], vectors


def slow_scores(vectors: np.ndarray[Any, Any], labels: list[Any]) -> dict[str, float]:
    """Row by row, as the scores are defined."""
    first, precise = {1: [], 5: [], 10: []}, []
    for row, label in enumerate(labels):
        others = [other for other in range(len(labels)) if other != row]
        count = sum(labels[other] == label for other in others)
        if not count:
            continue
        cosines = {other: vectors[row] @ vectors[other] for other in others}
        order = sorted(others, key=lambda other: -cosines[other])
        right = [labels[other] == label for other in order]
        for size, hits in first.items():
            hits.append(any(right[:size]))
        precise.append(sum(sum(right[: place + 1]) / (place + 1) for place in range(count) if right[place]) / count)
    return {"map_at_r": np.mean(precise), **{f"recall_at_{size}": np.mean(hits) for size, hits in first.items()}}


def test_scores_are_as_defined() -> None:
    random = np.random.default_rng(0)
    vectors, labels = random.normal(size=(40, 6)), random.integers(0, 7, 40)
    labels[0] = 99  # is searched through, and no query
    expected = slow_scores(normalised(vectors), labels.tolist())
    for piece in (50, 10**6):
        found = similarity_metrics(vectors * random.uniform(0.1, 9, (40, 1)), labels, piece)
        assert found.pop("queries") == sum((labels == label).sum() > 1 for label in labels)
        assert found == pytest.approx(expected)


def test_a_solved_projection_finds_classes_that_it_has_not_seen(place: Path, run: hftl.Run) -> None:
    assert run.metrics["test"]["recall_at_1"] > 0.8  # of three new classes of five
    ids, labels, vectors = vectors_of(run)
    assert set(labels) == {"hue 1", "hue 4", "hue 7"}
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-4)
    expected = slow_scores(vectors, labels)
    assert {name: run.metrics["test"][name] for name in expected} == pytest.approx(expected)
    again = run.evaluate(str(place / "hues"))
    assert {name: again[name] for name in expected} == pytest.approx(expected)

    before = AutoModelForImageClassification.from_pretrained(place / "resnet")
    model = AutoModelForImageClassification.from_pretrained(run.folder).eval()
    assert [*model.config.id2label.values()][:2] == ["dimension 0", "dimension 1"]
    for name, value in every_tensor(before).items():
        assert "timm_model.fc" in name or every_tensor(model)[name].equal(value), name
    processor = AutoImageProcessor.from_pretrained(run.folder)
    pictures = [Image.open(place / "hues" / name) for name in ids[:4]]
    with torch.no_grad():
        found = model(**processor(images=pictures, return_tensors="pt")).logits
    assert normalised(found.numpy()) == pytest.approx(vectors[:4], abs=1e-5)
    assert np.stack([entry.embedding for entry in run.predict(pictures)]) == pytest.approx(vectors[:4], abs=1e-5)


def test_without_training_all_cosines_are_those_of_the_features(place: Path, tmp_path: Path) -> None:
    run = train(place, tmp_path / "run", "--method=zero_shot", "--embedding_size=32")
    assert run.metrics["train"]["trainable_parameters"] == 0
    ids, _, vectors = vectors_of(run)
    plain = AutoModelForImageClassification.from_pretrained(place / "resnet").eval()
    plain.timm_model.reset_classifier(0)
    processor = AutoImageProcessor.from_pretrained(run.folder)
    pictures = [Image.open(place / "hues" / name) for name in ids]
    with torch.no_grad():
        features = normalised(plain(**processor(images=pictures, return_tensors="pt")).logits.numpy())
    assert features.shape[1] == 32
    assert vectors @ vectors.T == pytest.approx(features @ features.T, abs=1e-4)


def test_a_gallery_is_searched(place: Path, run: hftl.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queries, gallery = place / "hues" / "test" / "hue 4", place / "hues" / "train"
    out = tmp_path / "found.csv"
    words = [str(run.folder), str(queries), "--gallery", str(gallery), "--neighbours", "3", "--output", str(out)]
    cli._run(["predict", *words])
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [*rows[0]] == ["id", "neighbours", "similarity_1", "similarity_2", "similarity_3"]
    fresh = hftl.load_run(run.folder)
    asked, there = fresh.predict(queries), fresh.predict(gallery)
    matrix = np.stack([one.embedding for one in there])
    for row, one in zip(rows, asked, strict=True):
        cosines = matrix @ one.embedding
        order = np.argsort(-cosines, kind="stable")[:3]
        assert row["id"] == one.id
        assert json.loads(row["neighbours"]) == [there[place].id for place in order]
        found = [float(row[f"similarity_{number}"]) for number in (1, 2, 3)]
        assert found == pytest.approx(cosines[order].tolist(), abs=1e-5)
    fresh.use_gallery(gallery, neighbours=500)
    (answer,) = fresh.predict(str(gallery / "hue 0" / "0.png"))
    assert len(answer.neighbours) == 30
    assert answer.neighbours[0].id == "hue 0/0.png"
    assert answer.neighbours[0].similarity == pytest.approx(1)

    assert "--gallery, which is missing" in refused(["predict", *words[:2], "--neighbours=2"], capsys)
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(["predict", *words[:2], "--gallery", str(tmp_path / "empty")], capsys)
    assert "no such file or folder" in refused(["predict", *words[:2], "--gallery", str(tmp_path / "none")], capsys)


@pytest.mark.parametrize("method", ["full", "lora", "partial"])
def test_training_draws_classes_together(place: Path, tmp_path: Path, method: str) -> None:
    before = every_tensor(AutoModelForImageClassification.from_pretrained(place / "resnet"))
    run = train(place, tmp_path / "run", f"--method={method}", "--num_train_epochs=3", "--learning_rate=1e-3")
    ids, labels, vectors = vectors_of(run)
    assert slow_scores(vectors, labels)["recall_at_1"] == pytest.approx(run.metrics["test"]["recall_at_1"])
    after = every_tensor(AutoModelForImageClassification.from_pretrained(run.folder))
    moved = {name for name, value in after.items() if name in before and not value.equal(before[name])}
    assert any("layer1" in name for name in moved) == (method != "partial")
    assert any("layer4" in name for name in moved)
    with Image.open(place / "hues" / ids[0]) as picture:
        assert run.predict(picture)[0].embedding == pytest.approx(vectors[0], abs=1e-5)


def slow_loss(vectors: torch.Tensor, labels: list[int], temperature: float) -> float:
    """Row by row, as equation 2 of Khosla et al. 2020 has it, over the number of rows."""
    total = 0.0
    for row, label in enumerate(labels):
        others = [other for other in range(len(labels)) if other != row]
        alike = [other for other in others if labels[other] == label]
        cosine = {other: float(torch.cosine_similarity(vectors[row], vectors[other], dim=0)) for other in others}
        whole = sum(np.exp(cosine[other] / temperature) for other in others)
        total += -sum(np.log(np.exp(cosine[other] / temperature) / whole) for other in alike) / max(1, len(alike))
    return total / len(labels)


def test_the_loss_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    vectors, labels = torch.randn(12, 5), [0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 0, 1]
    expected = slow_loss(vectors, labels, 0.2)
    for piece in (24, 10**6):
        loss = ContrastiveLoss(0.2, piece)
        assert float(loss({"logits": vectors}, torch.tensor(labels))) == pytest.approx(expected, rel=1e-5)
        assert float(loss({"logits": vectors}, torch.tensor(labels), 24)) == pytest.approx(expected / 2, rel=1e-5)
    alone = torch.randn(1, 5, requires_grad=True)  # of a last batch
    loss = ContrastiveLoss()({"logits": alone}, torch.tensor([0]))
    loss.backward()
    assert loss == 0
    assert alone.grad is not None
    assert torch.isfinite(alone.grad).all()


def test_rows_of_a_class_come_in_groups() -> None:
    labels = np.repeat([0, 1, 2, 3, 4], [9, 4, 1, 6, 5])
    labels = labels[np.random.default_rng(0).permutation(len(labels))]
    sampler = EpochSampler(len(labels), seed=0, labels=labels.tolist(), grouped=True)
    order = [*sampler]
    assert sorted(order) == [*range(len(labels))]
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    assert len(starts) <= 3 + 1 + 1 + 2 + 2
    sizes = np.diff(starts, append=len(order))
    assert [label for label, size in zip(labels[order][starts], sizes, strict=True) if size == 1] == [2]
    sampler.set_epoch(1)
    assert [*sampler] != order


def test_the_projection_is_linear_discriminant_analysis(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), [10, 20, 30, 40, 50])
    features = 3 * random.normal(size=(5, 12))[labels] + random.normal(size=(150, 12)) @ random.normal(size=(12, 12))
    rows = torch.from_numpy(features), torch.from_numpy(labels)
    monkeypatch.setattr(discriminant, "_STRENGTHS", (1e-9,))
    monkeypatch.setattr(discriminant, "_PIECE", 64)
    head = discriminant.solve_discriminant(rows, rows, 4, lambda vectors, _: 1.0)
    assert head.bias is not None
    vectors = (rows[0].float() @ head.weight.T + head.bias).numpy()
    expected = LinearDiscriminantAnalysis(solver="eigen", n_components=4).fit(features, labels).transform(features)
    assert vectors.mean(axis=0) == pytest.approx(0, abs=1e-4)
    assert cdist(vectors, vectors) == pytest.approx(cdist(expected, expected), rel=1e-3, abs=1e-3)


def test_validation_chooses_how_many_directions_there_are() -> None:
    random = np.random.default_rng(0)
    labels = torch.from_numpy(np.repeat(np.arange(3), 30))
    rows = torch.from_numpy(random.normal(size=(90, 50))), labels
    for wanted in (2, 32, 40):

        def score(vectors: torch.Tensor, labels: torch.Tensor, wanted: int = wanted) -> float:
            return -abs(int(vectors.any(dim=0).sum()) - wanted)

        found = solve_discriminant(rows, rows, 40, score)
        assert int(found.weight.any(dim=1).sum()) == wanted
        assert found.weight.shape == (40, 50)


def splits_of(path: Path, **settings: Any) -> data.Splits:
    return data.load_splits({"dataset_name": str(path), **settings}, IMAGE, Similarity(8))


def test_what_validates_are_whole_classes_where_test_has_others(place: Path, tmp_path: Path) -> None:
    splits = splits_of(place / "hues")
    trained, held_out = set(splits.train["label"]), set(splits.validation["label"])
    assert not trained & held_out
    assert len(held_out) == 2
    assert len(splits.train) + len(splits.validation) == 30
    assert len(splits.label_names) == 8
    assert splits.problem.class_names[-1] == "hue 7"
    same = splits_of(small_data.write_images(tmp_path / "same", {"train": 6, "test": 2}))
    assert np.bincount(same.validation["label"]).tolist() == [2, 2, 2]
    many = write_hues(tmp_path / "many", {"train": ([*range(24)], 2)})
    splits = splits_of(many)
    assert not set(splits.train["label"]) & set(splits.validation["label"])
    assert len(set(splits.validation["label"])) == 3  # a tenth of 48 rows


def cells(sizes: list[int]) -> np.ndarray[Any, Any]:
    return np.repeat(np.arange(len(sizes)), sizes)


@pytest.mark.parametrize(
    ("sizes", "fraction", "are_new", "most"),
    [
        ([1000] + [5] * 24, 0.1, False, 112),
        ([300, 2, 2, 2], 0.1, True, 4),
        ([5] * 40, 0.1, False, 20),
        ([3] * 15, 0.1, False, 6),
        ([4, 4], 0.9, False, 4),
        ([4] + [3] * 18, 0.1, False, 10),
        ([50] * 10, 0.1, False, 50),
    ],
)
def test_enough_is_left_to_learn_from(sizes: list[int], fraction: float, are_new: bool, most: int) -> None:
    problem, labels = Similarity(8), cells(sizes)
    problem.class_names = [str(number) for number in range(len(sizes) + are_new)]
    problem._trained = len(sizes)
    for seed in range(5):
        found = problem.held_out(labels, fraction, seed)
        taken = labels[found[0]]
        left = np.delete(labels, found[0])
        assert 4 <= len(taken) <= most
        for part in (taken, left):
            assert len(np.unique(part)) >= 2
            problem.require_enough(part, [], "the part")


def test_a_part_of_the_rows_has_some_that_are_alike(place: Path) -> None:
    problem = Similarity(8)
    for sizes, count in (([5] * 40, 30), ([5] * 40, 200), ([300] * 10, 20), ([1] * 30 + [3] * 4, 9), ([50] * 5, 40)):
        labels = cells(sizes)
        taken = problem.part(labels, count, 0)
        assert count - 5 <= len(taken) <= max(count, 10)
        assert len(np.unique(taken)) == len(taken)
        problem.require_enough(labels[taken], [], "the part")
    splits = splits_of(place / "hues", max_train_samples=6, max_eval_samples=5)
    assert len(np.unique(splits.test["label"])) < len(splits.test)


def test_copies_of_another_class_are_found_before_those_of_the_own() -> None:
    vectors, labels = np.ones((4, 2)), np.array([0, 0, 1, 1])
    assert similarity_metrics(vectors, labels)["recall_at_1"] == 0
    vectors = np.array([[1, 0], [1, 1e-9], [0, 1], [0, 1]])
    assert similarity_metrics(vectors, labels)["recall_at_1"] == 1


@pytest.mark.parametrize("flags", [["--method=zero_shot"], ["--method=frozen", "--embedding_size=1"]])
def test_a_run_whose_rows_are_copies_has_a_page(place: Path, tmp_path: Path, flags: list[str]) -> None:
    source = Image.open(place / "hues" / "train" / "hue 0" / "0.png")
    for split, number in itertools.product(("train", "test"), range(20)):
        folder = tmp_path / "hues" / split / f"{number}"
        folder.mkdir(parents=True)
        for index in range(4):
            source.save(folder / f"{index}.png")
    run = train(tmp_path, tmp_path / "run", f"--model={place / 'resnet'}", *flags)
    assert run.metrics["test"]["recall_at_1"] < 0.5
    assert (run.folder / "report.html").is_file()


def test_a_gallery_of_a_table_is_named_by_its_files(place: Path, run: hftl.Run, tmp_path: Path) -> None:
    files = sorted((place / "hues" / "train").rglob("*.png"))[:9]
    (tmp_path / "a.csv").write_text("\n".join(["image", *map(str, files)]))
    fresh = hftl.load_run(run.folder)
    fresh.use_gallery(str(tmp_path / "a.csv"), neighbours=1)
    (answer,) = fresh.predict(str(files[4]))
    assert answer.neighbours[0].id == str(files[4])


def test_a_projection_is_trained_on(place: Path, run: hftl.Run, tmp_path: Path) -> None:
    before = every_tensor(AutoModelForImageClassification.from_pretrained(run.folder))
    flags = [f"--model={run.folder}", "--keep_head", "--method=frozen", "--learning_rate=1e-7", "--num_train_epochs=1"]
    again = train(place, tmp_path / "run", *flags)
    after = every_tensor(AutoModelForImageClassification.from_pretrained(again.folder))
    moved = {name for name, value in after.items() if not value.equal(before[name])}
    assert moved
    assert all("fc" in name for name in moved)
    assert all(torch.allclose(after[name], before[name], atol=1e-4) for name in moved)
    with pytest.raises(UsageError, match=r"has 8 outputs .*, and 9 are wanted"):
        train(place, tmp_path / "other", f"--model={run.folder}", "--keep_head", "--embedding_size=9")


def test_copies_have_a_projection_too() -> None:
    rows = torch.eye(3).repeat_interleave(2, dim=0), torch.tensor([0, 0, 1, 1, 2, 2])
    for features in (rows[0], torch.ones(6, 3)):
        head = solve_discriminant((features, rows[1]), rows, 4, lambda vectors, _: 1.0)
        assert torch.isfinite(head.weight).all()


def test_a_gallery_that_cannot_be_read_leaves_the_one_before(place: Path, run: hftl.Run) -> None:
    fresh = hftl.load_run(run.folder)
    fresh.use_gallery(place / "hues" / "train", neighbours=2)
    with pytest.raises(UsageError, match="no such file"):
        fresh.use_gallery(place / "nothing")
    for neighbours in (0, -1, 1.5, "3"):
        with pytest.raises(UsageError, match="neighbours must be a whole number above 0"):
            fresh.use_gallery(place / "hues" / "train", neighbours=neighbours)  # type: ignore[arg-type]
    (answer,) = fresh.predict(str(next((place / "hues" / "test").rglob("*.png"))))
    assert len(answer.neighbours) == 2


def test_the_page_names_rows_that_are_near_to_another_class(place: Path, tmp_path: Path) -> None:
    test = tmp_path / "hues" / "test"
    shutil.copytree(place / "hues", tmp_path / "hues")
    shutil.copy(test / "hue 1" / "0.png", test / "hue 7" / "wrong.png")
    run = train(tmp_path, tmp_path / "run", "--method=frozen", f"--model={place / 'resnet'}")
    ids, labels, vectors = vectors_of(run)
    cosines = vectors @ vectors.T - 9 * np.eye(len(vectors))
    same = np.equal.outer(labels, labels)
    wrong = np.flatnonzero(np.where(same, -9, cosines).max(axis=1) > np.where(same, cosines, -9).max(axis=1) - 1e-5)
    finished = find_run(run.folder)
    page = render_report(finished, None)
    assert f"{len(ids) - len(wrong)} are nearest to one that is alike" in page
    assert len(wrong)
    surest = max(wrong, key=lambda row: cosines[row][~same[row]].max())
    line = re.search(rf"<tr><th scope=\"row\">{ids[surest]}.*", page)
    assert line is not None
    assert ids[np.where(same, -9, cosines)[surest].argmax()] in line[0]
    assert f"{cosines[surest].max():.3f}" in line[0]
    assert ids[surest] not in render_report(finished, None, shared=True)
    table = run.folder / "predictions.csv"
    before = table.read_text()
    mixed = [line.replace("hue", f"{number % 2}") for number, line in enumerate(before.splitlines(keepends=True))]
    for text, said in ((before.replace("[", "[x"), "a cell is no vector"), ("".join(mixed), "does not fit")):
        table.write_text(text)
        with pytest.raises(UsageError, match=said):
            render_report(finished, None)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method=auto"], "--method auto is for rows of one class each"),
        (["--mixup=0.2"], "--mixup is for rows of one class each"),
        (["--class_weights=balanced"], "--class_weights is for classes, not for rows that are alike or not"),
        (["--metrics=f1"], "--metrics is for answers that are labels"),
        (["--loss=focal"], "Unknown loss 'focal'"),
        (["--embedding_size=0"], "--embedding_size must be above 0"),
        (["--temperature=0"], "--temperature must be above 0"),
        (["--per_device_train_batch_size=4"], "take 8 rows or more"),
        (["--auto_find_batch_size"], "--auto_find_batch_size: the contrastive loss compares the rows of a batch"),
        (["--prompts=a {label}"], "--prompts are texts of classes, which image-similarity has not"),
        (["--metric_for_best_model=recall_at_2"], "Did you mean"),
    ],
)
def test_bad_settings(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: Any, said: str) -> None:
    words = ["train", "image-similarity", f"--model={place / 'resnet'}", f"--dataset={place / 'hues'}"]
    assert said in refused([*words, *flags, f"--output_dir={tmp_path / 'run'}"], capsys)
    assert not (tmp_path / "run").exists()


def test_data_in_which_nothing_is_alike(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(name: str, splits: dict[str, tuple[list[int], int]]) -> str:
        words = ["train", "image-similarity", f"--model={place / 'resnet'}", f"--output_dir={tmp_path / 'run'}"]
        return refused([*words, f"--dataset={write_hues(tmp_path / name, splits)}"], capsys)

    assert "no two rows have the same label" in said("single", {"train": ([0, 1, 2], 1), "test": ([0, 1], 2)})
    assert "rows of one class" in said("one", {"train": ([0], 9), "test": ([0, 1], 2)})
    assert "no two rows have the same label" in said("test", {"train": ([0, 1], 6), "test": ([2, 3], 1)})


def test_other_commands_refuse_it_by_name(run: hftl.Run, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["compare", str(run.folder), str(run.folder)], ["demo", str(run.folder)]):
        assert "rows that are alike or not" in refused(words, capsys)


def test_only_its_runs_have_a_gallery(place: Path, tmp_path: Path) -> None:
    images = small_data.write_images(tmp_path / "images", {"train": 4, "test": 2})
    words = [f"--model={place / 'resnet'}", f"--dataset={images}", *QUICK, f"--output_dir={tmp_path / 'run'}"]
    cli._run(["train", "image-classification", "--method=frozen", *words])
    with pytest.raises(UsageError, match="runs of image-similarity, not of image-classification"):
        hftl.load_run(tmp_path / "run").use_gallery(images / "test")
