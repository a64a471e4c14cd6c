"""Golden outputs: those of this version are the committed ones, and a wrong one is found."""

from __future__ import annotations

import copy
import json

import pytest
import runs
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import golden
from errors import PhiSightError

COMMITTED = json.loads(golden.FILE.read_text())
WRONG_SCALE = (
    "import threads, sys, torch, lora.layer as layer; whole = layer.LoRALinear.__init__\n"
    "def wrong(self, *given, **named):\n"
    "    whole(self, *given, **named)\n"
    "    self.scaling *= 1.01\n"
    "layer.LoRALinear.__init__ = wrong\n"
    "from benchmarks import golden\n"
    "golden.text_base = golden.seen = golden.heard = lambda config: None\n"  # the losses alone
    "golden.answers = lambda config: []\n"
    "sys.exit(golden.main([]))"
)


def test_the_outputs_are_the_committed_ones():
    done = runs.command("-m", "benchmarks.golden")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("golden outputs: ")


def test_a_scale_of_the_adapter_that_is_one_percent_off_is_found():
    done = runs.command("-c", WRONG_SCALE)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "losses[" in done.stdout and "apart" in done.stdout
    assert "golden --update" in done.stdout.splitlines()[-1]


@given(st.sampled_from(range(golden.STEPS)), st.floats(1e-6, 10), st.booleans())
def test_a_loss_that_moved_is_found_by_the_tolerance_of_the_machine(step, moved, elsewhere):
    found = copy.deepcopy(COMMITTED)
    found["losses"][step] += moved
    if elsewhere:
        found["machine"]["processor"] = "another"
    size = max(1.0, abs(COMMITTED["losses"][step]))
    close = elsewhere and moved < 0.99 * golden.TOLERANCE * size
    far = not elsewhere or moved > 1.01 * golden.TOLERANCE * size
    said = golden.compare(COMMITTED, found)
    assert not (close and said) and (not far or said[0].startswith(f"losses[{step}]: "))


def test_an_answer_that_changed_is_found_on_every_machine():
    found = copy.deepcopy(COMMITTED)
    found["machine"]["versions"]["torch"] = "another"
    name = next(iter(found["answers"]))
    found["answers"][name] += " or not"
    assert golden.compare(COMMITTED, found)[0].startswith(f"answers.{name}: ")
    del found["answers"][name]
    assert golden.compare(COMMITTED, found) == [f"answers.{name}: committed alone"]


def test_not_a_number_is_a_difference():
    assert list(golden.differences([1.0], [float("nan")], 1.0))


def test_other_assets_are_told_in_one_line_with_the_remedy():
    found = copy.deepcopy(COMMITTED)
    found["assets"]["clip"] = "0"
    found["losses"] = []
    remedy = "golden.json: clip: not those it was made of; python -m benchmarks.golden --update"
    with pytest.raises(PhiSightError, match=remedy):
        golden.compare(COMMITTED, found)
