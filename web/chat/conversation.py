"""A conversation as the web app keeps it: a tree of what was said, of which one path is shown.

A question that is edited, and an answer that is written once more, stand beside the former one and
not in its place. Of those that stand beside each other one is shown, and below it again one, and so
on: that is the path which the page shows and the model reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from data.dataset import Message, Part
from web.errors import RequestError

ID = re.compile(r"[0-9a-f]{16}\Z")
PICTURE = re.compile(r"[0-9a-f]{64}\.(?:png|jpg|gif|webp|bmp)\Z")
MAX_NODES = 2000
MAX_TEXT = 100_000  # characters of a question; an answer is as long as the model writes
MAX_SYSTEM = 8000
MAX_NAME = 120
MAX_PICTURES = 20  # of one question
TITLE_LENGTH = 48
BEGINNING = 0  # what the first questions stand below

Speaker = Literal["user", "assistant"]
Reason = Literal["stop", "length", "cancelled", "filtered", "cached"]


@dataclass(frozen=True)
class Note:
    """How an answer ended, and what it took."""

    reason: Reason
    tokens: int
    seconds: float
    """from the question on"""
    rate: float
    """tokens a second, from when its pictures were looked at"""


@dataclass(frozen=True)
class Node:
    """One question or one answer. Pictures are names of files that lie beside the conversation."""

    number: int
    parent: int
    role: Speaker
    text: str
    pictures: tuple[str, ...] = ()
    note: Note | None = None


@dataclass(frozen=True)
class SavedConversation:
    """Never changed: what changes it gives another one.

    Questions stand below `BEGINNING` and below answers, answers below questions, and each below one
    of a smaller number. `shown` has the one that is shown below each node that has any.
    """

    id: str
    nodes: Mapping[int, Node] = field(default_factory=dict)
    shown: Mapping[int, int] = field(default_factory=dict)
    next: int = 1
    """number of the next node, which none ever had"""
    version: int = 0
    """0: not yet saved"""
    name: str = ""
    """that a person gave it"""
    pinned: bool = False
    system: str = ""
    dropped: int = 0
    """how many turns of the path, from the first on, the model does not read"""
    updated: float = 0.0
    """seconds since 1970"""

    @property
    def path(self) -> list[Node]:
        """What is shown, from the first question on."""
        path, at = [], BEGINNING
        while at in self.shown:
            at = self.shown[at]
            path.append(self.nodes[at])
        return path

    @property
    def title(self) -> str:
        """The name, else the first words that were asked, or "" where only pictures were sent."""
        if self.name:
            return self.name
        first = self.nodes.get(self.shown.get(BEGINNING, -1))
        text = " ".join(first.text.split()) if first else ""
        return text if len(text) <= TITLE_LENGTH else text[: TITLE_LENGTH - 1].rstrip() + "…"

    def beside(self, node: Node) -> list[int]:
        """The numbers of all that stand where a node stands, itself among them."""
        return [n.number for n in self.nodes.values() if n.parent == node.parent]

    def versions(self) -> dict[int, list[int]]:
        """The numbers of what stands below each node that has something below it."""
        below: dict[int, list[int]] = {}
        for node in self.nodes.values():
            below.setdefault(node.parent, []).append(node.number)
        return below

    def node(self, number: int) -> Node:
        """Raises `RequestError` for a number that is not in it."""
        if number not in self.nodes:
            raise RequestError("nothing_there")
        return self.nodes[number]

    def question(self, number: int) -> Node:
        """The question that a node is or answers. Raises as `node` does."""
        node = self.node(number)
        return node if node.role == "user" else self.nodes[node.parent]

    def above(self, node: Node) -> list[Node]:
        """The nodes from the first question down to one, itself last."""
        line = [node]
        while line[-1].parent != BEGINNING:
            line.append(self.nodes[line[-1].parent])
        return line[::-1]


def clean_text(text: str) -> str:
    """`text` without halves of characters, which JSON can carry and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


# -- what changes it -------------------------------------------------------------------------------


def with_node(
    conversation: SavedConversation,
    parent: int,
    role: Speaker,
    text: str,
    pictures: tuple[str, ...] = (),
    note: Note | None = None,
) -> SavedConversation:
    """With one more node, which is shown. Raises `RequestError` where there is no room for it."""
    check_room(conversation)
    node = Node(conversation.next, parent, role, clean_text(text), pictures, note)
    added = replace(
        conversation,
        nodes={**conversation.nodes, node.number: node},
        shown={**conversation.shown, parent: node.number},
        next=node.number + 1,
    )
    return showing(added, node.number)


def check_room(conversation: SavedConversation) -> None:
    """Raises `RequestError` where a conversation has no room for one more node."""
    if len(conversation.nodes) >= MAX_NODES:
        raise RequestError("conversation_full")


def with_question(
    conversation: SavedConversation, parent: int, text: str, pictures: tuple[str, ...] = ()
) -> SavedConversation:
    """With a question below an answer, or `BEGINNING`, that is read in any case. One that was never
    answered gets an empty answer first. Raises `RequestError` for a question of nothing, and where
    there is no room for it and its answer."""
    text = clean_text(text).strip()
    if not text and not pictures:
        raise RequestError("ask_something")
    if parent != BEGINNING and conversation.node(parent).role == "user":
        conversation = with_node(conversation, parent, "assistant", "")
        parent = conversation.next - 1
    asked = with_node(conversation, parent, "user", text, pictures)
    check_room(asked)
    return _reading(asked, len(asked.path) - 1)


