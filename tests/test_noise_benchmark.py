"""The benchmark of noise: what it mixes is as loud as it says, and its figures are right."""

from __future__ import annotations

import numpy as np
import pytest
from sounds import RATE, needs_espeak, tiny, vowels

from benchmarks.noise import NOISES, Heard, Passage, difference, listen, mixed, percent, table
from benchmarks.noise_reductions import REDUCTIONS


@needs_espeak
@pytest.mark.parametrize("kind", NOISES)
def test_noise_is_as_loud_as_it_says(kind):
    voice = 0.1 * vowels(2.0)
    clear, noisy = mixed(voice, kind, np.inf, 1), mixed(voice, kind, 5.0, 1)
    assert np.array_equal(noisy, mixed(voice, kind, 5.0, 1)) and len(noisy) == len(voice) + RATE
    assert not np.array_equal(noisy, mixed(voice, kind, 5.0, 2))
    scale = np.dot(noisy, clear) / np.dot(clear, clear)
    noise = noisy / scale - clear
    decibels = 20 * np.log10(voice.std() / noise.std())
    assert abs(decibels - 5) < 1
    for name, reduce in REDUCTIONS.items():
        reduced = reduce(noisy)
        assert reduced.dtype == np.float32 and reduced.shape == noisy.shape, name
        assert np.isfinite(reduced).all(), name


def heard(passage: str, reduction: str, wrong: int) -> Heard:
    return Heard(passage, "white", 0.0, reduction, wrong, 10)


def test_differences_are_those_of_the_same_sounds():
    rows = [heard("a", "as it is", 4), heard("a", "gate", 2)]
    rows += [heard("b", "as it is", 6), heard("b", "gate", 4)]
    assert percent(rows, "as it is") == 50 and percent(rows, "gate") == 30
    assert difference(rows, "gate") == (-20, -20, -20)  # in every passage alike
    rows[3] = heard("b", "gate", 8)
    middle, low, high = difference(rows, "gate")
    assert (middle, low, high) == (0, -20, 20)
    lines = list(table(rows, ["as it is", "gate"], "passage"))
    assert lines[2] == "| a | 40.0 % | 20.0 % (-20.0; -20.0 to -20.0) |" and len(lines) == 5


def test_what_was_kept_is_not_heard_again():
    kept: dict[str, Heard] = {}
    passages = [Passage("vowels", "nothing", vowels(0.5), True)]
    plan = (tiny(), passages, ["as it is", "gate, -10 dB"], [np.inf], True, kept)
    first = listen(*plan, lambda key, one: None)
    assert [one.reduction for one in first] == ["as it is", "gate, -10 dB"] and len(kept) == 2

    def again(key: str, one: Heard) -> None:
        raise AssertionError(key)

    assert listen(*plan, again) == first
    assert listen(tiny(), passages, ["as it is"], [np.inf], False, {}, again) == []
