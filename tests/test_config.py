"""The config: every field is a documented flag, survives JSON, and is checked by name."""

from __future__ import annotations

import argparse
import dataclasses
import json
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import config as configs
import config_values
from config import Config
from errors import PhiSightError
from fields import DATA
from paths import need_file
from training.options import add_config_flags, config_from_options, given_fields

FIELDS = dataclasses.fields(Config)
KINDS = typing.get_type_hints(Config)
GOOD = configs.default_config(configs.DEFAULT_PRESET)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse(*arguments: str) -> argparse.Namespace:
    parser = configs.Parser(prog="train.py")
    add_config_flags(parser)
    return parser.parse_args(list(arguments))


def config_of(*arguments: str) -> Config:
    return config_from_options(parse(*arguments))


# -- flags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_field_is_a_flag_with_a_help_text(field):
    parser = configs.Parser(prog="train.py")
    add_config_flags(parser)
    action = parser._option_string_actions[flag_of(field.name)]
    assert field.metadata["help"] and field.metadata["help"] in action.help
    assert repr(field.default) in action.help
    assert all(choice in action.help for choice in field.metadata["choices"] or ())
    assert flag_of(field.name) in parser.format_help()


def test_without_flags_a_config_is_its_preset():
    assert config_of() == GOOD
    assert given_fields(parse()) == {}
    for preset in configs.PRESETS:
        assert config_of("--preset", preset) == configs.default_config(preset)


@pytest.mark.parametrize("preset", sorted(configs.PRESETS))
def test_every_preset_is_valid_and_of_the_right_types(preset):
    config = configs.default_config(preset)
    configs.validate(config)
    assert config_values.from_dict(config_values.to_dict(config), preset) == config
    assert configs.PRESETS[preset].keys() <= KINDS.keys()


@pytest.mark.parametrize(
    ("typed", "asked"),
    [
        (["--data=mine.json"], True),
        (["--images=cache/../cache/world/images"], True),
        (["--images=pictures"], False),
        (["--images=pictures", "--held-out-questions=cache/world/held_out.jsonl"], True),
        (["--preset=phi35", "--images=pictures"], False),
    ],
)
def test_a_presets_questions_are_about_its_pictures(typed, asked):
    made = config_from_options(parse(*typed))
    assert bool(made.held_out_questions) == asked


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(PhiSightError, match="'huge': unknown; choose from phi35, tiny"):
        config_of("--preset", "huge")


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ((), True),
        (("true",), True),
        (("yes",), True),
        (("1",), True),
        (("On",), True),
        (("false",), False),
        (("no",), False),
        (("0",), False),
        (("OFF",), False),
    ],
)
def test_a_boolean_flag_may_stand_alone_or_take_a_word(typed, value):
    assert config_of("--deterministic", *typed).deterministic is value


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        (["--gradient-checkpointing"], "layers"),
        (["--gradient-checkpointing", "true"], "layers"),
        (["--gradient-checkpointing", "no"], "none"),
        (["--no-gradient-checkpointing"], "none"),
        (["--gradient-checkpointing", "products"], "products"),
    ],
)
def test_a_flag_that_was_a_boolean_once_takes_what_it_took(typed, value):
    assert config_of(*typed).gradient_checkpointing == value


@pytest.mark.parametrize(("old", "new"), [(True, "layers"), (False, "none")])
def test_files_from_before_a_field_had_words_mean_what_they_meant(old, new, tmp_path):
    saved = config_values.to_dict(GOOD) | {"gradient_checkpointing": old}
    assert config_values.from_dict(saved, "an old checkpoint").gradient_checkpointing == new
    file = tmp_path / "old.toml"
    file.write_text(f"gradient_checkpointing = {str(old).lower()}\n")
    assert config_of("--config", str(file)).gradient_checkpointing == new


def test_a_list_is_typed_with_commas():
    assert config_of("--lora-targets", "qkv_proj, o_proj,").lora_targets == ("qkv_proj", "o_proj")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--strict", "perhaps"], "'perhaps' is neither true nor false"),
        (["--batch-size", "many"], "--batch-size: invalid int value: 'many'"),
        (["--learning-rate", "fast"], "--learning-rate: invalid float value: 'fast'"),
        (["--batch-size", "1.5"], "--batch-size"),
        (["--batch-size"], "--batch-size: expected one argument"),
        (["--batchsize", "3"], "--batchsize: no such flag; did you mean --batch-size?"),
        (["--batch_size=3"], "--batch_size=3: no such flag; did you mean --batch-size?"),
        (["--lora-ran", "3"], "--lora-ran: no such flag; did you mean --lora-rank?"),
        (["--qqqqqqqq"], "--qqqqqqqq: no such flag; see train.py --help"),
        (["stray"], "stray: no such flag"),
    ],
)
def test_a_mistyped_flag_is_an_error_with_a_remedy(arguments, said):
    with pytest.raises(PhiSightError) as error:
        parse(*arguments)
    assert said in str(error.value) and ";" in str(error.value)


# -- any valid config, there and back -------------------------------------------------------------

