"""A trained model, loaded once, that answers conversations about pictures."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import checkpoints
import config as configs
import config_values
from assistant.answer import Answer, Constraint
from assistant.caches import LeastRecentlyUsed
from assistant.engine import Engine
from assistant.filter import ContentFilter
from assistant.refusals import Blocked, ContextExceeded
from assistant.sampling import Sampling
from assistant.text_stream import TextStream
from checkpoint_state import need_run
from data.chat import render
from data.dataset import Conversation, Message
from data.feature_form import as_stored
from data.images import read_image_bytes
from data.reading import fit_image
from errors import PhiSightError
from model.build import Assembled, assemble, load_model_state, settle_rounded
from model.cache import default_kv_bytes
from model.vision import VisionTower
from packing import packed_parts
from reports.card import provenance
from system import memory
from workers.fitting import Fitted
from workers.pool import Cancelled
from workers.turns import Turns

FEATURE_BYTES = 256 * 2**20  # 430 pictures of CLIP L/14 at 336
PREFIX_BYTES = 1024 * 2**20  # 2,600 tokens of Phi-3.5-mini in 16 bits
ANSWERS = 1000
TOWER_PICTURES = 4  # of one question in one turn: more at once are not faster on a CPU


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
        kv_bytes: int | None = None,
    ) -> None:
        """`cache`: keep picture features, conversations' keys and values, and greedy answers;
        `max_rows`: answers decoded at once; `queue_limit`: questions that may wait beside them;
        `kv_bytes`: memory for the keys and values of those decoded, else `default_kv_bytes`."""
        self.parts, self.config, self.source = parts, config, source
        self.content_filter = content_filter
        self.provenance: dict[str, Any] = {}  # of its weights, see `reports.card`
        self.rows: list[dict[str, Any]] = []  # of the checkpoint's manifest, one for each tensor
        self.license = ""  # of its weights, where a person named one: what exports say
        self.model = parts.model.eval()
        self.model.requires_grad_(False)
        self.engine = Engine(
            self.model,
            self.stop_ids,
            parts.chat_format.tokens_per_image,
            max_rows,
            queue_limit,
            PREFIX_BYTES if cache else 0,
            default_kv_bytes(parts.device) if kv_bytes is None else kv_bytes,
        )
        self._features: LeastRecentlyUsed[Tensor] = LeastRecentlyUsed(
            FEATURE_BYTES if cache else 0, lambda features: features.nbytes
        )
        # The text of greedy answers, why they ended, and their length in tokens.
        self._answers: LeastRecentlyUsed[tuple[str, str, int]] = LeastRecentlyUsed(
            ANSWERS if cache else 0
        )
        self._tower: VisionTower | None = None
        self._encoding = threading.Lock()  # one picture batch at a time through the encoder
        self._eyes = Turns()  # of batches of pictures

    @classmethod
    def load(
        cls,
        run_or_checkpoint: str | Path,
        *,
        base: str | None = None,
        vision: str | None = None,
        base_cache: str | None = None,
        device: str | None = None,
        base_revision: str | None = None,
        vision_revision: str | None = None,
        threads: int | None = None,
        cache: bool = True,
        max_rows: int = 16,
        queue_limit: int = 64,
        content_filter: ContentFilter | None = None,
        kv_bytes: int | None = None,
    ) -> Assistant:
        """From a run's newest valid checkpoint, from one checkpoint folder, or from the hub.

        `base` to `threads` stand in for fields of the saved config, such as `base` for a folder
        that has moved. Raises `PhiSightError` when there is no checkpoint, it does not verify, or
        is of another base.
        """
        memory.share_heaps()
        checkpoint = checkpoints.resolve(run_or_checkpoint)
        need_run(checkpoint)
        where = checkpoint.name
        config = config_values.from_dict(checkpoint.config["config"], where)
        moved = {
            "base": base,
            "vision": vision,
            "base_revision": base_revision,
            "vision_revision": vision_revision,
            "base_cache": base_cache,
            "device": device,
            "threads": threads,
        }
        given = {name: value for name, value in moved.items() if value is not None}
        config = configs.replace(config, **(packed_parts(checkpoint.path.parent) | given))
        torch.set_num_threads(config.threads or torch.get_num_threads())
        parts = assemble(config)
        check_parts(parts, config, checkpoint.config, where)
        load_model_state(parts.model, checkpoint.state)
        settle_rounded(parts.model)
        made = cls(parts, config, where, cache, max_rows, queue_limit, content_filter, kv_bytes)
        made.provenance = provenance(checkpoint)
        made.rows = checkpoint.manifest["tensors"]
        return made

    def reply(
        self,
        messages: Sequence[Message],
        max_new_tokens: int = 256,
        sampling: Sampling = Sampling(),
        seed: int | None = None,
        stop: Sequence[str] = (),
        pictures: Mapping[str, Image.Image | bytes] | None = None,
    ) -> Answer:
        """Begin to answer a conversation; returns when its pictures are encoded, before the first
        token. Takes and raises what `ask` and `start` do."""
        answer = self.ask(messages, max_new_tokens, sampling, seed, stop, pictures)
        self.start(answer)
        return answer

    def ask(
        self,
        messages: Sequence[Message],
        max_new_tokens: int = 256,
        sampling: Sampling = Sampling(),
        seed: int | None = None,
        stop: Sequence[str] = (),
        pictures: Mapping[str, Image.Image | bytes] | None = None,
        constraint: Constraint | None = None,
    ) -> Answer:
        """The answer to a conversation that ends with the user's turn, not yet begun: `start` it.

        A picture part names one of `pictures` (encoded bytes or an RGB picture), else a file.
        `seed` makes sampling repeatable; an answer ends before the first of the `stop` strings;
        `constraint` is of this answer alone. Raises `ContextExceeded` for a conversation that
        leaves no room for an answer, `PhiSightError` for one that takes more memory than there is
        for all, and `Blocked` for what the filter refuses. Opens no file and
        does not wait.
        """
        self._check(messages)
        sample = render(messages, self.parts.chat_format, add_generation_prompt=True)
        prompt, room = sample.input_ids, self.context_tokens - len(sample.input_ids)
        if room < 1:
            raise ContextExceeded(len(prompt), self.context_tokens, bool(sample.images))
        limit = min(max_new_tokens, room)
        self.engine.check(len(prompt), limit)
        given = pictures or {}
        return Answer(
            prompt,
            limit,
            torch.zeros(0, *self.parts.vision.shape),
            sampling=sampling,
            seed=seed,
            text=TextStream(self.parts.base.tokenizer, stop, self.content_filter),
            pictures=[
                (name, given.get(name)) for name in Conversation("chat", tuple(messages)).images
            ],
            constraint=constraint,
        )

    def has_room(self, messages: Sequence[Message]) -> bool:
        """Whether a conversation leaves room for an answer."""
        prompt = render(messages, self.parts.chat_format, add_generation_prompt=True).input_ids
        return len(prompt) < self.context_tokens

    def start(self, answer: Answer) -> None:
        """Read and encode the pictures of an answer, and hand it to the engine; an answer that is
        remembered ends at once. May be called in any thread; returns early if it is cancelled.

        Raises `PhiSightError` for a picture that cannot be used, and `Busy` when too many wait; a
        subscriber of the answer is told of its end too.
        """
        try:
            self._encode_pictures(answer)
            if not self._recall(answer):
                self.engine.submit(answer)
        except Cancelled:
            answer.end("cancelled")
        except BaseException as error:
            answer.end("failed", error)
            raise

    def features(self, pictures: Sequence[Image.Image | Fitted]) -> Tensor:
        """(pictures, tokens, vision dim) float32, rounded as the feature store rounds them."""
        if not pictures:
            return torch.zeros(0, *self.parts.vision.shape)
        with self._encoding:
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
    def context_tokens(self) -> int:
        """How many tokens the model reads, the answer's among them."""
        return self.parts.base.model.config.max_position_embeddings

    @property
    def stop_ids(self) -> frozenset[int]:
        return self.parts.chat_format.stop_ids

    def _check(self, messages: Sequence[Message]) -> None:
        if not messages or messages[-1].role != "user":
            raise PhiSightError("conversation: must end with the user's turn; ask something")
        if self.content_filter is None:
            return
        for message in messages:
            text = " ".join(part.value for part in message.parts if part.kind == "text")
            if message.role == "user" and self.content_filter(text, True) is None:
                raise Blocked("question: is not let through by the content filter; rephrase it")

    def _recall(self, answer: Answer) -> bool:
        """End a greedy answer with what is remembered of the same question, or have it remembered
        when it ends. Whether it has ended."""
        text = answer.text
        if answer.sampling.temperature != 0 or text is None or answer.constraint is not None:
            return False
        limit, sampling = answer.max_new_tokens, answer.sampling
        asked = (tuple(answer.ids), tuple(answer.image_keys), limit, text.stop, sampling)
        if known := self._answers.get(asked):
            answer.recall(*known)
            return True

        def remember(reason: str) -> None:
            self._answers.put(asked, (text.shown, reason, answer.completion_tokens))

        answer.remember = remember
        return False

    def _encode_pictures(self, answer: Answer) -> None:
        """Give an answer the content keys and the features of its pictures, in slot order. Many
        take a turn for every few of them. Raises `Cancelled` when the answer is."""
        contents = dict(answer.pictures)
        names = list(contents)
        keys: dict[str, str] = {}
        known: dict[str, Tensor] = {}
        fit = self.parts.vision.preparation.fit
        for start in range(0, len(names), TOWER_PICTURES):
            unseen: dict[str, Image.Image | Fitted] = {}
            for name in names[start : start + TOWER_PICTURES]:
                if answer.cancelled:
                    raise Cancelled
                content = contents[name]
                picture = read_image_bytes(name) if content is None else content
                keys[name] = key = content_key(picture)
                if key in known or key in unseen:
                    continue
                features = self._features.get(key)
                if features is not None:
                    known[key] = features
                elif isinstance(picture, bytes):
                    unseen[key] = fit_image(picture, name, fit, lambda: answer.cancelled)
                else:
                    unseen[key] = picture.convert("RGB")
            if unseen:
                with self._eyes.take(lambda: answer.cancelled):
                    encoded = self.features(list(unseen.values()))
                for key, features in zip(unseen, encoded, strict=True):
                    known[key] = features.clone()  # alone: a slice would keep its whole batch
                    self._features.put(key, known[key])
        answer.image_keys = [keys[name] for name, _ in answer.pictures]
        if answer.image_keys:
            answer.image_features = torch.stack([known[key] for key in answer.image_keys])
        answer.pictures = ()  # their bytes are of no further use


