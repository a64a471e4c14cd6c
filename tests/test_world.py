"""The picture world: every answer worked out again, the held-out pairs, the files."""

import json
import random
import re
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from reading import read_all

from data.dataset import load_questions
from data.images import load_image
from data.world import (
    COLOURS,
    DETAIL,
    HELD_OUT_PAIRS,
    KINDS,
    SHAPES,
    TWO_STEP,
    Scene,
    Thing,
    ask,
    ask_many,
    describe,
    draw,
    make_scene,
    questions_of,
    records_of,
    write_world,
)
from data.world import __main__ as command
from data.world import files as world_files
from errors import PhiSightError

SIZE_WORDS = ("big", "small")
COUNT_WORDS = "zero one two three four five six seven eight".split()


@st.composite
def scenes(draw_value) -> Scene:
    seed = draw_value(st.integers(0, 2**32))
    pairs = draw_value(st.sampled_from(["seen", "novel", "all"]))
    return make_scene(random.Random(seed), pairs, hard=draw_value(st.booleans()))


# -- an oracle that shares nothing with the code that asks -----------------------------------------


def column_of(thing: Thing) -> int:
    return int(thing.x * 3 / 96)


def row_of(thing: Thing) -> int:
    return int(thing.y * 3 / 96)


def place_of(thing: Thing) -> str:
    row = ("top", "middle", "bottom")[row_of(thing)]
    column = ("left", "middle", "right")[column_of(thing)]
    return "centre" if (row, column) == ("middle", "middle") else f"{row} {column}"


def only(things) -> Thing:
    things = list(things)
    assert len(things) == 1, "the question does not name exactly one thing"
    return things[0]


def named(scene: Scene, name: str) -> Thing:
    """The thing called "the star" or "the red object"."""
    words = name.split()
    if words[-1] == "object":
        return only(thing for thing in scene.things if thing.colour == words[1])
    return only(thing for thing in scene.things if thing.shape == words[1])


def beside(scene: Scene, relation: str, anchor: Thing) -> list[Thing]:
    distance = {
        "left of": lambda thing: column_of(anchor) - column_of(thing),
        "right of": lambda thing: column_of(thing) - column_of(anchor),
        "above": lambda thing: row_of(anchor) - row_of(thing),
        "below": lambda thing: row_of(thing) - row_of(anchor),
    }[relation]
    return [thing for thing in scene.things if distance(thing) > 0]


def describes(thing: Thing, noun: str) -> bool:
    singular = "cross" if noun == "crosses" else noun.removesuffix("s")
    return singular == thing.shape or noun in (f"{thing.colour} objects", f"{thing.size} objects")


def yes_or_no(truth: bool) -> str:
    return "yes" if truth else "no"


def description(scene: Scene) -> str:
    things = [f"a {t.size} {t.colour} {t.shape} in the {place_of(t)}" for t in scene.things]
    text = f"The picture shows {COUNT_WORDS[len(things)]} object{'s' * (len(things) > 1)}: "
    return text + " and ".join([", ".join(things[:-1]), things[-1]] if things[1:] else things) + "."


NAME = r"(the \w+(?: object)?)"
ANSWERS = {
    r"How many objects (?:are there|does the picture show)\?": lambda scene: COUNT_WORDS[
        len(scene.things)
    ],
    rf"What colour is the shape (left of|right of|above|below) {NAME}\?": (
        lambda scene, relation, name: only(beside(scene, relation, named(scene, name))).colour
    ),
    rf"What (?:colour is|is the colour of) {NAME}\?": lambda scene, name: named(scene, name).colour,
    r"What shape is the (\w+) object\?": lambda scene, colour: (
        only(t for t in scene.things if t.colour == colour).shape
    ),
    r"What shape is in the ([\w ]+)\?": lambda scene, place: (
        only(t for t in scene.things if place_of(t) == place).shape
    ),
    rf"Is {NAME} big or small\?": lambda scene, name: named(scene, name).size,
    rf"What size is {NAME}\?": lambda scene, name: named(scene, name).size,
    r"How many ([\w ]+) are there\?": lambda scene, noun: COUNT_WORDS[
        sum(describes(t, noun) for t in scene.things)
    ],
    r"Is there an? (\w+) (\w+)\?": lambda scene, colour, shape: yes_or_no(
        (shape, colour) in {t.pair for t in scene.things}
    ),
    rf"Where is {NAME}\?": lambda scene, name: place_of(named(scene, name)),
    rf"Is {NAME} (left of|above) {NAME}\?": lambda scene, first, relation, second: yes_or_no(
        named(scene, first) in beside(scene, relation, named(scene, second))
    ),
    r"(?:Describe the picture in detail|Give a detailed description of the picture)\.": description,
    r"What does the picture show\?": description,
}


def oracle(scene: Scene, question: str) -> str:
    for pattern, answer in ANSWERS.items():
        if match := re.fullmatch(pattern, question):
            return answer(scene, *match.groups())
    raise AssertionError(f"no such question: {question}")


