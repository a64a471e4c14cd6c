"""The routes of the batch room."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from web import texts
from web.batch.answers import Row, answers
from web.batch.table import MEDIA, Form, TableRow, table
from web.errors import RequestError
from web.replies import Event, content_disposition, event_stream, from_thread
from web.settings import Settings, SettingsForm, settings_from
from web.site import Site
from web.uploads import BrowserKey, taken

MOST_UPLOADS = 1000  # of one request; the page sends its pictures in smaller portions
MOST_BATCHES = 16  # at once; each takes some threads
MOST_LETTERS = 20_000  # of a question
MOST_ROWS = 10_000  # of one request's table
LONG = 200_000  # letters of one cell

Id = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Cell = Annotated[str, Field(max_length=LONG)]


class BatchForm(BaseModel):
    """A question about pictures."""

    model_config = ConfigDict(extra="forbid")

    uploads: list[Id] = Field(max_length=MOST_UPLOADS)
    question: str = Field(max_length=MOST_LETTERS)
    settings: SettingsForm


class RowForm(BaseModel):
    model_config = ConfigDict(extra="forbid")

    picture: Cell
    question: Cell
    answer: Cell | None
    error: Cell | None
    seconds: float | None = Field(ge=0, allow_inf_nan=False)


class TableForm(BaseModel):
    """Rows that the page has, as a file. A page with many sends them in portions, of which the
    first has the head."""

    model_config = ConfigDict(extra="forbid")

    form: Form
    language: str = Field(max_length=10)
    rows: list[RowForm] = Field(max_length=MOST_ROWS)
    head: bool = True


def router(site: Site) -> APIRouter:
    routes = APIRouter(prefix="/batches")
    places = threading.BoundedSemaphore(MOST_BATCHES)

    @routes.post("")
    def ask(form: BatchForm, key: BrowserKey) -> Response:
        """Stream a row for every upload as it is answered; a page that leaves ends all of them."""
        question = form.question.strip()
        if not form.uploads or not question:
            raise RequestError("batch_needs")
        settings = settings_from(form.settings)
        uploads = list(dict.fromkeys(form.uploads))

        def rows(left: Callable[[], bool]) -> Iterator[Row]:
            with place(places):
                yield from answered(site, key, uploads, question, settings, left)

        return event_stream(told(from_thread(rows)), "a batch")

    @routes.post("/table")
    def as_table(form: TableForm) -> Response:
        language = form.language if form.language in texts.LANGUAGES else texts.DEFAULT
        rows = (TableRow(**row.model_dump()) for row in form.rows)
        text = table(form.form, rows, language, form.head)
        return Response(
            text.encode(),
            media_type=f"{MEDIA[form.form]}; charset=utf-8",
            headers=content_disposition(f"phisight-batch.{form.form}"),
        )

    return routes


@contextmanager
def place(places: threading.Semaphore) -> Iterator[None]:
    """One of the places for batches, while the block runs; `RequestError` where none is free."""
    if not places.acquire(blocking=False):
        raise RequestError("batch_busy")
    try:
        yield
    finally:
        places.release()


def answered(
    site: Site,
    key: str,
    uploads: list[str],
    question: str,
    settings: Settings,
    left: Callable[[], bool],
) -> Iterator[Row]:
    """The rows of a browser's uploads, once the model is loaded."""
    assistant = site.model.get(left)
    yield from answers(
        assistant, uploads, lambda id: taken(site, key, id), question, settings, left
    )


async def told(rows: AsyncIterator[Row]) -> AsyncIterator[Event]:
    async for row in rows:
        yield "row", row.told()
    yield "done", {}
