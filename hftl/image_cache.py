"""Training pictures at working size, and what validation makes of its own: on disk, so that they are decoded once.

One file a picture, written by whoever decodes it first (a process, one of its workers) beside its place and renamed: no
process waits for another, nothing is lost when a run stops, and runs at the same time share what they find. Files are
read, not mapped: mapped pages would count as memory of the process, and it reads a whole picture anyway.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hftl.builtin import cache_folder
from hftl.folder import mark_as_used, nearest_existing, replacing, say, tidy
from hftl.images import content_key, image_header_size

#: mark, sizes, type of the values; the mark changes with the format and with how pictures are resized
_HEADER = struct.Struct("<8sIII4s")
_CHECKSUM = struct.Struct("<I")
_MARK = b"hftlpic3"
#: rows looked at to judge a data set: enough for its median size
_SAMPLE = 64
#: `auto` starts at photos whose shorter side is so many times the working side. Core time of a training image at 317
#: pixels (measured): 11.4 ms decoded and 0.8 kept for 3000 x 2000 photos, 1.2 and 0.7 for 500 x 375 ones. One step of
#: efficientnet_lite0 takes 46 ms an image, so that the first pays and the second is not worth the disk.
_MUCH_LARGER = 2


class ImageCache:
    """What is made of a picture, made once.

    What it gives does not depend on what is kept: it is the same where it is made anew.

    Attributes:
        folder: where it is kept; None where it is not.
        missing_bytes: what is still to be written there, as far as that was foreseen.
    """

    def __init__(self, make: Callable[[Any], np.ndarray[Any, Any]], settings: str) -> None:
        """Nothing is kept before `plan` has found a place.

        Args:
            make: an array of three dimensions, of a path, bytes or a `{"bytes", "path"}` dict.
            settings: all that it depends on beside the file.
        """
        self.make, self.settings, self.missing_bytes = make, settings, 0.0
        self.folder: Path | None = None

    def __call__(self, value: Any) -> np.ndarray[Any, Any]:
        """What is made of a path, bytes or a `{"bytes", "path"}` dict.

        Raises:
            UsageError: it cannot be read as an image.
        """
        if self.folder is None:
            return self.make(value)
        path = _place(self.folder, picture_key(value, self.settings))
        made = _read(path)
        if made is None:
            made = self.make(value)
            self._keep(path, made)
        return made

    def _keep(self, path: Path, made: np.ndarray[Any, Any]) -> None:
        """Write what was made; a disk that takes no more ends the keeping, not the training."""
        made = np.ascontiguousarray(made)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as beside, beside.open("wb") as file:
                header = _HEADER.pack(_MARK, *made.shape, made.dtype.str.encode())
                file.write(header + _CHECKSUM.pack(_checksum(header, made)))
                file.write(made.data)
        except OSError as error:
            say(f"images: no more are kept in {self.folder}: {error.strerror or error}")
            self.folder = None

    def plan(
        self,
        rows: Any,
        each: Callable[[tuple[int, int]], int],
        limit_gb: float,
        what: str,
        others: float = 0.0,
    ) -> None:
        """Keep what is made of `rows`, if there is room for all of it; either is said.

        Half of the free space is left to others.

        Args:
            rows: rows with an "image", for which it `pays`.
            each: bytes that are kept of a picture, of its width and height.
            limit_gb: what the folder of all that is kept may grow to, in 10^9 bytes.
            what: how messages call it.
            others: bytes that are to be written there beside.
        """
        folder = cache_folder() / "images"
        used = tidy(folder)  # of what is missing afterwards
        sizes = _sizes(rows)
        mean = float(np.mean([each(size) for _, size in sizes]))
        missing = [not _place(folder, picture_key(value, self.settings)).is_file() for value, _ in sizes]
        needed = mean * len(rows) * float(np.mean(missing))
        free = shutil.disk_usage(nearest_existing(folder)).free
        room = min(limit_gb * 1e9 - used, free / 2) - others
        if needed > room:
            say(
                f"{what}: decoded in every epoch; keeping them takes {needed / 1e9:.2g} GB and there is "
                f"room for {max(0, room) / 1e9:.2g} GB in {folder} (--image_cache_gb {limit_gb:g}, half of the free "
                "space; hftl cache rm images)"
            )
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            say(f"{what}: decoded in every epoch, since {folder} cannot be used: {error.strerror or error}")
            return
        state = f"kept for later epochs, {mean * len(rows) / 1e9:.2g} GB" if any(missing) else "kept from before"
        say(f"{what}: {state}, in {folder} (--image_cache off: decoded every time)")
        self.folder, self.missing_bytes = folder, needed


def at_working_size(value: Any, side: int, open_image: Callable[[Any], Image.Image]) -> np.ndarray[Any, Any]:
    """A picture with a shorter side of no more than `side` pixels, uint8 of shape (height, width, 3)."""
    image = open_image(value)
    size = working_size(image.size, side)
    return np.array(image if size == image.size else image.resize(size, Image.Resampling.BICUBIC))


def picture_key(value: Any, settings: str) -> bytes:
    """16 bytes that name a picture's content, and what is made of it, wherever its file lies (`content_key`).

    Raises:
        UsageError: there is no such file.
    """
    return hashlib.blake2b(_MARK + settings.encode() + content_key(value), digest_size=16).digest()


def _place(folder: Path, digest: bytes) -> Path:
    name = digest.hex()
    return folder / name[:2] / name[2:]  # 256 folders: some file systems are slow with many files in one


def working_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height with a shorter side of `side`; never larger than it is."""
    shorter = min(size)
    if shorter <= side:
        return size
    return round(size[0] * side / shorter), round(size[1] * side / shorter)


