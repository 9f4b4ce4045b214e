"""Images: sizes, transforms, kinds of pixels, and the same answers from plain transformers and timm."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tiny_models import TINY, write_timm_folder, write_tiny_image_model
from torchvision.transforms import InterpolationMode
from transformers import AutoImageProcessor, AutoModelForImageClassification, BitImageProcessor, pipeline

import hftl
from hftl.data import Splits
from hftl.errors import UsageError
from hftl.pretrained import save_model
from hftl.run import Run
from hftl.tasks.image_classification import ImageClassification, scaled, training_transform

NAMES = ["ant", "bee", "cat"]
TIMM_SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "img_size": 64}
TIMM_VIT = {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 64}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of pretrained models."""
    top = tmp_path_factory.mktemp("checkpoints")
    folders = {
        "vit": write_tiny_image_model(top / "vit", "vit"),
        "resnet": write_tiny_image_model(top / "resnet", "resnet"),
        "timm_vit": write_timm_folder(top / "timm_vit", "vit_tiny_patch16_224", **TIMM_VIT),
        "timm_resnet": write_timm_folder(
            top / "timm_resnet", "resnet18", channels=[8, 8, 16, 16], stem_width=8, zero_init_last=False
        ),
    }
    folders["timm_swin"] = write_timm_folder(top / "timm_swin", "swin_tiny_patch4_window7_224", **TIMM_SWIN)
    for name, size in (("dinov2", 32), ("swin", 64), ("convnext", 64)):
        folders[name] = top / name
        TINY[name]().save_pretrained(top / name)
        edges: Any = {"size": {"shortest_edge": size + 8}, "crop_size": {"height": size, "width": size}}
        BitImageProcessor(**edges).save_pretrained(top / name)
    return folders


def splits() -> Splits:
    rows = datasets.Dataset.from_dict({"id": [], "label": []})
    return Splits(train=rows, validation=rows, test=None, label_names=NAMES, columns={})


def task_with(model: Any, *flags: str) -> tuple[ImageClassification, Any]:
    """A task and its model, in eval mode."""
    task = ImageClassification(hftl.parse(hftl.ImageArguments, [f"--model={model}", "--output_dir=unused", *flags]))
    return task, task.build_model(splits()).eval()


def saved(task: ImageClassification, model: Any, folder: Path) -> Path:
    save_model(model, folder)
    task.save_processor(folder)
    return folder


