"""What the engine says: against transformers, without a cache, alone; and the choice of a token."""

import pytest
import runs
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_model import NO_PICTURES, PLACEHOLDER, continued, phi, reference_phi, tokens
from transformers import Phi3Config, Phi3ForCausalLM

from assistant.sampling import Sampling, choose
from data.chat import RenderedSample, render
from data.collate import batch_of
from data.dataset import Message, Part
from errors import PhiSightError
from evaluation import meter
from lora.merge import merged_state

NEW_TOKENS = 12


@pytest.fixture
def prompts(prepared, parts, store) -> list[tuple[list[int], torch.Tensor]]:
    """Prompts of different lengths with one, two and no pictures, and their features."""
    names = sorted({name for sample in prepared.train for name in sample.images})

    def prompt(pictures: list[str], text: str) -> tuple[list[int], torch.Tensor]:
        asked = [*[Part("image", name) for name in pictures], Part("text", text)]
        message = Message("user", tuple(asked))
        ids = render([message], parts.chat_format, add_generation_prompt=True).input_ids
        return ids, stack([store.features_of(name) for name in pictures], store.shape)

    return [
        prompt(names[:1], "Describe the picture in detail."),
        prompt(names[1:3], "What colour is the star?"),
        prompt([], "How many objects are there?"),
        prompt(names[3:4], "Where is the red object?"),
    ]


def stack(features: list[torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
    return torch.stack(features) if features else torch.zeros(0, *shape)


@pytest.fixture
def stop_ids(parts) -> set[int]:
    return set(parts.chat_format.stop_ids)


def answer(model, prompt, stop_ids, limit=NEW_TOKENS, **options) -> list[int]:
    return continued(model, [prompt], stop_ids, limit, **options)[0]


@pytest.fixture
def never(parts) -> set[int]:
    """A stop id that no row reaches: a token that neither training nor chats ever have."""
    return {parts.base.tokenizer.backend_tokenizer.token_to_id("</s>")}


# -- greedy ---------------------------------------------------------------------------------------


@pytest.fixture(params=["stopping", "going on"])
def stops(request, stop_ids, never) -> set[int]:
    """Both: a short answer shows the stop, a long one shows the cache."""
    return stop_ids if request.param == "stopping" else never


@pytest.fixture
def reference(model) -> Phi3ForCausalLM:
    """transformers' own model of the same weights, dequantised and merged."""
    theirs = Phi3ForCausalLM(Phi3Config.from_pretrained(runs.BASE)).eval()
    theirs.load_state_dict(dict(merged_state(model.language_model)), strict=True)
    return theirs


@torch.no_grad()
def test_greedy_is_what_transformers_generates(model, reference, prompts, stops):
    for ids, features in prompts:
        theirs = reference.generate(
            inputs_embeds=model.embed(torch.tensor([ids]), features),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=sorted(stops),
        )[0].tolist()
        if theirs[-1] in stops:
            theirs.pop()
        assert answer(model, (ids, features), stops) == theirs


@torch.no_grad()
def test_without_repeated_n_grams_it_is_what_transformers_generates(
    model, reference, prompts, never
):
    """Of the chat's own prompts, without a picture: one's slots count for transformers."""
    ids, features = prompts[2]
    plain = answer(model, (ids, features), never)
    for size in (2, 3):
        theirs = reference.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            no_repeat_ngram_size=size,
            eos_token_id=sorted(never),
        )[0, len(ids) :].tolist()
        sampling = Sampling(no_repeat_ngram_size=size)
        said = answer(model, (ids, features), never, sampling=sampling)
        assert said == theirs and said != plain


@torch.no_grad()
def test_greedy_is_what_the_model_says_without_a_cache(model, prompts, stops):
    for prompt in prompts:
        ids, features = prompt
        said: list[int] = []
        while len(said) < NEW_TOKENS:
            input_ids = torch.tensor([ids + said])
            positions = torch.arange(input_ids.shape[1])[None]
            one = torch.ones_like(input_ids)
            batch = batch_of(input_ids, input_ids, positions, one, features, model.placeholder_id)
            hidden = model.hidden_states(batch)
            token = model.language_model.lm_head(hidden[:, -1]).argmax(-1).item()
            if token in stops:
                break
            said.append(token)
        assert answer(model, prompt, stops) == said


@torch.no_grad()
@pytest.mark.parametrize("length", [5, 15, 16, 17])
def test_a_cache_does_not_outlive_the_factors_of_longrope(length):
    ours, theirs = phi(16), reference_phi(16)
    ids, said = tokens(length), []
    while len(said) < 20:
        logits = theirs(torch.tensor([ids + said])).logits[0, -1]
        said.append(logits[:PLACEHOLDER].argmax().item())
    assert answer(ours, (ids, NO_PICTURES), {0}, 20) == said


def test_batched_rows_are_the_rows_alone(model, prompts, stops):
    alone = [answer(model, prompt, stops) for prompt in prompts]
    assert len({len(ids) for ids, _ in prompts}) > 1  # so some rows are padded
    assert continued(model, prompts, stops, NEW_TOKENS) == alone


def test_positions_count_from_each_prompts_own_start(model, prompts, never):
    """RoPE would not show a shift, but LongRoPE's choice of factors sees the largest position."""
    seen: list[list[int]] = []
    hook = model.language_model.model.rotary.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].tolist())
    )
    rows = sorted((ids for ids, _ in prompts), key=len)  # the order in which they are read
    with hook:
        continued(model, prompts, never, 3)
    assert seen[0] == [position for ids in rows for position in range(len(ids))]
    assert seen[1:] == [[len(ids) + step for ids in rows] for step in range(2)]


