"""Check a whole data set before a run, and say what is in it.

python -m data.preflight --data llava_instruct_150k.json --images train2017
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from config import FEATURE_STORAGES, FIELDS, Config, Parser
from data.chat import ChatFormat, Limits, load_tokenizer
from data.dataset import Quarantined, write_quarantine
from data.pictures import PictureFolders
from data.record_keys import FAULTS
from data.sources import Source, sources
from data.storage import StoragePlan, size
from data.survey import PICTURE_CHECKS, SMALL_FILE, Survey, survey
from documents import COUNT, read_json, require
from errors import PhiSightError, printable, run_main
from paths import located
from system import memory

BUCKET = 256  # tokens per bar of the histogram
SHARES = (0.5, 0.9, 0.99, 1.0)  # of the conversations, whose lengths are told
SHOWN = 10  # records set aside, and keys that nothing reads, that are printed
REASON_SHOWN = 500  # characters
CHECKED = {
    "": "not looked at; give --images FOLDER",
    "decode": "every one decoded",
    "quick": "header and end of every one; --pictures decode decodes them all",
    "exists": "only whether they are there",
}


Counted = tuple[str, int, str]
"""What is counted, how many there are, and a note"""


@dataclass(frozen=True)
class Tower:
    """What a picture becomes, and how fast: `rate` in pictures a second, or None if not known."""

    shape: tuple[int, int]
    rate: float | None
    where: str = ""


@dataclass(frozen=True)
class Report:
    """A survey of data sources, and what their features would take."""

    sources: Sequence[Source]
    survey: Survey
    tower: Tower
    plan: StoragePlan
    limits: Limits

    def lines(self) -> list[str]:
        """The report as text for a person."""
        tally, bad = self.survey.tally, self.survey.bad_pictures
        tokens = sum(length * count for length, count in tally.lengths.items())
        share = tally.supervised_tokens / tokens if tokens else 0.0
        distinct, looked = tally.distinct("pictures"), CHECKED[self.survey.picture_check]
        lines = [("records", tally.records, "")]
        lines += [(f"  as `{form}`", number, "") for form, number in tally.forms.most_common()]
        lines += [(f"  {kind}", tally.faults[kind], "") for kind in FAULTS]
        lines += [
            ("conversations", tally.conversations, ""),
            ("  without a picture", tally.text_only, ""),
            ("  several pictures", tally.several_pictures, ""),
            ("  pictures put first", tally.put_first, "no <image> says where they stand"),
            ("  lost to bad pictures", tally.lost, ""),
            ("turns", tally.turns, ""),
            ("distinct pictures", distinct, looked if distinct else ""),
            ("  missing", self.survey.missing, ""),
            ("  broken", len(bad) - self.survey.missing, ""),
            ("  copies of another", self.survey.copies, "the same bytes under another name"),
            ("  not square", len(self.survey.cut_off), self.what_cropping_cuts()),
            ("repeated ids", tally.conversations - tally.distinct("ids"), ""),
            ("identical conversations", tally.conversations - tally.distinct("contents"), ""),
            ("tokens", tokens, ""),
            ("supervised tokens", tally.supervised_tokens, f"{share:.1%}"),
            ("  conversations with none", tally.unsupervised, ""),
            *self.counted_over_limits(),
            *self.counted_unread_keys(),
        ]
        return [
            *(f"{label:31}{number:>12,}{note and f'  ({note})'}" for label, number, note in lines),
            *histogram(tally.lengths),
            *quantiles(tally.text_lengths),
            *self.mixture_lines(),
            *self.features_lines(),
        ]

    def what_cropping_cuts(self) -> str:
        """What `--picture-fit crop` loses of the pictures that are not square."""
        shares = self.survey.cut_off
        if not shares:
            return ""
        mean = sum(shares) / len(shares)
        return (
            f"--picture-fit crop cuts off {mean:.0%} of them on average, {max(shares):.0%} at most"
        )

    def counted_over_limits(self) -> list[Counted]:
        """How many conversations are longer than training takes, and what becomes of them."""
        tally, text_limit, limit = self.survey.tally, self.limits.text_tokens, self.limits.tokens
        lines = [(f"over {text_limit} text tokens", over(text_limit, tally.text_lengths), "")]
        if limit:
            of_what = "a row" if limit == self.limits.row_tokens else "the base's positions"
            label = f"over {limit} tokens with pictures"
            lines.append((label, over(limit, tally.lengths), of_what))
        return [
            *lines,
            ("  lose their last turns", tally.shortened, ""),
            ("  set aside", tally.too_long, "their first turn is too long"),
        ]

    def counted_unread_keys(self) -> list[Counted]:
        """How often keys stand in the file that nothing reads, those in turns and parts too."""
        unread = self.survey.tally.unread
        shown = unread.most_common(SHOWN)
        lines = [("keys that nothing reads", unread.total(), "")]
        lines += [(f"  {printable(key, 28)}", number, "") for key, number in shown]
        if more := len(unread) - len(shown):
            rest = unread.total() - sum(number for _, number in shown)
            lines.append((f"  {more:,} others", rest, ""))
        return lines

    def mixture_lines(self) -> list[str]:
        """What each source gives to an epoch, where there are several or a weight."""
        if len(self.sources) == 1 and self.sources[0].weight == 1:
            return []
        tallies = self.survey.by_source
        tokens = [sum(n * count for n, count in tally.lengths.items()) for tally in tallies]
        taken = [source.weight * count for source, count in zip(self.sources, tokens)]
        lines = ["an epoch:"]
        for source, tally, count in zip(self.sources, tallies, taken):
            share = count / sum(taken) if sum(taken) else 0.0
            lines.append(
                f"  {share:6.1%} of its tokens from {printable(source.path)}:"
                f" {sum(tally.lengths.values()):,} conversations, {source.weight:g} times"
            )
        return lines

    def features_lines(self) -> list[str]:
        """What the feature store takes: disk, and time where a tower was measured."""
        if not self.plan.pictures:
            return ["feature store: no picture, nothing to compute"]
        short = self.plan.bytes > self.plan.free
        lines = [f"feature store: {self.plan}" + (", TOO LITTLE" if short else "")]
        if smaller := self.plan.smaller():
            lines.append(f"  less with {smaller}")
        if self.tower.rate is None:
            return [*lines, "  time: unknown; give --vision FOLDER to measure the tower here"]
        time_taken = duration(self.plan.pictures / self.tower.rate)
        return [
            *lines,
            f"  time: about {time_taken} at {self.tower.rate:.3g} pictures a second"
            f" (measured on {self.tower.where})",
        ]


def over(limit: int, lengths: Counter[int]) -> int:
    """How many conversations have more tokens than `limit`."""
    return sum(number for length, number in lengths.items() if length > limit)


def histogram(lengths: Counter[int]) -> list[str]:
    """Tokens per conversation: one line a bucket, the bars to scale."""
    if not lengths:
        return []
    counts: Counter[int] = Counter()
    for length, number in lengths.items():
        counts[length // BUCKET] += number
    widest = max(counts.values())
    lines = ["tokens per conversation:"]
    for bucket in range(min(counts), max(counts) + 1):
        bar = "#" * round(40 * counts[bucket] / widest)
        first = bucket * BUCKET
        span = f"{first:>6}-{first + BUCKET - 1:<6}"
        lines.append(f"  {span} {counts[bucket]:>9,} {bar}".rstrip())
    return lines


def quantiles(lengths: Counter[int]) -> list[str]:
    """How long a text is: the tokens, without pictures, that half of the conversations stay within,
    and nine tenths of them, and so on."""
    if not lengths:
        return []
    total, so_far, shown = sum(lengths.values()), 0, []
    shares = iter(SHARES)
    share = next(shares)
    for length in sorted(lengths):
        so_far += lengths[length]
        while so_far >= share * total:
            shown.append(f"{share:.0%} {length:,}")
            if (share := next(shares, 2.0)) > 1:
                break
    return [f"text tokens per conversation: {', '.join(shown)} at most"]


def duration(seconds: float) -> str:
    """Seconds as people say them: "45 s", "12 min", "5 h 30 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def measure_tower(vision: str, pooling: int) -> Tower:
    """Shape and speed of a vision tower, measured in a process of its own.

    This room knows nothing of models; the tower's own command measures it. Raises PhiSightError
    with what that command says if it cannot.
    """
    command = [
        sys.executable,
        "-m",
        "model.vision",
        "--vision",
        vision,
        "--feature-pooling",
        str(pooling),
        "--json",
    ]
    # The modules are found from this file's place, whatever folder the person stands in.
    places = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise PhiSightError(f"--vision {vision}: {last.removeprefix('error: ')}")
    measured = json.loads(done.stdout)
    shape = (measured["tokens"], measured["dim"])
    return Tower(shape, measured["pictures_per_second"], measured["device"])


