"""Saved conversations: one folder a conversation, kept apart by browser, checked when read back.

    ROOT/<digest of the browser's key>/<id>/conversation.json
                                          /<digest of its bytes>.png

The browser keeps only its key, which nobody else knows; the disk keeps only the key's digest.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import re
import secrets
import shutil
import threading
import time
from pathlib import Path

from api.logs import once
from data.reading import as_png, check_image
from errors import PhiSightError
from files import read_regular, sweep_stale, write_whole
from web.conversation import ID, MAX_MESSAGES, PICTURE, SavedConversation, from_json, to_json
from web.temporary import KEPT_SECONDS, MOST_BYTES, SWEPT_EVERY, check_disk, files_in, newest

KEY = re.compile(r"[0-9a-f]{32}\Z")
FILE = "conversation.json"
MAX_BYTES = 8 * 1024 * 1024  # of the file
UNASKED_SECONDS = 3600.0  # between a picture and its question
MAX_CONVERSATIONS = 100  # of one browser; the oldest goes when another is begun
# What browsers show as it is. Anything else that can be decoded is kept as PNG.
SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif"}


def new_key() -> str:
    """What a browser that has none yet is given."""
    return secrets.token_hex(16)


def prepare_root(root: str | Path) -> Path:
    """The folder of all conversations, made if it is not there; PhiSightError if nothing can be
    saved in it."""
    try:
        Path(root).mkdir(mode=0o700, parents=True, exist_ok=True)
        (Path(root) / ".writable").write_bytes(b"")
        for conversation in Path(root).glob("*/*/"):  # what servers that were killed left
            sweep_stale(conversation, ".tmp-*")
    except OSError as error:
        raise PhiSightError(
            f"--conversations {root}: {error.strerror or error}; name a folder that can be written"
        ) from None
    sweep_unasked(Path(root))
    return Path(root)


def sweep_unasked(root: Path) -> None:
    """Remove conversations that hold pictures and no question: their server was killed when it was
    about to be asked."""
    for folder in root.glob("*/*"):
        if not ID.match(folder.name) or (folder / FILE).exists():
            continue
        with contextlib.suppress(OSError):  # deleted at this moment
            if time.time() - folder.stat().st_mtime > UNASKED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def forget_after_a_day(root: Path) -> None:
    """Remove conversations of strangers, now and every few minutes, in a thread of its own: what
    nobody has touched for a day, and the oldest of what takes more than `MOST_BYTES`."""

    def sweep() -> None:
        while True:
            try:
                forget(root)
            except OSError as error:
                once("forgetting", f"{root}: {error.strerror}; conversations are not removed")
            time.sleep(SWEPT_EVERY)

    threading.Thread(target=sweep, name="forgetting", daemon=True).start()


def forget(root: Path, age: float = KEPT_SECONDS, most: int = MOST_BYTES) -> None:
    """Remove the conversations below a root that nobody has touched for `age` seconds, and the
    oldest ones until the others take at most `most` bytes."""
    dated: list[tuple[float, int, Path]] = []
    for folder in root.glob("*/*"):
        if ID.match(folder.name):
            size = sum(status.st_size for _, status in files_in(folder))
            with contextlib.suppress(OSError):  # deleted at this moment
                dated.append((newest(folder), size, folder))
    held = 0
    for touched, size, folder in sorted(dated, reverse=True):
        held += size
        if held > most or time.time() - touched > age:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # the browser has others
                folder.parent.rmdir()


class ConversationStore:
    """The saved conversations of one browser."""

    def __init__(self, root: str | Path, key: str) -> None:
        if not isinstance(key, str) or not KEY.match(key):
            raise PhiSightError("conversations: the browser's key is damaged; reload the page")
        self.folder = Path(root) / hashlib.sha256(key.encode()).hexdigest()[:32]

    def titles(self) -> list[tuple[str, str]]:
        """(id, title) of every conversation, the newest first; an unreadable one has the title "?",
        so that it can be seen and deleted."""
        titles = []
        for id in self._newest_first():
            try:
                titles.append((id, self.load(id).title))
            except PhiSightError:
                titles.append((id, "?"))
        return titles

    def load(self, id: str) -> SavedConversation:
        """Raises PhiSightError for an unknown conversation and for a file that is damaged."""
        path = self._folder_of(id) / FILE
        try:
            conversation = from_json(read_regular(path, MAX_BYTES), f"conversation {id}")
        except OSError as error:
            if error.errno == errno.EFBIG:
                raise PhiSightError(f"conversation {id}: is too large; delete it") from None
            raise PhiSightError(
                f"conversation {id}: is not there any more; begin a new one"
            ) from None
        if conversation.id != id:
            raise PhiSightError(f"conversation {id}: holds another one; delete it")
        return conversation

    def save(self, conversation: SavedConversation) -> None:
        """Replace the saved conversation by this one; an error leaves the former."""
        folder = self._folder_of(conversation.id)
        data = to_json(conversation)
        if len(data) > MAX_BYTES or len(conversation.messages) > MAX_MESSAGES:
            raise PhiSightError("conversation: is too long to be saved; begin a new one")
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(folder / FILE, data)
        except OSError as error:
            raise self._not_writable(error) from None
        for id in self._newest_first()[MAX_CONVERSATIONS:]:
            self.delete(id)

    def delete(self, id: str) -> None:
        """Remove a conversation and its pictures, if it is there."""
        shutil.rmtree(self._folder_of(id), ignore_errors=True)

    def keep_picture(self, id: str, data: bytes, name: str) -> str:
        """Keep the bytes of a picture with conversation `id`; returns the name to call it by.

        `name` stands in the errors. Raises PhiSightError for all that `check_image` refuses.
        """
        suffix = next((s for start, s in SUFFIXES.items() if data.startswith(start)), None)
        if suffix is None:
            shown = as_png(data, name)
        else:
            check_image(data, name)
            shown = data
        kept = f"{hashlib.sha256(data).hexdigest()}{suffix or '.png'}"
        path = self._folder_of(id) / kept
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
        return self._folder_of(id) / name

    def _folder_of(self, id: str) -> Path:
        if not isinstance(id, str) or not ID.match(id):
            raise PhiSightError("conversation: its id is damaged; reload the page")
        return self.folder / id

    def _newest_first(self) -> list[str]:
        """Ids of the saved conversations."""
        dated = []
        try:
            for path in self.folder.iterdir():
                if ID.match(path.name) and (path / FILE).is_file():
                    dated.append(((path / FILE).stat().st_mtime_ns, path.name))
        except FileNotFoundError:  # nothing saved yet, or deleted in another window
            pass
        except OSError as error:
            raise self._not_writable(error) from None
        return [id for _, id in sorted(dated, reverse=True)]

    def _not_writable(self, error: OSError) -> PhiSightError:
        return PhiSightError(
            f"{self.folder}: {error.strerror or error}; make room or make the folder writable"
        )