# -- what is said ---------------------------------------------------------------------------------


@given(scenes(), st.integers(0, 2**32))
def test_every_answer_is_right(scene, seed):
    rng = random.Random(seed)
    exchanges = [ask(scene, kind, rng) for kind in (*KINDS, TWO_STEP) for _ in range(3)]
    exchanges += ask_many(scene, rng, 9)
    exchanges += [(q["kind"], q["text"], q["label"]) for q in questions_of(scene, "a.png", rng)]
    for kind, question, answer in filter(None, exchanges):
        assert oracle(scene, question) == answer, (kind, question)


def test_the_oracle_on_a_scene_written_by_hand():
    scene = Scene(
        (
            Thing("star", "red", "big", 10, 10),
            Thing("circle", "blue", "small", 50, 50),
            Thing("circle", "red", "small", 90, 50),
        ),
        (250, 250, 250),
    )
    for question, answer in {
        "What colour is the star?": "red",
        "What colour is the shape left of the star?": None,
        "What shape is the blue object?": "circle",
        "What shape is in the middle right?": "circle",
        "Is the star big or small?": "big",
        "How many circles are there?": "two",
        "How many small objects are there?": "two",
        "How many crosses are there?": "zero",
        "Is there a blue star?": "no",
        "Where is the blue object?": "centre",
        "Is the star left of the blue object?": "yes",
        "Is the blue object above the star?": "no",
        "What does the picture show?": "The picture shows three objects: a big red star in the top"
        " left, a small blue circle in the centre and a small red circle in the middle right.",
    }.items():
        if answer is None:
            with pytest.raises(AssertionError):
                oracle(scene, question)
        else:
            assert oracle(scene, question) == answer
    assert describe(scene) == oracle(scene, "What does the picture show?")


def test_every_kind_is_asked_and_yes_is_as_frequent_as_no():
    kinds, existence = Counter(), Counter()
    for seed in range(400):
        rng = random.Random(seed)
        for kind, question, answer in ask_many(make_scene(rng), rng, 9):
            kinds[kind] += 1
            if kind == "existence":
                existence[answer] += 1
    assert kinds.keys() == set(KINDS)
    assert min(kinds.values()) > 100
    assert 0.4 < existence["yes"] / existence.total() < 0.6


@given(scenes(), st.integers(0, 2**32), st.integers(1, 9))
def test_no_question_is_asked_twice(scene, seed, count):
    exchanges = ask_many(scene, random.Random(seed), count)
    questions = [question for _, question, _ in exchanges]
    assert 0 < len(questions) <= count and len(set(questions)) == len(questions)


def test_existence_is_answered_where_every_near_miss_is_shown():
    """All other shapes in its colour and all its shape's colours: only "yes" can be asked."""
    pairs = [("circle", "green")]
    pairs += [(shape, "green") for shape in SHAPES if shape != "circle"]
    pairs += [("circle", colour) for colour in COLOURS if colour != "green"]
    things = tuple(Thing(*pair, "small", 10, 10) for pair in pairs if pair not in HELD_OUT_PAIRS)
    scene = Scene(things, (250, 250, 250))
    for seed in range(200):
        _, question, answer = ask(scene, "existence", random.Random(seed))
        assert oracle(scene, question) == answer


# -- scenes and drawings --------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.booleans())
def test_held_out_pairs_are_never_seen_and_always_novel(seed, hard):
    seen = make_scene(random.Random(seed), "seen", hard)
    novel = make_scene(random.Random(seed), "novel", hard)
    assert not any((thing.shape, thing.colour) in HELD_OUT_PAIRS for thing in seen.things)
    assert any((thing.shape, thing.colour) in HELD_OUT_PAIRS for thing in novel.things)
    assert not seen.has_held_out_pair and novel.has_held_out_pair


@given(scenes())
def test_things_are_within_the_picture_and_in_reading_order(scene):
    places = [(row_of(thing), column_of(thing)) for thing in scene.things]
    assert places == sorted(places)
    assert all(0 < thing.x < 96 and 0 < thing.y < 96 for thing in scene.things)
    for thing in scene.things:
        assert thing.shape in SHAPES and thing.colour in COLOURS and thing.size in SIZE_WORDS


@given(st.integers(0, 2**32))
def test_plain_scenes_have_one_thing_a_place(seed):
    things = make_scene(random.Random(seed), "all").things
    assert 1 <= len(things) <= 4
    assert len({place_of(thing) for thing in things}) == len(things)
    assert {(thing.angle, thing.texture) for thing in things} == {(0.0, "plain")}


def test_hard_scenes_have_more_things_turned_and_textured():
    things = [make_scene(random.Random(seed), "all", hard=True).things for seed in range(60)]
    assert max(map(len, things)) > 4
    assert {thing.texture for scene in things for thing in scene} == {"plain", "stripes", "dots"}
    assert any(abs(thing.angle) > 10 for scene in things for thing in scene)
    assert any(len({place_of(t) for t in scene}) < len(scene) for scene in things)


