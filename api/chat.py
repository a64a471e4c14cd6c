"""The route `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from api.asking import asked_by, streamed, until_failure
from api.requests import ChatRequest, parse_request
from api.responses import (
    AsciiJSON,
    chunk,
    completion,
    completion_head,
    event,
    usage_chunk,
    usage_of,
)
from assistant.answer import Answer

if TYPE_CHECKING:
    from api.api import Api

CHAT = "/v1/chat/completions"
router = APIRouter()


@router.post(CHAT)
async def chat(
    request: Request,
    asked: Annotated[tuple[ChatRequest, Answer], Depends(asked_by(parse_request))],
) -> Response:
    api: Api = request.app
    question, answer = asked
    pieces = api.pieces(answer, request.state.began)
    if question.stream:
        events = chunks(api.name, answer, pieces, question.include_usage)
        return streamed(api, until_failure(api, events, event))
    text = "".join([piece async for piece in pieces])
    usage = usage_of(answer.prompt_tokens, answer.completion_tokens)
    return AsciiJSON(completion(api.name, text, answer.finish_reason, usage))


async def chunks(
    model: str, answer: Answer, pieces: AsyncIterator[str], include_usage: bool
) -> AsyncIterator[str]:
    """The answer as server-sent events."""
    head = completion_head(model)
    also = {"usage": None} if include_usage else {}
    yield event(chunk(head, {"role": "assistant", "content": ""}) | also)
    async for piece in pieces:
        yield event(chunk(head, {"content": piece}) | also)
    yield event(chunk(head, {}, answer.finish_reason) | also)
    if include_usage:
        usage = usage_of(answer.prompt_tokens, answer.completion_tokens)
        yield event(usage_chunk(head, usage))
    yield event("[DONE]")
