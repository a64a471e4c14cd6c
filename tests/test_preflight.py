"""The report on a data file: its counts against a plain count, and its memory."""

import json
import random
import tracemalloc
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import runs
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from reading import read_all
from tokenizers import Tokenizer, models, normalizers

from data import preflight, stream
from data import survey as surveys
from data.chat import ChatFormat, Limits, load_tokenizer, render, render_to_limit
from data.dataset import Conversation, Message, Part, Quarantined
from data.images import load_image, size_if_whole
from data.lengths import TokenCounter
from data.pictures import PictureFolders
from data.record_keys import BAD_PICTURE
from data.sources import Source
from data.stream import read_records
from data.survey import Survey, Tally
from data.words import words_are_independent
from errors import PhiSightError
from tools.make_large_json import FAULTS, conversations_of, records, write_json, write_pictures

SHARED = Path(__file__).resolve().parents[2] / "shared" / "real"
TOKENS = 4  # a picture
TINY = ROOT / "assets/tiny/phi3"


@pytest.fixture(scope="module")
def chat_format() -> ChatFormat:
    return ChatFormat.from_tokenizer(load_tokenizer(TINY), TOKENS)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """300 records about 90 pictures, with three faults of every kind and three broken pictures."""
    folder = tmp_path_factory.mktemp("made")
    names = [f"{n}.jpg" for n in range(90)]
    items = list(records(300, names, broken=3, seed=0))
    items[200]["image"] = [names[0], names[1]]
    items[200]["conversations"][0]["value"] += "\n<image>"
    del items[201]["image"]
    items[201]["conversations"][0]["value"] = "Hello?"
    items[202] = items[203]
    write_json(folder / "d.json", iter(items), len(items))
    write_pictures(folder / "images", names, broken=3)
    return folder


def survey(path: Path, folder: Path | None, *arguments, **more) -> Survey:
    """Of one file and, if it is given, one folder of pictures."""
    folders = PictureFolders([folder] if folder else [])
    source = Source(path, 1.0, folders.of_source(0))
    return surveys.survey([source], folders if folder else None, *arguments, **more)


def counts(tally: Tally) -> dict:
    return {name: value for name, value in vars(tally).items() if name != "peak_memory"}


def without_bad_pictures(
    conversations: list[Conversation], folder: Path
) -> tuple[list[Conversation], list[Quarantined]]:
    """A plain check: every picture of every conversation is decoded, one after the other."""
    whole, lost = [], []
    for conversation in conversations:
        for name in conversation.images:
            try:
                load_image(folder / name)
            except PhiSightError as error:
                where = f"picture {name}"
                lost.append(Quarantined(where, conversation.id, str(error), BAD_PICTURE))
                break
        else:
            whole.append(conversation)
    return whole, lost


# -- the counts -----------------------------------------------------------------------------------


def test_the_counts_are_those_of_a_plain_count(made, chat_format):
    found = survey(made / "d.json", made / "images", chat_format)
    conversations, malformed = read_all(made / "d.json")
    whole, lost = without_bad_pictures(conversations, made / "images")
    samples = [render(c.messages, chat_format) for c in whole]
    tally = found.tally
    assert tally.records == 300 and found.picture_check == "decode"
    assert tally.conversations == len(conversations)
    assert tally.turns == sum(m.role == "assistant" for c in conversations for m in c.messages)
    assert tally.faults == Counter(
        {"no supervised token": 6, "pictures and <image> differ": 3, "malformed": 3}
    )
    assert tally.lost == len(lost) >= 6
    assert tally.lengths == Counter(len(sample.input_ids) for sample in samples)
    assert tally.text_lengths == Counter(
        len(sample.input_ids) - TOKENS * len(sample.images) for sample in samples
    )
    assert tally.supervised_tokens == sum(sum(sample.supervised) for sample in samples)
    assert (tally.text_only, tally.several_pictures, tally.unsupervised) == (1, 1, 0)
    assert tally.distinct("pictures") == len({n for c in conversations for n in c.images})
    assert tally.distinct("ids") == len({c.id for c in conversations})
    assert tally.distinct("contents") == len({c.messages for c in conversations})
    assert tally.distinct("contents") == tally.conversations - 1
    assert (found.missing, len(found.bad_pictures)) == (3, 6)
    where = {(entry.where, entry.id, entry.reason) for entry in tally.set_aside}
    assert where == {(entry.where, entry.id, entry.reason) for entry in (*malformed, *lost)}


