"""Images of any kind and source as RGB pictures, and why one cannot be read."""

from __future__ import annotations

import base64
import hashlib
import io
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from hftl.errors import UsageError
from hftl.sources import file_key, missing, opened, source_of

#: what Pillow and its decoders raise for a damaged file
IMAGE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    TypeError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

#: a longer strip becomes millions of pixels where its shorter side is resized to what a model takes
_LONGEST_STRIP = 100
#: longer side of a picture in a report
_THUMBNAIL = 160


def open_image(value: Any, least_side: int | None = None) -> Image.Image:
    """An RGB image from a path, bytes, a `{"bytes", "path"}` dict, a Pillow image or a numpy array.

    EXIF orientation is applied; transparency is laid on white; 16-bit and float pixels are scaled to 8 bits.

    Args:
        value: the image; what is decoded already stays at its size.
        least_side: a JPEG file may be decoded at a half, a quarter or an eighth of its size, the smallest at which both
            sides have this many pixels (libjpeg leaves out high frequencies; Pillow's `draft`). None: at its full size.

    Raises:
        UsageError: there is no such file, or it is no image that can be read: also one of more than 179 million pixels
            (Pillow's limit), or a hundred times as long as it is wide.
    """
    if isinstance(value, Image.Image):
        return _to_rgb(value)
    if isinstance(value, np.ndarray):
        return _to_rgb(_from_array(value))
    source, name = image_source(value)
    if not source:
        raise UsageError(f"no image file is named in {value!r}")
    try:
        with Image.open(opened(source)) as image:
            _check_strip(image)
            if least_side is not None:
                image.draft(None, (least_side, least_side))
            image.load()
            return _to_rgb(image)
    except FileNotFoundError as error:
        raise UsageError(f"no such image file: {name}") from error
    except IMAGE_ERRORS as error:
        raise UsageError(f"{name} cannot be read as an image: {_reason(error, name)}") from error


def image_source(value: Any) -> tuple[str | bytes | None, str]:
    """The bytes or the path of an image, and what to call it in messages."""
    return source_of(value, "an image", "an array or an image")


def _check_strip(image: Image.Image) -> None:
    """Beside Pillow's own limit of 179 million pixels."""
    if max(image.size) > _LONGEST_STRIP * min(image.size):
        raise ValueError(f"a strip of {image.width} x {image.height} pixels; the limit is {_LONGEST_STRIP} to 1")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit and float pixels: Pillow's own conversion clips everything above 255.

    By one range for all images of a kind, so that the pictures of a data set keep their brightness to one another:
    0 to 65535, or for floats 0 to 1, else 0 to 255. What goes beyond is stretched by itself.
    """
    pixels = np.nan_to_num(np.asarray(image, dtype=np.float32))
    low, high = float(pixels.min()), float(pixels.max())
    top = next((top for top in ([1.0, 255.0] if image.mode == "F" else [65535.0]) if high <= top), None)
    if low < 0 or top is None:
        pixels, top = pixels - low, max(high - low, 1e-12)
    return Image.fromarray(np.rint(pixels * (255.0 / top)).astype(np.uint8))


def _from_array(array: np.ndarray) -> Image.Image:
    pixels = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if pixels.size and pixels.ndim == 2:
        if pixels.dtype in (np.uint8, np.bool_):
            return Image.fromarray(pixels)
        kind = np.float32 if pixels.dtype.kind == "f" else np.int32
        return Image.fromarray(pixels.astype(kind))
    if pixels.size and pixels.ndim == 3 and pixels.shape[-1] in (3, 4):
        if pixels.dtype.kind == "f" and pixels.min() >= 0 and pixels.max() <= 1:
            pixels = np.rint(pixels * 255)
        if pixels.dtype == np.uint8 or (pixels.min() >= 0 and pixels.max() <= 255):
            return Image.fromarray(pixels.astype(np.uint8))
    raise UsageError(
        f"an image cannot be made from an array of shape {array.shape} and type {array.dtype}: "
        "give height x width, or height x width x 3, with values 0 to 255"
    )


def content_key(value: Any, full: bool = False) -> bytes:
    """16 bytes that stand for the content of an image, as `open_image` takes it; of a file as `file_key`."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(value, Image.Image):
        digest.update(f"{value.mode} {value.size}".encode() + value.tobytes())
        return digest.digest()
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype} {value.shape}".encode() + np.ascontiguousarray(value).tobytes())
        return digest.digest()
    source, name = image_source(value)
    if not source:
        raise UsageError(f"no image file is named in {value!r}")
    return file_key(source, name, full)


def image_header_size(value: Any) -> tuple[int, int] | None:
    """Width and height that a file says, before EXIF orientation; None where it cannot be read, see `image_problem`."""
    if image_problem(value, full=False):
        return None
    source, _ = image_source(value)
    with Image.open(opened(source or "")) as image:
        return image.size


def image_problem(value: Any, full: bool) -> str | None:
    """Why an image cannot be read; decoded small (draft mode) where `full`, else opened only."""
    source, name = image_source(value)
    problem = missing(source)
    if source is None or problem:
        return problem
    try:
        with Image.open(opened(source)) as image:
            _check_strip(image)
            if full:
                image.draft(None, (64, 64))
                image.load()
    except IMAGE_ERRORS as error:
        return _reason(error, name)
    return None


def _reason(error: Exception, name: str) -> str:
    """Pillow's reason without the path or the memory address that it may repeat."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    return str(error).replace(repr(name), "the file") or type(error).__name__


def data_address(picture: Image.Image) -> str:
    """A JPEG of about 160 pixels that stands in the page itself; the pixels of a tiny picture are enlarged."""
    factor = _THUMBNAIL // max(picture.size)
    small = (
        picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
        if factor > 1
        else picture.copy()
    )
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    small.info.clear()  # a file's comment would go with it
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=75)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def spotlight(picture: Image.Image, heat: npt.NDArray[np.float32]) -> Image.Image:
    """The picture, darker where there is less heat (from 0 to 1, of any size)."""
    light = Image.fromarray((255 * (0.3 + 0.7 * np.sqrt(heat))).astype(np.uint8))
    light = light.resize(picture.size, Image.Resampling.BILINEAR)
    return Image.composite(picture, Image.new("RGB", picture.size), light)
