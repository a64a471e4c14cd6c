"""A hub on this machine: a real HTTP server that speaks the hub's API for the calls that publishing
and fetching a run make, by LFS as before Xet (huggingface_hub speaks that with HF_HUB_DISABLE_XET).

What it can be told to do wrong stands in its attributes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import _http

TOKEN, USER = "hf_of_the_test", "me"
SETTINGS = {"HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}
_NAME = r"/([\w.-]+/[\w.-]+)"
DATASETS = "datasets/"  # begins the name of a repository that holds a data set


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(name: str) -> bool:
    """As the .gitattributes of a new repository says."""
    return name.endswith((".safetensors", ".parquet", ".tar"))


@dataclass
class Repository:
    """Branches, and what each commit holds: name -> bytes."""

    owner: str
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        text = f"{len(self.commits)} {message} {sorted(files)}"
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.branches["main"]]


class Hub(ThreadingHTTPServer):
    """The server and what it holds."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        """(method, path) of every request, in order"""
        self.ranges: list[str] = []
        """the parts of files that were asked for"""
        self.status_of: Callable[[str, str], int | None] = lambda method, path: None
        """a status to answer with in place of what was asked for; 0: none, and the line is cut"""
        self.cuts: dict[str, list[int]] = {}
        """part of a path -> after how many bytes each of the next answers breaks off"""
        self.served: dict[str, bytes] = {}
        """a name -> other bytes than the commit has"""
        self.sizes: dict[str, int] = {}
        """a name -> the size that is announced"""
        self.hidden: set[str] = set()
        """repositories that are told of as if they were not there"""
        self.silent_about: set[str] = set()
        """names that the listing after a commit leaves out"""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def storage(self) -> str:
        """Of the large files: another host, where no token belongs."""
        return f"http://localhost:{self.server_port}"

    def put(self, name: str, files: dict[str, bytes], owner: str = USER) -> str:
        """A repository that holds these files, and its commit."""
        repository = self.repositories.setdefault(name, Repository(owner))
        return repository.commit(dict(files))

    def fetched(self) -> list[str]:
        """The names of the files that were asked for."""
        return [
            path.split("/resolve/")[1].split("/", 1)[1]
            for _, path in self.asked
            if "/resolve/" in path
        ]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away, as one whose connection is cut does, is no news."""


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


