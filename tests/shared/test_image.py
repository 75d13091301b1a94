"""Pixels in, pixels out; and nothing hostile gets through."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shared.errors import BadImage
from shared.image import MAX_PIXELS, decode, encode, from_file, header_size, sniff
from shared.schema import Encoding, ImageData

LOSSLESS: tuple[Encoding, ...] = ("rgb8", "qoi", "png", "webp")


def picture(height: int = 20, width: int = 31, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@settings(max_examples=40, deadline=None)
@given(st.integers(16, 70), st.integers(16, 70), st.integers(0, 9), st.sampled_from(LOSSLESS))
def test_lossless_round_trips_are_bit_exact(height: int, width: int, seed: int, encoding: Encoding) -> None:
    pixels = picture(height, width, seed)
    out = decode(encode(pixels, encoding))
    assert np.array_equal(out.pixels, pixels) and not out.lossy


def test_jpeg_is_marked_lossy() -> None:
    out = decode(encode(picture(), "jpeg"))
    assert out.lossy and out.pixels.shape == (20, 31, 3)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    with pytest.raises(BadImage) as caught:
        from_file(png_header(60_000, 60_000))
    assert caught.value.problem().type == "urn:verism:image-too-large"
    bomb = b"qoif" + struct.pack(">IIBB", 60_000, 60_000, 3, 0) + b"\x00" * 7 + b"\x01"
    with pytest.raises(BadImage, match="megapixels"):
        from_file(bomb)


def test_a_lying_header_is_refused() -> None:
    data = encode(picture(), "png")
    with pytest.raises(BadImage, match="but the request says"):
        decode(data.model_copy(update={"height": 40}))
    with pytest.raises(BadImage, match="bytes are png"):
        decode(data.model_copy(update={"encoding": "jpeg"}))
    with pytest.raises(BadImage, match="raw RGB pixels are"):
        decode(ImageData(encoding="rgb8", height=16, width=16, data=b"\0" * 100))


def test_tiny_pictures_are_refused() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    with pytest.raises(BadImage) as caught:
        from_file(buffer.getvalue())
    assert caught.value.problem().type == "urn:verism:image-too-small"


@pytest.mark.parametrize("encoding", ["qoi", "png", "webp", "jpeg"])
def test_truncated_pictures_are_refused(encoding: Encoding) -> None:
    whole = encode(picture(64, 64), encoding)
    for keep in (0.3, 0.9):
        cut = whole.data[: int(len(whole.data) * keep)]
        with pytest.raises(BadImage):
            decode(whole.model_copy(update={"data": cut}))


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"qoif", b"RIFF\0\0\0\0WEBP"]))
def test_hostile_bytes_raise_nothing_but_bad_image(noise: bytes, magic: bytes) -> None:
    try:
        decode(from_file(magic + noise))
    except BadImage as error:
        assert "Traceback" not in error.message


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_pictures_raise_nothing_but_bad_image(data: st.DataObject) -> None:
    encoding = data.draw(st.sampled_from(["qoi", "png", "webp", "jpeg"]))
    good = bytearray(encode(picture(24, 24), encoding).data)
    for _ in range(data.draw(st.integers(1, 6))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        pixels = decode(from_file(bytes(good))).pixels
        assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size <= 3 * MAX_PIXELS
    except BadImage:
        pass


def save(image: Image.Image, kind: str = "PNG", **options: object) -> ImageData:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return from_file(buffer.getvalue())


def test_every_kind_of_transparency_lands_on_white() -> None:
    clear = Image.new("RGBA", (20, 20), (10, 20, 30, 0))
    assert (decode(save(clear)).pixels == 255).all()
    assert (decode(save(Image.new("LA", (20, 20), (7, 0)))).pixels == 255).all()
    palette = Image.new("P", (20, 20), 0)
    palette.putpalette([1, 2, 3] * 256)
    assert (decode(save(palette, transparency=0)).pixels == 255).all()
    assert (decode(save(clear, "WEBP", lossless=True, exact=True)).pixels == 255).all()


def test_grey_sixteen_bit_and_cmyk_become_rgb() -> None:
    assert (decode(save(Image.new("L", (20, 20), 77))).pixels == 77).all()
    wide = Image.fromarray(np.full((20, 20), 65_535, np.uint16))
    assert (decode(save(wide)).pixels == 255).all()
    assert decode(save(Image.new("CMYK", (20, 20)), "JPEG")).pixels.shape == (20, 20, 3)


def test_exif_orientation_is_applied() -> None:
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    upright = decode(save(Image.fromarray(pixels), "PNG", exif=exif)).pixels
    assert upright.shape == (40, 20, 3) and upright[:15].mean() > 250 and upright[25:].mean() < 5


def test_a_side_too_long_for_the_schema_is_a_bad_image() -> None:
    for data in (png_header(70_000, 16), b"qoif" + struct.pack(">IIBB", 70_000, 16, 3, 0) + b"\x00" * 7 + b"\x01"):
        with pytest.raises(BadImage, match="no side may be longer") as caught:
            from_file(data)
        assert caught.value.problem().type == "urn:verism:image-too-large"


@pytest.mark.parametrize("encoding", ["qoi", "png", "webp", "jpeg"])
def test_one_byte_less_is_truncated_and_swapped_sides_do_not_match(encoding: Encoding) -> None:
    whole = encode(picture(20, 31), encoding)
    with pytest.raises(BadImage):
        decode(whole.model_copy(update={"data": whole.data[:-1]}))
    with pytest.raises(BadImage, match="31x20, but the request says 20x31"):
        decode(whole.model_copy(update={"height": 31, "width": 20}))


def test_a_turned_picture_may_be_declared_as_stored_or_as_seen() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = save(Image.fromarray(picture(20, 40)), "JPEG", exif=exif)
    seen = stored.model_copy(update={"height": 40, "width": 20})
    assert (stored.height, stored.width) == (20, 40)
    assert np.array_equal(decode(stored).pixels, decode(seen).pixels) and decode(seen).pixels.shape == (40, 20, 3)


def test_broken_metadata_leaves_the_pixels() -> None:
    pixels = picture()
    out = decode(save(Image.fromarray(pixels), "WEBP", lossless=True, exif=b"Exif\0\0 nonsense"))
    assert np.array_equal(out.pixels, pixels)


def test_lossy_is_read_behind_profiles_and_in_the_first_frame() -> None:
    first, second = Image.fromarray(picture()), Image.fromarray(picture(seed=1))
    assert not decode(save(first, "WEBP", lossless=True, icc_profile=b"x" * 500)).lossy
    assert decode(save(first, "WEBP", quality=90, icc_profile=b"VP8L" * 10)).lossy
    moving = decode(save(first, "WEBP", lossless=True, save_all=True, append_images=[second]))
    assert not moving.lossy and np.array_equal(moving.pixels, picture())
    assert np.array_equal(decode(save(first, "PNG", save_all=True, append_images=[second])).pixels, picture())


def test_sixteen_bit_transparency_lands_on_white() -> None:
    wide = Image.fromarray(np.zeros((20, 20), np.uint16))
    assert (decode(save(wide, transparency=0)).pixels == 255).all() and (decode(save(wide)).pixels == 0).all()


def test_encode_refuses_other_arrays() -> None:
    with pytest.raises(ValueError, match="uint8 of shape"):
        encode(np.zeros((20, 20, 3), np.float32))  # type: ignore[arg-type]


def test_magic_bytes_decide() -> None:
    assert sniff(encode(picture(), "webp").data) == "webp"
    assert header_size(encode(picture(), "qoi").data, "qoi") == (20, 31)
    with pytest.raises(BadImage, match="none of PNG"):
        sniff(b"GIF89a")
