"""Pictures read in child processes: hostile ones cost one error, large ones no memory here."""

from __future__ import annotations

import contextlib
import logging
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path

import hostile_pictures as hostile
import numpy
import pytest
from hostile_pictures import app1, chunk, encode
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from data import images, reading
from data.features import FeatureStore
from data.images import decode_image, size_if_whole
from data.reading import (
    as_png,
    check_image,
    check_image_file,
    checked_image_files,
    claimed_size,
    fit_files,
    fit_image,
)
from errors import PhiSightError
from workers import fitting
from workers.fitting import Fit, Fitted
from workers.pool import Cancelled, Limits, Workers

ROOT = Path(__file__).resolve().parent.parent
FAULTS = ROOT.parent / "shared" / "faults"
FIT = Fit(24, None, Image.Resampling.BICUBIC, (24, 24), (122, 116, 104))
RED = (200, 30, 30)
BOMB = zlib.compress(b"a" * 20_000_000)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = numpy.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=numpy.uint8))


@pytest.fixture
def small_pool(monkeypatch):
    """Children that may take little, so that hostile pictures are ended soon."""
    pool = Workers(1, Limits(cpu_seconds=1, memory=200 << 20))
    monkeypatch.setattr(reading, "POOL", pool)
    yield pool
    pool.close()


# -- the same picture as in this process ----------------------------------------------------------


@pytest.mark.parametrize("file_format", images.FORMATS)
@pytest.mark.parametrize("size", [(40, 30), (30, 40), (24, 24), (24, 90), (7, 3)])
def test_a_picture_is_fitted_there_as_it_is_here(file_format, size):
    data = encode(noise(*size), file_format)
    for fit in (FIT, Fit(24, None, 2, (20, 22)), Fit(None, (31, 17), 3, None)):
        expected = fit(decode_image(data, "a"))
        assert numpy.array_equal(fit_image(data, "a", fit).pixels, expected.pixels)
    assert check_image(data, "a") == claimed_size(data, "a") == size


def test_files_are_read_in_order_wherever_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for index in range(15):
        noise(20 + index, 30, index).save(f"{index}.png")
    Path("3.png").write_bytes(b"no picture")
    names = [Path(f"{index}.png") for index in range(15)] + [Path("none.png")]
    found = list(fit_files(names, FIT))
    assert [isinstance(picture, Fitted) for picture in found] == [
        n not in (3, 15) for n in range(16)
    ]
    assert str(found[3]).startswith("3.png: not a picture")
    assert str(found[15]).startswith("none.png: no such file")
    for index in (0, 14):
        expected = FIT(noise(20 + index, 30, index))
        assert numpy.array_equal(found[index].pixels, expected.pixels)
    assert check_image_file("1.png") == (21, 30)


def test_files_are_checked_beside_what_else_is_done(tmp_path, small_pool):
    noise(20, 30).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    with checked_image_files([tmp_path / "a.png"]):
        until = time.monotonic() + 20
        while not small_pool._idle and time.monotonic() < until:
            time.sleep(0.01)
        assert small_pool._idle  # it has been read within the block
    done = []
    with pytest.raises(PhiSightError, match="b.png: not a picture"):
        with checked_image_files([tmp_path / "b.png"]):
            done.append("block")
    assert done == ["block"]
    with pytest.raises(KeyError), checked_image_files([tmp_path / "b.png"]):
        raise KeyError  # the block's own error comes first


def test_whoever_wants_no_more_files_waits_for_none(tmp_path, small_pool):
    paths = [tmp_path / f"{index}.png" for index in range(30)]
    for path in paths:
        noise(20, 30).save(path)
    files = fit_files(paths, FIT)
    assert isinstance(next(files), Fitted)
    files.close()
    assert not small_pool._running


def test_as_png_has_the_same_pixels():
    data = encode(noise(30, 20), "TIFF")
    assert decode_image(as_png(data, "a"), "a").tobytes() == noise(30, 20).tobytes()


