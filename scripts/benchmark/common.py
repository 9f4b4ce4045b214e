"""What the peers share: the clock, the data, the checkpoint."""

from __future__ import annotations

import csv
import importlib.abc
import os
import sys
import time
from pathlib import Path
from typing import Any

Settings = dict[str, Any]
#: data of the tasks that have no tables here
BUILTIN = {"audio": "pitches", "image-text": "captions"}
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


class Clock:
    """Moments in seconds since the process was started, by the system-wide monotonic clock."""

    def __init__(self) -> None:
        """Take the start from the process that started this one."""
        self.started = float(os.environ["BENCHMARK_STARTED"])
        self.steps: list[float] = []
        self.imported: float | None = None

    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def imports_done(self) -> None:
        """From here on the work itself is counted."""
        self.imported = self.now()

    def watch_steps(self) -> None:
        """Note the end of every step of every torch optimizer of this process, whenever torch comes to be imported."""
        sys.meta_path.insert(0, _WhenTorchIsThere(self.note_step))

    def note_step(self, *_: Any) -> None:
        """A step is over."""
        cuda = sys.modules["torch"].cuda
        if cuda.is_available():
            cuda.synchronize()
        self.steps.append(self.now())


class _WhenTorchIsThere(importlib.abc.MetaPathFinder):
    """Finds no module; asked for each, it registers the hook once torch's optimizers are there.

    Importing torch first instead would take the time of that import away from the command that is measured.
    """

    def __init__(self, hook: Any) -> None:
        self.hook = hook

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        register = getattr(sys.modules.get("torch.optim.optimizer"), "register_optimizer_step_post_hook", None)
        if register is not None and self in sys.meta_path:
            sys.meta_path.remove(self)
            register(self.hook)


def read_table(path: Path, column: str) -> list[dict[str, Any]]:
    """The rows of one split as dicts of `column` and `label`."""
    with path.open(encoding="utf-8", newline="") as file:
        return [{column: row[column], "label": row["label"]} for row in csv.DictReader(file)]


def read_data(settings: Settings) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """The splits with class ids, and the names of the classes."""
    if settings["task"] in BUILTIN:
        return _read_builtin(BUILTIN[settings["task"]])
    column = "image" if settings["task"] == "image" else "text"
    parts = {
        split: read_table(Path(settings["data"], f"{split}.csv"), column) for split in ("train", "validation", "test")
    }
    names = sorted({row["label"] for row in parts["train"]})
    for rows in parts.values():
        for row in rows:
            row["label"] = names.index(row["label"])
    return parts, names


def _read_builtin(name: str) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """As `read_data`."""
    from hftl.builtin import builtin_dataset

    parts = builtin_dataset(name)
    named = {
        split: rows.rename_columns({"caption": "text"} if "caption" in rows.column_names else {})
        for split, rows in parts.items()
    }
    return {split: rows.to_list() for split, rows in named.items()}, parts["train"].features["label"].names


def open_image(path: str, size: int) -> Any:
    """An RGB image, JPEG decoded no larger than needed for `size` pixels."""
    from PIL import Image

    with Image.open(path) as image:
        image.draft("RGB", (2 * size, 2 * size))
        return image.convert("RGB")


def model_folder(settings: Settings) -> Path:
    """The checkpoint as a folder; hftl knows where its built-in ones are."""
    from hftl.builtin import builtin_model

    return builtin_model("efficientnet_lite0" if settings["task"] == "image" else "minilm")


def accuracy_of(result: Any) -> dict[str, float]:
    """For `transformers.Trainer(compute_metrics=…)`."""
    return {"accuracy": float((result.predictions.argmax(-1) == result.label_ids).mean())}
