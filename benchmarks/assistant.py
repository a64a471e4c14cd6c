"""What the assistant's batching and its caches are worth: ratios within one run.

    python -m benchmarks.assistant              # the trained tiny run; needs `make demo` once

Two tables: a file of questions answered one by one and side by side (`infer.py --batch`), and the
time to the first token of a second turn by the length of the first, with and without the keys and
values of the first turn kept.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import config as configs
from assistant.assistant import Assistant
from assistant.messages import answer_message, user_message
from data.dataset import Message, load_questions
from errors import PhiSightError, run_main
from paths import need_file
from terminal.batch import answer_file

REPEATS = 5


def write_questions(path: Path, count: int) -> int:
    """The first held-out questions in the form of `infer.py --batch`; how many there are."""
    config = configs.default_config("tiny")
    held_out = need_file(config.held_out_questions, "held-out questions", "run `make demo` first")
    questions = load_questions(held_out)[:count]
    lines = [
        json.dumps({"prompt": question.text, "image": str(Path(config.images[0]) / question.image)})
        for question in questions
    ]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(lines)


def answer_all(run: str, source: Path, out: Path, rows: int) -> tuple[float, list[str]]:
    """Questions a second with `rows` at once, and the answers. No cache, the model loaded."""
    assistant = Assistant.load(run, cache=False, max_rows=rows)
    started = time.perf_counter()
    answered, failed = answer_file(
        source, out, lambda message, _: assistant.reply([message]), 2 * rows
    )
    rate = answered / (time.perf_counter() - started)
    assistant.close()
    if failed:
        raise PhiSightError(f"{failed} questions failed; see {out}")
    return rate, [
        json.loads(line)["answer"] for line in out.read_text(encoding="utf-8").splitlines()
    ]


def batched(run: str, rows: list[int], count: int) -> dict[int, list[float]]:
    """Rows at once -> questions a second, each repeat; interleaved."""
    rates: dict[int, list[float]] = {n: [] for n in rows}
    answers: dict[int, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "questions.jsonl"
        asked = write_questions(source, count)
        for repeat in range(REPEATS):
            for n in rows:
                out = Path(folder) / f"answers-{n}-{repeat}.jsonl"
                rate, answers[n] = answer_all(run, source, out, n)
                rates[n].append(rate)
    for n in rows[1:]:
        same = sum(a == b for a, b in zip(answers[rows[0]], answers[n]))
        print(f"{n} at once: {same} of {asked} answers equal to those one by one")
    return rates


def first_tokens(assistant: Assistant, words: int) -> float:
    """Seconds to the first token of a second turn, after a first turn of so many words."""
    first = " ".join(["a big red star in the top left,"] * (words // 8)) + " how many objects?"
    messages: list[Message] = [user_message(first, [])]
    answer = "".join(assistant.reply(messages, max_new_tokens=4)) or "one"
    messages += [answer_message(answer), user_message("And what colour is it?", [])]
    reply = assistant.reply(messages, max_new_tokens=1)
    list(reply)
    assert reply.seconds_to_first_token is not None  # it has been read to its end
    return reply.seconds_to_first_token


def main() -> int:
    parser = configs.Parser(prog="benchmarks/assistant.py", description=__doc__.splitlines()[0])
    parser.add_argument("--run", default=configs.default_config("tiny").run)
    parser.add_argument("--questions", type=int, default=200)
    options = parser.parse_args()
    rates = batched(options.run, [1, 4, 16], options.questions)
    base = statistics.median(rates[1])
    print(f"{'at once':>8}{'questions/s':>14}{'ratio':>8}{'spread':>16}")
    for n, seen in rates.items():
        median = statistics.median(seen)
        print(f"{n:>8}{median:>14.1f}{median / base:>8.2f}{min(seen):>8.1f}-{max(seen):<.1f}")

    kept, fresh = Assistant.load(options.run), Assistant.load(options.run, cache=False)
    print(f"{'words in the first turn':>24}{'kept, ms':>10}{'not kept, ms':>14}")
    for words in (8, 64, 256, 512):
        times = [
            (first_tokens(kept, words + 8 * n), first_tokens(fresh, words + 8 * n))
            for n in range(REPEATS)
        ]  # another first turn each time: nothing is remembered
        with_cache, without = (statistics.median(column) * 1000 for column in zip(*times))
        print(f"{words:>24}{with_cache:>10.1f}{without:>14.1f}")
    kept.close()
    fresh.close()
    return 0


if __name__ == "__main__":
    run_main(main)
