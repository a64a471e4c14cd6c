"""The flags that the commands which talk share, and what they ask for."""

from __future__ import annotations

import config as configs
from assistant.assistant import Assistant
from assistant.filter import WordFilter, load_words
from assistant.sampling import Sampling
from errors import PhiSightError


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
    parser.add_argument(
        "--no-cache",
        dest="cache",
        action="store_false",
        help="keep no picture features, keys and values, or answers",
    )
    parser.add_argument("--max-rows", type=int, default=16, help="answers decoded at once (16)")
    parser.add_argument(
        "--content-filter",
        metavar="FILE",
        help="words that neither question nor answer may have, one a line",
    )


def add_sampling_flags(parser: configs.Parser) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="1 is none")
    parser.add_argument(
        "--stop", action="append", default=[], help="end before this text; may be repeated"
    )
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")


def load_assistant(options: object) -> Assistant:
    given = {name: getattr(options, name) for name in ("base", "vision", "base_cache", "device")}
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