# -- hostile pictures -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: hostile.with_scans(1000, 2000), "scans of 1000 x 1000"),
        (lambda: hostile.with_scans(16, 400_000), "scans of 16 x 16"),
        (lambda: hostile.with_segments(b"\xff\xfe\0\x02" * 20_000), "over 10,000 pieces"),
        (lambda: hostile.with_segments(b"\xff" * 20_000), "over 10,000 pieces"),
        (
            lambda: hostile.with_segments(
                app1(b"Exif\0\0" + hostile.exif_of_overlaps(5000, 9_000_000)) * 3
            ),
            "bytes of EXIF",
        ),
        (lambda: hostile.png(chunk(b"tEXt", b"") * 110_000), "over 100,000 pieces"),
        (lambda: hostile.png(chunk(b"IDAT", b"") * 110_000), "over 100,000 pieces"),
        (lambda: hostile.gif_with_comment(5000), "over 4,000 pieces"),
        (hostile.gif_beyond_its_screen, "more pixels than the limit"),
        (lambda: hostile.tiff_of_strips(400_000), "lists more than a picture needs"),
        (lambda: hostile.tiff_of_overlaps(5000, 60_000), "lists more than a picture needs"),
        (lambda: hostile.tiff_of_bytes(3_000_000), "MB of memory|seconds of processor time"),
        (lambda: hostile.tiff_of_one_tile(9_000), "MB of memory|broken"),
        (lambda: hostile.heic(b"heic", b"mif1"), "is HEIC"),
        (lambda: hostile.heic(b"mif1", b"mif1", b"heic"), "is HEIC"),
        (lambda: hostile.heic(b"isom", b"mp41"), "not a picture"),
        (lambda: encode(noise(64, 64), "AVIF")[:-200], "broken or truncated"),
        (lambda: hostile.avif_claiming(7000, 7000), "MB of memory|seconds of processor time"),
        (lambda: hostile.avif_claiming(8001, 8000), "8001 x 8000 is over the limit"),
        (lambda: hostile.avif_claiming(2**31 - 1, 2**31 - 1), "broken or truncated"),
        (lambda: hostile.avif_claiming(0, 5), "broken or truncated"),
        (lambda: hostile.avif_claiming(5, 505), "over 100 times as long"),
    ],
)
def test_a_hostile_picture_is_one_error(small_pool, make, reason):
    data = make()
    with pytest.raises(PhiSightError, match=reason) as caught:
        fit_image(data, "a.png", FIT)
    said = str(caught.value)
    assert said.startswith("a.png: ") and "; " in said and "\n" not in said
    assert fit_image(encode(noise(9, 9), "PNG"), "b", FIT).pixels.shape == (24, 24, 3)


