"""The chat in a real browser: what is asked, answered, changed and shown."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
import runs
from pages import Site, User, pictures, served, wait_for, wait_with
from PIL import Image

from assistant.assistant import Assistant
from assistant.messages import user_message
from data.images import MAX_BYTES
from web.chat.conversation import BEGINNING, SavedConversation, dropping, with_node
from web.chat.store import ConversationStore
from web.model import Model

LONG_ANSWER = "Describe the picture in detail."


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    """The app with the tests' own small run, or with a better one: see `test_its_picture`."""
    run = os.environ.get("PHISIGHT_APP_RUN")
    assistant = Assistant.load(run) if run else runs.own_assistant()
    logs = Path(run).parent if run else runs.finished_run().parent
    with served(assistant, tmp_path_factory.mktemp("conversations"), logs) as site:
        yield site
    assistant.close()


@pytest.fixture
def user(browser, site) -> Iterator[User]:
    user = User(browser, site)
    yield user
    user.close()


@pytest.fixture
def endless(site, monkeypatch):
    """A model that never says that it has finished, and takes its time: a token of the tiny one
    takes a fraction of a millisecond."""
    engine = site.assistant.engine
    step = engine._step

    def unhurried() -> None:
        time.sleep(0.01)
        step()

    monkeypatch.setattr(engine, "stop_ids", frozenset())
    monkeypatch.setattr(engine, "_step", unhurried)


def answer_to(site: Site, question: str, *images: Path) -> str:
    reply = site.assistant.reply([user_message(question, [str(image) for image in images])])
    return "".join(reply).strip()


def shown(answer: str) -> str:
    return " ".join(answer.split()) or "(no answer)"


def bubble(text: str) -> str:
    return " ".join(text.split())


# -- asking ---------------------------------------------------------------------------------------


def test_an_example_is_asked_on_a_click_and_answered_as_the_assistant_does(user, site):
    question = user.try_example(0)
    (_, asked), (_, answered) = user.answers(1)
    assert asked == question and user.pictures() == 1
    kept = next(site.conversations.rglob("*.png"))
    assert bubble(answered) == shown(answer_to(site, question, kept))
    assert "tokens/s" in user.note() and " s · " in user.note()


