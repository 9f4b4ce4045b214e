"""The data of the benchmark as tables that every peer reads: images/ and texts/ with train, validation and test.

`python -m benchmark.prepare FOLDER` writes the built-in data sets in the layout of `--data-root`.
"""

from __future__ import annotations

import csv
import os
import random
import shutil
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SPLITS = ("train", "validation", "test")
Rows = list[tuple[str, str]]  # image path or text, label


def write_builtin(folder: Path) -> None:
    """The built-in digits as class folders and the movie snippets as tables; both splits as hftl has them."""
    from hftl.builtin import builtin_dataset

    for split, rows in builtin_dataset("digits").items():
        for row in rows:
            place = folder / "dogs_cats" / split / str(row["label"])
            place.mkdir(parents=True, exist_ok=True)
            (place / row["image"]["path"]).write_bytes(row["image"]["bytes"])
    (folder / "movie_snippets").mkdir()
    for split, rows in builtin_dataset("movie-snippets").items():
        _write_table(folder / "movie_snippets" / f"{split}.csv", "text", [(row["text"], row["label"]) for row in rows])


def prepare(data_root: Path | None, work: Path, environment: dict[str, str], rows: int, quick: bool) -> Path:
    """Write images/{train,validation,test}.csv and texts/… into `work`/data and return that folder.

    Args:
        data_root: holds dogs_cats/{train,test}/CLASS/ and movie_snippets/{train,validation,test}.csv; None takes the
            built-in data.
        work: an empty folder.
        environment: of the process that writes the built-in data.
        rows: training rows for text (of images all), a stratified part.
        quick: 48 and 64 training rows, 16 and 16 of the other splits.

    Raises:
        ValueError: `data_root` does not hold what it should.
    """
    if data_root is None:
        data_root = work / "builtin"
        subprocess.run([sys.executable, "-m", "benchmark.prepare", str(data_root)], env=environment, check=True)
    images, texts = _read_images(data_root / "dogs_cats"), _read_texts(data_root / "movie_snippets")
    if "validation" not in images:  # a tenth of train, the same for every peer
        images["validation"], images["train"] = _cut(images["train"], max(1, len(images["train"]) // 10))
    texts["train"], _ = _cut(texts["train"], rows)
    if quick:
        for parts, count in ((images, 48), (texts, 64)):
            for split in SPLITS:
                parts[split], _ = _cut(parts[split], count if split == "train" else 16)
    for name, column, parts in (("images", "image", images), ("texts", "text", texts)):
        (work / "data" / name).mkdir(parents=True)
        for split in SPLITS:
            _write_table(work / "data" / name / f"{split}.csv", column, parts[split])
    return work / "data"


def _cut(rows: Rows, count: int) -> tuple[Rows, Rows]:
    """A seeded part of `count` rows with the classes in proportion, and the rest."""
    classes: dict[str, Rows] = defaultdict(list)
    for row in random.Random(0).sample(rows, len(rows)):
        classes[row[1]].append(row)
    # Every class in turn by how much of it is still wanted: its i-th of n rows stands at (i + 0.5) / n.
    places = [((index + 0.5) / len(part), row) for part in classes.values() for index, row in enumerate(part)]
    ordered = [row for _, row in sorted(places)]
    return ordered[:count], ordered[count:]


def _read_images(folder: Path) -> dict[str, Rows]:
    parts: dict[str, Rows] = {}
    for split in SPLITS:
        files = sorted((folder / split).glob("*/*"))
        if files:
            parts[split] = [(str(file.resolve()), file.parent.name) for file in files]
    if not {"train", "test"} <= set(parts):
        raise ValueError(f"{folder} needs train/CLASS/ and test/CLASS/ with images in them")
    return parts


def _read_texts(folder: Path) -> dict[str, Rows]:
    parts: dict[str, Rows] = {}
    for split in SPLITS:
        path = folder / f"{split}.csv"
        if not path.is_file():
            raise ValueError(f"{folder} needs train.csv, validation.csv and test.csv with columns text and label")
        with path.open(encoding="utf-8", newline="") as file:
            parts[split] = [(row["text"], row["label"]) for row in csv.DictReader(file)]
    return parts


def _write_table(path: Path, column: str, rows: Rows) -> None:
    """`other_label` holds the same classes under other names: a second label column whose accuracy is comparable."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([column, "label", "other_label"])
        writer.writerows([value, label, f"kind {label}"] for value, label in rows)


def many_images(data: Path, target: Path, count: int) -> Path:
    """A folder of tables like `data`/images with `count` training images, each of its own (cut out of those there)."""
    from PIL import Image

    with (data / "images" / "train.csv").open(encoding="utf-8", newline="") as file:
        sources = [(row["image"], row["label"]) for row in csv.DictReader(file)]
    (target / "files").mkdir(parents=True)

    def write(index: int) -> tuple[str, str]:
        source, label = sources[index % len(sources)]
        path = target / "files" / f"{index}.jpg"
        turn = index // len(sources)
        with Image.open(source) as image:
            image.draft("RGB", (160, 160))
            small = image.convert("RGB").resize((160, 160))
        small.crop((turn % 16, turn // 16, 128 + turn % 16, 128 + turn // 16)).save(path, quality=85)
        return str(path), label

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        _write_table(target / "train.csv", "image", list(pool.map(write, range(count))))
    for split in ("validation", "test"):
        shutil.copyfile(data / "images" / f"{split}.csv", target / f"{split}.csv")
    return target


if __name__ == "__main__":
    write_builtin(Path(sys.argv[1]))