def add_limit_flags(parser: Parser) -> None:
    """How long a conversation may be, as training is told it."""
    parser.add_argument(
        "--max-text-tokens",
        type=int,
        default=Config.max_text_tokens,
        help="training's limit, to count what is over it",
    )
    parser.add_argument(
        "--row-tokens",
        type=int,
        default=Config.row_tokens,
        help="training's limit of all tokens, those of pictures among them; 0 for none",
    )
    parser.add_argument(
        "--positions",
        type=int,
        help="tokens that the base takes (default: what config.json beside the tokenizer says)",
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="data.preflight", description=__doc__.split("\n")[0])
    add = parser.add_argument
    fields = {name: FIELDS[name].metadata["help"] for name in ("data", "images", "unpacked")}
    add("--data", action="append", default=[], help=fields["data"])
    add("--images", action="append", default=[], help=fields["images"])
    add("--unpacked", default=located(Config.unpacked), help=fields["unpacked"])
    parser.add_argument("--tokenizer", default=located("assets/tiny/phi3"), help="folder or hub id")
    parser.add_argument(
        "--pictures",
        choices=("auto", *PICTURE_CHECKS),
        default="auto",
        help="how to check pictures; auto decodes up to 5,000, else quick",
    )
    parser.add_argument("--quarantine", help="write the records set aside to this JSONL file")
    add_limit_flags(parser)
    parser.add_argument("--vision", help="encoder: take its sizes and measure its speed here")
    parser.add_argument(
        "--tokens-per-image", type=int, default=576, help="576: CLIP L/14 at 336; --vision knows it"
    )
    parser.add_argument(
        "--feature-dim", type=int, default=1024, help="numbers a token; --vision knows it"
    )
    parser.add_argument(
        "--feature-pooling", type=int, default=1, help="average N x N patches into one token"
    )
    parser.add_argument(
        "--picture-tokens",
        type=int,
        help="tokens of a picture in the text, where --projector makes fewer (default: one for each"
        " token of its features)",
    )
    parser.add_argument(
        "--feature-storage",
        choices=FEATURE_STORAGES,
        default="float16",
        help="how a feature is kept",
    )
    parser.add_argument(
        "--features",
        default=located(Config.features),
        help="folder of the feature store, for the room on its disk",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=None,
        help="processes; 0 for none beside this one (default: one a core)",
    )
    options = parser.parse_args(arguments)
    numbers = ("tokens_per_image", "feature_dim", "feature_pooling", "max_text_tokens")
    given = [n for n in ("positions", "picture_tokens") if getattr(options, n) is not None]
    for name in (*numbers, *given):
        if getattr(options, name) < 1:
            raise PhiSightError(f"--{name.replace('_', '-')}: must be at least 1")
    if options.row_tokens < 0:
        raise PhiSightError(f"--row-tokens {options.row_tokens}: must be 0 or more")
    if options.workers is not None and not 0 <= options.workers <= 256:
        raise PhiSightError(f"--workers {options.workers}: must be from 0 to 256")
    return options


