"""The noised picture of the alignment meter: how strong, the same everywhere, and kept apart."""

from __future__ import annotations

import hashlib
import itertools

import numpy
import pytest
import runs
import torch
from PIL import Image

from data.dataset import load_questions
from data.feature_form import as_stored
from data.features import BLANK, FeatureStore
from data.reading import fit_files
from evaluation import meter
from evaluation.noise import SIGMA, NoisedTower, noised, noised_store
from evaluation.questions import answer_questions
from evaluation.runner import Settings, evaluated
from evaluation.tasks import TASKS
from model.vision import VisionTower, vision_of
from workers.fitting import Fitted


def grey(value: int = 128, side: int = 200) -> Fitted:
    return Fitted(numpy.full((side, side, 3), value, numpy.uint8))


def test_the_noise_is_as_strong_as_it_says():
    for sigma in (0.01, 0.05, 0.1):  # little enough that nothing is cut off at black and white
        change = noised(grey(), sigma).pixels.astype(float) - 128
        assert change.std() == pytest.approx(255 * sigma, rel=0.02)
        assert change.mean() == pytest.approx(0, abs=0.5)
    assert noised(grey(), SIGMA).pixels.std() > 80


def test_the_noise_is_drawn_by_the_pixels_alone():
    first = noised(grey()).pixels
    numpy.random.seed(5)
    assert numpy.array_equal(noised(grey()).pixels, first)
    other = grey()
    other.pixels[0, 0, 0] += 1
    change = noised(other).pixels.astype(int) - first
    assert (change != 0).mean() > 0.5  # of another picture, other noise everywhere
    turned = Fitted(numpy.full((100, 400, 3), 128, numpy.uint8))
    assert not numpy.array_equal(noised(turned).pixels.reshape(-1), first.reshape(-1))


def test_the_noise_is_the_same_on_every_machine():
    """Of a known picture, as it was drawn once."""
    pixels = noised(Fitted(numpy.arange(48, dtype=numpy.uint8).reshape(4, 4, 3))).pixels
    assert pixels[0].tolist() == [[0, 127, 25], [9, 99, 185], [0, 47, 255], [0, 0, 0]]


def test_a_picture_of_any_size_gets_the_noise_where_the_clip_reads_it(tiny_config, world):
    spec = vision_of(tiny_config)
    tower = VisionTower(spec)
    path = sorted((world / "images").iterdir())[0]
    (fitted,) = fit_files([path], tower.fit)
    features = NoisedTower(tower)([fitted])
    assert torch.equal(features, tower([noised(fitted)]))
    assert torch.equal(features, NoisedTower(tower)([Image.open(path).convert("RGB")]))
    assert not torch.equal(features, tower([fitted]))


def test_noised_features_lie_in_a_store_of_their_own(tiny_config, world, tmp_path):
    spec = vision_of(tiny_config)
    names = sorted(path.name for path in (world / "images").iterdir())[:4]
    true = FeatureStore(tmp_path, spec.key, spec.shape)
    stores = [noised_store(tmp_path, spec, "float16", sigma) for sigma in (SIGMA, 0.1)]
    folders = {store.folder for store in [true, *stores]}
    assert len(folders) == 3
    assert true.add(names, world / "images", lambda: VisionTower(spec)) == {}
    assert BLANK in true and all(true.hash_of(name) not in stores[0] for name in names)
    before = runs.contents(true.folder)
    tower = VisionTower(spec)
    for store, sigma in zip(stores, (SIGMA, 0.1), strict=True):
        assert store.add(names, world / "images", lambda s=sigma: NoisedTower(tower, s)) == {}
    assert runs.contents(true.folder) == before
    for name in names:
        seen = [store.features_of(name) for store in (true, *stores)]
        for one, other in itertools.combinations(seen, 2):
            assert not torch.equal(one, other)
    again = noised_store(tmp_path, spec, "float16")
    assert all(true.hash_of(name) in again for name in names)


def test_every_condition_of_a_task_shows_another_picture(tiny_config, world, tmp_path):
    spec = vision_of(tiny_config)
    names = sorted(path.name for path in (world / "images").iterdir())[:3]
    store, other = (
        FeatureStore(tmp_path, spec.key, spec.shape),
        noised_store(tmp_path, spec, "float16"),
    )
    tower = VisionTower(spec)
    assert store.add(names, world / "images", lambda: tower) == {}
    assert other.add(names, world / "images", lambda: NoisedTower(tower)) == {}
    swapped = meter.swapped_names(names)
    for name in names:
        seen = [
            meter.features_under(condition, store, swapped, other)(name)
            for condition in meter.ALL_CONDITIONS
        ]
        assert torch.equal(seen[-1], other.features_of(name))
        for one, another in itertools.combinations(seen, 2):
            assert not torch.equal(one, another)


def test_training_asks_as_it_did():
    assert meter.CONDITIONS == ("right", "swapped", "blank")
    assert meter.ALL_CONDITIONS == (*meter.CONDITIONS, "noised")


def test_the_seed_is_the_whole_digest():
    """Half of it would be enough for chance, and not for a person who compares."""
    content = hashlib.sha256(repr((1, 1, 3)).encode() + bytes(3)).digest()
    state = numpy.random.RandomState(numpy.frombuffer(content, "<u4"))
    expected = (state.standard_normal((1, 1, 3)) * 255 * SIGMA).round().clip(0, 255)
    assert noised(Fitted(numpy.zeros((1, 1, 3), numpy.uint8))).pixels.tolist() == expected.tolist()


def test_a_task_is_answered_by_noised_pictures_where_it_says_so(tmp_path):
    """The features that a runner shows are the noised tower's own, and its answers theirs."""
    assistant = runs.assistant()
    spec, storage = assistant.parts.vision, assistant.config.feature_storage
    questions = load_questions(runs.world() / "held_out.jsonl")[:12]
    task = TASKS["world"]
    asked = task.questions([runs.world() / "held_out.jsonl"], 12)
    store = FeatureStore(tmp_path, spec.key, spec.shape, storage)
    settings = Settings("world", ("right", "noised"), 12)
    found = evaluated(assistant, task, asked, runs.world() / "images", store, settings)
    assert found.header["noise"] == SIGMA
    tower = NoisedTower(VisionTower(spec))
    names = [question.image for question in questions]
    fitted = fit_files([runs.world() / "images" / name for name in names], tower.fit)
    expected = {name: as_stored(tower([one])[0], storage) for name, one in zip(names, fitted)}
    noisy = noised_store(tmp_path, spec, storage)
    for name in names:
        torch.testing.assert_close(noisy.by_hash(store.hash_of(name)), expected[name])
    for condition, features in (("noised", expected.get), ("right", store.features_of)):
        answers = answer_questions(assistant, questions, features, 12, "asking")
        assert [one.answer for one in found.answered[condition]] == answers
