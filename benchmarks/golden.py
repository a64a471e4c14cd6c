"""Golden outputs: what the project computes from fixed inputs, compared with what is committed.

    python -m benchmarks.golden                # ends with 1 where an output is another one
    python -m benchmarks.golden --update       # commit what comes out here

20 steps of training on a small picture world from fixed seeds, and the greedy answers of the run
that comes of them; how likely the text base finds fixed texts; what the CLIP sees in two pictures
and Whisper hears in a whistle. On the kind of machine that wrote benchmarks/golden.json, with its
versions of the libraries, every number is equal to the bit. Elsewhere sums are rounded otherwise,
and numbers may differ by `TOLERANCE`; answers may not.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import threads  # noqa: F401 (before torch is loaded)

import numpy as np
import torch
from PIL import Image

import config as configs
import train
from assistant.assistant import Assistant
from assistant.messages import user_message
from benchmarks.machine import describe_machine
from benchmarks.processes import ROOT
from benchmarks.suite.results import read_checked, write_json
from config import Config, Parser
from data.chat import ChatFormat
from data.dataset import load_questions
from data.world import world_fields, write_world
from documents import FINITE, LIST, TEXT
from errors import PhiSightError, run_main
from evaluation.questions import question_messages
from files import hash_files
from model.base import load_base
from model.vision import VisionTower, vision_of
from speech.recordings import SAMPLE_RATE
from speech.whisper import Speech
from training.options import RunOptions

FILE = ROOT / "benchmarks/golden.json"
REMEDY = "python -m benchmarks.golden --update commits new ones"
TOLERANCE = 5e-4  # of a number that is 1 or more, its share
STEPS, PICTURES, QUESTIONS, ANSWER_TOKENS = 20, 40, 12, 24
TEXTS = (
    "What is the colour of the circle?",
    "There is a red square at the top left and a blue star at the bottom right.",
    "How many objects are there? Three.",
)
SHOULD = {
    "machine": {"date": TEXT, "processor": TEXT, "instructions": LIST, "versions": {"*": TEXT}},
    "assets": {"*": TEXT},
    "losses": [FINITE],
    "text_base": {"*": FINITE},
    "clip": {"*": [FINITE]},
    "whisper": [FINITE],
    "answers": {"*": TEXT},
}


# -- what comes out --------------------------------------------------------------------------------


def golden_config(folder: Path) -> Config:
    """The tiny preset on a small world, in small steps, on one thread; writes the world."""
    write_world(folder / "world", pictures=PICTURES, held_out=3, seed=5, turns=4)
    return configs.replace(
        configs.default_config("tiny"),
        **world_fields(folder / "world"),
        features=str(folder / "features"),
        run=str(folder / "run"),
        batch_size=2,
        max_steps=STEPS,
        save_steps=STEPS,
        evaluate_steps=0,
        log_steps=1,
        device="cpu",
        threads=1,
    )


def outputs(folder: Path) -> dict[str, Any]:
    """All of it, computed in this process; `folder` is empty."""
    torch.set_num_threads(1)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # how the training goes
        config = golden_config(folder)
        train.train(config, None, RunOptions())
    records = [
        json.loads(line)
        for line in (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    machine = describe_machine()
    kind = ("date", "processor", "instructions", "versions")
    return {
        "machine": {name: machine[name] for name in kind},
        "assets": assets_of(config),
        "losses": [record["loss"] for record in records if record["kind"] == "train"],
        "text_base": text_base(config),
        "clip": seen(config),
        "whisper": heard(config),
        "answers": dict(answers(config)),
    }


def assets_of(config: Config) -> dict[str, str]:
    """Fingerprints of what the outputs depend on beside the code; of the world, its content."""
    world, base = hashlib.sha256(), Path(config.base)
    for name in (*config.data, config.held_out_questions):
        world.update(Path(name).read_bytes())
    for path in sorted(Path(config.images[0]).iterdir()):
        world.update(Image.open(path).tobytes())
    return {
        "base": hash_files(sorted(base.glob("*.json")) + sorted(base.glob("*.safetensors")))[:16],
        "clip": vision_of(config).key,
        "whisper": hash_files([Path(config.speech)])[:16],
        "world": world.hexdigest()[:16],
    }


@torch.no_grad()
def text_base(config: Config) -> dict[str, float]:
    """Text -> nats a token, by the base alone in 4 bits."""
    base = load_base(config.base, None, torch.float32, "cpu", config.quantization)
    chat_format = ChatFormat.from_tokenizer(base.tokenizer, 1)
    losses = {}
    for text in TEXTS:
        ids = torch.tensor(chat_format.encode_text(text))
        embeddings = base.model.model.embed_tokens(ids[None])
        states = base.model.model(embeddings, torch.arange(len(ids))[None], [len(ids)])
        logits = base.model.lm_head(states)[0, :-1]
        losses[text] = torch.nn.functional.cross_entropy(logits, ids[1:]).item()
    return losses


def seen(config: Config) -> dict[str, list[float]]:
    """Picture -> the norm of its features, and the first three of them."""
    tower = VisionTower(vision_of(config))
    found = {}
    for path in sorted(Path(config.images[0]).iterdir())[:2]:
        features = tower([Image.open(path).convert("RGB")])[0]
        found[path.name] = [features.norm().item(), *features[0, :3].tolist()]
    return found


@torch.no_grad()
def heard(config: Config) -> list[float]:
    """The norm of Whisper's states for a rising whistle, and the first three of them."""
    import whisper

    model = Speech.load(config.speech).model
    times = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    sound = (0.3 * np.sin(2 * np.pi * (400 + 300 * times) * times)).astype(np.float32)
    mels = whisper.log_mel_spectrogram(whisper.pad_or_trim(sound), model.dims.n_mels)
    states = model.embed_audio(mels[None])[0]
    return [states.norm().item(), *states[0, :3].tolist()]


