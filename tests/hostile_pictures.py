"""Pictures that cost far more than they look, made for the tests."""

from __future__ import annotations

import random
import struct
import zlib
from io import BytesIO

from PIL import Image

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def encode(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(before: bytes = b"", after: bytes = b"", side: int = 8) -> bytes:
    """A red square with chunks before and behind its pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + b"\xc8\x1e\x1e" * side for _ in range(side)), 1)
    return b"".join(
        [PNG_SIGNATURE, chunk(b"IHDR", header), before, chunk(b"IDAT", pixels), after]
        + [chunk(b"IEND", b"")]
    )


def jpeg(side: int = 64, **options) -> bytes:
    return encode(Image.new("RGB", (side, side), (200, 30, 30)), "JPEG", **options)


def with_segments(segments: bytes) -> bytes:
    """A JPEG with these segments before all others."""
    picture = jpeg()
    return picture[:2] + segments + picture[2:]


def with_scans(side: int, count: int) -> bytes:
    """A progressive JPEG that repeats its last scan."""
    picture = jpeg(side, progressive=True)
    last = picture[picture.rindex(b"\xff\xda") : -2]
    return picture[:-2] + last * count + picture[-2:]


def exif_of_overlaps(entries: int, size: int) -> bytes:
    """EXIF whose entries all refer to the same bytes."""
    listed = b"".join(struct.pack("<HHII", tag + 1, 7, size, 10) for tag in range(entries))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", entries) + listed + b"\0" * 4


def app1(content: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content


def tiff(*tags: tuple[int, int, int, int], rest: bytes = b"") -> bytes:
    """A TIFF of one directory; `rest` begins at byte 400."""
    listed = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + listed + b"\0" * 4
    return head.ljust(400, b"\0") + rest


def small_tiff(kind: int, count: int, rest: bytes) -> bytes:
    """An 8 x 8 TIFF that lists `count` strips, all in the same place, as numbers of a kind."""
    return tiff(
        (256, 4, 1, 8),
        (257, 4, 1, 8),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, kind, count, 400),
        (277, 3, 1, 1),
        (278, 4, 1, 1),
        (279, kind, count, 400),
        rest=rest,
    )


def tiff_of_strips(count: int) -> bytes:
    return small_tiff(4, count, bytes(8 * count))


def tiff_of_bytes(count: int) -> bytes:
    """Its strips are listed in bytes, which no program writes."""
    return small_tiff(1, count, bytes(2 * count))


def tiff_of_overlaps(entries: int, size: int) -> bytes:
    listed = [(1000 + tag, 7, size, 10) for tag in range(entries)]
    return tiff((256, 4, 1, 8), (257, 4, 1, 8), *listed, rest=bytes(size))


def tiff_of_one_tile(side: int) -> bytes:
    """A 64 x 64 TIFF that lies in one deflated tile of `side` x `side`."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(3 * side)) for _ in range(side)) + packer.flush()
    return tiff(
        (256, 4, 1, 64),
        (257, 4, 1, 64),
        (258, 3, 1, 8),
        (259, 3, 1, 8),
        (262, 3, 1, 2),
        (277, 3, 1, 3),
        (322, 4, 1, side),
        (323, 4, 1, side),
        (324, 4, 1, 400),
        (325, 4, 1, len(packed)),
        rest=packed,
    )


def tiff_with_notes() -> bytes:
    """A damaged TIFF, over which libtiff writes to standard error."""
    noise = Image.frombytes("L", (64, 64), random.Random(0).randbytes(64 * 64))
    picture = bytearray(encode(noise, "TIFF", compression="tiff_lzw"))
    middle = len(picture) // 2
    picture[middle : middle + 200] = bytes(200)
    return bytes(picture)


def gif_with_comment(blocks: int) -> bytes:
    picture = encode(Image.new("P", (8, 8)), "GIF")
    place = picture.index(b",", 13)
    return picture[:place] + b"!\xfe" + (b"\xff" + b"c" * 255) * blocks + b"\0" + picture[place:]


def gif_beyond_its_screen() -> bytes:
    """Its frame is 65,000 x 65,000, its header says 8 x 8."""
    picture = encode(Image.new("P", (8, 8)), "GIF")
    place = picture.index(b",", 13) + 5
    return picture[:place] + struct.pack("<HH", 65000, 65000) + picture[place + 4 :]


def avif_claiming(width: int, height: int) -> bytes:
    """A grey square of 8 x 8 whose header says another size, to which its decoder scales it."""
    picture = encode(Image.new("RGB", (8, 8), (90, 90, 90)), "AVIF")
    place = picture.index(b"ispe") + 8  # behind the name and the version
    return picture[:place] + struct.pack(">II", width, height) + picture[place + 8 :]


def heic(*brands: bytes) -> bytes:
    listed = b"".join([brands[0], b"\0\0\0\0", *brands[1:]])
    return struct.pack(">I", 8 + len(listed)) + b"ftyp" + listed + b"\0" * 100
