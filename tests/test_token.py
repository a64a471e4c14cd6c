"""A token in one compiled call: against the decoder's formulas in float32, alone and in company."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence

import pytest
import runs
import torch
from four_bit import LINEAR, VOCABULARY, four_bit_model, plain_model, small_config
from random_model import hub_model, logits_of, ours_of
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

import model.compiled as compiled_module
import ops.kernels.linear
from assistant.answer import Answer
from assistant.decoding import Decoding
from assistant.engine import Engine
from model import decoder
from model.cache import KeyValues
from model.compiled import CompiledDecoder, compiled_for
from model.decoder import LanguageModel
from model.projectors.mlp import MlpProjector
from model.vlm import VisionLanguageModel
from ops import kernels
from tools import same_answers

pytestmark = pytest.mark.skipif(
    not kernels.available()[0], reason=f"no kernels here: {kernels.available()[1]}"
)
TOLERANCE = 3e-3  # of the largest logit: what activations of 13 bits and keys of 16 bits cost
STEPS = 3
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + n / 7 for n in range(8)],
    "long_factor": [3.0 + n for n in range(8)],
    "original_max_position_embeddings": 40,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
MODELS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "plain": ({}, {}),
    "adapters": ({}, {"targets": LINEAR}),
    "adapters of parts": ({"num_key_value_heads": 2}, {"targets": ("k_proj", "gate_proj")}),
    "two adapters, nested scales": ({}, {"targets": ("o_proj", "down_proj"), "nested": True}),
    "grouped heads, window": ({"num_key_value_heads": 2, "sliding_window": 5}, {}),
    "one key-value head, long window": ({"num_key_value_heads": 1, "sliding_window": 290}, {}),
    "longrope": (
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 40},
        {"targets": ("qkv_proj",)},
    ),
    "partial rotary, tied head": (
        {"rope_parameters": PARTIAL, "tie_word_embeddings": True},
        {"targets": ("gate_up_proj",)},
    ),
    "wide heads": ({"hidden_size": 192, "num_attention_heads": 2, "num_key_value_heads": 2}, {}),
    "slowed positions": ({"kind": LlamaConfig, "rope_parameters": LLAMA3}, {}),
    "biases, adapters": ({"kind": Qwen2Config, "num_key_value_heads": 2}, {"targets": LINEAR}),
    "normalised heads": (
        {"kind": Qwen3Config, "num_key_value_heads": 2, "head_dim": 32},
        {"targets": ("qkv_proj",)},
    ),
}


def conversation(length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (length,), generator=generator)


def compiled(model: LanguageModel) -> CompiledDecoder:
    found, reason = compiled_for(model)
    assert found is not None, reason
    return found


@torch.no_grad()
def read(model: LanguageModel, tokens: torch.Tensor) -> KeyValues:
    """The cache of a beginning, whose LongRoPE factors are those of one that goes on a little."""
    cache, total = model.model.empty_cache(), len(tokens) + STEPS
    embeddings = model.model.embed_tokens(tokens[None])
    positions = torch.arange(len(tokens))[None]
    model.model(embeddings, positions, [len(tokens)], [cache], totals=[total])
    return cache


@torch.no_grad()
def advance(
    model: LanguageModel, caches: Sequence[KeyValues], rows: Sequence[torch.Tensor], steps: int
) -> torch.Tensor:
    """(steps, rows, vocabulary): each row goes on with its own next tokens."""
    one, found = compiled(model), []
    for _ in range(steps):
        tokens = torch.stack([row[cache.length] for row, cache in zip(rows, caches, strict=True)])
        totals = [cache.length + 1 for cache in caches]
        found.append(one.step(model.model.embed_tokens(tokens), caches, totals))
    return torch.stack(found)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_formulas(name):
    """Rows of different lengths together, within and beyond the chunks that contexts are cut in."""
    options, more = MODELS[name]
    model = four_bit_model(small_config(**options), **more)
    reference, before = plain_model(model), compiled(model)
    lengths = [1, 7, 50, 254, 300, 531]
    rows = [conversation(length + STEPS, seed) for seed, length in enumerate(lengths)]
    caches = [read(model, row[:-STEPS]) for row in rows]
    found = advance(model, caches, rows, STEPS)
    assert before is compiled(model) and caches[0].memory.tensor.dtype == torch.float16
    for index, row in enumerate(rows):
        assert caches[index].length == len(row)
        assert_near(found[:, index], logits_of(reference, row)[-STEPS:])


def test_every_option_changes_the_logits_by_more_than_the_tolerance():
    row = conversation(320)
    expected = {
        name: logits_of(plain_model(four_bit_model(small_config(**options), **more)), row)[-1]
        for name, (options, more) in MODELS.items()
    }
    for name, logits in expected.items():
        if name != "plain":
            difference = (logits - expected["plain"]).abs().max() / logits.abs().max()
            assert difference > 10 * TOLERANCE, name


def test_a_row_has_the_same_numbers_alone_and_in_company_on_any_number_of_threads(monkeypatch):
    model = four_bit_model(small_config(num_key_value_heads=2), targets=LINEAR)
    rows = [conversation(length + STEPS, seed) for seed, length in enumerate(range(3, 600, 33))]
    compiled(model)
    expected = [advance(model, [read(model, row[:-STEPS])], [row], STEPS)[:, 0] for row in rows]
    for threads, count in ((1, 5), (1, 16), (2, 7), (3, len(rows))):  # 19 rows are two calls
        monkeypatch.setattr(ops.kernels.linear, "threads_for", lambda _, t=threads: t)
        chosen = rows[-count:]
        found = advance(model, [read(model, row[:-STEPS]) for row in chosen], chosen, STEPS)
        assert torch.equal(found, torch.stack(expected[-count:], 1)), (threads, count)


def test_rows_that_begin_alike_share_memory_until_one_of_them_goes_on():
    model = four_bit_model(small_config())
    compiled(model)
    start = conversation(70)
    first, second = (torch.cat([start, conversation(STEPS, seed)]) for seed in (1, 2))
    kept = read(model, start)
    shared = [kept.prefix(70), kept.prefix(70)]
    alone = [read(model, start) for _ in range(2)]
    found = advance(model, shared, [first, second], STEPS)
    assert torch.equal(found, advance(model, alone, [first, second], STEPS))
    assert shared[0].memory is kept.memory and shared[1].memory is not kept.memory


def test_what_is_kept_in_float16_is_read_alike_however_it_is_cut(monkeypatch):
    """By whole heads, some at a time."""
    model = four_bit_model(small_config(num_key_value_heads=2))
    compiled(model)
    row = conversation(90)

    def last(model: LanguageModel) -> torch.Tensor:
        cache = read(model, row[:60])
        positions = torch.arange(60, 90)[None]
        with torch.no_grad():
            return model.model(model.model.embed_tokens(row[None, 60:]), positions, [30], [cache])

    whole = last(model)
    monkeypatch.setattr(decoder, "WIDENED", 1)
    assert torch.equal(last(model), whole)
    assert_near(model.lm_head(whole)[0], logits_of(plain_model(model), row)[60:])


@pytest.mark.parametrize("length", [0, 6])
def test_values_beyond_float16_are_kept_in_float32_and_it_is_said(length, caplog):
    """Met in reading a prompt, or in a token."""
    model = four_bit_model(small_config(), value_scale=3e5)
    reference, row = plain_model(model), conversation(20)
    compiled(model)
    cache = read(model, row[:length]) if length else model.model.empty_cache()
    with caplog.at_level(logging.WARNING, "phisight.cache"):
        found = advance(model, [cache], [row], STEPS)
    assert_near(found[:, 0], logits_of(reference, row)[length : length + STEPS])
    assert cache.memory.tensor.dtype == torch.float32
    assert length or "beyond 65504" in caplog.text


def test_a_row_that_is_kept_in_float32_changes_no_other():
    """Values of about the size at which float16 ends: some rows have larger ones, some not."""
    model = four_bit_model(small_config(), value_scale=65504 / 3)
    compiled(model)
    rows = [conversation(STEPS, seed) for seed in range(9)]
    caches = [model.model.empty_cache() for _ in rows]
    found = advance(model, caches, rows, STEPS)
    assert {cache.memory.tensor.dtype for cache in caches} == {torch.float16, torch.float32}
    for index, row in enumerate(rows):
        alone = advance(model, [model.model.empty_cache()], [row], STEPS)
        assert torch.equal(found[:, index], alone[:, 0])


def test_a_changed_adapter_is_the_one_that_counts():
    language = four_bit_model(small_config(), targets=LINEAR)
    model = VisionLanguageModel(language, MlpProjector(8, 64), VOCABULARY - 1)
    decoding: Decoding = Decoding(model)
    row = conversation(12).tolist()

    def logits() -> torch.Tensor:
        decoding.keep([])
        decoding.add([Row(row[:-1])])
        decoding.advance(row[-1:])
        return decoding.logits[0, :-1]

    before = logits()
    torch.nn.init.normal_(language.model.layers[1].mlp.down_proj.lora_B)
    after = logits()
    assert_near(after, logits_of(plain_model(language), torch.tensor(row))[-1, :-1])
    assert (before - after).abs().max() > 0.1


def test_a_changed_part_of_an_adapter_makes_another_decoder():
    language = four_bit_model(small_config(), targets=("q_proj", "v_proj"))
    before = compiled(language)
    assert compiled(language) is before
    with torch.no_grad():
        language.model.layers[0].self_attn.qkv_proj.parts()["q_proj"].lora_B.mul_(2)
    assert compiled(language) is not before


def test_a_copy_of_a_model_that_answered_decodes_by_its_own_weights():
    model, row = four_bit_model(small_config(), targets=LINEAR), conversation(STEPS)
    compiled(model)
    copied = copy.deepcopy(model)
    torch.nn.init.normal_(copied.model.layers[1].mlp.down_proj.lora_B)
    for one in (model, copied):
        found = advance(one, [one.model.empty_cache()], [row], STEPS)[:, 0]
        assert_near(found, logits_of(plain_model(one), row))


class Row:
    """A sequence for `Decoding` alone."""

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.image_features = ids, torch.zeros(0, 4, 8)


def test_an_engine_says_what_the_formulas_say_where_rows_cross_and_conversations_go_on():
    """LongRoPE's crossing at 40 tokens; second turns over the keys and values of the first."""
    language = four_bit_model(small_config(**MODELS["longrope"][0]))
    reference = plain_model(language)
    model = VisionLanguageModel(language, MlpProjector(8, 64), VOCABULARY - 1)
    engine = Engine(model, frozenset(), 4, max_rows=3, prefix_bytes=2**20)
    pictures, words = torch.zeros(0, 4, 8), conversation(200) % (VOCABULARY - 1)
    prompts = [words[n : 2 * n].tolist() for n in (9, 33, 39, 41)]
    try:
        for _ in range(2):
            answers = [Answer(list(prompt), 12, pictures) for prompt in prompts]
            for answer in answers:
                engine.submit(answer)
            for answer, prompt in zip(answers, prompts):
                answer.wait()
                logits = logits_at_each(reference, prompt, answer.tokens)
                chosen = logits[torch.arange(12), answer.tokens]
                assert (logits.amax(1) - chosen < TOLERANCE * logits.abs().amax()).all()
            prompts = [[*answer.ids, *words[:3].tolist()] for answer in answers]
        assert engine.statistics()["prefix_cache_hits"] > 60
    finally:
        engine.close()


