"""The route `/v1/responses`: answers as response objects, whole or as typed events."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from api.asking import asked_by, streamed, until_failure
from api.responses import AsciiJSON, event
from api.responses_form import ResponsesRequest, parse_responses
from assistant.answer import Answer

if TYPE_CHECKING:
    from api.api import Api

RESPONSES = "/v1/responses"
# Why an answer ended before its end, by our reason.
INCOMPLETE = {"length": "max_output_tokens", "filtered": "content_filter"}
router = APIRouter()


@router.post(RESPONSES)
async def respond(
    request: Request,
    asked: Annotated[tuple[ResponsesRequest, Answer], Depends(asked_by(parse_responses))],
) -> Response:
    api: Api = request.app
    question, answer = asked
    pieces = api.pieces(answer, request.state.began)
    reply = Reply(api.name, question.echo)
    if question.stream:
        return streamed(api, until_failure(api, reply.events(answer, pieces), reply.failed))
    text = "".join([piece async for piece in pieces])
    return AsciiJSON(reply.ended(answer, text))


class Reply:
    """The response object of one answer, and the events that tell it."""

    def __init__(self, model: str, echo: dict[str, Any]) -> None:
        self.message_id = f"msg_{uuid.uuid4().hex}"
        self.numbers: Iterator[int] = itertools.count()
        self.common: dict[str, Any] = echo | {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "background": False,
            "error": None,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "tool_choice": "auto",
            "tools": [],
            "truncation": "disabled",
        }

    def begun(self) -> dict[str, Any]:
        return self.common | {
            "status": "in_progress",
            "incomplete_details": None,
            "output": [],
            "usage": None,
        }

    def ended(self, answer: Answer, text: str) -> dict[str, Any]:
        """The response to an answer that has ended."""
        why = INCOMPLETE.get(answer.finish_reason or "")
        status = "incomplete" if why else "completed"
        return self.common | {
            "status": status,
            "incomplete_details": {"reason": why} if why else None,
            "completed_at": None if why else int(time.time()),
            "output": [self.message(status, [part(text)])],
            "usage": {
                "input_tokens": answer.prompt_tokens,
                "input_tokens_details": {"cached_tokens": answer.reused_tokens},
                "output_tokens": answer.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": answer.prompt_tokens + answer.completion_tokens,
            },
        }

    def message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.message_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    async def events(self, answer: Answer, pieces: AsyncIterator[str]) -> AsyncIterator[str]:
        """The answer as server-sent events, each with its type and number."""
        yield self.event("response.created", response=self.begun())
        yield self.event("response.in_progress", response=self.begun())
        item = self.message("in_progress", [])
        yield self.event("response.output_item.added", output_index=0, item=item)
        place = {"item_id": self.message_id, "output_index": 0, "content_index": 0}
        yield self.event("response.content_part.added", **place, part=part(""))
        text = ""
        async for piece in pieces:
            text += piece
            yield self.event("response.output_text.delta", **place, delta=piece, logprobs=[])
        yield self.event("response.output_text.done", **place, text=text, logprobs=[])
        yield self.event("response.content_part.done", **place, part=part(text))
        response = self.ended(answer, text)
        (item,) = response["output"]
        yield self.event("response.output_item.done", output_index=0, item=item)
        yield self.event(f"response.{response['status']}", response=response)

    def failed(self, error: dict[str, Any]) -> str:
        """The event of an error: by OpenAI's reference its fields, for its clients `error` too."""
        told = error["error"]
        fields = {name: told[name] for name in ("code", "message", "param")}
        return self.event("error", **fields, error=told)

    def event(self, kind: str, **fields: Any) -> str:
        number = next(self.numbers)
        return f"event: {kind}\n" + event({"type": kind, "sequence_number": number} | fields)


def part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
