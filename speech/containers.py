"""What kind of file a recording is, and where in it the sound lies.

Programs that record to a pipe, or that were killed, leave 0 or a very large number where the length
of the sound belongs. Such a file is read to its end: `sound_of` puts a short header that is right
in front of the sound, whatever stood there before.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

from errors import PhiSightError
from speech.mpeg import TOLERANCE, frame_that_counts, frames_of

HOW_TO_CONVERT = "convert it to WAV, FLAC, MP3 or OGG"
MOST_CHUNKS = 1000  # before the sound; real files have fewer than twenty
MOST_RECORDINGS = 100  # one behind the other in a file
LARGEST_FORMAT = 4096  # bytes of a chunk that says how samples are stored
UNKNOWN_LENGTH = 0x7FFF0000  # files are smaller: from here on a length means that nobody knew it
WAVE64 = bytes.fromhex("f3acd3118cd100c04f8edb8a")  # what follows the name of its chunks
WAVE64_RIFF = bytes.fromhex("2e91cf11a5d628db04c10000")


@dataclass(frozen=True)
class Chunk:
    """A named part of a file: its contents are `length` bytes from `start`, the next chunk, if the
    length is true, begins at `next`."""

    name: bytes
    start: int
    length: int
    next: int


def kind_of(head: bytes, name: str) -> str:
    """The container by its first bytes, or `PhiSightError`. Decoders read many more kinds; only
    these are let through."""
    if head[8:12] == b"WAVE" and head[:4] in (b"RIFF", b"RF64", b"BW64"):
        return "WAV"
    if head[:16] == b"riff" + WAVE64_RIFF and head[24:28] == b"wave":
        return "W64"
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return "AIFF"
    if head[:4] == b".snd":
        return "AU"
    if head[:4] == b"fLaC":
        return "FLAC"
    if head[:4] == b"OggS":
        return "OGG"
    if head[:3] == b"ID3" or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2):
        return "MP3"  # a tag, or the 11 sync bits and layer III
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "WebM"
    if head[4:8] == b"ftyp":
        return "MP4"
    if not head:
        raise PhiSightError(f"{name}: is empty, there is nothing to read; record it again")
    raise PhiSightError(f"{name}: is not a recording that can be read; {HOW_TO_CONVERT}")


def cut_short(name: str, how: str) -> PhiSightError:
    return PhiSightError(f"{name}: is cut short, {how}; copy or record it again")


class NoSound(PhiSightError):
    """A recording is whole and holds nothing to hear; a silent one is another thing."""


def no_sound(name: str) -> NoSound:
    return NoSound(f"{name}: holds no sound, nothing could be decoded; record it again")


def not_readable(name: str, kind: str, reason: str) -> PhiSightError:
    return PhiSightError(
        f"{name}: is not readable as {kind} ({reason}); record it again, or {HOW_TO_CONVERT}"
    )


def recordings_in(file: BinaryIO, kind: str, size: int, name: str) -> list[BinaryIO]:
    """The recordings that stand one behind the other in a file, mostly one: chained Ogg streams
    (RFC 3533), as radios and joined files have them, and WAVs that were joined byte by byte. A
    decoder would read the first."""
    starts = [0]
    following = {"OGG": _next_chain, "WAV": _next_wave}.get(kind)
    while following is not None and (start := following(file, starts[-1])):
        starts.append(start)
        if len(starts) > MOST_RECORDINGS:
            raise PhiSightError(
                f"{name}: is more than {MOST_RECORDINGS} recordings one behind the other; "
                "name them one by one"
            )
    if len(starts) == 1:
        return [file]
    return [
        spliced(b"", file, start, end - start)
        for start, end in zip(starts, [*starts[1:], size], strict=True)
    ]


def _next_chain(file: BinaryIO, start: int) -> int:
    """Where the Ogg stream that begins at `start` is followed by another, 0 where it is the last:
    pages that begin a stream stand together, before all others."""
    others = False
    while True:
        file.seek(start)
        page = file.read(27)
        if len(page) < 27 or page[:4] != b"OggS":
            return 0
        if others and page[5] & 2:
            return start
        others = others or not page[5] & 2
        start += 27 + page[26] + sum(file.read(page[26]))


def _next_wave(file: BinaryIO, start: int) -> int:
    file.seek(start + 4)
    start += 8 + int.from_bytes(file.read(4), "little")
    for place in (start, start + start % 2):
        file.seek(place)
        head = file.read(12)
        if head[:4] == b"RIFF" and head[8:] == b"WAVE":
            return place
    return 0


def sound_of(file: BinaryIO, kind: str, size: int, name: str) -> BinaryIO:
    """`file` as a decoder is to see it, at its beginning. Raises `PhiSightError` for one that ends
    before its header says."""
    if kind in ("WAV", "W64"):
        return _wave(file, kind, size, name)
    if kind == "AIFF":
        return _aiff(file, size, name)
    if kind == "AU":
        return _au(file, size, name)
    if kind == "MP3":
        return _mp3(file, size, name)
    if kind == "OGG" and _ends_inside_a_page(file, size):
        raise cut_short(name, "it ends inside a page")
    file.seek(0)
    return file


# -- chunks ---------------------------------------------------------------------------------------


def _chunks(file: BinaryIO, kind: str, start: int) -> Iterator[Chunk]:
    """The chunks from `start`, at most `MOST_CHUNKS`, by what their headers say."""
    for _ in range(MOST_CHUNKS):
        file.seek(start)
        header = file.read(24 if kind == "W64" else 8)
        if kind == "W64":
            if len(header) < 24 or header[4:16] != WAVE64:
                return
            length = max(0, int.from_bytes(header[16:], "little") - 24)
            following = start + 24 + -(-length // 8) * 8
        else:
            if len(header) < 8 or not all(32 <= letter < 127 for letter in header[:4]):
                return
            length = int.from_bytes(header[4:], "big" if kind == "AIFF" else "little")
            following = start + 8 + length + length % 2
        yield Chunk(header[:4], start + len(header), length, following)
        start = following


def _length_of_sound(file: BinaryIO, kind: str, size: int, chunk: Chunk, name: str) -> int:
    """How many bytes of sound there are from `chunk.start`: as many as the header says, or all
    where what it says cannot be."""
    there = size - chunk.start
    if chunk.length >= UNKNOWN_LENGTH:
        return there
    if chunk.length > there:
        raise cut_short(name, f"{chunk.length - there} bytes of sound are missing")
    if there - chunk.length <= chunk.length:
        return chunk.length
    # More comes after it than it holds itself: other chunks, or sound that was not counted.
    end = chunk.next
    for end in (after.next for after in _chunks(file, kind, chunk.next)):
        if end >= size:
            break
    return chunk.length if end in (size, size + 1) or there == 0 else there


def _contents(file: BinaryIO, chunk: Chunk, name: str, kind: str) -> bytes:
    if chunk.length > LARGEST_FORMAT:
        raise not_readable(name, kind, f"{chunk.length} bytes say how it is stored")
    file.seek(chunk.start)
    return file.read(chunk.length)


# -- WAV, RF64, BW64, W64 -------------------------------------------------------------------------


def _wave(file: BinaryIO, kind: str, size: int, name: str) -> BinaryIO:
    """The sound behind the header of a plain WAV: files of up to 4 GB need no other."""
    stored, true_length = b"", 0
    for chunk in _chunks(file, kind, 40 if kind == "W64" else 12):
        if chunk.name == b"fmt ":
            stored = _contents(file, chunk, name, kind)
        elif chunk.name == b"ds64":  # RF64 and BW64 have 64 bits for the length of the sound here
            true_length = int.from_bytes(_contents(file, chunk, name, kind)[8:16], "little")
        elif chunk.name == b"data":
            if chunk.length == 0xFFFFFFFF and true_length:
                chunk = Chunk(chunk.name, chunk.start, true_length, chunk.start + true_length)
            if not stored:
                break
            length = _length_of_sound(file, kind, size, chunk, name)
            if not length:
                raise no_sound(name)
            head = b"WAVEfmt " + len(stored).to_bytes(4, "little") + stored
            head += bytes(len(stored) % 2) + b"data" + length.to_bytes(4, "little")
            header = b"RIFF" + (len(head) + length).to_bytes(4, "little") + head
            return spliced(header, file, chunk.start, length)
    raise not_readable(name, kind, "it does not say how the sound is stored, or has none")


# -- AIFF and AU ----------------------------------------------------------------------------------


def _aiff(file: BinaryIO, size: int, name: str) -> BinaryIO:
    """The sound behind a header with its true length."""
    kind, common, sound = "AIFF", b"", None
    for chunk in _chunks(file, kind, 12):
        if chunk.name == b"COMM":
            common = _contents(file, chunk, name, kind)
        elif chunk.name == b"SSND":
            sound = Chunk(chunk.name, chunk.start + 8, max(0, chunk.length - 8), chunk.next)
        if common and sound:
            break
    if len(common) < 18 or sound is None:
        raise not_readable(name, kind, "it does not say how the sound is stored, or has none")
    length = _length_of_sound(file, kind, size, sound, name)
    if length <= 0:
        raise no_sound(name)
    channels, bits = int.from_bytes(common[:2], "big"), int.from_bytes(common[6:8], "big")
    frame = max(1, channels * -(-bits // 8))
    if common[2:6] == bytes(4) or length != sound.length:  # frames
        common = common[:2] + (length // frame).to_bytes(4, "big") + common[6:]
    file.seek(8)
    head = file.read(4)
    if head == b"AIFC":
        head += b"FVER" + (4).to_bytes(4, "big") + 0xA2805140.to_bytes(4, "big")
    head += b"COMM" + len(common).to_bytes(4, "big") + common + bytes(len(common) % 2)
    head += b"SSND" + (length + 8).to_bytes(4, "big") + bytes(8)
    header = b"FORM" + (len(head) + length).to_bytes(4, "big") + head
    return spliced(header, file, sound.start, length)


def _au(file: BinaryIO, size: int, name: str) -> BinaryIO:
    """The sound behind a header with its true length, which AU may leave open by design."""
    file.seek(0)
    header = file.read(24)
    start = int.from_bytes(header[4:8], "big")
    if len(header) < 24 or start < 24:
        raise not_readable(name, "AU", "its header is not whole")
    length, there = int.from_bytes(header[8:12], "big"), max(0, size - start)
    if length < UNKNOWN_LENGTH and length > there:
        raise cut_short(name, f"{length - there} bytes of sound are missing")
    if length >= UNKNOWN_LENGTH or there > 2 * length:
        length = there
    if not length:
        raise no_sound(name)
    header = b".snd" + (24).to_bytes(4, "big") + length.to_bytes(4, "big") + header[12:24]
    return spliced(header, file, start, length)


# -- MP3, FLAC and OGG ----------------------------------------------------------------------------


def _mp3(file: BinaryIO, size: int, name: str) -> BinaryIO:
    """The sound behind a frame that says how many others there are."""
    frames = frames_of(file)
    file.seek(0)
    if frames is None or not frames.counted:  # the decoder says what is wrong
        return file
    if frames.claimed > frames.counted + TOLERANCE:
        raise cut_short(name, f"{frames.counted:,} of {frames.claimed:,} frames are there")
    start = frames.start + (len(frames.first) if frames.xing else 0)
    return spliced(frame_that_counts(frames), file, start, size - start)


def promises_length(file: BinaryIO, kind: str) -> bool:
    """Whether the header of a file says how long the sound is, so that less of it is a fault."""
    if kind == "FLAC":
        file.seek(21)  # 36 bits in the block that comes first, STREAMINFO
        head = file.read(5)
        return bool(head and (head[0] & 0x0F or any(head[1:])))
    return False


def _ends_inside_a_page(file: BinaryIO, size: int) -> bool:
    """Whether the last page of an Ogg stream (at most 65,307 bytes, RFC 3533) is incomplete."""
    file.seek(max(0, size - 65_307))
    tail = file.read()
    start = tail.rfind(b"OggS")
    if start < 0:
        return True
    page = tail[start:]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return True
    return len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]])


def spliced(header: bytes, file: BinaryIO, start: int, length: int) -> BinaryIO:
    return cast(BinaryIO, Spliced(header, file, start, length))


class Spliced(io.RawIOBase):
    """`header`, then `length` bytes of `file` from `start`; nothing is copied."""

    def __init__(self, header: bytes, file: BinaryIO, start: int, length: int) -> None:
        self.header, self.file, self.start, self.length = header, file, start, length
        self.place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        whole = len(self.header) + self.length
        self.place = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place}.get(whence, whole))
        return self.place

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        if self.place < len(self.header):
            found = self.header[self.place : self.place + len(buffer)]
        else:
            past = self.place - len(self.header)
            self.file.seek(self.start + past)
            found = self.file.read(max(0, min(len(buffer), self.length - past)))
        buffer[: len(found)] = found
        self.place += len(found)
        return len(found)
