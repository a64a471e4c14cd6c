"""The 4-bit kernels of a CPU: the order of the codes, exact dequantising, products within their
bound, and results that depend on nothing but the row and the weight."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import subprocess
import sys
import time
from typing import Any

import bitsandbytes as bnb
import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from errors import PhiSightError
from ops import cpu, kernels
from ops.kernels import compiling, target
from ops.nf4 import PanelLinear, bitsandbytes_form, dense_weight, quant_state, quick_product

if not kernels.available()[0]:
    pytest.skip(f"kernels: {kernels.available()[1]}", allow_module_level=True)

from ops.kernels.codebook import ERROR_BOUND, LEVELS, MOST_ACTIVATION, MOST_LEVEL
from ops.kernels.compiling import cache_folder, compiled
from ops.kernels.crew import Crew, barrier, take_part
from ops.kernels.layout import PanelWeight
from ops.kernels.linear import dense_linear, nf4_dequantize, nf4_linear, nf4_linear_backward
from ops.kernels.simd import publish

SHAPES = st.tuples(
    st.integers(1, 70), st.integers(1, 5), st.sampled_from(kernels.layout.BLOCKS)
).map(lambda drawn: (drawn[0], drawn[1] * drawn[2], drawn[2]))  # outputs, inputs, block
MAGNITUDES = st.sampled_from([0.0, 1e-38, 1e-20, 1e-3, 1.0, 300.0, 1e15])


def random_codes(outputs: int, inputs: int, block: int, seed: int) -> tuple[Tensor, Tensor]:
    """bitsandbytes' packed codes, and scales of one."""
    generator = torch.Generator().manual_seed(seed)
    count = outputs * inputs
    codes = torch.randint(0, 256, (count // 2, 1), dtype=torch.uint8, generator=generator)
    return codes, torch.ones(count // block)


def dense(codes: Tensor, scales: Tensor, outputs: int, inputs: int, block: int) -> Tensor:
    """What bitsandbytes dequantises to."""
    state = quant_state(scales, torch.Size((outputs, inputs)), torch.float32, block)
    return bnb.functional.dequantize_4bit(codes, state)


def scattered(shape: tuple[int, ...], magnitudes: list[float], seed: int) -> Tensor:
    """Normal numbers, each times one of `magnitudes`."""
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randint(0, len(magnitudes), shape, generator=generator)
    return torch.randn(shape, generator=generator) * torch.tensor(magnitudes)[choice]


@given(SHAPES, st.integers(0, 2**16), st.lists(MAGNITUDES, min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_codes_and_scales_come_back_and_dequantise_as_bitsandbytes_does(shape, seed, magnitudes):
    codes, scales = random_codes(*shape, seed)
    scales = scattered(scales.shape, magnitudes, seed).abs()
    weight = kernels.panels_of(codes, scales, *shape)
    again = kernels.bitsandbytes_order(weight)
    assert torch.equal(again[0], codes) and torch.equal(again[1], scales)
    assert torch.equal(nf4_dequantize(weight), dense(codes, scales, *shape))


@given(
    SHAPES, st.integers(1, 30), st.integers(0, 2**16),
    st.lists(MAGNITUDES, min_size=1, max_size=3), st.lists(MAGNITUDES, min_size=1, max_size=3),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_products_are_within_their_bound(shape, rows, seed, of_weights, of_activations):
    outputs, inputs, block = shape
    codes, scales = random_codes(*shape, seed)
    scales = scattered(scales.shape, of_weights, seed).abs()
    x = scattered((rows, inputs), of_activations, seed + 1)
    weight = kernels.panels_of(codes, scales, *shape)
    exact = x.double() @ dense(codes, scales, *shape).double().T
    largest = x.double().view(rows, 1, -1, block).abs().amax(-1)  # (rows, 1, blocks)
    together = largest * scales.double().view(1, outputs, -1)  # (rows, outputs, blocks)
    # In a block: the rounding of levels and activations. Over blocks: float32's own.
    own = 2 * inputs // block * 2.0**-24
    bound = together.sum(-1) * block * (ERROR_BOUND + own) + 1e-30
    assert ((nf4_linear(x, weight) - exact).abs() <= bound).all()


def test_the_bound_is_not_far_from_the_truth():
    """A bound that nothing comes near would not notice a kernel that has become worse."""
    codes, _ = random_codes(512, 1024, 64, 0)
    weight = kernels.panels_of(codes, torch.rand(512 * 16), 512, 1024, 64)
    x = torch.randn(50, 1024, generator=torch.Generator().manual_seed(1))
    exact = x.double() @ nf4_dequantize(weight).double().T
    error = (nf4_linear(x, weight) - exact).norm() / exact.norm()
    assert 1e-5 < error < 2e-4


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_a_row_has_the_same_result_in_any_company_on_any_number_of_threads(threads):
    codes, _ = random_codes(200, 576, 64, 0)
    weight = kernels.panels_of(codes, torch.rand(200 * 9), 200, 576, 64)
    x = torch.randn(120, 576)
    threads(1)
    alone = torch.cat([nf4_linear(row[None], weight) for row in x])
    for count, number in ((1, 120), (2, 120), (3, 120), (2, 2), (2, 7), (2, 13), (2, 101)):
        threads(count)
        assert torch.equal(nf4_linear(x[:number], weight), alone[:number]), (count, number)


PROGRAM = """
import torch
from hashlib import sha256
from ops import cpu, kernels
from ops.kernels.codebook import ERROR_BOUND, LEVELS, MOST_ACTIVATION, MOST_LEVEL
from tests.test_kernels import digest_of_products
print(kernels.available()[0], digest_of_products())
"""
# A processor of 2013: AVX2 and nothing newer. numba takes these instead of what it finds.
HASWELL = {"PHISIGHT_KERNELS": "avx2", "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": (
    "+avx,+avx2,+bmi,+bmi2,+cx16,+f16c,+fma,+lzcnt,+movbe,+popcnt,+sse,+sse2,+sse3,+sse4.1,"
    "+sse4.2,+ssse3,-avx512f,-avx512bw,-avx512vl,-avx512vnni")}  # fmt: skip


def digest_of_products() -> str:
    """Of everything that the kernels compute, on all numbers of rows."""
    codes, _ = random_codes(100, 192, 32, 0)
    scales = torch.rand(600, generator=torch.Generator().manual_seed(0))
    weight = kernels.panels_of(codes, scales, 100, 192, 32)
    x = torch.randn(40, 192, generator=torch.Generator().manual_seed(1))
    results = [nf4_linear(x[:rows], weight) for rows in (1, 2, 3, 4, 7, 13, 40)]
    results += [nf4_dequantize(weight).contiguous()]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        results += [dense_linear(x[:rows], x.to(dtype)) for rows in (1, 2, 5)]
    return hashlib.sha256(b"".join(r.numpy().tobytes() for r in results)).hexdigest()


def test_a_processor_with_avx2_alone_computes_the_same_and_what_was_compiled_is_kept():
    """To the bit, so a machine with AVX-512 and an older one give the same answers."""
    said = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | HASWELL, text=True, capture_output=True
    )
    assert said.stdout.split() == ["avx2", digest_of_products()], said.stderr
    again = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | HASWELL, text=True, capture_output=True
    )
    assert again.stdout == said.stdout
    assert "compil" not in again.stderr


def test_what_is_not_finite_is_not_hidden():
    codes, scales = random_codes(20, 128, 64, 0)
    weight = kernels.panels_of(codes, scales, 20, 128, 64)
    for bad in (float("nan"), float("inf")):
        x = torch.randn(3, 128)
        x[1, 70] = bad
        finite = nf4_linear(x, weight).isfinite().all(-1)
        assert finite.tolist() == [True, False, True]


def test_dense_products_are_exact_to_float32():
    x = torch.randn(7, 160)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.randn(75, 160).to(dtype)
        exact = x.double() @ weight.double().T
        result = dense_linear(x, weight)
        assert ((result - exact).abs() <= 1e-6 * (x.abs().double() @ weight.abs().double().T)).all()
        assert torch.equal(dense_linear(x[5:6], weight), result[5:6])


@pytest.mark.parametrize("nested", [False, True])
def test_a_layer_in_panels_is_the_layer_it_was_made_of(nested):
    layer = bnb.nn.Linear4bit(192, 100, compute_dtype=torch.float32, quant_type="nf4",
                              compress_statistics=nested)  # fmt: skip
    layer = layer.to("cpu")
    layer.bias = nn.Parameter(torch.randn(100), requires_grad=False)
    weight, state = layer.weight, layer.weight.quant_state
    reference = bnb.functional.dequantize_4bit(weight.data, state)
    panels = PanelLinear.of(layer)
    assert torch.equal(dense_weight(panels, torch.float32), reference)
    codes, state = bitsandbytes_form(panels)
    assert torch.equal(codes, weight.data)
    assert torch.equal(bnb.functional.dequantize_4bit(codes, state), reference)
    with pytest.raises((AttributeError, AssertionError)):  # nobody reads panels as codes in order
        bnb.functional.dequantize_4bit(panels.weight.data, panels.weight.quant_state)

    x = torch.randn(3, 5, 192, requires_grad=True)
    expected = nn.functional.linear(x, reference, layer.bias)
    torch.testing.assert_close(panels(x.detach()), expected)
    torch.testing.assert_close(quick_product(x.detach(), panels), expected, rtol=1e-3, atol=2e-3)
    with pytest.raises(TypeError, match="no gradient by itself"):
        panels(x)
    mine, other = (
        torch.autograd.grad((y * torch.arange(100)).sum(), x)[0]
        for y in (cpu.linear(x, panels), expected)
    )
    torch.testing.assert_close(mine, other)
    gradient = torch.randn(40, 100)
    torch.testing.assert_close(nf4_linear_backward(gradient, panels.panels), gradient @ reference)


@compiled
def add_in_turns(thread, threads, board, address, turns):
    """Each thread writes what the others wrote before, plus one: wrong without barriers."""
    for turn in range(turns):
        if turn % threads == thread:
            part = take_part(board, turn, 1)
            publish(address + (turn + 1) * 8, turn + 1 + part)
        barrier(board, threads)


def test_a_crew_keeps_step_and_survives_a_fault():
    for threads in (1, 2, 5):
        crew = Crew(threads)
        numbers = numpy.zeros(301, numpy.int64)
        for _ in range(3):
            numbers[:] = 0
            crew.run(add_in_turns, numbers.ctypes.data, 300)
            assert numbers.tolist() == list(range(301))

        def fail(thread: int, threads: int, board: int, only: int) -> None:
            if thread == only:
                raise ValueError(f"thread {thread}")

        for only in range(threads):
            with pytest.raises(ValueError, match=f"thread {only}"):
                crew.run(fail, only)
        crew.run(add_in_turns, numbers.ctypes.data, 300)


def test_nobody_waits_for_a_thread_that_failed():
    for threads in (2, 3):
        crew, numbers = Crew(threads), numpy.zeros(31, numpy.int64)

        def fail_or_wait(thread: int, threads: int, board: int, only: int) -> None:
            if thread == only:
                raise ValueError(f"thread {thread}")
            barrier(board, threads)

        for only in range(threads):
            with pytest.raises(ValueError, match=f"thread {only}"):
                crew.run(fail_or_wait, only)
            numbers[:] = 0
            crew.run(add_in_turns, numbers.ctypes.data, 30)
            assert numbers.tolist() == list(range(31))


@pytest.mark.parametrize(("place", "worked"), [("_begin", [1]), ("_wait", [0, 1, 2])])
def test_a_call_that_is_stopped_returns_after_all_threads_have_ended(place, worked, monkeypatch):
    """Ctrl-C after one of the others was called, or while they are waited for: they write to memory
    of the caller's."""
    crew, ended = Crew(3), []

    def work(thread: int, threads: int, board: int) -> None:
        barrier(board, threads)
        time.sleep(0.02 * thread)
        ended.append(thread)

    def stopped(*given: Any) -> None:
        patch.undo()
        if given:
            crew._calls[0].put((crew._number, *given))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(crew, place, stopped)
        with pytest.raises(KeyboardInterrupt):
            crew.run(work)
        assert ended == worked
    crew.run(work)
    assert ended == [*worked, 0, 1, 2]


def test_the_target_is_chosen_by_the_processor_or_by_name(monkeypatch):
    choose = target.choose.__wrapped__
    monkeypatch.setattr(target, "processor_features", lambda: frozenset({"avx2", "fma", "f16c"}))
    monkeypatch.delenv(target.SWITCH, raising=False)
    assert choose() == ("avx2", "avx2")
    monkeypatch.setenv(target.SWITCH, "off")
    assert choose()[0] == ""
    monkeypatch.setenv(target.SWITCH, "avx512")
    with pytest.raises(PhiSightError, match="avx512bw"):
        choose()
    monkeypatch.setenv(target.SWITCH, "sse")
    with pytest.raises(PhiSightError, match="choose avx512, avx2 or off"):
        choose()
    monkeypatch.delenv(target.SWITCH)
    monkeypatch.setattr(target, "processor_features", lambda: frozenset())
    assert choose() == ("", "the processor has neither AVX2 nor AVX-512")
    monkeypatch.setattr(target.platform, "machine", lambda: "arm64")
    assert choose()[0] == ""


def test_compiled_code_is_kept_by_what_it_was_compiled_from(monkeypatch, tmp_path):
    find = cache_folder.__wrapped__
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = find()
    assert first is not None and first.is_relative_to(tmp_path) and first == find()
    monkeypatch.setattr("ops.kernels.compiling.choose", lambda: ("other", ""))
    assert find() != first
    find().chmod(0o777)  # numba's pickles could be anybody's
    assert find() is None
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert find() is None


def three_times(number: int) -> int:
    return 3 * number


def use_kept() -> int:
    """How often what was kept on the disk was of use."""
    function = compiled(three_times)
    assert function(14) == 42
    return sum(function.stats.cache_hits.values())


@pytest.mark.parametrize("pattern", ["*.nbc", "*.nbi"])
@pytest.mark.parametrize("damage", [lambda old: b"", lambda old: old[:9] + b"?" + old[10:]])
def test_compiled_code_that_was_damaged_is_compiled_anew(
    damage, pattern, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(compiling, "cache_folder", lambda: tmp_path)
    compiling.warn.cache_clear()
    assert (use_kept(), use_kept()) == (0, 1)
    (file,) = tmp_path.rglob(pattern)
    file.write_bytes(damage(file.read_bytes()))
    assert (use_kept(), use_kept()) == (0, 1)
    assert capsys.readouterr().err.count("damaged; compiling it anew") == 1


def test_a_copy_of_a_file_has_the_code_that_was_kept_and_a_changed_one_does_not(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(compiling, "cache_folder", lambda: tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    results = []
    for place, text in (("here", "3 *"), ("there", "3 *"), ("changed", "5 *")):
        (tmp_path / place).mkdir()
        file = tmp_path / place / "of_a_copy.py"
        file.write_text(f"def times(number):\n    return {text} number\n")
        spec = importlib.util.spec_from_file_location("of_a_copy", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setitem(sys.modules, "of_a_copy", module)
        function = compiled(module.times)
        results.append((function(14), sum(function.stats.cache_hits.values())))
    assert results == [(42, 0), (42, 1), (70, 0)]


def test_a_full_disk_keeps_no_compiled_code_and_it_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compiling, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(compiling, "_not_kept", set())
    compiling.warn.cache_clear()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        compiling.prepare("numbers", use_kept)
    compiling.prepare("numbers", use_kept)
    said = capsys.readouterr().err
    assert "is not kept (No space left on device)" in said
    assert said.count("compiling numbers") == 2  # what was not kept was not done


def test_the_sum_of_a_block_cannot_overflow():
    assert max(kernels.layout.BLOCKS) * MOST_LEVEL * MOST_ACTIVATION < 2**31
    assert max(map(abs, LEVELS)) <= MOST_LEVEL


def test_a_padded_panel_is_zeros():
    codes, scales = random_codes(5, 64, 64, 0)
    weight = kernels.panels_of(codes, scales, 5, 64, 64)
    assert isinstance(weight, PanelWeight) and weight.panels == 1
    assert nf4_linear(torch.ones(1, 64), weight).shape == (1, 5)
    assert weight.scales[:, :, 5:].eq(0).all()
    assert math.prod(weight.codes.shape) == 16 * 64 // 2
