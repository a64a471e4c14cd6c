"""The whole model: packing, gradients and owners, and the same model built by transformers."""

import dataclasses
import math

import pytest
import torch
from conftest import draw_adapter
from PIL import Image
from torch.nn import functional
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Phi3ForCausalLM,
)

import ops
from config import replace
from data.chat import RenderedSample, render
from data.collate import IGNORED, ROUND, collate, rows_to_compute, segment_lengths
from data.dataset import Message, Part
from errors import PhiSightError
from lora.dropout import RowDropout, key_of
from lora.layer import LoRALinear
from lora.merge import merged_weight
from model.build import assemble, load_model_state, model_state, multiply_by_integers
from model.recompute import KeptProducts
from model.vision import VisionTower
from model.vlm import owner_of
from ops import kernels
from ops.head import summed_cross_entropy
from ops.nf4 import PanelLinear
from training.loss_scaler import LossScaler
from training.ranks import Ranks
from training.run import choose_recomputing
from training.step import train_step


@pytest.fixture
def samples(prepared, parts) -> list[RenderedSample]:
    """Conversations of different lengths about different pictures, one without, one with two."""
    one_of_each = {sample.images: sample for sample in prepared.train}
    chosen = sorted(one_of_each.values(), key=lambda sample: len(sample.input_ids))
    names = [sample.images[0] for sample in chosen]
    return [*chosen[:6], conversation(parts, []), conversation(parts, names[:2])]


def conversation(parts, pictures: list[str]) -> RenderedSample:
    asked = [*[Part("image", name) for name in pictures], Part("text", "How many stars are there?")]
    return render(
        [Message("user", tuple(asked)), Message("assistant", (Part("text", "two"),))],
        parts.chat_format,
    )


@pytest.fixture
def batch_of(parts, store):
    def make(rows):
        chat_format = parts.chat_format
        return collate(
            rows, store.features_of, chat_format.padding_id, chat_format.image_id, store.shape
        )

    return make


def turn_dropout_off(model, monkeypatch) -> None:
    for module in model.modules():
        if isinstance(module, RowDropout):
            monkeypatch.setattr(module, "probability", 0.0)


@torch.no_grad()
def all_logits(model, batch) -> torch.Tensor:
    """(rows, length, vocabulary)"""
    return model.language_model.lm_head(model.hidden_states(batch))


def by_segment(batch, values: torch.Tensor) -> list[torch.Tensor]:
    """The values of each conversation of the batch, in order."""
    return [
        values[row][segments == number]
        for row, segments in enumerate(batch.segment_ids)
        for number in range(1, int(segments.max()) + 1)
    ]


# -- packing --------------------------------------------------------------------------------------


def test_segment_lengths_of_rows_written_by_hand():
    assert segment_lengths(torch.tensor([[1, 1, 2, 2, 0]]), [4]) == [2, 2]
    assert segment_lengths(torch.tensor([[1, 1, 2, 2, 0]]), [5]) == [2, 2, 1]
    # one row ends and the next one begins with a conversation of the same number
    assert segment_lengths(torch.tensor([[1, 1], [1, 0]]), [2, 1]) == [2, 1]


def test_what_is_computed_comes_in_round_numbers():
    segments = torch.zeros(3, 50, dtype=torch.long)
    segments[0, :40], segments[1, :50], segments[2, :3] = 1, 1, 1
    assert rows_to_compute(segments) == [50, 50, 28]  # 93 tokens: 128, as 64 are too few
    segments[2] = 1
    assert rows_to_compute(segments) == [50, 50, 50]  # there is not so much padding
    assert rows_to_compute(torch.ones(2, 64, dtype=torch.long)) == [64, 64]


def test_packed_logits_are_those_of_each_conversation_alone(model, samples, batch_of):
    packed = batch_of([samples[:5], samples[5:]])
    assert 0 in packed.segment_ids  # one row is padded
    together = by_segment(packed, all_logits(model, packed))
    for sample, logits in zip(samples, together, strict=True):
        alone = all_logits(model, batch_of([[sample]]))[0]
        torch.testing.assert_close(logits, alone, rtol=1e-6, atol=1e-5)


