"""Recordings of any format, rate and number of channels as one waveform, and why one cannot be read.

Decoded by libsndfile (WAV, FLAC, OGG, MP3, …), which comes with the package soundfile: torchcodec, which `datasets`
would decode with, needs FFmpeg on the system.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from hftl.errors import UsageError
from hftl.sources import file_key, missing, opened, source_of

Waveform = npt.NDArray[np.float32]

#: seconds beyond which a file is no recording of one thing
_LONGEST = 3_600.0
#: frames that are read at once where all of a file is looked at
_BLOCK = 1_048_576


def open_audio(value: Any, rate: int, seconds: float | None = None, place: float = 0.0) -> Waveform:
    """One waveform, shape (samples,), values from -1 to 1: the mean of the channels, resampled.

    Of a file no more than the window is decoded, where its format can seek; otherwise what lies before it too, in
    pieces.

    Args:
        value: a path, bytes, `{"bytes", "path"}`; samples as `{"array", "sampling_rate"}`, or as an array that has
            `rate` already; shape (samples,), or (samples, channels) or (channels, samples).
        rate: samples a second of what is returned.
        seconds: how much is read, the window; None reads all.
        place: where the window lies in a recording that is longer, from 0, its beginning, to 1, its end.

    Raises:
        UsageError: there is no such file, or it is no recording that can be read.
    """
    given = _given(value, rate)
    if given is not None:
        wave, found = _one_channel(given[0]), given[1]
        start, frames = _window(len(wave), found, seconds, place)
        return _resampled(_of_numbers(wave[start : start + frames], "a recording"), found, rate)
    with _opened(value) as file:
        found = file.samplerate
        start, frames = _window(file.frames, found, seconds, place)
        _skip(file, start)
        samples = file.read(frames, dtype="float32", always_2d=True)
    if not len(samples):
        raise UsageError(
            f"{_source(value)[1]} cannot be read as a recording: it "
            f"{'holds less than its head says' if start else 'is empty'}"
        )
    return _resampled(_of_numbers(samples.mean(axis=1), _source(value)[1]), found, rate)


def _of_numbers(wave: Waveform, name: str) -> Waveform:
    """The same.

    Raises:
        UsageError: it holds infinities or what is no number.
    """
    if not np.isfinite(wave).all():
        raise UsageError(f"{name} cannot be read as a recording: its samples are no numbers")
    return wave


def is_longer(value: Any, rate: int, seconds: float) -> bool:
    """Whether a recording does not fit into a window of so many seconds; by the head of a file alone.

    Args:
        value: as `open_audio` takes it.
        rate: samples a second of an array that does not say them.
        seconds: of the window.

    Raises:
        UsageError: there is no such file, or it is no recording that can be read.
    """
    given = _given(value, rate)
    if given is not None:
        length, found = max(given[0].shape, default=0), given[1]
    else:
        with _opened(value) as file:
            length, found = file.frames, file.samplerate
    return length > math.ceil(seconds * found)


def audio_problem(value: Any, full: bool) -> str | None:
    """Why a recording cannot be used; decoded to its end where `full`, else its head alone."""
    source, name = _source(value)
    problem = missing(source)
    if source is None or problem:
        return problem
    soundfile = _soundfile()
    try:
        with soundfile.SoundFile(opened(source)) as file:
            seconds, loudest = file.frames / file.samplerate, 0.0
            if not file.frames:
                return "empty"
            if seconds > _LONGEST:
                return f"{seconds / 3600:.1f} hours long; the limit is one hour: cut it into pieces"
            if full:
                for block in _blocks(file, file.frames):
                    loudest = float(np.maximum(loudest, np.abs(block).max(initial=0.0)))  # which hands on NaN
    except (soundfile.LibsndfileError, OSError, ValueError) as error:
        return _reason(error, name)
    if full and not math.isfinite(loudest):
        return "its samples are no numbers"
    if full and loudest == 0.0:
        return "silent"
    return "cut off: it holds less than its head says" if _is_cut_off(source) else None


def audio_header(value: Any) -> tuple[float, int] | None:
    """Seconds and samples a second of a file, by its head; None where that cannot be read."""
    source, _ = _source(value)
    if source is None or audio_problem(value, full=False):
        return None
    with _soundfile().SoundFile(opened(source)) as file:
        return file.frames / file.samplerate, file.samplerate


def content_key(value: Any, full: bool = False) -> bytes:
    """16 bytes that stand for the content of a recording, as `open_audio` takes it; of a file as `file_key`."""
    if isinstance(value, np.ndarray):
        value = {"array": value, "sampling_rate": None}
    if isinstance(value, dict) and "array" in value:
        samples = np.ascontiguousarray(value["array"])
        text = f"{samples.dtype} {samples.shape} {value['sampling_rate']}".encode()
        return hashlib.blake2b(text + samples.tobytes(), digest_size=16).digest()
    source, name = _source(value)
    if not source:
        raise UsageError(f"no recording is named in {value!r}")
    return file_key(source, name, full)


def _source(value: Any) -> tuple[str | bytes | None, str]:
    return source_of(value, "a recording", "an array, or one with its sampling_rate")


def _given(value: Any, rate: int) -> tuple[npt.NDArray[Any], int] | None:
    """Samples and how many are a second, of a recording that is given as such; None of a file.

    Raises:
        UsageError: it does not say how many.
    """
    if isinstance(value, np.ndarray):
        return value, rate
    if not isinstance(value, dict) or "array" not in value:
        return None
    found = value.get("sampling_rate")
    if not isinstance(found, int | float) or found <= 0:
        raise UsageError("a recording as an array needs its sampling_rate: {'array': …, 'sampling_rate': 16000}")
    return np.asarray(value["array"]), int(found)


@contextlib.contextmanager
def _opened(value: Any) -> Iterator[Any]:
    """A file, to be read.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    source, name = _source(value)
    if not source:
        raise UsageError(f"no recording is named in {value!r}")
    soundfile = _soundfile()
    try:
        with soundfile.SoundFile(opened(source)) as file:
            yield file
    except (soundfile.LibsndfileError, OSError, ValueError) as error:
        raise UsageError(f"{name} cannot be read as a recording: {_reason(error, name)}") from error


