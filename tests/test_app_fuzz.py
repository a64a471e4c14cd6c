"""Whatever is sent to any route of the page is answered or refused in the one form, never a 500."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import runs
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_app_guards import KEY, assert_refusal

from errors import PhiSightError
from web.app import build_site, web_application
from web.model import Model

NAMES = ("..", ".", "%2e%2e", "%2f", "a%00b", "%ff", "done", "0" * 16, "f" * 32, "en", "0", "-1")
ids = st.sampled_from(NAMES) | st.text("0123456789abcdef", min_size=1, max_size=40).map(str)
long = st.sampled_from(["x" * 5000, "写" * 3000, "\0", "\ud800", "../../etc/passwd", "/etc", "~"])
hostile = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | long | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def plausible(schema: dict[str, Any], parts: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values of the form that a JSON schema describes, or nearly."""
    if "$ref" in schema:
        schema = parts[schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        return st.one_of(*(plausible(one, parts) for one in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    kind = schema.get("type")
    if kind == "object":
        fields = schema.get("properties", {})
        needed = {name: plausible(fields[name], parts) for name in schema.get("required", ())}
        others = {n: plausible(f, parts) for n, f in fields.items() if n not in needed}
        return st.fixed_dictionaries(needed, optional=others)
    if kind == "array":
        return st.lists(plausible(schema.get("items", {}), parts), max_size=3)
    if kind == "integer":
        return st.integers(schema.get("minimum", -2), min(schema.get("maximum", 2**63), 2**63))
    if kind == "number":
        return st.floats(allow_nan=False, allow_infinity=False)
    if kind == "boolean":
        return st.booleans()
    if kind == "string":
        return ids | st.text(max_size=20)
    return st.none() | hostile


def bodies(route: dict[str, Any], parts: dict[str, Any]) -> st.SearchStrategy[Any]:
    content = route.get("requestBody", {}).get("content", {})
    schema = content.get("application/json", {}).get("schema", {})
    whole = plausible(schema, parts)

    def with_a_fault(body: Any, name: str, value: Any) -> Any:
        return {**body, name: value} if isinstance(body, dict) else value

    fields = parts.get(schema.get("$ref", "").rpartition("/")[2], {}).get("properties", {"x": 0})
    faulty = st.builds(with_a_fault, whole, st.sampled_from([*fields, "extra"]), hostile)
    return whole | faulty | hostile


def no_process(*arguments: object, **settings: object) -> None:
    raise PhiSightError("process: none is begun here; look at the tests of trainings")


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[TestClient]:
    """A page on which everything may be done, but that a process is begun."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(runs.finished_run(), folder / "done")
    site = build_site(
        runs.assistant(),
        conversations=tmp_path_factory.mktemp("conversations"),
        runs=folder,
        may_train=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        for module in ("launch", "children"):
            theirs = SimpleNamespace(**vars(subprocess) | {"Popen": no_process})
            patch.setattr(f"web.trainings.{module}.subprocess", theirs)
        with TestClient(web_application(site), raise_server_exceptions=False) as client:
            yield client


def ways() -> list[tuple[str, str]]:
    spec = web_application(build_site(Model(), runs=None)).openapi()
    return [(method, path) for path, methods in spec["paths"].items() for method in methods]


def pytest_generate_tests(metafunc) -> None:
    if "path" in metafunc.fixturenames:
        metafunc.parametrize(("method", "path"), ways())


@settings(max_examples=12, suppress_health_check=list(HealthCheck), deadline=None)
@given(data=st.data())
def test_no_route_fails_whatever_it_is_sent(client, method, path, data):
    spec = client.app.openapi()
    route, parts = spec["paths"][path][method], spec["components"]["schemas"]
    query = {}
    for parameter in route.get("parameters", ()):
        name = parameter["name"]
        if parameter["in"] == "path":
            path = path.replace(f"{{{name}}}", data.draw(ids))
        elif parameter["in"] == "query" and data.draw(st.booleans()):
            query[name] = data.draw(
                ids | st.text(max_size=9) | st.sampled_from(["x" * 3000, "nan"])
            )
    content = None
    if method != "get":
        body = data.draw(bodies(route, parts))
        content = json.dumps(body).encode()
    answer = client.request(
        method, path, params=query, content=content,
        headers={**KEY, "content-type": "application/json"},
    )  # fmt: skip
    assert answer.status_code < 500, (method, path, content, answer.text)
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        for block in answer.text.split("\n\n"):
            if block.startswith("event: error"):
                told = block.partition("data: ")[2].encode()
                assert assert_refusal(told)["key"] != "server_failed", (path, content)
    elif answer.status_code >= 400:
        assert_refusal(answer.content)
