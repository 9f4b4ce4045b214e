"""Training pictures at working size, kept on disk so that the second epoch decodes nothing.

One file a picture, written by whoever decodes it first (a process, one of its workers) beside its place and renamed: no
process waits for another, nothing is lost when a run stops, and runs at the same time share what they find. Files are
read, not mapped: mapped pages would count as memory of the process, and it reads a whole picture anyway.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hftl.builtin import cache_folder
from hftl.folder import nearest_existing, replacing, say
from hftl.images import content_key, image_header_size

#: mark, height, width, checksum of the pixels; the mark changes with the format and with how pictures are resized
_HEADER = struct.Struct("<8sIII")
_MARK = b"hftlpic1"
#: rows looked at to judge a data set: enough for its median size
_SAMPLE = 64
#: `auto` starts at photos whose shorter side is so many times the working side. Core time of a training image at 317
#: pixels (measured): 11.4 ms decoded and 0.8 kept for 3000 x 2000 photos, 1.2 and 0.7 for 500 x 375 ones. One step of
#: efficientnet_lite0 takes 46 ms an image, so that the first pays and the second is not worth the disk.
_MUCH_LARGER = 2


class ImageCache:
    """Pictures at working size, decoded once.

    What it gives does not depend on what is kept: a picture is resized to the same pixels where it is decoded anew.
    """

    def __init__(self, side: int, decoded: int, open_image: Callable[[Any], Image.Image], folder: Path | None) -> None:
        """Nothing is read or written yet.

        Args:
            side: shorter side of the pictures in pixels; smaller ones stay as they are.
            decoded: shorter side that `open_image` decodes to at least.
            open_image: an RGB image from a path, bytes or a `{"bytes", "path"}` dict.
            folder: where they are kept; None where they are not.
        """
        self.side, self.decoded, self.open_image, self.folder = side, decoded, open_image, folder

    def picture(self, value: Any) -> np.ndarray[Any, Any]:
        """The picture of a path, bytes or a `{"bytes", "path"}` dict, uint8 of shape (height, width, 3).

        Raises:
            UsageError: it cannot be read as an image.
        """
        if self.folder is None:
            return self._decoded(value)
        path = _place(self.folder, picture_key(value, self.side, self.decoded))
        pixels = _read(path)
        if pixels is None:
            pixels = self._decoded(value)
            self._keep(path, pixels)
        return pixels

    def _decoded(self, value: Any) -> np.ndarray[Any, Any]:
        image = self.open_image(value)
        size = _working_size(image.size, self.side)
        return np.array(image if size == image.size else image.resize(size, Image.Resampling.BICUBIC))

    def _keep(self, path: Path, pixels: np.ndarray[Any, Any]) -> None:
        """Write a picture; a disk that takes no more ends the keeping, not the training."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as beside, beside.open("wb") as file:
                file.write(_HEADER.pack(_MARK, *pixels.shape[:2], _checksum(pixels)))
                file.write(pixels.data)
        except OSError as error:
            say(f"images: no more are kept in {self.folder}: {error.strerror or error}")
            self.folder = None


def picture_key(value: Any, side: int, decoded: int) -> bytes:
    """16 bytes that name a picture's content, decoded and at a working size, wherever its file lies (`content_key`).

    Raises:
        UsageError: there is no such file.
    """
    sizes = struct.pack("<II", side, decoded)
    return hashlib.blake2b(_MARK + sizes + content_key(value), digest_size=16).digest()


def _place(folder: Path, digest: bytes) -> Path:
    name = digest.hex()
    return folder / name[:2] / name[2:]  # 256 folders: some file systems are slow with many files in one


def _working_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height with a shorter side of `side`; never larger than it is."""
    shorter = min(size)
    if shorter <= side:
        return size
    return round(size[0] * side / shorter), round(size[1] * side / shorter)


def _read(path: Path) -> np.ndarray[Any, Any] | None:
    """A kept picture; None where there is none, or a damaged one, which is said."""
    try:
        content = np.fromfile(path, dtype=np.uint8)
    except FileNotFoundError:
        return None
    except OSError as error:
        say(f"images: the kept picture {path} cannot be read ({error.strerror}) and is made again")
        return None
    if len(content) > _HEADER.size:
        mark, height, width, checksum = _HEADER.unpack_from(content.data)
        pixels = content[_HEADER.size :]
        if mark == _MARK and len(pixels) == height * width * 3:
            pixels = pixels.reshape(height, width, 3)
            if _checksum(pixels) == checksum:
                return pixels
    say(f"images: the kept picture {path} is damaged and is made again")
    return None


def _checksum(pixels: np.ndarray[Any, Any]) -> int:
    """Of shape and content: 0.1 ms for 317 x 423 pixels."""
    return zlib.crc32(pixels.data, pixels.shape[0] << 16 ^ pixels.shape[1])


def plan_cache(
    rows: Any,
    side: int,
    decoded: int,
    open_image: Callable[[Any], Image.Image],
    mode: str,
    epochs: float,
    limit_gb: float,
) -> ImageCache | None:
    """The cache for the training pictures `rows`, or None where they are to be decoded every time.

    Whether there is one depends on the data and the arguments alone, so that all processes and a resumed run agree;
    whether its pictures are kept depends on the disk too. Half of the free space is left to others.

    Args:
        rows: rows with an "image".
        side: working size, the shorter side in pixels.
        decoded: see `ImageCache`.
        open_image: see `ImageCache`.
        mode: auto, on or off. `auto`: for more than one epoch of photos that are much larger than they are used.
        epochs: passes over the rows.
        limit_gb: what the folder of all kept pictures may grow to, in 10^9 bytes.
    """
    if mode == "off" or (mode == "auto" and epochs <= 1) or not len(rows):
        return None
    sample = [rows[int(index)]["image"] for index in np.linspace(0, len(rows) - 1, min(_SAMPLE, len(rows)))]
    if any(isinstance(value, Image.Image | np.ndarray) for value in sample):
        return None  # decoded already
    sizes = {row: size for row, value in enumerate(sample) if (size := image_header_size(value))}
    if not sizes or (mode == "auto" and np.median([min(size) for size in sizes.values()]) < _MUCH_LARGER * side):
        return None
    folder = cache_folder() / "images"
    each = float(
        np.mean([3 * width * height for width, height in (_working_size(size, side) for size in sizes.values())])
    )
    missing = np.mean([not _place(folder, picture_key(sample[row], side, decoded)).is_file() for row in sizes])
    needed = each * len(rows) * float(missing)
    room = min(limit_gb * 1e9 - _bytes_kept(folder), shutil.disk_usage(nearest_existing(folder)).free / 2)
    if needed > room:
        say(
            f"images: decoded in every epoch; keeping them takes {needed / 1e9:.2g} GB and there is room for "
            f"{max(0, room) / 1e9:.2g} GB in {folder} (--image_cache_gb {limit_gb:g}, half of the free space)"
        )
        return ImageCache(side, decoded, open_image, None)
    state = "kept from before" if not missing else f"kept for later epochs, {each * len(rows) / 1e9:.2g} GB"
    say(f"images: {state}, at {side} pixels in {folder} (--image_cache off: decoded every time)")
    return ImageCache(side, decoded, open_image, folder)


def _bytes_kept(folder: Path) -> int:
    """Bytes of all pictures in `folder`; what a killed process left half-written a day ago is removed."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            try:
                state = path.stat()
                if name.startswith(".") and time.time() - state.st_mtime > 86_400:
                    path.unlink()
                    continue
            except FileNotFoundError:  # another process renamed or removed it
                continue
            total += state.st_size
    return total
