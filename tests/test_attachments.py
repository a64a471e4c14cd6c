"""Files written as text: all that the formats allow is read, and nothing as another file."""

from __future__ import annotations

import base64
import urllib.parse

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.attachments import decode_base64, percent_decoded, read_data_url
from api.errors import ApiError

BLANKS = st.text(" \t\n\r", max_size=2)


def decoded(url: str, max_bytes: int = 10**6) -> bytes:
    found = read_data_url(url)
    assert found is not None and found.kind.startswith(("image/", "audio/")), url
    return found.decode("here", max_bytes)


def refusal(text: str, max_bytes: int = 100) -> ApiError:
    with pytest.raises(ApiError) as raised:
        decode_base64(text, "here", max_bytes)
    return raised.value


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,aGk/Pz4+",
        "DATA:IMAGE/PNG;BASE64,aGk/Pz4+",
        "Data:Image/Png;Base64,aGk_Pz4-",
        "data:image/png;base64,aGk/\n  Pz4+\r\n",
        "\n data:image/png;base64,aGk/Pz4+ ",
        "data:image/png;base64,aGk%2FPz4%2B",
        "data:image/png;base64,aGk%2fPz4%2b%0A",
        "data:image/png;charset=utf-8;base64,aGk/Pz4+",
        'data:image/png;name="a b.png";base64,aGk/Pz4+',
        "data:image/png;name=a,b.png;base64,aGk/Pz4+",
        "data:image/png; base64,aGk/Pz4+",
        "data:image/png;base64 ,aGk/Pz4+",
        "data:image/svg+xml;base64,aGk/Pz4+#shape",
        "data:image/png,hi%3F%3F%3E%3E",
        "data:image/png;charset=utf-8,hi??>>",
        "data:audio/webm;codecs=vp8,opus;base64,aGk/Pz4+",
        "da\nta:image/png;ba\tse64,aGk/Pz4+",
    ],
)
def test_all_ways_to_write_a_data_url(url):
    assert decoded(url) == b"hi??>>"


@pytest.mark.parametrize("text", ["aA==", "aA=", "aA", " a\nA = = ", "a%41%3d%3D", "aB"])
def test_base64_with_its_padding_or_without(text):
    assert decode_base64(text, "here", 1) == b"h"


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "aGk=x",
        "aA===",
        "aA==aA==",
        "=aA=",
        "aGk*",
        "a.b.",
        "aGk%",
        "%zz",
        "aG\u0131",
        "\ud800",
    ],
)
def test_what_is_not_base64_is_refused(text):
    assert (refusal(text).status, refusal(text).code) == (400, "invalid_base64")


def test_a_file_is_limited_by_its_bytes_however_it_is_written():
    exact = base64.b64encode(bytes(90)).decode()
    for text in (exact, "\n".join(exact), urllib.parse.quote(exact, safe="")):
        assert len(decode_base64(text, "here", 90)) == 90
        assert refusal(text, 89).status == 413
    found = read_data_url("data:image/png," + "%00" * 90)
    assert len(found.decode("here", 90)) == 90
    with pytest.raises(ApiError, match="90 bytes is over the limit of 89"):
        found.decode("here", 89)


@given(
    st.binary(max_size=60),
    st.sampled_from(["data:", "DATA:", "Data:"]),
    st.sampled_from(["", ";charset=utf-8", ';name="x.png"', ";a=b;c=d"]),
    st.booleans(),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 90), BLANKS), max_size=4),
)
def test_a_file_survives_every_way_to_write_it(data, scheme, parameters, url_safe, escaped, blanks):
    encode = base64.urlsafe_b64encode if url_safe else base64.b64encode
    text = encode(data).decode()
    text = text.rstrip("=") if len(blanks) % 2 else text
    for place, blank in blanks:
        text = text[:place] + blank + text[place:]
    text = urllib.parse.quote(text) if escaped else text
    assert decode_base64(text, "here", 60) == data
    assert decoded(f"{scheme}image/PNG{parameters};base64,{text}") == data
    plain = urllib.parse.quote_from_bytes(data, safe="")
    assert decoded(f"{scheme}image/PNG{parameters},{plain}") == data


@settings(max_examples=300)
@given(st.binary(max_size=30) | st.text("%0aF=+x", max_size=30).map(str.encode))
def test_percent_decoding_is_urllibs(text):
    assert percent_decoded(text) == urllib.parse.unquote_to_bytes(text)


@settings(max_examples=300)
@given(st.text(max_size=40) | st.text("data:image/;base64,%= \n", max_size=60))
def test_any_text_is_a_file_or_refused(text):
    for url in (text, "data:image/png;base64," + text, "data:image/png," + text):
        found = read_data_url(url)
        try:
            if found is not None:
                assert len(found.decode("here", 50)) <= 50
        except ApiError as error:
            assert error.status in (400, 413) and error.param == "here"