def content_key(picture: Image.Image | bytes) -> str:
    """Names the content of a picture, encoded or decoded."""
    if isinstance(picture, bytes):
        return hashlib.sha256(picture).hexdigest()
    pixels = hashlib.sha256(repr((picture.size, picture.mode)).encode())
    pixels.update(picture.tobytes())
    return pixels.hexdigest()


def check_parts(
    parts: Assembled, config: configs.Config, facts: Mapping[str, Any], where: str
) -> None:
    """Raise `PhiSightError` unless base, tokenizer and picture encoder are those that a checkpoint
    (`where`) was trained on, by the fingerprints in its `facts`."""
    encoder = f"{config.vision} ({parts.vision.told})"
    for what, name, named, found in (
        ("base", "base", config.base, parts.base.fingerprint),
        ("picture encoder", "vision", encoder, parts.vision.key),
    ):
        if facts[f"{name}_fingerprint"] != found:
            raise PhiSightError(
                f"{where}: was trained on another {what} ({facts['config'][name]}) than {named};"
                f" name the right one with --{name}"
            )
    tokenizer = parts.base.tokenizer.fingerprint
    if facts.get("tokenizer_fingerprint", tokenizer) != tokenizer:  # former versions do not say it
        raise PhiSightError(
            f"{where}: was trained with another tokenizer.json than that of {config.base}; restore"
            " the one that came with the base, or name a base that has it with --base"
        )
