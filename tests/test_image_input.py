"""From image files to pixels: decoding near the size that is used, and training pictures that are kept."""

from __future__ import annotations

import errno
import io
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
import small_data
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import write_timm_folder, write_tiny_image_model, write_tiny_text_model
from transformers import pipeline

import hftl
from hftl import cli, compute, images, training
from hftl.errors import UsageError
from hftl.image_cache import picture_key
from hftl.methods import build_plan
from hftl.tasks.image_classification import ImageClassification, decoded_side, training_side
from hftl.trainer import TransferTrainer
from hftl.workers import data_workers

NAMES = ["ant", "bee"]


def photo(width: int, height: int) -> Image.Image:
    """scikit-learn's picture of a palace, enlarged."""
    pixels = sklearn.datasets.load_sample_image("china.jpg")
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, one large photo, and a folder of photos that are large for a model of 32 pixels."""
    top = tmp_path_factory.mktemp("input")
    write_tiny_image_model(top / "vit", "vit")
    write_timm_folder(top / "timm", "resnet18", channels=[8, 8, 16, 16], stem_width=8, zero_init_last=False)
    photo(3000, 2000).save(top / "large.jpg", quality=90)
    random = np.random.default_rng(0)
    for name in NAMES:
        for split, count in {"train": 6, "validation": 2}.items():
            (top / "data" / split / name).mkdir(parents=True)
            for row in range(count):
                pixels = random.integers(0, 256, (16, 20 + 2 * row, 3), dtype=np.uint8)
                picture = Image.fromarray(pixels).resize((160 + 4 * row, 120))
                picture.save(top / "data" / split / name / f"{row}.jpg", quality=95)
    return top


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder for this test alone."""
    monkeypatch.setenv("HFTL_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "images"


def task_for(
    place: Path, *flags: str, model: str = "vit", kind: type[ImageClassification] = ImageClassification
) -> Any:
    """A task with the processor of a model, as far as training pictures need it."""
    task = kind(
        hftl.parse(hftl.ImageArguments, [f"--model={place / model}", "--method=full", "--num_train_epochs=2", *flags])
    )
    task.load_processor(place / model)
    return task


def rows(place: Path) -> list[dict[str, Any]]:
    return [{"image": str(path)} for path in sorted((place / "data" / "train").glob("*/*.jpg"))]


def kept(home: Path) -> list[Path]:
    return sorted(path for path in home.glob("**/*") if path.is_file())


def in_training(task: Any, given: Any) -> Any:
    """Rows as a stage gets them that prepares them in every epoch."""
    return task.kept_for_epochs({"train": task.dataset(given, training=True)})["train"]


def pixels(dataset: Any, epoch: int = 0) -> torch.Tensor:
    dataset.set_epoch(epoch)
    return torch.stack([dataset[row]["pixel_values"] for row in range(len(dataset))])


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was decoded since the last look."""
    opened: list[Any] = []
    decode = images.open_image

    def counting(value: Any, least_side: int | None = None) -> Image.Image:
        opened.append(value)
        return decode(value, least_side)

    monkeypatch.setattr(images, "open_image", counting)
    return opened


# --- decoding smaller ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "least", "expected"),
    [
        ((3000, 2000), 634, (1500, 1000)),
        ((3000, 2000), 500, (750, 500)),
        ((3000, 2000), 501, (1500, 1000)),
        ((400, 5000), 101, (200, 2500)),
        ((500, 375), 634, (500, 375)),
    ],
)
def test_jpeg_is_decoded_smaller_while_both_sides_are_large_enough(
    size: tuple[int, int], least: int, expected: tuple[int, int], tmp_path: Path
) -> None:
    picture = photo(*size)
    picture.save(tmp_path / "a.jpg")
    picture.save(tmp_path / "a.png")
    content = (tmp_path / "a.jpg").read_bytes()
    for value in (str(tmp_path / "a.jpg"), content, {"bytes": content, "path": None}):
        assert images.open_image(value, least).size == expected
        assert images.open_image(value).size == size
    assert images.open_image(str(tmp_path / "a.png"), least).size == size
    assert images.open_image(picture, least).size == images.open_image(np.asarray(picture), least).size == size


@pytest.mark.parametrize("kind", ["orientation", "CMYK", "L", "progressive"])
def test_kinds_of_jpeg_stay_right_when_decoded_smaller(kind: str, tmp_path: Path) -> None:
    picture, settings = photo(1200, 800), {}
    if kind == "orientation":
        exif = Image.Exif()
        exif[0x0112] = 6
        settings = {"exif": exif}
    elif kind == "progressive":
        settings = {"progressive": True}
    else:
        picture = picture.convert(kind)
    picture.save(tmp_path / "a.jpg", quality=95, **settings)
    full, half = images.open_image(tmp_path / "a.jpg"), images.open_image(tmp_path / "a.jpg", 400)
    assert full.size == ((800, 1200) if kind == "orientation" else (1200, 800))
    assert (half.mode, half.size) == ("RGB", (full.width // 2, full.height // 2))
    difference = np.abs(np.asarray(full.reduce(2), dtype=float) - np.asarray(half, dtype=float))
    assert difference.mean() < 1.5, difference.mean()


@pytest.mark.parametrize("model", ["vit", "timm"])
def test_photos_of_ordinary_size_are_decoded_whole(place: Path, model: str, tmp_path: Path) -> None:
    """However few of their pixels a model takes: each of those holds much detail, and answers would change."""
    task = task_for(place, model=model)
    photo(500, 375).save(tmp_path / "a.jpg", quality=90)
    plain = task.processor(images=images.open_image(tmp_path / "a.jpg"), return_tensors="pt")["pixel_values"][0]
    found = task.collate([task.dataset([{"image": str(tmp_path / "a.jpg")}], training=False)[0]])["pixel_values"][0]
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize(("model", "resized", "size"), [("vit", 32, 32), ("timm", 64 / 0.95, 64)])
def test_pixels_and_answers_hardly_move(place: Path, model: str, resized: float, size: int, tmp_path: Path) -> None:
    task = task_for(place, model=model)
    least = decoded_side(task.processor)
    assert least is not None
    assert decoded_side(task.processor, least=0) == 2 * math.ceil(max(resized, size * 2**0.5))
    assert least == 448  # no less: see test_photos_of_ordinary_size_are_decoded_whole
    assert training_side(task.processor) == int(np.ceil(size * 2**0.5))
    path = str(place / "large.jpg")
    assert images.open_image(path, least).width < 3000
    plain = task.processor(images=images.open_image(path), return_tensors="pt")["pixel_values"][0]
    found = task.collate([task.dataset([{"image": path}], training=False)[0]])["pixel_values"][0]
    difference = (found - plain).abs() * 127.5  # both processors have a deviation of about a half
    assert 0 < difference.mean() < 1


@pytest.mark.parametrize("model", ["vit", "timm"])
def test_predictions_are_those_of_the_pipeline(place: Path, model: str, tmp_path: Path) -> None:
    run = hftl.finetune(
        "image-classification",
        model=place / model,
        dataset=place / "data",
        method="full",  # a solved head makes more of what JPEGs decoded at another scale differ by
        num_train_epochs=1,
        output_dir=tmp_path / "run",
        dataloader_num_workers=0,
        report_to="none",
    )
    answers = pipeline("image-classification", str(run.folder))
    for path in [place / "large.jpg", *sorted((place / "data" / "validation").glob("*/*.jpg"))]:
        (found,) = run.predict(path)
        expected = {entry["label"]: entry["score"] for entry in answers(str(path), top_k=None)}
        assert found.probabilities == pytest.approx(expected, abs=1e-3)


class OwnTask(ImageClassification):
    """Cuts a corner out of every picture."""

    def open_image(self, value: Any) -> Image.Image:
        """The corner."""
        picture = super().open_image(value)
        self.seen = picture.size
        return picture.crop((0, 0, 600, 600))


def test_a_task_that_opens_images_itself_sees_them_whole(place: Path, home: Path) -> None:
    task = task_for(place, "--image_cache=on", kind=OwnTask)
    for in_training in (True, False):
        data = task.dataset([{"image": str(place / "large.jpg")}], in_training)
        assert data[0]["pixel_values"].shape == (3, 32, 32)
        assert task.seen == (3000, 2000)
    assert not kept(home)


def test_a_processor_that_does_not_resize_gets_the_whole_picture(place: Path) -> None:
    task = task_for(place)
    task.processor.do_resize = False
    data = task.dataset([{"image": str(place / "large.jpg")}], training=False)
    assert data[0]["pixel_values"].shape == (3, 2000, 3000)


# --- keeping training pictures ---------------------------------------------------------------------------------------


def test_a_second_epoch_decodes_nothing(place: Path, home: Path, decoded: list[Any]) -> None:
    task = task_for(place)  # auto: these photos are much larger than 46 pixels
    data = in_training(task, rows(place))
    first, again = pixels(data), pixels(data)
    assert len(decoded) == len(data) == len(kept(home)) == 12
    assert torch.equal(first, again)
    assert not torch.equal(first, pixels(data, epoch=1))
    anew = in_training(task, rows(place))
    assert torch.equal(pixels(anew, epoch=1), pixels(data, epoch=1))
    assert len(decoded) == 12
    assert np.fromfile(kept(home)[0], np.uint8).size <= 28 + 3 * 46 * 69


def evaluated(place: Path, *flags: str, **settings: Any) -> Any:
    """The photos of validation as evaluations get them, and as they are without."""
    task = task_for(place, *flags, **settings)
    photos = [{"image": str(path)} for path in sorted((place / "data" / "validation").glob("*/*.jpg"))]
    plain = task.dataset(photos, training=False)
    data = {"train": task.dataset(rows(place), training=True), "validation": plain}
    return task.kept_for_epochs(data)["validation"], plain


def test_a_second_evaluation_decodes_nothing(place: Path, home: Path, decoded: list[Any]) -> None:
    data, plain = evaluated(place)
    expected = pixels(plain)
    decoded.clear()
    first = pixels(data)
    assert len(decoded) == 4
    assert torch.equal(first, expected)
    assert torch.equal(pixels(data), expected)
    anew, _ = evaluated(place)
    assert torch.equal(pixels(anew), expected)
    assert len(decoded) == 4 + 1  # one of the second plan, to see how large it is
    of_another_model, plain = evaluated(place, "--image_cache=on", model="timm")
    assert torch.equal(pixels(of_another_model), pixels(plain))
    assert len(kept(home)) == 4 + 4


def test_pictures_of_validation_take_what_those_of_training_leave(
    place: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_training, of_validation = 12 * 3 * 46 * 70, 4 * 3 * 32 * 32 * 4  # bytes
    for limit, expected in ((of_training + of_validation, 4), (of_training + of_validation / 2, 0)):
        data, _ = evaluated(place, f"--image_cache_gb={limit / 1e9}")
        pixels(data)
        assert len(kept(home)) == expected
        shutil.rmtree(home, ignore_errors=True)
    assert capsys.readouterr().out.count("images of validation: decoded in every epoch") == 1


@pytest.mark.parametrize("missing", [False, True])
def test_pictures_beside_texts_are_kept_where_all_are_there(place: Path, home: Path, missing: bool) -> None:
    flags = [f"--model={place / 'vit'}"]
    task = hftl.ImageTextClassification(hftl.parse(hftl.ImageTextArguments, flags))
    write_tiny_text_model(place / "bert")
    task.image.load_processor(place / "vit")
    task.text.load_processor(place / "bert")
    given = [{**row, "id": str(number), "text": "a film"} for number, row in enumerate(rows(place))]
    if missing:
        given[0]["image"] = None
    plain = task.dataset(given, training=False)
    both = {"train": task.dataset(given, training=True), "validation": plain}
    task.arguments.num_train_epochs = 2
    data = task.kept_for_epochs(both)["validation"]
    batch, expected = (task.collate([rows[row] for row in range(12)]) for rows in (data, plain))
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in batch)
    assert len(kept(home)) == (0 if missing else 12)


def test_pixels_without_augmentation_are_kept_as_they_are(place: Path, home: Path, decoded: list[Any]) -> None:
    plain = pixels(in_training(task_for(place, "--augmentation=none", "--image_cache=off"), rows(place)))
    data = in_training(task_for(place, "--augmentation=none"), rows(place))
    decoded.clear()
    assert torch.equal(pixels(data), plain)
    assert torch.equal(pixels(data, epoch=1), plain)
    assert len(decoded) == 12


def test_a_folder_that_cannot_be_made_is_said_once(place: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home.parent.mkdir(parents=True)
    home.write_text("in the way")
    data = in_training(task_for(place), rows(place))
    assert torch.equal(pixels(data), pixels(data))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("images")]
    assert said == [f"images: decoded in every epoch, since {home} cannot be used: File exists"]


class OwnPixels(ImageClassification):
    """A task whose pixels are its own."""

    def plain_transform(self, image: Any) -> torch.Tensor:
        """Dark."""
        return super().plain_transform(image) / 2


@pytest.mark.parametrize(
    "flags",
    [["--image_cache=off"], ["--eval_strategy=no", "--load_best_model_at_end=false"], ["--image_cache_gb=1e-6"], None],
    ids=str,
)
def test_when_pictures_of_validation_are_not_kept(place: Path, home: Path, flags: list[str] | None) -> None:
    data, plain = evaluated(place, *(flags or []), kind=ImageClassification if flags else OwnPixels)
    assert torch.equal(pixels(data), pixels(plain))
    assert not kept(home)


def test_pixels_are_the_same_kept_or_not(place: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_room = pixels(in_training(task_for(place), rows(place)))
    shutil.rmtree(home)
    without = pixels(in_training(task_for(place, "--image_cache_gb=1e-6"), rows(place)))
    assert torch.equal(with_room, without)
    assert not kept(home)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("images:")]
    assert len(lines) == 2
    assert "--image_cache_gb 1e-06" in lines[1]


def test_kept_pictures_look_like_the_photo(place: Path) -> None:
    data = in_training(task_for(place, "--image_cache=on", model="timm"), [{"image": str(place / "large.jpg")}])
    found = data.open_image(data.rows[0]["image"])
    assert found.shape == (91, 136, 3)
    expected = images.open_image(place / "large.jpg").resize((136, 91), Image.Resampling.BICUBIC)
    assert np.abs(found.astype(float) - np.asarray(expected)).mean() < 1


@pytest.mark.parametrize(
    ("flags", "name", "expected"),
    [
        ([], "data", True),
        (["--num_train_epochs=1"], "data", False),
        (["--num_train_epochs=1", "--method=lp_ft", "--head_epochs=1"], "data", True),
        (["--image_cache=off"], "data", False),
        (["--augmentation=none"], "data", True),
        (["--augmentation=none", "--image_cache=off"], "data", False),
        (["--augmentation=none"], "small", False),
        (["--augmentation=strong"], "data", True),
        (["--num_train_epochs=1", "--image_cache=on"], "data", True),
        ([], "small", False),
        (["--image_cache=on"], "small", True),
        (["--image_cache=on"], "pictures", False),
        (["--image_cache=on"], "none", False),
    ],
    ids=str,
)
def test_when_pictures_are_kept(place: Path, home: Path, flags: list[str], name: str, expected: bool) -> None:
    small = [{"image": {"bytes": _png(photo(60, 40)), "path": None}}]
    given = {"data": rows(place), "small": small, "pictures": [{"image": photo(600, 400)}], "none": []}[name]
    data = in_training(task_for(place, *flags), given)
    for row in range(len(data)):
        data[row]
    assert len(kept(home)) == (len(given) if expected else 0)


def test_a_limit_that_means_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="--image_cache_gb"):
        hftl.parse(hftl.ImageArguments, ["--model=x", "--image_cache_gb=-1"])


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("damage", ["flipped bit", "cut", "empty", "other sizes"])
def test_a_damaged_picture_is_made_again(
    place: Path, home: Path, decoded: list[Any], damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = in_training(task_for(place), rows(place))
    before = pixels(data)
    path = kept(home)[3]
    content = bytearray(path.read_bytes())
    if damage == "flipped bit":
        content[len(content) // 2] ^= 1
    elif damage == "other sizes":
        content[8:12], content[12:16] = content[12:16], content[8:12]
    path.write_bytes({"cut": content[:-5], "empty": b""}.get(damage, content))
    decoded.clear()
    assert torch.equal(pixels(data), before)
    assert len(decoded) == 1
    assert f"{path} is damaged and is made again" in capsys.readouterr().out
    assert torch.equal(pixels(data), before)
    assert len(decoded) == 1


def test_the_key_is_the_content(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    shutil.copy2(place / "large.jpg", path)
    key = picture_key(str(place / "large.jpg"), "317 634")
    assert picture_key(str(path), "317 634") == key
    assert picture_key(str(path), "318 634") != key
    state = path.stat()
    for position in (10, -10):
        changed = bytearray((place / "large.jpg").read_bytes())
        changed[position] ^= 1
        path.write_bytes(changed)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert picture_key(str(path), "317 634") != key
    shutil.copy2(place / "large.jpg", path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert picture_key(str(path), "317 634") != key
    content = (place / "large.jpg").read_bytes()
    assert picture_key(content, "317 634") == picture_key({"bytes": content, "path": "x.jpg"}, "317 634")
    middle = bytearray(content)
    middle[len(middle) // 2] ^= 1
    assert picture_key(bytes(middle), "317 634") != picture_key(content, "317 634")


def test_a_full_disk_ends_the_keeping_not_the_training(
    place: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = in_training(task_for(place), rows(place))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    expected = pixels(in_training(task_for(place, "--image_cache_gb=1e-6"), rows(place)))
    monkeypatch.setattr(os, "replace", full)
    assert torch.equal(pixels(data), expected)
    assert not kept(home)
    assert capsys.readouterr().out.count("No space left") == 1


def test_two_runs_at_once_share_what_they_keep(place: Path, home: Path) -> None:
    found: dict[int, torch.Tensor] = {}

    tasks = [task_for(place) for _ in range(4)]  # not in the threads: accelerate has one state a process

    def train(number: int) -> None:
        # No augmentation draws here: the random generator belongs to the whole process.
        data = in_training(tasks[number], rows(place))
        found[number] = torch.cat(
            [torch.from_numpy(data.open_image(data.rows[row]["image"])).flatten() for row in range(len(data))]
        )

    threads = [threading.Thread(target=train, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(found[0], other) for other in found.values())
    assert len(kept(home)) == 12
    assert not [path for path in kept(home) if path.name.startswith(".")]


def test_what_a_killed_process_left_is_removed_a_day_later(place: Path, home: Path) -> None:
    (home / "ab").mkdir(parents=True)
    for name, age in ((".old", 2 * 86_400), (".new", 0)):
        (home / "ab" / name).write_bytes(b"half")
        os.utime(home / "ab" / name, (home.stat().st_mtime - age,) * 2)
    in_training(task_for(place), rows(place))
    assert [path.name for path in kept(home)] == [".new"]


def test_what_nobody_used_for_a_month_is_removed(place: Path, home: Path) -> None:
    (home / "ab").mkdir(parents=True)
    for name, days in (("old", 31), ("new", 29)):
        (home / "ab" / name).write_bytes(b"")
        os.utime(home / "ab" / name, (home.stat().st_mtime - days * 86_400,) * 2)
    data = in_training(task_for(place), rows(place))
    assert [path.name for path in kept(home)] == ["new"]
    pixels(data)
    for path in kept(home):
        os.utime(path, (0, 0))
    pixels(data)
    assert sum(path.stat().st_mtime > 0 for path in kept(home)) == 12  # which were read


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_gives_the_same_weights_with_a_fresh_cache_and_with_an_old_one(
    place: Path, home: Path, workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = []
    for name in ("fresh", "old"):
        hftl.finetune(
            "image-classification",
            model=place / "vit",
            dataset=place / "data",
            num_train_epochs=2,
            output_dir=tmp_path / name,
            dataloader_num_workers=workers,
            per_device_train_batch_size=4,
            report_to="none",
        )
        weights.append(load_file(tmp_path / name / "model.safetensors"))
        assert len(kept(home)) == 12 + 4  # and those of validation
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    printed = capsys.readouterr().out
    assert "images: kept for later epochs" in printed
    assert "images: kept from before" in printed


# --- what training gets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_training_has_channels_last_and_batches_ahead_in_pinned_memory_on_a_gpu(
    place: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts: set[tuple[bool, bool]] = set()
    loaders: set[tuple[bool, int, int | None]] = set()
    step, prepare = TransferTrainer.training_step, TransferTrainer.get_train_dataloader

    def noted(self: Any, model: Any, inputs: Any, *others: Any) -> Any:
        tensors = (model.timm_model.conv1.weight, inputs["pixel_values"])
        layouts.add(tuple(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors))
        return step(self, model, inputs, *others)

    def prepared(self: Any) -> Any:
        loader = prepare(self)
        loaders.add((loader.pin_memory, loader.num_workers, loader.prefetch_factor))
        return loader

    monkeypatch.setattr(TransferTrainer, "training_step", noted)
    monkeypatch.setattr(TransferTrainer, "get_train_dataloader", prepared)
    settings: dict[str, Any] = {"model": place / "timm", "dataset": place / "data", "method": "full", "max_steps": 2}
    settings |= {"dataloader_num_workers": workers, "report_to": "none"}
    settings |= {"dataloader_prefetch_factor": 3} if workers else {}
    hftl.finetune("image-classification", output_dir=tmp_path / "run", **settings)
    assert layouts == {(True, True)}
    assert loaders == {(torch.cuda.is_available(), workers, 3 if workers else None)}


# --- workers ---------------------------------------------------------------------------------------------------------


def workers_of(place: Path, cores: int, processes: int, cpu: bool, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    """The workers that a run would have on a machine like that."""
    task = task_for(place, f"--dataset={place / 'data'}", "--precision=fp32", *flags)
    task.arguments.use_cpu = cpu
    splits = task.load_splits()
    plan = build_plan(task.build_model(splits), task.arguments)
    before = {name: value.clone() for name, value in plan.model.state_dict().items()}
    state = torch.get_rng_state()
    (stage,), data = training.prepare(task, plan, splits, task.arguments)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    found = data_workers(task, stage, plan.model, data["train"], splits)
    assert found == task.arguments.dataloader_num_workers
    assert all(torch.equal(value, before[name]) for name, value in plan.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    return found


@pytest.mark.parametrize(
    ("cores", "processes", "cpu", "most"), [(16, 1, True, 4), (16, 1, False, 15), (16, 4, False, 3)]
)
@pytest.mark.parametrize("seconds", [1e-3, 10.0])
def test_workers_keep_pace_with_the_computation_on_the_cores_that_are_free(
    place: Path, cores: int, processes: int, cpu: bool, most: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[int] = []
    monkeypatch.setattr(compute, "seconds_a_row", lambda *_: timed.append(1) or seconds)
    collate = ImageClassification.collate

    def slow(task: ImageClassification, examples: list[Any]) -> dict[str, torch.Tensor]:
        time.sleep(4e-3 * len(examples))
        return collate(task, examples)

    monkeypatch.setattr(ImageClassification, "collate", slow)
    found = workers_of(place, cores, processes, cpu, monkeypatch, "--model", str(place / "timm"))
    assert len(timed) == 1
    assert found == 1 if seconds == 10.0 else min(8, most) <= found <= most


@pytest.mark.parametrize(
    ("cores", "processes", "cpu", "flags", "expected"),
    [
        (1, 1, True, [], 0),
        (2, 1, True, [], 1),
        (2, 2, True, [], 0),
        (4, 1, True, [], 1),
        (16, 1, False, ["--auto_find_batch_size"], 8),
        (16, 1, False, ["--activation_checkpointing"], 8),
        (16, 1, True, ["--dataloader_num_workers=3"], 3),
    ],
)
def test_nothing_is_measured_where_the_cores_say_how_many_workers(
    place: Path, cores: int, processes: int, cpu: bool, flags: list[str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(compute, "seconds_a_row")
    assert workers_of(place, cores, processes, cpu, monkeypatch, *flags) == expected


def test_what_a_measurement_for_workers_computes_changes_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = workers_of(place, 64, 1, True, monkeypatch, "--model", str(place / "timm"))
    assert 1 <= found <= 16


@pytest.mark.parametrize("method", ["frozen", "full"])
def test_workers_are_timed_only_for_a_stage_that_prepares_rows(
    place: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[float] = []
    seconds_a_row = compute.seconds_a_row
    settings: dict[str, Any] = {"model": place / "timm", "dataset": place / "data", "num_train_epochs": 1}
    settings |= {"method": method, "precision": "fp32", "report_to": "none"}
    with monkeypatch.context() as larger:
        larger.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
        larger.setattr(compute, "seconds_a_row", lambda *given: timed.append(seconds_a_row(*given)) or timed[-1])
        hftl.finetune("image-classification", output_dir=tmp_path / "run", **settings)
    assert len(timed) == (method == "full")
    hftl.finetune("image-classification", output_dir=tmp_path / "plain", dataloader_num_workers=0, **settings)
    weights = [load_file(tmp_path / run / "model.safetensors") for run in ("run", "plain")]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


# --- memory ----------------------------------------------------------------------------------------------------------

TRAIN = """
import json, resource, sys
import hftl
run = hftl.finetune(
    "image-classification", model=sys.argv[1], dataset=sys.argv[2], output_dir=sys.argv[3], max_steps=4,
    dataloader_num_workers=0, per_device_train_batch_size=8, report_to="none", image_cache="on",
)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_folder(place: Path, tmp_path: Path) -> None:
    source = sorted((place / "data" / "train").glob("*/*.jpg"))
    peak = {}
    for count in (200, 1600):
        for name in NAMES:
            folder = tmp_path / f"{count}" / name
            folder.mkdir(parents=True)
            for row in range(count // 2):
                content = source[row % len(source)].read_bytes()
                (folder / f"{row}.jpg").write_bytes(content + row.to_bytes(4, "little"))  # no two are equal
        arguments = [str(place / "vit"), str(tmp_path / f"{count}"), str(tmp_path / f"run{count}")]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
        subprocess.run([sys.executable, "-c", TRAIN, *arguments], check=True, env=environment)
        metrics = json.loads((tmp_path / f"run{count}" / "metrics.json").read_text())
        peak[count] = metrics["train"]["peak_memory_mb"]
    assert peak[1600] < 1.1 * peak[200], peak


def torn_among_many(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A data set so large that only headers are checked, with one JPEG without its end, and flags to train on it."""
    monkeypatch.setattr("hftl.data.FULL_DECODE_LIMIT", 5)
    small_data.write_images(folder / "images", {"train": 6, "val": 2})
    torn = folder / "images" / "train" / "blue" / "torn.jpg"
    Image.effect_noise((64, 64), 60).convert("RGB").save(torn)
    torn.write_bytes(torn.read_bytes()[:-900])
    flags = ["--model=random:resnet18", "--image_size=32", f"--dataset={folder / 'images'}", "--report_to=none"]
    flags += ["--num_train_epochs=1", "--dataloader_num_workers=1", f"--output_dir={folder / 'run'}"]
    return ["train", "image-classification", *flags]


def test_a_torn_image_that_a_worker_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, as if it had been found before, rather than the worker's traceback."""
    with pytest.raises(UsageError) as error:
        cli._run(torn_among_many(tmp_path, monkeypatch))
    assert "torn.jpg cannot be read as an image" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_bad_files_are_skipped_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli._run([*torn_among_many(tmp_path, monkeypatch), "--skip_bad_files"])
    assert "1 of 25 cannot be read and are left out" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.json").is_file()


def test_data_workers_end_with_the_training(tmp_path: Path) -> None:
    """Left to the garbage collector each data loader would take 5 seconds, in the midst of what comes next."""
    small_data.write_images(tmp_path / "images", {"train": 6, "val": 2, "test": 2})
    settings = {"image_size": 32, "num_train_epochs": 1, "dataloader_num_workers": 1, "report_to": "none"}
    run = hftl.finetune(
        "image-classification",
        model="random:resnet18",
        dataset=tmp_path / "images",
        output_dir=tmp_path / "run",
        **settings,
    )
    assert multiprocessing.active_children() == []
    assert "test" in run.metrics
