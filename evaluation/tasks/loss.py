"""The loss: how likely a run finds given answers, in nats a token, and as perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy

from config import Config
from data.dataset import Quarantined
from data.sources import Source, read_conversations
from errors import PhiSightError
from evaluation import forms
from evaluation.intervals import Sums, figure, mean
from evaluation.task import Answered, Asked, Figure, Task

TOKENS = "tokens"  # score of an answer beside its loss: how many tokens the mean is over


def _perplexity(sums: Sums) -> Sums:
    with numpy.errstate(over="ignore"):  # of a run that diverged it is infinite
        return numpy.exp(mean(sums))


class Loss(Task):
    """Conversations as training reads them. Without a file: the validation conversations that the
    run's training evaluates, so that the figure is the one of its log."""

    about = "nats a token and perplexity of given answers"
    form = "conversations, as for training"
    main = "loss"
    generates = False

    def default_data(self, config: Config, images: Path) -> list[Path]:
        return []

    def questions(self, data: Sequence[Path], limit: int) -> list[Asked]:
        asked: list[Asked] = []
        for path in data:
            bad: list[Quarantined] = []
            for _, conversation in read_conversations(Source(path), bad, strict=True):
                texts = {
                    role: [
                        part.value
                        for message in conversation.messages
                        for part in message.parts
                        if message.role == role and part.kind == "text"
                    ]
                    for role in ("user", "assistant")
                }
                asked.append(
                    Asked(
                        conversation.id,
                        (*conversation.images, "")[0],
                        "\n".join(texts["user"]),
                        tuple(texts["assistant"]),
                        messages=conversation.messages,
                    )
                )
        return forms.first(forms.numbered(asked), limit)

    def scored(self, asked: Asked, answer: str) -> dict[str, float]:
        raise PhiSightError("loss: is measured of given answers; it scores none that is generated")

    def figures(self, answered: Sequence[Answered]) -> dict[str, Figure]:
        def sums(one: Answered) -> tuple[float, float]:
            tokens = one.scores[TOKENS]
            return one.scores["loss"] * tokens, tokens

        return {
            "loss": figure(answered, sums, mean, 1.0, "nats"),
            "perplexity": figure(answered, sums, _perplexity, 1.0, ""),
        }