def test_processes_count_as_one_does(made, chat_format, monkeypatch):
    alone = survey(made / "d.json", made / "images", chat_format, "quick")
    monkeypatch.setattr(surveys, "BATCH", 16)
    shared = survey(made / "d.json", made / "images", chat_format, "quick", workers=2)
    assert counts(shared.tally) == counts(alone.tally)
    assert shared.bad_pictures == alone.bad_pictures and shared.missing == alone.missing
    assert shared.tally.peak_memory > 10**7


@pytest.mark.parametrize(("check", "bad"), [("decode", 6), ("quick", 6), ("exists", 3)])
def test_the_ways_to_check_pictures(made, chat_format, check, bad):
    found = survey(made / "d.json", made / "images", chat_format, check)
    assert (len(found.bad_pictures), found.missing) == (bad, 3)


def test_check_pictures(tmp_path, chat_format):
    Image.new("RGB", (5, 5)).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "good.png").read_bytes()[:-30])
    counter = TokenCounter(chat_format)
    names = ["good.png", "broken.png", "none.png", "good.png/x"]
    bad, missing, marks, cut_off = surveys.check_pictures(
        counter, names, PictureFolders([tmp_path]), "decode"
    )
    assert list(bad) == names[1:] and missing == 2 and list(marks) == names[:1]
    assert "truncated" in bad["broken.png"]
    assert cut_off == []
    folders = PictureFolders([tmp_path])
    bad, missing, *_ = surveys.check_pictures(counter, names, folders, "exists")
    assert list(bad) == names[2:] and missing == 2
    with pytest.raises(PhiSightError, match="none: no such folder"):
        survey(tmp_path / "d.json", tmp_path / "none", chat_format)


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_of_the_same_bytes_are_counted(tmp_path, chat_format, workers):
    """Two names of one picture, three of another; and two that only end alike."""
    names = [f"{n}.jpg" for n in range(4)]
    write_pictures(tmp_path, names, broken=0)
    bodies = {name: (tmp_path / name).read_bytes() for name in names}
    for name, body in (
        ("a.jpg", bodies["0.jpg"]),
        ("b.jpg", bodies["1.jpg"]),
        ("c.jpg", bodies["1.jpg"]),
    ):
        (tmp_path / name).write_bytes(body)
    padding = bytes(5000)
    (tmp_path / "d.jpg").write_bytes(bodies["2.jpg"] + padding)
    body = bodies["2.jpg"]  # with its own name as a comment, from byte 6 on
    (tmp_path / "e.jpg").write_bytes(body[:6] + b"?" + body[7:] + padding)
    assert surveys._mark(tmp_path / "d.jpg") == surveys._mark(tmp_path / "e.jpg")
    everything = [*names, "a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"]
    write_json(tmp_path / "d.json", records(20, everything, broken=0, seed=0), 20)
    found = survey(tmp_path / "d.json", tmp_path, chat_format, "quick", workers)
    assert found.copies == 3
    assert survey(tmp_path / "d.json", tmp_path, chat_format, "exists", workers).copies == 0


def test_many_pictures_are_not_decoded_unless_asked(made, chat_format, monkeypatch):
    monkeypatch.setattr(surveys, "DECODED_AT_MOST", 10)
    assert survey(made / "d.json", made / "images", chat_format).picture_check == "quick"
    assert survey(made / "d.json", None, chat_format).picture_check == ""


