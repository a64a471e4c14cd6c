"""How alike two pictures are: figures against their formulas, and what is said of them."""

from __future__ import annotations

import json

import numpy
import pytest
import runs
import torch
from PIL import Image

from benchmarks import likeness as benchmark
from evaluation import likeness
from evaluation.likeness import Likeness
from workers.fitting import Fitted


@pytest.fixture
def pictures(tmp_path):
    """Two wide pictures that differ at their sides alone, one of them saved anew, and another."""
    middle = Image.open(next((runs.world() / "images").iterdir())).convert("RGB")
    for name, colour in (("green", (10, 200, 30)), ("red", (200, 20, 30))):
        wide = Image.new("RGB", (2 * middle.width, middle.height), colour)
        wide.paste(middle, (middle.width // 2, 0))
        wide.save(tmp_path / f"{name}.png")
        if name == "green":
            wide.save(tmp_path / "again.png", compress_level=1)
            wide.save(tmp_path / "again.jpg", quality=90)
    return tmp_path


def compared(capsys, *typed: object) -> dict:
    assert likeness.main(["compare", *map(str, typed), "--vision", str(runs.VISION), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# -- the figures ----------------------------------------------------------------------------------


def made(first: torch.Tensor, second: torch.Tensor, grey: torch.Tensor, tmp_path) -> Likeness:
    files = [tmp_path / name for name in ("a", "b")]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]))
    blank = Fitted(numpy.zeros((1, 1, 3), numpy.uint8))
    return likeness.likeness(files, [blank, blank], torch.stack([first, second, grey]))


def test_figures_are_those_of_their_formulas(tmp_path):
    generator = torch.Generator().manual_seed(0)
    first, second, grey = torch.randn(3, 9, 5, generator=generator)
    found = made(first, second, grey, tmp_path)
    a, b, g = (numpy.asarray(part, numpy.float64) for part in (first, second, grey))

    def cosine(x, y):
        return x @ y / numpy.sqrt((x @ x) * (y @ y))

    by_token = [cosine(x, y) for x, y in zip(a, b)]
    rms = [numpy.sqrt(numpy.mean((x - y) ** 2)) for x, y in ((a, b), (a, g), (b, g))]
    size = numpy.sqrt(numpy.mean(numpy.stack([a, b]) ** 2))
    assert (found.tokens, found.dim) == (9, 5)
    assert found.cosine_of_means == pytest.approx(cosine(a.mean(0), b.mean(0)))
    assert found.cosine_mean == pytest.approx(numpy.mean(by_token))
    assert found.cosine_min == pytest.approx(min(by_token))
    assert found.least_alike == divmod(int(numpy.argmin(by_token)), 3)
    assert found.relative_difference == pytest.approx(rms[0] / size)
    assert found.of_grey == pytest.approx(rms[0] / ((rms[1] + rms[2]) / 2))


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (0.0, "cannot tell them apart: the encoder is given the same pixels"),
        (0.05, "nearly the same"),
        (0.2, "alike to the model"),
        (0.5, "two different pictures"),
    ],
)
def test_what_is_said_goes_by_the_distance_from_grey(step, said, tmp_path):
    grey, ones = torch.zeros(4, 3), torch.ones(4, 3)
    found = made(ones, ones * (1 + step), grey, tmp_path)
    assert said in found.meaning
    assert found.of_grey == pytest.approx(step / (1 + step / 2), abs=1e-6)


def test_the_benchmark_finds_copies_nearer_than_other_pictures():
    rows = benchmark.measured(runs.world() / "images", pairs=6, copies=6)
    assert max(rows["its JPEG of quality 95"]) < likeness.NEARLY < min(rows["two pictures"])
    assert all(len(values) == 6 and values == sorted(values) for values in rows.values())


# -- the command ----------------------------------------------------------------------------------


def test_what_is_cut_off_makes_no_difference_and_what_is_padded_does(pictures, capsys):
    both = pictures / "green.png", pictures / "red.png"
    cropped = compared(capsys, *both, "--picture-fit", "crop")
    assert cropped["same_features"] and cropped["same_pixels"] and not cropped["same_file"]
    assert cropped["of_grey"] == 0 and cropped["cut_off"] == [0.5, 0.5]
    padded = compared(capsys, *both, "--picture-fit", "pad")
    assert not padded["same_pixels"] and padded["of_grey"] > 0.1 and padded["cut_off"] == [0, 0]
    side = int(padded["tokens"] ** 0.5)
    row, column = padded["least_alike"]
    assert side / 4 - 1 <= row < 3 * side / 4 + 1 and (column < side / 4 or column >= 3 * side / 4)


def test_the_same_pixels_in_other_bytes_and_the_same_bytes(pictures, capsys):
    first = pictures / "green.png"
    assert compared(capsys, first, first)["meaning"].startswith("the same picture: the files have")
    again = compared(capsys, first, pictures / "again.png")
    assert (again["same_file"], again["same_pixels"], again["same_features"]) == (0, 1, 1)
    Image.open(first).save(pictures / "again.avif")
    Image.open(pictures / "again.avif").convert("RGB").save(pictures / "read.png")
    avif = compared(capsys, pictures / "again.avif", pictures / "read.png")
    assert avif["same_features"] and not avif["same_file"]  # read as Pillow reads it
    jpeg = compared(capsys, first, pictures / "again.jpg")
    assert not jpeg["same_pixels"] and jpeg["meaning"].startswith("nearly the same to the model")


def test_a_run_says_how_it_reads_pictures(pictures, capsys):
    run = runs.finished_run()
    capsys.readouterr()
    both = pictures / "green.png", pictures / "red.png"
    by_run = compared(capsys, *both, "--run", run)
    assert by_run == compared(capsys, *both, "--preset", "tiny")
    pooled = compared(capsys, *both, "--run", run, "--feature-pooling", 2)
    assert pooled["tokens"] * 4 == by_run["tokens"]


def test_the_command_as_a_person_types_it(pictures):
    both = [pictures / "green.png", pictures / "red.png"]
    done = runs.command("-m", "data.features", "compare", *both, "--picture-fit", "crop")
    assert done.returncode == 0 and done.stderr == "", done
    lines = done.stdout.splitlines()
    same = "the encoder is given the same pixels of both"
    assert lines[0].endswith(f": the model cannot tell them apart: {same}")
    assert lines[-1] == f"{both[1]}: --picture-fit crop leaves 50% of it unseen"
    broken = pictures / "broken.png"
    broken.write_bytes(both[0].read_bytes()[:200])
    for typed, said in (
        ([both[0], broken], "broken.png: broken or truncated picture"),
        ([both[0], pictures / "none.png"], "none.png: no such file"),
        ([*both, "--run", "runs/x", "--preset", "tiny"], "whose encoder"),
        ([*both, "--vision-layer", "99"], "--vision-layer 99: this CLIP has"),
    ):
        with pytest.raises(likeness.PhiSightError, match=said):
            likeness.main(["compare", *map(str, typed)])
