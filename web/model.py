"""The model behind the page: loaded while the page is open already, and exchanged for another."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from errors import PhiSightError
from web.errors import RequestError

if TYPE_CHECKING:  # loading torch is most of a start
    from assistant.assistant import Assistant

LOADING, READY, FAILED = "loading", "ready", "failed"
LET_GO_SECONDS = 10.0  # in which the answers of a former model have ended
LOOK_SECONDS = 1.0  # how often it is looked, which stops everybody for some hundredths


class Model:
    """One assistant at a time, from any thread.

    `load` with a checkpoint gives another one; None where the page may not exchange it.
    """

    def __init__(
        self,
        assistant: Assistant | None = None,
        load: Callable[[str], Assistant] | None = None,
        source: str = "",
    ) -> None:
        self._load, self._assistant, self.source = load, assistant, source
        self.error = ""
        self._changed = threading.Condition()
        self._loading = False

    @property
    def state(self) -> str:
        """`LOADING`, `READY` or `FAILED`; a model that could not be exchanged stays ready."""
        if self._loading:
            return LOADING
        return READY if self._assistant is not None else FAILED if self.error else LOADING

    def get(self, given_up: Callable[[], bool] = lambda: False) -> Assistant:
        """The assistant, waited for while it is loaded. Raises PhiSightError where that failed, and
        `RequestError` when `given_up` says so."""
        with self._changed:
            while self._loading or (self._assistant is None and not self.error):
                if given_up():
                    raise RequestError("still_loading")
                self._changed.wait(0.1)
            if self._assistant is None:
                raise PhiSightError(self.error)
            return self._assistant

    @property
    def loaded(self) -> Assistant | None:
        """The assistant if one is there, without waiting."""
        return None if self._loading else self._assistant

    def begin(self, source: str, failed: Callable[[PhiSightError], None] | None = None) -> None:
        """Load the model of a run or checkpoint in a thread, in place of the one that is there. The
        former one stays where it fails, and `failed` is called.

        Raises `RequestError` while another one is being loaded, or where none may be.
        """
        with self._changed:
            if self._load is None:
                raise RequestError("model_is_fixed")
            if self._loading:
                raise RequestError("still_loading")
            self._loading, self.error = True, ""
        threading.Thread(
            target=self._exchange, args=(source, failed), name="loading", daemon=True
        ).start()

    def _exchange(self, source: str, failed: Callable[[PhiSightError], None] | None) -> None:
        assert self._load is not None
        made, error = None, None
        try:
            made = self._load(source)
        except PhiSightError as refusal:
            error = refusal
        except BaseException as fault:  # told where it is waited for; the thread has nobody to tell
            error = PhiSightError(
                f"{source}: could not be loaded ({type(fault).__name__}: {fault})"
            )
        with self._changed:
            former = self._assistant if made is not None else None
            if made is not None:
                self._assistant, self.source = made, source
            self.error, self._loading = str(error or ""), False
            self._changed.notify_all()
        if former is not None:
            former.close()
        if made is not None:
            gone = None if former is None else weakref.ref(former)
            former = made = None  # this thread holds none of them
            free_and_keep(gone)
        if error is not None and failed is not None:
            failed(error)

    def close(self) -> None:
        """Stop every answer."""
        if self._assistant is not None:
            self._assistant.close()


def free_and_keep(former: weakref.ref[Assistant] | None) -> None:
    """Free a former model, once the last of its answers has let it go, and have the collector pass
    over all that is loaded, which stays. What is passed over is never freed: a model of gigabytes
    that is frozen with the rest would stay for as long as the server runs."""
    gc.unfreeze()
    until = time.monotonic() + LET_GO_SECONDS
    gc.collect()
    while former is not None and former() is not None and time.monotonic() < until:
        time.sleep(LOOK_SECONDS)
        gc.collect()
    if former is None or former() is None:
        gc.freeze()
