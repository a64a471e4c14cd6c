"""Errors of the web app's own: requests that cannot be met."""

from __future__ import annotations

from errors import PhiSightError


class RequestError(PhiSightError):
    """A request that cannot be met as things stand; told as the text of a key of web/texts, whose
    {names} are filled from `values`."""

    def __init__(self, key: str, **values: str | int | float) -> None:
        super().__init__(key)
        self.key, self.values = key, values


class NotThere(RequestError):
    """What was asked for is not there, or not any more."""


class NotAllowed(RequestError):
    """What this server was not started for, whoever asks."""