def positions_of(tokenizer: str) -> int:
    """How many tokens the base takes whose folder a tokenizer lies in; 0 if that is not said.
    Raises `PhiSightError` for a config.json that cannot be read."""
    place = Path(tokenizer) / "config.json"
    if not place.exists():
        return 0  # a tokenizer alone
    try:
        described = read_json(place, own=False)
        require(described, {"max_position_embeddings?": COUNT})
    except (OSError, PhiSightError) as error:
        raise PhiSightError(f"{place}: {error}; fetch it again, or name another folder") from error
    return int(described.get("max_position_embeddings", 0))


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit code 1 if anything was set aside."""
    started = time.monotonic()
    options = parse(arguments)
    folders = PictureFolders(options.images, options.unpacked)
    found = sources(options.data, folders, "give a file or folder of conversations")
    if options.vision:
        tower = measure_tower(options.vision, options.feature_pooling)
    else:
        tokens = -(-options.tokens_per_image // options.feature_pooling**2)
        tower = Tower((tokens, options.feature_dim), None)
    tokenizer = load_tokenizer(options.tokenizer)
    chat_format = ChatFormat.from_tokenizer(tokenizer, options.picture_tokens or tower.shape[0])
    positions = options.positions or positions_of(tokenizer.name_or_path)
    limits = Limits(options.max_text_tokens, options.row_tokens, positions)
    bytes_read = sum(size_of(source.path) for source in found)
    workers = options.workers
    if workers is None:
        workers = 0 if bytes_read < SMALL_FILE else os.cpu_count() or 1
    surveyed = survey(
        found,
        folders if options.images or any(source.holds_pictures for source in found) else None,
        chat_format,
        options.pictures,
        workers,
        limits,
    )
    tally = surveyed.tally
    usable = tally.distinct("pictures") - len(surveyed.bad_pictures)
    plan = StoragePlan(Path(options.features), max(0, usable), tower.shape, options.feature_storage)
    for source in found:
        print(f"{printable(source.path)}: {size(size_of(source.path))}")
    print("\n".join(Report(found, surveyed, tower, plan, limits).lines()))
    print_set_aside(tally.set_aside)
    if options.quarantine:
        write_quarantine(options.quarantine, tally.set_aside)
    print(cost(time.monotonic() - started, surveyed))
    return 1 if tally.set_aside else 0


def size_of(path: Path) -> int:
    """Bytes of a file, or of the files below a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(below.stat().st_size for below in path.rglob("*") if below.is_file())


def print_set_aside(entries: list[Quarantined]) -> None:
    """The first of them; where they stand, their ids and the reasons are of unknown origin."""
    for entry in entries[:SHOWN]:
        where, reason = (printable(text, REASON_SHOWN) for text in (entry.where, entry.reason))
        print(f"set aside: {where} (id {printable(entry.id) or '-'}): {reason}")
    if len(entries) > SHOWN:
        print(f"... and {len(entries) - SHOWN:,} more; --quarantine FILE writes all of them")


def cost(seconds: float, surveyed: Survey) -> str:
    """What the report itself took."""
    processor = sum(os.times()[:4])  # its own and its ended children's, in and outside the kernel
    line = f"took {seconds:.1f} s, {processor:.1f} CPU seconds; peak memory {size(memory.peak())}"
    if not surveyed.workers:
        return line
    return f"{line}, and {size(surveyed.tally.peak_memory)} in each of {surveyed.workers} processes"


if __name__ == "__main__":
    run_main(main)
