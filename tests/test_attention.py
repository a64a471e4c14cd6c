"""The share of attention that goes to pictures, against transformers' own attention."""

from __future__ import annotations

import pytest
import torch
from conftest import draw_adapter
from random_model import hub_model, ours_of
from test_decoder import VOCABULARY, small_config
from transformers import Phi3ForCausalLM

from config import replace
from data.chat import RenderedSample, render
from data.collate import Batch, collate
from data.dataset import Message, Part
from evaluation import meter
from evaluation.attention import attention_shares, probabilities
from lora.layer import LoRALinear
from lora.merge import merged_weight
from model.build import Assembled, assemble
from model.projectors.mlp import MlpProjector
from model.vlm import VisionLanguageModel

PLACEHOLDER, FEATURES = VOCABULARY - 1, (4, 8)


def sample(before: int, after: int, answer: int, pictures: int, seed: int = 0) -> RenderedSample:
    """A conversation of random ids: pictures between two pieces of text, then an answer."""
    drawn = torch.Generator().manual_seed(seed)

    def text(count: int) -> list[int]:
        return torch.randint(1, PLACEHOLDER, (count,), generator=drawn).tolist()

    prompt = [*text(before), *[PLACEHOLDER] * FEATURES[0] * pictures, *text(after)]
    names = tuple(f"{seed}-{number}" for number in range(pictures))
    return RenderedSample(
        tuple(prompt + text(answer)),
        tuple([False] * len(prompt) + [True] * answer),
        names,
    )


def features_of(name: str) -> torch.Tensor:
    seed = int(name.replace("-", "00"))
    return torch.randn(FEATURES, generator=torch.Generator().manual_seed(seed))


def small_model(hub: Phi3ForCausalLM) -> VisionLanguageModel:
    torch.manual_seed(1)
    projector = MlpProjector(FEATURES[1], hub.config.hidden_size)
    return VisionLanguageModel(ours_of(hub), projector, PLACEHOLDER).requires_grad_(False).eval()


@torch.no_grad()
def expected_shares(
    model: VisionLanguageModel, hub: Phi3ForCausalLM, batches: list[tuple[Batch, list]]
) -> list[torch.Tensor]:
    """(rows of all answers,) of each layer, one conversation at a time by transformers."""
    hub.set_attn_implementation("eager")
    rows: list[list[torch.Tensor]] = [[] for _ in range(hub.config.num_hidden_layers)]
    for batch, _ in batches:
        embeddings = model.embed(batch.input_ids, batch.image_features, batch.slots)
        is_learnt = torch.zeros_like(batch.input_ids).flatten().bool()
        is_learnt[batch.predicting] = True
        is_learnt = is_learnt.view_as(batch.input_ids)
        for row, segments in enumerate(batch.segment_ids):
            for number in range(1, int(segments.max()) + 1):
                here = segments == number
                pictures = batch.input_ids[row, here] == model.placeholder_id
                if not pictures.any():
                    continue
                told = hub(inputs_embeds=embeddings[row, here][None], output_attentions=True)
                for layer, weights in enumerate(told.attentions):  # (1, heads, tokens, tokens)
                    mean = weights[0].mean(0)[is_learnt[row, here]][:, pictures].sum(-1)
                    rows[layer].append(mean)
    return [torch.cat(layer) for layer in rows]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_heads": 1},
        {"kv_heads": 2, "heads": 8, "partial": 0.5},
        {"window": 6},
        {"longrope": True, "layers": 3},
    ],
    ids=str,
)
def test_shares_are_those_of_transformers_eager_attention(options):
    """Packed rows with padding, conversations of two pictures and of none, windows, few heads."""
    hub = hub_model(small_config(**options))
    model = small_model(hub)
    rows = [
        [sample(3, 4, 5, 1, 1), sample(2, 6, 3, 2, 2)],
        [sample(4, 4, 4, 0, 3), sample(1, 1, 1, 1, 4), sample(5, 9, 2, 1, 5)],
        [sample(2, 2, 9, 1, 6)],
    ]
    batch = collate(rows, features_of, 0, PLACEHOLDER, FEATURES, row_tokens=90)
    assert batch.leaves_out  # the places in the rows are not those that the layers are given
    found = attention_shares(model, [(batch, [])])
    expected = expected_shares(model, hub, [(batch, [])])
    assert found.tokens == len(expected[0]) == 5 + 3 + 1 + 2 + 9
    for share, reference in zip(found.by_layer, expected, strict=True):
        assert share == pytest.approx(reference.mean().item(), abs=1e-5)
    assert len({round(share, 4) for share in found.by_layer}) > 1


@pytest.fixture(scope="module")
def tiny(tiny_config) -> Assembled:
    parts = assemble(replace(tiny_config, quantization="none"))
    draw_adapter(parts.model)
    parts.model.eval().requires_grad_(False)
    return parts


