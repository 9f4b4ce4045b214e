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
_LOOKED_AT = 3
#: of a frame: 8K has fewer
_MOST_PIXELS = 36_000_000
#: part of a video that may be missing at its end, as writers of streams leave it
_MISSING = 0.05
_CUT_OFF = "cut off, since it holds less than its head says"
#: a video from elsewhere may be a list of addresses: what FFmpeg opens is this file, and nothing that it names
_OPENS = {"protocol_whitelist": "file,crypto,data"}


def open_video(
    value: Any, wanted: int, shares: npt.NDArray[np.float64] | float = 0.5, least_side: int | None = None
) -> Frames:
    """Some frames of a video, one from each of as many equal parts of it (Wang et al. 2016), uint8 (frames, h, w, 3).

    The parts have as many frames each; in a long video, where what lies between is not decoded, they are as long.

    Args:
        value: a path, bytes, `{"bytes", "path"}`, or frames as an array of shape (frames, height, width[, 3]).
        wanted: how many; of a shorter video some come more than once.
        shares: where in its part each lies, from 0 to 1: the middle by default.
        least_side: larger frames are made smaller, to this many pixels of their shorter side. None: they stay.

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
        pixels = [_pixels(frame, least_side) for frame in _frames_at(container, stream, count, wanted, shares)]
    return np.stack(pixels)


def video_problem(value: Any, full: bool) -> str | None:
    """Why a video cannot be used; by some frames over all of it where `full`, else by its head alone."""
    source, name = _source(value)
    problem = missing(source)
    if source is None or problem:
        return problem
    try:
        with _explained(name), _container(source) as (container, stream):
            seconds, size = _seconds(container, stream), (stream.width, stream.height)
        if seconds > _LONGEST:
            return f"{seconds / 3600:.1f} hours long; the limit is one hour: cut it into pieces"
        if size[0] * size[1] > _MOST_PIXELS:
            return f"frames of {size[0]} x {size[1]}; the limit is {_MOST_PIXELS:,} pixels"
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
    # Else Matroska writes random numbers, and the same frames would be another content each time.
    with av.open(file, "w", format="matroska", options={"fflags": "bitexact"}) as container:
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
    with _av().open(opened(source), options=_OPENS) as container:
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
    """Frames of a video: by its head where that fits its length, else by the packets that it comes in."""
    seconds = _seconds(container, stream)
    expected = seconds * float(stream.average_rate or 0)
    if stream.frames and abs(stream.frames - expected) <= _MISSING * expected + 1:
        return int(stream.frames)
    moments = [packet.pts or 0 for packet in container.demux(stream) if packet.size]
    container.seek(0)
    there = (max(moments, default=0) - (stream.start_time or 0)) * float(stream.time_base)
    if there < (1 - _MISSING) * seconds - 1:  # the last frame may be seen for a while
        raise ValueError(_CUT_OFF)
    return len(moments)


def _places(count: int, wanted: int, shares: npt.NDArray[np.float64] | float) -> npt.NDArray[np.int64]:
    """Numbers of the frames, in order."""
    return np.minimum((np.arange(wanted) + shares) * count / wanted, count - 1).astype(int)


def _frames_at(
    container: Any, stream: Any, count: int, wanted: int, shares: npt.NDArray[np.float64] | float
) -> Iterator[Any]:
    """The frames that are wanted, as FFmpeg has them."""
    places = _places(count, wanted, shares)
    seconds = _seconds(container, stream)
    if seconds and count > _FAR * wanted:
        start = stream.start_time or 0
        yield from _looked_for(container, stream, start + (places + 0.5) / count * seconds / float(stream.time_base))
    else:
        yield from _decoded(container.decode(stream), places, count)


def _decoded(frames: Iterator[Any], places: npt.NDArray[np.int64], count: int) -> Iterator[Any]:
    """All up to the last place is decoded."""
    number, frame = -1, None
    for place in places.tolist():
        while number < place and (following := next(frames, None)) is not None:
            _check_size(following, frame)
            number, frame = number + 1, following
        if frame is None or number < place - _MISSING * count - 1:
            raise ValueError(_CUT_OFF)
        yield frame


def _looked_for(container: Any, stream: Any, moments: npt.NDArray[np.float64]) -> Iterator[Any]:
    """The frame that is seen at each moment, in units of the stream's time, from the key frame before it on."""
    before = None
    for moment in moments.tolist():
        container.seek(int(moment), stream=stream)
        frame = None
        for following in container.decode(stream):
            if frame is not None and following.pts is not None and following.pts > moment:
                break
            frame = following
        if frame is None:
            raise ValueError(_CUT_OFF)
        _check_size(frame, before)
        before = frame
        yield frame


def _check_size(frame: Any, before: Any) -> None:
    if before is not None and (frame.width, frame.height) != (before.width, before.height):
        raise ValueError("its frames change size")


def _pixels(frame: Any, least_side: int | None) -> Frames:
    """A frame as it is to be seen: cameras turn their pictures by a note in the file."""
    side = min(frame.width, frame.height)
    size = {}
    if least_side is not None and side > least_side:
        size = {"width": frame.width * least_side // side, "height": frame.height * least_side // side}
        size["interpolation"] = "AREA"
    return np.rot90(frame.to_ndarray(format="rgb24", **size), frame.rotation // 90)


def _from_array(values: npt.NDArray[Any]) -> Frames:
    """Frames of 8 bits and three colours.

    Raises:
        UsageError: the array is none of frames.
    """
    is_grey = values.ndim == 3 and values.shape[-1] != 3  # else it is one picture
    frames = np.repeat(values[..., None], 3, axis=-1) if is_grey else values
    known = frames.ndim == 4 and frames.shape[-1] == 3 and frames.size > 0
    if not (known and frames.min() >= 0 and frames.max() <= 255):  # which NaN is not
        raise UsageError(
            f"a video cannot be made from an array of shape {values.shape} and type {values.dtype}: give frames x "
            "height x width, or frames x height x width x 3, with values 0 to 255"
        )
    if frames.dtype.kind == "f" and frames.max() <= 1:
        frames = np.rint(frames * 255)
    return frames.astype(np.uint8)