HARMLESS = {
    "tEXt": chunk(b"tEXt", b"k\0" + b"x" * 2_000_000),
    "zTXt": chunk(b"zTXt", b"k\0\0" + BOMB),
    "iTXt": chunk(b"iTXt", b"k\0\1\0\0\0" + BOMB),
    "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB),
    "raw profile": chunk(b"zTXt", b"Raw profile type exif\0\0" + BOMB),
    "broken zTXt": chunk(b"zTXt", b"Raw profile type exif\0\0" + b"\xff" * 99),
    "many": chunk(b"zTXt", b"k\0\0" + BOMB) * 50,
    "iCCP": chunk(b"iCCP", b"k\0\0" + BOMB),
    "eXIf": chunk(b"eXIf", hostile.exif_of_overlaps(60_000, 700_000)),
    "private": chunk(b"prVt", b"x" * 100_000) * 20,
    "animation": chunk(b"acTL", b"\xff" * 8) + chunk(b"fcTL", b"\xff" * 26),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_no_pixel_of_a_png_harms_nothing(small_pool, name):
    for data in (hostile.png(HARMLESS[name]), hostile.png(after=HARMLESS[name])):
        assert claimed_size(data, "a") == (8, 8)
        assert (fit_image(data, "a", FIT).pixels == RED).all()


@pytest.mark.parametrize("packed", [False, True])
def test_the_orientation_that_a_png_tells_in_a_text_is_heeded(packed):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", 'x tiff:Orientation="6" x', zip=packed)
    info.add_text("Comment", "x" * 100, zip=packed)
    data = encode(noise(9, 5), "PNG", pnginfo=info)
    assert decode_image(data, "a").size == (5, 9)


@given(st.lists(st.binary(max_size=30), max_size=6), st.data())
def test_a_png_of_any_chunks_never_fails_otherwise(bodies, data):
    kinds = (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"tRNS", b"eXIf", b"acTL", b"IDAT", b"PLTE")
    notes = b"".join(chunk(data.draw(st.sampled_from(kinds)), body) for body in bodies)
    whole = hostile.png(notes)
    cut = whole[: data.draw(st.integers(8, len(whole)))]
    kept = images.without_notes(cut, "a")
    assert len(kept) <= len(cut)
    try:
        assert decode_image(cut, "a").size == (8, 8)
    except PhiSightError as error:
        assert str(error).startswith("a: ")


def test_an_ordinary_progressive_picture_is_read():
    data = encode(noise(300, 200), "JPEG", progressive=True)
    assert data.count(images.SCAN) >= 8
    assert check_image(data, "a") == (300, 200)


def test_exif_whose_entries_overlap_leaves_the_picture_as_it_is(small_pool):
    data = hostile.with_segments(app1(b"Exif\0\0" + hostile.exif_of_overlaps(2000, 20_000)))
    assert numpy.abs(fit_image(data, "a", FIT).pixels.astype(int) - RED).max() <= 2


def test_a_picture_that_takes_too_much_memory_says_so(monkeypatch):
    pool = Workers(1, Limits(memory=50 << 20))
    monkeypatch.setattr(reading, "POOL", pool)
    with pytest.raises(PhiSightError, match="^a: takes over 50 MB of memory to read; save it"):
        fit_image(encode(Image.new("RGB", (5000, 5000)), "PNG"), "a", FIT)
    pool.close()


def test_a_picture_is_ended_when_nobody_waits_for_it(small_pool):
    data = hostile.tiff_of_bytes(3_000_000)
    looks = iter([False, False, False, True])
    with pytest.raises(Cancelled):
        fit_image(data, "a", FIT, lambda: next(looks))
    assert not small_pool._running


def test_a_hostile_picture_holds_up_no_other(monkeypatch):
    pool = Workers(2, Limits(cpu_seconds=600))
    monkeypatch.setattr(reading, "POOL", pool)
    left, ended = threading.Event(), []

    def hold() -> None:
        with pytest.raises(Cancelled):
            fit_image(hostile.tiff_of_bytes(12_000_000), "a", FIT, left.is_set)
        ended.append(None)

    thread = threading.Thread(target=hold)
    thread.start()
    for index in range(5):
        fit_image(encode(noise(20, 20, index), "PNG"), "b", FIT)
    assert not ended
    left.set()
    thread.join()
    pool.close()
    assert ended


def test_what_libtiff_writes_is_one_line_of_the_log(small_pool, caplog, capfd):
    data = hostile.tiff_with_notes()
    with caplog.at_level(logging.WARNING, "phisight.workers"):
        for _ in range(3):
            with pytest.raises(PhiSightError, match="^a.tif: broken"):
                check_image(data, "a.tif")
    (record,) = caplog.records
    note = record.getMessage().split("notes: ")[1]
    assert "LZW" in note or "table" in note
    assert capfd.readouterr().err.count(note) <= 1  # the log's own line


@pytest.mark.parametrize(
    "data",
    [
        # A decompression bomb, and an MPO that is cut short.
        hostile.png(chunk(b"IHDR", struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0))),
        hostile.with_segments(b"\xff\xe2\0\x12MPF\0II*\0\x08\0\0\0\x63\0"),
    ],
)
def test_what_pillow_warns_of_is_not_told(tmp_path, small_pool, caplog, data):
    path = tmp_path / "picture"
    path.write_bytes(data)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        size_if_whole(path)
    with contextlib.suppress(PhiSightError):
        check_image_file(path)
    assert not told and not caplog.records


@pytest.mark.parametrize(
    ("name", "reason"),
    [("progressive_600_scans.jpg", "has 610 scans"), ("png_large_text_chunk.png", None)],
)
def test_the_files_that_failed(name, reason):
    path = FAULTS / name
    if not path.exists():
        pytest.skip("the shared faults are not here")
    if reason is None:
        assert (fit_image(path.read_bytes(), name, FIT).pixels == RED).all()
    else:
        assert size_if_whole(path) is None
        with pytest.raises(PhiSightError, match=reason):
            fit_image(path.read_bytes(), name, FIT)


