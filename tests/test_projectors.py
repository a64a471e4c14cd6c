"""The projectors: each against an independent formula, in the model, in a run, and in what is told
of it."""

import dataclasses
import math

import pytest
import runs
import torch
from conftest import draw_adapter
from random_model import Row
from torch import nn
from transformers import InternVLConfig
from transformers.models.internvl.modeling_internvl import (
    InternVLModel,
    InternVLMultiModalProjector,
)

import checkpoints
import config as configs
import config_values
import export
from assistant import decoding
from assistant.assistant import Assistant
from assistant.decoding import Decoding
from benchmarks.design_choices import Setup, sweep_tables
from benchmarks.projectors import VARIANTS, finished, markdown
from config import replace
from data.collate import collate
from data.prepare import prepare
from errors import PhiSightError
from evaluation.run_figures import read_run
from exports.llava import check_pictures
from exports.measure import Measured, Probe, certificate_of
from lora.dropout import RowDropout, key_of
from model.build import assemble, load_model_state, model_state
from model.encoders.clip import ClipConfig
from model.grid import positions
from model.projectors import PROJECTORS, name_of, picture_tokens
from model.vision import VisionTower
from reports.layers import base_of, drawn_projector
from sweeps.plan import planned
from web.trainings.preflight import in_text

NAMES = sorted(PROJECTORS)
OTHERS = [name for name in NAMES if name != "mlp"]
DROPPING = [name for name in NAMES if name != "linear"]
SIDE, VISION, TEXT, QUERIES = 4, 12, 20, 5
TOKENS = {"linear": 16, "mlp": 16, "pixel-shuffle": 4, "resampler": QUERIES}
RUN = runs.SHORT | {"max_steps": 3, "log_steps": 1, "projector_queries": 4}
DROPPED = {name: {"projector_dropout": 0.0 if name == "linear" else 0.3} for name in OTHERS}


def made(name: str, dropout: float = 0.0, vision_dim: int = VISION):
    projector = PROJECTORS[name](vision_dim, TEXT, dropout, QUERIES)
    projector.reset_parameters(torch.Generator().manual_seed(3))
    return projector


def features(images: int = 3, dim: int = VISION, seed: int = 4) -> torch.Tensor:
    return torch.randn(images, SIDE * SIDE, dim, generator=torch.Generator().manual_seed(seed))


# -- references -----------------------------------------------------------------------------------


def linear(x, w):
    return x @ w["linear.weight"].T + w["linear.bias"]


def mlp(x, w):
    hidden = x @ w["linear_1.weight"].T + w["linear_1.bias"]
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return hidden @ w["linear_2.weight"].T + w["linear_2.bias"]


def normed(x, w, name):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def pixel_shuffle(x, w):
    """By index: the token of row r and column c is made of the patches of rows 2r, 2r + 1."""
    half, tokens = SIDE // 2, []
    for row in range(half):
        for column in range(half):
            corner = 2 * row * SIDE + 2 * column
            block = [corner, corner + 1, corner + SIDE, corner + SIDE + 1]
            tokens.append(torch.cat([x[:, place] for place in block], -1))
    return mlp(normed(torch.stack(tokens, 1), w, "layer_norm"), w)