def test_a_stop_id_ends_its_row_only_and_is_not_given_out(model, prompts, never):
    free = [answer(model, prompt, never) for prompt in prompts]
    assert all(len(row) == NEW_TOKENS for row in free)
    chosen = {free[0][3]}
    expected = [row[: next((i for i, t in enumerate(row) if t in chosen), None)] for row in free]
    together = continued(model, prompts, chosen, NEW_TOKENS)
    assert together == expected
    assert len(together[0]) <= 3


def test_a_first_token_that_stops_gives_nothing(model, prompts, never):
    first = answer(model, prompts[0], never)[0]
    assert answer(model, prompts[0], {first}) == []


def test_at_most_the_tokens_asked_for(model, prompts, never):
    long = answer(model, prompts[0], never)
    for limit in (0, 1, 5):
        assert answer(model, prompts[0], never, limit) == long[:limit]


def test_too_few_pictures_name_both_numbers(model, prompts, stop_ids, store):
    ids, features = prompts[1]
    tokens = store.shape[0]
    with pytest.raises(PhiSightError, match=rf"\b{2 * tokens}\b.*\b{tokens}\b"):
        answer(model, (ids, features[:1]), stop_ids)


def test_exact_answers_are_those_that_greedy_decoding_gives(model, prompts, stop_ids, store, never):
    samples = []
    for number, (ids, features) in enumerate(prompts):
        said = answer(model, (ids, features), never, 5)
        if number % 2:
            said[2] = (said[2] + 1) % 100  # not what the model would say
        names = tuple(f"{number}/{place}" for place in range(len(features)))
        samples.append(
            RenderedSample(
                [*ids, *said, min(stop_ids)], [False] * len(ids) + [True] * 5 + [False], names
            )
        )
    by_name = {
        name: prompts[number][1][place]
        for number, sample in enumerate(samples)
        for place, name in enumerate(sample.images)
    }
    for row_tokens in (max(len(s.input_ids) for s in samples), 10_000):
        batches = meter.packed_batches(
            samples,
            row_tokens,
            by_name.__getitem__,
            min(stop_ids),
            model.placeholder_id,
            store.shape,
            torch.device("cpu"),
        )
        assert meter.exact_answers(model, batches) == 50