def test_padding_costs_nothing_and_changes_no_bit(model, samples, parts, store, monkeypatch):
    rows, dim = [samples[:5], samples[5:]], store.shape
    tokens = sum(len(sample.input_ids) for sample in samples)
    tokens += -tokens % ROUND  # rows longer than the longest have that much padding
    longest = max(sum(len(sample.input_ids) for sample in row) for row in rows)
    ends, image = parts.chat_format.padding_id, parts.chat_format.image_id
    model.train()  # with dropout, whose masks are drawn for the tokens alone
    seen = []
    layer = model.language_model.model.layers[0]
    with layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:2])):
        found = [
            gradients_of(
                model, [collate(rows, store.features_of, ends, image, dim, length, [3, 4])]
            )
            for length in (longest + ROUND, longest + 300)
        ]
    assert seen == [(1, tokens)] * 2
    for name, expected in found[0].items():
        assert torch.equal(found[1][name], expected), name


def test_loss_of_a_packed_batch_is_the_sum_of_its_conversations(model, samples, batch_of):
    with torch.no_grad():
        total, count = model(batch_of([samples[:5], samples[5:]]))
        alone = [model(batch_of([[sample]])) for sample in samples]
    assert count == sum(n for _, n in alone) == sum(sum(s.supervised) for s in samples)
    assert total.item() == pytest.approx(sum(loss.item() for loss, _ in alone), rel=1e-5)


@pytest.mark.parametrize("recompute", ["none", "products", "layers"])
def test_a_step_by_the_fast_operations_is_one_by_the_plain_ones(
    model, samples, batch_of, recompute, monkeypatch
):
    batch = batch_of([samples[:5], samples[5:]])
    turn_dropout_off(model, monkeypatch)
    model.train()
    monkeypatch.setattr(model.language_model.model, "recomputing", recompute)
    results = {}
    for target in (ops.cpu, ops.mps, ops.plain):
        monkeypatch.setattr(ops, "choose", lambda *_, target=target: (target, ""))
        loss, _ = model(batch)
        loss.backward()
        results[target] = loss.item(), {n: p.grad.clone() for n, p in model.trainable()}
        model.zero_grad(set_to_none=True)
    plain_loss, plain = results.pop(ops.plain)
    for loss, gradients in results.values():
        assert loss == pytest.approx(plain_loss, rel=1e-6)
        assert len(gradients) == 36
        for name, gradient in gradients.items():
            expected = plain[name]
            largest = expected.abs().max().item()
            assert largest > 0
            torch.testing.assert_close(gradient, expected, atol=1e-5 * largest, rtol=1e-5, msg=name)


def test_the_head_in_chunks_gives_the_loss_and_gradient_of_cross_entropy(monkeypatch):
    monkeypatch.setattr("ops.head.CHUNK_LOGITS", 50 * 7)  # 7 tokens at a time
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 8, generator=generator)
    targets = torch.randint(0, 50, (45,), generator=generator)
    mine = torch.randn(45, 8, generator=generator).requires_grad_()
    other = mine.detach().clone().requires_grad_()
    loss = summed_cross_entropy(mine, weight, targets)
    expected = torch.nn.functional.cross_entropy(other @ weight.T, targets, reduction="sum")
    (loss / 3).backward()
    (expected / 3).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(mine.grad, other.grad, atol=1e-6, rtol=1e-5)
    empty = torch.zeros(0, 8, requires_grad=True)
    summed_cross_entropy(empty, weight, targets[:0]).backward()
    assert empty.grad.shape == (0, 8)


@pytest.mark.parametrize("changed", [0, 1, 3])
def test_conversations_of_a_row_cannot_see_each_other(model, samples, batch_of, parts, changed):
    row = samples[:4]
    other_ids = [
        token if token == parts.chat_format.image_id else (token + 7) % 100
        for token in row[changed].input_ids
    ]
    other = dataclasses.replace(row[changed], input_ids=other_ids, images=samples[5].images)
    before = batch_of([row])
    after = batch_of([[*row[:changed], other, *row[changed + 1 :]]])
    pairs = zip(
        by_segment(before, all_logits(model, before)), by_segment(after, all_logits(model, after))
    )
    for place, (old, new) in enumerate(pairs):
        assert torch.equal(old, new) == (place != changed)


def test_the_picture_alone_changes_the_logits(model, samples, batch_of):
    other = dataclasses.replace(samples[0], images=samples[5].images)
    here, there = batch_of([[samples[0]]]), batch_of([[other]])
    assert not torch.equal(all_logits(model, here), all_logits(model, there))


