"""What a report says of answers made by hand, and that whatever stands in them stays text."""

from __future__ import annotations

import base64
import collections
import importlib.util
import io
import json
from html.parser import HTMLParser

import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reported import alike, answer, evaluation, losses

from data.pictures import PictureFolders
from errors import PhiSightError
from evaluation import report, report_charts, report_parts
from evaluation.alignment import alignments
from evaluation.attention import AttentionShares
from evaluation.task import Answered, Figure
from evaluation.tasks import TASKS
from reports.log import read_metrics

FOLDERS = PictureFolders([runs.ROOT])
SHARES = AttentionShares((0.5, 0.25, 0.125), 0.4, 99)
RECORDS = [
    {"kind": "train", "step": 5, "loss": 2.0, "lr": 1e-3, "gradient_norms": {"lora": 1.0}},
    {"kind": "train", "step": 10, "loss": 1.0, "lr": 1e-4, "gradient_norms": {"lora": 0.5}},
    {
        "kind": "evaluation",
        "step": 10,
        "validation_loss": 1.5,
        "alignment": {"right": 60.0, "swapped": 20.0, "blank": 10.0},
    },
]


each_task = pytest.mark.parametrize(
    "name",
    [
        "world",
        "pope",
        "vqa",
        pytest.param(
            "caption",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("sacrebleu") is None, reason="sacrebleu is not installed"
            ),
        ),
    ],
)