def logits_at_each(model: LanguageModel, prompt: list[int], said: list[int]) -> torch.Tensor:
    """(said, vocabulary but the placeholder): of each token, by all those before it alone."""
    ids = torch.tensor([*prompt, *said])
    ends = range(len(prompt), len(ids))
    return torch.stack([logits_of(model, ids[:end])[-1, :-1] for end in ends])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"hidden_size": 96}, "heads of 24 numbers, not a multiple of 16"),
        (
            {"kind": Qwen3Config, "head_dim": 16},
            "normalised heads of 16 numbers, not a multiple of 32",
        ),
        ({}, "2 layers are more than 1"),
    ],
)
def test_what_compiled_code_does_not_take_is_decoded_as_ever(options, reason, monkeypatch):
    monkeypatch.setattr(compiled_module, "MOST_LAYERS", 1)
    model = four_bit_model(small_config(**options))
    assert compiled_for(model) == (None, f"a token by PyTorch, layer by layer: {reason}")
    assert model.model.empty_cache().memory.tensor.dtype == torch.float32


def test_a_model_that_is_not_in_four_bits_is_decoded_as_ever():
    found, reason = compiled_for(ours_of(hub_model(small_config())))
    assert found is None and "not in the order of the 4-bit kernels" in reason


def test_a_run_says_the_same_as_without_the_kernels(monkeypatch, capsys):
    """A few questions of a small run; the whole held-out set is `python -m tools.same_answers`."""

    def in_this_process(side: str, arguments: Sequence[str]) -> list[str]:
        with monkeypatch.context() as patch:
            if side == "reference":
                patch.setattr(kernels, "available", lambda: ("", "switched off"))
            return same_answers.answers_of(str(runs.finished_run()), 6, 12, side)

    monkeypatch.setattr(same_answers, "in_a_process", in_this_process)
    assert same_answers.main([]) == 0
    said = capsys.readouterr()
    assert "12 of 12 answers are equal" in said.out
    assert "one compiled call" in said.err and "layer by layer" in said.err
