"""Where a file's content comes from: a path, bytes, or both as `datasets` gives them; and a name for that content."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from hftl.errors import UsageError

#: how much of a file's beginning and end stands for its content
_PART = 65_536
#: files that are in memory at once, where a data set holds them
AT_ONCE = 256
#: of them for a thread: to hand over one alone takes longer than to hash it
_PIECE = 16
#: files that are looked at one after another first, and the seconds for one from which on threads pay: below, they wait
#: for each other longer than for the disk (small files, two cores: 0.06 ms one by one and 0.16 by threads; photographs
#: that are decoded 0.59 and 0.40)
_TRIED, _SLOW = 64, 2.5e-4
Value = TypeVar("Value")
Result = TypeVar("Result")


def source_of(value: Any, kind: str, otherwise: str) -> tuple[str | bytes | None, str]:
    """The bytes or the path of a file, and what to call it in messages.

    Args:
        value: a path, bytes, or `{"bytes", "path"}`.
        kind: what it should be, with its article: "an image".
        otherwise: what else could be given, for the message.

    Raises:
        UsageError: it is none of these.
    """
    if isinstance(value, dict):
        path = value.get("path")
        content = value.get("bytes")
        return (path, str(path)) if content is None else (content, str(path or f"{kind} given as bytes"))
    if isinstance(value, bytes):
        return value, f"{kind} given as bytes"
    if value is None or isinstance(value, (str, os.PathLike)):
        return (None, "no file") if value is None else (os.fspath(value), os.fspath(value))
    raise UsageError(f"{kind} cannot be made from {type(value).__name__}: give a path, bytes, {otherwise}")


def opened(source: str | bytes) -> Any:
    """What decoders read: the path itself, or the bytes as a file."""
    return io.BytesIO(source) if isinstance(source, bytes) else source


def missing(source: str | bytes | None) -> str | None:
    """Why there is nothing to read, or None."""
    if source is None or source == "":
        return "no file named"
    if isinstance(source, str) and not os.path.isfile(source):
        return f"no such file: {source}"
    return None


def file_key(source: str | bytes, name: str, full: bool = False, dated: bool = True) -> bytes:
    """16 bytes that stand for the content of a file.

    Of one on the disk: its size, time of change (where `dated`), first and last 64 KiB, whatever it is called; all of
    it where `full`.

    Raises:
        UsageError: it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(source, bytes):
        digest.update(source)
        return digest.digest()
    try:
        with open(source, "rb") as file:
            state = os.fstat(file.fileno())
            if full:
                digest.update(file.read())
                return digest.digest()
            changed = state.st_mtime_ns if dated else ""
            digest.update(f"{state.st_size} {changed}".encode() + file.read(_PART))
            file.seek(max(_PART, state.st_size - _PART))
            digest.update(file.read())
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror}") from error
    return digest.digest()


def in_threads(function: Callable[[Value], Result], values: Iterable[Value]) -> list[Result]:
    """What a function says of each file, in order; by several threads where the first ones take long.

    Args:
        function: reads a file.
        values: files, of which `AT_ONCE` are held at a time.
    """
    values, started = iter(values), time.monotonic()
    results = [function(value) for value in itertools.islice(values, _TRIED)]
    if time.monotonic() - started < _SLOW * len(results):
        return results + [function(value) for value in values]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        while several := list(itertools.islice(values, AT_ONCE)):
            pieces = [several[start : start + _PIECE] for start in range(0, len(several), _PIECE)]
            for found in pool.map(lambda piece: [function(value) for value in piece], pieces):
                results += found
    return results
