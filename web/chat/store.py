"""Saved conversations: one folder a conversation, kept apart by browser, checked when read back.

    ROOT/<digest of the browser's key>/<id>/conversation.json
                                          /cut.json           what was last taken out of it
                                          /<digest of its bytes>.png
                                      /.trash-<id>/...        deleted, to be restored within a day

The browser keeps only its key, which nobody else knows; the disk keeps only the key's digest. What
changes a conversation says which version of it was seen: where another window has changed it since,
the change is refused, and nothing is lost.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.reading import as_png, check_image
from errors import PhiSightError
from files import read_regular, write_whole
from system import disk
from web.chat.conversation import ID, PICTURE, Cut, SavedConversation, cut, put_back
from web.chat.form import cut_from_json, cut_to_json, from_json, to_json
from web.errors import NotThere, RequestError
from web.temporary import check_disk

KEY = re.compile(r"[0-9a-f]{32}\Z")
FILE, CUT = "conversation.json", "cut.json"
TRASH = ".trash-"
MAX_BYTES = 8 * 1024 * 1024  # of the file
MAX_CONVERSATIONS = 100  # of one browser that are not pinned; the oldest goes to the trash
MAX_PINNED = 100
MAX_TRASH = 100  # the oldest is removed
LISTED = 5000  # what is remembered for lists, of all browsers
# What browsers show as it is. Anything else that can be decoded is kept as PNG.
SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif"}

Change = Callable[[SavedConversation], SavedConversation]


def new_key() -> str:
    """What a browser that has none yet is given."""
    return secrets.token_hex(16)


def new_id() -> str:
    return secrets.token_hex(8)


@dataclass(frozen=True)
class Listed:
    """What the list of conversations says of one; `title` None for one that is damaged."""

    id: str
    title: str | None
    updated: float
    pinned: bool = False
    thumbnail: str | None = None
    turns: int = 0


class _Locks:
    """One lock for each conversation that somebody works with at this moment."""

    def __init__(self) -> None:
        self._locks: weakref.WeakValueDictionary[Path, Any] = weakref.WeakValueDictionary()
        self._making = threading.Lock()

    def of(self, folder: Path) -> Any:
        with self._making:
            lock = self._locks.get(folder)
            if lock is None:
                lock = self._locks[folder] = threading.RLock()
            return lock


_locks = _Locks()
_listed: dict[Path, tuple[tuple[int, int, int], Listed]] = {}  # by file, with what tells its state


class ConversationStore:
    """The saved conversations of one browser; from any thread."""

    def __init__(self, root: str | Path, key: str) -> None:
        if not isinstance(key, str) or not KEY.match(key):
            raise PhiSightError("conversations: the browser's key is damaged; reload the page")
        self.folder = Path(root) / hashlib.sha256(key.encode()).hexdigest()[:32]

    @classmethod
    def at(cls, folder: Path) -> ConversationStore:
        """Of a browser whose key is not known, for what sweeps."""
        store = cls(folder.parent, new_key())
        store.folder = folder
        return store

    # -- all of them -----------------------------------------------------------------------------

    def overview(self, query: str = "") -> list[Listed]:
        """The pinned ones first, then the newest; with a query those that have it in their title or
        in what was said. A damaged one is listed where all are, so that it can be deleted."""
        found = [listed for id in self._ids() if (listed := self._listed(id)) is not None]
        wanted = query.casefold().strip()
        if wanted:
            found = [listed for listed in found if self._holds(listed, wanted)]
        return sorted(found, key=lambda one: (one.pinned, one.updated, one.id), reverse=True)

    def _ids(self) -> list[str]:
        try:
            return [path.name for path in self.folder.iterdir() if ID.match(path.name)]
        except FileNotFoundError:  # nothing saved yet
            return []
        except OSError as error:
            raise self._not_writable(error) from None

    def _listed(self, id: str) -> Listed | None:
        """None for a folder without a conversation, or one that is deleted at this moment."""
        file = self.folder / id / FILE
        try:
            status = file.stat()
        except OSError:
            return None
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        known = _listed.get(file)
        if known is not None and known[0] == stamp:
            return known[1]
        try:
            listed = _summary(self.load(id))
        except NotThere:
            return None
        except PhiSightError:
            listed = Listed(id, None, status.st_mtime)
        while len(_listed) >= LISTED:
            _listed.pop(next(iter(_listed)), None)
        _listed[file] = stamp, listed
        return listed

    def _holds(self, listed: Listed, wanted: str) -> bool:
        if listed.title is None:
            return False
        if wanted in listed.title.casefold():
            return True
        try:
            nodes = self.load(listed.id).nodes.values()
        except PhiSightError:
            return False
        return any(wanted in node.text.casefold() for node in nodes)

    # -- one of them -----------------------------------------------------------------------------

    def load(self, id: str) -> SavedConversation:
        """Raises `NotThere` for an unknown conversation, PhiSightError for one that is damaged."""
        path = self.folder_of(id) / FILE
        try:
            conversation = from_json(read_regular(path, MAX_BYTES), f"conversation {id}")
            touched = path.stat().st_mtime
        except OSError as error:
            if error.errno == errno.EFBIG:
                raise PhiSightError(f"conversation {id}: is too large; delete it") from None
            raise NotThere("conversation_gone") from None
        if conversation.id != id:
            raise PhiSightError(f"conversation {id}: holds another one; delete it")
        return conversation if conversation.updated else replace(conversation, updated=touched)

    def seen(self, id: str, version: int) -> SavedConversation:
        """The conversation as it is, if that is the version that somebody has seen; a new one for
        version 0. Raises `RequestError` if it was changed since, else as `load` does."""
        try:
            conversation = self.load(id)
        except NotThere:
            if version:
                raise
            return SavedConversation(id)
        if conversation.version != version:
            raise RequestError("changed_elsewhere")
        return conversation

    def change(
        self, id: str, version: int | None, change: Change, spare: int = 0
    ) -> SavedConversation:
        """Replace a conversation by what `change` makes of it, and return that; an error leaves the
        former. `version`: the one that was seen, as in `seen`; None for a change that suits any;
        `spare`: bytes of its file that must be left for what comes.

        Raises what `seen`, `load` and `change` raise, and PhiSightError if it cannot be saved.
        """
        with _locks.of(self.folder_of(id)):
            former = self.load(id) if version is None else self.seen(id, version)
            changed = replace(change(former), version=former.version + 1)
            if changed.nodes is not former.nodes or not changed.updated:
                changed = replace(changed, updated=time.time())
            self._write(changed, spare)
        if not former.version:
            self._make_room(id)
        return changed

    def pin(self, id: str, conversation: SavedConversation) -> SavedConversation:
        """A conversation pinned, for `change`. Raises `RequestError` where too many are."""
        if not conversation.pinned and sum(one.pinned for one in self.overview()) >= MAX_PINNED:
            raise RequestError("too_many_pinned", most=MAX_PINNED)
        return replace(conversation, pinned=True)

    def _write(self, conversation: SavedConversation, spare: int) -> None:
        data = to_json(conversation)
        if len(data) > MAX_BYTES - spare:
            raise RequestError("conversation_full")
        folder = self.folder_of(conversation.id)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_disk(folder)
            write_whole(folder / FILE, data)
        except OSError as error:
            raise self._not_writable(error) from None

    def _make_room(self, kept: str) -> None:
        """Move what is too much to the trash, but not the one that is `kept`."""
        loose = [one.id for one in self.overview() if not one.pinned]
        too_many = len(loose) - MAX_CONVERSATIONS
        for id in [id for id in reversed(loose) if id != kept][: max(0, too_many)]:
            self.delete(id)

    # -- taken back ------------------------------------------------------------------------------

    def cut(self, id: str, version: int, number: int) -> SavedConversation:
        """Take a node and what follows it out of a conversation, until `undo`. Raises as `change`
        does."""

        def change(conversation: SavedConversation) -> SavedConversation:
            left, gone = cut(conversation, number)
            try:  # before the conversation is written: a kill in between leaves one too many
                write_whole(self.folder_of(id) / CUT, cut_to_json(gone))
            except OSError as error:
                raise self._not_writable(error) from None
            return left

        left = self.change(id, version, change)
        self.tidy(id)  # of what was cut before
        return left

    def undo(self, id: str, version: int) -> SavedConversation:
        """Put back what was last taken out. Raises `RequestError` where there is nothing, else as
        `change` does."""

        def change(conversation: SavedConversation) -> SavedConversation:
            gone = self._cut_of(id)
            if gone is None:
                raise RequestError("nothing_to_undo")
            return put_back(conversation, gone)

        with _locks.of(self.folder_of(id)):
            changed = self.change(id, version, change)
            (self.folder_of(id) / CUT).unlink(missing_ok=True)
        return changed

    def _cut_of(self, id: str) -> Cut | None:
        try:
            return cut_from_json(read_regular(self.folder_of(id) / CUT, MAX_BYTES))
        except OSError:
            return None

    def delete(self, id: str, version: int | None = None) -> None:
        """Move a conversation to the trash, if it is there. Raises `RequestError` where a `version`
        is given and is another one by now."""
        folder, trash = self.folder_of(id), self.folder / f"{TRASH}{id}"
        with _locks.of(folder):
            if version is not None:
                try:
                    self.seen(id, version)
                except RequestError as error:
                    if not isinstance(error, NotThere):
                        raise
                except PhiSightError:  # damaged: whoever saw it wants it gone
                    pass
            try:
                if not folder.exists():
                    return
                if trash.exists():  # of an earlier one of the same id
                    shutil.rmtree(trash)
                os.utime(folder)  # by which the trash is swept
                disk.replace(folder, trash)
            except FileNotFoundError:  # deleted at this moment
                return
            except OSError as error:
                raise self._not_writable(error) from None
        kept = sorted(self.folder.glob(f"{TRASH}*"), key=_touched, reverse=True)
        for oldest in kept[MAX_TRASH:]:
            shutil.rmtree(oldest, ignore_errors=True)

    def restore(self, id: str) -> SavedConversation | None:
        """Take a conversation out of the trash; None for one that is damaged, and back as it was.
        Raises `NotThere` where it is not in it, and `RequestError` where there is another one in
        its place."""
        folder, trash = self.folder_of(id), self.folder / f"{TRASH}{id}"
        with _locks.of(folder):
            if (folder / FILE).exists():
                raise RequestError("changed_elsewhere")
            if not trash.exists():
                raise NotThere("conversation_gone")
            try:
                shutil.rmtree(folder, ignore_errors=True)  # pictures of a question never asked
                disk.replace(trash, folder)
            except FileNotFoundError:
                raise NotThere("conversation_gone") from None
            except OSError as error:
                raise self._not_writable(error) from None
        self._make_room(id)
        try:
            return self.load(id)
        except NotThere:  # deleted once more at this moment
            raise
        except PhiSightError:
            return None

    # -- pictures --------------------------------------------------------------------------------

    def keep_picture(self, id: str, data: bytes, name: str) -> str:
        """Keep the bytes of a picture with conversation `id`; returns the name to call it by.

        `name` stands in the errors. Raises PhiSightError for all that `check_image` refuses.
        """
        suffix = next((s for start, s in SUFFIXES.items() if data.startswith(start)), None)
        kept = f"{hashlib.sha256(data).hexdigest()}{suffix or '.png'}"
        path = self.folder_of(id) / kept
        if path.is_file():
            path.touch()  # `tidy` leaves it alone for a while
            return kept
        if suffix is None:
            shown = as_png(data, name)
        else:
            check_image(data, name)
            shown = data
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_disk(path.parent)
            write_whole(path, shown)  # under its hash lies the whole picture or nothing
        except OSError as error:
            raise self._not_writable(error) from None
        return kept

    def picture(self, id: str, name: str) -> Path:
        """Where a kept picture lies."""
        if not PICTURE.match(name):
            raise PhiSightError(
                f"picture {name!r}: is not the name of a kept picture; send it again"
            )
        return self.folder_of(id) / name

    def tidy(self, id: str, age: float = 0.0) -> None:
        """Remove the pictures of more than `age` seconds that nothing in a conversation shows, nor
        in what was cut from it; and its folder, where nothing was ever asked."""
        folder = self.folder_of(id)
        with _locks.of(folder):
            try:
                nodes = list(self.load(id).nodes.values())
                gone = self._cut_of(id)
            except NotThere:
                nodes, gone = [], None
            except PhiSightError:  # damaged: somebody may still mend it
                return
            nodes += gone.nodes.values() if gone else ()
            kept = {name for node in nodes for name in node.pictures}
            for path in list(folder.glob("*")):
                old = time.time() - _touched(path) > age
                if old and PICTURE.match(path.name) and path.name not in kept:
                    path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds a conversation, or was never made
                folder.rmdir()

    def folder_of(self, id: str) -> Path:
        if not isinstance(id, str) or not ID.match(id):
            raise PhiSightError("conversation: its id is damaged; reload the page")
        return self.folder / id

    def _not_writable(self, error: OSError) -> PhiSightError:
        return PhiSightError(
            f"{self.folder}: {error.strerror or error}; make room or make the folder writable"
        )


def _summary(conversation: SavedConversation) -> Listed:
    path = conversation.path
    pictures = (name for node in path for name in node.pictures)
    return Listed(
        conversation.id,
        conversation.title,
        conversation.updated,
        conversation.pinned,
        next(pictures, None),
        len(path),
    )


def _touched(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0
