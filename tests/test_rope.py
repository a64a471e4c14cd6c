"""LongRoPE around its crossing: with and without a cache, alone, beside short rows, and packed."""

import pytest
import torch
from random_model import NO_PICTURES, PLACEHOLDER, Row, continued, phi, reference_phi, tokens
from transformers import Phi3ForCausalLM

from assistant.decoding import Decoding
from data.collate import batch_of


@torch.no_grad()
def reference(model: Phi3ForCausalLM, ids: list[int]) -> torch.Tensor:
    """transformers' logits of the next token, without a cache, the sequence alone."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    found, expected = found[:PLACEHOLDER], expected[:PLACEHOLDER]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 * expected.abs().max().item())


@pytest.mark.parametrize("length", [4094, 4095, 4096, 4097, 4300])
def test_next_to_short_rows_or_alone_cached_or_not(length):
    """At Phi-3.5's own crossing: 4,096 tokens."""
    ours, theirs = phi(4096), reference_phi(4096)
    prompts = [tokens(length), tokens(12, 1), tokens(70, 2)]
    batched, alone = Decoding(ours), [Decoding(ours) for _ in prompts]
    batched.add([Row(list(prompt), NO_PICTURES) for prompt in prompts])
    for decoding, prompt in zip(alone, prompts):
        decoding.add([Row(list(prompt), NO_PICTURES)])
    for more in [[], tokens(4, 3)]:
        for token in more:
            for decoding in (batched, *alone):
                decoding.advance([token] * len(decoding.rows))
                decoding.read_all()  # who has crossed is read anew
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
    ours.language_model.model.rotary.crossing = 10**6  # the cache outlives the crossing
    decoding.crossing = None
    decoding.advance(ids[-1:])
    expected = reference(reference_phi(4096), ids)
    assert (decoding.logits[0] - expected).abs().max() > 0.02 * expected.abs().max()


@pytest.mark.parametrize("crossing", [20, 24])
def test_rows_that_cross_at_different_times_say_what_they_say_alone(crossing):
    model = phi(crossing)
    prompts = [tokens(n, n) for n in (5, 17, crossing - 1, crossing, crossing + 3)]
    together = continued(model, [(prompt, NO_PICTURES) for prompt in prompts], {0}, 14)
    for prompt, said in zip(prompts, together):
        assert [said] == continued(model, [(prompt, NO_PICTURES)], {0}, 14)
        greedy = list(prompt)
        for token in said:
            assert reference(reference_phi(crossing), greedy)[:PLACEHOLDER].argmax() == token
            greedy.append(token)


@torch.no_grad()
def test_a_packed_row_holds_short_and_long_conversations():
    """Training packs several conversations into a row: each turns by its own length."""
    ours, theirs = phi(16), reference_phi(16)
    parts = [tokens(9, 1), tokens(20, 2), tokens(16, 3), tokens(17, 4)]
    ids = torch.tensor([sum(parts, [])])
    positions = torch.cat([torch.arange(len(part)) for part in parts])[None]
    segments = torch.cat([torch.full((len(part),), n + 1) for n, part in enumerate(parts)])[None]
    hidden = ours.hidden_states(batch_of(ids, ids, positions, segments, NO_PICTURES, PLACEHOLDER))
    logits = ours.language_model.lm_head(hidden)[0]
    end = 0
    for part in parts:
        end += len(part)
        assert_close(logits[end - 1], reference(theirs, part))
