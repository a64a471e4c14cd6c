"""Folders of bases, encoders, tokenizers and adapters that anyone may have written: whatever they
say is a config or one line, before memory is taken for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from data.chat import ChatFormat, load_tokenizer
from errors import PhiSightError
from exports.peft_config import MOST_PATTERNS, read_peft_config
from model.base import load_base
from model.encoders import ENCODERS, encoder_of
from model.encoders.encoder import EncoderConfig
from model.encoders.preparation import LARGEST_SIDE
from model.families import FAMILIES
from model.vision import VisionTower, read_vision_spec
from tools.small.bases import write_base
from tools.small.encoders import KINDS, write_encoder
from tools.small.tokenizers import write_tokenizer

LONGEST = 600  # letters of a line, whatever was found

# -- any JSON -------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-2, 300),
    st.sampled_from([2**20, 2**30, 2**31 - 1, 2**31, 2**64, 10**40, 10**400]),
    st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e308, 5e-324, 1e-6, 0.5, -0.5]),
)
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8), st.just("y" * 5000))
TYPES = st.sampled_from(["default", "longrope", "su", "llama3", "yarn", "linear"])
ROPES = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": TYPES | PLAIN,
        "type": TYPES | PLAIN,
        "short_factor": st.lists(PLAIN, max_size=9) | st.just([1.0] * 8),
        "long_factor": st.lists(PLAIN, max_size=9) | st.just([2.0] * 8),
        "full_attention": st.just({"rope_type": "llama3"}),
        **{
            name: PLAIN
            for name in (
                *("rope_theta", "factor", "attention_factor", "partial_rotary_factor"),
                *("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
            )
        },
    },
)
SIDES = st.dictionaries(st.sampled_from(["height", "width", "shortest_edge", "x"]), PLAIN)
VALUES = st.one_of(
    PLAIN, st.lists(PLAIN, max_size=4), ROPES, SIDES, st.just([[[[]]]]), st.just({"a": {"b": []}})
)
OF_BASES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings"),
    *("original_max_position_embeddings", "tie_word_embeddings", "sliding_window", "hidden_act"),
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "layer_types"),
    *("attention_dropout", "embd_pdrop", "attention_bias", "mlp_bias", "use_sliding_window"),
)
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
OF_PROCESSORS = (
    *("size", "crop_size", "resample", "do_resize", "do_rescale", "do_normalize", "do_pad"),
    *("do_center_crop", "rescale_factor", "image_mean", "image_std", "image_processor_type"),
    *("patch_size", "max_num_patches", "feature_extractor_type"),
)


def in_one_line(make: Callable[[], Any]) -> Any:
    """What is made, or None where it is refused in a short line."""
    try:
        return make()
    except PhiSightError as error:
        assert "\n" not in str(error) and len(str(error)) < LONGEST
        return None


@settings(max_examples=120)
@given(
    st.sampled_from(sorted(FAMILIES)),
    st.dictionaries(st.sampled_from(OF_BASES), VALUES, max_size=6),
)
def test_any_config_of_a_base_is_one_or_a_line(kind, changes):
    family = FAMILIES[kind]
    config = in_one_line(lambda: family.decoder_config(SIZES | changes))
    if config:
        assert 2 <= config.rope.dims <= config.head_dim and config.numbers > 0
        assert isinstance(config.tie_word_embeddings, bool) and config.num_hidden_layers <= 1000


@settings(max_examples=120)
@given(st.data(), st.sampled_from(sorted(ENCODERS)))
def test_any_config_of_an_encoder_is_one_or_a_line(data, kind):
    member: type[EncoderConfig] = ENCODERS[kind]
    names = st.sampled_from(sorted(member.__dataclass_fields__))
    sizes = data.draw(st.dictionaries(names, VALUES, max_size=3) | VALUES)
    key = member.KINDS[kind]
    content = {key: sizes} if key else (sizes if isinstance(sizes, dict) else {})
    config = in_one_line(lambda: encoder_of({"model_type": kind} | content))
    config = config or encoder_of({"model_type": kind} | ({key: {}} if key else {}))
    given = data.draw(st.dictionaries(st.sampled_from(OF_PROCESSORS), VALUES, max_size=4))
    found = in_one_line(lambda: config.preparation(given))
    if found:
        sides = (found.fit.shortest_edge, *(found.fit.size or ()), *(found.fit.crop or ()))
        assert all(1 <= side <= LARGEST_SIDE for side in sides if side is not None)
        assert found.padded() and len(found.mean_colour) == 3


# -- folders --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return write_base("qwen3", tmp_path_factory.mktemp("hostile") / "base")


@pytest.fixture
def base(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "base"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(make: Callable[[], object]) -> str:
    with pytest.raises(PhiSightError) as error:
        make()
    return str(error.value)


def loaded(folder: Path) -> Any:
    return load_base(folder, None, torch.float32, "cpu", "none")


@pytest.mark.parametrize(
    ("changes", "described"),
    [
        ({"hidden_size": 2**30}, 2_066_953_011_328),
        ({"vocab_size": 2**31 - 1}, 137_439_039_872),
        ({"intermediate_size": 2**31 - 1}, 824_633_806_912),
        ({"head_dim": 2**30}, 1_653_562_483_008),
        ({"num_hidden_layers": 1000}, 43_236_928),
    ],
)
def test_a_base_of_far_more_numbers_than_it_stores_takes_no_memory(base, changes, described):
    edit(base / "config.json", **changes)
    stored = sum(tensor.numel() for tensor in load_file(weights_of(base)).values())
    assert refusal(lambda: loaded(base)) == (
        f"base model {base}: config.json describes {described:,} numbers and {stored:,} are stored;"
        " the weight files do not belong to this config.json, download both again"
    )


def weights_of(folder: Path) -> Path:
    return folder / "model.safetensors"


def test_the_numbers_of_a_decoder_are_those_of_its_weights(tmp_path):
    for name in ("qwen2.5", "phi-3.5"):
        model = loaded(write_base(name, tmp_path / name)).model
        distinct = {id(parameter): parameter.numel() for parameter in model.parameters()}
        assert model.config.numbers == sum(distinct.values())


def test_more_layers_than_any_base_has(base):
    edit(base / "config.json", num_hidden_layers=2**31 - 1)
    assert refusal(lambda: loaded(base)) == (
        f"{base}/config.json: num_hidden_layers: 2147483647 are more than 1000; restore the model's"
        " own config.json"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.k_proj.weight", "model.embed_tokens.weight"]
)
def test_weights_of_a_base_that_are_not_finite(base, name, value):
    tensors = load_file(weights_of(base))
    tensors[name][3, 5] = value
    save_file(tensors, weights_of(base))
    for quantization in ("none", "nf4"):
        line = refusal(lambda q=quantization: load_base(base, None, torch.float32, "cpu", q))
        assert line == (
            f"{weights_of(base)}: {name} holds values that are not finite; download the file again"
        )


def test_an_index_that_names_what_no_file_is_called(base):
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x" * 300}}))
    assert f"{'x' * 300} is missing; the layout is" in refusal(lambda: loaded(base))


@pytest.fixture
def encoder(request, tmp_path) -> Path:
    return write_encoder(request.param, tmp_path / "encoder")


@pytest.mark.parametrize("encoder", KINDS, indirect=True)
def test_an_encoder_of_more_numbers_than_it_stores_takes_no_memory(encoder):
    edit(encoder / "config.json", hidden_size=2**16, num_attention_heads=1)
    line = refusal(lambda: read_vision_spec(str(encoder)))
    assert line.startswith(f"{encoder}: config.json describes at least 34,372,321,280 numbers, and")
    assert line.endswith(" bytes of weights are there; fetch the folder again")


@pytest.mark.parametrize("encoder", ["siglip", "dinov2"], indirect=True)
def test_weights_of_an_encoder_that_are_not_finite_or_there_twice(encoder):
    path = weights_of(encoder)
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("1.mlp.fc1.bias"))
    tensors[name][2] = float("nan")
    save_file(tensors, path)
    line = refusal(lambda: VisionTower(read_vision_spec(str(encoder))))
    assert line.endswith("1.mlp.fc1.bias holds values that are not finite; fetch the folder again")
    save_file({name: torch.zeros(64)}, encoder / "second.safetensors")
    parts = {"a": path.name, "b": "second.safetensors"}
    (encoder / f"{path.name}.index.json").write_text(json.dumps({"weight_map": parts}))
    tensors[name][2] = 0.0
    save_file(tensors, path)
    line = refusal(lambda: VisionTower(read_vision_spec(str(encoder))))
    assert line.endswith(
        "1.mlp.fc1.bias is there twice, in one file or in two; fetch the folder again"
    )


@pytest.mark.parametrize("encoder", ["siglip"], indirect=True)
def test_an_encoder_without_weights_is_not_called_a_base(encoder):
    weights_of(encoder).unlink()
    assert refusal(lambda: read_vision_spec(str(encoder))) == (
        f"picture encoder {encoder}: model.safetensors is missing; it needs its weights in"
        " safetensors, or pytorch_model.bin"
    )


@pytest.mark.parametrize("encoder", KINDS, indirect=True)
def test_what_an_encoder_has_at_least(encoder):
    config = read_vision_spec(str(encoder)).config
    with torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in config.build().parameters())
    assert numbers / 4 < config.least_numbers < numbers


# -- tokenizers -----------------------------------------------------------------------------------


@pytest.fixture
def spoken(tmp_path) -> Path:
    write_tokenizer("qwen3", tmp_path, 576)
    return tmp_path


def change(folder: Path, damage: Callable[[dict[str, Any], int], None]) -> None:
    """The tokenizer after `damage(its JSON, id of the picture's slot)`."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    slot = next(t["id"] for t in content["added_tokens"] if t["content"] == "<|image_pad|>")
    damage(content, slot)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_a_slot_that_stands_for_unknown_letters(spoken):
    def damage(content, slot):
        model = content["model"]
        kept = {k: v for k, v in model["vocab"].items() if len(k) > 1 or ord(k) < 200}
        model["vocab"] = kept | {"<|image_pad|>": slot}
        model["merges"], model["unk_token"] = [], "<|image_pad|>"

    change(spoken, damage)
    line = refusal(lambda: ChatFormat.from_tokenizer(load_tokenizer(spoken), 4))
    assert line == (
        f"tokenizer {spoken}: makes <|image_pad|> of the text '\U00013080', which anyone may type;"
        " use the tokenizer of Qwen3"
    )