def test_lines_and_the_form_of_another_project(tmp_path, chat_format):
    path = SHARED / "llava" / "mllm_demo.json"
    if not path.exists():
        pytest.skip("the shared data files are not here")
    tally = survey(path, None, chat_format).tally
    assert (tally.records, tally.conversations, tally.several_pictures) == (6, 6, 2)
    lines = tmp_path / "d.jsonl"
    lines.write_text("\n".join(map(json.dumps, json.loads(path.read_text("utf-8")))))
    assert counts(survey(lines, None, chat_format).tally) == counts(tally)


def test_what_stops_a_survey(tmp_path, chat_format):
    path = tmp_path / "d.json"
    path.write_text("[]")
    with pytest.raises(PhiSightError, match="holds no record"):
        survey(path, None, chat_format)
    with pytest.raises(PhiSightError, match="none: no such folder"):
        survey(path, tmp_path / "none", chat_format)
    path.write_text("[1, 2")
    with pytest.raises(PhiSightError, match="not JSON"):
        survey(path, None, chat_format)


def test_memory_grows_by_a_few_bytes_a_record(tmp_path, chat_format, monkeypatch):
    monkeypatch.setattr(stream, "read_records", partial(read_records, chunk=20_000))
    names = [f"{n}.jpg" for n in range(50)]
    peaks = []
    for count in (300, 1300):
        write_json(tmp_path / "d.json", records(count, names, 0, seed=0), count)
        survey(tmp_path / "d.json", None, chat_format)  # the words are known from here on
        tracemalloc.start()
        survey(tmp_path / "d.json", None, chat_format)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 1000 < 200  # bytes; a record's text has 1,400


# -- what training would set aside ----------------------------------------------------------------


def too_long_for_training(path: Path, chat_format: ChatFormat, limits: Limits) -> tuple[list, int]:
    """(id, reason) of what training sets aside, and how many it shortens: by rendering it all."""
    reasons, shortened = [], 0
    for conversation in read_all(path)[0]:
        try:
            _, dropped = render_to_limit(conversation.messages, chat_format, limits)
        except PhiSightError as error:
            reasons.append((conversation.id, str(error)))
        else:
            shortened += dropped > 0
    return reasons, shortened


@pytest.mark.parametrize(
    "limits",
    [Limits(200), Limits(200, row_tokens=150), Limits(0, 0, 120), Limits(90, 300, 200), Limits()],
)
def test_what_is_too_long_is_what_training_finds_too_long(made, tmp_path, chat_format, limits):
    items = json.loads((made / "d.json").read_text("utf-8"))
    items[10]["image"] = [f"{n}.jpg" for n in range(60)]
    items[10]["conversations"][0]["value"] = "<image>" * 60 + "Which?"
    items[11]["conversations"][1]["loss"] = False
    path = tmp_path / "d.json"
    path.write_text(json.dumps(items))
    tally = survey(path, None, chat_format, limits=limits).tally
    reasons, shortened = too_long_for_training(path, chat_format, limits)
    told = [(e.id, e.reason) for e in tally.set_aside if e.reason.startswith("conversation: ")]
    assert sorted(told) == sorted(reasons)
    assert (tally.too_long, tally.shortened) == (len(reasons), shortened)
    assert sum(tally.lengths.values()) == tally.conversations  # the long ones among them
    assert bool(reasons) == bool(limits.text_tokens or limits.tokens)