def _read(path: Path) -> np.ndarray[Any, Any] | None:
    """What is kept; None where there is nothing, or it is damaged, which is said."""
    try:
        content = np.fromfile(path, dtype=np.uint8)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        say(f"images: the kept picture {path} cannot be read ({error.strerror}) and is made again")
        return None
    start = _HEADER.size + _CHECKSUM.size
    if len(content) > start:
        header, values = content[: _HEADER.size].tobytes(), content[start:]
        mark, *shape, kind = _HEADER.unpack(header)
        if mark == _MARK and _CHECKSUM.unpack_from(content.data, _HEADER.size) == (_checksum(header, values),):
            mark_as_used(path)
            return values.view(np.dtype(kind.rstrip(b"\0").decode())).reshape(shape)
    say(f"images: the kept picture {path} is damaged and is made again")
    return None


def _checksum(header: bytes, made: np.ndarray[Any, Any]) -> int:
    """Of shape, type and content: 0.1 ms for 317 x 423 pixels."""
    return zlib.crc32(made.data, zlib.crc32(header))


def pays(rows: Any, side: int, mode: str, epochs: float) -> bool:
    """Whether pictures are to be kept, as far as the arguments and the data say.

    All processes and a resumed run agree on it; whether they are kept depends on the disk too.

    Args:
        rows: rows with an "image".
        side: working size, the shorter side in pixels.
        mode: auto, on or off. `auto`: for more than one epoch of photos that are much larger than they are used.
        epochs: passes over the rows.
    """
    if mode == "off" or (mode == "auto" and epochs <= 1):
        return False
    sizes = [min(size) for _, size in _sizes(rows)]
    return bool(sizes) and (mode == "on" or float(np.median(sizes)) >= _MUCH_LARGER * side)


def _sizes(rows: Any) -> list[tuple[Any, tuple[int, int]]]:
    """Some of the pictures, with width and height; none where they are decoded already."""
    if not len(rows):
        return []
    values = [rows[int(index)]["image"] for index in np.linspace(0, len(rows) - 1, min(_SAMPLE, len(rows)))]
    if any(isinstance(value, Image.Image | np.ndarray) for value in values):
        return []
    return [(value, size) for value in values if (size := image_header_size(value))]
