"""The flags of the commands that ask a trained model, each defined once, and what they ask for."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import config as configs
from assistant.filter import WordFilter, load_words
from data.dataset import Message
from errors import PhiSightError

if TYPE_CHECKING:  # torch takes a second to import: not for --help
    from assistant.answer import Answer
    from assistant.assistant import Assistant
    from assistant.sampling import Sampling


def add_model_flags(parser: argparse.ArgumentParser, verbose: bool = False) -> None:
    """Which trained model, and where its parts lie. verbose: whether to tell what was loaded."""
    group = parser.add_argument_group("the model")
    default = configs.default_config().run
    help_of_run = (
        "run or checkpoint folder, RUN/best for the best that was kept, or hf:owner/name[@revision]"
        " for one on the hub (%(default)s)"
    )
    group.add_argument("--run", default=default, help=help_of_run)
    group.add_argument("--base", help="where the base lies now, if not where it was trained")
    group.add_argument("--vision", help="where the encoder lies now, if not where it was trained")
    group.add_argument("--base-cache", help="folder of the quantised base, if not training's")
    group.add_argument(
        "--device",
        choices=configs.FIELDS["device"].metadata["choices"],
        default="auto",
        help="what computes; auto (default) is a GPU where there is one",
    )
    group.add_argument(
        "--verbose",
        action=argparse.BooleanOptionalAction,
        default=verbose,
        help="say on standard error what was loaded: tensors and numbers, by owner",
    )


def add_assistant_flags(parser: argparse.ArgumentParser, verbose: bool = False) -> None:
    """The model's flags, and those of everything that talks: caches, the filter, rows."""
    add_model_flags(parser, verbose)
    group = parser.add_argument_group("caches and limits")
    group.add_argument(
        "--no-cache",
        dest="cache",
        action="store_false",
        help="keep no picture features, keys and values, or answers",
    )
    group.add_argument("--max-rows", type=int, default=16, help="answers decoded at once (16)")
    group.add_argument(
        "--kv-memory",
        type=int,
        metavar="MIB",
        help="keys and values of all answers together; what does not fit waits"
        " (a quarter of the machine's memory, half of a GPU's free one)",
    )
    group.add_argument(
        "--content-filter",
        metavar="FILE",
        help="words that neither question nor answer may have, one a line",
    )


def add_length_flag(
    parser: argparse._ActionsContainer, default: int, help: str | None = None
) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=default, help=help, metavar="N")


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how it answers")
    add_length_flag(group, 256, "tokens of the longest answer (%(default)s)")
    group.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 (default) takes the likeliest token; above it tokens are drawn",
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens whose shares reach P; 1 (default): from all",
    )
    group.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="draw from the K likeliest tokens; 0 (default): from all",
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1, what came before is less likely to come again; 1 (default) changes nothing",
    )
    group.add_argument(
        "--no-repeat-ngram-size",
        type=int,
        default=0,
        metavar="N",
        help="no N tokens in a row come twice, the question's among them; 0 (default) is off",
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be repeated",
    )
    group.add_argument("--seed", type=int, metavar="N", help="makes what is drawn repeatable")


def import_assistant() -> type[Assistant]:
    """Import all that answering needs, which is most of a start."""
    # Hundreds of thousands of objects are made that live to the end: to look for garbage among them
    # meanwhile takes a tenth of the time, and finds none.
    gc.disable()
    try:
        from assistant.assistant import Assistant
    finally:
        gc.enable()
    return Assistant


def load_assistant(options: argparse.Namespace) -> Assistant:
    """The model that the flags of a command name, ready to answer.

    Takes what `add_model_flags` gives, and where the command has them the assistant's flags and
    `queue_limit`. Raises `PhiSightError` for values that no assistant can be made with.
    """
    given = vars(options)
    if given.get("max_rows", 1) < 1:
        raise PhiSightError("--max-rows: must be at least 1")
    kv_memory = given.get("kv_memory")
    if kv_memory is not None and kv_memory < 1:
        raise PhiSightError("--kv-memory: must be at least 1")
    words = given.get("content_filter")
    moved = ("base_revision", "vision_revision", "threads")
    named = ("cache", "max_rows", "queue_limit", *moved)
    own = {name: given[name] for name in named if name in given}
    assistant = import_assistant().load(
        options.run,
        base=options.base,
        vision=options.vision,
        base_cache=options.base_cache,
        device=options.device,
        content_filter=WordFilter(load_words(words)) if words else None,
        kv_bytes=None if kv_memory is None else kv_memory * 2**20,
        **own,
    )
    assistant.license = given.get("license") or ""
    if given.get("verbose"):
        from model.loaded import loaded_line

        print(loaded_line(assistant.parts, assistant.source, assistant.rows), file=sys.stderr)
    return assistant


def check_length(options: argparse.Namespace) -> None:
    """Raises `PhiSightError` for --max-new-tokens that leave no room for an answer."""
    if options.max_new_tokens < 1:
        raise PhiSightError("--max-new-tokens: must be at least 1")


def sampling_of(options: argparse.Namespace) -> Sampling:
    """Raises `PhiSightError` for values that no answer can be made with."""
    from assistant.sampling import Sampling

    check_length(options)
    if options.seed is not None and not 0 <= options.seed < 2**64:  # what torch's generators take
        raise PhiSightError(f"--seed {options.seed}: must be from 0 to {2**64 - 1}")
    if not all(options.stop):
        raise PhiSightError("--stop: is empty; name the text to end before")
    return Sampling(
        options.temperature,
        options.top_p,
        options.top_k,
        options.repetition_penalty,
        options.no_repeat_ngram_size,
    )


class Asker(Protocol):
    """Begins to answer a conversation; `number` is that of the question, if there are many."""

    def __call__(self, messages: Sequence[Message], number: int = 0) -> Answer: ...


def asker(assistant: Assistant, options: argparse.Namespace) -> Asker:
    """What asks an assistant as the sampling flags say."""
    sampling = sampling_of(options)

    def ask(messages: Sequence[Message], number: int = 0) -> Answer:
        # Every question of a file draws from its own seed: it means the same after a resume.
        seed = None if options.seed is None else (options.seed + number) % 2**64
        return assistant.reply(messages, options.max_new_tokens, sampling, seed, options.stop)

    return ask