def test_the_limits_of_the_base_are_read_beside_the_tokenizer(tmp_path, capsys):
    assert preflight.positions_of(str(TINY)) == 2048
    assert preflight.positions_of(str(tmp_path)) == 0
    for text in ("[]", "{", '{"max_position_embeddings": true}', '{"max_position_embeddings": -1}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(PhiSightError, match="config.json: .*; fetch it again"):
            preflight.positions_of(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert preflight.positions_of(str(tmp_path)) == 0
    item = {"id": "many", "images": ["a.png"] * 60}
    item["messages"] = [
        {"role": "user", "content": "<image>" * 60 + "Which?"},
        {"role": "assistant", "content": "Red."},
    ]
    (tmp_path / "d.jsonl").write_text(json.dumps(item))
    arguments = ["--data", tmp_path / "d.jsonl", "--tokenizer", TINY, "--tokens-per-image", 36]
    code, lines = report(capsys, *arguments)
    assert code == 1 and lines["over 2048 tokens with pictures"] == lines["set aside"] == "1"
    code, lines = report(capsys, *arguments, "--row-tokens", 352)
    assert code == 1 and lines["over 352 tokens with pictures"] == "1"
    code, lines = report(capsys, *arguments, "--positions", 4096)
    assert code == 0 and lines["over 4096 tokens with pictures"] == lines["set aside"] == "0"


# -- keys that nothing reads ----------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_unread_keys_are_counted_and_their_names_are_bounded(
    tmp_path, chat_format, monkeypatch, workers
):
    monkeypatch.setattr(surveys, "KEYS_COUNTED", 4)
    items = []
    for number in range(300):
        turns = [{"from": "human", "value": "Q", "name": "A"}, {"from": "gpt", "value": "A"}]
        items.append({"conversations": turns, "source": "web", f"new {number}": 1, "x" * 9999: 1})
    items[0]["videos"] = ["a.mp4"]  # set aside, and counted all the same
    (tmp_path / "d.json").write_text(json.dumps(items))
    unread = survey(tmp_path / "d.json", None, chat_format, workers=workers).tally.unread
    assert (unread["source"], unread["turn: name"], unread["x" * 100]) == (300, 300, 300)
    assert unread.total() == 4 * 300 + 1 and len(unread) <= 5


def test_the_report_shows_the_keys_that_occur_most(tmp_path, capsys):
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A", "name": "B"}]
    items = [
        {"conversations": turns, "source": 1, **{f"k{n}": 1 for n in range(k)}} for k in range(12)
    ]
    (tmp_path / "d.json").write_text(json.dumps(items))
    code, lines = report(capsys, "--data", tmp_path / "d.json", "--tokenizer", TINY)
    assert code == 0 and lines["keys that nothing reads"] == str(24 + sum(range(12)))
    assert lines["source"] == lines["turn: name"] == "12" and lines["k0"] == "11"
    assert lines["3 others"] == str(3 + 2 + 1)


# -- texts of unknown origin ----------------------------------------------------------------------

HOSTILE = [
    "\ud800",
    "a\x1b[2J\x1b]0;title\x07",
    "b\u202egnp.exe",
    "c\nset aside: nothing",
    "d" * 10**6,
]


@pytest.mark.parametrize("text", HOSTILE, ids=["surrogate", "escapes", "bidi", "newline", "long"])
def test_no_text_of_a_file_reaches_the_terminal_as_it_is(tmp_path, capsys, text):
    """Whatever is an id, a key, a picture's name, a speaker or words."""
    turns = [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}]
    items = [
        {"id": text, "image": "a.png", "conversations": turns[:1]},
        {"id": text, "image": "a.png", "conversations": turns},
        {"id": 2, "image": text, "conversations": turns},
        {"id": 3, "image": "a.png", "conversations": [{"from": text, "value": "Q"}]},
        {"id": 4, "image": "a.png", "conversations": [{"from": "human", "value": text}, turns[1]]},
        {"id": 5, text: 1, "conversations": [{**turns[0], text: 1}, turns[1]]},
        {"id": 6, "messages": [{"role": "user", "content": [{"type": text}]}]},
        {"id": 7, "system": text, "image": "a.png", "conversations": turns},
        {"id": 8, text + "_mask": [1], "conversations": turns},
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, items)))
    arguments = ["--data", tmp_path / "d.jsonl", "--images", tmp_path, "--tokenizer", TINY]
    for check in ("decode", "quick", "exists"):
        arguments_ = [*arguments, "--pictures", check, "--quarantine", tmp_path / "q.jsonl"]
        assert preflight.main([*map(str, arguments_)]) == 1
        said = capsys.readouterr().out
        assert all(line.isprintable() and len(line) < 800 for line in said.splitlines())
        assert sum(line.startswith("set aside: ") for line in said.splitlines()) >= 7
    entries = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert entries[0]["id"] == text[:100] and all(len(entry["id"]) <= 100 for entry in entries)