def resampler(x, w):
    """By torch's own attention, which has the three projections in one matrix."""
    heads = max(1, x.shape[-1] // 64)
    attention = nn.MultiheadAttention(x.shape[-1], heads, batch_first=True)
    given = {
        "in_proj_weight": torch.cat([w[f"{part}.weight"] for part in ("query", "key", "value")]),
        "in_proj_bias": torch.cat(
            [w["query.bias"], torch.zeros_like(w["query.bias"]), w["value.bias"]]
        ),
        "out_proj.weight": w["output.weight"],
        "out_proj.bias": w["output.bias"],
    }
    x = normed(x, w, "norm_features")
    queries = normed(w["queries"], w, "norm_queries").expand(len(x), -1, -1)
    keys = x + torch.tensor(places(x.shape[-1]), dtype=torch.float32)
    attended, _ = torch.func.functional_call(attention, given, (queries, keys, x))
    return linear(normed(attended, w, "norm_attended"), w)


def places(dim: int) -> list[list[float]]:
    rates = [10000 ** (-4 * i / dim) for i in range(dim // 4)]

    def of(place: int) -> list[float]:
        return [math.sin(place * r) for r in rates] + [math.cos(place * r) for r in rates]

    return [of(column) + of(row) for row in range(SIDE) for column in range(SIDE)]


REFERENCES = {
    "linear": linear,
    "mlp": mlp,
    "pixel-shuffle": pixel_shuffle,
    "resampler": resampler,
}


@pytest.mark.parametrize("vision_dim", [12, 128])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_those_of_the_formula(name, vision_dim):
    projector, x = made(name, vision_dim=vision_dim), features(dim=vision_dim)
    draw = torch.Generator().manual_seed(9)
    for parameter in projector.parameters():  # also what begins as the identity
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    copies = {n: p.detach().clone().requires_grad_() for n, p in projector.named_parameters()}
    out, expected = projector(x), REFERENCES[name](x, copies)
    assert out.shape == (3, TOKENS[name], TEXT) and out.dtype == torch.float32
    assert projector.tokens(SIDE * SIDE) == TOKENS[name]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(out.shape, generator=draw)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for part, parameter in projector.named_parameters():
        reference = copies[part].grad
        size = reference.abs().max()
        assert size > 1e-3, part  # far over what rounding leaves of a gradient that is zero
        assert (parameter.grad - reference).abs().max() <= 1e-5 * max(1, size), part


def test_places_are_rows_and_columns():
    expected = torch.tensor(places(VISION), dtype=torch.float64).float()
    assert torch.equal(positions(SIDE, VISION, torch.device("cpu")), expected)


@torch.no_grad()
def test_pixel_shuffle_is_that_of_internvl():
    config = InternVLConfig(
        vision_config={"hidden_size": VISION},
        text_config={"model_type": "qwen2", "hidden_size": TEXT},
    )
    theirs = InternVLMultiModalProjector(config).eval()
    ours = PROJECTORS["pixel-shuffle"](VISION, TEXT)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = features()
    # Its grid is called (width, height), and is read row by row all the same.
    grid = InternVLModel.pixel_shuffle(None, x.view(3, SIDE, SIDE, VISION), scale_factor=0.5)
    assert torch.equal(ours(x), theirs(grid.reshape(3, SIDE * SIDE // 4, -1)))


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_fixes_the_parameters_and_stored_halves_are_read_in_float32(name):
    first, again, x = made(name), made(name), features().half()
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))
    again.reset_parameters(torch.Generator().manual_seed(8))
    drawn = [p for n, p in again.named_parameters() if "norm" not in n]
    assert all(not torch.equal(p, q) for p, q in zip(drawn, [
        p for n, p in first.named_parameters() if "norm" not in n
    ]))  # fmt: skip
    assert torch.equal(first(x), first(x.float()))


@pytest.mark.parametrize("name", NAMES)
def test_pictures_do_not_see_each_other_and_there_may_be_none(name):
    projector, x = made(name), features()
    whole = projector(x)
    order = [2, 0, 1]
    torch.testing.assert_close(projector(x[order]), whole[order], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(projector(x[1:2]), whole[1:2], rtol=1e-6, atol=1e-6)
    assert projector(x[:0]).shape == (0, TOKENS[name], TEXT)


def test_an_mlp_draws_what_it_always_drew():
    projector = made("mlp")
    reference = nn.Sequential(nn.Linear(VISION, TEXT), nn.GELU(), nn.Linear(TEXT, TEXT))
    torch.manual_seed(3)
    reference[0].reset_parameters()
    reference[2].reset_parameters()
    assert all(map(torch.equal, projector.parameters(), reference.parameters()))


# -- the table ------------------------------------------------------------------------------------


def test_the_choices_are_the_table_and_parameters_tell_which_it_is():
    assert set(configs.PROJECTORS) == set(PROJECTORS) and configs.Config.projector == "mlp"
    for name, member in PROJECTORS.items():
        assert member.name == name and name_of(made(name).state_dict()) == name
        assert made(name).state_dict()[member.reads].shape[-1] == VISION * member.patches
    assert name_of(["other"]) is None


def test_checkpoints_from_before_the_choice_have_an_mlp():
    saved = config_values.to_dict(configs.default_config())
    assert (saved.pop("projector"), saved.pop("projector_queries")) == ("mlp", 16)
    read = config_values.from_dict(saved, "an old checkpoint")
    assert (read.projector, read.projector_queries) == ("mlp", 16)


REFUSED = [
    (
        "pixel-shuffle",
        49,
        "--projector pixel-shuffle: lays 2 x 2 patches into one token, and the features of a"
        " picture are 7 x 7 patches; use --projector mlp, or an encoder, --vision-features and"
        " --feature-pooling that give an even number of patches a side",
    ),
    ("pixel-shuffle", 1, "are one vector; use --projector mlp"),
    ("pixel-shuffle", 17, "are 17 tokens, which make no square; use --projector mlp"),
    (
        "resampler",
        1,
        "--projector resampler: its queries look at a square grid of patches, and the features of a"
        " picture are one vector; use --projector mlp, or an encoder and --vision-features that"
        " give patches",
    ),
    ("resampler", 17, "are 17 tokens, which make no square; use --projector mlp"),
]


@pytest.mark.parametrize(("name", "given", "said"), REFUSED)
def test_features_that_a_projector_cannot_take(name, given, said):
    with pytest.raises(PhiSightError) as error:
        picture_tokens(replace(configs.default_config(), projector=name), given)
    assert said in str(error.value) and (not said.startswith("--") or said == str(error.value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["pixel-shuffle", "resampler"])
def test_one_pooled_vector_is_refused_before_anything_is_drawn(tiny_config, name):
    with pytest.raises(PhiSightError, match=f"--projector {name}: .*one vector"):
        assemble(replace(tiny_config, projector=name, vision_features="pooled"))


def test_settings_that_do_not_go_together(tiny_config):
    with pytest.raises(PhiSightError) as error:
        assemble(replace(tiny_config, projector="linear", projector_dropout=0.1))
    assert str(error.value) == (
        "--projector-dropout 0.1: acts between a projector's layers, and --projector linear has one"
        " layer; use --projector-dropout 0, or --projector mlp"
    )
    with pytest.raises(PhiSightError, match="a multiple of 4 numbers, not of 6; use --projector"):
        made("resampler", vision_dim=6)


# -- in the model ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=NAMES)
def seeing(request, tiny_config, prepared, store):
    """(parts with a drawn adapter, samples of different lengths), of each projector."""
    config = replace(
        tiny_config,
        projector=request.param,
        projector_queries=QUERIES,
        quantization="none",  # with 4 bits, answering multiplies by integers
    )
    parts = assemble(config)
    draw_adapter(parts.model)
    parts.model.eval()
    data = prepare(
        config, parts.chat_format, store, lambda: VisionTower(parts.vision), positions=2048
    )
    one_of_each = {sample.images: sample for sample in data.train}
    return parts, sorted(one_of_each.values(), key=lambda sample: len(sample.input_ids))[:5]


@pytest.fixture
def batch_of(seeing, store):
    chat_format = seeing[0].chat_format

    def make(rows, keys=None):
        ends, image = chat_format.padding_id, chat_format.image_id
        return collate(rows, store.features_of, ends, image, store.shape, 0, keys)

    return make


def gradients(model, batches) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    for batch in batches:
        model(batch)[0].backward()
    found = {n: p.grad.clone() for n, p in model.trainable()}
    model.zero_grad(set_to_none=True)
    return found


def test_the_text_has_as_many_slots_as_the_projector_makes_tokens(seeing, batch_of, store):
    parts, samples = seeing
    given = store.shape[0]
    assert parts.chat_format.tokens_per_image == parts.model.projector.tokens(given)
    batch = batch_of([samples])
    assert len(batch.slots) == len(samples) * parts.chat_format.tokens_per_image
    fewer = dataclasses.replace(batch, image_features=batch.image_features[1:])
    with pytest.raises(PhiSightError, match=rf"{len(batch.slots)} picture slots, the features fil"):
        parts.model.hidden_states(fewer)


@torch.no_grad()
def test_packed_logits_are_those_of_each_conversation_alone(seeing, batch_of):
    parts, samples = seeing
    together = parts.model.supervised_logits(batch_of([samples[:3], samples[3:]]))[0]
    alone = [parts.model.supervised_logits(batch_of([[sample]]))[0] for sample in samples]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-4)


def test_every_parameter_learns_from_a_batch(seeing, batch_of):
    parts, samples = seeing
    found = gradients(parts.model.eval(), [batch_of([samples])])
    for name, gradient in found.items():
        assert gradient.abs().max() > 1e-6 or not name.startswith("projector."), name


def test_what_is_dropped_goes_by_the_row_alone(seeing, batch_of, monkeypatch):
    parts, samples = seeing
    model = parts.model
    if model.projector.name == "linear":
        return  # refuses dropout, see above
    for module in model.modules():
        if isinstance(module, RowDropout):
            monkeypatch.setattr(module, "probability", 0.0)
    still = gradients(model.train(), [batch_of([[s] for s in samples], range(5))])
    monkeypatch.setattr(model.projector.dropout, "probability", 0.3)
    keys = list(range(40, 45))
    whole = gradients(model, [batch_of([[s] for s in samples], keys)])
    rows = gradients(model, [batch_of([[s]], [key]) for s, key in zip(samples, keys)])
    other = gradients(model, [batch_of([[s] for s in samples], [key + 1 for key in keys])])
    model.eval()
    for name, gradient in whole.items():
        assert (rows[name] - gradient).abs().max() <= 1e-5 * max(1, gradient.abs().max()), name
    assert any(not torch.equal(whole[name], still[name]) for name in whole)
    assert any(not torch.equal(whole[name], other[name]) for name in whole)


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_is_that_of_the_rows_own_keys(name):
    """The mask that rows of one and of two pictures draw, seen by what the last layer is given."""
    projector = made(name, dropout=0.4).train()
    seen = []
    last = projector.linear if name == "resampler" else projector.linear_2
    last.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
    x, each = features(), TOKENS[name]
    with torch.no_grad():
        projector(x, [6, 7], [each, 2 * each])
        projector.eval()(x)
    dropped, kept = seen
    key = key_of("dropout", "projector")
    masks = [
        RowDropout(0.4, key)(torch.ones(1, tokens, kept.shape[1]), [row])[0]
        for row, tokens in ((6, each), (7, 2 * each))
    ]
    assert torch.equal(dropped, kept * torch.cat(masks))
    assert 0.3 < (dropped == 0).float().mean() < 0.5


@torch.no_grad()
def test_a_prompt_read_in_pieces_that_cut_its_pictures(seeing, batch_of, store, monkeypatch):
    parts, samples = seeing
    monkeypatch.setattr(decoding, "PIECE", 7)
    rows = [
        Row(list(s.input_ids), torch.stack([store.features_of(n) for n in s.images]))
        for s in samples[:3]
    ]
    side_by_side = Decoding(parts.model, compiles=False)
    side_by_side.add(rows)
    for row, logits in zip(side_by_side.rows, side_by_side.logits, strict=True):
        batch = batch_of([[samples[rows.index(row)]]])
        expected = parts.model.language_model.lm_head(parts.model.hidden_states(batch)[0])
        expected = expected[len(row.ids) - 1].float()
        expected[parts.chat_format.image_id] = float("-inf")
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


# -- a run and its checkpoint ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of each projector but the MLP that was never stopped. Tests only read them."""
    folders = {name: tmp_path_factory.mktemp("projectors") / name for name in OTHERS}
    for name, run in folders.items():
        runs.start(run, **(RUN | {"projector": name} | DROPPED[name]))
    return folders


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(name, whole, tmp_path):
    run = tmp_path / "run"
    runs.start(run, "--stop-at-step=2", **(RUN | {"projector": name} | DROPPED[name]))
    runs.resume(run)
    assert checkpoints.diff(whole[name], run).identical


def test_a_resume_with_another_projector_is_refused(whole):
    with pytest.raises(PhiSightError, match=r'config\.projector: .*"linear".*"mlp"'):
        runs.resume(whole["linear"], "--projector=mlp", "--max-steps=4")


def test_weights_of_another_projector_are_refused(whole, tmp_path):
    saved = checkpoints.resolve(whole["resampler"])
    config = config_values.from_dict(saved.config["config"], "here")
    model = assemble(replace(config, projector="mlp", projector_dropout=0.0)).model
    state = model_state(model)
    with pytest.raises(PhiSightError) as error:
        load_model_state(model, state | {"image_projector": saved.state["image_projector"]})
    assert str(error.value) == (
        "image_projector: holds a projector resampler, and the model has mlp; use --projector"
        " resampler, or a checkpoint with --projector mlp"
    )
    with pytest.raises(PhiSightError) as error:
        runs.start(tmp_path / "run", f"--start-from={whole['linear']}", **RUN)
    assert str(error.value) == (
        f"--start-from {whole['linear']}: was trained with another projector (--projector linear,"
        " here --projector mlp); use the same for both stages"
    )


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_told_of_a_run_names_its_projector(name, whole, capsys):
    tokens = {"linear": 36, "pixel-shuffle": 9, "resampler": 4}[name]
    assert checkpoints.main(["show", str(whole[name])]) == 0
    assert f"\nprojector: {name}, {tokens} tokens a picture\n" in capsys.readouterr().out
    assistant = Assistant.load(whole[name])
    probe = Probe([], [], None, {}, [], None)
    same = Measured(1.0, ["two"])
    certificate = certificate_of("merge", assistant, probe, same, same, None)
    assert certificate["projector"] == {"name": name, "tokens": tokens}
    with pytest.raises(PhiSightError) as error:
        check_pictures(assistant, "--llava", "LLaVA", [ClipConfig])
    assert str(error.value) == (
        f"--llava: {assistant.source} has the projector {name}, LLaVA reads mlp; export a run that"
        " was trained with --projector mlp, or this one with --peft"
    )


def test_an_adapter_goes_out_and_comes_back_with_its_projector(whole, tmp_path):
    adapter, run = tmp_path / "adapter", whole["resampler"]
    export.main([f"--peft={adapter}", f"--run={run}"])
    typed = [f"--import-peft={adapter}", f"--base={runs.BASE}", f"--vision={runs.VISION}"]
    with pytest.raises(PhiSightError, match="holds a projector resampler.*use --projector resamp"):
        export.main([*typed, f"--out={tmp_path / 'other'}"])
    with pytest.raises(
        PhiSightError,
        match=r"queries is .*4.*128.*, not .*16.*128.*; use .*, and its --projector-queries$",
    ):
        export.main([*typed, f"--out={tmp_path / 'other'}", "--projector=resampler"])
    own = ["--projector=resampler", "--projector-queries=4"]
    export.main([*typed, f"--out={tmp_path / 'run'}", *own])
    back, saved = checkpoints.resolve(tmp_path / "run"), checkpoints.resolve(run)
    for name, tensor in saved.state["image_projector"].items():
        assert torch.equal(back.state["image_projector"][name], tensor)
    assert back.config["picture_tokens"] == saved.config["picture_tokens"] == 4


def test_the_benchmark_has_a_row_for_each_projector_that_is_finished(whole, tmp_path):
    setups = {variant.name: Setup(6, 10, 100, 5000, 64) for variant in VARIANTS}
    tables = sweep_tables({}, setups, 2, VARIANTS)
    default = configs.default_config("tiny")
    for one in planned(tables, "here"):
        changed = {
            n for n in one.fields if one.fields[n] != getattr(default, n) and n in configs.FIELDS
        }
        assert changed - {"seed"} <= {"projector", "projector_queries"}
    assert {v.fields.get("projector", "mlp") for v in VARIANTS} == set(PROJECTORS)
    assert finished(tmp_path, tables) == {}
    figures = {
        name: {
            seed: dataclasses.replace(read_run(whole[name]), evaluation={"held_out": 50.0 + seed})
            for seed in range(2)
        }
        for name in ("linear", "resampler")
    }
    rows = markdown(figures, setups).splitlines()
    assert len(rows) == 4 and rows[2].startswith("| linear | 36 | 16,512 | 50.5 (50.0 to 51.0) | -")
    assert rows[3].startswith("| resampler, 9 queries | 4 | ") and rows[3].endswith("| 2 |")


@pytest.mark.parametrize("name", OTHERS)
def test_what_a_projector_began_with_can_be_drawn_again(name, whole):
    saved = checkpoints.resolve(whole[name])
    config = config_values.from_dict(saved.config["config"], "here")
    fresh = model_state(assemble(config).model)["image_projector"]
    drawn = drawn_projector(base_of(saved, config, ""), config, saved)
    assert drawn.keys() == fresh.keys()
    assert all(torch.equal(drawn[part], fresh[part]) for part in fresh)


def test_the_page_asks_for_the_tokens_that_the_text_has():
    values = {"feature_pooling": 1, "projector": "mlp", "projector_queries": 16}
    assert in_text(values, 576) == 576 and in_text(values | {"feature_pooling": 2}, 576) == 144
    assert in_text(values | {"projector": "pixel-shuffle"}, 576) == 144
    assert in_text(values | {"projector": "resampler"}, 576) == 16
