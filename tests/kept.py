"""Saved conversations for tests of the page, and what is done with them beside the chat."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from pages import User, wait_with

from web.chat.conversation import BEGINNING, SavedConversation, with_answer, with_question
from web.chat.store import ConversationStore

DAY = 24 * 3600.0
PHONE = {"viewport": {"width": 390, "height": 800}, "has_touch": True}


class Kept:
    """The saved conversations of a user, put there without asking for them one by one."""

    def __init__(self, user: User) -> None:
        key = user.page.evaluate("JSON.parse(localStorage.getItem('phisight.key'))")
        self.user, self.store = user, ConversationStore(user.site.conversations, key)
        self._next = 1

    def add(self, *questions: str, age: float = 0.0, picture: Path | None = None, **more) -> str:
        """A conversation of some questions and their answers, so many seconds old; its id."""
        id = f"{self._next:016x}"
        self._next += 1
        names = () if picture is None else (self.store.keep_picture(id, picture.read_bytes(), "p"),)

        def made(one: SavedConversation) -> SavedConversation:
            for number, question in enumerate(questions):
                parent = one.path[-1].number if one.path else BEGINNING
                one = with_question(one, parent, question, () if number else names)
                one = with_answer(one, one.path[-1].number, f"about: {question}", None)
            return one

        self.store.change(id, 0, made)
        self.store.change(id, 1, lambda one: replace(one, updated=time.time() - age, **more))
        return id

    def damage(self, id: str) -> None:
        (self.store.folder_of(id) / "conversation.json").write_bytes(b"{")

    def ids(self) -> list[str]:
        return [one.id for one in self.store.overview()]


def titles(page) -> list[str]:
    return page.locator(".history-title").all_inner_texts()


def groups(page) -> dict[str, list[str]]:
    """The titles below each heading of the list."""
    found = page.locator(".history section").evaluate_all(
        "all => all.map(one => [one.querySelector('h3').innerText,"
        " [...one.querySelectorAll('.history-title')].map(title => title.innerText)])"
    )
    return dict(found)


def reload(user: User, count: int | None = None) -> None:
    user.page.reload()
    user.page.locator("[data-ready=true]").wait_for()
    if count is not None:
        wait_with(user.page, lambda: len(titles(user.page)) == count)


def choose(page, title: str, item: str) -> None:
    """Choose in the menu of a conversation."""
    row = page.locator(".history-row", has_text=title)
    row.hover()
    row.get_by_role("button").click()
    page.get_by_role("menuitem", name=item).click()


def ask(page, question: str, answers: int = 1) -> None:
    page.locator("#question textarea").fill(question)
    page.locator("#question textarea").press("Enter")
    wait_with(page, lambda: page.locator(".turn.assistant .note:not(:empty)").count() == answers)
