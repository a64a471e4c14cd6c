"""Decode one untrusted picture: whatever the bytes are, the result is RGB or one error.

How long a decoder takes over hostile bytes, how much memory, and what it prints, is not bounded
here: `data/reading.py` calls these functions in a child process that is.
"""

from __future__ import annotations

import io
import stat
import struct
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy
from PIL import AvifImagePlugin, ExifTags, Image, UnidentifiedImageError

from errors import PhiSightError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
AVIF_BRANDS = (b"avif", b"avis")
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")
MAX_BYTES = 50 * 1024 * 1024
MAX_PIXELS = 64_000_000
# A progressive JPEG gives every pixel again in each scan: usually in ten, a hostile one in
# hundreds of thousands. This many pixels times scans take about two seconds.
MAX_SCANNED_PIXELS = 1_500_000_000
SCAN = b"\xff\xda"  # stands before each scan, and nowhere within one
JPEG_SEGMENTS = 10_000  # before the first scan; cameras write tens
TIFF_ENTRIES = 1 << 16
TIFF_VALUES = 300_000  # of one entry: the tiles of 16 x 16 of the largest picture
TIFF_SIZES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
TIFF_NUMBERS = (3, 4, 13, 16, 18)  # the kinds that strips and tiles are listed in
GIF_BLOCKS = 4000  # of up to 255 bytes
EXIF_BYTES = 1 << 16  # a JPEG cannot have more in one piece
SCAN_PIXELS = 4096  # a scan costs at least as much as so many pixels
BAND_PIXELS = 4_000_000  # of a picture that are converted at once
MAX_ASPECT = 100  # CLIP scales the short side up to 336: a long strip would explode, then be cut
END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
END_BYTES = 4096  # cameras and editors append to a JPEG
QUICK_FORMATS = ("PNG", "JPEG", "WEBP")  # that can be seen to be whole
HEAD_BYTES, HEAD_READS = 100_000, 1000  # of a header; EXIF has at most 65,533 bytes
TURN_UPRIGHT = {  # what undoes each EXIF orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(
    path: str | Path, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Read and decode the picture at `path` to an upright 8-bit RGB image.

    Raises PhiSightError for all that `read_image_bytes` and `decode_image` refuse.
    """
    return decode_image(read_image_bytes(path, max_bytes), str(path), max_pixels)


def read_image_bytes(
    path: str | Path, max_bytes: int = MAX_BYTES, name: str | None = None
) -> bytes:
    """The bytes of a picture file, not decoded; `name` stands in the errors for its path.

    Raises PhiSightError (file, reason, remedy) if there is no readable regular file of at most
    `max_bytes` bytes there.
    """
    name = _one_line(path if name is None else name)
    try:
        # A pipe or a device must be refused before it is opened: reading one may never end.
        status = Path(path).stat()
        if stat.S_ISDIR(status.st_mode):
            raise PhiSightError(f"{name}: is a folder; give the path of a picture file")
        if not stat.S_ISREG(status.st_mode):
            raise PhiSightError(f"{name}: is not a regular file; give the path of a picture file")
        if status.st_size > max_bytes:
            raise PhiSightError(
                f"{name}: {status.st_size:,} bytes is over the limit of {max_bytes:,}; "
                "save a smaller copy"
            )
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise PhiSightError(f"{name}: no such file; check the name and the image folder") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        reason = getattr(error, "strerror", None) or error
        raise PhiSightError(f"{name}: cannot be read ({_one_line(reason)}); check it") from error


def size_if_whole(
    path: Path, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> tuple[int, int] | None:
    """(width, height) of a picture whose header is sound and whose file ends as a whole one does;
    nothing is decoded.

    A tenth of a millisecond, where decoding takes several. None means only that the picture has to
    be decoded to be judged: formats without a mark at their end are never said to look whole, nor
    is what has more before its pixels than cameras write.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or not 0 < status.st_size <= max_bytes:
            return None
        with _Head(io.FileIO(path)) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, over what is then decoded to be judged
            # Of a WebP, Pillow takes all bytes at once, and C code reads the header.
            file.limited = file.read(4) != b"RIFF"
            file.seek(0)
            with Image.open(file, formats=QUICK_FORMATS) as image:
                file.limited = False
                _check_size(image.size, "", max_pixels)
                if image.info.get("progressive"):
                    file.seek(0)
                    _check_scans(file.read(), image.size, "")
                whole = _ends_whole(file, status.st_size, image)
        return image.size if whole and image.mode not in ("I", "F") else None
    except Exception:  # as in `decode_image`: untrusted bytes make PIL raise anything
        return None


class _Head(io.BufferedReader):
    """A file whose beginning is read, by a parser that might take it in ever so many pieces."""

    def __init__(self, file: io.FileIO) -> None:
        super().__init__(file)
        self.limited, self._left, self._calls = True, HEAD_BYTES, HEAD_READS

    def read(self, count: int | None = -1) -> bytes:
        if self.limited:
            self._left -= HEAD_BYTES if count is None or count < 0 else count
            self._calls -= 1
            if self._left < 0 or self._calls < 0:
                raise OSError("has too long a header")
        return super().read(count)


def _ends_whole(file: BinaryIO, size: int, image: Image.Image) -> bool:
    file.seek(max(0, size - END_BYTES))
    end = file.read(END_BYTES)
    if image.format == "WEBP":  # its header tells the size of the rest
        file.seek(4)
        return int.from_bytes(file.read(4), "little") + 8 <= size
    mark = END_MARKS.get(image.format or "")
    return mark is not None and mark in end


def decode_image(data: bytes | bytearray, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the bytes of one picture to an upright 8-bit RGB image; `name` stands in the errors.

    Accepts PNG, JPEG, WEBP, GIF, BMP, TIFF and AVIF in every usual pixel mode. Transparency is laid
    onto white, an animation gives its first frame, 16-bit grey is scaled (not clipped) to 8 bits,
    and the EXIF orientation is applied. Colour profiles are ignored, as CLIP's own training did.

    Raises PhiSightError (name, reason, remedy) for bytes that are empty, no picture, cut short,
    over `max_pixels` (judged by the header, before anything is decoded), absurdly long and thin,
    or a JPEG of absurdly many scans.
    """
    name = _one_line(name)
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # each takes memory, and other pictures wait
    try:
        with open_image(data, name) as image:
            _check_size(image.size, name, max_pixels)
            if image.format in ("JPEG", "MPO"):
                _check_scans(data, image.size, name)
            image.load()  # everything, so that a cut file fails here; metadata may come last
            return _turn_upright(_to_rgb(image, name), image)
    except (PhiSightError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PhiSightError(
            f"{name}: the header claims more pixels than the limit of {max_pixels:,}; "
            "save a smaller copy"
        ) from error
    except Exception as error:
        if "out of memory" in str(error).lower():  # as libavif says it
            raise MemoryError(str(error)) from error
        # Broken bytes make the decoders raise a dozen types (struct.error, SyntaxError, KeyError,
        # zlib.error...). One untrusted file must never end a run, so all of them become one error.
        raise PhiSightError(
            f"{name}: broken or truncated picture ({_one_line(error) or type(error).__name__}); "
            "fetch or export it again"
        ) from error


def open_image(data: bytes | bytearray, name: str) -> Image.Image:
    """The picture with its header read; its pixels are decoded when they are asked for.

    Raises PhiSightError where the bytes are empty or their beginning is of no known format, and
    anything else that PIL raises.
    """
    if not data:
        raise PhiSightError(f"{name}: the file is empty; fetch or export it again")
    kept: bytes | bytearray = data
    if data.startswith(PNG_SIGNATURE):
        kept = without_notes(data, name)
    elif data.startswith(b"\xff\xd8"):
        _check_segments(data, name)
    elif data.startswith(b"GIF8"):
        _check_comments(data, name)
    elif data.startswith((b"II", b"MM")):
        _check_directory(data, name)
    try:
        return Image.open(io.BytesIO(kept), formats=FORMATS)
    except UnidentifiedImageError as error:
        # The first box of a file of this family names what it holds, first the main brand.
        brands = bytes(data[8 : min(data[3], 200)]) if data[4:8] == b"ftyp" else b""
        if any(brand in brands for brand in HEIC_BRANDS):
            raise PhiSightError(
                f"{name}: is HEIC, as iPhones save it, which is not read; convert it to JPEG"
            ) from error
        if data.startswith(SIGNATURES) or any(brand in brands for brand in AVIF_BRANDS):
            raise PhiSightError(
                f"{name}: begins like a picture but is broken or truncated; fetch it again"
            ) from error
        raise PhiSightError(
            f"{name}: not a picture in a known format ({', '.join(FORMATS)}); convert it to PNG"
        ) from error


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    """Refuse a size that would exhaust memory or that no vision model can use."""
    width, height = size
    if width < 1 or height < 1:
        raise PhiSightError(f"{name}: {width} x {height} has no pixels; export it again")
    if width * height > max_pixels:
        raise PhiSightError(
            f"{name}: {width} x {height} is over the limit of {max_pixels:,} pixels; "
            "save a smaller copy"
        )
    if max(size) > MAX_ASPECT * min(size):
        raise PhiSightError(
            f"{name}: {width} x {height} is over {MAX_ASPECT} times as long as it is thin; crop it"
        )


def _check_scans(data: bytes | bytearray, size: tuple[int, int], name: str) -> None:
    """Refuse a JPEG whose scans are far more work than its pixels."""
    scans = data.count(SCAN)
    if scans > 1 and scans * max(size[0] * size[1], SCAN_PIXELS) > MAX_SCANNED_PIXELS:
        raise PhiSightError(
            f"{name}: has {scans:,} scans of {size[0]} x {size[1]} pixels, far more than a picture"
            " needs; save it again as an ordinary JPEG"
        )


def _check_segments(data: bytes | bytearray, name: str) -> None:
    """Refuse a JPEG with absurdly much before its pixels that PIL would take apart."""
    place, exif = 2, 0
    for _ in range(JPEG_SEGMENTS):
        marker = data[place : place + 2]
        if len(marker) < 2 or marker[0] != 0xFF or marker == SCAN:
            return
        if marker[1] in (0xFF, 0x01) or 0xD0 <= marker[1] <= 0xD8:  # these have no length
            place += 1 if marker[1] == 0xFF else 2
        else:
            length = int.from_bytes(data[place + 2 : place + 4], "big")
            exif += length if data[place + 4 : place + 10] == b"Exif\0\0" else 0
            if exif > EXIF_BYTES:
                raise PhiSightError(f"{name}: has over {EXIF_BYTES:,} bytes of EXIF; save it again")
            place += 2 + length
    raise PhiSightError(
        f"{name}: has over {JPEG_SEGMENTS:,} pieces before its pixels; save it again"
    )


def _check_comments(data: bytes | bytearray, name: str) -> None:
    """Refuse a GIF with absurdly long notes before its first frame: PIL takes time by the square
    of a comment's length."""
    place = 13 + (6 << (data[10] & 7) if len(data) > 10 and data[10] & 0x80 else 0)
    blocks = 0
    while data[place : place + 1] == b"!":
        place += 2
        while place < len(data) and (length := data[place]):
            place += 1 + length
            blocks += 1
            if blocks > GIF_BLOCKS:
                raise PhiSightError(
                    f"{name}: has over {GIF_BLOCKS:,} pieces before its pixels; save it again"
                )
        place += 1


def _check_directory(data: bytes | bytearray, name: str) -> None:
    """Refuse a TIFF whose first directory lists more than the file has room for, as when entries
    refer to the same bytes, or absurdly many strips: PIL makes a Python object of each."""
    order = "<" if data.startswith(b"II") else ">"
    big = data[2:4] in (b"+\0", b"\0+")  # BigTIFF
    count, entry = struct.Struct(order + "HQ"[big]), struct.Struct(order + ("HHI", "HHQ")[big])
    place, size = struct.Struct(order + "IQ"[big]), (12, 20)[big]
    try:
        (begin,) = place.unpack_from(data, (4, 8)[big])
        (entries,) = count.unpack_from(data, begin)
        total = 0
        for index in range(min(entries, TIFF_ENTRIES)):
            _, kind, values = entry.unpack_from(data, begin + count.size + index * size)
            total += values * TIFF_SIZES.get(kind, 1)
            if total > len(data) or (values > TIFF_VALUES and kind in TIFF_NUMBERS):
                raise PhiSightError(
                    f"{name}: its directory lists more than a picture needs; save it again"
                )
    except struct.error:  # cut short, which PIL says
        return


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Any decoded PIL mode to RGB, transparency onto white."""
    if image.mode in ("I", "F"):
        raise PhiSightError(
            f"{name}: its 32-bit pixels have no agreed range; save it with 8 or 16 bits"
        )
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    converted = Image.new("RGB", image.size)
    rows = max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):  # a whole picture's copies would be a gigabyte
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        converted.paste(_band_to_rgb(band), (0, top))
    return converted


def _band_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # PIL's own conversion has clipped or cut in some versions: 65535 must become 255.
        wide = numpy.asarray(image).astype(numpy.uint32)  # (height, width), 0..65535
        image = Image.fromarray(((wide * 255 + 32767) // 65535).astype(numpy.uint8))
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, with_alpha)
    return image.convert("RGB")


def _turn_upright(pixels: Image.Image, source: Image.Image) -> Image.Image:
    """Apply the EXIF orientation of the loaded `source` to its `pixels`."""
    if len(source.info.get("exif", b"")) > EXIF_BYTES:
        return pixels  # its entries may all refer to the same bytes, each of which PIL copies
    try:
        orientation = source.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        # Cameras and editors write much broken EXIF, and PIL raises many types over it. A broken
        # block says nothing of the direction, so the picture stays as stored, as in every viewer.
        return pixels
    turn = TURN_UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return pixels if turn is None else pixels.transpose(turn)


def _one_line(value: object) -> str:
    """The text of `value` with every run of white space, newlines too, as one space."""
    return " ".join(str(value).split())


# -- PNG ------------------------------------------------------------------------------------------

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_CHUNKS = 100_000  # encoders write 8 KB or more in each
# Into these texts some programs write the orientation.
PNG_ORIENTATION = (b"Raw profile type exif", b"XML:com.adobe.xmp")
PNG_TEXT_BYTES = 1 << 16
PNG_TEXTS = 8


def without_notes(data: bytes | bytearray, name: str) -> bytes:
    """A PNG without the chunks that say nothing of its pixels: texts, profiles, the further frames
    of an animation. A text may be packed a thousandfold, and PIL refuses the whole picture for it.

    What is damaged stays as it is. Raises PhiSightError for one in absurdly many pieces.
    """
    view = memoryview(data)
    kept, place, texts = [view[: len(PNG_SIGNATURE)]], len(PNG_SIGNATURE), 0
    for _ in range(PNG_CHUNKS):
        if place + 8 > len(view):
            return b"".join([*kept, view[place:]])
        length, kind = struct.unpack_from(">I4s", view, place)
        end = place + 12 + length
        oriented = texts < PNG_TEXTS and _tells_orientation(kind, view[place + 8 : end - 4])
        texts += oriented
        # By the format, a decoder may leave out the chunks that begin with a small letter.
        if oriented or kind in (b"tRNS", b"eXIf") or not kind[0] & 0x20:
            kept.append(view[place:end])
        place = end
    raise PhiSightError(f"{name}: is cut into over {PNG_CHUNKS:,} pieces; save it again")


def _tells_orientation(kind: bytes, content: memoryview) -> bool:
    """Whether a chunk is a text in which PIL looks for the orientation, and small when unpacked."""
    if kind not in (b"tEXt", b"zTXt", b"iTXt") or len(content) > PNG_TEXT_BYTES:
        return False
    keyword, _, rest = bytes(content).partition(b"\0")
    if keyword not in PNG_ORIENTATION:
        return False
    if kind == b"zTXt":
        packed = rest[1:]
    elif kind == b"iTXt" and rest[:1] not in (b"", b"\0"):
        packed = rest[2:].split(b"\0", 2)[-1]
    else:
        return True
    unpacker = zlib.decompressobj()
    try:
        unpacker.decompress(packed, PNG_TEXT_BYTES)
    except zlib.error:
        return False
    return not unpacker.unconsumed_tail