COUNTS = st.integers(1, 10**6)
SHARES = st.floats(0, 1, exclude_max=True)
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=20)
NAMES = st.text("abcdefghijklmnopqrstuvwxyz_0123456789", min_size=1, max_size=10)


def values_of(field: dataclasses.Field) -> st.SearchStrategy:
    """Valid values of a field."""
    special = {
        "lora_dropout": SHARES,
        "projector_dropout": SHARES,
        "projector_queries": st.integers(1, 4096),
        "evaluation_samples": st.integers(0, 16),
        "warmup_fraction": SHARES,
        "adam_beta1": SHARES,
        "adam_beta2": SHARES,
        "data_fraction": st.floats(0, 1, exclude_min=True),
        "validation_fraction": st.floats(0, 1, exclude_max=True),
        "run": WORDS.filter(bool),
        "vision_layer": st.integers(-100, 100),
        "seed": st.integers(0, 2**32 - 1),
        "threads": st.integers(0, 1024),
        "lora_targets": st.tuples(NAMES, NAMES),
        # At least one: a flag that is not typed leaves the preset's.
        "data": st.lists(WORDS.filter(lambda word: word and DATA.hold((word,))), min_size=1).map(
            tuple
        ),
        "images": st.lists(WORDS.filter(bool), min_size=1).map(tuple),
    }
    if field.name in special:
        return special[field.name]
    if field.metadata["choices"]:
        return st.sampled_from(field.metadata["choices"])
    positive = st.floats(1e-12, 1e12)
    return {int: COUNTS, float: positive, str: WORDS, bool: st.booleans()}[KINDS[field.name]]


CONFIGS = st.builds(Config, **{field.name: values_of(field) for field in FIELDS})


def typed(config: Config) -> list[str]:
    """The flags that spell out a config."""
    flags = []
    for name, value in vars(config).items():
        each = [value] if not isinstance(value, tuple) else value
        if name == "lora_targets":
            each = [",".join(value)]
        flags += [f"{flag_of(name)}={text}" for text in each]
    return flags


@given(CONFIGS)
def test_flags_and_json_give_a_config_back(config):
    assert config_of(*typed(config)) == config
    written = json.loads(json.dumps(config_values.to_dict(config)))
    assert config_values.from_dict(written, "here") == config


@given(CONFIGS)
def test_what_was_typed_and_nothing_else_is_known_as_given(config):
    names = given_fields(parse(*typed(config)[:3]))
    assert list(names) == [field.name for field in FIELDS[:3]]


# -- from a checkpoint's JSON ---------------------------------------------------------------------


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_a_field_of_another_type_is_refused_by_name(field):
    takes_text = KINDS[field.name] is str or field.metadata["repeated"]
    for wrong in (None, {"a": 1}, [1], 3 if takes_text else "text", 2 + 0.5):
        if wrong == 2.5 and KINDS[field.name] is float:
            continue
        with pytest.raises(PhiSightError, match=f"somewhere: config field {field.name} is "):
            config_values.from_dict(config_values.to_dict(GOOD) | {field.name: wrong}, "somewhere")


def test_true_is_no_number_and_a_whole_number_is_a_float():
    for name in ("batch_size", "learning_rate"):
        with pytest.raises(PhiSightError, match=name):
            config_values.from_dict(config_values.to_dict(GOOD) | {name: True}, "here")
    config = config_values.from_dict(config_values.to_dict(GOOD) | {"lora_alpha": 8}, "here")
    assert type(config.lora_alpha) is float


def test_missing_and_unknown_fields_are_refused_by_name():
    values = config_values.to_dict(GOOD)
    del values["seed"]
    with pytest.raises(PhiSightError, match="here: .*lacks.*'seed'.*unknown.*'sead'"):
        config_values.from_dict(values | {"sead": 1}, "here")


def test_a_checkpoint_from_before_the_field_that_no_training_depends_on_is_read():
    values = config_values.to_dict(GOOD)
    del values["speech"]
    assert config_values.from_dict(values, "here") == configs.replace(GOOD, speech="base")


def test_a_checkpoint_from_before_the_base_was_cached_used_no_cache():
    values = config_values.to_dict(GOOD)
    del values["base_cache"]
    assert config_values.from_dict(values, "here") == configs.replace(GOOD, base_cache="")


def test_a_whole_number_that_no_float_can_hold_is_refused():
    with pytest.raises(PhiSightError, match="here: config field lora_alpha is 1000"):
        config_values.from_dict(config_values.to_dict(GOOD) | {"lora_alpha": 10**400}, "here")


def test_the_fields_that_no_result_depends_on():
    """A field more here lets a resume go on that may not be exact."""
    assert set(configs.fields_without_effect()) == {
        "run",
        "features",
        "unpacked",
        "base_cache",
        "save_steps",
        "save_every_minutes",
        "keep_checkpoints",
        "strict",
        "speech",
        "keep_best",  # how much is kept
        "gradient_checkpointing",  # gradients are equal to the bit, see test_vlm.py
        "held_out_questions",  # evaluate.py asks them
        "novel_pair_questions",
    }


