"""What the page sends: taken in within limits, kept for its browser alone, shown, and removed."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from web import temporary, uploads, uploads_routes
from web.app import build_site, web_application
from web.errors import NotThere
from web.model import Model
from web.site import Site
from web.uploads import is_recording, safe_name, taken

MINE, OTHERS = {"X-Browser-Key": "a" * 32}, {"X-Browser-Key": "b" * 32}


def picture(form: str = "PNG", size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, form)
    return file.getvalue()


@pytest.fixture
def site(tmp_path) -> Site:
    site = build_site(Model(), conversations=tmp_path / "conversations", runs=None)
    site.uploads.close()
    site.uploads = temporary.Uploads(tmp_path / "uploads")
    site.uploads.folder.mkdir()
    return site


@pytest.fixture
def client(site) -> TestClient:
    return TestClient(web_application(site), raise_server_exceptions=False)


def send(client: TestClient, data: bytes, name: str, headers: dict[str, str] = MINE):
    return client.post("/app/uploads", params={"name": name}, content=data, headers=headers)


def files(site: Site) -> list[Path]:
    return [path for path in site.uploads.folder.rglob("*") if path.is_file()]


def test_an_upload_is_told_shown_and_removed(client, site):
    data = picture()
    told = send(client, data, "a picture.png").json()
    assert told == {
        "id": told["id"],
        "name": "a picture.png",
        "kind": "picture",
        "bytes": len(data),
    }
    upload = taken(site, MINE["X-Browser-Key"], told["id"])
    assert upload.path.read_bytes() == data and upload.kind == "picture"
    assert site.uploads.held == len(data) and site.uploads.arriving == 0
    seen = client.get(f"/app/uploads/{told['id']}", headers=MINE)
    assert seen.content == data and seen.headers["content-type"] == "image/png"
    assert client.delete(f"/app/uploads/{told['id']}", headers=MINE).json() == {}
    assert client.get(f"/app/uploads/{told['id']}", headers=MINE).status_code == 404
    assert client.delete(f"/app/uploads/{told['id']}", headers=MINE).status_code == 200
    assert files(site) == [] and site.uploads.held == 0


def test_only_its_browser_gets_to_an_upload(client, site):
    told = send(client, picture(), "a.png").json()
    path = f"/app/uploads/{told['id']}"
    assert client.get(path, headers=OTHERS).status_code == 404
    assert client.delete(path, headers=OTHERS).status_code == 200  # and nothing is gone
    assert client.get(path, headers=MINE).status_code == 200
    for headers in ({}, {"X-Browser-Key": "A" * 32}, {"X-Browser-Key": "a" * 31}):
        refused = client.get(path, headers=headers)
        assert refused.status_code == 409 and refused.json()["error"]["key"] == "key_damaged"
    for id in ("..", "../a", "A" * 32, "a" * 33, "", told["id"] + "\n"):
        with pytest.raises(NotThere):
            taken(site, MINE["X-Browser-Key"], id)


@pytest.mark.parametrize("form", ["JPEG", "GIF", "WEBP"])
def test_what_browsers_show_is_sent_as_it_is(client, form):
    data = picture(form)
    told = send(client, data, "a").json()
    seen = client.get(f"/app/uploads/{told['id']}", headers=MINE)
    assert seen.content == data and seen.headers["content-type"] == f"image/{form.lower()}"
    assert seen.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("form", ["TIFF", "BMP", "AVIF"])
def test_other_pictures_are_shown_as_png(client, site, form):
    told = send(client, picture(form), f"a.{form.lower()}").json()
    for _ in range(2):
        seen = client.get(f"/app/uploads/{told['id']}", headers=MINE)
        assert seen.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(seen.content)).size == (8, 8)
    assert len(files(site)) == 2
    client.delete(f"/app/uploads/{told['id']}", headers=MINE)
    assert files(site) == []


@pytest.mark.parametrize(
    ("data", "name", "reason"),
    [
        (b"<svg onload=alert(1)>", "a.svg", "a.svg: "),
        (b"<script>alert(1)</script>", "a.html", "a.html: "),
        (picture()[:40], "half.png", "half.png: "),
        (b"", "nothing.png", "nothing.png: is empty"),
        (b"", "nothing.wav", "nothing.wav: is empty"),
        (b"\x89PNG", "/etc/passwd\nTraceback", "passwdTraceback: "),
    ],
)
def test_what_is_neither_picture_nor_recording_is_refused_and_leaves_nothing(
    client, site, data, name, reason
):
    refused = send(client, data, name)
    assert refused.status_code == 400
    text = refused.json()["error"]["text"]
    assert text.startswith(reason) and "\n" not in text and str(site.uploads.folder) not in text
    assert files(site) == [] and (site.uploads.held, site.uploads.arriving) == (0, 0)


def test_a_recording_is_kept_and_is_no_picture(client, site):
    told = send(client, b"RIFFxxxx", "said.webm").json()
    assert told["kind"] == "recording"
    assert taken(site, MINE["X-Browser-Key"], told["id"]).name == "said.webm"
    assert client.get(f"/app/uploads/{told['id']}", headers=MINE).status_code == 404


@pytest.mark.parametrize("claimed", [True, False])
def test_what_is_too_large_is_refused_while_it_arrives(client, site, claimed, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_UPLOAD", 100_000)
    monkeypatch.setattr(uploads_routes, "MAX_UPLOAD", 100_000)
    monkeypatch.setattr(uploads_routes, "WRITTEN_AT_ONCE", 10_000)
    body = bytes(150_000)
    parts = body if claimed else (body[at : at + 1000] for at in range(0, len(body), 1000))
    refused = client.post("/app/uploads?name=a.wav", content=parts, headers=MINE)
    error = refused.json()["error"]
    assert refused.status_code == 409 and error["key"] == "upload_too_large"
    assert error["values"]["name"] == "a.wav"
    assert files(site) == [] and site.uploads.held == 0


def test_all_uploads_and_those_of_a_browser_are_limited(client, site, monkeypatch):
    monkeypatch.setattr(uploads, "MOST_UPLOADS", 2)
    for _ in range(2):
        first = send(client, b"sound", "a.wav").json()
    assert send(client, b"sound", "a.wav").json()["error"]["key"] == "too_many_uploads"
    assert send(client, b"sound", "a.wav", OTHERS).status_code == 200
    client.delete(f"/app/uploads/{first['id']}", headers=MINE)
    assert send(client, b"sound", "a.wav").status_code == 200
    site.uploads.most = site.uploads.held + 3
    refused = send(client, b"sound", "a.wav", {"X-Browser-Key": "c" * 32})
    assert refused.status_code == 400 and "uploads take" in refused.json()["error"]["text"]
    monkeypatch.setattr(temporary, "SPARE_BYTES", 2**62)
    assert "disk is nearly full" in send(client, b"sound", "a.wav").json()["error"]["text"]
    assert site.uploads.arriving == 0


def test_names_are_made_safe():
    assert safe_name("../../etc/passwd") == "passwd"
    assert safe_name("C:\\pictures\\one.PNG") == "one.PNG"
    assert safe_name("..") == safe_name("") == safe_name("/") == safe_name("\0\n") == "file"
    assert safe_name("a\u202eb\x1b[31m.png") == "ab[31m.png"
    long = safe_name("写" * 500 + ".jpeg")
    assert long.endswith(".jpeg") and len(long.encode()) <= uploads.NAME_BYTES
    assert len(safe_name("a." + "x" * 500).encode()) <= uploads.NAME_BYTES
    assert is_recording("A.WebM") and is_recording("a.mp3") and not is_recording("a.png")