def with_answer(
    conversation: SavedConversation, question: int, text: str, note: Note | None
) -> SavedConversation:
    """With an answer to a question; an empty one only where there is no other."""
    if not text.strip() and question in conversation.shown:
        return conversation
    shown = text if text.strip() else ""
    return with_node(conversation, question, "assistant", shown, (), note)


def showing(conversation: SavedConversation, number: int) -> SavedConversation:
    """With a node, and what follows it, on the path. Raises as `SavedConversation.node` does."""
    line = conversation.above(conversation.node(number))
    chosen = {node.parent: node.number for node in line}
    shown = replace(conversation, shown={**conversation.shown, **chosen})
    return _reading(shown, len(shown.path))


def answered_again(conversation: SavedConversation, number: int) -> tuple[SavedConversation, Node]:
    """The conversation whose path has the question that a node is or answers, which is read, and
    that question. Raises as `SavedConversation.node` does, and `RequestError` where there is no
    room for one more answer."""
    question = conversation.question(number)
    check_room(conversation)
    shown = showing(conversation, question.number)
    return _reading(shown, len(shown.above(question)) - 1), question


def dropping(conversation: SavedConversation, turns: int) -> SavedConversation:
    """With the first `turns` of its path not read any more, and the others read. An answer is not
    read without its question."""
    path = conversation.path
    turns = min(turns, len(path))
    if turns < len(path) and path[turns].role == "assistant":
        turns += 1
    return replace(conversation, dropped=turns)


def _reading(conversation: SavedConversation, most: int) -> SavedConversation:
    """With at most so many turns that are not read, and no answer read without its question."""
    dropped = min(conversation.dropped, most)
    if dropped % 2 and dropped < len(conversation.path):
        dropped += 1 if dropped < most else -1
    return replace(conversation, dropped=dropped)


@dataclass(frozen=True)
class Cut:
    """What was taken out of a conversation, so that it can be put back."""

    nodes: Mapping[int, Node]
    shown: Mapping[int, int]
    dropped: int


def cut(conversation: SavedConversation, number: int) -> tuple[SavedConversation, Cut]:
    """The conversation without a node, all that stand where it stands, and what follows them; and
    what was taken out. Raises as `SavedConversation.node` does."""
    parent = conversation.node(number).parent
    doomed = set(conversation.beside(conversation.nodes[number]))
    for node in conversation.nodes.values():  # a node comes after the one that it stands below
        if node.parent in doomed:
            doomed.add(node.number)
    gone = Cut(
        {n: node for n, node in conversation.nodes.items() if n in doomed},
        {p: n for p, n in conversation.shown.items() if n in doomed},
        conversation.dropped,
    )
    left = replace(
        conversation,
        nodes={n: node for n, node in conversation.nodes.items() if n not in doomed},
        shown={p: n for p, n in conversation.shown.items() if n not in doomed},
    )
    assert parent not in left.shown
    return _reading(left, len(left.path)), gone


def put_back(conversation: SavedConversation, gone: Cut) -> SavedConversation:
    """The conversation with what `cut` took out of it, on its path; what was said meanwhile stands
    beside it. Raises `RequestError` where it is there already, or has lost its place."""
    there = {**gone.nodes, **conversation.nodes}
    for node in gone.nodes.values():
        above = there.get(node.parent)
        has_place = node.parent == BEGINNING or (above is not None and above.role != node.role)
        is_ours = node.number not in conversation.nodes and node.number < conversation.next
        if not (has_place and is_ours):
            raise RequestError("nothing_to_undo")
    if len(conversation.nodes) + len(gone.nodes) > MAX_NODES:
        raise RequestError("conversation_full")
    nodes = dict(sorted({**conversation.nodes, **gone.nodes}.items()))
    whole = replace(conversation, nodes=nodes, shown={**conversation.shown, **gone.shown})
    whole = showing(whole, min(gone.nodes))
    return _reading(replace(whole, dropped=gone.dropped), len(whole.path))


# -- what the model reads --------------------------------------------------------------------------


def read_turns(conversation: SavedConversation, last: Node | None = None) -> list[Node]:
    """The turns of the path that the model reads, down to `last`."""
    path = conversation.path
    if last is not None:
        path = path[: path.index(last) + 1]
    return path[conversation.dropped :]


def messages_of(conversation: SavedConversation, turns: list[Node]) -> tuple[Message, ...]:
    """Turns as the model reads them: the system prompt, then user and assistant in turn. A question
    that got no answer is read together with the next one."""
    return tuple(_messages(conversation.system, turns))


def _messages(system: str, turns: list[Node]) -> Iterator[Message]:
    if system:
        yield Message("system", (Part("text", system),))
    asked: list[Part] = []
    for node in turns:
        if node.role == "user":
            asked += (Part("image", name) for name in node.pictures)
            asked += (Part("text", node.text),) if node.text else ()
        elif node.text:
            yield Message("user", tuple(asked))
            yield Message("assistant", (Part("text", node.text),))
            asked = []
    if asked:
        yield Message("user", tuple(asked))
