"""LongRoPE around its crossing: with and without a cache, alone, beside short rows, and packed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Phi3Config, Phi3ForCausalLM

from model.decoding import Decoding, Row
from model.generate import generate
from model.projector import ImageProjector
from model.rope import SegmentLongRope, ends_of_segments
from model.vlm import VisionLanguageModel

VOCABULARY, DIM = 97, 64
NO_PICTURES = torch.zeros(0, 4, 8)


def phi(crossing: int, ours: bool = True) -> VisionLanguageModel:
    """Two layers of random weights whose angles differ greatly past the crossing; `ours` or with
    transformers' own rotary module."""
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=VOCABULARY, hidden_size=DIM, intermediate_size=DIM, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4 * crossing,
        original_max_position_embeddings=crossing, pad_token_id=0, sliding_window=None,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8,
            "long_factor": [40.0] * 8, "original_max_position_embeddings": crossing,
        },
    )
    model = Phi3ForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if ours:
        model.model.rotary_emb = SegmentLongRope(config)
    return VisionLanguageModel(model, ImageProjector(8, DIM), placeholder_id=VOCABULARY - 1)


def tokens(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY - 1, (length,), generator=generator).tolist()


@torch.no_grad()
def reference(model: VisionLanguageModel, ids: list[int]) -> torch.Tensor:
    """transformers' logits of the next token, without a cache, the sequence alone."""
    return model.language_model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 * expected.abs().max().item())


@pytest.mark.parametrize("length", [4094, 4095, 4096, 4097, 4300])
def test_next_to_short_rows_or_alone_cached_or_not(length):
    """At Phi-3.5's own crossing: 4,096 tokens."""
    ours, theirs = phi(4096), phi(4096, ours=False)
    prompts = [tokens(length), tokens(12, 1), tokens(70, 2)]
    batched, alone = Decoding(ours), [Decoding(ours) for _ in prompts]
    batched.add([Row(list(prompt), NO_PICTURES) for prompt in prompts])
    for decoding, prompt in zip(alone, prompts):
        decoding.add([Row(list(prompt), NO_PICTURES)])
    for more in [[], tokens(4, 3)]:
        for token in more:
            for decoding in (batched, *alone):
                decoding.advance([token] * len(decoding.rows))
        by_ids = {len(row.ids): logits for row, logits in zip(batched.rows, batched.logits)}
        for decoding, prompt in zip(alone, prompts):
            expected = reference(theirs, prompt + more)
            assert_close(decoding.logits[0], expected)
            assert_close(by_ids[len(prompt) + len(more)], expected)


def test_the_factors_matter_here():
    """What the tests above would miss if both sets of factors gave the same logits."""
    ours, ids = phi(4096), tokens(4097)
    decoding = Decoding(ours)
    decoding.add([Row(ids[:-1], NO_PICTURES)])
    ours.language_model.model.rotary_emb.crossing = 10**6  # the cache outlives the crossing
    decoding.crossing = None
    decoding.advance(ids[-1:])
    expected = reference(phi(4096, ours=False), ids)
    assert (decoding.logits[0] - expected).abs().max() > 0.02 * expected.abs().max()


@pytest.mark.parametrize("crossing", [20, 24])
def test_rows_that_cross_at_different_times_say_what_they_say_alone(crossing):
    model = phi(crossing)
    prompts = [tokens(n, n) for n in (5, 17, crossing - 1, crossing, crossing + 3)]
    together: list[list[int]] = [[] for _ in prompts]
    for step in generate(model, prompts, NO_PICTURES, {0}, 14):
        for said, token in zip(together, step):
            said += [token] if token is not None else []
    for prompt, said in zip(prompts, together):
        alone = [t for (t,) in generate(model, [prompt], NO_PICTURES, {0}, 14)]
        assert said == alone
        greedy = list(prompt)
        for token in said:
            assert reference(phi(crossing, ours=False), greedy).argmax() == token
            greedy.append(token)


@torch.no_grad()
def test_a_packed_row_holds_short_and_long_conversations():
    """Training packs several conversations into a row: each turns by its own length."""
    ours, theirs = phi(16), phi(16, ours=False)
    parts = [tokens(9, 1), tokens(20, 2), tokens(16, 3), tokens(17, 4)]
    ids = torch.tensor([sum(parts, [])])
    positions = torch.cat([torch.arange(len(part)) for part in parts])[None]
    segments = torch.cat([torch.full((len(part),), n + 1) for n, part in enumerate(parts)])[None]
    hidden = ours.hidden_states(ids, positions, segments, NO_PICTURES)
    logits = ours.language_model.lm_head(hidden)[0]
    end = 0
    for part in parts:
        end += len(part)
        assert_close(logits[end - 1], reference(theirs, part))


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=4))
def test_every_token_knows_the_end_of_its_segment(rows):
    width = max(map(sum, rows))
    rows = [[1] * (width - sum(row)) + row for row in rows]  # left padding: segments of one token
    positions = torch.tensor([[p for n in row for p in range(n)] for row in rows])
    expected = torch.tensor([[n - 1 for n in row for _ in range(n)] for row in rows])
    assert torch.equal(ends_of_segments(positions), expected)
