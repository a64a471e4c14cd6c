"""The questions to begin with of the model that answers: a folder's that a person named, or those
that the model's run carries."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path

from data.examples import Example, read_examples
from errors import PhiSightError
from paths import EXAMPLES
from web.model import Model
from web.start.facts import run_of

log = logging.getLogger("phisight.web")


class Examples:
    """Of one page, for many threads."""

    def __init__(self, model: Model, folder: str | Path | None = None) -> None:
        """`folder`: of `read_examples`, or None for the run's own. Raises what that raises."""
        self._model, self._lock = model, threading.Lock()
        self._given = None if folder is None else _by_key(read_examples(folder))
        self._known: tuple[Path | None, Mapping[str, Example]] = (None, {})

    def now(self) -> Mapping[str, Example]:
        """By their keys, in order; none where the run has none. A run's that cannot be shown are
        told of once, and left."""
        if self._given is not None:
            return self._given
        assistant = self._model.loaded
        source = assistant.source if assistant else self._model.source
        run = run_of(source) if source else None  # "" is none, not the current folder
        with self._lock:
            if run != self._known[0]:
                self._known = (run, _of_run(run))
            return self._known[1]


def _of_run(run: Path | None) -> Mapping[str, Example]:
    if run is None or not (run / EXAMPLES).is_dir():
        return {}
    try:
        return _by_key(read_examples(run / EXAMPLES))
    except PhiSightError as error:
        log.warning("the page begins without examples: %s", error)
        return {}


def _by_key(examples: list[Example]) -> dict[str, Example]:
    return {example.key: example for example in examples}
