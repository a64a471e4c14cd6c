"""Decode one untrusted picture safely: whatever the bytes are, the result is RGB or one error."""

from __future__ import annotations

import stat
from io import BytesIO
from pathlib import Path

import numpy
from PIL import ExifTags, Image, UnidentifiedImageError

from errors import PhiSightError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
MAX_BYTES = 50 * 1024 * 1024
MAX_PIXELS = 64_000_000
MAX_ASPECT = 100  # CLIP scales the short side up to 336: a long strip would explode, then be cut
END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
END_BYTES = 4096  # cameras and editors append to a JPEG
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


def looks_whole(path: Path, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> bool:
    """Whether a picture's header is sound and its file ends as a whole one does; nothing decoded.

    A tenth of a millisecond, where decoding takes several. False means only that `load_image` has
    to judge: formats without a mark at their end are never said to look whole.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or not 0 < status.st_size <= max_bytes:
            return False
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            _check_size(image.size, "", max_pixels)
            file.seek(max(0, status.st_size - END_BYTES))
            end = file.read(END_BYTES)
            if image.format == "WEBP":  # its header tells the size of the rest
                file.seek(4)
                return int.from_bytes(file.read(4), "little") + 8 <= status.st_size
            mark = END_MARKS.get(image.format or "")
            return mark is not None and mark in end and image.mode not in ("I", "F")
    except Exception:  # as in `decode_image`: untrusted bytes make PIL raise anything
        return False


def decode_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the bytes of one picture to an upright 8-bit RGB image; `name` stands in the errors.

    Accepts PNG, JPEG, WEBP, GIF, BMP and TIFF in every usual pixel mode. Transparency is laid onto
    white, an animation gives its first frame, 16-bit grey is scaled (not clipped) to 8 bits, and
    the EXIF orientation is applied. Colour profiles are ignored, as CLIP's own training did.

    Raises PhiSightError (name, reason, remedy) for bytes that are empty, no picture, cut short,
    over `max_pixels` (judged by the header, before anything is decoded) or absurdly long and thin.
    """
    name = _one_line(name)
    if not data:
        raise PhiSightError(f"{name}: the file is empty; fetch or export it again")
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            _check_size(image.size, name, max_pixels)
            image.load()  # everything, so that a cut file fails here; metadata may come last
            return _turn_upright(_to_rgb(image, name), image)
    except PhiSightError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PhiSightError(
            f"{name}: the header claims more pixels than the limit of {max_pixels:,}; "
            "save a smaller copy"
        ) from error
    except UnidentifiedImageError as error:
        if data.startswith(SIGNATURES):
            raise PhiSightError(
                f"{name}: begins like a picture but is broken or truncated; fetch it again"
            ) from error
        raise PhiSightError(
            f"{name}: not a picture in a known format ({', '.join(FORMATS)}); convert it to PNG"
        ) from error
    except Exception as error:
        # Broken bytes make the decoders raise a dozen types (struct.error, SyntaxError, KeyError,
        # zlib.error...). One untrusted file must never end a run, so all of them become one error.
        raise PhiSightError(
            f"{name}: broken or truncated picture ({_one_line(error) or type(error).__name__}); "
            "fetch or export it again"
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


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Any decoded PIL mode to RGB, transparency onto white."""
    if image.mode.startswith("I;16"):
        # PIL's own conversion has clipped or cut in some versions: 65535 must become 255.
        wide = numpy.asarray(image).astype(numpy.uint32)  # (height, width), 0..65535
        image = Image.fromarray(((wide * 255 + 32767) // 65535).astype(numpy.uint8))
    elif image.mode in ("I", "F"):
        raise PhiSightError(
            f"{name}: its 32-bit pixels have no agreed range; save it with 8 or 16 bits"
        )
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, with_alpha)
    return image.convert("RGB")


def _turn_upright(pixels: Image.Image, source: Image.Image) -> Image.Image:
    """Apply the EXIF orientation of the loaded `source` to its `pixels`."""
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