@pytest.mark.parametrize(
    "data",
    [
        hostile.with_scans(1000, 2000),
        hostile.with_segments(b"\xff\xfe\0\x02" * 20_000),
        hostile.with_segments(b"\xff" * 200_000),
        hostile.with_segments(app1(b"Exif\0\0" + bytes(60_000)) * 3),
        hostile.png(chunk(b"tEXt", b"") * 2000),
        hostile.png(chunk(b"tEXt", b"x" * 200_000)),
    ],
)
def test_a_quick_look_leaves_what_is_odd_to_be_decoded(tmp_path, data):
    path = tmp_path / "picture"
    path.write_bytes(data)
    assert size_if_whole(path) is None


# -- padding --------------------------------------------------------------------------------------


@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.sampled_from([0, 1, 2, 3]),
    st.integers(1, 40),
    st.integers(90, 2000),
)
@example(22, 23, 3, 33, 500)  # one pixel of padding, on one side only
def test_a_padded_picture_is_scaled_as_the_whole_square_is(width, height, resample, edge, strip):
    picture = noise(width, height, width * height)
    side = max(width, height)
    square = Image.new("RGB", (side, side), FIT.padding)
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    expected = square.resize((edge, edge), resample)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fitting, "STRIP_PIXELS", strip)
        found = Fit(edge, None, resample, None, FIT.padding)(picture)
    assert numpy.array_equal(found.pixels, numpy.asarray(expected))


def test_a_very_high_picture_is_padded_in_little_time():
    picture = Image.new("RGB", (300, 30_000), RED)
    found = FIT(picture).pixels
    assert found.shape == (24, 24, 3)
    assert (found[:, 0] == FIT.padding).all() and (found[:, -1] == FIT.padding).all()
    assert (found[:, 12] != FIT.padding).any()


def test_what_stands_at_the_sides_is_seen_when_padded_and_lost_when_cropped():
    wide = Image.new("RGB", (640, 320), "white")
    plain = wide.copy()
    wide.paste(RED, (0, 100, 60, 220))
    crop = Fit(24, None, 3, (24, 24))
    assert numpy.array_equal(crop(wide).pixels, crop(plain).pixels)
    assert not numpy.array_equal(FIT(wide).pixels, FIT(plain).pixels)


def test_square_pictures_are_the_same_padded_and_cropped():
    picture = noise(50, 50)
    crop = Fit(24, None, 3, (24, 24))
    assert numpy.array_equal(FIT(picture).pixels, crop(picture).pixels)


def test_a_fit_goes_through_json():
    assert fitting.from_json(fitting.to_json(FIT)) == FIT
    assert fitting.share_cut_off(640, 320) == fitting.share_cut_off(320, 640) == 0.5


# -- memory ---------------------------------------------------------------------------------------

PEAK = """
import resource, sys
from pathlib import Path
from data.features import FeatureStore
import torch
from workers.fitting import Fit

class Tower:
    fit = Fit(24, None, 3, (24, 24), (1, 2, 3))
    def __call__(self, pictures):
        return torch.stack([torch.zeros(2, 3) for _ in pictures])

folder = Path(sys.argv[1])
store = FeatureStore(folder / "store", "key", (2, 3))
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024
before = peak()
assert store.add(sorted(path.name for path in folder.glob("*.jpg")), folder, Tower) == {}
print(peak() - before)
"""


def test_features_of_large_pictures_take_no_memory_here(tmp_path):
    """Held whole, six of them would take 290 MB."""
    for index in range(6):
        Image.new("RGB", (4000, 3000), (index, 0, 0)).save(tmp_path / f"{index}.jpg")
    ended = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 100


def test_a_tower_without_a_fit_is_given_whole_pictures(tmp_path):
    noise(40, 30).save(tmp_path / "a.png")
    seen = []

    def extract(pictures):
        import torch

        seen.extend(picture.size for picture in pictures)
        return torch.zeros(len(pictures), 2, 3)

    store = FeatureStore(tmp_path / "store", "key", (2, 3))
    assert store.add(["a.png"], tmp_path, lambda: extract) == {}
    assert seen == [(336, 336), (40, 30)]
