"""A trained model, loaded once, that answers conversations about pictures."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import checkpoints
import config as configs
from assistant.caches import LeastRecentlyUsed
from assistant.engine import Engine, Generation, Request
from assistant.filter import ContentFilter
from assistant.sampling import Sampling
from assistant.text_stream import TextStream
from data.chat import render
from data.dataset import Conversation, Message
from data.features import as_stored
from data.images import decode_image, read_image_bytes
from errors import PhiSightError
from model.build import Assembled, assemble, load_model_state
from model.vision import VisionTower

FEATURE_BYTES = 256 * 2**20  # 430 pictures of CLIP L/14 at 336
PREFIX_BYTES = 1024 * 2**20  # 2,600 tokens of Phi-3.5-mini in 16 bits
ANSWERS = 1000
TOWER_PICTURES = 8  # encoded at once


class Blocked(PhiSightError):
    """The content filter does not let a question pass."""


@dataclass(frozen=True)
class Answered:
    """A whole answer as it was shown, for when the same is asked again."""

    text: str
    finish_reason: str
    completion_tokens: int


class Reply:
    """An answer on its way: iterate for its pieces of text as they come.

    Its generation ends with its reader: when the iteration is left, `cancel` is called, or the
    last reference goes.
    """

    def __init__(
        self,
        prompt_tokens: int,
        generation: Generation | None,
        text: TextStream | None,
        answered: Answered | None = None,
        remember: Callable[[Answered], None] = lambda _: None,
    ) -> None:
        """Either a `generation` with the `text` it becomes, or what was `answered` before."""
        self.prompt_tokens = prompt_tokens
        self.cached = answered is not None
        self._generation, self._text, self._answered = generation, text, answered
        self._pieces = self._known() if answered else self._generated(remember)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def __del__(self) -> None:
        self.cancel()

    def cancel(self) -> None:
        """End the generation within a token, from any thread; of no effect once it has ended."""
        if self._generation is not None:
            self._generation.cancel()

    @property
    def finish_reason(self) -> str | None:
        """None while it runs; "stop", "length", "filtered", "cancelled" or "failed"."""
        if self._answered is not None:
            return self._answered.finish_reason
        return self._text.finished or self._generation.finish_reason

    @property
    def completion_tokens(self) -> int:
        if self._answered is not None:
            return self._answered.completion_tokens
        return len(self._generation.tokens)

    @property
    def seconds_to_first_token(self) -> float | None:
        return 0.0 if self.cached else self._generation.seconds_to_first_token

    @property
    def reused_tokens(self) -> int:
        """Tokens of the prompt whose keys and values were known from before."""
        return self._generation.reused_tokens if self._generation else 0

    def _known(self) -> Iterator[str]:
        if self._answered.text:
            yield self._answered.text

    def _generated(self, remember: Callable[[Answered], None]) -> Iterator[str]:
        generation, text = self._generation, self._text
        try:
            for token in generation:
                if piece := text.push(token):
                    yield piece
                if text.finished:
                    break
            if piece := text.end():
                yield piece
            if self.finish_reason in ("stop", "length", "filtered"):
                remember(Answered(text.shown, self.finish_reason, len(generation.tokens)))
        finally:
            generation.cancel()


class Assistant:
    """A trained model, loaded once, that answers conversations; many at a time, from any thread."""

    def __init__(
        self,
        parts: Assembled,
        config: configs.Config,
        source: str,
        cache: bool = True,
        max_rows: int = 16,
        queue_limit: int = 64,
        content_filter: ContentFilter | None = None,
    ) -> None:
        """`cache`: keep picture features, conversations' keys and values, and greedy answers;
        `max_rows`: answers decoded at once; `queue_limit`: questions that may wait beside them."""
        self.parts, self.config, self.source = parts, config, source
        self.content_filter = content_filter
        self.model = parts.model.eval()
        self.model.requires_grad_(False)
        self.engine = Engine(
            self.model,
            self.stop_ids,
            parts.chat_format.tokens_per_image,
            max_rows,
            queue_limit,
            PREFIX_BYTES if cache else 0,
        )
        self._features: LeastRecentlyUsed[Tensor] = LeastRecentlyUsed(
            FEATURE_BYTES if cache else 0, lambda features: features.nbytes
        )
        self._answers: LeastRecentlyUsed[Answered] = LeastRecentlyUsed(ANSWERS if cache else 0)
        self._tower: VisionTower | None = None
        self._looking = threading.Lock()  # one picture batch at a time through the CLIP

    @classmethod
    def load(
        cls,
        run_or_checkpoint: str | Path,
        *,
        cache: bool = True,
        max_rows: int = 16,
        queue_limit: int = 64,
        content_filter: ContentFilter | None = None,
        **overrides: object,
    ) -> Assistant:
        """From a run's newest valid checkpoint or from one checkpoint folder.

        `overrides` replace fields of the saved config, such as `base` for a folder that has moved.
        Raises `PhiSightError` when there is none, it does not verify, or is of another base.
        """
        checkpoint = checkpoints.resolve(run_or_checkpoint)
        where = str(checkpoint.path)
        config = configs.from_dict(checkpoint.config["config"], where)
        config = configs.replace(config, **overrides)
        torch.set_num_threads(config.threads or torch.get_num_threads())
        parts = assemble(config)
        for what, saved, found in (
            ("base", checkpoint.config["base_fingerprint"], parts.base.fingerprint),
            ("CLIP", checkpoint.config["vision_fingerprint"], parts.vision.key),
        ):
            if saved != found:
                raise PhiSightError(
                    f"{where}: was trained on another {what} than {config.base} and"
                    f" {config.vision}; name the right one with --base or --vision"
                )
        load_model_state(parts.model, checkpoint.state)
        return cls(parts, config, where, cache, max_rows, queue_limit, content_filter)

    def reply(
        self,
        messages: Sequence[Message],
        max_new_tokens: int = 256,
        sampling: Sampling = Sampling(),
        seed: int | None = None,
        stop: Sequence[str] = (),
        pictures: Mapping[str, Image.Image | bytes] | None = None,
    ) -> Reply:
        """Begin to answer a conversation that ends with the user's turn; returns at once.

        A picture part names one of `pictures` (encoded bytes or an RGB picture), else a file.
        `seed` makes sampling repeatable; an answer ends before the first of the `stop` strings.
        Raises `PhiSightError` for a picture that cannot be used and a conversation that leaves no
        room for an answer, `Blocked` for what the filter refuses, `Busy` when too many wait.
        """
        self._check(messages)
        prompt = render(messages, self.parts.chat_format, add_generation_prompt=True).input_ids
        room = self.parts.base.model.config.max_position_embeddings - len(prompt)
        if room < 1:
            raise PhiSightError(
                f"conversation: {len(prompt)} tokens, the model reads {room + len(prompt)};"
                " shorten it or send fewer pictures"
            )
        images = Conversation("chat", tuple(messages)).images
        image_keys, features = self._look(images, pictures or {})
        limit = min(max_new_tokens, room)
        asked = (tuple(prompt), tuple(image_keys), limit, tuple(stop), sampling)
        if sampling.temperature == 0 and (answered := self._answers.get(asked)):
            return Reply(len(prompt), None, None, answered)
        request = Request(prompt, features, image_keys, limit, sampling, seed)
        text = TextStream(self.parts.base.tokenizer, stop, self.content_filter)
        return Reply(
            len(prompt),
            self.engine.submit(request),
            text,
            remember=lambda answered: (
                sampling.temperature == 0 and self._answers.put(asked, answered)
            ),
        )

    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(pictures, tokens, vision dim) float32, rounded as the feature store rounds them."""
        if not pictures:
            return torch.zeros(0, *self.parts.vision.shape)
        with self._looking:
            if self._tower is None:
                self._tower = VisionTower(self.parts.vision, self.parts.device)
            return as_stored(self._tower(pictures), self.config.feature_storage)

    def statistics(self) -> dict[str, float]:
        """Counts since loading: what runs and waits, tokens, cache hits and sizes in bytes."""
        return self.engine.statistics() | {
            "feature_cache_hits": self._features.hits,
            "feature_cache_misses": self._features.misses,
            "feature_cache_bytes": self._features.size,
            "answer_cache_hits": self._answers.hits,
            "answer_cache_misses": self._answers.misses,
        }

    def close(self) -> None:
        """Stop every answer and the engine's thread."""
        self.engine.close()

    @property
    def stop_ids(self) -> frozenset[int]:
        chat = self.parts.chat_format
        return frozenset((chat.end_id, chat.end_of_text_id))

    def _check(self, messages: Sequence[Message]) -> None:
        if not messages or messages[-1].role != "user":
            raise PhiSightError("conversation: must end with the user's turn; ask something")
        if self.content_filter is None:
            return
        for message in messages:
            text = " ".join(part.value for part in message.parts if part.kind == "text")
            if message.role == "user" and self.content_filter(text, True) is None:
                raise Blocked("question: is not let through by the content filter; rephrase it")

    def _look(
        self, names: Sequence[str], given: Mapping[str, Image.Image | bytes]
    ) -> tuple[list[str], Tensor]:
        """The content keys and the (pictures, tokens, dim) features of pictures, in order."""
        keys: dict[str, str] = {}
        known: dict[str, Tensor] = {}
        unseen: dict[str, Image.Image] = {}
        for name in dict.fromkeys(names):
            picture = given[name] if name in given else read_image_bytes(name)
            keys[name] = key = content_key(picture)
            if key in known or key in unseen:
                continue
            features = self._features.get(key)
            if features is not None:
                known[key] = features
            else:
                unseen[key] = (
                    decode_image(picture, name)
                    if isinstance(picture, bytes)
                    else picture.convert("RGB")
                )
        order = list(unseen)
        for start in range(0, len(order), TOWER_PICTURES):
            chosen = order[start : start + TOWER_PICTURES]
            for key, features in zip(chosen, self.features([unseen[k] for k in chosen])):
                known[key] = features.clone()  # alone: a slice would keep its whole batch
                self._features.put(key, known[key])
        image_keys = [keys[name] for name in names]
        features = [known[key] for key in image_keys]
        return image_keys, torch.stack(features) if features else self.features([])


def content_key(picture: Image.Image | bytes) -> str:
    """Names the content of a picture, encoded or decoded."""
    if isinstance(picture, bytes):
        return hashlib.sha256(picture).hexdigest()
    pixels = hashlib.sha256(repr((picture.size, picture.mode)).encode())
    pixels.update(picture.tobytes())
    return pixels.hexdigest()
