"""Check a whole data set before a run, and say what is in it.

    python -m data.preflight --data llava_instruct_150k.json --images train2017
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.chat import ChatFormat, load_tokenizer, render
from data.dataset import (
    Conversation,
    Quarantined,
    check_images,
    load_conversations,
    write_quarantine,
)
from errors import run_main

BUCKET = 256  # tokens per bar of the histogram


@dataclass(frozen=True)
class Report:
    """What a data set holds. Token counts are over the usable conversations only."""

    records: int
    turns: int
    pictures: int
    lengths: tuple[int, ...]  # tokens of each usable conversation, image ids included
    supervised_tokens: int
    bad_pictures: tuple[Quarantined, ...]  # one entry for each conversation that is lost
    repeated_ids: int
    identical_conversations: int

    def lines(self) -> list[str]:
        """The report as text for a person."""
        tokens = sum(self.lengths)
        share = self.supervised_tokens / tokens if tokens else 0.0
        return [
            f"conversations          {self.records:>12,}",
            f"turns                  {self.turns:>12,}",
            f"distinct pictures      {self.pictures:>12,}",
            f"lost to bad pictures   {len(self.bad_pictures):>12,}",
            f"repeated ids           {self.repeated_ids:>12,}",
            f"identical conversations{self.identical_conversations:>12,}",
            f"tokens                 {tokens:>12,}",
            f"supervised tokens      {self.supervised_tokens:>12,}  ({share:.1%})",
            *self._histogram(),
        ]

    def _histogram(self) -> list[str]:
        if not self.lengths:
            return []
        counts = Counter(length // BUCKET for length in self.lengths)
        widest = max(counts.values())
        lines = ["tokens per conversation:"]
        for bucket in range(max(counts) + 1):
            bar = "#" * round(40 * counts[bucket] / widest)
            first = bucket * BUCKET
            span = f"{first:>6}-{first + BUCKET - 1:<6}"
            lines.append(f"  {span} {counts[bucket]:>9,} {bar}".rstrip())
        return lines


def preflight(
    conversations: Sequence[Conversation],
    image_folder: str | Path | None,
    chat_format: ChatFormat,
    decode: bool = True,
) -> Report:
    """Render every conversation and, if there is a folder, decode every picture.

    `decode=False` only checks that the pictures are there; `image_folder=None` skips them. Raises
    PhiSightError if `image_folder` is no folder.
    """
    usable, bad_pictures = list(conversations), []
    if image_folder is not None:
        checked = check_images(conversations, image_folder, decode)
        usable, bad_pictures = checked.conversations, checked.quarantined
    lengths, supervised_tokens = [], 0
    for conversation in usable:
        sample = render(conversation.messages, chat_format)
        lengths.append(len(sample.input_ids))
        supervised_tokens += sum(sample.supervised)
    return Report(
        records=len(conversations),
        turns=sum(m.role == "assistant" for c in conversations for m in c.messages),
        pictures=len({name for conversation in conversations for name in conversation.images}),
        lengths=tuple(lengths),
        supervised_tokens=supervised_tokens,
        bad_pictures=tuple(bad_pictures),
        repeated_ids=len(conversations) - len({c.id for c in conversations}),
        identical_conversations=len(conversations) - len({c.messages for c in conversations}),
    )


def main() -> int:
    """The command line; exit code 1 if anything was set aside."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="JSON list or JSONL of conversations")
    parser.add_argument("--images", help="the folder that the pictures' names are relative to")
    parser.add_argument("--tokenizer", default="assets/tiny/phi3", help="folder or hub id")
    parser.add_argument("--tokens-per-image", type=int, default=576, help="576: CLIP L/14 at 336")
    parser.add_argument("--no-decode", action="store_true", help="only look whether pictures exist")
    parser.add_argument("--quarantine", help="write the records set aside to this JSONL file")
    arguments = parser.parse_args()
    chat_format = ChatFormat.from_tokenizer(
        load_tokenizer(arguments.tokenizer), arguments.tokens_per_image
    )
    loaded = load_conversations(arguments.data)
    report = preflight(
        loaded.conversations, arguments.images, chat_format, decode=not arguments.no_decode
    )
    set_aside = [*loaded.quarantined, *report.bad_pictures]
    print(f"bad records            {len(loaded.quarantined):>12,}")
    print("\n".join(report.lines()))
    for entry in set_aside[:10]:
        print(f"set aside: {entry.where} (id {entry.id or '-'}): {entry.reason}")
    if len(set_aside) > 10:
        print(f"... and {len(set_aside) - 10:,} more; --quarantine FILE writes all of them")
    if arguments.quarantine:
        write_quarantine(arguments.quarantine, set_aside)
    return 1 if set_aside else 0


if __name__ == "__main__":
    run_main(main)
