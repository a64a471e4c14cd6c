"""What the assistant's batching and its caches are worth: ratios within one run.

    python benchmarks/assistant.py              # the trained tiny run; needs `make demo` once

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
from data.dataset import Message
from errors import PhiSightError, run_main
from terminal.batch import answer_file

REPEATS = 5


def batched(run: str, rows: list[int], questions: int) -> dict[int, list[float]]:
    """Rows at once -> questions a second, each repeat; interleaved. No cache, models loaded."""
    held_out = Path(configs.default_config("tiny").held_out_questions)
    if not held_out.is_file():
        raise PhiSightError(f"{held_out}: no such file; run `make demo` first")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "questions.jsonl"
        images = Path(configs.default_config("tiny").images)
        lines = held_out.read_text().splitlines()[:questions]
        records = [json.loads(line) for line in lines]
        source.write_text(
            "".join(
                json.dumps({"prompt": r["text"], "image": str(images / r["image"])}) + "\n"
                for r in records
            )
        )
        rates: dict[int, list[float]] = {n: [] for n in rows}
        answers: dict[int, list[str]] = {}
        for repeat in range(REPEATS):
            for n in rows:
                assistant = Assistant.load(run, cache=False, max_rows=n)
                out = Path(folder) / f"answers-{n}-{repeat}.jsonl"
                started = time.perf_counter()
                answered, failed = answer_file(
                    source, out, lambda message, _: assistant.reply([message]), 2 * n
                )
                rates[n].append(answered / (time.perf_counter() - started))
                assistant.close()
                answers[n] = [json.loads(line).get("answer") for line in out.open()]
                if failed:
                    raise PhiSightError(f"{failed} questions failed; see {out}")
        for n in rows[1:]:
            same = sum(a == b for a, b in zip(answers[rows[0]], answers[n]))
            print(f"{n} at once: {same} of {len(records)} answers equal to those one by one")
        return rates


def first_tokens(assistant: Assistant, words: int) -> float:
    """Seconds to the first token of a second turn, after a first turn of so many words."""
    first = " ".join(["a big red star in the top left,"] * (words // 8)) + " how many objects?"
    messages: list[Message] = [user_message(first, [])]
    said = "".join(assistant.reply(messages, max_new_tokens=4)) or "one"
    messages += [answer_message(said), user_message("And what colour is it?", [])]
    reply = assistant.reply(messages, max_new_tokens=1)
    list(reply)
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
