"""What was said as subtitles: SRT, and WebVTT."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from speech.whisper import Segment

CUE_CHARACTERS = 84  # two lines of a subtitle
CLAUSE = re.compile(r"(?<=[.!?,;:。！？，])\s+")


def as_srt(segments: Sequence[Segment]) -> str:
    """Subtitles of at most `CUE_CHARACTERS` characters, numbered."""
    return "".join(
        f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n{text}\n\n"
        for number, (start, end, text) in enumerate(_cues(segments), 1)
    )


def as_vtt(segments: Sequence[Segment]) -> str:
    """The same as WebVTT, in which `&` and `<` have a meaning."""
    lines = ["WEBVTT\n\n"]
    for start, end, text in _cues(segments):
        text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        lines.append(f"{_clock(start, '.')} --> {_clock(end, '.')}\n{text}\n\n")
    return "".join(lines)


def _cues(segments: Sequence[Segment]) -> list[tuple[float, float, str]]:
    return [cue for segment in segments for cue in cues_of(segment)]


def cues_of(segment: Segment) -> Iterator[tuple[float, float, str]]:
    """(start, end, text): a piece in parts, cut after clauses, and between words where one is too
    long. Only where the piece begins and ends was measured: the time between is shared out by
    characters."""
    parts: list[str] = []
    for clause in CLAUSE.split(segment.text):
        for words in [clause] if len(clause) <= CUE_CHARACTERS else clause.split():
            if parts and len(parts[-1]) + 1 + len(words) <= CUE_CHARACTERS:
                parts[-1] += f" {words}"
            else:
                parts.append(words)
    characters = sum(map(len, parts))
    passed = 0
    for part in parts:
        start, passed = passed, passed + len(part)
        length = segment.end - segment.start
        yield (
            segment.start + length * start / characters,
            segment.start + length * passed / characters,
            part,
        )


def _clock(seconds: float, mark: str) -> str:
    """Hours, minutes, seconds, and behind a mark thousandths."""
    thousandths = round(seconds * 1000)
    minutes, thousandths = divmod(thousandths, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{thousandths // 1000:02}{mark}{thousandths % 1000:03}"
