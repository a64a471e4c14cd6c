"""Answers as HTML: whatever a model says, nothing of it does more than be read."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from web.chat.markdown import ATTRIBUTES, LONGEST, TAGS, rendered

VOID = {"br", "hr"}


class Reader(HTMLParser):
    """What a browser finds in HTML: elements, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text = [], [], ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        raise AssertionError(data)

    handle_decl = handle_pi = unknown_decl = handle_comment


def read_safely(text: str) -> Reader:
    """The HTML of an answer, in which nothing stands that may not."""
    page = Reader(rendered(text))
    assert set(page.tags) <= TAGS and page.open == []
    for tag, name, value in page.attributes:
        assert (tag, name) in ATTRIBUTES
        if name == "href":
            scheme = value.partition(":")[0].lower()
            assert scheme in ("http", "https", "mailto")
            assert not any(c in value for c in "\t\r\n \"'<>`")
        elif name == "class":
            assert value.replace("-", "").replace("+", "").replace("#", "").isalnum()
        elif name == "start":
            assert value.isdigit()
    links = [value for tag, name, value in page.attributes if name == "href"]
    opened = [value for tag, name, value in page.attributes if (tag, name) == ("a", "target")]
    related = [value for tag, name, value in page.attributes if (tag, name) == ("a", "rel")]
    assert opened == ["_blank"] * len(links) and len(related) == len(links)
    assert all("noopener" in value for value in related)
    return page


PIECES = st.sampled_from(
    [
        "<script>", "</script>", "<div style='position:fixed'>", "<form action=//x>", "<img src=x",
        " onerror=alert(1)>", "<a href='javascript:alert(1)'>", "<svg/onload=x>", "<!--", "-->",
        "<?x", "<![CDATA[", "]]>", "<b", ">", "[", "]", "](", "](<", ")", "![", "javascript:",
        "data:text/html,", "https://x.y/", "mailto:a@b", "//x", "vbscript:", "&#106;", "&quot;",
        "&lt;", "\\", "`", "```", "```\"onclick=x", "~~~", "# ", "- ", "1. ", "99999999. ", "> ",
        "|", "|-|:-:|", "\n|a|b|\n|:-|-:|\n|c|d|", "\n", "\n\n", "    ", "\t", "*", "**", "_",
        "~~", "'", '"', " \"t\" onmouseover=\"x", "<http://a>", "<javascript:x>",
        "[x]: javascript:y",
        "\0", "\x1b", "\u2028", "é", "汉", " ",
    ]
)  # fmt: skip


@settings(max_examples=400)
@given(st.lists(PIECES | st.text(max_size=4), max_size=25).map("".join))
def test_nothing_comes_out_that_may_not(text):
    read_safely(text)


@given(st.lists(PIECES, max_size=20).map("".join))
def test_an_address_does_nothing_else(address):
    for text in (f"[x]({address})", f"[x](<{address}>)", f"<{address}>", f"![x]({address})"):
        read_safely(text)


@pytest.mark.parametrize(
    "text",
    [
        "<div style='position:fixed;inset:0'>over the page</div>",
        "<form action='https://elsewhere.example'><input name=password></form>",
        "<script>alert(1)</script>",
        "before <img src=x onerror=alert(1)> behind",
        "<style>body{display:none}</style>",
        "<!-- unseen -->",
        "a <b>bold</b> word",
    ],
)
def test_html_is_shown_as_what_it_is(text):
    page = read_safely(text)
    assert page.text.strip() == text and set(page.tags) == {"p"}


@pytest.mark.parametrize(
    "address",
    [
        "javascript:alert(1)",
        "JaVaScRiPt:alert(1)",
        "&#106;avascript:alert(1)",
        "data:text/html,<script>alert(1)</script>",
        "vbscript:x",
        "file:///etc/passwd",
        "//elsewhere.example",
        "/app/conversations",
        "#/training",
        "ftp://x",
        "https:",
        "blob:https://x",
    ],
)
def test_links_lead_to_the_web_and_nowhere_else(address):
    for text in (f"[x]({address})", f"<{address}>", f"[x][y]\n\n[y]: {address}"):
        assert "a" not in read_safely(text).tags


def test_a_picture_is_what_it_is_said_to_show():
    page = read_safely("![a *red* star](https://elsewhere.example/star.png)")
    assert page.tags == ["p"] and page.text.strip() == "a red star"


def test_markdown_is_rendered():
    page = read_safely(
        "# Title\n\nA **bold** [link](https://example.org/a?b=c&d), `x < 1`.\n\n"
        '- one\n- two\n\n3. three\n\n```python "x\nprint(1 < 2)\n```\n\n'
        "|a|b|\n|:-|-:|\n|1|2|\n\n> quoted\n\n~~gone~~ <https://example.org>"
    )
    assert set("h1 strong a code ul ol li pre table blockquote s".split()) - {"s"} <= set(page.tags)
    assert ("a", "href", "https://example.org/a?b=c&d") in page.attributes
    assert ("code", "class", "language-python") in page.attributes
    assert ("ol", "start", "3") in page.attributes
    assert ("td", "class", "right") in page.attributes
    assert "x < 1" in page.text and "print(1 < 2)" in page.text


@pytest.mark.parametrize("text", ["[" * 5000, "> " * 5000, "*a " * 5000, "![" * 5000, "`" * 5000])
def test_what_is_nested_deep_is_still_text(text):
    read_safely(text)


def test_what_is_too_long_is_plain_text():
    page = read_safely("# x <b>" + " y" * LONGEST)
    assert page.tags == ["p"] and page.text.startswith("# x <b>")