def test_values_from_a_file_are_validated_too():
    with pytest.raises(PhiSightError, match="--lora-rank must be at least 1, not 0"):
        config_values.from_dict(config_values.to_dict(GOOD) | {"lora_rank": 0}, "here")


# -- validation -----------------------------------------------------------------------------------

NAN, INFINITY = float("nan"), float("inf")
BAD: dict[str, tuple] = {
    "images": [("a", "")],
    "quantization": ("int8", ""),
    "vision_features": ("all",),
    "lora_rank": (0, -1),
    "lora_alpha": (0.0, -1.0, NAN, INFINITY),
    "lora_dropout": (-0.1, 1.0, NAN),
    "lora_plus_ratio": (0.0, -1.0, NAN, INFINITY),
    "projector_learning_rate": (-0.1, NAN, INFINITY),
    "projector_dropout": (-0.1, 1.0, NAN),
    "projector": ("perceiver", ""),
    "projector_queries": (0, -1, 4097),
    "lora_targets": ((),),
    "data_fraction": (0.0, 1.1, NAN),
    "validation_fraction": (-0.1, 1.0, NAN),
    "split_by": ("pixels", ""),
    "max_text_tokens": (0,),
    "row_tokens": (-1,),
    "epochs": (0,),
    "max_steps": (-1,),
    "batch_size": (0,),
    "accumulation": (0,),
    "learning_rate": (0.0, -1.0, NAN, INFINITY),
    "schedule": ("step",),
    "warmup_fraction": (-0.1, 1.0, NAN),
    "weight_decay": (-0.1, NAN, INFINITY),
    "save_every_minutes": (-1.0, NAN, INFINITY),
    "adam_beta1": (-0.1, 1.0),
    "adam_beta2": (-0.1, 1.0),
    "adam_epsilon": (0.0, NAN),
    "max_gradient_norm": (0.0, NAN),
    "seed": (-1, 2**32),
    "evaluate_steps": (-1,),
    "evaluation_conversations": (0,),
    "evaluation_samples": (-1, 17),
    "on_spike": ("stop", ""),
    "early_stopping": (-1,),
    "save_steps": (0,),
    "keep_checkpoints": (0,),
    "log_steps": (0,),
    "run": ("",),
    "data": (("a.json", "b.json:0"), ("c.json:0.0",), ("a.json", "")),
    "device": ("tpu",),
    "compute_type": ("int4",),
    "threads": (-1, 1025),
    "feature_pooling": (0, -2),
    "feature_storage": ("int4", ""),
    "picture_fit": ("stretch", ""),
    "merge_rounding": ("int4", ""),
    "gradient_checkpointing": ("all", ""),
    "supervise": ("questions", ""),
}
FREE = {  # any value of the right type is one; whether it is there is found out on use
    "base",
    "base_revision",
    "vision",
    "vision_revision",
    "vision_layer",
    "unpacked",
    "held_out_questions",
    "novel_pair_questions",
    "strict",
    "keep_best",
    "features",
    "deterministic",
    "train_lora",
    "train_projector",
    "rank_stabilized",
    "pack",
    "start_from",
    "base_cache",
    "speech",
}


def test_every_field_is_validated_or_free():
    assert BAD.keys() | FREE == KINDS.keys() and not BAD.keys() & FREE


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_a_bad_value_is_named_with_its_flag_and_what_is_wanted(name, value):
    with pytest.raises(PhiSightError) as error:
        configs.replace(GOOD, **{name: value})
    message = str(error.value)
    assert message.startswith(f"config: {flag_of(name)} must be ")
    assert message.endswith(f"not {value!r}") and ";" not in message


def test_all_problems_come_in_one_error():
    bad = {name: values[0] for name, values in BAD.items()}
    with pytest.raises(PhiSightError) as error:
        configs.replace(GOOD, **bad)
    problems = str(error.value).removeprefix("config: ").split("; ")
    assert sorted(p.split()[0] for p in problems) == sorted(map(flag_of, bad))


def test_a_config_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GOOD.seed = 1


# -- files ----------------------------------------------------------------------------------------


def test_need_file(tmp_path):
    there = tmp_path / "data.json"
    there.write_text("[]")
    assert need_file(str(there), "--data", "make it") == there
    for path, said in (
        ("", "--data: not given; make it"),
        (str(tmp_path), f"{tmp_path}: no such file; make it"),
        ("gone.json", "gone.json: no such file; make it"),
    ):
        with pytest.raises(PhiSightError) as error:
            need_file(path, "--data", "make it")
        assert str(error.value) == said


def test_the_tiny_preset_points_at_the_assets_of_this_project():
    root = Path(__file__).resolve().parent.parent
    for folder in (GOOD.base, GOOD.vision):
        assert (root / folder / "config.json").is_file()


def test_checkpoints_from_before_the_choice_go_on_cropping_their_pictures():
    saved = config_values.to_dict(GOOD)
    assert saved.pop("picture_fit") == "pad"
    assert config_values.from_dict(saved, "an old checkpoint").picture_fit == "crop"
