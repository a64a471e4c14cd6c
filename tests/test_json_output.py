"""Answers that are held to a JSON schema, by themselves and through the server."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from typing import Literal

import openai
import pytest
import runs
import torch
from live_server import Live, ask, assistant_of, live
from pydantic import BaseModel, ConfigDict, Field

from api.errors import ApiError
from api.json_output import ANY_OBJECT, JsonConstraint, JsonOutput, Schema
from assistant.text_stream import TextStream
from data.chat import ChatFormat, load_tokenizer
from errors import PhiSightError
from workers.pool import Limits

pytest.importorskip("llguidance", reason="the optional package llguidance is not installed")
REAL = runs.ROOT.parent / "shared" / "real" / "phi-3-mini-tokenizer"


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: Literal["circle", "square", "star"]
    sides: int = Field(ge=0, le=12)


class Picture(BaseModel):
    """A schema as programs make it: nested, with a $ref, a union, and a list."""

    model_config = ConfigDict(extra="forbid", strict=True)
    colour: Literal["red", "dark blue"]
    shapes: list[Shape] = Field(max_length=2)
    note: str | None = Field(max_length=12)
    sure: bool


SHAPE = Picture.model_json_schema()


class Words:
    """A tokenizer, and how many logits its model has."""

    def __init__(self, folder: object, vocabulary: int) -> None:
        self.tokenizer = load_tokenizer(folder)
        chat = ChatFormat.from_tokenizer(self.tokenizer, 1)
        self.stop = set(chat.stop_ids)
        self.vocabulary = vocabulary
        self.output = JsonOutput(self.tokenizer, vocabulary, self.stop)

    def constraint(self, shape: dict) -> JsonConstraint:
        return self.output.constraint(Schema("response_format", shape))

    def walk(self, shape: dict, seed: int, most: int = 400) -> str | None:
        """An answer of tokens that a constraint allows, drawn by lot, as a client would see it;
        None if it did not end."""
        constraint, text = self.constraint(shape), TextStream(self.tokenizer)
        draw = random.Random(seed)
        for _ in range(most):
            logits = constraint.allow(torch.zeros(self.vocabulary))
            allowed = (logits == 0).nonzero()[:, 0].tolist()
            ending = sorted(self.stop & set(allowed))
            token = ending[0] if ending else draw.choice(allowed)
            if token in self.stop:
                return text.shown + text.end()
            text.push(token)
            constraint.take(token)
        return None


@pytest.fixture(scope="module")
def tiny() -> Words:
    return Words(runs.BASE, json.loads((runs.BASE / "config.json").read_text())["vocab_size"])


@pytest.fixture(scope="module", params=["tiny", "real"])
def words(request, tiny) -> Words:
    if request.param == "tiny":
        return tiny
    if not REAL.is_dir():
        pytest.skip("the shared Phi-3-mini tokenizer is not here")
    return Words(REAL, 32064)


def test_whatever_is_allowed_is_json_of_the_schema(words):
    said = [words.walk(SHAPE, seed) for seed in range(40)]
    whole = [text for text in said if text is not None]
    assert len(whole) > 30
    for text in whole:
        Picture.model_validate_json(text)
    assert len(set(whole)) > 20
    assert max(len(one.shapes) for one in map(Picture.model_validate_json, whole)) == 2


def test_any_object_is_an_object(words):
    said = [words.walk(ANY_OBJECT, seed, 60) for seed in range(12)]
    assert all(isinstance(json.loads(text), dict) for text in said if text is not None)
    assert any(text is not None and len(text) > 2 for text in said)


def test_a_first_token_with_a_space_in_front_is_allowed_as_the_model_writes_it(words):
    """`▁{` is what a Phi begins with; its decoder leaves the space out."""
    backend = words.tokenizer.backend_tokenizer
    first = ChatFormat.from_tokenizer(words.tokenizer, 1).encode_text('{"colour"')[0]
    assert words.constraint(SHAPE).allow(torch.zeros(words.vocabulary))[first] == 0
    assert not backend.decode([first]).startswith(" ")


def test_what_ends_a_turn_comes_at_the_end_alone(words):
    constraint = words.constraint({"enum": [7]})
    (seven,) = [i for i in range(words.vocabulary) if words.tokenizer.decode([i]) == "7"][-1:]
    stop = sorted(words.stop)
    assert constraint.allow(torch.zeros(words.vocabulary))[stop].isinf().all()
    constraint.take(seven)
    logits = constraint.allow(torch.zeros(words.vocabulary))
    assert logits[stop].eq(0).all() and logits.isinf().sum() == words.vocabulary - len(stop)


def properties(count: int, inner: dict) -> dict:
    return {f"p{i}": inner for i in range(count)}


def chain(count: int) -> dict:
    """A `$ref` to a `$ref` to a ..."""
    links = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(count)}
    return {"$ref": "#/$defs/a0", "$defs": links | {f"a{count}": {"type": "integer"}}}


def nested(depth: int) -> dict:
    return {"type": "object", "properties": {"a": nested(depth - 1)}} if depth else {}


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ({"$ref": "http://127.0.0.1:9/x.json"}, "not present"),
        ({"$ref": "file:///etc/passwd"}, "not present"),
        ({"type": "object", "properties": properties(10_000, {"type": "string"})}, "characters"),
        (chain(3000), "SIGSEGV"),
        ({"allOf": [{"pattern": f"^.*a.{{20}}b{{{i}}}$"} for i in range(60)]}, "processor time"),
        (nested(100), "recursion limit"),
        (nested(400), "recursion limit"),
        ({"type": "integer", "multipleOf": 982_451_653}, "fuel"),
        ({"not": {"type": "string"}}, "Unimplemented"),
        ({"type": "nonsense"}, "Invalid type"),
        ({"const": "\ud800"}, "hex escape"),
        ({"type": "string", "pattern": "("}, "regex"),
    ],
)
def test_a_schema_that_asks_too_much_is_refused_and_the_next_one_is_not(
    tiny, shape, told, monkeypatch
):
    words = tiny
    monkeypatch.setattr("api.json_output.TRIED", Limits(cpu_seconds=0))
    with pytest.raises(ApiError, match=told) as raised:
        words.constraint(shape)
    assert (raised.value.status, raised.value.param) == (400, "response_format")
    assert words.walk({"enum": ["x"]}, 0) == '"x"'


def test_a_schema_that_proves_too_much_on_the_way_fails_its_own_answer(words):
    constraint = words.constraint({"type": "string", "pattern": "^((((a{100}){100}){100}){100})$"})
    with pytest.raises(PhiSightError, match="^response_format: cannot be met"):
        for _ in range(100):
            logits = constraint.allow(torch.zeros(words.vocabulary))
            constraint.take(int(logits.argmax()))


def test_the_clients_own_options_are_not_taken(tiny):
    shape = {"enum": [[1]], "x-guidance": {"whitespace_pattern": "x+", "lenient": True}}
    assert json.loads(tiny.walk(shape, 1)) == [1]


# -- through the server ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    assistant = assistant_of(cache=True)
    with live(assistant) as running:
        yield running
    assistant.close()


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return server.client()


FORMAT = {"type": "json_schema", "json_schema": {"name": "picture", "schema": SHAPE}}
QUESTION = ask("Describe the picture.")["messages"]


def test_the_clients_parse_gives_its_own_model(client):
    for settings in ({}, {"temperature": 1.5, "seed": 3}, {"top_p": 0.5, "temperature": 1}):
        parsed = client.chat.completions.parse(
            model="tiny", messages=QUESTION, response_format=Picture, max_tokens=300, **settings
        )
        assert parsed.choices[0].finish_reason == "stop"
        assert isinstance(parsed.choices[0].message.parsed, Picture)


def test_a_json_object_streams_as_it_is_whole(client):
    settings = {"messages": QUESTION, "response_format": {"type": "json_object"}, "max_tokens": 40}
    whole = client.chat.completions.create(model="tiny", **settings).choices[0]
    pieces = client.chat.completions.create(model="tiny", stream=True, **settings)
    chunks = [chunk.choices[0] for chunk in pieces]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole.message.content
    assert whole.message.content.startswith("{")
    assert chunks[-1].finish_reason == whole.finish_reason


def test_one_that_is_cut_says_so(client):
    said = client.chat.completions.create(
        model="tiny", messages=QUESTION, response_format=FORMAT, max_tokens=4
    )
    assert said.choices[0].finish_reason == "length" and said.usage.completion_tokens == 4


def test_in_company_each_answer_is_what_it_is_alone(client):
    """Plain ones beside constrained ones of two schemas, and the cache of answers between them."""
    formats = [None, FORMAT, {"type": "json_object"}] * 3

    def say(form: object) -> str | None:
        more = {} if form is None else {"response_format": form}
        said = client.chat.completions.create(
            model="tiny", messages=QUESTION, max_tokens=200, **more
        )
        return said.choices[0].message.content

    alone = [say(form) for form in formats[:3]]
    together: list[str | None] = [None] * len(formats)
    threads = [
        threading.Thread(target=lambda i=i: together.__setitem__(i, say(formats[i])))
        for i in range(len(formats))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone * 3 and len(set(alone)) == 3
    assert Picture.model_validate_json(alone[1])


def test_one_that_fails_on_the_way_is_told_and_harms_no_other(client, server):
    pattern = {"type": "string", "pattern": "^((((a{100}){100}){100}){100})$"}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": pattern}}
    with pytest.raises(openai.BadRequestError, match="cannot be met") as raised:
        client.chat.completions.create(model="tiny", messages=QUESTION, response_format=form)
    assert raised.value.param == "response_format.json_schema.schema"
    with pytest.raises(openai.APIError, match="cannot be met"):
        list(
            client.chat.completions.create(
                model="tiny", messages=QUESTION, response_format=form, stream=True
            )
        )
    assert client.chat.completions.create(model="tiny", messages=QUESTION).choices


def test_json_and_n_grams_that_may_not_come_twice_are_refused_together(client):
    asked = {"model": "tiny", "messages": QUESTION, "extra_body": {"no_repeat_ngram_size": 3}}
    with pytest.raises(openai.BadRequestError, match="leave one of them out") as no:
        client.chat.completions.create(**asked, response_format={"type": "json_object"})
    assert (no.value.code, no.value.param) == ("invalid_value", "no_repeat_ngram_size")
    assert client.chat.completions.create(**asked).choices


def test_without_the_package_it_is_refused_with_what_to_install(client, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(openai.BadRequestError, match="package llguidance here") as no:
        client.chat.completions.create(
            model="tiny", messages=QUESTION, response_format={"type": "json_object"}
        )
    assert (no.value.code, no.value.param) == ("unsupported_parameter", "response_format")
    assert client.chat.completions.create(
        model="tiny", messages=QUESTION, response_format={"type": "text"}
    ).choices
