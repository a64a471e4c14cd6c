"""A head in 16 bits under float32 states: the logits, losses and gradients of the widened one."""

import pytest
import torch

from model.decoder import DecoderConfig, LanguageModel, Rope
from ops import head
from ops.head import head_logits, summed_cross_entropy

NARROW = (torch.bfloat16, torch.float16)


def drawn(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, 24) float32 states and a (50, 24) head."""
    generator = torch.Generator().manual_seed(rows)
    states = torch.randn(rows, 24, generator=generator)
    return states, torch.randn(50, 24, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", NARROW)
def test_a_head_that_is_one_slice_gives_the_same_bits(dtype):
    states, weight = drawn(5, dtype)
    assert torch.equal(head_logits(states, weight), states @ weight.float().T)
    assert head_logits(states[None], weight).shape == (1, 5, 50)
    assert head_logits(states[:0], weight).shape == (0, 50)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_slices_differ_by_the_rounding_of_sums_alone(monkeypatch, dtype, rows):
    states, weight = drawn(rows, dtype)
    monkeypatch.setattr(head, "SLICE_WEIGHTS", 7 * 24)  # 50 rows are seven slices and one of 1
    exact = states.double() @ weight.double().T
    # Every sum of 24 products of float32, rounded as it comes, is within this of the true one.
    bound = 24 * 2.0**-24 * (states.double().abs() @ weight.double().abs().T)
    assert ((head_logits(states, weight).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", NARROW)
def test_losses_and_gradients_are_those_of_the_widened_head(monkeypatch, dtype):
    monkeypatch.setattr(head, "SLICE_WEIGHTS", 7 * 24)
    monkeypatch.setattr(head, "CHUNK_LOGITS", 50 * 6)
    states, weight = drawn(40, dtype)
    targets = torch.arange(40)
    results = []
    for one in (weight, weight.float()):
        own = states.clone().requires_grad_()
        loss = summed_cross_entropy(own, one, targets)
        (loss + head_logits(own, one).square().mean()).backward()
        results.append((loss.detach(), own.grad))
    for narrow, wide in zip(*results, strict=True):
        torch.testing.assert_close(narrow, wide, atol=1e-5, rtol=1e-5)


def test_memory_for_slices_is_used_again():
    states, weight = drawn(3, torch.bfloat16)
    head_logits(states, weight)
    before = head._memory.tensor.data_ptr()
    head_logits(states, weight)
    assert head._memory.tensor.data_ptr() == before


def test_a_head_is_not_read_for_no_states(monkeypatch):
    monkeypatch.setattr(head, "widened", None)
    _, weight = drawn(3, torch.bfloat16)
    none = head_logits(torch.empty(0, weight.shape[1]), weight)
    assert none.shape == (0, len(weight))


@pytest.mark.parametrize("tied", [False, True])
def test_states_are_wide_where_the_table_is_narrow(tied):
    rope = Rope(10_000.0, 8)
    model = LanguageModel(DecoderConfig(50, 24, 32, 1, 3, 3, 8, 1e-5, 64, tied, None, rope))
    model.requires_grad_(False)
    wide = model.model.embed_tokens.weight.to(torch.bfloat16).float()
    ids = torch.arange(9)[None]
    outputs = []
    for table in (wide, wide.to(torch.bfloat16)):
        model.model.embed_tokens.weight = torch.nn.Parameter(table, requires_grad=False)
        model.model.embed_tokens.states_dtype = torch.float32
        model.tie()
        x = model.model.embed_tokens(ids)
        assert x.dtype == torch.float32
        outputs.append(model.lm_head(model.model(x, ids, [9])))
    assert model.model.empty_cache().memory.tensor.dtype == torch.float32
    assert torch.equal(*outputs)
