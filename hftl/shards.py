"""Rows of numbers on disk, written once and found by a key: what `hftl.features` keeps.

Shards are written beside their place and renamed, each under a name of its own: several processes and runs may fill one
folder, and an interrupted extraction goes on.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import time
import uuid
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hftl.folder import A_DAY, read_json, replacing, say, write_json

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
#: numpy has no bfloat16: the bits are kept as whole numbers
_STORED: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype("int16"),
    "float32": np.dtype("float32"),
}


#: bytes read before their memory is given back: mapped pages count as memory of the process
_UNRELEASED = 2**26


class NotKept(Exception):
    """The activations cannot be kept, and training goes on without; the message says why."""


class _Shard(NamedTuple):
    """Values of all rows, the keys of the rows and where each ends, and the file that the values are read from."""

    values: np.ndarray[Any, Any]
    keys: np.ndarray[Any, Any]
    ends: np.ndarray[Any, Any]
    mapped: mmap.mmap

    def release(self) -> None:
        """Give back the memory of what was read; it is read again when it is asked for."""
        self.mapped.madvise(mmap.MADV_DONTNEED)


class Shards:
    """Rows of numbers on disk, found by the 64 bits of their key.

    Attributes:
        settings: `dtype` (float16, bfloat16 or float32), `shape` of a row (without its tokens where rows are ragged),
            `ragged`, and what `hftl cache ls` shows.
    """

    def __init__(self, folder: Path, settings: Callable[[], dict[str, Any]]) -> None:
        """Open the shards in a folder; `settings` is only called where there are none yet.

        Raises:
            NotKept: the folder cannot be written.
        """
        self.folder = folder
        path = folder / "settings.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                write_json(path, settings())
            os.utime(path)  # last used
            _remove_orphans(folder)
            self.settings = read_json(path)
        except (OSError, ValueError) as error:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only an empty one can be removed
            raise NotKept(f"{folder} cannot be used: {getattr(error, 'strerror', None) or error}") from error
        self.dtype = DTYPES[self.settings["dtype"]]
        self._opened: dict[Path, _Shard] = {}
        self._unreleased = 0
        self.reload()

    def reload(self) -> None:
        """Look at the shards anew; a damaged one is removed, and its rows count as missing."""
        for path in sorted(self.folder.glob("[!.]*.npz")):  # with a dot before the name it is being written
            if path not in self._opened:
                shard = self._open(path)
                if shard is not None:
                    self._opened[path] = shard
        self._shards = list(self._opened.values())
        keys = [shard.keys for shard in self._shards]
        places = [
            np.stack([np.full_like(ends, number), ends - np.diff(ends, prepend=0), ends], axis=1)
            for number, ends in enumerate(shard.ends for shard in self._shards)
        ]
        every = np.concatenate(keys) if keys else np.empty(0, np.uint64)
        order = np.argsort(every, kind="stable")
        self._keys = every[order]
        self._places = (np.concatenate(places) if places else np.empty((0, 3), np.int64))[order]

    def _open(self, path: Path) -> _Shard | None:
        """A shard, or None where it is damaged."""
        data = path.with_suffix(".bin")
        try:
            with np.load(path) as index:
                keys, ends, checksum = index["keys"], index["ends"], int(index["checksum"])
            with data.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            shard = _Shard(np.frombuffer(mapped, dtype=_STORED[self.settings["dtype"]]), keys, ends, mapped)
            if len(shard.values) == ends[-1] and zlib.crc32(mapped) == checksum:
                shard.release()
                return shard
            reason = "its checksum is another"
        # zipfile has a RuntimeError for what it takes to be encrypted, or packed in a way that it does not know
        except (FileNotFoundError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
            reason = str(error)
        except OSError as error:  # too many open files, say: that is no fault of the shard
            raise NotKept(f"{data} cannot be read: {error.strerror}") from error
        say(f"feature cache: a shard in {self.folder} is damaged ({reason}): its rows are computed again")
        path.unlink(missing_ok=True)
        data.unlink(missing_ok=True)
        return None

    def find(self, keys: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Where the rows with these keys are: shard, start and end of each, shape (rows, 3); shard -1 for none."""
        positions = np.searchsorted(self._keys, keys)
        found = np.full((len(keys), 3), -1, dtype=np.int64)
        inside = positions < len(self._keys)
        inside[inside] = self._keys[positions[inside]] == keys[inside]
        found[inside] = self._places[positions[inside]]
        return found

    def read(self, place: np.ndarray[Any, Any]) -> torch.Tensor:
        """One row from its place."""
        number, start, end = place
        self._unreleased += int(end - start) * self.dtype.itemsize
        if self._unreleased > _UNRELEASED:
            self.release()
        rows = self._typed(np.array(self._shards[number].values[start:end]))
        return rows if self.settings["ragged"] else rows[0]

    def read_rows(self, places: np.ndarray[Any, Any]) -> torch.Tensor:
        """Rows of one size from their places, shape (rows, *shape)."""
        width = math.prod(self.settings["shape"])
        values = np.empty((len(places), width), _STORED[self.settings["dtype"]])
        for number in np.unique(places[:, 0]):
            chosen = places[:, 0] == number
            values[chosen] = self._shards[number].values.reshape(-1, width)[places[chosen, 1] // width]
            self._shards[number].release()
        return self._typed(values)

    def _typed(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        """Numbers as they are stored, as rows."""
        found = torch.from_numpy(values)
        found = found.view(torch.bfloat16) if self.settings["dtype"] == "bfloat16" else found
        return found.view(-1, *self.settings["shape"])

    def release(self) -> None:
        """Give back the memory of what was read so far."""
        self._unreleased = 0
        for shard in self._shards:
            shard.release()

    def write(self, keys: np.ndarray[Any, Any], rows: Sequence[torch.Tensor]) -> None:
        """Publish rows as one shard.

        Raises:
            NotKept: the disk is full, or a value is too large for the kept type.
        """
        values = torch.cat([row.to(self.dtype).flatten() for row in rows])
        if not torch.isfinite(values).all():
            raise NotKept(f"some activations are too large for {self.settings['dtype']}: --feature_cache_dtype float32")
        stored = values.view(torch.int16).numpy() if self.dtype is torch.bfloat16 else values.numpy()
        name = uuid.uuid4().hex
        ends = np.cumsum([row.numel() for row in rows])
        try:
            with replacing(self.folder / f"{name}.bin") as beside:
                stored.tofile(beside)
            with replacing(self.folder / f"{name}.npz") as beside, beside.open("wb") as file:
                np.savez(file, keys=keys, ends=ends, checksum=np.int64(zlib.crc32(stored.data)))
        except OSError as error:
            with contextlib.suppress(OSError):  # as here, what cannot be written
                (self.folder / f"{name}.bin").unlink(missing_ok=True)
            removed = isinstance(error, FileNotFoundError)
            reason = "its folder was removed meanwhile" if removed else error.strerror or error
            raise NotKept(f"the cache cannot be written: {reason}") from error


def _remove_orphans(folder: Path) -> None:
    """Remove what a killed process left half-written a day ago."""
    for path in (*folder.glob(".*"), *folder.glob("*.bin")):
        with contextlib.suppress(FileNotFoundError):  # another process removes it too
            left = path.name.startswith(".") or not path.with_suffix(".npz").is_file()
            if left and time.time() - path.stat().st_mtime > A_DAY:
                path.unlink()
