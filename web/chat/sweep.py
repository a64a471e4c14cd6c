"""What is removed of the saved conversations in time: what was deleted, what was never asked, and
on a public page what nobody has touched for a day."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from api.logs import once
from errors import PhiSightError
from files import sweep_stale
from web.chat.conversation import ID
from web.chat.store import CUT, FILE, TRASH, ConversationStore
from web.temporary import KEPT_SECONDS, MOST_BYTES, SWEPT_EVERY, files_in, newest

UNASKED_SECONDS = 3600.0  # between a picture and its question


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
    sweep_trash(Path(root))
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


def sweep_trash(root: Path, age: float = KEPT_SECONDS) -> None:
    """Remove what was deleted more than `age` seconds ago: conversations, and parts of them with
    the pictures that only these had."""
    now = time.time()
    for folder in root.glob(f"*/{TRASH}*"):
        with contextlib.suppress(OSError):  # restored at this moment
            if now - folder.lstat().st_mtime > age:
                shutil.rmtree(folder, ignore_errors=True)
    for file in root.glob(f"*/*/{CUT}"):
        with contextlib.suppress(OSError):  # put back at this moment
            if now - file.lstat().st_mtime > age:
                file.unlink()
                store = ConversationStore.at(file.parent.parent)
                store.tidy(file.parent.name, UNASKED_SECONDS)


def keep_sweeping(root: Path, strangers: bool) -> Callable[[], None]:
    """Sweep now and every few minutes, in a thread of its own: the trash, and on a page for
    `strangers` what nobody has touched for a day and the oldest of what is over `MOST_BYTES`.
    Returns what ends it."""
    ended = threading.Event()

    def sweep() -> None:
        while not ended.is_set():
            try:
                sweep_trash(root)
                if strangers:
                    forget(root)
            except OSError as error:
                once("forgetting", f"{root}: {error.strerror}; conversations are not removed")
            ended.wait(SWEPT_EVERY)

    threading.Thread(target=sweep, name="forgetting", daemon=True).start()
    return ended.set


def forget(root: Path, age: float = KEPT_SECONDS, most: int = MOST_BYTES) -> None:
    """Remove the conversations below a root, deleted ones too, that nobody has touched for `age`
    seconds, and the oldest ones until the others take at most `most` bytes."""
    dated: list[tuple[float, int, Path]] = []
    for folder in root.glob("*/*"):
        if ID.match(folder.name.removeprefix(TRASH)):
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