def photo(width: int = 90, height: int = 70) -> Image.Image:
    """A smooth picture, so that resizing it is well defined."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = np.stack([x, y, (x + y) / 2], axis=-1)
    return Image.fromarray((pixels * 255).astype(np.uint8))


def probabilities(result: list[dict[str, Any]]) -> list[float]:
    """What a pipeline gives, in the order of the classes."""
    return [next(entry["score"] for entry in result if entry["label"] == name) for name in NAMES]


def check_saved(task: ImageClassification, model: Any, folder: Path, size: int) -> None:
    """The run, the pipeline and timm give the answers of the trained model, on pixels of the right size."""
    saved(task, model, folder)
    batch = task.collate([task.dataset([{"image": photo()}], training=False)[0]])
    assert batch["pixel_values"].shape == (1, 3, size, size)
    assert task.dataset([{"image": photo()}], training=True)[0]["pixel_values"].shape == (3, size, size)
    with torch.no_grad():
        logits = model(**batch).logits
    expected = logits.softmax(-1)[0].tolist()
    run = Run(folder, task)
    assert list(run.predict(photo())[0].probabilities.values()) == pytest.approx(expected, abs=1e-5)
    answers = pipeline("image-classification", str(folder), top_k=None)(photo())
    assert probabilities(answers) == pytest.approx(expected, abs=1e-5)
    if model.config.model_type == "timm_wrapper":
        by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert by_timm.pretrained_cfg["input_size"][-1] == size
        with torch.no_grad():
            torch.testing.assert_close(by_timm(batch["pixel_values"]), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [None, 48, 96])
@pytest.mark.parametrize(
    "name", ["vit", "dinov2", "resnet", "convnext", "swin", "timm_vit", "timm_swin", "timm_resnet"]
)
def test_image_size_is_kept_with_the_model(
    checkpoints: dict[str, Path], name: str, size: int | None, tmp_path: Path
) -> None:
    flags = [] if size is None else [f"--image_size={size}"]
    if (name, size) == ("swin", 48):
        return  # refused, see below
    task, model = task_with(checkpoints[name], *flags)
    own = {"vit": 32, "dinov2": 32}.get(name, 64)
    check_saved(task, model, tmp_path / "saved", size or own)


def test_position_embeddings_are_interpolated(checkpoints: dict[str, Path]) -> None:
    _, small = task_with(checkpoints["vit"])
    _, large = task_with(checkpoints["vit"], "--image_size=64")
    before, after = small.vit.embeddings.position_embeddings, large.vit.embeddings.position_embeddings
    assert (before.shape[1], after.shape[1]) == (1 + 16, 1 + 64)
    assert torch.equal(before[:, 0], after[:, 0])
    grid = before[:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(grid, size=(8, 8), mode="bicubic", antialias=True)
    torch.testing.assert_close(after[:, 1:], wanted.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-6)
    others = {key: value for key, value in small.state_dict().items() if "position" not in key}
    torch.testing.assert_close(others, {key: large.state_dict()[key] for key in others}, rtol=0, atol=0)


def test_a_size_of_its_own_changes_nothing(checkpoints: dict[str, Path]) -> None:
    _, plain = task_with(checkpoints["vit"])
    _, same = task_with(checkpoints["vit"], "--image_size=32")
    torch.testing.assert_close(same.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_a_size_at_which_the_model_fails_is_refused(checkpoints: dict[str, Path]) -> None:
    # The last stage has windows of 4 patches, and 48 pixels leave 3 of them.
    for model in (checkpoints["swin"], "random:swin"):
        with pytest.raises(UsageError, match="--image_size 48: SwinForImageClassification does not work at this size"):
            task_with(model, "--image_size=48")


# --- transforms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augmentation", ["none", "light", "strong"])
@pytest.mark.parametrize("name", ["vit", "dinov2", "resnet", "timm_vit", "timm_resnet"])
def test_training_pixels_are_scaled_as_the_processor_does(
    checkpoints: dict[str, Path], name: str, augmentation: str
) -> None:
    task, _ = task_with(checkpoints[name], f"--augmentation={augmentation}")
    image = Image.new("RGB", (80, 60), (200, 30, 90))  # a crop or a flip of one colour is the same
    expected = task.processor(images=image, return_tensors="pt")["pixel_values"][0]
    data = task.dataset([{"image": image}] * 8, training=True)
    found = task.collate([data[row] for row in range(8)])["pixel_values"]
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert all(pixels.shape == expected.shape and pixels.dtype == torch.float32 for pixels in found)
    if augmentation != "strong":  # which changes colours
        for pixels in found:
            torch.testing.assert_close(pixels, expected, rtol=1e-4, atol=1e-4)


class OwnBatches(ImageClassification):
    """A task that makes batches its own way."""

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Just the pixels."""
        return {"pixel_values": torch.stack([example["pixel_values"] for example in examples])}


@pytest.mark.parametrize("augmentation", ["light", "strong"])
def test_who_makes_batches_gets_what_the_model_takes(checkpoints: dict[str, Path], augmentation: str) -> None:
    flags = [f"--model={checkpoints['vit']}", f"--augmentation={augmentation}"]
    task = OwnBatches(hftl.parse(hftl.ImageArguments, flags))
    task.load_processor(checkpoints["vit"])
    data = task.dataset([{"image": Image.new("RGB", (80, 60))}] * 2, training=True)
    batch = task.collate([data[0], data[1]])["pixel_values"]
    assert batch.dtype == torch.float32
    assert batch.min() == pytest.approx(-1)  # black