# -- lengths without tokens -----------------------------------------------------------------------

texts = st.text() | st.lists(
    st.sampled_from(
        [
            "the",
            "dog",
            " ",
            "  ",
            "\n",
            "\u2581",
            "a",
            "ing",
            ".",
            "é",
            "字",
            "🚌",
            "\t",
            "<|end|>",
            "</s>",
            "1",
            "'s",
        ]
    )
).map("".join)


@given(texts)
def test_a_text_has_the_ids_of_its_words(chat_format, text):
    encoder = chat_format.text_encoder
    whole = encoder.tokenizer.encode(text.strip(), add_special_tokens=False).ids
    assert encoder.by_word and encoder(text) == whole


@given(st.lists(texts.filter(str.strip), min_size=2, max_size=2), st.integers(0, 2), st.booleans())
def test_a_conversation_has_as_many_tokens_as_it_renders_to(chat_format, said, pictures, learnt):
    parts = (*[Part("image", "a.jpg")] * pictures, Part("text", said[0]), Part("text", said[0]))
    messages = (Message("user", parts), Message("assistant", (Part("text", said[1]),), learnt))
    sample = render(messages, chat_format)
    counted = TokenCounter(chat_format).count(messages)
    assert (counted.tokens, counted.supervised) == (len(sample.input_ids), sum(sample.supervised))
    assert (counted.text_tokens, counted.pictures) == (
        len(sample.input_ids) - TOKENS * pictures,
        pictures,
    )


def test_the_real_tokenizer_is_asked_by_word():
    folder = SHARED / "phi-3-mini-tokenizer"
    if not folder.exists():
        pytest.skip("the shared data files are not here")
    chat_format = ChatFormat.from_tokenizer(load_tokenizer(folder), 1)
    encoder, rng = chat_format.text_encoder, random.Random(0)
    assert encoder.by_word
    lines = (SHARED / "llava" / "coco2014_val_gpt4_qa_30x3.jsonl").read_text("utf-8")
    for text in [*lines.splitlines(), "  two  spaces", "\u2581", "a\n\nb", "naïve 字 🚌"]:
        cut = text[rng.randrange(len(text)) :]
        assert encoder(cut) == encoder.tokenizer.encode(cut.strip(), add_special_tokens=False).ids


@pytest.mark.parametrize("odd", ["crossing", "no normalizer", "dropout"])
def test_another_kind_of_tokenizer_is_asked_in_full(odd):
    vocab = {token: number for number, token in enumerate(["\u2581", "a", "b", "a\u2581"])}
    encoder = Tokenizer(models.BPE(vocab, [("a", "\u2581")], dropout=0.1 * (odd == "dropout")))
    if odd != "no normalizer":
        encoder.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    assert not words_are_independent(encoder)


# -- a quick look at pictures ---------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_no_picture_that_was_cut_looks_whole(tmp_path, form):
    rng = random.Random(0)
    path = tmp_path / "picture"
    picture = Image.frombytes("RGB", (120, 90), rng.randbytes(120 * 90 * 3))
    picture.save(path, form)
    whole = path.read_bytes()
    load_image(path)
    assert (size_if_whole(path) is not None) == (form in ("PNG", "JPEG", "WEBP"))
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 100, len(whole) - 20):
        path.write_bytes(whole[:length])
        assert size_if_whole(path) is None
    assert size_if_whole(tmp_path) is None and size_if_whole(tmp_path / "none") is None


@pytest.mark.parametrize("check", ["quick", "decode"])
def test_what_cropping_would_cut_off_is_counted(tmp_path, chat_format, check):
    sizes = {"wide.png": (80, 40), "high.jpg": (30, 40), "square.png": (50, 50)}
    for name, shape in sizes.items():
        Image.new("RGB", shape).save(tmp_path / name)
    path = tmp_path / "data.json"
    names = [*sizes, "none.png"]
    write_json(path, records(len(names), names, broken=0, seed=0), len(names))
    counted = survey(path, tmp_path, chat_format, check)
    assert sorted(counted.cut_off) == [0.25, 0.5]