@contextmanager
def in_place_of_the_hub(monkeypatch: Any, home: Path) -> Iterator[Hub]:
    """A hub that this process speaks with, and its children that are told so; in an empty home."""
    with running() as hub:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HOME", str(home))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        for name, value in SETTINGS.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between tries
        huggingface_hub.close_session()
        yield hub
    huggingface_hub.close_session()


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Hub

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        self.path_asked = path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if (status := self.server.status_of(self.command, path)) is not None:
                if not status:
                    return self.hang_up()
                raise Refused(status, message="as told")
            for method, pattern, handle in ROUTES:
                if self.command in method.split() and (match := re.fullmatch(pattern, path)):
                    return handle(self, body, *match.groups())
            raise Refused(404, "EntryNotFound")
        except Refused as error:
            self.send(
                error.status,
                json.dumps({"error": error.message}).encode(),
                {"X-Error-Code": error.code, "X-Error-Message": error.message},
            )

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = next((cuts for part, cuts in self.server.cuts.items() if part in self.path_asked), [])
        if cut:
            self.wfile.write(data[: cut.pop(0)])
            self.wfile.flush()
            return self.hang_up()
        self.wfile.write(data)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def send_json(self, value: object, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    # -- who and where ----------------------------------------------------------------------------

    @property
    def is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, name: str, to_write: bool = False) -> Repository:
        found = self.server.repositories.get(name)
        if name in self.server.hidden or found is None or (found.private and not self.is_known):
            raise Refused(404 if self.is_known else 401, "RepoNotFound", "Repository not found")
        if to_write and (not self.is_known or found.owner != USER):
            raise Refused(403, message="you have no right to write here")
        return found

    def commit_of(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repository = self.repository(name)
        if (oid := repository.find(revision)) is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid, repository.commits[oid]

    def whoami(self, body: bytes) -> None:
        if not self.is_known:
            raise Refused(401, message="Invalid credentials in Authorization header")
        self.send_json({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {}}})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        owner = asked["organization"] or USER
        name = f"{owner}/{asked['name']}"
        if not self.is_known:
            raise Refused(401, message="Invalid username or password.")
        if name in self.server.repositories:
            raise Refused(409, message="You already created this model repo")
        if owner != USER:
            raise Refused(403, message=f"you have no right to create a model under {owner}")
        made = Repository(owner, private=asked.get("visibility") == "private")
        made.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, message="initial commit")
        self.server.repositories[name] = made
        self.send_json({"url": f"{self.server.address}/{name}"})

    def branch(self, body: bytes, name: str, branch: str) -> None:
        repository = self.repository(name, to_write=True)
        repository.branches[branch] = repository.branches["main"]
        self.send_json({})

    def validate(self, body: bytes) -> None:
        good = json.loads(body)["content"].startswith("---\n")
        self.send_json({"errors": [], "warnings": [] if good else [{"message": "no metadata"}]})

    # -- what is there ----------------------------------------------------------------------------

    def info(self, body: bytes, name: str, revision: str | None = None) -> None:
        oid, files = self.commit_of(name, revision or "main")
        siblings = []
        for file, data in files.items():
            if file in self.server.silent_about:
                continue
            size = self.server.sizes.get(file, len(data))
            row: dict[str, object] = {"rfilename": file, "size": size, "blobId": git_blob(data)}
            if is_large(file):
                sha256 = hashlib.sha256(data).hexdigest()
                row["lfs"] = {"size": size, "sha256": sha256, "pointerSize": 130}
            siblings.append(row)
        private = self.repository(name).private
        self.send_json(
            {"id": name, "modelId": name, "sha": oid, "private": private, "siblings": siblings}
        )

    def data_info(self, body: bytes, name: str, revision: str | None = None) -> None:
        self.info(body, DATASETS + name, revision)

    def data_resolve(self, body: bytes, name: str, revision: str, file: str) -> None:
        self.resolve(body, DATASETS + name, revision, file)

    def resolve(self, body: bytes, name: str, revision: str, file: str) -> None:
        oid, files = self.commit_of(name, revision)
        if file not in files:
            raise Refused(404, "EntryNotFound", "Entry not found")
        data = self.server.served.get(file, files[file])
        headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if is_large(file):
            sha256 = hashlib.sha256(files[file]).hexdigest()
            self.server.large[f"served-{sha256}"] = data
            headers |= {
                "Location": f"{self.server.storage}/large/served-{sha256}",
                "X-Linked-Size": str(len(data)),
                "X-Linked-ETag": f'"{sha256}"',
            }
            return self.send(302, b"", headers)
        self.send_part(data, headers | {"ETag": f'"{git_blob(files[file])}"'})

    def large(self, body: bytes, oid: str) -> None:
        if self.headers.get("Authorization"):
            raise Refused(400, message="a token was sent to the storage")
        self.send_part(self.server.large[oid], {"ETag": f'"{oid}"'})

    def send_part(self, data: bytes, headers: dict[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if not match:
            return self.send(200, data, headers)
        start = int(match[1])
        self.server.ranges.append(match[0])
        said = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        self.send(206, data[start:], headers | said)

    # -- what comes -------------------------------------------------------------------------------

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        _, files = self.commit_of(name, revision)
        self.repository(name, to_write=True)
        rows = []
        for file in json.loads(body)["files"]:
            large, there = is_large(file["path"]), files.get(file["path"])
            oid = None
            if there is not None:
                oid = hashlib.sha256(there).hexdigest() if large else git_blob(there)
            mode = "lfs" if large else "regular"
            row = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            rows.append(row | ({"oid": oid} if oid else {}))
        self.send_json({"files": rows})

    def batch(self, body: bytes, name: str) -> None:
        self.repository(name, to_write=True)
        objects = []
        for one in json.loads(body)["objects"]:
            oid = one["oid"]
            if oid not in self.server.large:
                href = f"{self.server.storage}/large/{oid}"
                verify = {"href": f"{self.server.address}/verify"}
                one = one | {"actions": {"upload": {"href": href}, "verify": verify}}
            objects.append(one)
        self.send_json({"transfer": "basic", "objects": objects})

    def put_large(self, body: bytes, oid: str) -> None:
        if self.headers.get("Authorization") or hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, message="another sha256")
        self.server.large[oid] = body
        self.send(200, b"")

    def verify(self, body: bytes) -> None:
        one = json.loads(body)
        if len(self.server.large.get(one["oid"], b"")) != one["size"]:
            raise Refused(404, message="not uploaded")
        self.send_json({})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        repository = self.repository(name, to_write=True)
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        parent, files = self.commit_of(name, revision)
        if header.get("parentCommit") not in (None, parent):
            raise Refused(412, message="A commit has happened since.")
        files = dict(files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(files, revision, header["summary"])
        url = f"{self.server.address}/{name}/commit/{oid}"
        self.send_json({"success": True, "commitOid": oid, "commitUrl": url})


ROUTES: list[tuple[str, str, Callable]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", f"/api/models{_NAME}", Handler.info),
    ("GET", f"/api/models{_NAME}/revision/(.+)", Handler.info),
    ("POST", f"/api/models{_NAME}/branch/(.+)", Handler.branch),
    ("POST", f"/api/models{_NAME}/preupload/(.+)", Handler.preupload),
    ("POST", f"/api/models{_NAME}/commit/(.+)", Handler.commit),
    ("POST", rf"{_NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/large/([0-9a-f]{64})", Handler.put_large),
    ("GET HEAD", "/large/(.+)", Handler.large),
    ("POST", "/verify", Handler.verify),
    ("GET", f"/api/datasets{_NAME}", Handler.data_info),
    ("GET", f"/api/datasets{_NAME}/revision/(.+)", Handler.data_info),
    ("GET HEAD", f"/datasets{_NAME}/resolve/([^/]+)/(.+)", Handler.data_resolve),
    ("GET HEAD", f"{_NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]
