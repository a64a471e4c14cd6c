"""One assistant behind every door: its caches, its filter, the terminal, and answering a file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy
import pytest
import runs
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from reading import read_all

import infer
from assistant.answer import Answer
from assistant.assistant import Assistant
from assistant.caches import LeastRecentlyUsed
from assistant.filter import WordFilter
from assistant.messages import answer_message, user_message
from assistant.refusals import Blocked
from assistant.sampling import Sampling
from errors import PhiSightError
from speech.recordings import read_audio
from speech.voice import Voice, write_wav
from terminal.batch import answer_file, parse_line
from terminal.chat import Terminal

LIMIT = 8


@pytest.fixture(scope="module")
def assistant():
    """Of its own, since its counts are looked at."""
    made = runs.own_assistant()
    yield made
    made.close()


def pictures() -> list[str]:
    return [str(path) for path in sorted((runs.world() / "images").glob("*.png"))]


def say(assistant: Assistant, *asked: str, images: list[str] | None = None, **options) -> str:
    messages = [user_message(asked[0], pictures()[:1] if images is None else images)]
    for said, question in zip(asked[1::2], asked[2::2]):
        messages += [answer_message(said), user_message(question, [])]
    return "".join(assistant.reply(messages, **{"max_new_tokens": LIMIT} | options))


# -- caches ---------------------------------------------------------------------------------------


def test_a_picture_is_looked_at_once_whatever_it_is_called(assistant, tmp_path, monkeypatch):
    looked = []
    tower = assistant.features
    monkeypatch.setattr(assistant, "features", lambda p: looked.append(len(p)) or tower(p))
    copied = tmp_path / "other name.png"
    copied.write_bytes(Path(pictures()[5]).read_bytes())
    first = say(assistant, "What is it?", images=[pictures()[5]])
    before = assistant.statistics()["feature_cache_hits"]
    assert say(assistant, "What is it?", images=[str(copied)]) == first
    assert say(assistant, "What is it? Say.", images=[str(copied)]) is not None
    assert looked == [1] and assistant.statistics()["feature_cache_hits"] == before + 2


def test_a_picture_in_memory_is_the_picture_in_its_file(assistant):
    path = pictures()[0]
    data = Path(path).read_bytes()
    with Image.open(path) as opened:
        decoded = opened.convert("RGB")
    expected = say(assistant, "Describe the picture.", images=[path])
    for given_picture in (data, decoded):
        reply = assistant.reply(
            [user_message("Describe the picture.", ["x"])], LIMIT, pictures={"x": given_picture}
        )
        assert "".join(reply) == expected


def test_bytes_that_are_no_picture_are_refused(assistant):
    with pytest.raises(PhiSightError, match="x: not a picture"):
        assistant.reply([user_message("What?", ["x"])], pictures={"x": b"no picture"})


def test_the_same_greedy_question_is_answered_from_memory(assistant):
    first = assistant.reply([user_message("How many are there?", pictures()[:1])], LIMIT)
    text = "".join(first)
    generated = assistant.statistics()["tokens_generated"]
    again = assistant.reply([user_message("How many are there?", pictures()[:1])], LIMIT)
    assert "".join(again) == text and again.cached and not first.cached
    assert again.finish_reason == first.finish_reason
    assert again.completion_tokens == first.completion_tokens
    assert assistant.statistics()["tokens_generated"] == generated
    for other in ({"max_new_tokens": 3}, {"sampling": Sampling(1.0), "seed": 1}, {"stop": ["zz"]}):
        reply = assistant.reply(
            [user_message("How many are there?", pictures()[:1])],
            **{"max_new_tokens": LIMIT} | other,
        )
        "".join(reply)
        assert not reply.cached, other


def test_an_answer_that_was_cut_off_is_not_remembered(assistant):
    reply = assistant.reply([user_message("Cut me off.", [])], 200)
    reply.cancel()
    list(reply)
    assert reply.finish_reason == "cancelled"
    assert not assistant.reply([user_message("Cut me off.", [])], 200).cached


def test_without_caches_the_answers_are_the_same_and_nothing_is_kept(assistant):
    plain = Assistant.load(runs.finished_run(), cache=False)
    for _ in range(2):
        assert say(plain, "What is it?", "one", "And where?") == say(
            assistant, "What is it?", "one", "And where?"
        )
    kept = {name: value for name, value in plain.statistics().items() if "cache" in name}
    assert all(not value for name, value in kept.items() if "misses" not in name)
    plain.close()


def test_a_second_turn_reuses_the_first(assistant):
    asked = [user_message("Describe the picture in detail.", pictures()[:1])]
    first = assistant.reply(asked, LIMIT)
    said = "".join(first) or "one"
    second = assistant.reply([*asked, answer_message(said), user_message("And where?", [])], LIMIT)
    "".join(second)
    assert second.reused_tokens >= first.prompt_tokens


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), max_size=30))
def test_a_cache_keeps_to_its_size_and_forgets_the_oldest(puts):
    cache = LeastRecentlyUsed(8, size_of=lambda value: value)
    order: dict[int, int] = {}
    for key, size in puts:
        cache.put(key, size)
        order.pop(key, None)
        order[key] = size
        while sum(order.values()) > 8:
            order.pop(next(iter(order)))
        assert cache.size == sum(order.values()) <= 8
    for key in range(6):
        assert cache.get(key) == order.get(key)


# -- one life of an answer -----------------------------------------------------------------------


def test_an_answer_is_asked_started_and_told_without_a_waiting_thread(assistant):
    messages = [user_message("What is on the left?", pictures()[2:3])]
    answer = assistant.ask(messages, LIMIT)
    assert answer.finish_reason is None and answer.pictures
    pieces, ended = [], threading.Event()

    def heard(piece: str | None) -> None:
        pieces.append(piece)
        if piece is None:
            ended.set()

    answer.subscribe(heard)
    assistant.start(answer)
    assert ended.wait(60) and pieces.pop() is None
    assert not answer.pictures  # their bytes are not kept
    assert "".join(pieces) == say(assistant, "What is on the left?", images=pictures()[2:3])
    again = assistant.ask(messages, LIMIT)
    assistant.start(again)
    assert again.cached and "".join(again) == "".join(pieces)


def test_whoever_leaves_while_pictures_are_encoded_never_gets_to_the_engine(assistant, monkeypatch):
    names = pictures()[6:8]
    answer = assistant.ask([user_message("Which?", names)], LIMIT)
    encoded, tower = [], assistant.features
    monkeypatch.setattr("assistant.assistant.TOWER_PICTURES", 1)

    def leaves(shown):
        encoded.append(len(shown))
        answer.cancel()
        return tower(shown)

    monkeypatch.setattr(assistant, "features", leaves)
    before = assistant.statistics()["prompt_tokens"]
    assistant.start(answer)
    assert list(answer) == [] and answer.finish_reason == "cancelled"
    assert encoded == [1] and assistant.statistics()["prompt_tokens"] == before


@pytest.fixture
def eyes():
    """An assistant whose batches of pictures wait to be let through, and what they were."""
    made = Assistant.load(runs.finished_run(), cache=False)
    tower, looked, go_on = made.features, [], threading.Semaphore(0)

    def features(shown):
        looked.append(len(shown))
        assert go_on.acquire(timeout=60)
        return tower(shown)

    made.features = features
    yield made, looked, go_on
    made.close()


def begun(assistant: Assistant, count: int) -> tuple[Answer, threading.Thread]:
    answer = assistant.ask([user_message("Which?", pictures()[:count])], 2)
    thread = threading.Thread(target=assistant.start, args=(answer,), daemon=True)
    thread.start()
    return answer, thread


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_questions_with_many_pictures_take_turns_by_batch(eyes):
    assistant, looked, go_on = eyes
    many, _ = begun(assistant, 9)
    wait_for(lambda: looked == [4])
    one, _ = begun(assistant, 1)
    wait_for(lambda: len(assistant._eyes._asking) == 2)
    for _ in range(4):
        go_on.release()
    for answer in (one, many):
        answer.wait()
    assert looked == [4, 1, 4, 1]
    assert many.image_features.shape[0] == 9


def test_whoever_leaves_while_waiting_for_the_eyes_is_gone_at_once(eyes):
    assistant, looked, go_on = eyes
    first, _ = begun(assistant, 1)
    wait_for(lambda: looked == [1])
    waiting, thread = begun(assistant, 2)
    last, _ = begun(assistant, 3)
    wait_for(lambda: len(assistant._eyes._asking) == 3)
    waiting.cancel()
    thread.join(60)  # although the first one's picture is still being looked at
    assert not thread.is_alive() and waiting.finish_reason == "cancelled"
    for _ in range(2):
        go_on.release()
    for answer in (first, last):
        answer.wait()
    assert looked == [1, 3]


def test_a_picture_that_cannot_be_used_ends_its_answer(assistant):
    answer = assistant.ask([user_message("What?", ["x"])], pictures={"x": b"no picture"})
    told = []
    answer.subscribe(told.append)
    with pytest.raises(PhiSightError, match="x: not a picture"):
        assistant.start(answer)
    assert told == [None] and answer.finish_reason == "failed"
    assert isinstance(answer.error, PhiSightError)


def test_what_can_never_fit_into_memory_is_refused_when_it_is_asked():
    small = Assistant.load(runs.finished_run(), kv_bytes=2**20)
    messages = [user_message("Where?", ["not opened.png"])]
    with pytest.raises(
        PhiSightError, match=r"tokens .* 1000 take .* MiB .* limit of 1.0; .*memory"
    ):
        small.ask(messages, 1000)
    assert say(small, "Where?") == say(runs.assistant(), "Where?")
    small.close()


# -- how an answer ends ---------------------------------------------------------------------------


def test_stop_strings_end_an_answer(assistant):
    whole = say(assistant, "Describe the picture.", max_new_tokens=12)
    mark = whole[len(whole) // 2 :][:2]
    assert whole.strip() and mark
    reply = assistant.reply(
        [user_message("Describe the picture.", pictures()[:1])], 12, stop=[mark]
    )
    assert "".join(reply) == whole[: whole.index(mark)] and reply.finish_reason == "stop"


def test_the_filter_refuses_questions_and_ends_answers():
    plain = runs.assistant()
    said = say(plain, "Describe the picture.", max_new_tokens=12)
    word = max(said.split(), key=len)
    filtered = Assistant.load(runs.finished_run(), content_filter=WordFilter([word, "forbidden"]))
    with pytest.raises(Blocked, match="content filter"):
        say(filtered, "Say something FORBIDDEN.")
    reply = filtered.reply([user_message("Describe the picture.", pictures()[:1])], 12)
    shown = "".join(reply)
    assert reply.finish_reason == "filtered" and word not in shown and said.startswith(shown)
    filtered.close()


def test_many_threads_get_the_answers_of_one(assistant):
    questions = [f"What is number {number}?" for number in range(12)]
    plain = Assistant.load(runs.finished_run(), cache=False, max_rows=5)
    expected = [say(plain, question) for question in questions]
    answers: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda n=n: answers.update({n: say(plain, questions[n])}))
        for n in range(len(questions))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[n] for n in range(len(questions))] == expected
    plain.close()


def test_a_conversation_must_end_with_a_question(assistant):
    for messages in ([], [user_message("What?", []), answer_message("one")]):
        with pytest.raises(PhiSightError, match="end with the user's turn"):
            assistant.reply(messages)


# -- the terminal ---------------------------------------------------------------------------------


class Typed:
    """Lines as a person types them; an exception is raised in the place of its line."""

    def __init__(self, assistant: Assistant, *lines: object, listen=None) -> None:
        self.lines, self.out = iter(lines), ""
        self.terminal = Terminal(
            lambda messages: assistant.reply(messages, LIMIT), listen, self.read, self.write
        )

    def read(self, prompt: str) -> str:
        line = next(self.lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    def write(self, text: str = "", end: str = "\n", flush: bool = False) -> None:
        self.out += text + end

    def run(self) -> str:
        assert self.terminal.run() == 0
        return self.out


def test_a_chat_remembers_what_was_said_and_shown(assistant, tmp_path, monkeypatch):
    path, saved = Path(pictures()[0]).name, tmp_path / "said.json"
    monkeypatch.chdir(runs.world() / "images")
    typed = Typed(assistant, f"/image {path}", "What is it?", "Where?", f"/save {saved}", "/quit")
    out = typed.run()
    first = say(assistant, "What is it?", images=[path])
    second = say(assistant, "What is it?", first, "Where?", images=[path])
    assert first.strip() and f"{first}\n{second}\n" in out
    conversations, quarantined = read_all(saved)  # the data reader takes what was saved
    assert not quarantined and conversations[0].images == (path,)
    assert len(conversations[0].messages) == 4


def test_a_chat_goes_on_after_mistakes(assistant, tmp_path):
    there = tmp_path / "there.json"
    there.write_text("mine")
    out = Typed(
        assistant,
        "/image nope.png",
        "/nonsense",
        "",
        "/save",
        KeyboardInterrupt(),
        "/audio x.wav",
        "How many?",
        f"/save {there}",
        "/clear",
        "/help",
    ).run()
    for told in (
        "nope.png: no such file",
        "/nonsense: no such command",
        "nothing was said",
        "/quit or Ctrl-D leaves",
        "no speech model",
        "exists already",
        "a new conversation",
        "/image PATH",
    ):
        assert told in out
    assert say(assistant, "How many?", images=[]) in out and there.read_text() == "mine"


def test_ctrl_c_stops_the_answer_and_not_the_program(assistant):
    replies = []

    def ask(messages):
        replies.append(assistant.reply(messages, 500))
        return replies[-1]

    typed = Typed(assistant, "Go on.", "How many?")
    typed.terminal.ask = ask
    write = typed.write

    def interrupt_first(text: str = "", end: str = "\n", flush: bool = False) -> None:
        write(text, end, flush)
        if flush and len(replies) == 1:
            raise KeyboardInterrupt

    typed.terminal.write = interrupt_first
    out = typed.run()
    assert "[stopped]" in out and len(replies) == 2
    list(replies[0])
    assert replies[0].finish_reason in ("cancelled", "stop")
    assert [m.role for m in typed.terminal.messages] == ["user", "assistant"] * 2


def test_a_question_may_be_spoken(assistant):
    out = Typed(assistant, "/audio q.wav", listen=lambda path: f"What is {path[0]}?").run()
    assert "heard: What is q?" in out and say(assistant, "What is q?", images=[]) in out


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng speaks the question")
def test_a_recording_is_asked_and_the_answer_is_spoken(tmp_path, capsys):
    question, answer = tmp_path / "question.wav", tmp_path / "answer.wav"
    write_wav(question, *Voice.load().speak("How many objects are there?"))
    asked = [
        "--run",
        str(runs.finished_run()),
        "--image",
        pictures()[0],
        "--max-new-tokens",
        "8",
        "--speech",
        str(runs.ROOT / "assets/tiny/whisper/tiny.pt"),
    ]
    assert infer.main([*asked, "--audio", str(question), "--speak", str(answer), "--json"]) == 0
    told = capsys.readouterr()
    assert "heard: How many objects are there?" in told.err
    said = json.loads(told.out)
    assert said["prompt"] == "How many objects are there?"
    assert said["answer"] == say(runs.assistant(), said["prompt"], images=[pictures()[0]])
    assert not said["answer"].strip() or len(read_audio(answer)) > 1000
    with pytest.raises(PhiSightError, match="no speech heard"):
        write_wav(question, numpy.zeros(16000, numpy.float32), 16000)
        infer.main([*asked, "--audio", str(question)])


def test_chat_as_a_program(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "infer.py",
            "--run",
            str(runs.finished_run()),
            "--chat",
            "--max-new-tokens",
            "4",
        ],
        cwd=runs.ROOT,
        env=runs.environment(),
        input="How many?\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 and done.stderr == "", done
    assert done.stdout.startswith("Ask a question") and len(done.stdout.splitlines()) >= 2


# -- a file of questions --------------------------------------------------------------------------


def write_lines(path: Path, records: list[object]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def batch(source: Path, out: Path, *more: object) -> int:
    return infer.main(
        [
            "--run",
            str(runs.finished_run()),
            "--batch",
            str(source),
            "--out",
            str(out),
            "--max-new-tokens",
            str(LIMIT),
            *map(str, more),
        ]
    )


def records_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_bad_line_does_not_stop_the_rest(tmp_path, capsys):
    path = pictures()[0]
    source = write_lines(
        tmp_path / "in.jsonl",
        [
            {"id": "a", "prompt": "What is it?", "image": path},
            "no JSON",
            "",
            {"prompt": "What is it?", "image": "nope.png"},
            {"prompt": 3},
            "[1]",
            "[" * 10_000,
            {"prompt": "<image> and <image>: same?", "images": [path, pictures()[1]]},
            {"prompt": "<image> What?", "images": []},
            {"prompt": "How many?"},
        ],
    )
    out = tmp_path / "out.jsonl"
    assert batch(source, out) == 1
    assert "3 answered, 6 failed" in capsys.readouterr().out
    found = records_of(out)
    assert [r["line"] for r in found] == [1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert [r["line"] for r in found if "answer" in r] == [1, 8, 10]
    assert found[0]["id"] == "a"
    assert found[0]["answer"] == say(runs.assistant(), "What is it?", images=[path])
    reasons = {r["line"]: r["error"] for r in found if "error" in r}
    for line, reason in (
        (2, "no JSON"),
        (4, "nope.png: no such file"),
        (5, "no text"),
        (6, "no JSON object"),
        (7, "no JSON"),
        (9, "1 <image> places and 0"),
    ):
        assert reason in reasons[line]
    assert batch(source, out) == 1 and records_of(out) == found  # nothing is asked twice
    assert "0 answered, 6 failed; --retry-failed asks these again" in capsys.readouterr().out


@pytest.mark.parametrize("cut", ["whole lines", "half a line"])
def test_a_batch_goes_on_where_it_was(tmp_path, cut):
    source = write_lines(
        tmp_path / "in.jsonl",
        [{"prompt": f"What is number {n}?", "image": pictures()[n]} for n in range(6)],
    )
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    sampling = ("--temperature", 2, "--seed", 5)
    assert batch(source, whole, *sampling) == 0
    lines = whole.read_text().splitlines(keepends=True)
    resumed.write_text("".join(lines[:3]) + (lines[3][:20] if cut == "half a line" else ""))
    assert batch(source, resumed, *sampling) == 0
    assert resumed.read_text() == whole.read_text()
    assert len({record["answer"] for record in records_of(whole)}) > 1


def test_answers_to_other_questions_are_left_alone(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "How many?"}])
    out = tmp_path / "out.jsonl"
    assert batch(source, out) == 0
    write_lines(source, [{"prompt": "Where?"}])
    before = out.read_bytes()
    with pytest.raises(PhiSightError, match="line 1 answers another question"):
        batch(source, out)
    assert out.read_bytes() == before
    out.write_text("my own file\n")
    with pytest.raises(PhiSightError, match="was not written by this command"):
        batch(source, out)
    assert out.read_text() == "my own file\n"


def test_one_writer_at_a_time(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "How many?"}])
    out = tmp_path / "out.jsonl"

    def ask(message, line):
        with pytest.raises(PhiSightError, match="another process writes it"):
            answer_file(source, out, ask, 1)
        return runs.assistant().reply([message], 2)

    assert answer_file(source, out, ask, 1) == (1, 0)


@given(st.binary(max_size=80))
def test_any_line_is_asked_or_has_its_error(line):
    asked = parse_line(3, line)
    assert (asked.message is None) == (asked.error is not None)
    assert asked.error is None or asked.error.startswith("line 3: ")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--batch", "a.jsonl"], "--batch and --out belong together"),
        (["--prompt", "a", "--chat"], "give one of"),
        (["--chat", "--image", "a.png"], "belong to one question"),
        (["--prompt", "a", "--denoise"], "--denoise: is about a recording"),
        (["--prompt", "a", "--language", "en"], "--language: is about a recording"),
        (["--prompt", "a", "--stop", ""], "--stop: is empty"),
        (["--prompt", "a", "--repetition-penalty", "0"], "--repetition-penalty 0.0"),
        (["--prompt", "a", "--no-repeat-ngram-size", "65"], "--no-repeat-ngram-size 65: must be"),
        (["--prompt", "a", "--content-filter", "nope.txt"], "nope.txt"),
        (["--audio", "nope.wav"], "nope.wav"),
        (["--chat", "--speak", "a.wav"], "belong to one question"),
        (["--prompt", "a", "--speak", "no/folder/a.wav"], "its folder does not exist"),
        (["--prompt", "a", "--kv-memory", "0"], "--kv-memory: must be at least 1"),
        (["--batch", "nope.jsonl", "--out", "x.jsonl"], "nope.jsonl: No such file"),
    ],
)
def test_what_the_assistant_refuses(arguments, reason, tmp_path, monkeypatch):
    run = str(runs.finished_run())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PhiSightError) as caught:
        infer.main(["--run", run, *arguments])
    assert reason in str(caught.value) and "\n" not in str(caught.value)
