"""The only place where pixels are encoded or decoded.

>>> data = encode(array, "qoi"); decode(data).pixels

The header is read and checked before a single pixel is decoded; EXIF orientation and every kind of transparency are normalised
here, once. Out comes uint8 (H, W, 3), always.
"""

import io
import struct
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import numpy as np
import qoi
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from shared.errors import BadImage
from shared.schema import Encoding, ImageData

MIN_SIDE: Final = 16
MAX_SIDE: Final = 65_535
MAX_PIXELS: Final = 16_800_000
MAX_REQUEST_PIXELS: Final = 64_000_000
_PNG_END: Final = b"IEND\xaeB`\x82"
_PIL_FORMATS: Final = {"png": "PNG", "webp": "WEBP", "jpeg": "JPEG"}


@dataclass(frozen=True)
class Decoded:
    """pixels (H, W, 3) uint8, not always writable; `lossy` when the encoding had thrown information away."""

    pixels: NDArray[np.uint8]
    lossy: bool


def sniff(data: bytes) -> Encoding:
    """The encoding by its magic bytes; BadImage when it is none that is served."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data.startswith(b"qoif"):
        return "qoi"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise BadImage("not a picture: the bytes are none of PNG, JPEG, WebP or QOI")


def check_size(height: int, width: int) -> None:
    """BadImage for a picture outside the limits; call it with what the header says."""
    if min(height, width) < MIN_SIDE:
        raise BadImage(
            f"the picture is {width}x{height}; its shorter side must be at least {MIN_SIDE} pixels",
            "image-too-small",
            limit=MIN_SIDE,
            observed=min(height, width),
        )
    if max(height, width) > MAX_SIDE:
        raise BadImage(
            f"the picture is {width}x{height}; no side may be longer than {MAX_SIDE} pixels: cut it into pieces",
            "image-too-large",
            limit=MAX_SIDE,
            observed=max(height, width),
        )
    if height * width > MAX_PIXELS:
        raise BadImage(
            f"the picture is {width}x{height}; at most {MAX_PIXELS / 1e6:.1f} megapixels are decoded: make it smaller",
            "image-too-large",
            limit=MAX_PIXELS,
            observed=height * width,
        )


def header_size(data: bytes, encoding: Encoding) -> tuple[int, int]:
    """(height, width) from the header alone, as stored (before EXIF orientation)."""
    if encoding == "qoi":
        if len(data) < 22 or data[:4] != b"qoif":
            raise BadImage("the QOI picture is truncated or not QOI")
        width, height = struct.unpack(">II", data[4:12])
        return int(height), int(width)
    if encoding == "rgb8":
        raise ValueError("raw pixels have no header")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=[_PIL_FORMATS[encoding]]) as picture:
                return picture.height, picture.width
    except Image.DecompressionBombError as error:
        raise BadImage(
            f"the picture is far above {MAX_PIXELS / 1e6:.1f} megapixels: make it smaller", "image-too-large", limit=MAX_PIXELS
        ) from error
    except Exception as error:  # hostile bytes make pillow raise nearly anything
        raise BadImage(f"not a readable {encoding.upper()} picture; its header is broken") from error


def _flatten(picture: Image.Image) -> Image.Image:
    """Upright, opaque (on white), RGB."""
    with suppress(Exception):  # broken metadata says nothing: the pixels, which are whole, stay as they are stored
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        wide = np.asarray(picture, dtype=np.float64)
        top = 65_535.0 if picture.mode != "F" else max(float(wide.max(initial=0.0)), 1.0)
        if isinstance(clear := picture.info.get("transparency"), int):
            wide = np.where(wide == clear, top, wide)
        return Image.fromarray((wide.clip(0, top) * (255 / top)).round().astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def _is_lossy(data: bytes, encoding: Encoding) -> bool:
    """JPEG is; WebP says so by the kind of its (first) bitstream, which stands behind profile, alpha and animation chunks."""
    at = 12 if encoding == "webp" else len(data)
    while at + 8 <= len(data):
        kind, length = struct.unpack("<4sI", data[at : at + 8])
        if kind in (b"VP8L", b"VP8 "):
            return bool(kind == b"VP8 ")
        at += 24 if kind == b"ANMF" else 8 + length + length % 2
    return encoding in ("jpeg", "webp")


def decode(image: ImageData) -> Decoded:
    """Pixels of one picture; BadImage (an error of its item) for anything that is not exactly what it claims to be."""
    if image.encoding == "rgb8":
        check_size(image.height, image.width)
        expected = image.height * image.width * 3
        if len(image.data) != expected:
            raise BadImage(
                f"{image.width}x{image.height} raw RGB pixels are {expected} bytes, not {len(image.data)}",
                limit=expected,
                observed=len(image.data),
            )
        raw = np.frombuffer(image.data, dtype=np.uint8).reshape(image.height, image.width, 3)
        return Decoded(raw, lossy=False)
    if sniff(image.data) != image.encoding:
        raise BadImage(f"the bytes are {sniff(image.data)}, but the request says {image.encoding}")
    height, width = header_size(image.data, image.encoding)
    check_size(height, width)
    if sorted((height, width)) != sorted((image.height, image.width)):
        raise BadImage(f"the picture is {width}x{height}, but the request says {image.width}x{image.height}")
    if image.encoding == "qoi":
        pixels = _decode_qoi(image.data)
    else:
        pixels = _decode_pil(image.data, image.encoding)
    if (image.height, image.width) not in ((height, width), pixels.shape[:2]):
        raise BadImage(f"the picture is {width}x{height}, but the request says {image.width}x{image.height}")
    return Decoded(pixels, _is_lossy(image.data, image.encoding))


def _decode_qoi(data: bytes) -> NDArray[np.uint8]:
    if data[12] not in (3, 4) or not data.endswith(b"\x00" * 7 + b"\x01"):
        raise BadImage("the QOI picture is truncated or damaged")
    try:
        pixels: NDArray[np.uint8] = qoi.decode(data)
    except Exception as error:
        raise BadImage("the QOI picture is damaged") from error
    if pixels.shape[2] == 4:
        return np.asarray(_flatten(Image.fromarray(pixels)))
    return pixels


def _decode_pil(data: bytes, encoding: Encoding) -> NDArray[np.uint8]:
    if encoding == "png" and _PNG_END not in data:  # pillow does without the last chunks
        raise BadImage("the PNG picture is truncated; send it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=[_PIL_FORMATS[encoding]]) as picture:
                picture.load()
                return np.asarray(_flatten(picture))
    except UnidentifiedImageError as error:
        raise BadImage(f"not a readable {encoding.upper()} picture") from error
    except Exception as error:  # truncated or hostile: pillow raises OSError, SyntaxError, struct.error, ValueError, ...
        raise BadImage(f"the {encoding.upper()} picture is truncated or damaged; send it again") from error


def encode(pixels: NDArray[np.uint8], encoding: Encoding = "rgb8") -> ImageData:
    """Pixels (H, W, 3) uint8 as ImageData, lossless but for `jpeg` (quality 95, 4:4:4). ValueError for another shape or type."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"a picture is uint8 of shape (H, W, 3), not {pixels.dtype} of shape {pixels.shape}")
    height, width, _ = pixels.shape
    if encoding == "rgb8":
        data = np.ascontiguousarray(pixels).tobytes()
    elif encoding == "qoi":
        data = qoi.encode(np.ascontiguousarray(pixels))
    else:
        buffer = io.BytesIO()
        options: dict[str, int | bool] = {"webp": {"lossless": True}, "jpeg": {"quality": 95, "subsampling": 0}}.get(encoding, {})  # type: ignore[assignment]
        Image.fromarray(pixels).save(buffer, _PIL_FORMATS[encoding], **options)
        data = buffer.getvalue()
    return ImageData(encoding=encoding, height=height, width=width, data=data)


def from_file(data: bytes) -> ImageData:
    """An uploaded file as ImageData: encoding by magic bytes, size by its header. BadImage for anything else."""
    encoding = sniff(data)
    height, width = header_size(data, encoding)
    check_size(height, width)
    return ImageData(encoding=encoding, height=height, width=width, data=data)
