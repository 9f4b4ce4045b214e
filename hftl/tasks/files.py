"""Rows that name a file each: read when they are asked for, with a random part that can be told beforehand."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.utils.data import Dataset

from hftl.data import column_of
from hftl.sources import file_key, source_of


class FileDataset(Dataset[dict[str, Any]]):
    """Rows with a file and perhaps a label, as what the model takes; subclasses say how, in `example`.

    With a seed, what is random in an example is a function of (seed, epoch, row): the same for any number of workers
    and processes, and after an interruption. A `view` is random once and for all, whatever seed and epoch.
    """

    #: column of the files
    column: ClassVar[str]

    def __init__(self, rows: Any, seed: int | None = None, view: int | None = None) -> None:
        """Keep the rows; nothing is read yet."""
        self.rows, self.seed, self.view = rows, seed, view
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that live on see it change

    def example(self, value: Any) -> dict[str, Any]:
        """What the model takes of the file in a row."""
        raise NotImplementedError

    @staticmethod
    def content_key(value: Any, full: bool) -> bytes:
        """16 bytes for the content of a file; by all of it where `full`."""
        source, name = source_of(value, "a file", "or both")
        return file_key(source or "", name, full)

    def set_epoch(self, epoch: int) -> None:
        """Choose what is random in the next pass."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        """Number of files."""
        return len(self.rows)

    def _draw(self, seed: int, index: int) -> int:
        return seed * 7_919 + int(self.epoch) * 1_000_003 + index * 104_729

    @functools.cached_property
    def _paths(self) -> list[Any] | None:
        """The column where it holds paths, which is read at once in a fraction of the time; None of other values."""
        is_path = len(self.rows) > 0 and isinstance(self.rows[0][self.column], str)
        return list(column_of(self.rows, self.column)) if is_path else None

    @property
    def labels(self) -> list[Any] | None:
        """As `hftl.data.labels_of`, where the rows have them."""
        return self.rows["label"][:] if "label" in getattr(self.rows, "column_names", ()) else None

    def key(self, index: int, full: bool = False) -> int:
        """64 bits for the content of a file and, of an augmented view, its number."""
        view = "" if self.view is None else f" view {self.view}"
        value = self.rows[index][self.column] if self._paths is None else self._paths[index]
        digest = self.content_key(value, full) + view.encode()
        return int.from_bytes(hashlib.blake2b(digest, digest_size=8).digest(), "little")

    def __getitem__(self, index: int) -> dict[str, Any]:
        """What `example` gives, and `labels` where the row has one."""
        row = self.rows[index]
        if self.seed is None and self.view is None:
            example = self.example(row[self.column])
        else:
            drawn = self.key(index) if self.seed is None else self._draw(self.seed, index)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(drawn % 2**63)
                example = self.example(row[self.column])
        if "label" in row:
            example["labels"] = row["label"]
        return example


class PreparedDataset(FileDataset):
    """Rows whose file a function of the task prepares, augmented where that is wanted."""

    def __init__(
        self,
        rows: Any,
        inputs: Callable[..., dict[str, Any]],
        *augmentation: Any,
        seed: int | None = None,
        view: int | None = None,
    ) -> None:
        """`inputs` gives what the model takes of a file: `(value, *augmentation) → inputs`."""
        super().__init__(rows, seed, view)
        self.inputs, self.augmentation = inputs, augmentation

    def example(self, value: Any) -> dict[str, Any]:
        """What the model takes of one file."""
        return self.inputs(value, *self.augmentation)