@given(scenes())
def test_a_thing_shows_its_colour_at_its_centre(scene):
    picture = draw(scene)
    assert picture.size == (96, 96) and picture.mode == "RGB"
    for thing in scene.things:
        shown = picture.getpixel((int(thing.x), int(thing.y)))
        colour = COLOURS[thing.colour]
        if thing.texture == "plain":
            assert shown == colour
        else:  # a dark line may cross it
            assert all(int(0.7 * c) - 1 <= s <= c for s, c in zip(shown, colour))
    corners = [picture.getpixel((x, y)) for x in (0, 95) for y in (0, 95)]
    assert scene.background in corners


def test_unknown_pairs_are_refused():
    with pytest.raises(ValueError, match="seen, novel or all"):
        make_scene(random.Random(0), "some")


# -- files ----------------------------------------------------------------------------------------


def contents(folder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_records_are_in_the_form_of_llava_instruct(world):
    conversations, quarantined = read_all(world / "train.json", strict=True)
    assert quarantined == []
    for name in {name for conversation in conversations for name in conversation.images}:
        load_image(world / "images" / name)
    records = json.loads((world / "train.json").read_text())
    assert len({record["image"] for record in records}) == 12
    for record in records:
        assert record.keys() == {"id", "image", "conversations"}
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert len(turns) <= 2 * 4  # the world of the tests asks for four turns at most
        tagged = [turn["value"] for turn in turns if "<image>" in turn["value"]]
        assert tagged == [turns[0]["value"]]
        assert tagged[0].startswith("<image>\n") != tagged[0].endswith("\n<image>")


@given(scenes(), st.integers(0, 2**32))
def test_the_answers_in_records_are_right(scene, seed):
    for record in records_of(scene, "a.png", random.Random(seed), turns=9):
        values = [turn["value"].replace("<image>", "").strip() for turn in record["conversations"]]
        for question, answer in zip(values[::2], values[1::2], strict=True):
            assert oracle(scene, question) == answer


@pytest.mark.parametrize("name", ["held_out", "novel_pairs"])
def test_question_files_are_in_the_form_of_pope(world, name):
    questions = load_questions(world / f"{name}.jsonl")
    assert len({question.image for question in questions}) == 3
    assert {DETAIL, "count", "existence"} <= {question.kind for question in questions}
    for question in questions:
        assert question.image.startswith(name)
        with Image.open(world / "images" / question.image) as picture:
            assert picture.size == (96, 96)


def test_training_records_speak_of_no_held_out_pair(world):
    text = (world / "train.json").read_text()
    for shape, colour in HELD_OUT_PAIRS:
        assert f"{colour} {shape}" not in text
    novel = (world / "novel_pairs.jsonl").read_text()
    assert any(f"{colour} {shape}" in novel for shape, colour in HELD_OUT_PAIRS)


@pytest.mark.parametrize("hard", [False, True])
def test_a_seed_gives_identical_files_and_another_seed_other_ones(tmp_path, hard):
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        write_world(tmp_path / name, pictures=3, held_out=2, seed=seed, hard=hard)
    first, again, other = (contents(tmp_path / name) for name in ("first", "again", "other"))
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)
    assert len(first) == 3 + 2 * 2 + 4
    assert read_all(tmp_path / "first" / "train.json")[1] == []


def test_a_smaller_world_is_the_beginning_of_a_larger_one(tmp_path):
    write_world(tmp_path / "small", pictures=2, held_out=1)
    write_world(tmp_path / "large", pictures=4, held_out=1)
    small, large = (
        json.loads((tmp_path / name / "train.json").read_text()) for name in ("small", "large")
    )
    assert large[: len(small)] == small


def test_writing_twice_does_nothing(tmp_path, capsys):
    write_world(tmp_path, pictures=2, held_out=1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    write_world(tmp_path, pictures=2, held_out=1)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert "already there" in capsys.readouterr().out


def test_a_folder_that_is_unfinished_or_was_made_otherwise_is_written(tmp_path, monkeypatch):
    write_world(tmp_path / "whole", pictures=2, held_out=1)

    def killed(path, text):
        raise KeyboardInterrupt

    out = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr(world_files, "write_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            write_world(out, pictures=2, held_out=1)
    assert not (out / "world.json").exists()
    write_world(out, pictures=2, held_out=1)
    assert contents(out) == contents(tmp_path / "whole")
    write_world(out, pictures=3, held_out=1)
    assert len(json.loads((out / "train.json").read_text())) > 6


def test_the_command_writes_a_world_and_refuses_nothing_to_draw(tmp_path, monkeypatch):
    arguments = ["world", "--out", str(tmp_path), "--pictures", "1", "--held-out", "1", "--hard"]
    monkeypatch.setattr(sys, "argv", arguments)
    command.main()
    assert json.loads((tmp_path / "world.json").read_text())["hard"] is True
    monkeypatch.setattr(sys, "argv", [*arguments, "--turns", "0"])
    with pytest.raises(PhiSightError, match="at least 1"):
        command.main()
