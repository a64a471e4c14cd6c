"""Errors of the web app's own: a request that cannot be met, and an upload that cannot be used."""

from __future__ import annotations

from pathlib import Path

from errors import PhiSightError


class RequestError(PhiSightError):
    """A request that cannot be met as it is; the message is a key of web/texts.py."""


class UploadError(PhiSightError):
    """An upload that cannot be used; `path` says which."""

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path
