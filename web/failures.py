"""What Gradio says of events that fail: it prints a traceback for each, and anybody can send events
that are not right."""

from __future__ import annotations

import sys
import traceback
from typing import Any

from api.logs import failed


class _Told:
    """Stands for the module `traceback` in Gradio's modules: what fails is told as one line, and
    the same only once in a while."""

    def print_exc(self, *_: Any, **__: Any) -> None:
        error = sys.exception()
        if error is not None:
            failed("an event", error)

    def __getattr__(self, name: str) -> Any:
        return getattr(traceback, name)


def tell_failures_once() -> None:
    """To be called when Gradio has been imported."""
    import gradio.queueing
    import gradio.route_utils
    import gradio.routes

    for module in (gradio.queueing, gradio.routes, gradio.route_utils):
        vars(module)["traceback"] = _Told()
