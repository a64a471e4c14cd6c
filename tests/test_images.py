"""Untrusted pictures: every usual mode works, everything else is one clear error."""

import os
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data.images import FORMATS, decode_image, load_image
from errors import PhiSightError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "real"


def encode(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def noise(width: int = 23, height: int = 17, seed: int = 0) -> Image.Image:
    generator = numpy.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=numpy.uint8))


def refused(data: bytes, **options) -> str:
    """The message with which the bytes are refused."""
    with pytest.raises(PhiSightError) as caught:
        decode_image(data, "a.png", **options)
    message = str(caught.value)
    assert message.startswith("a.png: ") and "; " in message and "\n" not in message
    return message


def png_header(width: int, height: int) -> bytes:
    """A PNG made by hand: a correct header that claims any size, and a scrap of pixel data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("mode", "colour", "file_format", "expected"),
    [
        ("1", 1, "PNG", (255, 255, 255)),
        ("1", 0, "TIFF", (0, 0, 0)),
        ("L", 77, "PNG", (77, 77, 77)),
        ("LA", (77, 255), "PNG", (77, 77, 77)),
        ("LA", (0, 0), "PNG", (255, 255, 255)),
        ("RGBA", (200, 0, 0, 0), "PNG", (255, 255, 255)),
        ("RGBA", (200, 0, 0, 51), "PNG", (244, 204, 204)),  # 0.2 * colour + 0.8 * white
        ("RGBA", (200, 0, 0, 0), "WEBP", (255, 255, 255)),
        ("RGBA", (200, 0, 0, 255), "TIFF", (200, 0, 0)),
        ("CMYK", (0, 255, 255, 0), "TIFF", (255, 0, 0)),
        ("CMYK", (0, 255, 255, 0), "JPEG", (254, 0, 0)),
        ("RGB", (1, 2, 3), "BMP", (1, 2, 3)),
        ("RGB", (1, 2, 3), "GIF", (1, 2, 3)),
        ("I;16", 65535, "PNG", (255, 255, 255)),
        ("I;16", 32896, "TIFF", (128, 128, 128)),  # 32896 = 128 * 257; clipping would give 255
        ("I;16", 257, "PNG", (1, 1, 1)),
    ],
)
def test_mode(tmp_path, mode, colour, file_format, expected):
    path = tmp_path / "picture"
    Image.new(mode, (9, 5), colour).save(path, file_format)
    image = load_image(path)
    assert (image.mode, image.size) == ("RGB", (9, 5))
    assert numpy.abs(numpy.asarray(image).astype(int) - expected).max() <= (file_format == "JPEG")


def test_palette_with_transparency():
    image = Image.new("P", (4, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((0, 0), 0)
    decoded = decode_image(encode(image, "PNG", transparency=0), "a")
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.getpixel((1, 0)) == (10, 20, 30)


def test_big_endian_16_bit():
    pixels = numpy.array([[0, 257, 65535]], dtype=">u2")
    image = Image.frombytes("I;16B", (3, 1), pixels.tobytes())
    decoded = numpy.asarray(decode_image(encode(image, "TIFF"), "a"))
    assert decoded[0, :, 0].tolist() == [0, 1, 255]


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animation_gives_first_frame(file_format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(BytesIO(data)).n_frames == 3
    assert decode_image(data, "a").getpixel((3, 3)) == (255, 0, 0)


def test_avif_gives_its_first_frame_and_lies_on_white():
    """Its colours are kept to a step or so, as in JPEG."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    clear = Image.new("RGBA", (8, 8), (200, 0, 0, 51))
    best = {"quality": 100, "subsampling": "4:4:4"}
    moving = encode(frames[0], "AVIF", save_all=True, append_images=frames[1:], **best)
    assert Image.open(BytesIO(moving)).n_frames == 3
    for data, expected in ((moving, (255, 0, 0)), (encode(clear, "AVIF", **best), (244, 204, 204))):
        pixel = decode_image(data, "a").getpixel((3, 3))
        assert max(abs(a - b) for a, b in zip(pixel, expected)) <= 2


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_exif_orientation(file_format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(noise(), file_format, exif=exif)
    source = Image.open(BytesIO(data))
    source.load()
    expected = ImageOps.exif_transpose(source).convert("RGB")
    decoded = decode_image(data, "a")
    assert decoded.size == ((17, 23) if orientation in (5, 6, 7, 8) else (23, 17))
    assert decoded.tobytes() == expected.tobytes()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_leaves_the_picture_as_stored(file_format):
    plain = encode(noise(), file_format)
    for rubbish in (b"MM\0*rubbish", b"MM\0*\0\0", b"nonsense", b"\xff" * 40):
        data = encode(noise(), file_format, exif=b"Exif\0\0" + rubbish)
        assert decode_image(data, "a").tobytes() == decode_image(plain, "a").tobytes()


TRUNCATED = {
    **{name: (name, {}) for name in FORMATS},
    "progressive JPEG": ("JPEG", {"progressive": True}),
    "lossless WEBP": ("WEBP", {"lossless": True}),
    "LZW TIFF": ("TIFF", {"compression": "tiff_lzw"}),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", TRUNCATED)
def test_truncated_anywhere(name):
    """A cut file is refused, or the cut took only a trailer and the pixels are all there."""
    file_format, options = TRUNCATED[name]
    data = encode(noise(), file_format, **options)
    pixels = decode_image(data, "a").tobytes()
    for length in (*range(20, len(data) - 20, 5), *range(len(data) - 20, len(data))):
        try:
            assert decode_image(data[:length], "a").tobytes() == pixels
            assert length >= len(data) - 20
        except PhiSightError as error:
            assert "truncated" in str(error)


def test_bomb_is_judged_by_its_header():
    assert "8,001" not in refused(png_header(30000, 30000))
    assert "8001 x 8000" in refused(png_header(8001, 8000))
    assert "64,000,000" in refused(png_header(2**31 - 1, 2**31 - 1))
    assert "101 x 100" in refused(encode(noise(101, 100), "PNG"), max_pixels=10_000)
    assert decode_image(encode(noise(100, 100), "PNG"), "a", max_pixels=10_000).size == (100, 100)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello, this is text", "not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (encode(noise(), "PPM"), "not a picture"),
        (encode(noise(101 * 3, 3).resize((303, 3)), "PNG"), "over 100 times"),
        (encode(noise(3, 303), "PNG"), "over 100 times"),
        (encode(Image.new("F", (4, 4)), "TIFF"), "32-bit"),
        (png_header(0, 5), ""),
        (png_header(40, 40), "truncated"),
    ],
)
def test_refused(data, reason):
    assert reason in refused(data)