def test_supervised_logits_stand_only_where_a_token_is_trained_on(model, samples, batch_of):
    batch = batch_of([samples[:5], samples[5:]])
    with torch.no_grad():
        logits, targets = model.supervised_logits(batch)
    wanted = [
        token
        for sample in samples
        for token, trained in zip(sample.input_ids, sample.supervised)
        if trained
    ]
    assert targets.tolist() == wanted
    everywhere = all_logits(model, batch)
    before_target = (batch.labels != IGNORED).roll(-1, 1)  # nothing stands before the first token
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, everywhere[before_target].float(), rtol=0, atol=1e-5)


def test_loss_is_cross_entropy_written_out(model, samples, batch_of):
    sample = samples[0]
    batch = batch_of([[sample]])
    shares = all_logits(model, batch)[0].double().log_softmax(-1)
    expected = -sum(
        shares[place - 1, token].item()
        for place, (token, trained) in enumerate(zip(sample.input_ids, sample.supervised))
        if trained
    )
    with torch.no_grad():
        loss, _ = model(batch)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_wrong_number_of_pictures_names_both_numbers(model, samples, batch_of, parts):
    batch = batch_of([[samples[-1]]])  # two pictures
    tokens = parts.chat_format.tokens_per_image
    short = dataclasses.replace(batch, image_features=batch.image_features[:1])
    with pytest.raises(PhiSightError, match=rf"\b{2 * tokens}\b.*\b{tokens}\b"):
        model(short)
    no_slots = batch_of([[samples[-2]]])
    extra = dataclasses.replace(no_slots, image_features=batch.image_features)
    with pytest.raises(PhiSightError, match=rf"\b0\b.*\b{2 * tokens}\b"):
        model(extra)


# -- gradients ------------------------------------------------------------------------------------


class Recorder:
    """Stands in for the optimizer: keeps the gradients that a step would have used."""

    def __init__(self, model) -> None:
        self.parameters = dict(model.trainable())

    def step(self, learning_rate: float) -> None:
        self.gradients = {name: p.grad.clone() for name, p in self.parameters.items()}

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None


def gradients_of(model, batches) -> dict[str, torch.Tensor]:
    recorder = Recorder(model)
    train_step(model, recorder, LossScaler(enabled=False), batches, 0.0, math.inf)
    return recorder.gradients


def test_gradient_does_not_depend_on_how_the_window_is_cut(model, samples, batch_of):
    rows = [[sample] for sample in samples]  # eight rows of very different lengths
    cut = {
        size: gradients_of(
            model, [batch_of(rows[start : start + size]) for start in range(0, 8, size)]
        )
        for size in (1, 4, 8)
    }
    packed = gradients_of(model, [batch_of([samples[:3]]), batch_of([samples[3:]])])
    for name, expected in cut[8].items():
        scale = expected.abs().max().clamp(min=1)
        for gradients in (cut[1], cut[4], packed):
            assert (gradients[name] - expected).abs().max() / scale < 1e-6, name


def test_every_trained_tensor_gets_a_gradient_and_the_base_none(model, samples, batch_of):
    model(batch_of([samples]))[0].backward()
    owners = model.owners()
    for name, parameter in owners["lora"] + owners["projector"]:
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for _, parameter in owners["base"])


# -- dropout in the projector ---------------------------------------------------------------------


@pytest.fixture
def dropping(model, monkeypatch):
    """The model in training, with dropout in the projector alone."""
    turn_dropout_off(model, monkeypatch)
    monkeypatch.setattr(model.projector.dropout, "probability", 0.3)
    return model.train()


def hidden_of(model, batch) -> torch.Tensor:
    """What the projector's second layer is given, (1, picture tokens, dim)."""
    seen = []
    handle = model.projector.linear_2.register_forward_pre_hook(lambda _, given: seen.append(given))
    try:
        with torch.no_grad():
            model(batch)
    finally:
        handle.remove()
    return seen[0][0].flatten(0, 1)


