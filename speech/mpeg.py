"""How many frames an MP3 has, written where decoders look for it.

Nothing in an MP3 must say how long it is. Encoders put the number of frames into a first frame
without sound (Xing's), which those that write to a pipe leave out or empty; decoders then guess by
the first bit rate, and stop there. So the frames are counted, which takes 0.1 s an hour of sound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO

KILOBITS = {  # a second, by the index in a header; layer III of MPEG 1, and of 2 and 2.5
    True: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
MOST_TAGS = 100  # ID3 tags before the sound
MOST_FRAMES = 1_000_000  # 7 hours at the highest rate: longer than any recording that is read
WINDOW = 1 << 20  # bytes that are looked into at once
HAS_FRAMES = 1  # of the flags of Xing's frame
TOLERANCE = 2  # frames: some encoders count Xing's frame too


@dataclass(frozen=True)
class Frames:
    """The frames of an MP3."""

    start: int
    """where the first one begins"""
    first: bytes
    """that one, whole"""
    xing: int
    """where within it `Xing` or `Info` stands; 0 if it has sound"""
    claimed: int
    """how many frames with sound it says there are; 0 if it does not say"""
    counted: int
    """how many there are, up to the first bytes that are none"""


def frames_of(file: BinaryIO) -> Frames | None:
    """None where there is no frame behind the tags."""
    start = _behind_tags(file)
    file.seek(start)
    first = file.read(2048)
    length = _length(first[:4])
    if not length or len(first) < length:
        return None
    first = first[:length]
    xing = _place_of_xing(first)
    flags = int.from_bytes(first[xing + 4 : xing + 8], "big") if xing else 0
    claimed = int.from_bytes(first[xing + 8 : xing + 12], "big") if flags & HAS_FRAMES else 0
    return Frames(start, first, xing, claimed, _count(file, start) - (xing > 0))


def frame_that_counts(frames: Frames) -> bytes:
    """Xing's frame with the true count, to be put in place of the first frame if that is Xing's
    too, else before it."""
    count = frames.counted.to_bytes(4, "big")
    if frames.xing:
        kept, place = frames.first, frames.xing
        flags = int.from_bytes(kept[place + 4 : place + 8], "big")
        if flags & HAS_FRAMES:
            return kept[: place + 8] + count + kept[place + 12 :]
    header = bytearray(frames.first[:4])
    header[1] |= 1  # no check sum
    header[2] = 0x90 | header[2] & 0x0C  # a bit rate that has the room, no padding
    frame = bytes(header) + bytes(_side_information(header))
    frame += b"Info" + HAS_FRAMES.to_bytes(4, "big") + count
    return frame.ljust(_length(header), b"\0")


def _behind_tags(file: BinaryIO) -> int:
    place = 0
    for _ in range(MOST_TAGS):
        file.seek(place)
        tag = file.read(10)
        if len(tag) < 10 or tag[:3] != b"ID3":
            break
        size = sum((byte & 0x7F) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0)))
        place += 10 + size + (10 if tag[5] & 0x10 else 0)  # a footer
    return place


def _length(header: bytes | bytearray) -> int:
    """Bytes of a frame of layer III by its first four; 0 if they begin none."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return 0
    rates, kind = RATES.get(header[1] >> 3 & 3), header[1] >> 3 & 3
    index, rate = header[2] >> 4, header[2] >> 2 & 3
    if rates is None or rate == 3 or not 1 <= index <= 14:
        return 0
    bits = KILOBITS[kind == 3][index - 1] * 1000
    return (144 if kind == 3 else 72) * bits // rates[rate] + (header[2] >> 1 & 1)


def _side_information(header: bytes | bytearray) -> int:
    """Bytes between the header and what follows it."""
    mono = header[3] >> 6 == 3
    if header[1] >> 3 & 3 == 3:
        return 17 if mono else 32
    return 9 if mono else 17


def _place_of_xing(frame: bytes) -> int:
    place = 4 + _side_information(frame)
    return place if frame[place : place + 4] in (b"Xing", b"Info") else 0


def _count(file: BinaryIO, start: int) -> int:
    """Frames from `start` on; one that is cut short is none."""
    count, place, held, window = 0, start, start, b""
    while count < MOST_FRAMES:
        if place + 4 > held + len(window):
            file.seek(place)
            held, window = place, file.read(WINDOW)
        length = _length(window[place - held : place - held + 4])
        if not length:
            break
        place += length
        count += 1
    file.seek(0, 2)
    return count - (count > 0 and place > file.tell())
