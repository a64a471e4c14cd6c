"""The web app: chat about pictures by text or voice, batches, and the curves of a training.

    python app.py                                   # http://127.0.0.1:7860, the run runs/tiny
    python app.py --run runs/mine --port 8000
    python app.py --host 0.0.0.0                    # lets other machines on the network ask too
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import config as configs
from errors import run_main
from infer import Assistant, add_assistant_flags, load_assistant
from interface.examples import drawn_examples
from interface.spoken import loaded_once
from serving.page_guard import Guard
from serving.server import address_of, listening_socket, run

MAX_UPLOAD = 20 * 1024 * 1024  # bytes of one file
UPLOADS_KEPT = (3600, 24 * 3600)  # looked through every so many seconds; removed at that age
STYLE = Path(__file__).with_name("interface") / "style.css"


def build_app(
    assistant: Assistant, *, conversations: str | Path = "cache/conversations",
    runs: str | Path = "runs", speech: Callable[[], Any] | None = None,
    voice: Callable[[str], Any] | None = None,
) -> Any:
    """The page, a `gradio.Blocks` to be mounted by `mount`.

    Args: `conversations`: folder of the saved conversations; `runs`: folder whose runs the training
    tab shows; `speech`, and `voice` with a language: load a model/speech.py Speech and a
    model/voice.py Voice when they are first needed, or None.
    """
    _prepare_gradio()
    import gradio as gr

    from interface.batch_page import BatchPage
    from interface.chat_page import ChatPage, Example
    from interface.conversations import prepare_root
    from interface.page import Translated
    from interface.talk import Talk
    from interface.training_page import TrainingPage

    translated = Translated()
    talk = Talk(assistant, prepare_root(conversations), speech, voice)
    examples = [Example(question, (path,))
                for question, path, _ in drawn_examples(_temporary_folder("examples"))]
    chat = ChatPage(talk, examples, translated)
    batch = BatchPage(assistant, chat, translated)
    with gr.Blocks(title="PhiSight", analytics_enabled=False, delete_cache=UPLOADS_KEPT,
                   fill_width=True) as blocks:
        with gr.Sidebar(width=300, open=False) as sidebar:
            gr.Markdown("# PhiSight", elem_id="brand")
            translated(gr.Markdown(elem_id="tagline"), value="tagline")
            chat.build_sidebar()
        training = TrainingPage(runs, translated, chat.session)
        with gr.Tabs(elem_id="tabs"):
            with translated(gr.Tab(id="chat"), label="chat"):
                chat.build_main()
            with translated(gr.Tab(id="batch"), label="batch"):
                batch.build()
            with translated(gr.Tab(id="training"), label="training") as tab:
                training.build()
        chat.connect(blocks, sidebar)
        batch.connect()
        training.connect(tab, blocks)
    blocks.queue(max_size=256, api_open=False)
    return blocks


def mount(app: Any, blocks: Any, path: str = "/") -> Any:
    """Mount the page into a `FastAPI` application, with what keeps it to itself; returns that.

    Nothing outside the upload folder can be read back: Gradio checks the paths that a browser names
    only in an app that it has launched itself, so this one is marked as launched.
    """
    import gradio as gr

    theme = gr.themes.Default(  # of the system's own fonts: the default ones are another's files
        primary_hue="indigo", neutral_hue="slate", radius_size="lg",
        font=("system-ui", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"),
        font_mono=("ui-monospace", "Consolas", "monospace"),
    )
    gr.mount_gradio_app(
        app, blocks, path, footer_links=[], run_history=False, show_error=False,
        max_file_size=MAX_UPLOAD, ssr_mode=False, enable_monitoring=False, pwa=False,
        mcp_server=False, theme=theme, css=STYLE.read_text(),
    )
    blocks.has_launched = True
    app.add_middleware(Guard)
    return app


def _prepare_gradio() -> None:
    """Set what Gradio reads when it is imported: no look-ups, and a folder of its own for uploads,
    which goes when the program ends."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if "GRADIO_TEMP_DIR" not in os.environ:
        os.environ["GRADIO_TEMP_DIR"] = _temporary_folder("uploads")


def _temporary_folder(name: str) -> str:
    folder = tempfile.mkdtemp(prefix=f"phisight-{name}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def load_voice(name: str) -> Callable[[str], Any] | None:
    """What loads the voice called `name` for a language, or None for none."""
    def load(language: str) -> Any:
        from model.voice import Voice

        return Voice.load(name, language)

    return load if name else None


def main(arguments: list[str] | None = None) -> int:
    parser = configs.Parser(prog="app.py", description=__doc__.splitlines()[0])
    add_assistant_flags(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="0 takes a free one (%(default)s)")
    parser.add_argument("--conversations", default="cache/conversations",
                        help="folder of the saved conversations (%(default)s)")
    parser.add_argument("--runs", default="runs", help="folder of the training tab's runs")
    parser.add_argument("--speech", help="Whisper: name or .pt file; empty for none"
                                         " (default: the preset's)")
    parser.add_argument("--voice", default="espeak-ng",
                        help="espeak-ng, or folder or hub id of a VITS model; empty for none")
    options = parser.parse_args(arguments)
    with listening_socket(options.host, options.port) as bound:
        assistant = load_assistant(options)
        try:
            announcement = f"PhiSight with {assistant.source}: {address_of(bound)}"
            run(web_app(assistant, options), bound, f"{announcement}  (Ctrl-C ends it)",
                grace=0.0, hurry=assistant.close)
        finally:
            assistant.close()
    return 0


def web_app(assistant: Assistant, options: Any) -> Any:
    """The page as a whole ASGI application, as the options say."""
    name = assistant.config.speech if options.speech is None else options.speech
    return whole_app(assistant, conversations=options.conversations, runs=options.runs,
                     speech=loaded_once(name), voice=load_voice(options.voice))


def whole_app(assistant: Assistant, **settings: Any) -> Any:
    """The page as an ASGI application of its own; `settings` are those of `build_app`."""
    from fastapi import FastAPI

    return mount(FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
                 build_app(assistant, **settings))


if __name__ == "__main__":
    run_main(main)
