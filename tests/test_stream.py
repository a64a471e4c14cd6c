"""Records out of a file of any size: what json.loads gives, wherever the window cuts the text."""

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.stream import NotJson, kind_of, read_lines, read_records
from errors import PhiSightError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "real"
HOLES = st.text(" \t\n\r", max_size=3)
ODD_VALUES = (1e300, -0.0, "\u2028", "\\", '"', "\U0001f600", "]", "},{")
plain_values = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
values = st.recursive(
    plain_values | st.sampled_from(ODD_VALUES),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """One file that every example writes anew."""
    return tmp_path_factory.mktemp("stream") / "d.json"


def records(path: Path, text: str, **settings: int) -> list:
    path.write_bytes(text.encode())
    return [record for _, record in read_records(path, **settings)]


def same(first: object, second: object) -> bool:
    return repr(first) == repr(second)  # NaN is not equal to itself, and 1 is equal to True


# -- what is read ---------------------------------------------------------------------------------


@given(st.lists(values, max_size=4), st.integers(1, 40), st.booleans(), HOLES, HOLES, HOLES)
def test_a_list_is_what_json_reads_from_it(file, expected, chunk, escaped, before, between, after):
    items = [json.dumps(value, ensure_ascii=escaped) for value in expected]
    text = before + "[" + between + f"{between},{after}".join(items) + between + "]" + after
    assert same(records(file, text, chunk=chunk), json.loads(text))


@given(st.data(), st.integers(1, 9))
def test_a_damaged_list_is_refused_exactly_when_json_refuses_it(file, data, chunk):
    text = json.dumps(data.draw(st.lists(values, min_size=1, max_size=3)), indent=1)
    place = data.draw(st.integers(1, len(text)))  # the [ stays: without it, it is another form
    text = (
        text[:place]
        + data.draw(st.text('[]{},:" 1e.-\\ntu', max_size=2))
        + text[place + data.draw(st.integers(0, 2)) :]
    )
    try:
        expected = json.loads(text)
    except json.JSONDecodeError:
        with pytest.raises(PhiSightError, match="not JSON"):
            records(file, text, chunk=chunk)
    else:
        assert same(records(file, text, chunk=chunk), expected)


@given(
    st.lists(st.dictionaries(st.text(), values, max_size=2), min_size=1, max_size=4),
    st.integers(1, 40),
    st.sampled_from(["\n", "\r\n", "\n \n"]),
    st.booleans(),
)
def test_lines_are_what_json_reads_from_each(file, expected, chunk, newline, escaped):
    lines = [json.dumps(value, ensure_ascii=escaped) for value in expected]
    assert same(records(file, newline.join(lines), chunk=chunk), expected)


def test_places_are_counted_from_one(file):
    file.write_text('\ufeff{"a": 1}\n\nbroken\n[]\n', encoding="utf-8")
    assert list(read_records(file, chunk=3)) == [
        ("d.json line 1", {"a": 1}),
        ("d.json line 3", NotJson("Expecting value at line 1 column 1")),
        ("d.json line 4", []),
    ]
    assert list(read_lines(file)) == list(read_records(file))
    file.write_text("[1, [2]]")
    assert list(read_records(file)) == [("d.json record 1", 1), ("d.json record 2", [2])]


def test_the_real_file_of_another_project():
    path = SHARED / "llava" / "mllm_demo.json"
    if not path.exists():
        pytest.skip("the shared data files are not here")
    for chunk in (1, 7, 1000, 10**6):
        assert [r for _, r in read_records(path, chunk)] == json.loads(path.read_text("utf-8"))


# -- what is refused, and how it is said ----------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[1,\n {"a": 2},\n {"b" 3}]', "record 3: Expecting ':' delimiter at line 3 column 7"),
        ("[1 2]", "record 1: Expecting ',' delimiter at line 1 column 4"),
        ("[1,]", "record 2: "),
        ('[1, "ab', "record 2: Unterminated string starting at at line 1 column 5"),
        ("[1, 2", "record 2: Expecting ',' delimiter at line 1 column 6"),
        ("[1]\n\n [2]", "after record 1, the end of the list: Extra data at line 3 column 2"),
        ("[" + "1" * 5000 + "]", "record 1: a number is too long"),
        ("[1, " + "[" * 100_000, "record 2: nested too deeply"),
        ("\xa0[1]", "not JSON"),
        ("nul", "Expecting value"),
        ('"text"', "holds text, not a list"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 5, 10**6])
def test_the_message_names_the_record_and_the_place(file, text, message, chunk):
    if chunk == 1 and len(text) > 10_000:
        chunk = 1000
    with pytest.raises(PhiSightError) as caught:
        records(file, text, chunk=chunk)
    assert message in str(caught.value) and str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_records_before_the_damage_are_given(file):
    file.write_text('[{"a": 1}, {"b": 2}, oh]')
    found = []
    with pytest.raises(PhiSightError, match="record 3"):
        found.extend(record for _, record in read_records(file))
    assert found == [{"a": 1}, {"b": 2}]


def test_bytes_that_are_no_text_are_refused_where_they_stand(file):
    file.write_bytes(b'[1, 2, "' + b"x" * 5000 + b'\xff"]')
    with pytest.raises(PhiSightError, match="not UTF-8"):
        list(read_records(file, chunk=100))


@pytest.mark.parametrize("chunk", [1, 50, 10**6])
@pytest.mark.parametrize("closing", ['"]', "", '", 4]'])
def test_a_record_over_the_limit_is_refused(file, chunk, closing):
    text = '[1, "' + "x" * 300 + closing
    if closing == '"]':
        assert records(file, text, chunk=chunk, limit=400)[1] == "x" * 300
    with pytest.raises(PhiSightError, match="record 2 has more than 200 characters|Unterminated"):
        records(file, text, chunk=chunk, limit=200)


@pytest.mark.parametrize("chunk", [1, 50, 10**6])
def test_a_line_over_the_limit_is_told_and_the_next_is_read(file, chunk):
    text = '{"a": 1}\n{"b": "' + "x" * 300 + '"}\n{"c": 3}\n'
    found = records(file, text, chunk=chunk, limit=200)
    assert found == [{"a": 1}, NotJson("the line is longer than 200 characters"), {"c": 3}]


def test_a_lost_quotation_mark_does_not_read_the_rest_of_the_file(file):
    """The first string never ends; the limit ends the search."""
    text = '[{"a": "b}' + ", {'c': 1}" * 20_000
    with pytest.raises(PhiSightError, match="record 1 has more than 1,000 characters"):
        records(file, text, chunk=100, limit=1000)


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["list", "lines"])
def test_memory_does_not_grow_with_the_file(file, form):
    record = json.dumps({"text": "x" * 1000})
    peaks = []
    for count in (300, 3000):
        joined = (",\n" if form == "list" else "\n").join([record] * count)
        file.write_text(f"[{joined}]" if form == "list" else joined)
        tracemalloc.start()
        assert sum(1 for _ in read_records(file, chunk=10_000)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 300_000


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "missing"),
        ("", "empty"),
        ({}, "empty"),
        ([1], "a list"),
        (True, "true or false"),
        (1.5, "a number"),
        ("a", "text"),
        ({"a": 1}, "an object"),
    ],
)
def test_kinds_in_words(value, words):
    assert kind_of(value) == words