#: what of augmentation is in the transform of training images
AUGMENTATION = {
    "none": set(),
    "light": {"RandomResizedCrop", "RandomHorizontalFlip"},
    "strong": {"RandomResizedCrop", "RandomHorizontalFlip", "RandAugment", "RandomErasing"},
}


@pytest.mark.parametrize("augmentation", [None, *AUGMENTATION])
def test_augmentation_is_light_unless_said_otherwise(checkpoints: dict[str, Path], augmentation: str | None) -> None:
    flags = [] if augmentation is None else [f"--augmentation={augmentation}"]
    task, _ = task_with(checkpoints["vit"], *flags)
    transform = task.dataset([], training=True).transform
    steps = {type(step).__name__: step for step in getattr(transform, "transforms", [transform])}
    assert {name for name in steps if name.startswith("Rand")} == AUGMENTATION[augmentation or "light"]
    if augmentation != "none":
        assert steps["RandomResizedCrop"].scale == (0.5, 1.0)
        assert steps["RandomHorizontalFlip"].p == 0.5


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_crop_is_resized_as_the_processor_resizes(
    checkpoints: dict[str, Path], interpolation: str, tmp_path: Path
) -> None:
    resample = {"bilinear": 2, "bicubic": 3}[interpolation]
    shutil.copytree(checkpoints["timm_resnet"], tmp_path / "timm")
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    config["pretrained_cfg"] |= {"interpolation": interpolation, "input_size": [3, 48, 80]}
    (tmp_path / "timm" / "config.json").write_text(json.dumps(config))
    oblong = {"height": 24, "width": 40}
    resized_and_cropped = AutoImageProcessor.from_pretrained(checkpoints["dinov2"], resample=resample)
    processors = {
        (24, 40): AutoImageProcessor.from_pretrained(checkpoints["vit"], resample=resample, size=oblong),
        (32, 32): resized_and_cropped,
        (64, 64): AutoImageProcessor.from_pretrained(checkpoints["resnet"], resample=resample),
        (48, 80): AutoImageProcessor.from_pretrained(tmp_path / "timm"),
    }
    for size, processor in processors.items():
        _, crop, *_ = training_transform(processor, "light", horizontal_flip=True).transforms
        assert (crop.size, crop.interpolation) == (size, InterpolationMode(interpolation))


