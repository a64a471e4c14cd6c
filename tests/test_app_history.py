"""The saved conversations beside the chat: found, named, pinned, saved, deleted, linked to."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

import pytest
import runs
from kept import DAY, Kept, ask, choose, groups, reload, titles
from pages import Site, User, pictures, served, wait_with

from web.chat.conversation import with_question


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    folder = tmp_path_factory.mktemp("conversations")
    with served(runs.assistant(), folder, runs.finished_run().parent) as site:
        yield site


@pytest.fixture
def user(browser, site) -> User:
    user = User(browser, site)
    yield user
    user.close()


@pytest.fixture
def kept(user) -> Kept:
    return Kept(user)


# -- the list -------------------------------------------------------------------------------------


def test_conversations_are_listed_by_day_the_pinned_ones_first(user, kept):
    kept.add("What is it?", age=0, picture=pictures(1)[0])
    kept.add("Is it red?", age=1 * DAY)
    kept.add("Where is it?", age=3 * DAY)
    kept.add("How large is it?", age=20 * DAY)
    kept.add("Which is it?", age=400 * DAY)
    kept.add("What else?", age=200 * DAY, pinned=True)
    reload(user, 6)
    shown = groups(user.page)
    assert shown["Pinned"] == ["What else?"] and list(shown)[0] == "Pinned"
    assert shown["Today"] == ["What is it?"] and shown["Yesterday"] == ["Is it red?"]
    assert shown["The last 7 days"] == ["Where is it?"]
    assert shown["The last 30 days"] == ["How large is it?"]
    assert re.fullmatch(r"[A-Z]\w+ 20\d\d", list(shown)[-1])
    user.page.locator(".history-thumb img").wait_for()
    assert user.page.locator(".history-thumb img").count() == 1


def test_more_than_ten_conversations_scroll_in_the_list_alone(user, kept):
    ids = [kept.add(f"Question {number}?", age=number * 60.0) for number in range(25)]
    reload(user, 25)
    page = user.page
    last = page.locator(f".history-row[data-id='{ids[-1]}'] a")
    last.scroll_into_view_if_needed()
    assert page.locator(".history").evaluate("one => one.scrollTop") > 0
    assert page.evaluate("scrollY") == 0 and page.locator(".settings-button").is_visible()
    last.click()
    page.locator(f"a[href='#/chat/{ids[-1]}'][aria-current=page]").wait_for()
    assert page.locator(".history a[aria-current]").count() == 1


def test_conversations_are_found_by_what_was_said_in_them(user, kept):
    kept.add("What is it?", "Is there a zebra?")
    kept.add("Where is the star?")
    reload(user, 2)
    page, field = user.page, user.page.get_by_role("searchbox")
    field.fill("ZEBRA")  # in the second question, and not in the title
    wait_with(page, lambda: titles(page) == ["What is it?"])
    field.fill("unicorn")
    page.get_by_text("No conversation holds these words.").wait_for()
    field.press("Escape")
    wait_with(page, lambda: len(titles(page)) == 2)
    assert field.input_value() == ""


def test_typing_a_search_asks_once(user, kept):
    kept.add("What is it?")
    asked = []
    user.page.on("request", lambda request: "query=" in request.url and asked.append(request.url))
    user.page.get_by_role("searchbox").press_sequentially("what is", delay=10)
    wait_with(user.page, lambda: any("query=what%20is" in one for one in asked))
    assert not any(re.search(r"query=wha?t?$", one) for one in asked)


def test_a_conversation_is_renamed_in_its_place(user, kept):
    kept.add("What is it?")
    reload(user, 1)
    page = user.page
    choose(page, "What is it?", "Rename")
    field = page.get_by_label("New name of the conversation")
    field.fill("<b>Stars</b>")
    field.press("Enter")
    wait_with(page, lambda: titles(page) == ["<b>Stars</b>"])
    page.locator(".history a").press("F2")
    field.fill("Another")
    field.press("Escape")
    assert titles(page) == ["<b>Stars</b>"]
    reload(user, 1)
    assert titles(page) == ["<b>Stars</b>"]
    page.locator(".history a").press("F2")
    field.fill("")
    field.press("Enter")
    wait_with(page, lambda: titles(page) == ["What is it?"])


def test_a_conversation_is_pinned_and_not_any_more(user, kept):
    kept.add("What is it?", age=3 * DAY)
    kept.add("Where is it?")
    reload(user, 2)
    page = user.page
    choose(page, "What is it?", "Pin to the top")
    wait_with(page, lambda: groups(page).get("Pinned") == ["What is it?"])
    choose(page, "What is it?", "Unpin")
    wait_with(page, lambda: list(groups(page)) == ["Today", "The last 7 days"])


def test_a_conversation_is_saved_as_markdown_and_as_json_with_its_pictures(user, kept):
    kept.add("What is it?", picture=pictures(1)[0])
    kept.add("Where is it? 在哪里")
    reload(user, 2)
    page = user.page

    def saved(title: str, item: str) -> tuple[str, Path]:
        with page.expect_download() as download:
            choose(page, title, item)
        return download.value.suggested_filename, download.value.path()

    name, path = saved("Where is it?", "Save as Markdown")
    assert name == "Where-is-it-在哪里.md" and "about: Where is it?" in path.read_text("utf-8")
    name, path = saved("What is it?", "Save as Markdown")
    assert name == "What-is-it.zip"
    assert any(one.endswith(".png") for one in zipfile.ZipFile(path).namelist())
    name, path = saved("What is it?", "Save as JSON with pictures")
    assert name == "What-is-it.json" and "data:image/png;base64," in path.read_text("utf-8")
    assert json.loads(path.read_text("utf-8"))["messages"][0]["role"] == "user"


# -- deleting -------------------------------------------------------------------------------------


def test_a_deleted_conversation_is_taken_back(user, kept):
    id = kept.add("What is it?", picture=pictures(1)[0])
    kept.add("Where is it?", age=60)
    reload(user, 2)
    page = user.page
    page.locator(".history a", has_text="What is it?").click()
    page.locator(".turn.user", has_text="What is it?").wait_for()
    choose(page, "What is it?", "Delete")
    wait_with(page, lambda: titles(page) == ["Where is it?"])
    assert page.locator(".turn").count() == 0 and page.url.endswith("#/chat")
    page.get_by_role("button", name="Undo").click()
    page.locator(".turn.user", has_text="What is it?").wait_for()
    page.locator(f"a[href='#/chat/{id}'][aria-current=page]").wait_for()
    assert kept.ids()[0] == id
    page.locator(".history-thumb img").wait_for()  # its pictures are back too


def test_where_nothing_is_kept_nothing_can_be_deleted(user):
    user.page.get_by_text("What you ask is kept here.").wait_for()
    assert user.page.get_by_role("button", name=re.compile("delete", re.I)).count() == 0
    assert user.page.locator(".history-more").count() == 0


def test_a_damaged_conversation_is_shown_and_can_be_deleted(user, kept):
    kept.damage(kept.add("What is it?"))
    kept.add("Where is it?", age=60)
    reload(user, 2)
    page = user.page
    assert titles(page) == ["(cannot be read)", "Where is it?"]
    assert page.locator(".history-row.damaged a").count() == 0
    row = page.locator(".history-row.damaged")
    row.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert page.get_by_role("menuitem").all_inner_texts() == ["Delete"]
    page.keyboard.press("Enter")
    wait_with(page, lambda: titles(page) == ["Where is it?"])
    page.get_by_role("button", name="Undo").click()
    wait_with(page, lambda: titles(page) == ["(cannot be read)", "Where is it?"])


def test_the_list_is_used_by_the_keyboard_alone(user, kept):
    kept.add("First?")
    second = kept.add("Second?", age=60)
    kept.add("Third?", age=120)
    reload(user, 3)
    page = user.page
    page.get_by_role("searchbox").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.locator(f"a[href='#/chat/{second}'][aria-current=page]").wait_for()
    page.locator(".history a", has_text="Second?").focus()
    page.keyboard.press("Delete")
    wait_with(page, lambda: titles(page) == ["First?", "Third?"])
    assert page.evaluate("document.activeElement.closest('.history-row')?.innerText.slice(0, 6)")


# -- links and windows ----------------------------------------------------------------------------


def test_a_conversation_survives_a_reload_and_has_a_link(user, kept):
    page = user.page
    ask(page, "Is there a red star?")
    said = page.locator(".turn").all_inner_texts()
    wait_with(page, lambda: titles(page) == ["Is there a red star?"])
    first = page.url
    assert re.search(r"#/chat/[0-9a-f]{16}$", first)
    reload(user, 1)
    wait_with(page, lambda: page.locator(".turn").all_inner_texts() == said)
    page.get_by_role("link", name="New conversation").click()
    wait_with(page, lambda: page.locator(".turn").count() == 0)
    ask(page, "What is it?")
    wait_with(page, lambda: titles(page) == ["What is it?", "Is there a red star?"])
    page.go_back()
    wait_with(page, lambda: page.url == first)
    page.locator(".turn.user", has_text="Is there a red star?").wait_for()
    assert page.locator(".history a[aria-current]").inner_text().startswith("Is there a red star?")
    other = user.context.new_page()
    other.goto(first)
    other.locator(".turn.user", has_text="Is there a red star?").wait_for()


def test_a_window_that_is_come_back_to_knows_what_another_did(user, kept):
    id = kept.add("What is it?")
    reload(user, 1)
    page = user.page
    other = user.context.new_page()
    other.goto(f"{user.site.url}/#/chat/{id}")
    other.locator(".turn.user", has_text="What is it?").wait_for()
    choose(page, "What is it?", "Rename")
    page.keyboard.type("Stars")
    page.keyboard.press("Enter")
    wait_with(page, lambda: titles(page) == ["Stars"])
    kept.store.change(id, None, lambda one: with_question(one, one.path[-1].number, "And now?"))
    other.evaluate("dispatchEvent(new Event('focus'))")
    wait_with(other, lambda: titles(other) == ["Stars"])
    choose(other, "Stars", "Pin to the top")  # that window has not seen the last question
    wait_with(other, lambda: "Pinned" in groups(other))
    assert [one.text for one in kept.store.load(id).path][-1] == "And now?"