def tiny_batches(tiny: Assembled, store, prepared, in_a_row: int) -> list[tuple[Batch, list]]:
    """Four short conversations, so many of the longest of them in a row."""
    names = list(dict.fromkeys(name for one in prepared.train for name in one.images))[:4]
    samples = [
        render(
            [
                Message("user", (Part("image", name), Part("text", "What is the largest thing?"))),
                Message("assistant", (Part("text", answer),)),
            ],
            tiny.chat_format,
        )
        for name, answer in zip(names, ("a red star", "blue", "", "three circles"), strict=True)
    ]
    chat, longest = tiny.chat_format, max(len(one.input_ids) for one in samples)
    return meter.packed_batches(
        samples, in_a_row * longest, store.features_of, chat.padding_id, chat.image_id,
        store.shape, torch.device("cpu"),
    )  # fmt: skip


def test_shares_of_the_tiny_base_are_those_of_transformers(tiny, tiny_config, store, prepared):
    hub = Phi3ForCausalLM.from_pretrained(tiny_config.base, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, layer in tiny.model.language_model.named_modules():
            if isinstance(layer, LoRALinear):
                hub.get_submodule(name).weight.copy_(merged_weight(layer))
    batches = tiny_batches(tiny, store, prepared, 3)
    found = attention_shares(tiny.model, batches)
    expected = expected_shares(tiny.model, hub, batches)
    for share, reference in zip(found.by_layer, expected, strict=True):
        assert share == pytest.approx(reference.mean().item(), abs=1e-5)
        assert 0 < share < 1
    assert found.tokens == len(expected[0])


def test_the_shares_do_not_depend_on_how_the_conversations_are_packed(tiny, store, prepared):
    wide, narrow = (
        attention_shares(tiny.model, tiny_batches(tiny, store, prepared, room)) for room in (4, 1)
    )
    assert wide.by_layer == pytest.approx(narrow.by_layer, abs=1e-6)
    assert wide.chance == pytest.approx(narrow.chance) and wide.tokens == narrow.tokens


def test_equal_attention_to_all_gives_the_share_of_chance():
    """Queries of zeros score every key alike."""
    hub = hub_model(small_config(head_dim=16, heads=4, kv_heads=2))
    model = small_model(hub)
    for layer in model.language_model.model.layers:
        layer.self_attn.qkv_proj.weight[: 4 * 16] = 0.0
    one = sample(3, 4, 3, 1)  # asked from the last token of the prompt and two of the answer
    batch = collate([[one]], features_of, 0, PLACEHOLDER, FEATURES)
    found = attention_shares(model, [(batch, [])])
    expected = sum(4 / seen for seen in (11, 12, 13)) / 3  # 3 + 4 + 4 tokens before the answer
    assert found.by_layer == pytest.approx([expected] * 2, abs=1e-6)
    assert found.chance == pytest.approx(expected, abs=1e-12) and found.tokens == 3


def test_chance_counts_what_a_window_lets_a_token_see():
    hub = hub_model(small_config(window=6))
    model = small_model(hub)
    for layer in model.language_model.model.layers:
        layer.self_attn.qkv_proj.weight[: 4 * 16] = 0.0
    one = sample(3, 4, 3, 1)  # pictures at 3 to 6; asked from 10, 11, 12, which see 5, 6, 7 on
    batch = collate([[one]], features_of, 0, PLACEHOLDER, FEATURES)
    found = attention_shares(model, [(batch, [])])
    assert found.chance == pytest.approx((2 / 6 + 1 / 6 + 0) / 3)
    assert found.by_layer == pytest.approx([found.chance] * 2, abs=1e-6)


def test_each_row_of_probabilities_is_a_distribution_over_what_is_seen():
    drawn = torch.Generator().manual_seed(0)
    query, key = (torch.randn(heads, 9, 16, generator=drawn) for heads in (4, 2))
    for window, most in ((None, 9), (3, 3)):
        found = probabilities(query, key, window)
        torch.testing.assert_close(found.sum(-1), torch.ones(4, 9))
        assert torch.equal((found > 0).sum(-1)[0], torch.arange(1, 10).clamp(max=most))
        assert not found.triu(1).any()


def test_without_a_picture_there_is_no_share_and_the_model_is_left_as_it_was():
    model = small_model(hub_model(small_config()))
    batch = collate([[sample(4, 4, 4, 0)]], features_of, 0, PLACEHOLDER, FEATURES)
    for training in (True, False):
        model.train(training)
        assert attention_shares(model, [(batch, [])]) is None
        assert model.training is training
    for layer in model.language_model.model.layers:
        assert not layer.self_attn._forward_pre_hooks