def test_dropout_in_the_projector_is_between_gelu_and_second_layer(dropping, samples, batch_of):
    batch = dataclasses.replace(batch_of([samples]), row_keys=[5])
    projector = dropping.projector
    with torch.no_grad():
        whole = functional.gelu(projector.linear_1(batch.image_features)).flatten(0, 1)
        key = key_of("dropout", "projector")
        mask = RowDropout(0.3, key)(torch.ones(1, *whole.shape), [5])[0]
    hidden = hidden_of(dropping, batch)
    assert torch.equal(hidden, whole * mask)
    assert 0.25 < (mask == 0).float().mean() < 0.35
    assert torch.equal(hidden_of(dropping.eval(), batch), whole)


def test_what_the_projector_drops_goes_by_the_row_alone(dropping, samples, batch_of):
    """One row has no picture, one has two: masks and gradients are those of each row alone."""
    keys = list(range(40, 40 + len(samples)))
    together = dataclasses.replace(batch_of([[s] for s in samples]), row_keys=keys)
    alone = [
        dataclasses.replace(batch_of([[sample]]), row_keys=[key])
        for sample, key in zip(samples, keys)
    ]
    pictured = [batch for batch in alone if len(batch.slots)]
    assert len(pictured) == len(alone) - 1
    dropped = [hidden_of(dropping, batch) == 0 for batch in pictured]
    assert torch.equal(torch.cat(dropped), hidden_of(dropping, together) == 0)
    expected, found = gradients_of(dropping, [together]), gradients_of(dropping, alone)
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-6 * max(1, gradient.abs().max()), name
        assert gradient.abs().max() > 0 or not name.startswith("projector."), name
    other = dataclasses.replace(together, row_keys=[key + 1 for key in keys])
    assert not torch.equal(hidden_of(dropping, other) == 0, hidden_of(dropping, together) == 0)


def test_a_fresh_adapter_gets_its_gradient_through_b(tiny_config, samples, batch_of):
    model = assemble(tiny_config).model
    model(batch_of([samples]))[0].backward()
    for name, parameter in model.owners()["lora"]:
        reached = bool(parameter.grad.abs().max() > 0)
        assert reached == name.endswith("lora_B"), name  # B is zero, so nothing comes through to A


def test_every_parameter_has_exactly_one_owner(model):
    owners = model.owners()
    owned = [name for parameters in owners.values() for name, _ in parameters]
    assert sorted(owned) == sorted(name for name, _ in model.named_parameters())
    assert len(set(owned)) == len(owned)
    trained = dict(model.trainable())
    assert trained.keys() == {name for name, _ in owners["lora"] + owners["projector"]}
    assert all(not parameter.requires_grad for _, parameter in owners["base"])
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    assert len(owners["lora"]) == 2 * len(layers) > 0
    assert len(owners["projector"]) == 4
    assert {owner_of(name) for name in trained} == {"lora", "projector"}


@pytest.mark.parametrize("row_keys", [None, [3, 4]])
@pytest.mark.parametrize("target", [ops.cpu, ops.plain])
def test_gradient_checkpointing_changes_no_bit(
    model, samples, batch_of, monkeypatch, target, row_keys
):
    """By the row's key or from torch's own generator, dropout draws the same mask again."""
    monkeypatch.setattr(ops, "choose", lambda *_: (target, ""))
    batch = dataclasses.replace(batch_of([samples[:4], samples[4:]]), row_keys=row_keys)
    model.train()  # checkpointing works in training mode only, and then dropout is on too
    decoder = model.language_model.model
    computed: list[int] = []  # a product with a frozen weight each
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            inner = layer.base.forward
            monkeypatch.setattr(
                layer.base, "forward", lambda x, f=inner: computed.append(1) or f(x)
            )
    for name in ("trained_product", "dense_weight"):  # of a forward and of a backward
        counted = getattr(ops.cpu, name)
        monkeypatch.setattr(ops.cpu, name, lambda *a, f=counted: computed.append(1) or f(*a))
    results, products = {}, {}
    for setting in ("none", "products", "layers"):
        monkeypatch.setattr(decoder, "recomputing", setting)
        torch.manual_seed(5)
        computed.clear()
        results[setting] = gradients_of(model, [batch])
        products[setting] = len(computed)
    for setting in ("products", "layers"):
        for name, expected in results["none"].items():
            assert torch.equal(results[setting][name], expected), (setting, name)
    assert products["products"] == products["none"]
    assert products["layers"] == products["none"] + 4 * len(decoder.layers)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_layers_without_an_adapter_are_kept_too(tiny_config, samples, batch_of, quantization):
    config = replace(tiny_config, lora_targets=("qkv_proj",), quantization=quantization)
    model, batch = assemble(config).model.train(), batch_of([samples[:4], samples[4:]])
    results = {}
    for setting in ("none", "products", "layers"):
        model.language_model.model.recomputing = setting
        torch.manual_seed(5)
        results[setting] = gradients_of(model, [batch])
    for setting in ("products", "layers"):
        for name, expected in results["none"].items():
            assert torch.equal(results[setting][name], expected), (setting, name)