@pytest.mark.parametrize(
    "settings",
    [
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"resample": 2},
        {"resample": 3},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
    ],
    ids=str,
)
def test_processors_with_other_settings(
    checkpoints: dict[str, Path], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hftl.tasks.image_classification._LEAST_CROP", 1.0)  # of a square all, as the processor
    processor = AutoImageProcessor.from_pretrained(checkpoints["vit"], **settings)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8))
    expected = processor(images=image, return_tensors="pt")["pixel_values"][0].float()
    found = scaled(processor, training_transform(processor, "light", horizontal_flip=False)(image)[None])[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_no_augmentation_is_the_processor_itself(checkpoints: dict[str, Path]) -> None:
    task, _ = task_with(checkpoints["resnet"], "--augmentation=none")
    pixels = task.dataset([{"image": photo()}], training=True)[0]["pixel_values"]
    assert torch.equal(pixels, task.processor(images=photo(), return_tensors="pt")["pixel_values"][0])


def test_flips_are_off_on_request(checkpoints: dict[str, Path]) -> None:
    names = {
        flip: str(task_with(checkpoints["vit"], flip)[0].dataset([], True).transform)
        for flip in ("--horizontal_flip=true", "--horizontal_flip=false")
    }
    assert ["RandomHorizontalFlip" in text for text in names.values()] == [True, False]


# --- kinds of pixels -------------------------------------------------------------------------------------------------


def grey() -> Image.Image:
    return photo().convert("L")


KINDS = {
    "grey": grey,
    "RGB": lambda: grey().convert("RGB"),
    "palette": lambda: grey().convert("P"),
    "alpha": lambda: grey().convert("RGBA"),
    "grey with alpha": lambda: grey().convert("LA"),
    "CMYK": lambda: grey().convert("RGB").convert("CMYK"),
    "16 bits": lambda: Image.fromarray(np.asarray(grey()).astype(np.uint16) * 257),
}


@pytest.mark.parametrize("name", ["vit", "timm_resnet"])
def test_kinds_of_pixels_are_predicted_alike(checkpoints: dict[str, Path], name: str, tmp_path: Path) -> None:
    task, model = task_with(checkpoints[name])
    folder = saved(task, model, tmp_path / "saved")
    run, by_pipeline = Run(folder, task), pipeline("image-classification", str(folder), top_k=None)
    (expected,) = run.predict(KINDS["RGB"]())
    values = list(expected.probabilities.values())
    for kind, image in KINDS.items():
        path = tmp_path / f"{kind}.{'tif' if kind == 'CMYK' else 'png'}"
        image().save(path)
        for given in (path, image()):
            (found,) = run.predict(given)
            assert list(found.probabilities.values()) == pytest.approx(values, abs=1e-4), kind
        if kind != "16 bits":  # Pillow's own conversion, which the pipeline uses, clips them
            assert probabilities(by_pipeline(str(path))) == pytest.approx(values, abs=1e-4), kind


def test_inputs_of_predict(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    task, model = task_with(checkpoints["vit"])
    run = Run(saved(task, model, tmp_path / "saved"), task)
    photo().save(tmp_path / "photo.png")
    given = [tmp_path / "photo.png", str(tmp_path / "photo.png"), photo(), np.asarray(photo())]
    found = run.predict(given, batch_size=3)
    assert [entry.id for entry in found] == [str(tmp_path / "photo.png")] * 2 + ["2", "3"]
    for entry in found:
        assert entry.probabilities == pytest.approx(found[0].probabilities, abs=1e-5)
        assert entry.probability == max(entry.probabilities.values()) == entry.probabilities[entry.label]
        assert sum(entry.probabilities.values()) == pytest.approx(1)
    assert run.predict([]) == []
    with pytest.raises(UsageError, match="missing"):
        run.predict([tmp_path / "missing.png"])


# --- heads and untrained models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "timm_resnet"])
def test_a_trained_head_is_drawn_anew_unless_it_is_kept(
    checkpoints: dict[str, Path], name: str, tmp_path: Path
) -> None:
    task, model = task_with(checkpoints[name])
    folder = saved(task, model, tmp_path / "first")
    first = AutoModelForImageClassification.from_pretrained(folder)
    _, kept = task_with(folder, "--keep_head=true")
    torch.testing.assert_close(kept.state_dict(), first.state_dict(), rtol=0, atol=0)
    _, fresh = task_with(folder, "--seed=7")
    changed = {key for key, value in fresh.state_dict().items() if not torch.equal(value, first.state_dict()[key])}
    assert changed == {"classifier.weight" if name == "vit" else "timm_model.fc.weight"}  # biases start at zero
    assert fresh.config.id2label == {0: "ant", 1: "bee", 2: "cat"}


@pytest.mark.parametrize("architecture", ["resnet18", "vit", "dinov2", "beit", "swin", "convnext", "resnet"])
def test_an_untrained_architecture(architecture: str, tmp_path: Path) -> None:
    size = 224 if architecture == "swin" else 64
    task, model = task_with(f"random:{architecture}", f"--image_size={size}")
    assert sum(parameter.numel() for parameter in model.parameters()) < 30e6
    check_saved(task, model, tmp_path / "saved", size)


@pytest.mark.parametrize(
    ("name", "message"), [("resnet19", r"no such architecture.*resnet18"), ("bert", "not a model for images")]
)
def test_an_architecture_that_is_none(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        task_with(f"random:{name}")


def test_swin_of_timm_keeps_the_windows_of_its_weights(checkpoints: dict[str, Path]) -> None:
    _, small = task_with(checkpoints["timm_swin"])
    _, large = task_with(checkpoints["timm_swin"], "--image_size=128")
    tables = {key: value for key, value in small.state_dict().items() if key.endswith("relative_position_bias_table")}
    assert tables
    torch.testing.assert_close({key: large.state_dict()[key] for key in tables}, tables, rtol=0, atol=0)
