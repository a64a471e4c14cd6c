"""The routes of the chat: the list of conversations, one conversation, and answers as streams."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Annotated, Literal

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from api.responses import AsciiJSON
from web import texts
from web.chat.conversation import (
    SavedConversation,
    clean_text,
    dropping,
    showing,
)
from web.chat.export import as_json, as_markdown, file_name, write_archive
from web.chat.forms import (
    AskForm,
    ChangeForm,
    DeleteForm,
    DropForm,
    EditForm,
    NodeForm,
    RegenerateForm,
    VersionForm,
)
from web.chat.store import ConversationStore
from web.chat.talk import Asked, Talk, edited_question, former_question, new_question
from web.chat.told import conversation_json, listed_json
from web.errors import NotThere, RequestError
from web.replies import content_disposition, event_stream
from web.settings import parse_seed
from web.site import Site
from web.uploads import BrowserKey, read_picture, taken

SEARCHING = 2  # at once: each reads all conversations of a browser
KEPT = {"cache-control": "private, max-age=604800, immutable"}
IN_MEMORY = 16 * 2**20  # bytes of an archive; a larger one lies on the disk
PART = 2**20


def router(site: Site) -> APIRouter:
    routes = APIRouter(prefix="/conversations")
    talk = Talk(site)
    _add_reading(routes, site, talk)
    _add_changing(routes, site, talk)
    _add_asking(routes, site, talk)
    return routes


def _add_reading(routes: APIRouter, site: Site, talk: Talk) -> None:
    searching = threading.Semaphore(SEARCHING)

    @routes.get("")
    def listed(key: BrowserKey, query: Annotated[str, Query(max_length=200)] = "") -> Response:
        store = ConversationStore(site.conversations, key)
        if query.strip():
            with searching:
                found = store.overview(query)
        else:
            found = store.overview()
        return AsciiJSON({"conversations": [listed_json(one) for one in found]})

    @routes.get("/{id}")
    def conversation(id: str, key: BrowserKey) -> Response:
        store = ConversationStore(site.conversations, key)
        answering = talk.answering(store.folder_of(id))
        loaded = site.model.loaded
        return AsciiJSON(conversation_json(store.load(id), loaded, answering=answering))

    @routes.get("/{id}/pictures/{name}")
    def picture(id: str, name: str, key: BrowserKey) -> Response:
        path = ConversationStore(site.conversations, key).picture(id, name)
        if not path.is_file():
            raise NotThere("nothing_there")
        return FileResponse(path, headers=KEPT)

    @routes.get("/{id}/export")
    def export(
        id: str,
        key: BrowserKey,
        form: Literal["markdown", "json"],
        language: Annotated[str, Query(max_length=10)] = texts.DEFAULT,
    ) -> Response:
        store = ConversationStore(site.conversations, key)
        saved = store.load(id)
        if form == "json":
            pieces = as_json(saved, lambda name: read_picture(store.picture(id, name)))
            return _download(pieces, "application/json", file_name(saved, ".json"))
        if not any(node.pictures for node in saved.path):
            text = as_markdown(saved, language)
            return _download(iter((text,)), "text/markdown", file_name(saved, ".md"))
        archive = tempfile.SpooledTemporaryFile(IN_MEMORY)
        write_archive(archive, saved, lambda name: store.picture(id, name), language)
        return _download(_parts_of(archive), "application/zip", file_name(saved, ".zip"))


def _download(pieces: Iterator[str] | Iterator[bytes], media_type: str, name: str) -> Response:
    return StreamingResponse(pieces, media_type=media_type, headers=content_disposition(name))


def _parts_of(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        file.seek(0)
        while part := file.read(PART):
            yield part


def _add_changing(routes: APIRouter, site: Site, talk: Talk) -> None:
    def told(conversation: SavedConversation) -> Response:
        return AsciiJSON(conversation_json(conversation, site.model.loaded))

    def idle(key: str, id: str, version: int) -> ConversationStore:
        """Raises `RequestError` where another version is there, or an answer is being written."""
        store = ConversationStore(site.conversations, key)
        store.seen(id, version)
        talk.must_be_idle(store.folder_of(id))
        return store

    @routes.post("/{id}/show")
    def show(id: str, key: BrowserKey, form: NodeForm) -> Response:
        store = idle(key, id, form.version)
        return told(store.change(id, form.version, lambda one: showing(one, form.node)))

    @routes.post("/{id}/cut")
    def cut(id: str, key: BrowserKey, form: NodeForm) -> Response:
        return told(idle(key, id, form.version).cut(id, form.version, form.node))

    @routes.post("/{id}/undo")
    def undo(id: str, key: BrowserKey, form: VersionForm) -> Response:
        return told(idle(key, id, form.version).undo(id, form.version))

    @routes.post("/{id}/drop")
    def drop(id: str, key: BrowserKey, form: DropForm) -> Response:
        store = idle(key, id, form.version)
        return told(store.change(id, form.version, lambda one: dropping(one, form.turns)))

    @routes.patch("/{id}")
    def change(id: str, key: BrowserKey, form: ChangeForm) -> Response:
        store = ConversationStore(site.conversations, key)
        store.load(id)

        def changed(one: SavedConversation) -> SavedConversation:
            if form.title is not None:
                one = replace(one, name=" ".join(clean_text(form.title).split()))
            if form.system is not None:
                one = replace(one, system=clean_text(form.system).strip())
            if form.pinned is not None:
                one = store.pin(id, one) if form.pinned else replace(one, pinned=False)
            return one

        saved = store.change(id, form.version, changed)
        answering = talk.answering(store.folder_of(id))
        return AsciiJSON(conversation_json(saved, site.model.loaded, answering=answering))

    @routes.delete("/{id}")
    async def delete(id: str, key: BrowserKey, form: DeleteForm | None = None) -> Response:
        store = ConversationStore(site.conversations, key)
        await talk.end(store.folder_of(id))
        await run_in_threadpool(store.delete, id, form.version if form else None)
        return AsciiJSON({})

    @routes.post("/{id}/restore")
    def restore(id: str, key: BrowserKey) -> Response:
        restored = ConversationStore(site.conversations, key).restore(id)
        return told(restored) if restored else AsciiJSON({"id": id, "title": None})


def _add_asking(routes: APIRouter, site: Site, talk: Talk) -> None:
    async def streamed(asked: Asked) -> Response:
        """What is known to be refused is refused at once, with a status."""
        await run_in_threadpool(asked.store.seen, asked.id, asked.version)
        parse_seed(asked.settings.seed)
        return event_stream(talk.begin(asked).events(), "an answer")

    @routes.post("/{id}/ask")
    async def ask(id: str, key: BrowserKey, form: AskForm) -> Response:
        files = [taken(site, key, upload).path for upload in form.uploads]
        if form.example is not None:
            example = site.examples.now().get(form.example)
            if example is None:  # of another model, which the page had before
                raise NotThere("example_gone")
            files.append(Path(example.picture))
        if not (form.text.strip() or files):
            raise RequestError("ask_something")
        store = ConversationStore(site.conversations, key)
        begin = new_question(form.system)
        return await streamed(
            Asked(store, id, form.version, begin, form.settings, form.checked_text, files)
        )

    @routes.post("/{id}/edit")
    async def edit(id: str, key: BrowserKey, form: EditForm) -> Response:
        files = [taken(site, key, upload).path for upload in form.uploads]
        store = ConversationStore(site.conversations, key)
        begin = edited_question(form.node)
        return await streamed(
            Asked(store, id, form.version, begin, form.settings, form.checked_text, files)
        )

    @routes.post("/{id}/regenerate")
    async def regenerate(id: str, key: BrowserKey, form: RegenerateForm) -> Response:
        store = ConversationStore(site.conversations, key)
        begin = former_question(form.node)
        return await streamed(Asked(store, id, form.version, begin, form.settings))

    @routes.post("/{id}/stop")
    async def stop(id: str, key: BrowserKey) -> Response:
        talk.stop(ConversationStore(site.conversations, key).folder_of(id))
        return AsciiJSON({})
