"""What a recorded question says, for a model that has room for so much."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy

from assistant.assistant import Assistant
from assistant.messages import user_message
from speech.spoken import listener


def listening(
    options: argparse.Namespace,
    assistant: Assistant,
    show: Callable[[str], None] | None = None,
    images: Sequence[str] = (),
) -> Callable[[numpy.ndarray], str]:
    """Audio -> what is said in it, as `speech.spoken.listener` gives it. A recording that says more
    than the model reads, beside the pictures of the question, is left there: `TooLong`."""

    def fits(text: str) -> bool:
        question = user_message(text.replace("<image>", " "), images)  # heard, it means no picture
        return assistant.has_room([question])

    return listener(options, assistant.config.speech, options.device, show, fits)
