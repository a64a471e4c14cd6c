"""The page: a Gradio page that holds one `gr.HTML`, in which the rooms of web/static are shown.

Gradio gives the page, its place in an application and its start; docs/app.md says what it could not
give, and why the rooms ask the routes of web/ and not Gradio's queue.
"""

from __future__ import annotations

import hashlib
import html
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from web.gradio_import import import_gradio

if TYPE_CHECKING:
    from fastapi import FastAPI

STATIC = Path(__file__).with_name("static")
TITLE = "PhiSight"
# The room is given the element; where it lies is told by the page's own address, which a proxy in
# front may have put below another path.
START = """
import(new URL("{main}", document.baseURI)).then((page) => page.mount(element));
"""


@cache
def static_path() -> str:
    """Where the files of web/static are served, below the page: the path names their content, so
    that a browser may keep them for ever and never shows a former version's."""
    content = hashlib.sha256()
    for path in sorted(STATIC.rglob("*")):
        if path.is_file():
            content.update(path.relative_to(STATIC).as_posix().encode() + b"\0" + path.read_bytes())
    return f"app/static/{content.hexdigest()[:16]}"


def mount_page(app: FastAPI) -> None:
    """Mount the page at / of an application."""
    import_gradio()
    import gradio as gr

    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(
            html_template='<div id="phisight"></div>',
            js_on_load=START.replace("{main}", f"{static_path()}/main.js"),
            apply_default_css=False,
            elem_id="rooms",
        )
    gr.mount_gradio_app(
        app,
        blocks,
        "/",
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        head=head(),
        theme=gr.themes.Base(  # of the system's own fonts: the default ones are files to load
            font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
        ),
    )
    blocks.has_launched = True


def head() -> str:
    """What Gradio puts into the page's head: the styles, behind its own."""
    at = static_path()
    # What all rooms share comes first, so that a room's own rule wins where both say something.
    styles = sorted(STATIC.rglob("*.css"), key=lambda path: (path.parent.name != "core", path))
    lines = [
        '<meta name="color-scheme" content="light dark">',
        *(f'<link rel="stylesheet" href="{_url(at, path)}">' for path in styles),
    ]
    return "\n".join(lines)


def early_head() -> str:
    """What stands in the head of the HTML itself: the scripts of the first room are asked for while
    Gradio's own are, and main.js asks the server how things are before there is a place to show."""
    at = static_path()
    scripts = [path for path in sorted(STATIC.rglob("*.js")) if is_first(path)]
    lines = [
        f'<script type="module" src="{_url(at, STATIC / "main.js")}"></script>',
        *(f'<link rel="modulepreload" href="{_url(at, path)}">' for path in scripts),
    ]
    return "\n".join(lines)


def is_first(script: Path) -> bool:
    """Whether a script is needed for the room that is shown first, the chat with its voice. One
    runs in the audio thread, which asks for it by itself."""
    room = script.relative_to(STATIC).parts[0]
    return room in ("core", "chat", "voice", "main.js") and script.name != "tap.js"


def _url(at: str, path: Path) -> str:
    return html.escape(f"{at}/{path.relative_to(STATIC).as_posix()}", quote=True)