def answers(config: Config) -> Iterator[tuple[str, str]]:
    """Question, with its picture, -> greedy answer of the run."""
    assistant = Assistant.load(config.run, threads=1)
    questions = load_questions(config.held_out_questions)
    try:
        for question in questions[:: max(1, len(questions) // QUESTIONS)]:
            content = (Path(config.images[0]) / question.image).read_bytes()
            reply = assistant.reply(
                question_messages(question), ANSWER_TOKENS, pictures={question.image: content}
            )
            yield f"{question.image}: {question.text}", "".join(reply)
        reply = assistant.reply([user_message(TEXTS[0], [])], ANSWER_TOKENS)
        yield TEXTS[0], "".join(reply)
    finally:
        assistant.close()


# -- compared --------------------------------------------------------------------------------------


def need_same_assets(committed: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise `PhiSightError` where the outputs cannot be those that are committed."""
    names = committed["assets"].keys() | found["assets"].keys()
    both = (committed["assets"], found["assets"])
    changed = sorted(name for name in names if both[0].get(name) != both[1].get(name))
    if changed:
        raise PhiSightError(
            f"{FILE.name}: {', '.join(changed)}: not those it was made of; {REMEDY}"
        )


def is_same_kind(committed: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether numbers have to be equal to the bit: one processor, one set of libraries."""
    kind = ("processor", "instructions", "versions")
    return all(committed["machine"][name] == found["machine"][name] for name in kind)


def differences(committed: Any, found: Any, tolerance: float, path: str = "") -> Iterator[str]:
    """Where two outputs differ: numbers by more than `tolerance`, of numbers over 1 as a share."""
    if isinstance(committed, Mapping) and isinstance(found, Mapping):
        for name in [*committed, *(name for name in found if name not in committed)]:
            where = f"{path}.{name}".lstrip(".")
            if name not in found or name not in committed:
                yield f"{where}: {'committed' if name in committed else 'here'} alone"
            else:
                yield from differences(committed[name], found[name], tolerance, where)
    elif isinstance(committed, list) and isinstance(found, list):
        if len(committed) != len(found):
            yield f"{path}: {len(committed)} committed, {len(found)} here"
        for number, (one, other) in enumerate(zip(committed, found)):
            yield from differences(one, other, tolerance, f"{path}[{number}]")
    elif isinstance(committed, float) and isinstance(found, float):
        apart = abs(committed - found)
        if not apart <= tolerance * max(1.0, abs(committed)):
            yield f"{path}: {committed!r} committed, {found!r} here, {apart:.2g} apart"
    elif committed != found:
        yield f"{path}: {committed!r} committed, {found!r} here"


def compare(committed: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """All differences between outputs. Raises `PhiSightError` where the assets are others."""
    need_same_assets(committed, found)
    tolerance = 0.0 if is_same_kind(committed, found) else TOLERANCE
    return list(differences(without_origin(committed), without_origin(found), tolerance))


def without_origin(outputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: one for name, one in outputs.items() if name not in ("machine", "assets")}


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="golden.py", description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="commit what comes out here")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="phisight-golden-") as folder:
        found = json.loads(json.dumps(outputs(Path(folder))))
    if options.update:
        write_json(FILE, found)
        print(f"{FILE}: updated")
        return 0
    committed = read_checked(FILE, SHOULD, REMEDY)
    different = compare(committed, found)
    for line in different[:20]:
        print(line)
    how = "equal to the bit" if is_same_kind(committed, found) else f"within {TOLERANCE}"
    print(
        f"{len(different)} outputs are not {how}; if that is meant: {REMEDY}"
        if different
        else f"golden outputs: {how}"
    )
    return 1 if different else 0


if __name__ == "__main__":
    run_main(main)
