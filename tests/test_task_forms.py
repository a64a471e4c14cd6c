"""Files of questions: the forms of POPE, VQA v2, GQA and COCO captions, and the world's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.world import forms as world_forms
from data.world.files import numbered_scene, settings_in, write_world
from data.world.scenes import HELD_OUT_PAIRS
from errors import PhiSightError
from evaluation.tasks import TASKS

POPE, VQA, CAPTION, LOSS = (TASKS[name] for name in ("pope", "vqa", "caption", "loss"))
QUESTIONS = {
    "data_type": "mscoco",
    "data_subtype": "val2014",
    "questions": [
        {"question_id": 1, "image_id": 42, "question": "What is it?"},
        {"question_id": 2, "image_id": 43, "question": "How many?"},
    ],
}
ANNOTATIONS = {
    "annotations": [
        {"question_id": 2, "answer_type": "number", "answers": [{"answer": "2"}] * 10},
        {"question_id": 1, "answer_type": "other", "answers": [{"answer": "dog"}] * 10},
    ]
}


def written(folder: Path, *contents: object) -> list[Path]:
    """Each as a JSON file; a list of records as JSONL."""
    paths = []
    for number, content in enumerate(contents):
        path = folder / f"{number}.json"
        if isinstance(content, list):
            path.write_text("".join(json.dumps(record) + "\n" for record in content))
        else:
            path.write_text(json.dumps(content))
        paths.append(path)
    return paths


# -- what others made -----------------------------------------------------------------------------


def test_vqa_v2_in_either_order_of_its_files(tmp_path):
    paths = written(tmp_path, QUESTIONS, ANNOTATIONS)
    asked = VQA.questions(paths, 0)
    assert VQA.questions(paths[::-1], 0) == asked
    assert [one.image for one in asked] == [
        "COCO_val2014_000000000042.jpg",
        "COCO_val2014_000000000043.jpg",
    ]
    assert asked[0].labels == ("dog",) * 10 and asked[1].kind == "number"
    assert VQA.questions(paths, 1) == asked[:1]
    assert VQA.scored(asked[1], "Two.") == {"accuracy": 1.0, "exact": 0.0, "token_f1": 1.0}


def test_gqa_and_lines(tmp_path):
    gqa = {"07": {"imageId": "n1", "question": "Is it red?", "answer": "yes",
                  "types": {"semantic": "attr"}}}  # fmt: skip
    lines = [
        {"question_id": "07", "image": "n1.jpg", "text": "Is it red?", "label": "yes",
         "kind": "attr"}
    ]  # fmt: skip
    several = [{"id": 1, "image": "a.png", "question": "?", "answers": ["yes", "Yes!"]}]
    paths = written(tmp_path, gqa, lines, several)
    assert VQA.questions(paths[:1], 0) == VQA.questions(paths[1:2], 0)
    assert VQA.questions(paths[2:], 0)[0].labels == ("yes", "Yes!")


def test_coco_captions_and_lines(tmp_path):
    coco = {
        "images": [{"id": 5, "file_name": "a.png"}],
        "annotations": [{"image_id": 5, "caption": "A dog."}, {"image_id": 5, "caption": "Dogs."}],
    }
    lines = [{"id": 5, "image": "a.png", "captions": ["A dog.", "Dogs."]}]
    paths = written(tmp_path, coco, lines)
    asked = CAPTION.questions(paths[:1], 0)
    assert asked == CAPTION.questions(paths[1:], 0)
    assert asked[0].labels == ("A dog.", "Dogs.") and asked[0].text


def test_conversations_may_share_an_id(tmp_path):
    record = {
        "id": "a",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "A dog."}],
    }
    asked = LOSS.questions(written(tmp_path, [record, record]), 0)
    assert [one.id for one in asked] == ["a", "a#2"]
    assert asked[0].labels == ("A dog.",) and asked[0].image == "a.png"
    named = [record, record, record | {"id": "a#2"}, record]
    asked = LOSS.questions(written(tmp_path, named), 0)
    assert [one.id for one in asked] == ["a", "a#3", "a#2", "a#4"]


QUESTION = {"question_id": 1, "image": "a.png", "text": "?", "label": "yes"}
NOVEL = "novel_pairs/1"  # what the second file's question 1 is called


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([QUESTION, QUESTION, QUESTION], "one file of novel pairs at most"),
        ([QUESTION | {"question_id": NOVEL}, QUESTION], f"'{NOVEL}' stands there twice"),
    ],
)
def test_no_file_and_no_answer_of_the_world_is_taken_for_another(contents, message, tmp_path):
    paths = written(tmp_path, *([one] for one in contents))
    with pytest.raises(PhiSightError, match=message):
        TASKS["world"].questions(paths, 0)


@pytest.mark.parametrize("task", ["world", "pope", "vqa"])
def test_a_key_that_stands_twice_is_refused(task, tmp_path):
    path = tmp_path / "twice.jsonl"
    path.write_text(json.dumps(QUESTION)[:-1] + ', "label": "no"}\n')
    with pytest.raises(PhiSightError, match="line 1: .* has `label` twice"):
        TASKS[task].questions([path], 0)


GOOD = {"question_id": 1, "image": "a.png", "text": "?", "label": "yes"}
WRONG = {
    "twice": (POPE, [[GOOD, GOOD]], "stands there twice"),
    "label": (POPE, [[GOOD, GOOD | {"question_id": 2, "label": "maybe"}]], "line 2: `label` is"),
    "no label": (POPE, [[{"question_id": 1, "image": "a.png", "text": "?"}]], "`label` is missing"),
    "outside": (POPE, [[GOOD | {"image": "../a.png"}]], "line 1: the picture .* lies outside"),
    "an object": (POPE, [QUESTIONS], "one JSON object"),
    "a number": (POPE, [[1]], "holds a number, not a list"),
    "empty": (POPE, [[]], "the file is empty"),
    "one of two": (VQA, [QUESTIONS, QUESTIONS], "not `questions` and `annotations`"),
    "three": (VQA, [QUESTIONS, ANNOTATIONS, ANNOTATIONS], "give VQA v2's"),
    "no annotation": (VQA, [QUESTIONS, {"annotations": []}], "question 1: .* has no annotation"),
    "two annotations": (
        VQA,
        [QUESTIONS, {"annotations": ANNOTATIONS["annotations"][:1] * 2}],
        "annotation 2: .* has an annotation before",
    ),
    "gqa": (VQA, [{"1": {"imageId": "a"}}], "question 1: "),
    "no question": (VQA, [{}], "holds no question"),
    "no caption": (
        CAPTION,
        [{"images": [{"id": 1, "file_name": "a"}], "annotations": []}],
        "image 1: the image 1 has no caption",
    ),  # fmt: skip
    "captions": (CAPTION, [[{"image": "a.png", "captions": [1]}]], "`captions` is a number"),
}


@pytest.mark.parametrize(("task", "contents", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_read_is_named(task, contents, message, tmp_path):
    with pytest.raises(PhiSightError, match=message) as caught:
        task.questions(written(tmp_path, *contents), 0)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PhiSightError, match="cannot be read .*check --data"):
        POPE.questions([tmp_path / "none.json"], 0)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "question_id image text label answers questions annotations image_id images"
                " caption captions file_name imageId question answer types id answer_type".split()
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(VALUES, VALUES)
def test_any_json_is_read_or_refused(tmp_path_factory, first, second):
    paths = written(tmp_path_factory.mktemp("any"), first, second)
    for name in ("pope", "vqa", "caption", "world"):
        for given_paths in (paths[:1], paths):
            try:
                asked = TASKS[name].questions(given_paths, 0)
            except PhiSightError:
                continue
            assert all(one.image and one.text and one.labels for one in asked)


# -- the real file of POPE ------------------------------------------------------------------------

REAL = runs.ROOT.parent / "shared/real/pope/coco_pope_random.json"


@pytest.mark.skipif(not REAL.is_file(), reason="the real POPE file is not here")
def test_the_real_file_of_pope():
    asked = POPE.questions([REAL], 0)
    assert len(asked) == 3000 and len({one.image for one in asked}) == 500
    assert sum(one.labels == ("yes",) for one in asked) == 1500
    assert POPE.questions([REAL], 6) == asked[:6]


# -- the picture world's --------------------------------------------------------------------------


def copied_world(folder: Path) -> Path:
    write_world(folder / "world", pictures=1, held_out=6, turns=1)
    return folder / "world"


def test_the_worlds_sets_are_the_same_each_time_and_are_not_made_twice(tmp_path):
    world = copied_world(tmp_path)
    made = world_forms.forms_beside(world / "images")
    before = runs.contents(made)
    stamp = (made / "gqa.json").stat().st_mtime_ns
    assert world_forms.forms_beside(world / "images") == made
    assert (made / "gqa.json").stat().st_mtime_ns == stamp
    (made / "tasks.json").write_text("{}")  # of an older program
    world_forms.forms_beside(world / "images")
    assert runs.contents(made) == before
    assert world_forms.main(["--world", str(world), "--out", str(tmp_path / "elsewhere")]) == 0
    assert runs.contents(tmp_path / "elsewhere") == before


def test_what_pope_asks_of_the_world_is_true():
    world = runs.world()
    made = world_forms.forms_beside(world / "images")
    settings_of_world = settings_in(world / "world.json")
    scenes = {}
    for index in range(settings_of_world["held_out"]):
        scene, name, _ = numbered_scene(settings_of_world["seed"], "held_out", index)
        scenes[name] = scene
    for sampling in world_forms.SAMPLINGS:
        asked = POPE.questions([made / f"pope_{sampling}.json"], 0)
        assert {one.image for one in asked} == set(scenes)
        for one in asked:
            colour, shape = one.text.removesuffix("?").split()[-2:]
            shown = {thing.pair for thing in scenes[one.image].things}
            assert ((shape, colour) in shown) == (one.labels == ("yes",))
            assert (shape, colour) not in HELD_OUT_PAIRS
            if sampling == "adversarial" and one.labels == ("no",):
                assert shape in {pair[0] for pair in shown} or colour in {p[1] for p in shown}
        for name in scenes:
            labels = [one.labels for one in asked if one.image == name]
            assert labels.count(("yes",)) == labels.count(("no",)) > 0


def test_the_worlds_other_sets_agree():
    made = world_forms.forms_beside(runs.world() / "images")
    vqa = VQA.questions([made / "vqa_questions.json", made / "vqa_annotations.json"], 0)
    gqa = VQA.questions([made / "gqa.json"], 0)
    assert [(a.image, a.text, a.labels[0]) for a in vqa] == [
        (a.image, a.text, a.labels[0]) for a in gqa
    ]
    for one in vqa:
        assert len(one.labels) == 10
        assert VQA.scored(one, one.labels[0])["accuracy"] == 1.0
        assert VQA.scored(one, one.labels[-1])["accuracy"] == 1.0
    captions = CAPTION.questions([made / "captions.json"], 0)
    assert len(captions) == len({one.image for one in captions}) == len({a.image for a in vqa})
    assert all(len(set(one.labels)) == 3 for one in captions)


def test_pictures_that_are_not_of_their_scenes_are_refused(tmp_path):
    world = copied_world(tmp_path)
    picture = world / "images/held_out_000003.png"
    Image.new("RGB", (96, 96)).save(picture)
    with pytest.raises(PhiSightError, match="is not the picture that its scene gives"):
        world_forms.forms_beside(world / "images")
    picture.unlink()
    with pytest.raises(PhiSightError, match="No such file.*make the world again"):
        world_forms.forms_beside(world / "images")
    assert not (world / "tasks").exists()
    with pytest.raises(PhiSightError, match="--data: not given, and .* give --data"):
        world_forms.forms_beside(tmp_path / "images")
