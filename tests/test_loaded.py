"""What was loaded is told by owner; the counts are those of the files, read by themselves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import runs
from safetensors.torch import load_file

import app
import checkpoints
import infer
import serve


def in_file(path: Path, prefix: str = "") -> str:
    """What is said of the tensors of a file whose names begin so."""
    tensors = [tensor for name, tensor in load_file(path).items() if name.startswith(prefix)]
    return f"{len(tensors)} tensors ({sum(tensor.numel() for tensor in tensors):,} numbers)"


def of_models() -> tuple[str, str]:
    four_bit = sum(
        name.endswith("_proj.weight") for name in load_file(runs.BASE / "model.safetensors")
    )
    base = in_file(runs.BASE / "model.safetensors")
    return (
        f"base {runs.BASE}: {base}, {four_bit} of them in 4 bits",
        f"CLIP {runs.VISION}: {in_file(runs.VISION / 'model.safetensors', 'vision_model.')}",
    )


def of_checkpoint(folder: Path) -> dict[str, str]:
    stems = {"lora": "lora_weights", "projector": "image_projector"}
    stems |= {name: name for name in ("optimizer", "rng")}
    return {
        owner: f"{owner} {in_file(folder / f'{stem}.safetensors')}" for owner, stem in stems.items()
    }


def the_line(text: str) -> str:
    (line,) = re.findall(r"^loaded .*$", text, re.MULTILINE)
    return line


def test_a_training_says_what_it_begins_and_goes_on_with(tmp_path, capsys):
    run, (base, clip) = tmp_path / "run", of_models()
    runs.start(run, "--stop-at-step=1", **runs.SHORT)
    unread = "for pictures whose features are not stored"
    assert the_line(capsys.readouterr().out) == f"loaded {base}; {clip}, {unread}"
    counts = ", ".join(of_checkpoint(run / "checkpoint-000001").values())
    runs.resume(run)
    assert the_line(capsys.readouterr().out) == (
        f"loaded {run}/checkpoint-000001: {counts}; config and trainer state; {base}; {clip},"
        f" {unread}"
    )


def test_an_answer_is_given_without_it_unless_it_is_asked_for(capsys):
    run, (base, clip) = runs.finished_run(), of_models()
    capsys.readouterr()
    asked = ["--run", str(run), "--prompt", "How many?", "--max-new-tokens", "2"]
    infer.main(asked)
    quiet = capsys.readouterr()
    assert quiet.err == ""
    infer.main([*asked, "--verbose"])
    told = capsys.readouterr()
    assert told.out == quiet.out
    folder = checkpoints.resolve(run).path
    of = of_checkpoint(folder)
    assert told.err == (
        f"loaded {folder}: {of['lora']}, {of['projector']}; config and trainer state;"
        f" of no use here: {of['optimizer']} and {of['rng']}; {base}; {clip},"
        " when a picture comes\n"
    )


@pytest.mark.parametrize(
    ("parse", "typed", "tells"),
    [
        (app.parse, [], True),
        (serve.parse, [], True),
        (serve.parse, ["--no-verbose"], False),
        (infer.parse, ["--prompt", "x"], False),
    ],
)
def test_what_serves_tells_it_and_what_answers_once_does_not(parse, typed, tells):
    assert parse(typed).verbose is tells
