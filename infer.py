"""Ask a trained model: pictures and text in, streamed text out.

    python infer.py --image x.jpg --prompt "What colour is the star?"
    python infer.py --image a.png --image b.png --prompt "<image> <image> Which one has a star?"
    python infer.py --image x.jpg --prompt "..." --json
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import checkpoints
import config as configs
from data.chat import render
from data.dataset import Conversation, Message, Part
from data.features import as_stored
from data.images import load_image
from errors import PhiSightError, run_main
from model.build import Assembled, assemble, load_model_state
from model.generate import Sampling, generate
from model.vision import VisionTower

IMAGE_MARK = "<image>"


def user_message(prompt: str, images: Sequence[str]) -> Message:
    """A user's turn. Each `<image>` in the prompt takes the next picture; without any, the pictures
    come before the text. Raises `PhiSightError` naming both numbers when they differ."""
    try:
        prompt.encode()  # a shell can pass on bytes that are no text, which no tokenizer takes
    except UnicodeEncodeError:
        raise PhiSightError("--prompt: is not valid Unicode; type it as UTF-8") from None
    pieces = prompt.split(IMAGE_MARK)
    if len(pieces) == 1:
        pieces = [""] * len(images) + pieces
    if len(pieces) - 1 != len(images):
        raise PhiSightError(
            f"--prompt: has {len(pieces) - 1} <image> places and {len(images)} pictures are given;"
            " give one --image for each"
        )
    parts = [Part("text", pieces[0])]
    for image, piece in zip(images, pieces[1:], strict=True):
        parts += [Part("image", image), Part("text", piece)]
    kept = tuple(
        Part(p.kind, p.value.strip()) for p in parts if p.kind == "image" or p.value.strip()
    )
    if not kept:
        raise PhiSightError("--prompt: is empty; ask something")
    return Message("user", kept)


class Assistant:
    """A trained model, loaded once, that answers conversations."""

    def __init__(self, parts: Assembled, config: configs.Config, source: str) -> None:
        self.parts, self.config, self.source = parts, config, source
        self.model = parts.model.eval()
        self.model.requires_grad_(False)
        self._tower: VisionTower | None = None

    @classmethod
    def load(cls, run_or_checkpoint: str | Path, **overrides: object) -> Assistant:
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
        return cls(parts, config, where)

    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(pictures, tokens, vision dim) float32, rounded as the feature store rounds them."""
        if not pictures:
            return torch.zeros(0, *self.parts.vision.shape)
        if self._tower is None:
            self._tower = VisionTower(self.parts.vision, self.parts.device)
        return as_stored(self._tower(pictures), self.config.feature_storage)

    def reply(
        self, messages: Sequence[Message], max_new_tokens: int = 256,
        sampling: Sampling = Sampling(), seed: int | None = None,
    ) -> Iterator[str]:
        """Stream the answer to a conversation that ends with the user's turn, piece by piece.

        Picture parts hold paths. Raises `PhiSightError` before the first piece for a picture that
        cannot be used and for a conversation that leaves no room for an answer.
        """
        conversation = Conversation("chat", tuple(messages))
        features = self.features([load_image(path) for path in conversation.images])
        prompt = render(messages, self.parts.chat_format, add_generation_prompt=True).input_ids
        return self.stream(prompt, features, max_new_tokens, sampling, seed)

    def stream(
        self, prompt: list[int], features: Tensor, max_new_tokens: int, sampling: Sampling,
        seed: int | None,
    ) -> Iterator[str]:
        """Token ids of one rendered prompt and its features -> pieces of text."""
        room = self.parts.base.model.config.max_position_embeddings - len(prompt)
        if room < 1:
            raise PhiSightError(
                f"conversation: {len(prompt)} tokens, the model reads {room + len(prompt)};"
                " shorten it or send fewer pictures"
            )
        generator = None
        if sampling.temperature > 0:
            generator = torch.Generator(self.parts.device)
            generator.manual_seed(seed) if seed is not None else generator.seed()
        tokenizer = self.parts.base.tokenizer
        ids: list[int] = []
        sent = ""
        for (token,) in generate(self.model, [prompt], features, self.stop_ids,
                                 min(max_new_tokens, room), sampling, generator):
            ids.append(token)
            text = tokenizer.decode(ids, skip_special_tokens=True)
            if len(text) > len(sent) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text[len(sent) :]  # half a character waits for its other bytes
                sent = text

    @property
    def stop_ids(self) -> frozenset[int]:
        chat = self.parts.chat_format
        return frozenset((chat.end_id, chat.end_of_text_id))


def add_model_flags(parser: configs.Parser) -> None:
    """The flags that infer.py and evaluate.py share."""
    default = configs.default_config(configs.DEFAULT_PRESET).run
    parser.add_argument("--run", default=default, help="run or checkpoint folder (%(default)s)")
    parser.add_argument("--base", help="where the base lies now, if not where it was trained")
    parser.add_argument("--vision", help="where the CLIP lies now, if not where it was trained")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def load_assistant(options: object) -> Assistant:
    given = {name: getattr(options, name) for name in ("base", "vision", "device")}
    return Assistant.load(options.run, **{k: v for k, v in given.items() if v is not None})


def main(arguments: list[str] | None = None) -> int:
    parser = configs.Parser(prog="infer.py", description=__doc__.splitlines()[0])
    add_model_flags(parser)
    parser.add_argument("--image", action="append", default=[], help="a picture; may be repeated")
    parser.add_argument("--prompt", required=True, help="the question; <image> marks a place")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a stream")
    options = parser.parse_args(arguments)
    if options.max_new_tokens < 1:
        raise PhiSightError("--max-new-tokens: must be at least 1")
    if options.seed is not None and not 0 <= options.seed < 2**64:  # what torch's generators take
        raise PhiSightError(f"--seed {options.seed}: must be from 0 to {2**64 - 1}")
    sampling = Sampling(options.temperature, options.top_p, options.top_k)
    message = user_message(options.prompt, options.image)
    for path in options.image:  # a bad picture is told before the model is loaded
        load_image(path)

    started = time.perf_counter()
    assistant = load_assistant(options)
    loaded = time.perf_counter()
    answer, first = "", None
    for piece in assistant.reply([message], options.max_new_tokens, sampling, options.seed):
        first = first or time.perf_counter()
        answer += piece
        if not options.json:
            print(piece, end="", flush=True)
    if not options.json:
        print()
        return 0
    ended = time.perf_counter()
    json.dump(
        {"answer": answer, "prompt": options.prompt, "images": options.image,
         "checkpoint": assistant.source,
         "seconds": {"load": round(loaded - started, 3),
                     "first_token": round((first or ended) - loaded, 3),
                     "total": round(ended - started, 3)}},
        sys.stdout,
    )
    print()
    return 0


if __name__ == "__main__":
    run_main(main)
