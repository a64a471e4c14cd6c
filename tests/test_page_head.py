"""The head of the page's HTML: what the first room needs is asked for before Gradio runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from web.app import build_site, web_application
from web.model import Model
from web.page import STATIC, static_path

IMPORT = re.compile(r'^import\b[^;]*?"(\.[^"]+)";$', re.MULTILINE)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conversations")
    with TestClient(web_application(build_site(Model(), conversations=folder))) as client:
        yield client


def imported(script: Path, known: set[Path]) -> set[Path]:
    """A script and all that it imports when it is loaded."""
    if script not in known:
        known.add(script)
        for name in IMPORT.findall(script.read_text()):
            imported((script.parent / name).resolve(), known)
    return known


def test_the_scripts_of_the_first_room_and_no_others_are_asked_for_by_the_html(client):
    page = client.get("/")
    head, ended, _ = page.text.partition("</head>")
    assert ended and int(page.headers["content-length"]) == len(page.content)
    links = re.findall(r'<link rel="modulepreload" href="([^"]+)">', head)
    needed = imported(STATIC / "main.js", set())
    at = static_path()
    assert sorted(links) == sorted(f"{at}/{one.relative_to(STATIC).as_posix()}" for one in needed)
    assert f'<script type="module" src="{at}/main.js"></script>' in head
    for link in links:
        script = client.get(f"/{link}")
        assert script.status_code == 200 and "immutable" in script.headers["cache-control"]


def test_what_is_no_page_is_as_it_was(client):
    assert client.get("/config").json()["title"] == "PhiSight"
    assert "modulepreload" not in client.get("/robots.txt").text
    assert int(client.head("/").headers["content-length"]) == len(client.get("/").content)
