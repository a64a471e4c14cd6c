"""Answers as HTML that is safe to put into the page: Markdown without HTML, pictures and styles.

A model can be made to say anything, so nothing of what it says may do more than be read: whatever
is not one of `TAGS` and `ATTRIBUTES` does not come out, and links lead only to the web and to mail.
"""

from __future__ import annotations

import html
import re
from collections.abc import MutableMapping, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.renderer import RendererHTML
    from markdown_it.token import Token

# Characters. The worst text takes 70 microseconds for each, prose 3.
LONGEST = 100_000  # what is longer is shown as plain text
LONG = 20_000  # what is longer is not remembered
REMEMBERED = 500  # texts
LINK = re.compile(r"(?:https?://[^\s/?#]|mailto:[^\s@]+@)[^\s]*\Z", re.ASCII | re.IGNORECASE)
LANGUAGE = re.compile(r"[a-zA-Z0-9+#-]{1,20}\Z")
TAGS = frozenset(
    "a blockquote br code em h1 h2 h3 h4 h5 h6 hr li ol p pre s strong table tbody td th thead tr"
    " ul".split()
)
ATTRIBUTES = frozenset(
    [("a", "href"), ("a", "rel"), ("a", "target"), ("code", "class"), ("ol", "start")]
    + [("td", "class"), ("th", "class")]
)
ALIGNED = {"text-align:left": "left", "text-align:center": "center", "text-align:right": "right"}


def rendered(text: str) -> str:
    """The HTML of an answer."""
    return _remembered(text) if len(text) <= LONG else rendered_once(text)


@lru_cache(REMEMBERED)
def _remembered(text: str) -> str:
    return rendered_once(text)


def rendered_once(text: str) -> str:
    """The same of a text that is not asked for again, such as an answer that still grows."""
    if len(text) > LONGEST:
        return f"<p>{html.escape(text)}</p>"
    return str(_parser().render(text))


@cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False, "maxNesting": 20})
    parser.enable(["table", "strikethrough"])
    parser.disable(["reference"])  # an answer has no footnotes, and may not hide where links lead
    vars(parser)["validateLink"] = is_link
    parser.add_render_rule("image", _picture)
    parser.add_render_rule("link_open", _link)
    parser.add_render_rule("link_close", _link_end)
    parser.add_render_rule("fence", _fence)
    for cell in ("td_open", "th_open"):
        parser.add_render_rule(cell, _cell)
    return parser


def is_link(address: str) -> bool:
    """Whether an address may be led to; all others stay text."""
    return LINK.match(address) is not None


def _picture(
    self: RendererHTML,
    tokens: Sequence[Token],
    index: int,
    options: Any,
    env: MutableMapping[str, Any],
) -> str:
    """What a picture is said to show: no picture of somebody else's is fetched."""
    children = tokens[index].children or ()
    return html.escape(self.renderInlineAsText(children, options, env))


def _link(
    self: RendererHTML,
    tokens: Sequence[Token],
    index: int,
    options: Any,
    env: MutableMapping[str, Any],
) -> str:
    address = str(tokens[index].attrGet("href"))
    if not is_link(address):  # an empty one is not asked about before
        return ""
    return f'<a href="{html.escape(address)}" target="_blank" rel="noopener noreferrer nofollow">'


def _link_end(
    self: RendererHTML,
    tokens: Sequence[Token],
    index: int,
    options: Any,
    env: MutableMapping[str, Any],
) -> str:
    begin = next(n for n in range(index, -1, -1) if tokens[n].type == "link_open")  # none nests
    return "</a>" if is_link(str(tokens[begin].attrGet("href"))) else ""


def _fence(
    self: RendererHTML,
    tokens: Sequence[Token],
    index: int,
    options: Any,
    env: MutableMapping[str, Any],
) -> str:
    token = tokens[index]
    named = token.info.split(maxsplit=1)
    is_plain = not named or not LANGUAGE.match(named[0])
    kind = "" if is_plain else f' class="language-{named[0]}"'
    return f"<pre><code{kind}>{html.escape(token.content)}</code></pre>\n"


def _cell(
    self: RendererHTML,
    tokens: Sequence[Token],
    index: int,
    options: Any,
    env: MutableMapping[str, Any],
) -> str:
    token = tokens[index]
    aligned = ALIGNED.get(str(token.attrGet("style")))
    return f'<{token.tag} class="{aligned}">' if aligned else f"<{token.tag}>"
