"""The model behind the page, exchanged for another one while people ask: real models."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Iterator

import pytest
import runs
from live_server import endless
from pages import pictures, served, wait_for
from test_chat_routes import Window

from assistant.assistant import Assistant
from errors import PhiSightError
from web import model as models
from web.model import FAILED, LOADING, READY, Model


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Tests hold former models, and pytest holds much that the collector goes through."""
    monkeypatch.setattr(models, "LET_GO_SECONDS", 2.0)


def exchanged(model: Model, source: str) -> None:
    model.begin(source)
    wait_for(lambda: model.state != LOADING)


@contextlib.contextmanager
def exchanging(first: Assistant, tmp_path) -> Iterator[tuple[Window, Model]]:
    """A window of an app whose first model another one can take the place of."""
    model = Model(first, load=lambda source: Assistant.load(source))
    with served(model, tmp_path, runs.finished_run().parent) as site:
        yield Window(site), model
    model.close()


def test_a_former_model_is_freed_and_so_is_the_one_after_it():
    """One that is in the garbage when the collector is told to pass over all that is there stays
    for as long as the process does: gigabytes at each exchange."""
    made: list[weakref.ref] = []

    def load(source: str) -> Assistant:
        loaded = Assistant.load(source)
        made.append(weakref.ref(loaded.model))
        return loaded

    model = Model(load=load)
    for _ in range(3):
        exchanged(model, str(runs.finished_run()))
        assert model.get().model is made[-1]()
    wait_for(lambda: [one() is None for one in made] == [True, True, False])
    model.close()


def test_a_former_model_is_not_passed_over_while_somebody_holds_it(monkeypatch):
    monkeypatch.setattr(models, "LET_GO_SECONDS", 0.1)
    model = Model(load=Assistant.load)
    exchanged(model, str(runs.finished_run()))
    held = model.get()
    gone = weakref.ref(held.model)
    exchanged(model, str(runs.finished_run()))
    wait_for(lambda: not any(one.name == "loading" for one in threading.enumerate()))
    assert not gc.get_freeze_count() and gone() is not None
    del held
    exchanged(model, str(runs.finished_run()))
    wait_for(lambda: gone() is None)
    model.close()


def test_a_model_that_cannot_be_loaded_leaves_the_former_one_and_is_told():
    good = runs.assistant()

    def load(source: str) -> Assistant:
        if source == "damaged":
            raise PhiSightError("damaged: its weights are damaged; take another one")
        if source == "odd":
            raise RuntimeError("odd")
        return good

    told: list[PhiSightError] = []
    model = Model(load=load, source="good")
    model.begin("damaged", told.append)
    wait_for(lambda: bool(told))
    assert model.state == FAILED and "weights" in model.error
    exchanged(model, "good")
    for source, reason in (("damaged", "its weights are damaged"), ("odd", "RuntimeError: odd")):
        exchanged(model, source)
        assert model.state == READY and model.source == "good" and reason in model.error
        assert model.get() is good
    exchanged(model, "good")
    assert not model.error


def test_an_answer_that_is_being_written_is_cut_off_and_kept_when_the_model_is_exchanged(tmp_path):
    with exchanging(endless(), tmp_path) as (window, model):
        settings = {"max_new_tokens": 2000}
        with window.streaming("ask", text="One?", settings=settings) as stream:
            for name, _ in stream:
                if name == "text":
                    break
            exchanged(model, str(runs.finished_run()))
            name, told = list(stream)[-1]
        assert name == "done" and told["conversation"]["turns"][-1]["note"]["reason"] == "cancelled"
        answered = window.answered("ask", text="What colour is the star?")
        assert len(answered["turns"]) == 4


def test_a_question_whose_model_is_exchanged_while_it_looks_can_be_asked_again(tmp_path):
    first = endless()
    with exchanging(first, tmp_path) as (window, model):
        upload = window.upload(pictures(1)[0].read_bytes())
        start = first.start

        def exchange_first(answer) -> None:
            exchanged(model, str(runs.finished_run()))
            start(answer)

        first.start = exchange_first  # type: ignore[method-assign]
        with window.streaming("ask", text="One?", uploads=[upload]) as stream:
            name, told = list(stream)[-1]
        assert name == "error" and told["error"]["key"] == "batch_cut_off"
        assert window.saved() == ["One?"]
        window.version = window.get().json()["version"]
        assert window.answered("regenerate", node=1)["turns"][-1]["text"]


def test_the_rows_that_are_left_when_the_model_is_exchanged_say_so(tmp_path):
    first = endless()
    with exchanging(first, tmp_path) as (window, _):
        upload = window.upload(pictures(1)[0].read_bytes())
        first.close()
        form = {"uploads": [upload], "question": "One?", "settings": {}}
        told = window.client.post("batches", json=form).text
        assert '"batch_cut_off"' in told
