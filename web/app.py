"""The web app as an ASGI application: its page, and the routes that the rooms of the page ask."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from api.page_guard import OURS, Guard
from paths import located
from web.early import Early
from web.model import Model
from web.page import early_head, mount_page, static_path
from web.replies import NothingElse, tell_refusals
from web.site import Site
from web.temporary import UPLOADS, Uploads, own_folder

if TYPE_CHECKING:
    from fastapi import FastAPI

    from assistant.assistant import Assistant
    from speech.voice import Voice
    from speech.whisper import Speech


def build_site(
    assistant: Assistant | Model,
    *,
    conversations: str | Path = located("cache/conversations"),
    runs: str | Path | None = located("runs"),
    examples: str | Path | None = None,
    speech: Callable[[], Speech] | None = None,
    voice: Callable[[str], Voice] | None = None,
    may_train: bool = False,
    trainings_at_once: int = 1,
) -> Site:
    """What an app is made of.

    Args: `assistant`: loaded, or a `Model` that loads one; `conversations`: folder of the saved
    conversations; `runs`: folder whose runs the training room shows, or None for a public page: it
    has no such room, and conversations that nobody has touched for a day are removed; `examples`:
    folder of `read_examples`, or None for those that the run carries; `speech`, and `voice` with a
    language: give a model, loaded when it is first needed (`loaded_once`,
    `voices_loaded_once`), or None; `may_train`: whether visitors may start, stop and export
    trainings; `trainings_at_once`: how many may train in `runs` at a time.
    """
    from web.chat.sweep import keep_sweeping, prepare_root
    from web.examples import Examples

    model = assistant if isinstance(assistant, Model) else Model(assistant)
    shown = Examples(model, examples)
    root = prepare_root(conversations)
    uploads = Uploads(own_folder() / UPLOADS)
    uploads.keep_sweeping()
    return Site(
        closing=[uploads.close, keep_sweeping(root, strangers=runs is None)],
        model=model,
        conversations=root,
        uploads=uploads,
        runs=None if runs is None else Path(runs),
        may_train=may_train and runs is not None,
        trainings_at_once=trainings_at_once,
        examples=shown,
        speech=speech,
        voice=voice,
    )


def web_application(site: Site, frames: Sequence[str] = ()) -> FastAPI:
    """A site as an ASGI application; `frames`: see `Guard`."""
    from fastapi import FastAPI
    from starlette.staticfiles import StaticFiles

    from web import uploads_routes as uploads
    from web.batch import routes as batch
    from web.chat import routes as chat
    from web.page import STATIC
    from web.speech import routes as speech
    from web.start import routes as start

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        for close in site.closing:
            close()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    tell_refusals(app)
    rooms = [start, uploads, chat, speech, batch]
    if site.runs is not None:  # a page for strangers, such as a Space, has not even the files
        from web.training import routes as training
        from web.trainings import routes as trainings

        rooms += [training, trainings]
    for room in rooms:
        app.include_router(room.router(site), prefix="/app")
    app.mount(f"/{static_path()}", StaticFiles(directory=STATIC), name="static")
    app.router.routes.append(NothingElse(app.router, OURS))  # what is not there is not Gradio's
    mount_page(app)
    app.add_middleware(Early, lines=early_head())
    app.add_middleware(Guard, static=f"/{static_path()}/", frames=frames)
    return app