def test_files_that_are_no_pictures(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "big.png").write_bytes(encode(noise(), "PNG"))
    (tmp_path / "empty.png").touch()
    reasons = {
        "none.png": "no such file",
        ".": "is a folder",
        "pipe": "not a regular file",
        "empty.png": "empty",
        "big.png": "over the limit",
        "a\0b": "cannot be read",
        "big.png/inside": "cannot be read",
        "x" * 300: "cannot be read",
        "two\nlines": "no such",
    }
    for name, reason in reasons.items():
        with pytest.raises(PhiSightError, match=reason) as caught:
            load_image(tmp_path / name, max_bytes=1000)
        assert "\n" not in str(caught.value)
    assert load_image(tmp_path / "big.png").size == (23, 17)


def test_decoders_that_raise_other_types():
    png = bytearray(encode(noise(), "PNG"))
    png[33:37] = struct.pack(">I", struct.unpack(">I", png[33:37])[0] - 5)  # the IDAT's length
    assert "broken" in refused(bytes(png))  # a SyntaxError in Pillow
    png[11] = 0  # the IHDR's length
    assert "broken" in refused(bytes(png))  # a ValueError


@pytest.mark.filterwarnings("ignore")
@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP"]), st.data())
def test_corrupt_bytes_never_escape(file_format, data):
    damaged = bytearray(encode(noise(), file_format))
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert decode_image(bytes(damaged), "a").mode == "RGB"
    except PhiSightError as error:
        assert "\n" not in str(error)


def test_real_photograph():
    path = SHARED / "images" / "extreme_ironing.jpg"
    if not path.exists():
        pytest.skip("the shared photograph is not here")
    image = load_image(path)
    assert image.mode == "RGB" and min(image.size) > 100
    assert numpy.asarray(image).std() > 10