@pytest.mark.parametrize(("spare", "chosen"), [(0, "products"), (-1, "layers")])
def test_by_itself_it_keeps_products_where_they_fit(tiny_config, parts, monkeypatch, spare, chosen):
    config = replace(tiny_config, gradient_checkpointing="auto", batch_size=2)
    decoder = parts.base.model.model
    monkeypatch.setattr(decoder, "recomputing", "none")
    needed = 4 * 2 * 100 * decoder.config.num_hidden_layers * decoder.config.product_values
    monkeypatch.setattr("training.run.default_kv_bytes", lambda _: needed + spare)
    assert "GB" in choose_recomputing(config, parts, 100, Ranks())
    assert decoder.recomputing == chosen
    given = replace(config, gradient_checkpointing="none")
    choose_recomputing(given, parts, 100, Ranks())
    assert decoder.recomputing == "none"


def test_of_the_products_is_kept_what_the_config_counts(model, samples, batch_of, monkeypatch):
    batch = batch_of([samples[:4], samples[4:]])
    decoder, layers = model.train().language_model.model, []

    class Seen(KeptProducts):
        def __init__(self) -> None:
            super().__init__()
            layers.append(self)

    monkeypatch.setattr("model.decoder.KeptProducts", Seen)
    monkeypatch.setattr(decoder, "recomputing", "products")
    loss, _ = model(batch)
    kept = [sum(t.untyped_storage().nbytes() for t in layer._outputs) for layer in layers]
    values = decoder.config.product_values - decoder.config.hidden_size  # that one is the input
    # The last product of a layer is kept as one number.
    assert kept == [4 * len(batch.computed) * values + 4] * len(decoder.layers)
    loss.backward()
    assert not any(layer._outputs for layer in layers)


# -- the state of a checkpoint --------------------------------------------------------------------


def test_state_of_one_model_makes_another_its_equal(parts, model, tiny_config, samples, batch_of):
    other = assemble(replace(tiny_config, seed=9)).model.eval()
    batch = batch_of([samples])
    assert not torch.equal(all_logits(other, batch), all_logits(model, batch))
    load_model_state(other, model_state(model))
    assert torch.equal(all_logits(other, batch), all_logits(model, batch))


@pytest.mark.parametrize("damage", ["missing", "unknown", "misshapen"])
def test_projector_state_that_does_not_fit_is_refused(model, damage):
    state = model_state(model)
    projector = dict(state["image_projector"])
    if damage == "missing":
        del projector["linear_1.bias"]
    elif damage == "unknown":
        projector["linear_3.bias"] = projector["linear_1.bias"]
    else:
        projector["linear_1.bias"] = projector["linear_1.bias"][:-1]
    with pytest.raises(PhiSightError, match="image_projector"):
        load_model_state(model, state | {"image_projector": projector})


def test_a_seed_fixes_the_fresh_weights(tiny_config):
    first, again = (model_state(assemble(tiny_config).model) for _ in range(2))
    other = model_state(assemble(replace(tiny_config, seed=1)).model)
    for file in first:
        for name, tensor in first[file].items():
            assert torch.equal(tensor, again[file][name])
    name = "linear_1.weight"
    assert not torch.equal(first["image_projector"][name], other["image_projector"][name])


# -- against transformers -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unquantised(tiny_config):
    return assemble(replace(tiny_config, quantization="none", seed=4)).model.eval()


