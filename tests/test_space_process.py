"""An exported Space as the hub runs it: alone in its folder, behind the hub's proxy, in a frame of
the hub's page, asked by a browser."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
import runs
import spaces
from pages import WAIT, User, chromium, pictures
from space_proxy import PAGE, SPACE_HOST, hub_before

from data.examples import read_examples

QUESTION = "How many objects are there?"
IN_SPACE = {"SPACE_ID": "owner/name", "SPACE_HOST": SPACE_HOST, "OMP_NUM_THREADS": "1500m"}
# What the page does without: this browser lets no frame of another site keep anything, and our
# policy lets the page ask nobody else, as Gradio's does for the Space's name on the hub.
DENIED = ("localStorage", "/api/spaces/by-subdomain/", "Failed to fetch")


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home") / "app"
    shutil.copytree(spaces.exported(), folder)
    noted = folder.parent / "noted"
    with spaces.started(folder, noted, **IN_SPACE) as running:
        yield running


def asked(running, path: str, **headers: str) -> httpx.Response:
    return httpx.get(
        f"http://127.0.0.1:{running.port}{path}",
        headers={"Host": SPACE_HOST, **{n.replace("_", "-"): v for n, v in headers.items()}},
    )


class FramedUser(User):
    """Meets the Space in the page of the hub."""

    def __init__(self, browser) -> None:
        self.faults = []
        self.context = browser.new_context(ignore_https_errors=True, locale="en-GB")
        self.context.set_default_timeout(WAIT)
        self.window = self.context.new_page()
        self.window.on("console", lambda m: m.type == "error" and self._complain(m.text))
        self.window.on("pageerror", lambda error: self._complain(str(error)))
        self.open()

    def _complain(self, fault: str) -> None:
        if not any(known in fault for known in DENIED):
            self.faults.append(fault)

    def open(self) -> None:
        self.window.goto(PAGE)
        self.page = next(f for f in self.window.frames if SPACE_HOST in f.url)
        self.page.locator("#tagline", has_text="Ask about pictures").wait_for(state="attached")
        self.page.locator("[data-ready=true]").wait_for()
        self.page.locator("#question textarea").wait_for()


def test_a_browser_asks_in_the_hubs_frame_and_reads_what_infer_says(running, tmp_path):
    with hub_before(running.port, tmp_path) as hub, chromium() as start:
        user = FramedUser(start(*hub.arguments))
        page = user.page
        assert page.get_by_role("link", name="Chat", exact=True).count() == 1
        assert page.get_by_role("link", name="Training").count() == 0
        assert "removed after a day" in page.locator("#tagline").text_content()
        listed = read_examples(running.folder / "examples")
        page.locator(".welcome .example").first.wait_for()
        shown = page.locator(".welcome .example").all_inner_texts()
        assert [text.strip() for text in shown] == [e.question for e in listed] != []
        user.ask(QUESTION, pictures(1)[0])
        (_, question), (_, answer) = user.answers(1)
        assert question == QUESTION and user.pictures() == 1
        user.window.screenshot(path=os.environ.get("PHISIGHT_SPACE_PICTURE", tmp_path / "a.png"))
        user.context.close()
        assert user.faults == []
    said = subprocess.run(
        [
            os.path.join(runs.ROOT, ".venv/bin/python"),
            "infer.py",
            f"--run={runs.finished_run()}",
            f"--image={pictures(1)[0]}",
            f"--prompt={QUESTION}",
        ],
        cwd=runs.ROOT,
        env=runs.environment() | {"PHISIGHT_KERNELS": "off"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer == " ".join(said.stdout.split()) != ""


def test_it_writes_nowhere_but_in_its_storage_and_knows_no_other_code_of_ours(running):
    asked(running, "/")
    bytecode, storage = "__pycache__", running.folder / "storage"
    written = {path for path in running.notes("writes") if bytecode not in path.parts}
    written.discard(Path(os.devnull))
    assert written and [path for path in written if not path.is_relative_to(storage)] == []
    assert running.notes("reads") == []
    assert not Path("/dev/null/home").exists()
    lost = subprocess.run(
        [spaces.lonely_python(), "-c", "import app"],
        cwd=storage,
        env=spaces.environment(running.noted),
        capture_output=True,
        text=True,
    )
    assert "No module named 'app'" in lost.stderr


def test_the_hubs_page_may_show_it_and_others_may_not(running):
    framed = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}
    page = asked(running, "/", Sec_Fetch_Dest="iframe", **framed)
    assert page.status_code == 200
    policy = page.headers["content-security-policy"].split("; ")
    assert "frame-ancestors 'self' https://huggingface.co" in policy
    picture = {"Sec_Fetch_Mode": "no-cors", "Sec_Fetch_Dest": "image"}
    assert asked(running, "/config", **(framed | picture)).status_code == 403
    origin = f"https://{SPACE_HOST}"
    assert asked(running, "/config", Origin=origin).status_code == 200
    assert asked(running, "/config", Origin="https://evil.hf.space").status_code == 403
    assert asked(running, "/config", Origin="https://huggingface.co").status_code == 403
    assert asked(running, "/", Host="evil.example").status_code == 403
    assert asked(running, "/", Host=f"127.0.0.1:{running.port}").status_code == 200


def test_its_page_is_reached_by_https_and_by_its_name(running):
    config = asked(running, "/config", X_Forwarded_Proto="https").json()
    assert config["root"] == f"https://{SPACE_HOST}"


def test_nobody_reads_its_files_or_trains(running):
    for path in ("space.json", "app.py", "run/metrics.jsonl", "/etc/passwd", "storage/tmp"):
        name = path if path.startswith("/") else running.folder / path
        assert asked(running, f"/gradio_api/file={name}").status_code in (403, 404)
    assert not any((running.folder / name).exists() for name in ("train.py", "runs"))
    can = asked(running, "/app/start").json()["can"]
    assert can["training"] == "none" and can["public"]
    for path in ("/app/runs", "/app/runs/run", "/app/trainings", "/app/exports"):
        assert asked(running, path, X_Browser_Key="a" * 32).status_code in (403, 404), path
