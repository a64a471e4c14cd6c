"""What the page asks first: the model's facts, what can be done here, texts and examples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import runs

from reports.log import METRICS
from speech.spoken import loaded_once
from web.app import build_site, web_application
from web.model import Model
from web.start import facts
from web.start.facts import alignment_of, model_json, name_of
from web.start.hearing import SMALL_BYTES, hearing

TINY_WHISPER = runs.ROOT / "assets/tiny/whisper/tiny.pt"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "mine"


def log(folder: Path, *lines: object) -> None:
    folder.mkdir(exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / METRICS).write_text("".join(f"{text}\n" for text in texts))


def evaluation(step: int, right: float | None, swapped: float = 20.0) -> dict:
    meter = {"right": right, "swapped": swapped, "blank": 25.0}
    return {"kind": "evaluation", "step": step, "validation_loss": 1.0, "alignment": meter}


def get(site, path: str, **headers: str) -> httpx.Response:
    import anyio

    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(app=web_application(site))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get(f"/app/{path}", headers=headers)

    return anyio.run(asked)


# -- the alignment of the checkpoint that is loaded -----------------------------------------------


def test_the_alignment_is_that_of_the_checkpoints_own_step(folder):
    log(folder, evaluation(10, 40.0), evaluation(20, 60.0), evaluation(30, 80.0))
    assert alignment_of(folder, 20) == {"step": 20, "right": 60.0, "swapped": 20.0, "blank": 25.0}
    assert alignment_of(folder, 25)["step"] == 20  # saved between two evaluations
    assert alignment_of(folder, 5) is None  # before the first
    assert alignment_of(folder, None)["step"] == 30


def test_steps_that_were_taken_back_do_not_count(folder):
    rollback = {"kind": "rollback", "step": 20, "from_step": 20, "to_step": 10}
    log(folder, evaluation(10, 40.0), evaluation(20, 5.0), rollback)
    assert alignment_of(folder, 20)["step"] == 10


def test_a_meter_that_cannot_be_shown_is_passed_over(folder):
    log(folder, evaluation(10, 40.0), evaluation(20, None), evaluation(30, 1e300))
    assert alignment_of(folder, 99)["step"] == 10


@pytest.mark.parametrize("lines", [(), ("not JSON", "{}"), ({"kind": "train", "step": 1},)])
def test_a_log_that_says_nothing_of_it_gives_none(folder, lines):
    log(folder, *lines)
    assert alignment_of(folder, 10) is None
    assert alignment_of(folder / "elsewhere", 10) is None


def test_a_log_is_read_again_only_when_it_has_changed(folder, monkeypatch):
    log(folder, evaluation(10, 40.0))
    read = []
    monkeypatch.setattr(
        facts, "read_metrics", lambda path: read.append(path) or [evaluation(10, 40.0)]
    )
    for _ in range(5):
        assert alignment_of(folder, 10)["right"] == 40.0
    assert len(read) == 1
    log(folder, evaluation(10, 40.0), evaluation(20, 60.0))
    alignment_of(folder, 10)
    assert len(read) == 2


# -- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("runs/mine/checkpoint-000955", "mine"),
        ("runs/mine", "mine"),
        ("runs/mine/", "mine"),
        ("runs/mine/best", "mine"),
        ("hf:somebody/phi-sight", "somebody/phi-sight"),
        ("hf:somebody/phi-sight@main", "somebody/phi-sight"),
        ("", ""),
    ],
)
def test_a_model_goes_by_the_name_of_its_run(source, name):
    assert name_of(source) == name


def test_a_checkpoint_that_is_named_from_within_its_run(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert name_of("checkpoint-000955") == "mine"


def test_the_facts_of_a_loaded_model():
    assistant = runs.assistant()
    told = model_json(Model(assistant))
    assert told["state"] == "ready" and told["error"] == ""
    assert told["step"] == assistant.provenance["step"] > 0
    assert told["knows"] == "tiny"  # also where its base lies in another folder than the preset's
    assert told["context"] == assistant.context_tokens
    assert told["alignment"]["step"] <= told["step"]


def test_while_it_is_loaded_its_name_is_known():
    told = model_json(Model(source="runs/mine"))
    assert told == {"state": "loading", "source": "runs/mine", "name": "mine", "error": ""}


def test_a_model_that_could_not_be_loaded(tmp_path):
    def load(source: str):
        raise OSError("the disk is gone")

    failed = []
    model = Model(load=load, source="runs/mine")
    model.begin("runs/mine", failed.append)
    from pages import wait_for

    wait_for(lambda: failed)
    told = model_json(model)
    assert told["state"] == "failed" and "the disk is gone" in told["error"]


# -- what its Whisper can do ----------------------------------------------------------------------


def test_a_small_whisper_translates_nothing(tmp_path):
    large = tmp_path / "large.pt"
    with large.open("wb") as file:
        file.truncate(SMALL_BYTES)
    can = {"translate": True}
    assert hearing(loaded_once(str(TINY_WHISPER))) == {"translate": False}
    assert hearing(loaded_once(str(large))) == can
    assert hearing(loaded_once("base")) == can
    assert hearing(loaded_once("base.en")) == {"translate": False}
    assert hearing(None) == {"translate": False}
    assert hearing(lambda: None) == can  # of which nothing is known


def test_a_whisper_that_is_loaded_says_it_itself():
    pytest.importorskip("whisper", reason="openai-whisper is not installed")
    load = loaded_once(str(TINY_WHISPER))
    before = hearing(load)
    load()
    assert hearing(load) == before


# -- the routes -----------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path):
    return build_site(Model(source="runs/mine"), conversations=tmp_path / "c", runs=tmp_path)


def test_the_start_tells_what_can_be_done_here(site, tmp_path):
    told = get(site, "start").json()
    assert told["model"]["state"] == "loading"
    assert told["can"] == {
        "hear": False,
        "speak": False,
        "translate": False,
        "training": "look",
        "public": False,
    }
    site.runs = None
    site.speech = loaded_once(str(TINY_WHISPER))
    can = get(site, "start").json()["can"]
    assert can["public"] and can["training"] == "none" and can["hear"]


@pytest.mark.parametrize(("accepted", "language"), [("zh-CN,zh;q=0.9", "zh"), ("fr", "en")])
def test_the_language_that_the_browser_speaks(site, accepted, language):
    assert get(site, "start", **{"accept-language": accepted}).json()["language"] == language


def test_texts_and_examples(site):
    texts = get(site, "texts/de").json()
    assert texts["knows_tiny"] == "Dieses winzige Modell kennt gezeichnete Formen, auf Englisch."
    assert get(site, "texts/xx").status_code == 404
    assert get(site, "start").json()["examples"] == []
    site.model.source = str(runs.finished_run())
    shown = get(site, "start").json()["examples"]
    assert get(site, shown[0]["picture"]).content.startswith(b"\x89PNG")
    for key in ("0", shown[0]["key"][1:], f"{shown[0]['key']}.txt"):
        assert get(site, f"examples/{key}").status_code == 404


def test_torch_is_not_loaded_for_it(tmp_path):
    """The page is there before the model: torch alone takes longer than all of it."""
    code = (
        "import sys; from web.app import build_site; from web.model import Model\n"
        "from web.start.routes import told\n"
        f"site = build_site(Model(source='runs/mine'), conversations={str(tmp_path)!r})\n"
        "told(site, 'de'); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, env=os.environ | {})
    assert done.returncode == 0
