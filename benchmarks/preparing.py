"""What it takes to prepare a data set for training, from the file to packed token ids.

    python -m tools.make_large_json cache/large/data.json --images cache/large/images
    python -m benchmarks.preparing --data cache/large/data.json --images cache/large/images

Picture features are a stand-in of one number, as it is the reading that is measured here.
"""

from __future__ import annotations

import tempfile
import time

import torch

from config import Parser, default_config, replace
from data.chat import ChatFormat, load_tokenizer
from data.features import FeatureStore
from data.prepare import prepare
from errors import run_main
from paths import located
from system import memory

TOKENS_PER_IMAGE = 576


def main(arguments: list[str] | None = None) -> int:
    """Print the time, the memory and what was made."""
    parser = Parser(prog="benchmarks.preparing", description=__doc__.split("\n")[0])
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--images", action="append", default=[])
    parser.add_argument("--tokenizer", default=located("assets/tiny/phi3"), help="folder or hub id")
    options = parser.parse_args(arguments)
    config = replace(
        default_config(),
        data=tuple(options.data),
        images=tuple(options.images),
        max_text_tokens=2048,
        row_tokens=4096,
    )
    tokenizer = load_tokenizer(options.tokenizer)
    chat_format = ChatFormat.from_tokenizer(tokenizer, TOKENS_PER_IMAGE)
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(folder, "stand-in", (1, 1))
        started, processor = time.perf_counter(), time.process_time()
        data = prepare(
            config,
            chat_format,
            store,
            lambda: lambda pictures: torch.zeros(len(pictures), 1, 1),
            positions=131072,
        )
        wall, processor = time.perf_counter() - started, time.process_time() - processor
    counts = data.counts()
    print(
        f"{counts['training_conversations']:,} conversations to train on, {counts['tokens']:,}"
        f" tokens; {counts['quarantined']:,} set aside; {data.fingerprint[:16]}"
    )
    print(
        f"took {wall:.1f} s, {processor:.1f} CPU seconds; peak memory {memory.peak() / 1e6:.0f} MB"
    )
    return 0


if __name__ == "__main__":
    run_main(main)
