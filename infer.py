"""Ask a trained model: pictures and text in, streamed text out.

    python infer.py --image x.jpg --prompt "What colour is the star?"
    python infer.py --image a.png --image b.png --prompt "<image> <image> Which one has a star?"
    python infer.py --image x.jpg --audio question.wav --speak answer.wav
    python infer.py --chat
    python infer.py --batch questions.jsonl --out answers.jsonl
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import checkpoints
import config as configs
from data.chat import render
from data.dataset import Conversation, Message
from data.features import as_stored
from data.images import decode_image, load_image, read_image_bytes
from errors import PhiSightError, run_main
from interface.batch import answer_file
from interface.cache import LeastRecentlyUsed
from interface.filter import ContentFilter, WordFilter, load_words
from interface.messages import user_message
from interface.spoken import SpokenAnswer, add_speech_flags, listener, tell_heard
from interface.terminal import Terminal
from model.build import Assembled, assemble, load_model_state
from model.engine import Engine, Generation, Request
from model.generate import Sampling
from model.speech import read_audio
from model.text import TextStream
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
        self, prompt_tokens: int, generation: Generation | None, text: TextStream | None,
        answered: Answered | None = None, remember: Callable[[Answered], None] = lambda _: None,
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
        self, parts: Assembled, config: configs.Config, source: str, cache: bool = True,
        max_rows: int = 16, queue_limit: int = 64, content_filter: ContentFilter | None = None,
    ) -> None:
        """`cache`: keep picture features, conversations' keys and values, and greedy answers;
        `max_rows`: answers decoded at once; `queue_limit`: questions that may wait beside them."""
        self.parts, self.config, self.source = parts, config, source
        self.content_filter = content_filter
        self.model = parts.model.eval()
        self.model.requires_grad_(False)
        self.engine = Engine(self.model, self.stop_ids, parts.chat_format.tokens_per_image,
                             max_rows, queue_limit, PREFIX_BYTES if cache else 0)
        self._features: LeastRecentlyUsed[Tensor] = LeastRecentlyUsed(
            FEATURE_BYTES if cache else 0, lambda features: features.nbytes)
        self._answers: LeastRecentlyUsed[Answered] = LeastRecentlyUsed(ANSWERS if cache else 0)
        self._tower: VisionTower | None = None
        self._looking = threading.Lock()  # one picture batch at a time through the CLIP

    @classmethod
    def load(
        cls, run_or_checkpoint: str | Path, *, cache: bool = True, max_rows: int = 16,
        queue_limit: int = 64, content_filter: ContentFilter | None = None, **overrides: object,
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
        self, messages: Sequence[Message], max_new_tokens: int = 256,
        sampling: Sampling = Sampling(), seed: int | None = None, stop: Sequence[str] = (),
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
            len(prompt), self.engine.submit(request), text,
            remember=lambda answered: sampling.temperature == 0
            and self._answers.put(asked, answered),
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
                unseen[key] = (decode_image(picture, name) if isinstance(picture, bytes)
                               else picture.convert("RGB"))
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


# -- the command ----------------------------------------------------------------------------------


def add_model_flags(parser: configs.Parser) -> None:
    """The flags that every command that asks a trained model shares."""
    default = configs.default_config(configs.DEFAULT_PRESET).run
    parser.add_argument("--run", default=default, help="run or checkpoint folder (%(default)s)")
    parser.add_argument("--base", help="where the base lies now, if not where it was trained")
    parser.add_argument("--vision", help="where the CLIP lies now, if not where it was trained")
    parser.add_argument("--base-cache", help="folder of the quantised base, if not training's")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def add_assistant_flags(parser: configs.Parser) -> None:
    """The flags of everything that talks: caches, the filter, how many at once."""
    add_model_flags(parser)
    parser.add_argument("--no-cache", dest="cache", action="store_false",
                        help="keep no picture features, keys and values, or answers")
    parser.add_argument("--max-rows", type=int, default=16, help="answers decoded at once (16)")
    parser.add_argument("--content-filter", metavar="FILE",
                        help="words that neither question nor answer may have, one a line")


def add_sampling_flags(parser: configs.Parser) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="1 is none")
    parser.add_argument("--stop", action="append", default=[], help="end before this text;"
                        " may be repeated")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")


def load_assistant(options: object) -> Assistant:
    given = {name: getattr(options, name)
             for name in ("base", "vision", "base_cache", "device")}
    if getattr(options, "max_rows", 1) < 1:
        raise PhiSightError("--max-rows: must be at least 1")
    for name in ("cache", "max_rows", "queue_limit"):
        if hasattr(options, name):
            given[name] = getattr(options, name)
    if getattr(options, "content_filter", None):
        given["content_filter"] = WordFilter(load_words(options.content_filter))
    return Assistant.load(options.run, **{k: v for k, v in given.items() if v is not None})


def sampling_of(options: object) -> Sampling:
    """Raises `PhiSightError` for values that no answer can be made with."""
    if options.max_new_tokens < 1:
        raise PhiSightError("--max-new-tokens: must be at least 1")
    if options.seed is not None and not 0 <= options.seed < 2**64:  # what torch's generators take
        raise PhiSightError(f"--seed {options.seed}: must be from 0 to {2**64 - 1}")
    if not all(options.stop):
        raise PhiSightError("--stop: is empty; name the text to end before")
    return Sampling(options.temperature, options.top_p, options.top_k, options.repetition_penalty)


def parse(arguments: list[str] | None) -> object:
    parser = configs.Parser(prog="infer.py", description=__doc__.splitlines()[0])
    add_assistant_flags(parser)
    add_sampling_flags(parser)
    parser.add_argument("--image", action="append", default=[], help="a picture; may be repeated")
    parser.add_argument("--prompt", help="the question; <image> marks a place")
    parser.add_argument("--audio", metavar="FILE", help="the question as a recording")
    parser.add_argument("--chat", action="store_true", help="a conversation in the terminal")
    parser.add_argument("--batch", metavar="JSONL",
                        help='many questions: {"prompt": ..., "image": ...} a line')
    parser.add_argument("--out", metavar="JSONL", help="where --batch writes; it goes on there")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a stream")
    add_speech_flags(parser)
    options = parser.parse_args(arguments)
    one_question = options.prompt is not None or options.audio is not None
    if (sum((options.prompt is not None, options.audio is not None, options.chat,
             options.batch is not None)) != 1):
        raise PhiSightError("infer.py: give one of --prompt, --audio, --chat and --batch")
    if (options.batch is None) != (options.out is None):
        raise PhiSightError("infer.py: --batch and --out belong together; give both")
    if not one_question and (options.image or options.json or options.speak):
        raise PhiSightError(
            "infer.py: --image, --json and --speak belong to one question; leave them out")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    sampling = sampling_of(options)
    if options.prompt is not None or options.audio is not None:
        return answer_one(options, sampling)
    assistant = load_assistant(options)

    def ask(messages: Sequence[Message], seed: int | None) -> Reply:
        return assistant.reply(messages, options.max_new_tokens, sampling, seed, options.stop)

    try:
        if options.chat:
            listen = listener(options, assistant.config.speech, options.device)
            return Terminal(lambda messages: ask(messages, options.seed),
                            lambda path: listen(read_audio(path))).run()
        answered, failed = answer_file(
            Path(options.batch), Path(options.out),
            # Every line draws from its own seed, so that a line means the same after a resume.
            lambda message, line: ask(
                [message], None if options.seed is None else (options.seed + line) % 2**64),
            in_flight=2 * options.max_rows,
        )
        print(f"{options.out}: {answered} answered, {failed} failed")
        return 1 if failed else 0
    finally:
        assistant.close()


def answer_one(options: object, sampling: Sampling) -> int:
    """One question: its answer as it comes, or one JSON object."""
    prompt = options.prompt
    if prompt is not None:
        user_message(prompt, options.image)
    for path in options.image:  # what cannot be used is told before the model is loaded
        load_image(path)
    audio = None if options.audio is None else read_audio(options.audio)
    spoken = SpokenAnswer(options) if options.speak else None
    started = time.perf_counter()
    assistant = load_assistant(options)
    if audio is not None:
        listen = listener(options, assistant.config.speech, options.device, tell_heard)
        prompt = listen(audio)
    message = user_message(prompt, options.image)
    loaded = time.perf_counter()
    reply = assistant.reply([message], options.max_new_tokens, sampling, options.seed, options.stop)
    answer, first = "", None
    try:
        for piece in reply:
            first = first or time.perf_counter()
            answer += piece
            if not options.json:
                print(piece, end="", flush=True)
    finally:
        assistant.close()
    ended = time.perf_counter()
    if options.json:
        json.dump(
            {"answer": answer, "prompt": prompt, "images": options.image,
             "checkpoint": assistant.source, "finish_reason": reply.finish_reason,
             "tokens": {"prompt": reply.prompt_tokens, "answer": reply.completion_tokens},
             "seconds": {"load": round(loaded - started, 3),
                         "first_token": round((first or ended) - loaded, 3),
                         "total": round(ended - started, 3)}},
            sys.stdout,
        )
    print()
    if spoken is not None and answer.strip():
        spoken.write(answer)
    if reply.finish_reason == "filtered":
        raise Blocked("answer: was stopped by the content filter")
    return 0


if __name__ == "__main__":
    run_main(main)
