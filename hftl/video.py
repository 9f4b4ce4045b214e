"""Videos of any format as a few of their frames, and why one cannot be read.

Decoded by PyAV, which brings FFmpeg's libraries with it: torchcodec, which `datasets` would decode with, needs those of
the system.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from hftl.errors import UsageError
from hftl.sources import file_key, missing, opened, source_of

#: frames, height, width, and red, green and blue from 0 to 255
Frames = npt.NDArray[np.uint8]

#: seconds beyond which a file is no video of one thing
_LONGEST = 3600.0
#: frames between two that are wanted, from which on it is faster to look for the second than to decode those between
_FAR = 100
#: frames that are looked at to see whether a file can be read
_LOOKED_AT = 8


def open_video(value: Any, wanted: int, shares: npt.NDArray[np.float64] | float = 0.5) -> Frames:
    """Some frames of a video, one from each of as many equal parts of it (Wang et al. 2016), uint8 (frames, h, w, 3).

    Args:
        value: a path, bytes, `{"bytes", "path"}`, or frames as an array of shape (frames, height, width[, 3]).
        wanted: how many; of a shorter video some come more than once.
        shares: where in its part each lies, from 0 to 1: the middle by default.

    Raises:
        UsageError: there is no such file, or it is no video that can be read.
    """
    if isinstance(value, np.ndarray):
        frames = _from_array(value)
        return frames[_places(len(frames), wanted, shares)]
    source, name = _source(value)
    if not source:
        raise UsageError(f"no video is named in {value!r}")
    with _explained(name), _container(source) as (container, stream):
        count = _count(container, stream)
        if not count:
            raise UsageError(f"{name} cannot be read as a video: it has no frames")
        return np.stack(list(_frames_at(container, stream, _places(count, wanted, shares))))


def video_problem(value: Any, full: bool) -> str | None:
    """Why a video cannot be used; by some frames over all of it where `full`, else by its head alone."""
    source, name = _source(value)
    problem = missing(source)
    if source is None or problem:
        return problem
    try:
        with _explained(name), _container(source) as (container, stream):
            seconds = _seconds(container, stream)
        if seconds > _LONGEST:
            return f"{seconds / 3600:.1f} hours long; the limit is one hour: cut it into pieces"
        if full:
            open_video(value, _LOOKED_AT)
    except UsageError as error:
        return str(error).removeprefix(f"{name} cannot be read as a video: ")
    return None


def content_key(value: Any, full: bool = False) -> bytes:
    """16 bytes that stand for the content of a video, as `open_video` takes it; of a file as `file_key`."""
    if isinstance(value, np.ndarray):
        text = f"{value.dtype} {value.shape}".encode()
        return hashlib.blake2b(text + np.ascontiguousarray(value).tobytes(), digest_size=16).digest()
    source, name = _source(value)
    if not source:
        raise UsageError(f"no video is named in {value!r}")
    return file_key(source, name, full)


def as_video(frames: Frames) -> bytes:
    """A Matroska file that holds exactly these frames, shape (frames, height, width, 3)."""
    av = _av()
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def video_header(value: Any) -> tuple[float, int, int] | None:
    """Seconds, width and height of a file, by its head; None where that cannot be read."""
    source, name = _source(value)
    if source is None or video_problem(value, full=False):
        return None
    with _explained(name), _container(source) as (container, stream):
        return _seconds(container, stream), stream.width, stream.height


def _source(value: Any) -> tuple[str | bytes | None, str]:
    return source_of(value, "a video", "or its frames as an array")


def _av() -> Any:
    """The package, which the extra `video` installs.

    Raises:
        UsageError: it is not there.
    """
    try:
        import av
    except ImportError as error:
        raise UsageError("Videos are read by av, which is not installed: pip install 'hftl[video]'") from error
    return av


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what FFmpeg's libraries say into one line."""
    av = _av()
    try:
        yield
    except (av.error.FFmpegError, OSError, ValueError, EOFError) as error:
        said = str(getattr(error, "strerror", None) or error)
        unknown = isinstance(error, av.error.InvalidDataError)
        reason = "not a video, or a damaged one" if unknown else said.split(":")[0].strip()
        raise UsageError(f"{name} cannot be read as a video: {reason}") from error


@contextlib.contextmanager
def _container(source: str | bytes) -> Iterator[tuple[Any, Any]]:
    """The open file and its video stream."""
    if not (len(source) if isinstance(source, bytes) else os.path.getsize(source)):
        raise ValueError("it is empty")
    with _av().open(opened(source)) as container:
        if not container.streams.video:
            raise ValueError("it holds no video")
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # several files are read beside each other
        yield container, stream


def _seconds(container: Any, stream: Any) -> float:
    """How long a video is, by its head; 0 where that does not say."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / _av().time_base


def _count(container: Any, stream: Any) -> int:
    """Frames of a video: by its head, else by the packets that it comes in."""
    if stream.frames:
        return int(stream.frames)
    count = sum(packet.size > 0 for packet in container.demux(stream))
    container.seek(0)
    return count


def _places(count: int, wanted: int, shares: npt.NDArray[np.float64] | float) -> npt.NDArray[np.int64]:
    """Numbers of the frames, in order."""
    return np.minimum((np.arange(wanted) + shares) * count / wanted, count - 1).astype(int)


def _frames_at(container: Any, stream: Any, places: npt.NDArray[np.int64]) -> Iterator[Frames]:
    """The frames at some places, in order; the last one that there is for what lies behind the end."""
    far = stream.average_rate and np.diff(places, prepend=0).max() > _FAR
    found = _looked_for(container, stream, places) if far else _decoded(container, stream, places)
    last = None
    for frame in found:
        shown = np.rot90(frame.to_ndarray(format="rgb24"), (getattr(frame, "rotation", 0) or 0) // 90)
        if last is not None and shown.shape != last.shape:
            raise ValueError("its frames change size")
        last = shown
        yield shown
    if last is None:
        raise ValueError("it has no frames")


def _decoded(container: Any, stream: Any, places: npt.NDArray[np.int64]) -> Iterator[Any]:
    """All up to the last place is decoded."""
    frames = container.decode(stream)
    number, frame = -1, None
    for place in places.tolist():
        while number < place:
            following = next(frames, None)
            if following is None:
                break
            if frame is not None and (following.width, following.height) != (frame.width, frame.height):
                raise ValueError("its frames change size")
            number, frame = number + 1, following
        if frame is not None:
            yield frame


def _looked_for(container: Any, stream: Any, places: npt.NDArray[np.int64]) -> Iterator[Any]:
    """From the key frame before each place on, by time."""
    start, frame = stream.start_time or 0, None
    for place in places.tolist():
        moment = start + int(place / stream.average_rate / stream.time_base)
        container.seek(moment, stream=stream)
        for following in container.decode(stream):
            frame = following
            if following.pts is not None and following.pts >= moment:
                break
        if frame is not None:
            yield frame


def _from_array(values: npt.NDArray[Any]) -> Frames:
    """Frames of 8 bits and three colours.

    Raises:
        UsageError: the array is none of frames.
    """
    frames = np.repeat(values[..., None], 3, axis=-1) if values.ndim == 3 else values
    if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size or frames.min() < 0 or frames.max() > 255:
        raise UsageError(
            f"a video cannot be made from an array of shape {values.shape} and type {values.dtype}: give frames x "
            "height x width, or frames x height x width x 3, with values 0 to 255"
        )
    if frames.dtype.kind == "f" and frames.max() <= 1:
        frames = np.rint(frames * 255)
    return frames.astype(np.uint8)
