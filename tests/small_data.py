"""Small made-up data for tests: pictures of coloured squares, sentences of made-up words."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (210, 50, 40)}
#: sides of squares, in pixels
SIZES = {"small": 8, "large": 22}


def write_images(folder: Path, splits: dict[str, int], size: int = 40) -> Path:
    """Class folders of noisy coloured squares: `splits` gives images a class for each split folder."""
    random = np.random.default_rng(0)
    for split, count in splits.items():
        for name, colour in COLOURS.items():
            place = folder / split / name
            place.mkdir(parents=True)
            for index in range(count):
                pixels = random.normal(colour, 40, (size, size, 3)).clip(0, 255).astype("uint8")
                Image.fromarray(pixels).save(place / f"{index}.png")
    return folder


def square(size: str, colour: str, random: np.random.Generator, side: int = 32) -> Image.Image:
    """A small or large square of a colour, anywhere on a noisy ground."""
    pixels = random.normal(128, 30, (side, side, 3))
    length = SIZES[size] + int(random.integers(-2, 3))
    down, across = random.integers(0, side - length + 1, 2)
    pixels[down : down + length, across : across + length] = random.normal(COLOURS[colour], 15, (length, length, 3))
    return Image.fromarray(pixels.clip(0, 255).astype("uint8"))


def write_squares(folder: Path, splits: dict[str, int], seed: int = 0) -> Path:
    """Class folders of small and large squares, `large_red_square`, …: `splits` gives images a class."""
    random = np.random.default_rng(seed)
    for split, count in splits.items():
        for size, colour in itertools.product(SIZES, COLOURS):
            place = folder / split / f"{size}_{colour}_square"
            place.mkdir(parents=True)
            for index in range(count):
                square(size, colour, random).save(place / f"{index}.png")
    return folder


def write_texts(folder: Path, splits: dict[str, int]) -> Path:
    """CSV files of sentences whose class shows in one of their words: `splits` gives rows for each file."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    words = ["the", "film", "was", "a", "long", "day", "with", "some", "people", "in", "it"]
    for split, count in splits.items():
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for index in range(count):
                label = ("bad", "good")[index % 2]
                chosen = random.choice(words, size=int(random.integers(3, 15))).tolist()
                chosen.insert(int(random.integers(0, len(chosen))), label)
                writer.writerow([f"{' '.join(chosen)} {split}{index}", label])
    return folder


def write_tagged(folder: Path, splits: dict[str, int]) -> Path:
    """CoNLL files with a part of speech and a tag for each word; a name is told by the word before it."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    names = ["oslo", "anna", "lima", "new york", "liam", "rosa"]
    for split, count in splits.items():
        lines = []
        for _ in range(count):
            for _ in range(int(random.integers(1, 4))):
                before, kind = [("in", "LOC"), ("with", "PER")][random.integers(2)]
                lines += ["the DET O", f"{random.choice(['film', 'day'])} NOUN O", f"{before} ADP O"]
                for place, name in enumerate(str(random.choice(names)).split()):
                    lines.append(f"{name} PROPN {'BI'[place]}-{kind}")
            lines.append("")
        (folder / f"{split}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def write_choices(folder: Path, splits: dict[str, int]) -> Path:
    """JSONL files of questions with three choices, of which the right one has the question's last word in it."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in splits.items():
        rows = []
        for _ in range(count):
            asked, *others = random.permutation(["film", "day", "people", "good", "bad"])[:3].tolist()
            right = int(random.integers(3))
            choices = [f"it was the {word}" for word in (*others[:right], asked, *others[right:])]
            rows.append({"question": f"what was {asked}", "choices": choices, "label": right})
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def write_pairs(folder: Path, splits: dict[str, int]) -> Path:
    """Tables of pictures as `write_images` makes them, with a text for each; a fifth have none, a fifth no picture."""
    write_images(folder / "pictures", splits)
    for split in splits:
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["photo", "caption", "label"])
            for number, path in enumerate(sorted((folder / "pictures" / split).rglob("*.png"))):
                photo = "" if number % 5 == 1 else path.relative_to(folder).as_posix()
                writer.writerow(
                    [photo, "" if number % 5 == 3 else f"{split} {number} {path.parent.name}", path.parent.name]
                )
    return folder


def write_both(folder: Path) -> Path:
    """Pictures in `images` and sentences in `texts`, of a few rows each, split in the two ways that people name."""
    write_images(folder / "images", {"train": 8, "val": 3, "test": 5})
    write_texts(folder / "texts", {"train": 32, "dev": 11, "test": 13})
    return folder


def write_sounds(folder: Path, splits: dict[str, int], rate: int = 8_000) -> Path:
    """Class folders of noisy tones, low and high, of a quarter to half a second: `splits` gives sounds a class."""
    import soundfile

    random = np.random.default_rng(0)
    for split, count in splits.items():
        for name, pitch in {"high": 1_500, "low": 300}.items():
            place = folder / split / name
            place.mkdir(parents=True)
            for index in range(count):
                moments = np.arange(int(rate * random.uniform(0.25, 0.5))) / rate
                wave = 0.3 * np.sin(2 * np.pi * pitch * random.uniform(0.9, 1.1) * moments)
                soundfile.write(place / f"{index}.wav", wave + random.normal(0, 0.02, len(wave)), rate)
    return folder


def write_late_sounds(folder: Path, splits: dict[str, int], rate: int = 8_000) -> Path:
    """Class folders of recordings that differ in their last 0.8 s alone; before these are 0.55 to 0.75 s of silence."""
    import soundfile

    random = np.random.default_rng(0)
    for split, count in splits.items():
        for name, pitch in {"high": 1_500, "low": 300}.items():
            place = folder / split / name
            place.mkdir(parents=True)
            for index in range(count):
                moments = np.arange(int(rate * 0.8)) / rate
                wave = 0.3 * np.sin(2 * np.pi * pitch * random.uniform(0.9, 1.1) * moments)
                silence = np.zeros(int(rate * random.uniform(0.55, 0.75)))
                soundfile.write(place / f"{index}.wav", np.concatenate([silence, wave]), rate)
    return folder


def write_videos(folder: Path, splits: dict[str, int], side: int = 24, frames: int = 6) -> Path:
    """Class folders of a square that moves to the left or to the right: `splits` gives videos a class."""
    from hftl.video import as_video

    random = np.random.default_rng(0)
    for split, count in splits.items():
        for name, way in {"left": -3, "right": 3}.items():
            place = folder / split / name
            place.mkdir(parents=True)
            for index in range(count):
                picture = random.normal(40, 10, (side, side, 3))
                picture[8:16, 8:16] = random.uniform(120, 220, 3)
                moved = [np.roll(picture, (int(random.integers(3)), way * frame), (0, 1)) for frame in range(frames)]
                (place / f"{index}.mkv").write_bytes(as_video(np.stack(moved).clip(0, 255).astype(np.uint8)))
    return folder