# -- the command ----------------------------------------------------------------------------------


def report(capsys, *arguments: object) -> tuple[int, dict[str, str]]:
    """The exit code, and the report's lines by their label."""
    code = preflight.main([*map(str, arguments)])
    lines = capsys.readouterr().out.splitlines()
    return code, {line[:31].strip(): line[31:].split("  (")[0].strip() for line in lines}


def test_the_report(made, capsys, tmp_path):
    code, lines = report(
        capsys,
        "--data",
        made / "d.json",
        "--images",
        made / "images",
        "--tokenizer",
        TINY,
        "--quarantine",
        tmp_path / "q.jsonl",
        "--features",
        tmp_path,
    )
    assert code == 1
    assert lines["records"] == "300" and lines["missing"] == lines["broken"] == "3"
    assert lines["pictures and <image> differ"] == "3" and lines["no supervised token"] == "6"
    assert lines["identical conversations"] == "1"
    set_aside = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    too_long = int(lines["set aside"])  # by training's own limit of 256 tokens of text
    assert len(set_aside) == 12 + int(lines["lost to bad pictures"]) + too_long
    assert too_long == sum("the limit is 256" in entry["reason"] for entry in set_aside) > 0


def test_a_file_without_a_fault_gives_exit_code_0(tmp_path, capsys):
    rng = random.Random(0)
    item = {"id": 1, "image": "a.jpg", "conversations": conversations_of(rng, ["So."], ["Why?"])}
    (tmp_path / "d.jsonl").write_text(json.dumps(item))
    code, lines = report(capsys, "--data", tmp_path / "d.jsonl", "--tokenizer", TINY)
    assert code == 0 and lines["conversations"] == "1"


def test_a_picture_folder_is_asked_for_where_pictures_are_named(tmp_path, capsys):
    record = {"instruction": "Why?", "input": "", "output": "So."}
    for image, asked in ((None, False), ("a.jpg", True)):
        (tmp_path / "d.json").write_text(json.dumps([{**record, "image": image or ""}]))
        assert preflight.main(["--data", str(tmp_path / "d.json"), "--tokenizer", str(TINY)]) == 0
        assert ("give --images" in capsys.readouterr().out) is asked


def test_the_size_of_the_features(capsys, tmp_path, monkeypatch, made):
    shared = ["--data", made / "d.json", "--tokenizer", TINY, "--features", tmp_path / "new"]
    preflight.main([*map(str, shared), "--feature-pooling=2", "--feature-storage=int8"])
    said = capsys.readouterr().out
    assert "93 pictures x 144 tokens x 1,024 int8: 13.8 MB" in said and "time: unknown" in said
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10**7}))
    preflight.main([*map(str, shared)])
    assert "TOO LITTLE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dat", "x"], "did you mean --data?"),
        (["--data", "x", "--worker", "2"], "--workers?"),
        (["--data", "none.json"], "none.json: no such file"),
        (["--data", "x", "--tokens-per-image", "0"], "--tokens-per-image: must be at least 1"),
        (["--data", "x", "--workers", "-1"], "from 0 to 256"),
        (["--data", "x", "--pictures", "all"], "invalid choice"),
    ],
)
def test_a_mistake_names_the_remedy(arguments, said):
    with pytest.raises(PhiSightError) as caught:
        preflight.main(["--tokenizer", str(TINY), *arguments])
    assert said in str(caught.value)


def test_the_command_in_a_shell(made):
    done = runs.command(
        "-m",
        "data.preflight",
        "--data",
        made / "d.json",
        "--images",
        made / "images",
        "--tokenizer",
        TINY,
        "--workers",
        2,
    )
    assert done.returncode == 1 and "in each of 2 processes" in done.stdout
    assert FAULTS == 5 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("seconds", "words"), [(45, "45 s"), (700, "12 min"), (20_000, "5 h 33 min")]
)
def test_durations(seconds, words):
    assert preflight.duration(seconds) == words