def test_marks_that_text_can_spell(spoken):
    def damage(content, slot):
        content["model"]["vocab"]["<|image_pad|>"] = slot
        content["model"]["ignore_merges"], content["pre_tokenizer"] = True, None

    change(spoken, damage)
    line = refusal(lambda: ChatFormat.from_tokenizer(load_tokenizer(spoken), 4))
    assert line == (
        f"tokenizer {spoken}: makes <|image_pad|> of the text '<|image_pad|>', which anyone may"
        " type; use the tokenizer of Qwen3"
    )


def test_an_id_beyond_the_embeddings(spoken):
    change(spoken, lambda content, slot: content["model"]["vocab"].update(a=5_000_000))
    assert refusal(lambda: load_tokenizer(spoken, embeddings=576)) == (
        f"tokenizer of {spoken}: it has 5000001 tokens and the model 576 embeddings; use the"
        " tokenizer that belongs to the model"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"extra_special_tokens": 5},
        {"additional_special_tokens": True},
        {"added_tokens_decoder": {"1": {"content": ["x"]}}},
    ],
)
def test_a_tokenizer_config_of_other_types(spoken, changes):
    edit(spoken / "tokenizer_config.json", **changes)
    line = refusal(lambda: load_tokenizer(spoken))
    assert line.startswith(f"tokenizer {spoken}: cannot be loaded (")
    assert line.endswith("); give a folder with tokenizer.json")


# -- adapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 10**400},
        {"rank_pattern": {"q_proj": 10**400}},
        {"lora_alpha": 5e-324},
        {"lora_alpha": 1e300},
        {"rank_pattern": {f"model{number}": 4 for number in range(MOST_PATTERNS + 1)}},
        {"alpha_pattern": {"q_proj": float("nan")}},
    ],
)
def test_numbers_that_make_no_adapter(tmp_path, changes):
    plain = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(plain))
    assert read_peft_config(tmp_path).scaling_of("model.layers.0.self_attn.q_proj") == 2
    edit(tmp_path / "adapter_config.json", **changes)
    line = refusal(lambda: read_peft_config(tmp_path))
    assert line.startswith(f"{tmp_path}/adapter_config.json: r ") and len(line) < LONGEST
    assert line.endswith(" make no adapter; export the adapter again with PEFT's save_pretrained")
