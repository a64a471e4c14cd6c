"""The JSON of answers and errors, whole or as server-sent events, in OpenAI's form."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from starlette.responses import JSONResponse

from api.errors import ApiError

FINISH_REASONS = {"filtered": "content_filter"}  # by ours; the others are called the same
EVENT_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class AsciiJSON(JSONResponse):
    """JSON that any text can be told in: an error may quote what is not valid Unicode."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


def error_response(error: ApiError) -> AsciiJSON:
    return AsciiJSON(error.json(), error.status, error.headers)


def event(value: object) -> str:
    """One server-sent event; the text of a string as it is, JSON of anything else."""
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n"


def completion_head(model: str) -> dict[str, Any]:
    """What all chunks of one answer have in common."""
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


def completion(
    model: str, text: str, finish_reason: str | None, usage: dict[str, int]
) -> dict[str, Any]:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": None,
        "finish_reason": finish_reason_of(finish_reason),
    }
    return completion_head(model) | {
        "object": "chat.completion",
        "usage": usage,
        "choices": [choice],
    }


def chunk(
    head: dict[str, Any], delta: dict[str, str], finish_reason: str | None = None
) -> dict[str, Any]:
    choice = {
        "index": 0,
        "delta": delta,
        "logprobs": None,
        "finish_reason": finish_reason_of(finish_reason),
    }
    return head | {"object": "chat.completion.chunk", "choices": [choice]}


def usage_chunk(head: dict[str, Any], usage: dict[str, int]) -> dict[str, Any]:
    return head | {"object": "chat.completion.chunk", "choices": [], "usage": usage}


def finish_reason_of(ours: str | None) -> str | None:
    return None if ours is None else FINISH_REASONS.get(ours, ours)


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