# -- sampling -------------------------------------------------------------------------------------


def test_a_seed_repeats_an_answer_and_another_seed_gives_another(model, prompts, never):
    def sampled(seed: int) -> list[int]:
        return answer(
            model,
            prompts[0],
            never,
            sampling=Sampling(temperature=10.0),
            seed=seed,
        )

    assert sampled(1) == sampled(1)
    assert len({tuple(sampled(seed)) for seed in range(4)}) > 1


def test_top_k_of_one_is_greedy(model, prompts, stop_ids):
    greedy = answer(model, prompts[0], stop_ids)
    sampling = Sampling(temperature=5.0, top_k=1)
    assert answer(model, prompts[0], stop_ids, sampling=sampling) == greedy


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
    ],
)
def test_sampling_out_of_range_is_refused(field, value):
    with pytest.raises(PhiSightError, match="--" + field.replace("_", "-")):
        Sampling(**{field: value})


def distinct_logits(least: int = 2):
    """One row of logits, each at least a quarter from every other."""
    values = st.lists(st.integers(-80, 80), min_size=least, max_size=12, unique=True)
    return values.map(lambda row: torch.tensor([row]) / 4)


@given(distinct_logits(), st.floats(0.05, 20), st.integers(1, 14), st.integers(0, 2**31))
def test_top_k_never_gives_a_token_outside_it(logits, temperature, top_k, seed):
    sampling = Sampling(temperature, top_k=top_k)
    allowed = set(logits[0].argsort(descending=True)[:top_k].tolist())
    token = choose(logits, sampling, torch.Generator().manual_seed(seed)).item()
    assert token in allowed


@given(distinct_logits(), st.floats(0.05, 20), st.floats(0.01, 1.0), st.integers(0, 2**31))
def test_top_p_never_gives_a_token_outside_the_nucleus(logits, temperature, top_p, seed):
    token = choose(
        logits, Sampling(temperature, top_p=top_p), torch.Generator().manual_seed(seed)
    ).item()
    shares = (logits[0].double() / temperature).softmax(-1)
    likelier = shares[shares > shares[token]].sum().item()
    assert likelier < top_p + 1e-5  # the rounding of float32 sums


@given(distinct_logits(), st.floats(1e-300, 1e-3), st.integers(0, 2**31))
def test_temperature_towards_zero_becomes_greedy(logits, temperature, seed):
    token = choose(logits, Sampling(temperature), torch.Generator().manual_seed(seed))
    assert torch.equal(token, logits.argmax(-1))


@given(distinct_logits(), st.integers(0, 2**31))
def test_temperature_zero_is_greedy_whatever_else_is_asked(logits, seed):
    sampling = Sampling(0.0, top_p=0.5, top_k=2)
    assert torch.equal(choose(logits, sampling), logits.argmax(-1))


def test_sampled_shares_are_those_of_the_softmax():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    many = logits.expand(20_000, -1)

    def shares(sampling: Sampling) -> torch.Tensor:
        tokens = choose(many, sampling, torch.Generator().manual_seed(0))
        return tokens.bincount(minlength=4) / len(tokens)

    for temperature in (0.7, 1.0, 3.0):
        expected = (logits[0] / temperature).softmax(-1)
        assert (shares(Sampling(temperature)) - expected).abs().max() < 0.015
    kept = logits[0, :2].softmax(-1)  # 0.64 and 0.24 reach 0.8: what is left is scaled up
    for sampling in (Sampling(1.0, top_p=0.8), Sampling(1.0, top_k=2)):
        found = shares(sampling)
        assert (found[:2] - kept).abs().max() < 0.015
        assert found[2:].sum() == 0


def test_each_row_is_chosen_from_its_own_logits():
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    for sampling in (Sampling(), Sampling(0.01), Sampling(1.0, top_k=1), Sampling(1.0, top_p=0.5)):
        assert choose(logits, sampling).tolist() == [0, 2]
