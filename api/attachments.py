"""Files that stand in JSON as text: base64 and data: URLs, as all the programs that write them do.

One parser for pictures and recordings. It takes what RFC 4648 and a browser's `fetch` take (the
WHATWG's "forgiving-base64 decode" and "data: URL processor"): white space anywhere, the padding or
none, either alphabet, percent-encoding, any case of the scheme, parameters, and data: URLs without
base64. Nothing that could mean two files is taken.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field

import numpy

from api.errors import bad, too_large

LONGEST_HEAD = 1000  # characters of a data: URL before its data
WHITE_SPACE = b" \t\n\r\f\v"
# Blanks at its ends and in its midst are not part of a URL, as in a browser.
SCHEME = re.compile(r"[\x00-\x20]*data:", re.IGNORECASE)
# A recorder's `codecs=vp8,opus` holds a comma: base64 begins after its own.
HEX = numpy.full(256, 16, numpy.uint8)  # the value of a hexadecimal digit; 16: it is not one
HEX[list(b"0123456789abcdef")] = range(16)
HEX[list(b"ABCDEF")] = range(10, 16)
BASE64_MARK = re.compile(r";[ ]*base64[ ]*,", re.IGNORECASE)


@dataclass(frozen=True)
class DataURL:
    """A data: URL that is not decoded yet; `kind` is its media type in lower case, or empty."""

    kind: str
    is_base64: bool
    data: str = field(repr=False)

    def decode(self, where: str, max_bytes: int) -> bytes:
        """The file. Raises `ApiError` of status 400 or 413 that names `where`."""
        if self.is_base64:
            return decode_base64(self.data, where, max_bytes)
        try:
            data = percent_decoded(self.data.encode())
        except UnicodeEncodeError:
            raise bad(where, "is not valid Unicode; send base64", "invalid_base64") from None
        return within(data, where, max_bytes)


def read_data_url(url: str) -> DataURL | None:
    """The parts of a data: URL; None for anything else."""
    head = re.sub(r"[\t\r\n]", "", url[:LONGEST_HEAD])
    scheme = SCHEME.match(head)
    if scheme is None:
        return None
    head = head[scheme.end() :]
    # The same blanks stand in the URL, so its data is found by its own mark and not by a length.
    mark = BASE64_MARK.search(head)
    before = head[: mark.start()] if mark else head.partition(",")[0]
    if mark is None and "," not in head:
        return None
    commas = (head[: mark.end()] if mark else before + ",").count(",")
    *_, data = url.split(",", commas)
    kind = re.split("[;,]", before)[0].strip().lower()
    return DataURL(kind, mark is not None, data.partition("#")[0])


def decode_base64(text: str, where: str, max_bytes: int) -> bytes:
    """Base64 of at most `max_bytes` bytes. Raises `ApiError` of status 400 or 413."""
    try:
        plain = text.encode("ascii")
        plain = percent_decoded(plain).translate(bytes.maketrans(b"-_", b"+/"), WHITE_SPACE)
        digits = plain.rstrip(b"=")
        if len(plain) - len(digits) > 2:
            raise binascii.Error("Excess padding")
        if len(digits) // 4 * 3 > max_bytes:  # before it takes memory
            size = f"{len(digits) * 3 // 4:,} bytes"
            raise too_large(where, size, f"{max_bytes:,}", "send a smaller copy")
        data = base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        reason = f"is not base64 ({error}); encode the file again"
        raise bad(where, reason, "invalid_base64") from None
    return within(data, where, max_bytes)


def within(data: bytes, where: str, max_bytes: int) -> bytes:
    if len(data) > max_bytes:
        raise too_large(where, f"{len(data):,} bytes", f"{max_bytes:,}", "send a smaller copy")
    return data


def percent_decoded(text: bytes) -> bytes:
    """`%2B` -> `+`, everywhere; what is not an escape stays as it is.

    All at once: urllib's `unquote_to_bytes` takes 4 s and an object for each of 10 MB of escapes.
    """
    if b"%" not in text:
        return text
    raw = numpy.frombuffer(text + b"  ", numpy.uint8)  # an escape at the end has two behind it
    first, second = HEX[raw[1:-1]], HEX[raw[2:]]
    escapes = (raw[:-2] == ord("%")) & (first < 16) & (second < 16)
    decoded = numpy.where(escapes, first * 16 + second, raw[:-2])  # uint8, wraps where unused
    kept = numpy.ones(len(text) + 2, bool)
    kept[1:-1] &= ~escapes
    kept[2:] &= ~escapes
    return bytes(decoded[kept[:-2]])