def llava_of(model, spec, base: str, placeholder_id: int) -> LlavaForConditionalGeneration:
    """The same model as transformers would build it, the adapter merged into the base."""
    language_model = Phi3ForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, layer in model.language_model.named_modules():
        if isinstance(layer, LoRALinear):
            language_model.get_submodule(name).weight.copy_(merged_weight(layer))
    config = LlavaConfig(
        vision_config=CLIPVisionConfig.from_pretrained(spec.folder),
        text_config=language_model.config,
        image_token_index=placeholder_id,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    config.dtype = torch.float32
    llava = LlavaForConditionalGeneration(config).eval()
    for theirs, ours in (
        (llava.model.vision_tower, VisionTower(spec).model),
        (llava.model.multi_modal_projector, model.projector),
        (llava.model.language_model, language_model.model),
        (llava.lm_head, language_model.lm_head),
    ):
        theirs.load_state_dict(ours.state_dict(), strict=True)
    return llava


@pytest.mark.parametrize("adapter", ["fresh", "drawn"])
@torch.no_grad()
def test_logits_are_those_of_llava(unquantised, parts, world, tiny_config, adapter):
    if adapter == "drawn":
        draw_adapter(unquantised)
    placeholder = parts.chat_format.image_id
    llava = llava_of(unquantised, parts.vision, tiny_config.base, placeholder)
    tower = VisionTower(parts.vision)
    pictures = [Image.open(world / f"images/train_00000{index}.png") for index in range(2)]
    features = dict(zip("ab", tower(pictures)))
    pixels = tower.prepare(pictures)
    asked = (Part("text", "Compare"), Part("image", "a"), Part("text", "with"), Part("image", "b"))
    sample = render([Message("user", asked)], parts.chat_format, add_generation_prompt=True)
    batch = collate(
        [[sample]], features.__getitem__, 0, parts.chat_format.image_id, parts.vision.shape
    )

    expected = llava(input_ids=batch.input_ids, pixel_values=pixels).logits
    embeddings = unquantised.embed(batch.input_ids, batch.image_features)
    positions = torch.arange(embeddings.shape[1])[None]
    hidden = unquantised.language_model.model(embeddings, positions, [embeddings.shape[1]])
    as_one = unquantised.language_model.lm_head(hidden)
    if adapter == "fresh":  # nothing is added to the base, so bit for bit
        assert torch.equal(as_one, expected)
    # A merged adapter takes other sums; logits reach some tens, and float32 rounds by their size.
    rounding = 1e-5 * max(1.0, expected.abs().max().item())
    for ours in (as_one, all_logits(unquantised, batch)):
        torch.testing.assert_close(ours, expected, rtol=0, atol=rounding)
    swapped = llava(input_ids=batch.input_ids, pixel_values=pixels.flip(0)).logits
    assert (swapped - expected).abs().max() > 1e-2  # so the order of the pictures was compared too


def test_a_pooled_picture_takes_one_token(tiny_config, world):
    pooled = assemble(replace(tiny_config, vision_features="pooled"))
    name = "train_000000.png"
    with Image.open(world / "images" / name) as picture:
        features = {name: VisionTower(pooled.vision)([picture])[0]}
    sample = conversation(pooled, [name])
    assert sample.input_ids.count(pooled.chat_format.image_id) == 1
    batch = collate(
        [[sample]], features.__getitem__, 0, pooled.chat_format.image_id, pooled.vision.shape
    )
    loss, count = pooled.model(batch)
    assert loss.isfinite() and count == sum(sample.supervised)


def test_a_forward_by_integers_is_near_the_exact_one_and_learns_as_it_does(
    model, samples, batch_of, monkeypatch
):
    """--compute-type int16: another rounding of the forward, the backward as it was."""
    if not kernels.available()[0]:
        pytest.skip(kernels.available()[1])
    batch = batch_of([samples[:5], samples[5:]])
    turn_dropout_off(model, monkeypatch)
    model.train()
    exact_loss, exact = model(batch)[0].item(), gradients_of(model, [batch])
    layers = [m for m in model.modules() if isinstance(m, PanelLinear)]
    for layer in layers:
        monkeypatch.setattr(layer, "by_integers", True)
    loss, found = model(batch)[0].item(), gradients_of(model, [batch])
    assert loss != exact_loss and loss == pytest.approx(exact_loss, rel=1e-3)
    for name, expected in exact.items():
        assert (found[name] - expected).norm() < 0.02 * expected.norm(), name


def test_integers_are_refused_where_there_are_none_to_multiply_by(monkeypatch):
    with pytest.raises(PhiSightError, match="int16: needs 4-bit weights .* use float32"):
        multiply_by_integers(torch.nn.Linear(2, 2))
