"""GGUF: interpreters that are none, tokenizers that llama.cpp would end itself over, full disks."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import random_model
import runs
from safetensors import SafetensorError

from errors import PhiSightError
from exports import measure
from exports.folder import new_folder
from exports.llama_cpp import asked, eyes, language, reference
from exports.llama_cpp.vocabulary import Kind, vocabulary_of
from model.families import PHI3

TINY = json.loads((Path(runs.BASE) / "tokenizer.json").read_text(encoding="utf-8"))
PIECE = next(piece for piece in TINY["model"]["vocab"] if piece.isalpha() and len(piece) > 1)


def script(folder: Path, body: str) -> Path:
    path = folder / "program"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


# -- interpreters ---------------------------------------------------------------------------------


def test_an_interpreter_is_found_from_another_folder(tmp_path, monkeypatch):
    """llama.cpp is started in the project's folder, not where the path was typed."""
    program = script(tmp_path, f'exec {sys.executable} "$@"')
    monkeypatch.chdir(tmp_path)
    for typed in ("./program", "program", str(program)):
        assert asked.find_llama(typed, "json") == str(program)
    assert asked.find_llama("python3", "json") == "python3"  # the name of a command


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "exit 0",
            "program: is not a Python interpreter; give the file",
        ),
        (r"printf '\377\376'; exit 0", "is not a Python"),
        (r"printf '\377\033[2J' >&2; exit 1", r"program: .*x1b\[2J; install"),
        ("kill -9 $$", "program: exit code -9; install"),
        ("exec sleep 9", "program: did not import llama_cpp within 0.5 s; give the file"),
    ],
)
def test_what_is_no_interpreter_is_told(body, message, tmp_path, monkeypatch):
    monkeypatch.setattr(asked, "LONGEST_IMPORT", 0.5)
    with pytest.raises(PhiSightError, match=message) as told:
        asked.find_llama(str(script(tmp_path, body)))
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize(
    "body",
    [
        "exit 0",
        'echo nothing > "$4"',
        f"exec {sys.executable} -c 'import numpy, sys; numpy.savez(sys.argv[1], a=1)' \"$4\"",
    ],
)
def test_what_cannot_be_read_of_llama_cpp_is_told(body, tmp_path):
    program = script(tmp_path, body)
    with pytest.raises(PhiSightError, match="what it said cannot be read .*program is the interp"):
        asked.ask(str(program), asked.Asked(tmp_path / "a.gguf", None, 0))


def test_why_llama_cpp_ended_itself_is_not_buried(tmp_path):
    """It lets a debugger write what it knows after its reason, unless it is told not to."""
    program = script(
        tmp_path,
        "echo 'GGML_ASSERT(it holds) failed' >&2\n"
        'test -n "$GGML_NO_BACKTRACE" || echo "360 libc-start.c: No such file" >&2\nkill -ABRT $$',
    )
    with pytest.raises(PhiSightError, match=r"llama.cpp: GGML_ASSERT\(it holds\) failed; if its"):
        asked.run_llama(str(program))


# -- tokenizers -----------------------------------------------------------------------------------


def with_marks(*marks: tuple[int, str, bool]) -> dict[str, Any]:
    content = copy.deepcopy(TINY)
    content["added_tokens"] += [
        {"id": number, "content": text, "special": special} for number, text, special in marks
    ]
    return content


def test_no_two_tokens_are_equal():
    """llama.cpp ends itself over two. A piece that is added once more keeps its id, as
    `tokenizers` has it, and what has no token gets a name that none has."""
    vocabulary = vocabulary_of(
        with_marks((1280, PIECE, False), (1282, "[PAD1281]", True), (1283, "<new>", True)), 1290
    )
    assert len(set(vocabulary.tokens)) == len(vocabulary.tokens) == 1290
    known = TINY["model"]["vocab"][PIECE]
    assert vocabulary.tokens[known] == PIECE and vocabulary.kinds[known] == Kind.USER_DEFINED
    assert vocabulary.kinds[1280] == vocabulary.kinds[1281] == Kind.UNUSED
    assert vocabulary.tokens[1282:1284] == ["[PAD1281]", "<new>"]