def _window(length: int, rate: int, seconds: float | None, place: float) -> tuple[int, int]:
    """Where the window begins, and how many samples it has at most."""
    frames = length if seconds is None else math.ceil(seconds * rate)
    return round(place * max(0, length - frames)), frames


def _skip(file: Any, frames: int) -> None:
    """Go on to a sample; where a format cannot seek (GSM 6.10 of telephones) by reading all before it."""
    if file.seekable():
        file.seek(frames)
    else:
        for _ in _blocks(file, frames):
            pass


def _blocks(file: Any, frames: int) -> Iterator[npt.NDArray[np.float32]]:
    """So many samples from here on, in pieces of shape (samples, channels); soundfile's own needs files that seek."""
    while frames > 0:
        block = file.read(min(frames, _BLOCK), dtype="float32", always_2d=True)
        if not len(block):
            return
        frames -= len(block)
        yield block


def _soundfile() -> Any:
    """The package, which the extra `audio` installs.

    Raises:
        UsageError: it is not there.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: without libsndfile
        raise UsageError(
            "Recordings are read by soundfile, which is not installed: pip install 'hftl[audio]'"
        ) from error
    return soundfile


def _one_channel(samples: npt.NDArray[Any]) -> Waveform:
    """The mean of the channels, which are fewer than the samples; integers as parts of their range."""
    if samples.ndim not in (1, 2) or not samples.size:
        raise UsageError(f"a recording cannot be made from an array of shape {samples.shape}: give (samples,)")
    scale = 1.0 / np.iinfo(samples.dtype).max if samples.dtype.kind in "iu" else 1.0
    wave = samples.astype(np.float32) * np.float32(scale)
    return wave if wave.ndim == 1 else wave.mean(axis=int(np.argmin(wave.shape)))


def _resampled(wave: Waveform, found: int, rate: int) -> Waveform:
    """The waveform at another rate, through a polyphase filter that keeps what the lower rate can hold."""
    if found == rate:
        return wave
    from scipy.signal import resample_poly

    common = math.gcd(found, rate)
    return resample_poly(wave, rate // common, found // common).astype(np.float32)


def _is_cut_off(source: str | bytes) -> bool:
    """Whether a WAV file ends before its samples do, over which libsndfile passes without a word."""
    with open(source, "rb") if isinstance(source, str) else opened(source) as file:
        if file.read(12)[:4] != b"RIFF":
            return False
        end = file.seek(0, 2)
        place = 12
        while place + 8 <= end:
            file.seek(place)
            name, size = struct.unpack("<4sI", file.read(8))
            if name == b"data":
                return size < 0xFFFF0000 and place + 8 + size > end  # what streams write instead of a size is larger
            place += 8 + size + size % 2
    return False


def _reason(error: Exception, name: str) -> str:
    """The reason without the path that it repeats."""
    text = str(getattr(error, "error_string", error)).removeprefix("Error :").strip().rstrip(".")
    if "Format not recogni" in text or "unknown format" in text.lower():
        return "not a recording"
    return text.replace(repr(name), "the file") or type(error).__name__
