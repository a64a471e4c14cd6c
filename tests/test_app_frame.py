"""The page around its rooms: the sidebar of a telephone, and what stays when the server goes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import runs
from pages import Site, User, served

from web.page import static_path

PHONE = {"viewport": {"width": 390, "height": 800}, "has_touch": True}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    logs = runs.finished_run().parent
    with served(runs.assistant(), tmp_path_factory.mktemp("conversations"), logs) as site:
        yield site


@pytest.fixture
def phone(browser, site) -> Iterator[User]:
    user = User(browser, site, **PHONE)
    yield user
    user.close()


def has_focus(user: User, selector: str) -> Any:
    return user.page.evaluate("s => document.activeElement.matches(s)", selector)


def test_the_drawer_has_the_keyboard_alone_and_gives_it_back(phone):
    page, opener = phone.page, phone.page.locator(".sidebar-opener")
    drawer = page.locator(".page.open")
    opener.click()
    assert opener.get_attribute("aria-expanded") == "true"
    assert has_focus(phone, "nav a[aria-current=page]")
    for _ in range(12):
        page.keyboard.press("Tab")
        assert has_focus(phone, "#sidebar *, body")  # body: on the way round
    page.locator(".settings-button").click()
    page.keyboard.press("Escape")  # closes the window that lies above
    page.locator("dialog").wait_for(state="detached")
    assert drawer.count() == 1
    page.keyboard.press("Escape")
    assert drawer.count() == 0
    assert has_focus(phone, ".sidebar-opener")
    assert opener.get_attribute("aria-expanded") == "false"


def test_a_room_chosen_in_the_drawer_gets_the_keyboard(phone):
    page = phone.page
    page.locator(".sidebar-opener").click()
    page.locator("nav a[data-room=batch]").click()
    page.locator(".batch-room").wait_for()
    assert page.locator(".page.open").count() == 0
    assert page.evaluate("document.querySelector('main.rooms').contains(document.activeElement)")
    page.locator(".sidebar-opener").click()
    page.locator("nav a[data-room=batch]").click()  # where one is already
    assert page.locator(".page.open").count() == 0


def test_a_drawer_that_is_open_when_the_window_grows_leaves_the_room_free(phone):
    page = phone.page
    page.locator(".sidebar-opener").click()
    page.set_viewport_size({"width": 1200, "height": 800})
    page.locator("main.rooms:not([inert])").wait_for()
    phone.field.fill("still typed")
    assert phone.field.input_value() == "still typed"


def test_the_keyboard_can_skip_the_sidebar(phone):
    page = phone.page
    page.set_viewport_size({"width": 1200, "height": 800})
    page.evaluate("document.activeElement.blur()")
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    assert has_focus(phone, "main.rooms")


def test_a_room_that_cannot_be_loaded_is_told_and_the_one_shown_stays(browser, site):
    context = browser.new_context()
    page = context.new_page()
    try:
        page.goto(site.url)
        page.locator("[data-ready=true]").wait_for()
        page.route("**/batch/room.js", lambda route: route.abort())
        page.locator("nav a[data-room=batch]").click()
        toast = page.locator(".toast.error")
        toast.get_by_role("button", name="Load the page again").wait_for()
        assert page.evaluate("location.hash") == "#/chat" or page.evaluate("location.hash") == ""
        assert page.locator(".chat-room").is_visible()
    finally:
        context.close()


def test_rooms_are_there_without_a_server_once_the_page_has_stood_a_while(browser, site):
    context = browser.new_context()
    page = context.new_page()
    try:
        with page.expect_response("**/training/room.js"):
            page.goto(site.url)
        page.evaluate("path => import(path)", f"/{static_path()}/batch/room.js")  # it is whole
        context.set_offline(True)
        page.locator("nav a[data-room=batch]").click()
        page.locator(".batch-room h1").wait_for()
        assert page.locator(".toast").count() == 0
    finally:
        context.close()


def test_the_same_error_is_told_once(phone):
    page = phone.page
    for _ in range(3):
        page.locator(".send").click()  # nothing was typed
    assert page.locator(".toast").count() == 1


def test_words_that_are_pasted_beside_a_picture_are_kept(phone):
    page = phone.page
    prevented = page.evaluate(
        """async () => {
            const field = document.querySelector("#question textarea");
            const canvas = Object.assign(document.createElement("canvas"), {width: 40, height: 20});
            const picture = await new Promise((made) => canvas.toBlob(made));
            const paste = (words) => {
                const data = new DataTransfer();
                data.items.add(new File([picture], "a.png", {type: "image/png"}));
                if (words) data.setData("text/plain", words);
                const given = {clipboardData: data, bubbles: true, cancelable: true};
                const event = new ClipboardEvent("paste", given);
                field.dispatchEvent(event);
                return event.defaultPrevented;
            };
            return [paste("What is this?"), paste("")];
        }"""
    )
    assert prevented == [False, True]
    page.locator("#question .attachment[data-state=ready]").nth(1).wait_for()


def test_two_clicks_ask_once_and_stop_nothing(browser, site):
    user = User(browser, site)
    user.field.fill("What colour is the circle?")
    user.page.locator(".send").dblclick()
    user.answers(1)
    assert len(user.said()) == 2
    user.page.locator(".turn.user").hover()
    user.page.locator(".turn.user").get_by_role("button", name="Delete").dblclick()
    user.page.locator(".turn").first.wait_for(state="detached")
    assert user.told() == ["Deleted from there on."]
    user.page.locator(".toast").get_by_role("button", name="Undo").click()
    user.answers(1)
    user.close()