def test_an_id_without_an_embedding_is_told():
    with pytest.raises(PhiSightError, match="has the id 1300 and the model 1290 embedd"):
        vocabulary_of(with_marks((1300, "<new>", True)), 1290)


# -- disks and pictures ---------------------------------------------------------------------------


def test_a_full_folder_for_temporary_files_is_named(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(numpy, "savez", full)
    with pytest.raises(PhiSightError, match="phisight-.*: not written .No space.*with TMPDIR"):
        asked.ask("python", asked.Asked(tmp_path / "a.gguf", None, 0))


def test_a_disk_that_fills_while_safetensors_writes_is_told(tmp_path):
    """It raises what is no OSError."""
    with pytest.raises(PhiSightError, match="out: not written .*No space left.*; make room"):
        with new_folder(tmp_path / "out"):
            raise SafetensorError("I/O error: No space left on device (os error 28)")
    assert [*tmp_path.iterdir()] == []


def test_pictures_that_are_scaled_otherwise_are_refused():
    spec = runs.assistant().parts.vision
    for scale, match in ((1 / 127.5, "by 0.00784314, and llama.cpp"), (None, "not normalised")):
        preparation = dataclasses.replace(spec.preparation, scale=scale)
        other = dataclasses.replace(spec, preparation=preparation)
        with pytest.raises(PhiSightError, match=match):
            eyes.describe(None, other, 128)


def test_why_a_long_conversation_differs_is_told():
    config = PHI3.decoder_config(random_model.longrope_config(512).to_dict())
    assert language.context_note(config, 512) == ""
    assert "a context of 768 tokens, and llama.cpp takes Long" in language.context_note(config, 513)
    plain = runs.assistant().parts.base.model.config
    assert language.context_note(plain, plain.max_position_embeddings) == ""
    windowed = dataclasses.replace(plain, sliding_window=100)
    assert language.context_note(windowed, 100) == ""
    note = language.context_note(windowed, 101)
    assert note.startswith("it was asked conversations of up to 101 tokens, and llama.cpp, which")
    refused = {
        "what": "gguf", "within_tolerance": False, "loss_before": 1.0, "loss_after": 2.0,
        "greedy_equal": 50.0, "tolerance": measure.tolerance_entry(measure.Tolerance()),
        "context": {"note": note},
    }  # fmt: skip
    with pytest.raises(PhiSightError, match="use another --quantize, or say .*; it was asked con"):
        measure.check(refused)


def test_a_picture_of_more_tokens_than_llama_cpp_takes_at_once_is_fed_in_pieces():
    """CLIP ViT-L/14-336 gives 576 tokens, and a batch holds 512."""
    fed = []

    def made(count: int, width: int, sequences: int) -> SimpleNamespace:
        assert count <= reference.PIECE
        rows = [[None] for _ in range(count)]
        buffer = (ctypes.c_float * (count * width))()
        return SimpleNamespace(
            embd=buffer, pos=[0] * count, logits=[1] * count, n_seq_id=[0] * count, seq_id=rows
        )

    def decoded(context: object, batch: SimpleNamespace) -> int:
        values = numpy.ctypeslib.as_array(batch.embd).reshape(batch.n_tokens, -1).copy()
        fed.append((batch.pos, values))
        return 0

    model = reference.Model.__new__(reference.Model)
    model.width, model.context = 4, None
    model.lib = SimpleNamespace(
        llama_batch_init=made, llama_decode=decoded, llama_batch_free=lambda batch: None
    )
    embeddings = numpy.arange(576 * 4, dtype=numpy.float32).reshape(576, 4)
    model.feed_embeddings(embeddings, 3)
    assert [place for places, _ in fed for place in places] == [*range(3, 579)]
    assert numpy.array_equal(numpy.concatenate([values for _, values in fed]), embeddings)
