"""A multipart/form-data body, which is in memory already -> its parts. No file is written."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from api.errors import ApiError, bad

# A client is told what is wrong with its form; the log is not.
SILENT = logging.Logger("multipart", logging.CRITICAL + 1)
MOST_PARTS = 100
LONGEST_HEADERS = 8192  # bytes of a part's


@dataclass
class FormPart:
    """One field of a form; a file has a `filename` too, which is not used."""

    name: str = ""
    data: bytearray = field(default_factory=bytearray, repr=False)


def parse_multipart(body: bytes, content_type: bytes) -> list[FormPart]:
    """The parts of a form. Raises `ApiError` of status 400."""
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise bad(None, "Content-Type: has no boundary; send multipart/form-data", "invalid_form")
    collected = _Parts()
    try:
        parser = MultipartParser(boundary, collected.callbacks())  # type: ignore[arg-type]
        parser.logger = SILENT
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        reason = f"the body is not multipart/form-data ({error}); send a form"
        raise bad(None, reason, "invalid_form") from None
    if not collected.ended:
        raise bad(None, "the form is cut short; send it again", "invalid_form")
    return collected.parts


class _Parts:
    """Collects what the parser finds."""

    def __init__(self) -> None:
        self.parts: list[FormPart] = []
        self.ended = False
        self._name, self._value, self._headers = bytearray(), bytearray(), 0

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self.begin,
            "on_part_data": self.data,
            "on_header_field": self.header_name,
            "on_header_value": self.header_value,
            "on_header_end": self.header,
            "on_end": self.end,
        }

    def begin(self) -> None:
        if len(self.parts) == MOST_PARTS:
            raise ApiError(413, f"the form has over {MOST_PARTS} fields; send fewer", "too_large")
        self.parts.append(FormPart())
        self._headers = 0

    def data(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1].data += data[start:end]

    def header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += self._counted(data[start:end])

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += self._counted(data[start:end])

    def _counted(self, data: bytes) -> bytes:
        self._headers += len(data)
        if self._headers > LONGEST_HEADERS:
            raise ApiError(413, "a field's headers are too long; send plain fields", "too_large")
        return data

    def header(self) -> None:
        if self._name.lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._value))
            self.parts[-1].name = options.get(b"name", b"").decode("utf-8", "replace")
        self._name, self._value = bytearray(), bytearray()

    def end(self) -> None:
        self.ended = True
