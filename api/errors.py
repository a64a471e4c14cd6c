"""What a client is told of a request that is refused or failed: one form, OpenAI's."""

from __future__ import annotations

from starlette.exceptions import HTTPException

from api.logs import failed
from assistant.refusals import Blocked, Busy
from errors import PhiSightError

# Fields that a failure may name.
NAMED = ("messages[", "input[", "response_format", "text.format", "no_repeat_ngram_size")


class ApiError(Exception):
    """A request that is refused or failed: its HTTP status and what the client is told."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    def json(self) -> dict[str, object]:
        if self.status >= 500:
            kind = "server_error"
        else:
            kind = "authentication_error" if self.status == 401 else "invalid_request_error"
        return {
            "error": {
                "message": " ".join(self.message.split()),
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


class ClientGone(Exception):
    """The client closed the connection; nobody is left to answer."""


def as_api_error(failure: Exception, what: str, path: str = "") -> ApiError:
    """What the client is told of any failure. What it can do nothing about is logged, with `what`
    failed, and told without details."""
    if isinstance(failure, ApiError):
        return failure
    if isinstance(failure, Busy):
        return busy("too many questions wait")
    if isinstance(failure, Blocked):
        return ApiError(400, str(failure), "content_filter", "messages")
    if isinstance(failure, PhiSightError):  # the assistant does not take the question
        where, colon, _ = str(failure).partition(": ")
        param = where if colon and where.startswith(NAMED) else None
        return ApiError(400, str(failure), "invalid_value", param)
    if isinstance(failure, HTTPException) and failure.status_code == 404:
        return ApiError(404, "no such path; see /v1/models and /v1/chat/completions", "not_found")
    if isinstance(failure, HTTPException) and failure.status_code == 405:
        method = "GET" if "GET" in (failure.headers or {}).get("Allow", "") else "POST"
        message = f"{path}: takes {method} only"
        return ApiError(405, message, "method_not_allowed", headers={"Allow": method})
    failed(what, failure)
    return ApiError(500, "the server failed at this request; its log says why", "internal_error")


def bad(param: str | None, reason: str, code: str = "invalid_value") -> ApiError:
    """A 400 whose message begins with the field that is at fault."""
    return ApiError(400, f"{param}: {reason}" if param else reason, code, param)


def too_large(param: str | None, size: str, limit: str, remedy: str) -> ApiError:
    message = f"{param or 'the body'}: {size} is over the limit of {limit}; {remedy}"
    return ApiError(413, message, "too_large", param)


def busy(reason: str) -> ApiError:
    message = f"{reason}; ask again in a second"
    return ApiError(503, message, "overloaded", headers={"Retry-After": "1"})


def shutting_down() -> ApiError:
    message = "the server is shutting down; ask again later"
    return ApiError(503, message, "shutting_down", headers={"Retry-After": "5"})