def test_several_pictures_in_any_turn_and_questions_without_any(user, site):
    one, two, three = pictures(3)
    user.ask("How many objects are there?")
    user.answers(1)
    user.ask("Which?", one, two)
    user.answers(2)
    user.ask("", three)
    conversation = user.answers(3)
    assert [who for who, _ in conversation] == ["user", "bot", "user", "bot", "bot"]
    rows = user.page.locator(".turn.user .thumbnails").evaluate_all(
        "all => all.map(row => row.querySelectorAll('img').length)"
    )
    assert rows == [0, 2, 1]  # each in the bubble of its own question
    boxes = [user.page.locator(".turn.user img").nth(i).bounding_box() for i in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["height"] > 60  # in one row


def test_an_empty_question_is_not_asked(user):
    user.ask(" ")
    wait_with(user.page, lambda: user.told() == ["Ask something or add a picture first."])
    assert user.said() == []


def test_enter_asks_shift_enter_breaks_the_line_and_composing_does_neither(user):
    user.field.fill("Is it")
    user.field.press("Shift+Enter")
    user.field.type("red?")
    user.field.evaluate(
        """field => field.dispatchEvent(
            new KeyboardEvent("keydown", {key: "Enter", isComposing: true, bubbles: true})
        )"""
    )
    assert user.field.input_value() == "Is it\nred?" and user.said() == []
    user.field.press("Enter")
    assert user.answers(1)[0] == ("user", "Is it\nred?")
    assert user.field.input_value() == ""


def test_a_question_can_be_asked_while_the_model_is_loaded(browser, site, tmp_path):
    loads = []

    def load(source: str) -> Assistant:
        wait_for(lambda: loads)
        return site.assistant

    model = Model(load=load, source="tiny")
    model.begin("tiny")
    with served(model, tmp_path, tmp_path) as loading:
        user = User(browser, loading)
        user.page.get_by_text("The model is being loaded.").wait_for()
        user.ask("What is it?", pictures(1)[0])
        user.page.locator(".turn.assistant.waiting").wait_for()
        assert user.said()[0] == ("user", "What is it?") and user.pictures() == 1
        loads.append(True)
        (_, answered) = user.answers(1)[1]
        assert bubble(answered) == shown(answer_to(site, "What is it?", pictures(1)[0]))
        user.close()


# -- changing what was asked -----------------------------------------------------------------------


def test_a_question_that_is_edited_is_asked_again_with_its_picture(user, site):
    user.ask("What is it?", pictures(1)[0])
    before = user.answers(1)
    user.ask("And now?")
    user.answers(2)
    user.click("Edit the question", 0)
    user.page.locator(".turn.edited textarea").fill("How many objects are there?")
    user.click("Ask again")
    wait_with(user.page, lambda: ("user", "How many objects are there?") in user.said())
    (_, asked), (_, answered) = user.answers(1)
    assert asked == "How many objects are there?" and user.pictures() == 1
    assert bubble(answered) == shown(answer_to(site, asked, pictures(1)[0]))
    user.click("The version before")  # the former question, with what followed it
    wait_with(user.page, lambda: user.said()[:2] == before and len(user.said()) == 4)


def test_an_answer_is_made_again_as_is_set_and_the_former_one_is_kept(user, site, monkeypatch):
    user.ask("What is it?", pictures(1)[0])
    first = user.answers(1)
    ask, asked = site.assistant.ask, []

    def seeded(messages, longest, sampling, seed, *rest, **more):
        """As it was asked, but for chance: an answer may be empty at this temperature."""
        asked.append((longest, sampling, seed))
        return ask(messages, longest, sampling, 1, *rest, **more)

    monkeypatch.setattr(site.assistant, "ask", seeded)
    user.set("temperature", 1.5)
    user.set("max_new_tokens", 7)
    user.click("Answer again; this answer is kept")
    wait_with(user.page, lambda: len(asked) == 1 and user.is_idle())
    (longest, sampling, seed) = asked[0]
    assert (longest, sampling.temperature, seed) == (7, 1.5, None)
    second = user.answers(1)
    assert second[0] == first[0] and second[1] != first[1] and user.pictures() == 1
    count = user.page.locator(".turn.assistant .versions .count")
    assert count.inner_text() == "2/2"
    user.click("The version before")
    wait_with(user.page, lambda: user.said() == first and count.inner_text() == "1/2")
    user.page.reload()
    wait_with(user.page, lambda: user.said() == first)
    user.click("The next version")
    wait_with(user.page, lambda: user.said() == second)
    user.page.keyboard.press("Enter")  # the keyboard stays with the versions
    wait_with(user.page, lambda: user.said() == first)


def test_what_is_deleted_from_a_turn_on_comes_back(user):
    user.ask("What is it?", pictures(1)[0])
    user.answers(1)
    user.ask("And now?")
    both = user.answers(2)
    user.click("Delete from here on", 2)
    wait_with(user.page, lambda: user.said() == both[:2])
    user.page.locator(".toast").get_by_role("button", name="Undo").click()
    wait_with(user.page, lambda: user.said() == both)
    user.click("Delete from here on", 0)
    user.page.locator(".welcome .example").first.wait_for()
    user.page.locator(".toast").get_by_role("button", name="Undo").click()
    wait_with(user.page, lambda: user.said() == both and user.pictures() == 1)


def test_the_text_of_a_turn_is_copied(user):
    user.context.grant_permissions(["clipboard-read", "clipboard-write"])
    user.ask("What is *it*?", pictures(1)[0])
    user.answers(1)
    user.click("Copy the text", 0)
    read = "navigator.clipboard.readText()"
    wait_with(user.page, lambda: user.page.evaluate(read) == "What is *it*?")


def test_stop_ends_the_generation_and_keeps_what_was_said(user, site, endless):
    user.set("max_new_tokens", 2048)
    user.ask(LONG_ANSWER, pictures(1)[0])
    wait_with(user.page, lambda: len(user.said()) == 2)
    assert site.assistant.statistics()["running"] == 1
    user.page.get_by_role("button", name="Stop").click()
    wait_for(lambda: site.assistant.statistics()["running"] == 0)
    user.answers(1)
    assert "stopped after" in user.note()
    assert user.said()[1][1]
    user.set("max_new_tokens", 4)
    user.ask("And now?")
    user.answers(2)
    assert "cut at 4 tokens" in user.note()


def test_a_page_that_is_closed_stops_its_answer_and_finds_it_again(user, site, endless):
    user.set("max_new_tokens", 2048)
    user.ask(LONG_ANSWER, pictures(1)[0])
    wait_with(user.page, lambda: len(user.said()) == 2)
    link = user.page.evaluate("location.hash")
    user.page.goto("about:blank")
    wait_for(lambda: site.assistant.statistics()["running"] == 0)
    user.open(link)
    wait_with(user.page, lambda: len(user.said()) == 2)
    assert user.said()[0] == ("user", LONG_ANSWER) and "stopped after" in user.note()


def test_two_users_at_once_keep_apart(user, browser, site, endless):
    other = User(browser, site)
    user.set("max_new_tokens", 600)
    user.ask("What is it?", pictures(1)[0])
    wait_with(user.page, lambda: len(user.said()) == 2)
    other.set("max_new_tokens", 5)
    other.ask("Is there a red star?", pictures(2)[1])
    other.answers(1)  # while the first one's answer goes on
    assert not user.is_idle()
    assert other.said()[0][1] == "Is there a red star?"
    assert user.said()[0][1] == "What is it?"
    user.page.get_by_role("button", name="Stop").click()
    user.answers(1)
    other.close()


def test_two_windows_on_one_conversation_lose_nothing(user, site):
    user.ask("What is it?", pictures(1)[0])
    user.answers(1)
    former, link = user.page, user.page.evaluate("location.hash")
    second = user.context.new_page()
    second.goto(f"{site.url}/{link}")
    second.locator(".turn.assistant").wait_for()
    user.ask("Is there a red star?")
    both = user.answers(2)
    user.page = second
    user.ask("And a blue one?")
    wait_with(second, lambda: len(user.told()) == 1)
    assert "was changed in another window" in user.told()[0]
    wait_with(second, lambda: user.said() == both)  # the newer state
    assert user.field.input_value() == "And a blue one?"
    user.field.press("Enter")
    assert user.answers(3)[:4] == both
    user.page = former


def test_the_voice_mode_goes_on_with_the_conversation_and_a_new_one_is_new(user):
    user.ask("What is it?", pictures(1)[0])
    said = user.answers(1)
    link = user.page.evaluate("location.hash")
    parts = [user.page.locator(f".chat-room{part}") for part in ("", " > .column", " #question")]
    before = [box.bounding_box() for box in parts]
    user.page.get_by_role("link", name="Voice").click()
    wait_with(
        user.page, lambda: user.page.evaluate("location.hash") == link.replace("chat", "voice")
    )
    assert user.said() == said
    user.page.get_by_role("link", name="Batch").click()
    user.page.locator(".chat-room").wait_for(state="hidden")
    user.page.get_by_role("link", name="Voice").click()
    wait_with(user.page, lambda: user.said() == said)
    user.page.get_by_role("link", name="Chat").click()
    wait_with(user.page, lambda: user.page.evaluate("location.hash") == link)
    assert [box.bounding_box() for box in parts] == before  # as high as it was
    user.page.get_by_role("link", name="Voice").click()
    user.page.get_by_role("link", name="New conversation").click()
    user.page.locator(".welcome .example").first.wait_for()
    assert user.page.evaluate("location.hash") == "#/voice"
    user.page.go_back()
    wait_with(user.page, lambda: user.said() == said)


# -- uploads --------------------------------------------------------------------------------------


def test_an_upload_that_is_not_a_picture_is_one_line_and_the_chat_goes_on(user, tmp_path):
    fake = tmp_path / "fake.png"
    fake.write_text("not a picture")
    user.field.fill("What is it?")
    files = [str(fake), str(pictures(1)[0])]
    user.page.locator("#question input[type=file]").set_input_files(files)
    wait_with(user.page, lambda: len(user.told()) == 1)
    assert user.told()[0].startswith("fake.png: not a picture in a known format")
    user.page.locator("#question .attachment[data-state=ready]").wait_for()
    assert user.page.locator("#question .attachment").count() == 1  # only the bad one goes
    user.field.press("Enter")
    assert user.answers(1)[0] == ("user", "What is it?")
    assert user.pictures() == 1


def test_a_picture_of_50_megabytes_is_one_line_and_the_chat_goes_on(user, site, tmp_path):
    huge = tmp_path / "huge.bmp"
    Image.fromarray(numpy.zeros((4096, 4096, 3), numpy.uint8)).save(huge)
    assert 50e6 < huge.stat().st_size <= MAX_BYTES
    user.page.locator("#question input[type=file]").set_input_files(str(huge))
    wait_with(user.page, lambda: len(user.told()) == 1)
    assert user.told()[0] == "huge.bmp is larger than 20 MB. Send a smaller copy."
    user.ask("What is it?", pictures(1)[0])
    user.answers(1)
    with huge.open("rb") as file:  # a program that does not ask the page is refused too
        sent = httpx.post(
            f"{site.url}/app/uploads?name=huge.bmp",
            content=file.read(),
            headers={"X-Browser-Key": "0" * 32},
        )
    assert sent.status_code in (409, 413)


def test_enter_during_an_upload_waits_for_it(user):
    held: list[Any] = []
    user.page.route("**/app/uploads?*", lambda route: held.append(route))
    user.page.locator("#question input[type=file]").set_input_files(str(pictures(1)[0]))
    sending = user.page.locator("#question .attachment[data-state=sending]")
    sending.wait_for()
    wait_with(user.page, lambda: len(held) == 1)
    user.ask("What is it?")
    user.page.get_by_text("It is asked as soon as the upload is complete.").wait_for()
    assert user.said() == [] and sending.count() == 1
    held[0].continue_()
    assert user.answers(1)[0] == ("user", "What is it?") and user.pictures() == 1


def test_a_question_that_is_refused_returns_with_its_files(user):
    user.set("seed", "x")
    user.ask("What is it?", *pictures(2))
    wait_with(user.page, lambda: len(user.told()) == 1)
    assert user.told() == ["The seed must be a whole number of 0 or more."]
    assert user.field.input_value() == "What is it?" and user.said() == []
    assert user.page.locator("#question .attachment img").count() == 2
    user.set("seed", "")
    user.field.press("Enter")
    user.answers(1)
    assert user.pictures() == 2


GIVEN = """([kind, name, bytes]) => {
    const data = new DataTransfer();
    data.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
    const event = kind === "paste"
        ? new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true})
        : new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true});
    (kind === "paste" ? document.activeElement : document.querySelector(".chat-room > .column"))
        .dispatchEvent(event);
    return event.defaultPrevented;
}"""


def test_pictures_are_dropped_anywhere_and_pasted(user):
    first, second = ([path.name, list(path.read_bytes())] for path in pictures(2))
    assert user.page.evaluate(GIVEN, ["dragenter", *first])
    user.page.get_by_text("Drop the files to add them to the question").wait_for()
    assert user.page.evaluate(GIVEN, ["drop", *first])
    assert user.page.evaluate(GIVEN, ["paste", *second])
    user.page.locator("#question .attachment[data-state=ready]").nth(1).wait_for()
    assert not user.page.locator(".drop-veil").is_visible()
    user.page.get_by_role("button", name=f"Remove {first[0]} from the question").click()
    user.ask("What is it?")
    user.answers(1)
    assert user.pictures() == 1


def test_a_draft_is_kept_over_a_reload_for_each_conversation(user):
    user.ask("What is it?", pictures(1)[0])
    said = user.answers(1)
    link = user.page.evaluate("location.hash")
    user.attach(pictures(2)[1])
    user.field.fill("Is there a red")
    user.page.reload()
    wait_with(user.page, lambda: user.said() == said)
    assert user.field.input_value() == "Is there a red"
    user.page.locator("#question .attachment[data-state=ready] img").wait_for()
    user.start_over()
    assert user.field.input_value() == "" and user.page.locator("#question img").count() == 0
    user.field.fill("Something else")
    user.open(link)
    user.page.locator("#question .attachment img").wait_for()
    user.field.press("End")
    user.field.type(" star?")
    user.field.press("Enter")
    assert user.answers(2)[2] == ("user", "Is there a red star?") and user.pictures() == 2
    user.open()
    assert user.field.input_value() == "Something else"


# -- what is shown --------------------------------------------------------------------------------

HOSTILE = """# x

<div id="cover" style="position:fixed;inset:0;z-index:99;background:red">covered</div>

<form action="https://other.example/steal"><input name="password"></form>

<script>window.ran = true; alert(1)</script>

![a picture](https://other.example/pixel.png) [a link](javascript:alert(1))
"""
OUTSIDERS = "#cover, .transcript form:not(.edit), .transcript :is(script, input, iframe, style)"


def test_html_in_a_question_is_text(user):
    user.ask(HOSTILE)
    asked = user.answers(1)[0]
    assert asked == ("user", HOSTILE.strip())
    user.page.reload()
    wait_with(user.page, lambda: user.said()[:1] == [asked])
    assert user.page.locator(OUTSIDERS).count() == 0
    assert user.page.locator(".turn.user :is(h1, a, em)").count() == 0
    assert user.page.evaluate("window.ran") is None


def test_html_in_an_answer_is_text_and_its_markdown_loads_nothing(user, site, monkeypatch):
    monkeypatch.setattr("web.chat.talk.pieces_of", hostile_pieces)
    user.ask("What is it?")
    user.answers(1)
    words = user.page.locator(".turn.assistant .words")
    for is_read_again in (False, True):
        if is_read_again:
            user.page.reload()
            words.wait_for()
        assert words.locator("h1").inner_text() == "x"
        assert "window.ran = true" in words.inner_text() and "<form" in words.inner_text()
        assert user.page.locator(OUTSIDERS).count() == 0
        assert words.locator("img, [style], [onclick], a").count() == 0
    assert user.page.evaluate("window.ran") is None


async def hostile_pieces(answer):
    for piece in HOSTILE.splitlines(keepends=True):
        yield piece


def test_the_page_itself_leaves_out_what_markdown_cannot_make(user):
    """The second lock, were the server's rendering ever to fail."""
    shown = user.page.evaluate(
        """async (html) => {
            const { href } = document.querySelector("link[href$='chat/markup.js']");
            const element = document.createElement("div");
            (await import(href)).showHtml(element, html);
            return element.innerHTML;
        }""",
        "<p onclick='x()' style='position:fixed'>a <b>b</b><a href='javascript:x()'>c</a></p>"
        "<form><p>d</p></form><svg><script>1</script></svg><img src=x onerror=x()>"
        "<pre><code class='language-c++'>e</code></pre>",
    )
    assert shown == '<p>a <a>c</a></p><pre><code class="language-c++">e</code></pre>'


def test_a_picture_opens_in_full_size_by_mouse_and_by_keyboard(user, tmp_path):
    large = tmp_path / "large.png"
    Image.effect_noise((1400, 900), 60).convert("RGB").save(large)
    user.ask("What is it?", large, pictures(1)[0])
    user.answers(1)
    thumbnail = user.page.get_by_role("button", name="Picture 1 of 2, show in full size")
    thumbnail.click()
    window = user.page.get_by_role("dialog", name="The picture in full size")
    picture = window.locator("img")
    wait_with(user.page, lambda: (picture.bounding_box() or {"width": 0})["width"] > 1100)
    for name in ("Close", "The picture before", "The next picture"):
        assert window.get_by_role("button", name=name).is_visible()
    source = picture.get_attribute("src")
    user.page.keyboard.press("ArrowRight")
    wait_with(user.page, lambda: picture.get_attribute("src") != source)
    user.page.keyboard.press("Escape")
    window.wait_for(state="detached")
    assert thumbnail.evaluate("element => element === document.activeElement")
    thumbnail.press("Enter")
    window.wait_for()
    user.page.keyboard.press("Escape")


def test_the_place_to_ask_grows_upward_and_never_leaves_the_window(user):
    low = user.page.locator("#question").bounding_box()
    user.field.fill("\n".join(f"line {number}" for number in range(80)))
    high = user.page.locator("#question").bounding_box()
    assert high["height"] > low["height"] + 150
    assert high["y"] > 0 and abs(high["y"] + high["height"] - low["y"] - low["height"]) < 2
    assert user.field.evaluate("field => field.scrollHeight > field.clientHeight + 100")
    user.page.get_by_role("button", name="Ask").wait_for()
    user.field.fill("")
    assert user.page.locator("#question").bounding_box() == low


async def many_lines(answer):
    for number in range(150):
        await asyncio.sleep(0.02)
        yield f"Line {number} of the answer.\n\n"


def test_the_page_follows_an_answer_until_the_reader_scrolls_up(user, monkeypatch):
    monkeypatch.setattr("web.chat.talk.pieces_of", many_lines)
    user.ask(LONG_ANSWER)
    scrolled = "document.scrollingElement.scrollTop"
    wait_with(user.page, lambda: user.page.evaluate(scrolled) > 250)
    newest = user.page.get_by_role("button", name="To the newest turn")
    assert not newest.is_visible()
    user.page.mouse.move(640, 300)
    user.page.mouse.wheel(0, -200)
    newest.wait_for()
    place, said = user.page.evaluate(scrolled), user.said()
    wait_with(user.page, lambda: len(user.said()[1][1]) > len(said[1][1]) + 300)
    assert abs(user.page.evaluate(scrolled) - place) < 5
    newest.click()
    newest.wait_for(state="hidden")
    wait_with(user.page, lambda: user.page.evaluate(scrolled) > place + 200)
    user.answers(1)
    left = "document.scrollingElement.scrollHeight - innerHeight - scrollY"
    wait_with(user.page, lambda: user.page.evaluate(left) < 5)


def test_what_the_model_no_longer_reads_is_shown_faintly_above_a_line(user, site):
    user.ask("What is it?")
    user.answers(1)
    user.ask("And now?")
    said = user.answers(2)
    link = user.page.evaluate("location.hash")
    headers = {"X-Browser-Key": browser_key(user)}
    address = f"{site.url}/app/conversations/{link.split('/')[-1]}"
    version = httpx.get(address, headers=headers).json()["version"]
    form = {"version": version, "turns": 2}
    assert httpx.post(f"{address}/drop", json=form, headers=headers).status_code == 200
    user.page.reload()
    wait_with(user.page, lambda: user.said() == said)
    places = user.page.locator(".transcript > *").evaluate_all(
        "all => all.map(one => one.className)"
    )
    assert [("unread" in one, "divider" in one) for one in places] == [
        (True, False),
        (True, False),
        (False, True),
        (False, False),
        (False, False),
    ]


def browser_key(user: User) -> str:
    return user.page.evaluate("JSON.parse(localStorage.getItem('phisight.key'))")


def long_conversation(user: User, site: Site, turns: int) -> str:
    """Save one of so many turns for a user; returns its link."""
    store = ConversationStore(site.conversations, browser_key(user))
    picture = store.keep_picture("ab" * 8, pictures(1)[0].read_bytes(), "picture.png")

    def fill(conversation: SavedConversation) -> SavedConversation:
        parent = BEGINNING
        for number in range(turns):
            is_question = number % 2 == 0
            text = f"Question {number}?" if is_question else f"An *answer*, the {number}th.\n\n" * 3
            kept = (picture,) if number % 20 == 0 else ()
            role = "user" if is_question else "assistant"
            conversation = with_node(conversation, parent, role, text, kept)
            parent = conversation.next - 1
        return dropping(conversation, turns - 2)  # or there is no room for another question

    store.change("ab" * 8, 0, fill)
    return "#/chat/" + "ab" * 8


WATCH = """() => {
    window.work = {added: [], removed: 0, changed: 0, keys: []};
    new MutationObserver((records) => {
        for (const {type, addedNodes, removedNodes} of records) {
            if (type === "childList") {
                work.added.push(...[...addedNodes].map((node) => node.className ?? "text"));
                work.removed += removedNodes.length;
            } else work.changed += 1;
        }
    }).observe(document.querySelector(".transcript"), {
        subtree: true, childList: true, characterData: true, attributes: true,
    });
    const field = document.querySelector("#question textarea");
    field.addEventListener("keydown", () => {
        const began = performance.now();
        requestAnimationFrame(() => setTimeout(() => {
            work.keys.push(performance.measure("key", {start: began}).duration);
        }));
    }, true);
}"""


def test_typing_and_asking_at_200_turns_leave_the_other_turns_alone(user, site):
    user.open(long_conversation(user, site, 200))
    wait_with(user.page, lambda: user.turns.count() == 200)
    user.page.evaluate(WATCH)
    user.field.type("How many objects are there in it now?")
    user.page.wait_for_timeout(600)  # its draft is kept meanwhile
    work = user.page.evaluate("work")
    keys = sorted(work["keys"])
    print(f"a key at 200 turns: {keys[len(keys) // 2]:.0f} ms, at most {keys[-1]:.0f} ms")
    assert len(keys) == 37
    assert (work["added"], work["removed"], work["changed"]) == ([], 0, 0)
    user.set("max_new_tokens", 4)
    user.field.press("Enter")
    user.answers(101)
    work = user.page.evaluate("work")
    turns = [one for one in work["added"] if "turn" in str(one).split()]
    assert len(turns) == 2 and len(work["added"]) < 30


def test_a_screen_reader_is_told_the_answer_once(user, endless):
    user.set("max_new_tokens", 40)
    user.ask("What is it?", pictures(1)[0])
    status = user.page.locator(".chat-room > [role=status]")
    wait_with(user.page, lambda: status.inner_text() == "The answer is being written.")
    assert user.page.locator(".transcript").get_attribute("aria-live") == "off"
    answer = user.answers(1)[1][1]
    wait_with(user.page, lambda: bubble(status.inner_text()) == bubble(answer))


def test_on_a_telephone_the_conversation_comes_first(browser, site):
    user = User(browser, site, viewport={"width": 390, "height": 800}, has_touch=True)
    box = user.page.locator("#question").bounding_box()
    assert 0 <= box["x"] and box["x"] + box["width"] <= 390 and box["y"] + box["height"] <= 800
    user.try_example(0)
    user.answers(1)
    assert user.page.evaluate("document.documentElement.scrollWidth") <= 390
    small = user.page.locator(".chat-room button:visible").evaluate_all(
        """all => all.map(one => [one.ariaLabel, one.getBoundingClientRect()])
            .filter(([, box]) => box.width < 24 || box.height < 24).map(([name]) => name)"""
    )
    assert small == []
    seen = "all => all.map(one => getComputedStyle(one).opacity)"  # a finger cannot hover
    assert set(user.page.locator(".turn .actions").evaluate_all(seen)) == {"1"}
    user.close()