class Page(HTMLParser):
    """A page's elements, and its text by the id of the section that it stands in."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = collections.defaultdict(str)
        self._section = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("section", "header", "style"):
            self._section = dict(attrs).get("id") or tag

    def handle_data(self, data: str) -> None:
        self.text[self._section] += f" {data.strip()}" if data.strip() else ""

    def count(self, tag: str, name: str = "") -> int:
        return sum(
            one == tag and name in (attributes.get("class") or "").split() + [""] * (not name)
            for one, attributes in self.elements
        )


def page_of(name: str, answered: list[Answered], images=runs.ROOT, **header: object) -> Page:
    made = evaluation(name, answered, **header)
    return Page(report.report_page(made, SHARES, RECORDS, PictureFolders([images])))


# -- alignment ------------------------------------------------------------------------------------


@each_task
def test_alignment_is_the_difference_of_the_main_figures(name):
    made = evaluation(name, alike(name, "no", "yes"))
    task = TASKS[name]
    found = alignments(task, made.answered)
    assert list(found) == ["swapped", "blank", "noised"]
    right = task.figures(made.answered["right"])[task.main]
    for condition, gap in found.items():
        other = task.figures(made.answered[condition])[task.main]
        assert gap.value == pytest.approx(right.value - other.value)
        assert gap.low <= gap.value <= gap.high and gap.count == 6
        assert gap.unit == ("points" if right.unit == "%" else right.unit)
    assert found["blank"].value > 0


def test_alignment_is_taken_question_by_question():
    """Half of the questions are hard under both pictures: the difference is the same in all of
    them, which no interval of two separate figures would know."""
    right = [answer("world", n, "a" if n % 2 else "b", "a") for n in range(40)]
    same = [answer("world", n, "a" if n % 2 else "b", "a", condition="blank") for n in range(40)]
    gap = alignments(TASKS["world"], {"right": right, "blank": same[::-1]})["blank"]
    assert (gap.value, gap.low, gap.high) == (0.0, 0.0, 0.0)


def test_alignment_of_a_loss_is_what_the_picture_saves_by_token():
    made = evaluation(
        "loss",
        losses(("right", [(1.0, 1), (2.0, 3)]), ("blank", [(4.0, 1), (3.0, 3)])),
    )
    gap = alignments(TASKS["loss"], made.answered)["blank"]
    assert gap.value == pytest.approx((3.0 * 1 + 1.0 * 3) / 4)  # nats a token
    assert gap.unit == "nats"


def test_alignment_leaves_out_what_is_only_reported():
    right = [answer("world", 0, "a", "a", kind="shape"), answer("world", 1, "a", "a", kind="x")]
    right.append(answer("world", 2, "b", "a", kind="two_step"))
    other = [answer("world", n, "b", "a", condition="blank") for n in range(3)]
    gap = alignments(TASKS["world"], {"right": right, "blank": other})["blank"]
    assert (gap.value, gap.count) == (100.0, 2)


def test_without_the_right_picture_there_is_nothing_to_compare():
    made = evaluation("world", [answer("world", 0, "a", "a", condition="blank")])
    assert alignments(TASKS["world"], made.answered) == {}
    with pytest.raises(PhiSightError, match="needs answers with the right picture"):
        report.report_page(made, None, [], FOLDERS)


# -- what was said for what was right -------------------------------------------------------------


words = st.sampled_from(["red", "blue", "green", "Red.", "", "other answers", "(nothing)"])


@given(st.lists(st.tuples(words, words), min_size=1, max_size=60))
def test_every_answer_has_one_place_in_its_table(pairs):
    answered = [answer("world", n, said, label) for n, (label, said) in enumerate(pairs)]
    found = report_parts.confusion_of("k", answered, "exact")
    right = sum(one.scores["exact"] for one in answered)
    assert (found.count, found.right) == (len(pairs), right)
    assert sum(sum(counts) for _, counts in found.rows) == len(pairs)
    assert all(len(counts) == len(found.said) for _, counts in found.rows)
    on_diagonal = sum(counts[row] for row, (_, counts) in enumerate(found.rows))
    assert on_diagonal == right
    for row, (label, _) in enumerate(found.rows):
        assert found.said[row] == label


def test_a_confusion_table_by_hand():
    said = [("red", "red"), ("red", "Red."), ("red", "blue"), ("blue", "green"), ("blue", "blue")]
    answered = [answer("world", n, said, label) for n, (label, said) in enumerate(said)]
    found = report_parts.confusion_of("colour", answered, "exact")
    assert found.said == ("blue", "red", "green")
    assert found.rows == (("blue", (1, 0, 1)), ("red", (1, 2, 0)))


def test_rare_labels_and_answers_are_put_together():
    pairs = [(f"l{n:02}", f"l{n:02}") for n in range(10) for _ in range(3)]
    pairs += [("rare", "rare"), ("l00", "l01")] + [("l05", f"said {n}") for n in range(6)]
    answered = [answer("world", n, said, label) for n, (label, said) in enumerate(pairs)]
    found = report_parts.confusion_of("k", answered, "exact")
    assert len(found.said) == report_parts.LABELS + report_parts.SAID + 1
    assert found.said[-1] == found.rows[-1][0] == report_parts.OTHER
    table = {label: dict(zip(found.said, counts, strict=True)) for label, counts in found.rows}
    assert table["l00"]["l01"] == 1 and sum(table["l05"].values()) == 9
    assert table["l05"][report_parts.OTHER] + table[report_parts.OTHER][report_parts.OTHER] == 3


def test_long_answers_that_begin_alike_are_not_one():
    long = "the picture shows a very long description of " * 3
    answered = [answer("world", n, long + "ab"[n % 2], "a star") for n in range(4)]
    found = report_parts.confusion_of("k", answered, "exact")
    assert [counts for _, counts in found.rows] == [(0, 2, 2)]
    assert all(len(said) <= report_parts.WORD for said in found.said)


def test_where_every_right_answer_is_another_there_is_no_table():
    answered = [answer("world", n, "x", f"label {n}") for n in range(50)]
    found = report_parts.confusion_of("detail", answered, "exact")
    assert (found.rows, found.labels, found.count, found.right) == ((), 50, 50, 0)


def test_where_right_answers_are_sentences_there_is_no_table():
    """Cut, they could not be told apart."""
    shows = "The picture shows one object: a big {} star in the top left."
    answered = [
        answer("caption", n, "x", shows.format("red blue".split()[n % 2])) for n in range(6)
    ]
    found = report_parts.confusion_of("question", answered, "rouge_l")
    assert (found.rows, found.labels, found.count) == ((), 2, 6)


def test_an_answer_with_full_score_is_right_whatever_its_wording():
    answered = [answer("pope", n, "Yes, there is one.", "yes") for n in range(3)]
    answered += [answer("pope", 3, "No, none", "yes"), answer("pope", 4, "no", "no")]
    found = report_parts.confusion_of("k", answered, "accuracy")
    assert found.rows == (("no", (1, 0, 0)), ("yes", (0, 3, 1)))
    assert found.said == ("no", "yes", "no, none")


def test_kinds_with_most_wrong_answers_come_first():
    answered = [answer("world", n, "a", "b", kind="bad") for n in range(3)]
    answered += [answer("world", 9, "a", "b", kind="fair"), answer("world", 8, "a", "a", kind="z")]
    found = report_parts.confusions(answered, "exact")
    assert [one.kind for one in found] == ["bad", "fair", "z"]


# -- the pictures that it got wrong ---------------------------------------------------------------


def test_wrong_answers_are_of_every_kind_in_turn_and_never_right_ones():
    answered = [answer("world", n, "a", "b", kind="often") for n in range(50)]
    answered += [answer("world", 60 + n, "a", "b", kind="rare") for n in range(2)]
    answered += [answer("world", 70 + n, "b", "b", kind="good") for n in range(9)]
    found = report_parts.wrong_answers(answered, "exact", 6)
    assert [one.asked.kind for one in found] == ["often", "rare", "often", "rare", "often", "often"]


def test_lowest_scores_and_other_pictures_come_first():
    answered = [
        answer("vqa", 0, "cat", "cat", "cat", "cat", "cat", "dog", "dog", image="one.png"),
        answer("vqa", 1, "dog", "cat", "cat", "cat", "dog", "cat", "cat", image="one.png"),
        answer("vqa", 2, "cow", "cat", image="one.png"),
        answer("vqa", 3, "ant", "cat", image="two.png"),
        answer("vqa", 4, "bee", "cat", image="one.png"),
    ]
    found = report_parts.wrong_answers(answered, "accuracy")
    assert [one.asked.id for one in found] == ["2", "3", "4", "1"]
    assert 0 < found[-1].scores["accuracy"] < 1


def test_thumbnails_are_small_and_bad_pictures_have_none(tmp_path):
    Image.new("RGB", (900, 300), (200, 10, 10)).save(tmp_path / "wide.png")
    Image.new("RGB", (8, 8), (10, 10, 200)).save(tmp_path / "small.bmp")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG and no more")
    names = ["wide.png", "absent.png", "small.bmp", "broken.png", "wide.png"]
    found = report_parts.thumbnails(names, PictureFolders([tmp_path]))
    assert list(found) == ["wide.png", "small.bmp"]
    for name, size, colour in (
        ("wide.png", (320, 107), (200, 10, 10)),
        ("small.bmp", (160, 160), (10, 10, 200)),
    ):
        kind, data = found[name].split(",")
        assert kind == "data:image/webp;base64"
        picture = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
        assert picture.size == size
        middle = picture.getpixel((picture.width // 2, picture.height // 2))
        assert all(abs(a - b) < 12 for a, b in zip(middle, colour, strict=True))


# -- charts ---------------------------------------------------------------------------------------


def test_curves_lie_within_their_canvas_and_long_ones_are_thinned():
    steps = [{"kind": "train", "step": n, "loss": 5.0 / n, "lr": 1e-3} for n in range(1, 5000)]
    loss, rate, *_ = report_charts.curves(steps)
    (curve,) = loss.curves
    places = [tuple(map(float, place.split(","))) for place in curve.line.split()]
    assert report_charts.POINTS / 2 < len(places) <= report_charts.POINTS + 1
    assert all(0 <= x <= report_charts.WIDTH and 0 <= y <= report_charts.HEIGHT for x, y in places)
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert [y for _, y in places] == sorted(y for _, y in places)  # the loss falls
    assert curve.last == f"{5.0 / 4999:.4g}" and len(rate.curves) == 1


def test_a_log_without_evaluations_has_empty_charts_and_one_step_is_enough():
    charts = report_charts.curves([{"kind": "train", "step": 3, "loss": 1.0}])
    assert [bool(chart.curves) for chart in charts] == [True, False, False, False]
    assert len(charts[0].curves[0].dots) == 1


def test_columns_of_attention_are_as_high_as_the_shares():
    found = report_charts.attention_columns(SHARES)
    heights = [column[3] for column in found.columns]
    assert heights[0] == pytest.approx(2 * heights[1], abs=0.2)
    assert heights[1] == pytest.approx(2 * heights[2], abs=0.2)
    assert [column[5] for column in found.columns] == ["50", "25", "12"]
    bottom = report_charts.HEIGHT - report_charts.BOTTOM
    assert bottom - found.chance == pytest.approx(0.8 * heights[0], abs=0.2)
    many = report_charts.attention_columns(AttentionShares((0.1,) * 40, 0.2, 1))
    assert not many.are_numbered and many.columns[-1][0] < report_charts.WIDTH


def test_bars_share_one_scale():
    percent = {"right": Figure(80, 70, 90, 5), "blank": Figure(20, 0, 40, 5)}
    assert [(bar.low, bar.end, bar.high) for bar in report_charts.bars(percent)] == [
        (70, 80, 90),
        (0, 20, 40),
    ]
    nats = {"right": Figure(1, 0.5, 1.5, 5, "nats"), "blank": Figure(2, 1, 4, 5, "nats")}
    assert [bar.end for bar in report_charts.bars(nats)] == [25, 50]
    assert [bar.text for bar in report_charts.bars(nats)] == ["1.0000", "2.0000"]


# -- the page -------------------------------------------------------------------------------------


@each_task
def test_the_page_of_every_task_that_generates(name):
    made = evaluation(name, alike(name, "no", "yes"))
    page = Page(report.report_page(made, SHARES, RECORDS, FOLDERS))
    main = TASKS[name].figures(made.answered["right"])[TASKS[name].main]
    assert f"{main.value:.1f}" in page.text["header"]
    for expected in ("checkpoint-000010", "step 10", "abababababab", "questions 6", "pictures 6"):
        assert expected in page.text["header"]
    for figure in TASKS[name].figures(made.answered["right"]):
        assert figure in page.text["figures"]
    assert page.count("li") == 3 and "kind0" in page.text["kinds"] and "kind1" in page.text["kinds"]
    assert page.count("article") == 2  # questions 0 and 3 are wrong
    assert page.count("rect") == 3 and page.count("polyline") > 3
    for condition in ("right", "swapped", "blank", "noised"):
        assert condition in page.text["alignment"] and condition in page.text["how"]


def test_the_page_of_a_loss_has_no_answers():
    made = losses(("right", [(1.0, 1), (2.0, 3)]), ("blank", [(4.0, 1), (3.0, 3)]))
    page = page_of("loss", made)
    assert "1.7500" in page.text["header"] and "perplexity" in page.text["figures"]
    assert "measures how likely given ones are" in page.text["wrong"]
    assert "below a grey picture" in page.text["alignment"] and "confusions" not in page.text
    assert not page.count("article") and not page.count("details")


def test_what_is_absent_is_said():
    made = evaluation("world", [answer("world", 0, "a", "a")])
    page = Page(report.report_page(made, None, [], FOLDERS))
    assert "No answer here is about a picture" in page.text["attention"]
    assert "log does not lie beside" in page.text["training"]
    assert "Every answer is right" in page.text["wrong"]
    assert "kinds" not in page.text and not page.count("li")


def test_a_further_set_is_a_column_and_no_condition():
    answered = [*alike("world", "no", "yes"), answer("world", 9, "a", "b", subset="novel_pairs")]
    page = page_of("world", answered)
    assert "novel_pairs" in page.text["figures"] and "novel_pairs" in page.text["how"]
    assert page.count("li") == 3


def test_wrong_answers_are_shown_with_their_picture():
    images = runs.world() / "images"
    name = sorted(path.name for path in images.iterdir())[0]
    answered = [
        answer("world", 0, "a moon", "a sun", image=name, text="What shines?"),
        answer("world", 0, "a moon", "a sun", image=name, condition="blank"),
        answer("world", 1, "x", "y", image="absent.png"),
        answer("world", 1, "z", "y", image="absent.png", condition="blank"),
    ]
    page = page_of("world", answered, images)
    (picture,) = [attributes for tag, attributes in page.elements if tag == "img"]
    assert picture["src"].startswith("data:image/webp;base64,") and picture["alt"] == name
    for expected in ("What shines?", "a moon", "a sun", "the same of a blank", "no picture"):
        assert expected in page.text["wrong"]


HOSTILE = "</p><script>alert(1)</script><img src=x onerror=alert(1)>\"' {{ 7*7 }} &amp; \x00\u202e"


@settings(max_examples=25)
@given(st.text(max_size=30) | st.just(HOSTILE), st.sampled_from(["world", "vqa"]))
def test_no_text_adds_an_element_or_an_attribute(text, task):
    """Whatever stands in answers, labels, kinds, names and questions: the same elements."""
    hostile = text + HOSTILE

    def elements(said: str) -> list[tuple[str, tuple[str, ...]]]:
        made = alike(task, f"no {said}", f"yes {said}", kind=said, text=said, image=f"a{said}")
        return [
            (tag, tuple(sorted(attributes)))
            for tag, attributes in page_of(task, made, run=said, instruction=said).elements
        ]

    long = "x" * len(hostile)
    assert elements(hostile) == elements(long)


def test_hostile_text_is_shown_as_it_is():
    page = page_of("world", alike("world", "no", "yes", text="<b>is it</b> {{ 7*7 }} &amp;?"))
    assert "<b>is it</b> {{ 7*7 }} &amp;?" in page.text["wrong"]


def test_a_page_needs_nothing_from_outside():
    page = page_of("world", alike("world", "no", "yes"))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "form", "base", "a"}
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "url(" not in page.text["style"] and "@import" not in page.text["style"]
    policies = [a["content"] for _, a in page.elements if "http-equiv" in a]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_a_page_stays_small_whatever_was_asked():
    long = "word " * 5000
    answered = [
        answer("world", n, long + str(n), long, long[:9000], kind=f"kind {n}", text=long)
        for n in range(300)
    ]
    html = report.report_page(evaluation("world", answered), SHARES, RECORDS, FOLDERS)
    assert len(html) < 200_000
    assert Page(html).count("article") == report_parts.WRONG


# -- the file, the log, the attention -------------------------------------------------------------


def test_a_report_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.html"
    report.write_report(path, "first")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]
    for bad in (tmp_path, tmp_path / "absent" / "report.html"):
        with pytest.raises(PhiSightError, match="cannot be written"):
            report.write_report(bad, "second")
    assert [path.read_text()] == [one.read_text() for one in tmp_path.iterdir()]


def test_the_log_goes_up_to_the_checkpoint():
    assistant = runs.assistant()
    records = report.training_records(assistant)
    whole = read_metrics(runs.finished_run() / "metrics.jsonl")
    step = assistant.provenance["step"]
    assert records == [one for one in whole if one["step"] <= step] and records
    assert json.dumps(records)


def test_attention_is_that_of_the_answers(monkeypatch):
    from test_evaluate import asked as held_out
    from test_evaluate import store_of

    assistant = runs.assistant()
    questions = held_out()[:9]
    store = store_of(assistant, [question.image for question in questions])
    answered = [
        answer("world", n, "a red star", question.answer, image=question.image, text=question.text)
        for n, question in enumerate(questions)
    ]
    found = report.attention_of(assistant, answered, store)
    assert len(found.by_layer) == assistant.model.language_model.config.num_hidden_layers
    assert all(0 < share < 1 for share in found.by_layer) and 0 < found.chance < 1
    encoded = assistant.parts.chat_format.encode_text("a red star")
    assert found.tokens == 9 * (len(encoded) + 1)  # the last of the prompt, and the answer's own
    behind = report.attention_of(assistant, answered, store, "Answer with one word.")
    assert behind.chance < found.chance  # more words beside the picture: as it was asked
    monkeypatch.setattr(report, "ATTENDED", 3)
    assert report.attention_of(assistant, answered, store).tokens == found.tokens / 3
    assert report.attention_of(assistant, [], store) is None
