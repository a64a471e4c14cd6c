"""The page with its tabs, and what mounts it into an ASGI application."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from api.page_guard import Guard
from assistant.assistant import Assistant
from data.examples import read_examples
from paths import located
from speech.voice import Voice
from speech.whisper import Speech
from web.failures import tell_failures_once
from web.presence import Presence
from web.temporary import EXAMPLES, UPLOADS, Uploads, own_folder

if TYPE_CHECKING:  # Gradio is imported after what it reads at that moment has been set
    from fastapi import FastAPI

    from web.chat_view import ChatView
    from web.page import Page, Translated

MAX_UPLOAD = 20 * 1024 * 1024  # bytes of one file
UPLOADS_KEPT = (3600, 24 * 3600)  # looked through every so many seconds; removed at that age
STYLE = Path(__file__).with_name("style.css")


def build_app(
    assistant: Assistant,
    *,
    conversations: str | Path = located("cache/conversations"),
    runs: str | Path | None = located("runs"),
    examples: str | Path | None = None,
    speech: Callable[[], Speech] | None = None,
    voice: Callable[[str], Voice] | None = None,
) -> Page:
    """The page, to be mounted by `mount`.

    Args: `conversations`: folder of the saved conversations; `runs`: folder whose runs the training
    tab shows, or None for a public page: it has no such tab, and conversations that nobody has
    touched for a day are removed; `examples`: folder of `read_examples`, or None for
    those of the tiny preset's world; `speech`, and `voice` with a language: give a model, loaded
    when it is first needed (`loaded_once`, `voices_loaded_once`), or None.
    """
    _prepare_gradio()
    import gradio as gr

    from web.batch_page import BatchPage
    from web.chat_page import ChatPage
    from web.chat_view import ChatView
    from web.conversation_store import forget_after_a_day, prepare_root
    from web.examples import draw_examples
    from web.page import Page, Translated
    from web.talk import Talk

    translated = Translated()
    shown = read_examples(examples) if examples else draw_examples(own_folder() / EXAMPLES)
    view = ChatView(prepare_root(conversations), shown, translated)
    if runs is None:
        forget_after_a_day(view.root)
    talk = Talk(assistant, speech, voice)
    chat = ChatPage(talk, view)
    batch = BatchPage(assistant, translated)
    with Page(
        title="PhiSight", analytics_enabled=False, delete_cache=UPLOADS_KEPT, fill_width=True
    ) as blocks:
        with gr.Sidebar(width=300, open=False) as sidebar:
            gr.Markdown("# PhiSight", elem_id="brand")
            tagline = "tagline" if runs is not None else "tagline_public"
            translated(gr.Markdown(elem_id="tagline"), value=tagline)
            view.build_sidebar()
        with gr.Tabs(elem_id="tabs"):
            with translated(gr.Tab(id="chat"), label="chat"):
                view.build_main()
            with translated(gr.Tab(id="batch"), label="batch"):
                batch.build()
            if runs is not None:
                _add_training(runs, translated, view, blocks)
        chat.connect(blocks, sidebar)
        batch.connect(view.session, view.settings)
    blocks.on_left += [talk.stop, batch.stop_window]
    blocks.queue(max_size=256, api_open=False)
    return blocks


def _add_training(runs: str | Path, translated: Translated, view: ChatView, blocks: Page) -> None:
    """The tab of the runs below a folder, among the open tabs."""
    import gradio as gr

    from web.training_page import TrainingPage

    training = TrainingPage(runs, translated, view.session)
    with translated(gr.Tab(id="training"), label="training") as tab:
        training.build()
    training.connect(tab, blocks)


def mount(app: FastAPI, blocks: Page, path: str = "/", frames: Sequence[str] = ()) -> FastAPI:
    """Mount the page into an application, behind its guard; returns the application. `frames`: see
    `Guard`.

    Nothing outside the upload folder can be read back: Gradio checks the paths that a browser names
    only in an app that it has launched itself, so this one is marked as launched.
    """
    import gradio as gr

    theme = gr.themes.Default(  # of the system's own fonts: the default ones are another's files
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="lg",
        font=("system-ui", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"),
        font_mono=("ui-monospace", "Consolas", "monospace"),
    )
    gr.mount_gradio_app(
        app,
        blocks,
        path,
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=MAX_UPLOAD,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        css=STYLE.read_text(),
    )
    blocks.has_launched = True
    uploads = Uploads(own_folder() / UPLOADS, keep=lambda: kept_files(blocks))
    uploads.keep_sweeping()
    app.add_middleware(Presence, left=blocks.left)
    app.add_middleware(Guard, uploads=uploads, frames=frames)
    return app


def kept_files(blocks: Page) -> set[str]:
    """Files of the page itself, such as the examples' pictures."""
    components = blocks.blocks.values()
    return set().union(*(getattr(one, "keep_in_cache", ()) for one in components))


def web_application(page: Page, frames: Sequence[str] = ()) -> FastAPI:
    """What `build_app` has built, as an ASGI application of its own; `frames`: see `Guard`."""
    from fastapi import FastAPI

    return mount(FastAPI(docs_url=None, redoc_url=None, openapi_url=None), page, frames=frames)


def _prepare_gradio() -> None:
    """Set what Gradio reads when it is imported: no look-ups, and a folder of its own for uploads,
    which goes when the program ends."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ["GRADIO_TEMP_DIR"] = str(own_folder() / UPLOADS)
    tell_failures_once()
