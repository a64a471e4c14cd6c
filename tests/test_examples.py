"""Questions to begin with: what a folder of them may hold, what a run carries, and the page."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import runs
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.dataset import Message, Part
from data.examples import (
    LONGEST,
    MOST,
    MOST_WRITTEN,
    WRITTEN_SIDE,
    give_examples,
    pick,
    read_examples,
    write_examples,
)
from data.images import load_image
from data.pictures import PictureFolders
from errors import PhiSightError
from exports.asked import feature_store, prepared
from web.examples import Examples
from web.model import Model


def put(
    folder: Path, name: str, text: str | bytes | None = "What is it?", colour: int = 90
) -> Path:
    """A picture in a folder, with its questions."""
    path = folder / name
    Image.new("RGB", (12, 8), (colour, 10, 10)).save(path)
    if text is not None:
        content = text.encode() if isinstance(text, str) else text
        path.with_suffix(".txt").write_bytes(content)
    return path


# -- a folder of a person's -----------------------------------------------------------------------


def test_a_picture_has_a_question_a_line(tmp_path):
    cat = put(tmp_path, "cat.JPG", "\ufeffWhat is it?\r\n\n  Where   is it? \n")
    put(tmp_path, "axe.png", "谁在这里？")
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    found = read_examples(tmp_path)
    assert [e.question for e in found] == ["谁在这里？", "What is it?", "Where is it?"]
    assert found[1].picture == found[2].picture == str(cat)
    assert len({e.key for e in found}) == 3


def garbage(folder: Path) -> None:
    put(folder, "b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))


def cut(folder: Path) -> None:
    path = put(folder, "b.png")
    path.write_bytes(path.read_bytes()[:-20])


def linked(folder: Path) -> None:
    put(folder, "b.png").unlink()
    (folder / "b.png").symlink_to(folder / "a.png")


def piped(folder: Path) -> None:
    put(folder, "b.png", None)
    os.mkfifo(folder / "b.txt")


def large(folder: Path) -> None:
    with put(folder, "b.png").open("r+b") as file:
        file.truncate(2**30)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (garbage, "b.png: "),
        (cut, "b.png: "),
        (linked, "b.png: is a link"),
        (piped, "b.txt: is a pipe"),
        (large, "b.png: has 1,073,741,824 bytes, over"),
        (lambda f: put(f, "b.png", None), "b.png: has no questions; write some into b.txt"),
        (lambda f: put(f, "b.png", " \n\n"), "b.txt: holds no question"),
        (lambda f: put(f, "b.png", b"\xff"), "b.txt: is not UTF-8"),
        (lambda f: put(f, "b.png", "a" * (LONGEST + 1)), "b.txt: a question has over"),
        (lambda f: put(f, "b.png", "a\x1b[31m"), "b.txt: a question has control"),
        (lambda f: put(f, "b.png", "a\n" * 10**4), "b.txt: is absurdly large"),
        (lambda f: put(f, "b.png", "a?\n" * MOST), f"has {MOST + 1} questions; leave the {MOST}"),
        (lambda f: put(f, "a.jpg"), "a.png: has the name of a.jpg"),
        (lambda f: (f / "b.txt").write_text("?"), "b.txt: has no picture"),
        (lambda f: (f / "b.md").write_text("?"), "b.md: is neither"),
        (lambda f: (f / "b").mkdir(), "b: is neither"),
        (lambda f: [put(f, f"{n}.png") for n in range(MOST)], f"holds more than {MOST} pictures"),
        (lambda f: [p.unlink() for p in f.iterdir()], "has no pictures with questions; put"),
        (lambda f: (put(f, "a.png", None), f.rename(f.with_name("x"))), "No such file"),
    ],
)
def test_what_cannot_be_shown_is_one_line_with_the_file_and_a_remedy(tmp_path, spoil, reason):
    folder = tmp_path / "mine"
    folder.mkdir()
    put(folder, "a.png")
    spoil(folder)
    with pytest.raises(PhiSightError) as caught:
        read_examples(folder)
    told = str(caught.value)
    assert reason in told and ";" in told and "\n" not in told


@given(st.binary(max_size=200))
def test_any_bytes_of_a_text_are_questions_or_one_line(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    put(folder, "a.png", content)
    try:
        found = read_examples(folder)
    except PhiSightError as error:
        assert str(error).isprintable()
    else:
        assert found and all(e.question == " ".join(e.question.split()) != "" for e in found)


# -- what a run carries ---------------------------------------------------------------------------


def asked(question: str, *names: str, first: bool = True) -> list[Message]:
    pictures = [Part("image", name) for name in names]
    text = Part("text", question)
    parts = (*pictures, text) if first else (text, *pictures)
    return [Message("user", parts), Message("assistant", (Part("text", "?"),))]


def test_kinds_of_questions_come_first_and_nothing_twice():
    conversations = [
        asked("What is it?", "a"),
        asked("What was it?", "b"),
        asked("what IS it?", "c"),
        asked("Where is\nit?", "a"),
        asked("Where was it?", "d", first=False),
        asked("How many?", "e", "f"),
        asked("Why?"),
        asked("y" * 201, "g"),
        [Message("system", (Part("text", "Be brief."),)), *asked("Who is it?", "h")],
        [Message("user", (Part("text", "In"), Part("image", "i"), Part("text", "what?")))],
    ]
    assert list(pick(conversations)) == [
        ("What is it?", "a"),
        ("Where was it?", "d"),
        ("Who is it?", "h"),
        ("What was it?", "b"),
    ]


def test_a_run_carries_questions_about_pictures_that_it_was_not_trained_on():
    data = prepared(runs.assistant(), feature_store(runs.assistant()))
    images = runs.world() / "images"
    held_out = {load_image(images / name).tobytes() for _, name in pick(data.first_messages)}
    trained = {load_image(images / name).tobytes() for names in data.train.images for name in names}
    assert not held_out & trained
    shown = read_examples(runs.finished_run() / "examples")
    assert [e.question for e in shown] == [q for q, _ in pick(data.first_messages)][:MOST_WRITTEN]
    assert len(shown) >= 2
    assert {load_image(example.picture).tobytes() for example in shown} <= held_out


def test_examples_of_a_run_are_made_once_and_a_persons_own_stay(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    put(images, "a.png")
    put(images, "b.jpg", colour=200)
    Image.new("RGB", (3000, 1000)).save(images / "c.png")
    (images / "d.png").write_bytes(b"no picture")
    talks = [
        asked(f"{word} is it?", name)
        for word, name in zip("wxyz", ("d.png", "a.png", "c.png", "gone.png"))
    ]
    run, folders = tmp_path / "run", PictureFolders([str(images)])
    give_examples(run, talks, folders, anew=True)
    found = read_examples(run / "examples")
    assert [e.question for e in found] == ["x is it?", "y is it?"]
    with Image.open(found[1].picture) as large:
        assert max(large.size) == WRITTEN_SIDE
    give_examples(run, [asked("Other?", "b.jpg")], folders, anew=True)
    assert [e.question for e in read_examples(run / "examples")] == ["Other?"]
    own = put(run / "examples", "own.png")
    for anew in (False, True):
        give_examples(run, talks, folders, anew)
        assert len(read_examples(run / "examples")) == 2
    for path in (own, own.with_suffix(".txt")):
        path.unlink()
    give_examples(run, [asked("Nothing to see?")], folders, anew=True)
    assert not (run / "examples").exists()
    (tmp_path / "thesis").mkdir()
    (run / "examples").symlink_to(tmp_path / "thesis")
    give_examples(run, talks, folders, anew=True)
    assert not list((tmp_path / "thesis").iterdir())


def test_what_was_noted_in_a_picture_stays_with_it(tmp_path):
    noted = Image.new("RGB", (40, 40))
    exif = noted.getexif()
    exif[0x010E] = "a secret place"
    noted.save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "out").mkdir()
    assert write_examples(tmp_path / "out", [("?", tmp_path / "a.jpg")]) == 1
    [example] = read_examples(tmp_path / "out")
    assert b"secret" in (tmp_path / "a.jpg").read_bytes()
    assert b"secret" not in Path(example.picture).read_bytes()


# -- what the page begins with --------------------------------------------------------------------


def test_the_page_begins_with_those_of_the_run_that_answers(tmp_path, caplog, monkeypatch):
    for name in ("one", "other"):
        (tmp_path / name / "examples").mkdir(parents=True)
        put(tmp_path / name / "examples", "a.png", f"{name}?")
    model = Model(source=str(tmp_path / "one"))
    examples = Examples(model)

    def questions() -> list[str]:
        return [example.question for example in examples.now().values()]

    [key] = examples.now()
    assert questions() == ["one?"]
    model.source = str(tmp_path / "other/checkpoint-000003")  # another one is chosen on the page
    assert questions() == ["other?"] and key not in examples.now()
    monkeypatch.chdir(tmp_path / "one")
    for model.source in ("", "hf:somebody/model"):
        assert not examples.now()
    model.source = "hf:somebody/model"
    assert questions() == []
    (tmp_path / "one/examples/a.txt").unlink()
    model.source = str(tmp_path / "one")
    assert questions() == questions() == []
    [told] = caplog.messages
    assert "without examples" in told and "a.png: has no questions" in told
    given = Examples(model, tmp_path / "other/examples")
    assert [example.question for example in given.now().values()] == ["other?"]
    with pytest.raises(PhiSightError, match="a.png: has no questions"):
        Examples(model, tmp_path / "one/examples")
