"""Every picture encoder against transformers' own, on small random weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

import infer
from errors import PhiSightError
from model.encoders import ENCODERS, MEMBERS
from model.vision import VisionTower, load_clip, read_vision_spec
from model.vision import main as vision_main
from tools.small.encoders import KINDS, PATCH, PIXELS, SIDE, write_encoder
from web.trainings.preflight import picture_shape

PROCESSORS = {
    "clip": transformers.CLIPImageProcessorPil,
    "siglip": transformers.SiglipImageProcessorPil,
    "siglip2": Siglip2ImageProcessorPil,
    "dinov2": BitImageProcessorPil,
    "dinov2_with_registers": BitImageProcessorPil,
}
IN_FRONT = {"clip": 1, "siglip": 0, "siglip2": 0, "dinov2": 1, "dinov2_with_registers": 5}
# What makes a small encoder of another build than the usual one of its kind.
OTHERS = {
    "clip, GELU": ("clip", {"hidden_act": "gelu", "num_hidden_layers": 3}),
    "siglip, a rest of pixels": ("siglip", {"image_size": PIXELS + 5}),
    "siglip, no head": ("siglip", {"vision_use_head": False}),
    "siglip2, its own grid": ("siglip2", {"num_patches": SIDE**2}),
    "dinov2, its own grid": ("dinov2", {"image_size": PIXELS}),
    "dinov2, SwiGLU": ("dinov2", {"use_swiglu_ffn": True, "qkv_bias": False}),
    "dinov2_with_registers, its own grid": ("dinov2_with_registers", {"image_size": PIXELS}),
    "dinov2_with_registers, larger": ("dinov2_with_registers", {"image_size": 3 * PATCH}),
}
BUILDS = {kind: (kind, {}) for kind in KINDS} | OTHERS
each_kind = pytest.mark.parametrize("kind", KINDS)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(drawn.numpy())


PICTURES = [
    noise(41, 57),
    noise(200, 13, 1),
    noise(9, 130, 2),
    noise(PIXELS, PIXELS, 3),
    noise(3, 4, 4),
    noise(60, 35, 5).convert("L").convert("RGB"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One of each kind and build; never changed."""
    root = tmp_path_factory.mktemp("encoders")
    return {
        name: write_encoder(kind, root / str(number), seed=number, **sizes)
        for number, (name, (kind, sizes)) in enumerate(BUILDS.items())
    }


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def square_of(picture: Image.Image, fit: str, colour: tuple[int, ...]) -> Image.Image:
    """The whole picture in the middle of a square ("pad"), or the middle of the scaled picture."""
    if fit == "pad":
        side = max(picture.size)
        square = Image.new("RGB", (side, side), colour)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return square
    long = int(PIXELS * max(picture.size) / min(picture.size))
    new = (long, PIXELS) if picture.width > picture.height else (PIXELS, long)
    scaled = picture.resize(new, Image.Resampling.BILINEAR)
    left, top = (scaled.width - PIXELS) // 2, (scaled.height - PIXELS) // 2
    return scaled.crop((left, top, left + PIXELS, top + PIXELS))


def their_pixels(kind: str, folder: Path, pictures: list[Image.Image], fit: str) -> dict[str, Any]:
    """What transformers' processor makes of pictures."""
    processor = PROCESSORS[kind].from_pretrained(folder)
    # NaFlex keeps the proportions of a picture: one that is not to be padded is cut before.
    if fit == "pad" or kind == "siglip2":
        colour = tuple(int(value * 255) for value in processor.image_mean)
        pictures = [square_of(picture, fit, colour) for picture in pictures]
    return dict(processor(pictures, return_tensors="pt"))


def as_theirs(kind: str, pixels: Tensor) -> Tensor:
    """(pictures, 3, side, side) as the processor of a kind gives them: NaFlex's come in patches."""
    if kind != "siglip2":
        return pixels
    rows = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # ..., rows, columns, y, x
    return rows.permute(0, 2, 3, 4, 5, 1).reshape(len(pixels), SIDE * SIDE, -1)


def their_model(folder: Path) -> Any:
    """transformers' own, its weights where a tensor usually begins: a few products round by that,
    and a file's tensors lie anywhere."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    assert next(model.parameters()).dtype == torch.float32
    return model.eval()


# -- what is computed -----------------------------------------------------------------------------


@pytest.mark.parametrize("build", BUILDS)
@torch.no_grad()
def test_every_state_is_that_of_transformers(folders, build):
    kind, folder = BUILDS[build][0], folders[build]
    given = their_pixels(kind, folder, PICTURES, "crop")
    expected = their_model(folder)(**given, output_hidden_states=True)
    layers = len(expected.hidden_states) - 1
    for layer in (*range(layers + 1), *range(-layers - 1, 0)):
        spec = read_vision_spec(str(folder), layer=layer)
        tower = VisionTower(spec)
        states = expected.hidden_states[layer]
        assert torch.equal(tower.model.hidden_state(tower.prepare(PICTURES), layer), states)
        assert torch.equal(tower(PICTURES), states[:, IN_FRONT[kind] :])
        assert spec.shape == (SIDE**2, 32)
    if not spec.config.pools:
        with pytest.raises(PhiSightError, match="has no head that pools; use patches"):
            read_vision_spec(str(folder), features="pooled")
        return
    spec = read_vision_spec(str(folder), features="pooled")
    assert torch.equal(VisionTower(spec)(PICTURES)[:, 0], expected.pooler_output)
    assert spec.shape == (1, 32)


@each_kind
def test_a_model_with_another_part_gives_the_same(folders, kind, tmp_path):
    """A text half or a classifier stands in the same files, whose names then have a prefix."""
    whole = write_encoder(kind, tmp_path / "whole", whole=True)
    stored = load_file(whole / "model.safetensors")
    parts = {name.split(".")[0] for name in stored}
    assert len(parts) > 1
    config = transformers.AutoConfig.from_pretrained(whole)
    theirs = getattr(transformers, config.architectures[0]).from_pretrained(whole).eval()
    half = getattr(theirs, "vision_model", None) or getattr(theirs, kind)
    for parameter in half.parameters():
        parameter.data = parameter.data.clone()
    given = their_pixels(kind, whole, PICTURES, "crop")
    with torch.no_grad():
        expected = half(**given, output_hidden_states=True).hidden_states[-2]
    tower = VisionTower(read_vision_spec(str(whole)))
    assert torch.equal(tower(PICTURES), expected[:, IN_FRONT[kind] :])
    assert tower.spec.config == read_vision_spec(str(folders[kind])).config


@each_kind
def test_sizes_that_a_config_leaves_out_are_as_transformers_fills_them_in(kind):
    config = ENCODERS[kind].from_dict({"model_type": kind, "vision_config": {}})
    theirs = transformers.AutoConfig.for_model(kind)
    theirs = getattr(theirs, "vision_config", theirs)
    own = {"siglip2": {"image_size"}, "dinov2": {"num_register_tokens"}}.get(kind, set())
    for name, value in dataclasses.asdict(config).items():
        assert name in own or getattr(theirs, name) == value, name


# -- pictures -------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_pixels_are_those_of_transformers(folders, kind, fit):
    prepare = read_vision_spec(str(folders[kind]), picture_fit=fit).preparation
    expected = their_pixels(kind, folders[kind], PICTURES, fit)["pixel_values"]
    assert torch.equal(as_theirs(kind, prepare(PICTURES)), expected)
    fitted = [prepare.fit(picture) for picture in PICTURES]  # as the child does it that decodes
    assert torch.equal(prepare(fitted), prepare(PICTURES))


@each_kind
@settings(max_examples=15, deadline=None)
@given(st.integers(3, 150), st.integers(3, 150), st.sampled_from(["crop", "pad"]))
def test_pixels_of_any_size_are_those_of_transformers(folders, kind, width, height, fit):
    pictures = [noise(width, height, width * height)]
    prepare = read_vision_spec(str(folders[kind]), picture_fit=fit).preparation
    expected = their_pixels(kind, folders[kind], pictures, fit)["pixel_values"]
    assert torch.equal(as_theirs(kind, prepare(pictures)), expected)


@each_kind
def test_what_a_file_leaves_out_is_as_transformers_fills_it_in(folders, kind, tmp_path):
    """Its processor's class alone is named, and nulls stand for what is not said."""
    usual = PROCESSORS[kind]()
    usual.save_pretrained(tmp_path)
    name = json.loads((tmp_path / "preprocessor_config.json").read_text())["image_processor_type"]
    content = {"image_processor_type": name, "size": None, "image_mean": None, "crop_size": None}
    config = ENCODERS[kind].from_dict({"model_type": kind, "vision_config": {}})
    with_more = dataclasses.replace(config, image_size=224, patch_size=16)
    for typed in (content, content | {"image_processor_type": f"{name}Fast"}):
        pixels = with_more.preparation(typed)(PICTURES[:1])
        square = [square_of(PICTURES[0], "pad", (127, 127, 127))]
        if kind == "siglip2":
            pixels = with_more.preparation(typed).padded()(PICTURES[:1])
            rows = pixels.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 4, 5, 1)
            pixels = rows.reshape(1, 256, -1)
        given = square if kind == "siglip2" else PICTURES[:1]
        assert torch.equal(pixels, usual(given, return_tensors="pt")["pixel_values"])


# -- keys -----------------------------------------------------------------------------------------


def test_features_of_every_encoder_have_a_key_of_their_own(folders):
    keys = {
        read_vision_spec(str(folder), picture_fit=fit).key
        for folder in folders.values()
        for fit in ("crop", "pad")
    }
    assert len(keys) == 2 * len(folders)


def test_the_same_weights_that_are_read_otherwise_have_another_key(tmp_path):
    first = write_encoder("siglip", tmp_path / "first")
    second = write_encoder("siglip", tmp_path / "second")
    assert read_vision_spec(str(first)).key == read_vision_spec(str(second)).key
    edit(second / "config.json", hidden_act="gelu")
    assert read_vision_spec(str(first)).key != read_vision_spec(str(second)).key


# -- what is wrong --------------------------------------------------------------------------------


def the_line(call: Any, *args: Any, **words: Any) -> str:
    with pytest.raises(PhiSightError) as caught:
        call(*args, **words)
    return str(caught.value)


def copied(folder: Path, place: Path) -> Path:
    return Path(shutil.copytree(folder, place))


def test_a_folder_of_no_encoder_names_those_that_are_known(folders, tmp_path):
    folder = copied(folders["siglip"], tmp_path / "vit")
    edit(folder / "config.json", model_type="vit")
    (folder / "preprocessor_config.json").unlink()  # as of a language model: that is not the reason
    assert the_line(read_vision_spec, str(folder)) == (
        f"{folder}: not the folder of an encoder (its model_type is 'vit', none of clip,"
        " clip_vision_model, siglip, siglip_vision_model, siglip2, siglip2_vision_model, dinov2,"
        " dinov2_with_registers); it needs config.json, preprocessor_config.json and"
        " model.safetensors (or pytorch_model.bin)"
    )


@pytest.mark.parametrize("kind", [["clip"], {"a": 1}, None, 3])
def test_a_model_type_of_another_type_is_one_error(folders, tmp_path, kind):
    folder = copied(folders["siglip"], tmp_path / "odd")
    edit(folder / "config.json", model_type=kind)
    assert "its model_type is" in the_line(read_vision_spec, str(folder))


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        (
            "siglip",
            {"size": {"height": 40, "width": 40}},
            "makes pictures of (40, 40), and config.json takes (32, 32); fetch both again",
        ),
        (
            "clip",
            {"crop_size": {"height": 40, "width": 40}},
            "makes pictures of (40, 40), and config.json takes (32, 32); fetch both again",
        ),
        (
            "dinov2",
            {"crop_size": {"height": 40, "width": 48}},
            "makes pictures of (40, 48), and squares of at least one patch of 8 are read;"
            " fetch it again",
        ),
        (
            "dinov2",
            {"do_center_crop": False},
            "makes pictures of None, and squares of at least one patch of 8 are read; fetch it"
            " again",
        ),
        (
            "dinov2_with_registers",
            {"crop_size": 7},
            "makes pictures of (7, 7), and squares of at least one patch of 8 are read; fetch it"
            " again",
        ),
        (
            "siglip2",
            {"patch_size": 16},
            "cuts patches of 16 pixels, and config.json takes 8; fetch both again",
        ),
        (
            "siglip2",
            {"max_num_patches": 0},
            "describes no preparation of pictures (ValueError('max_num_patches')); fetch it again",
        ),
        (
            "siglip2",
            {"do_resize": False},
            "describes no preparation of pictures (ValueError('do_resize')); fetch it again",
        ),
        (
            "siglip",
            {"image_mean": "grey"},
            'describes no preparation of pictures (ValueError("could not convert string to float:'
            " 'g'\")); fetch it again",
        ),
        (
            "siglip",
            {"image_processor_type": "ConvNextImageProcessor"},
            "its processor is 'ConvNextImageProcessor', none of CLIPImageProcessor,"
            " BitImageProcessor, SiglipImageProcessor; use the file that came with the encoder",
        ),
        (
            "siglip2",
            {"image_processor_type": "SiglipImageProcessor"},
            "its processor is 'SiglipImageProcessor', not 'Siglip2ImageProcessor'; use the file"
            " that came with the encoder",
        ),
    ],
)
def test_pictures_that_the_encoder_does_not_read_are_one_error(
    folders, tmp_path, kind, changes, said
):
    folder = copied(folders[kind], tmp_path / "encoder")
    edit(folder / "preprocessor_config.json", **changes)
    assert the_line(read_vision_spec, str(folder)) == f"{folder}/preprocessor_config.json: {said}"


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("siglip", {"image_size": 7}, "its image_size 7 is less than its patch_size 8"),
        ("dinov2", {"num_channels": 1}, "its num_channels is 1, and pictures have 3"),
        ("siglip", {"hidden_act": "relu"}, "its hidden_act is 'relu'"),
        ("dinov2", {"use_swiglu_ffn": 1}, "its use_swiglu_ffn is 1"),
        (
            "dinov2",
            {"num_attention_heads": 5},
            "its hidden_size 32 is not a multiple of its num_at",
        ),
        ("siglip2", {"num_patches": 17}, "its num_patches 17 is no square"),
        ("siglip", {"image_size": [32, 32]}, "its image_size is [32, 32]"),
    ],
)
def test_sizes_that_cannot_be_are_one_error(folders, tmp_path, kind, changes, said):
    folder = copied(folders[kind], tmp_path / "encoder")
    edit(folder / "config.json", **changes)
    line = the_line(read_vision_spec, str(folder))
    assert line.startswith(f"{folder}: not the folder of an encoder ({said}")


@each_kind
def test_a_way_of_reading_that_is_not_there_is_one_error(folders, kind):
    name = ENCODERS[kind].NAME
    folder = str(folders[kind])
    assert the_line(read_vision_spec, folder, layer=3) == (
        f"--vision-layer 3: this {name} has 2 layers; use -2"
    )
    assert the_line(read_vision_spec, folder, pooling=3) == (
        f"--feature-pooling 3: does not divide this {name}'s 4 x 4 patches; use one of 1, 2, 4"
    )
    assert read_vision_spec(folder, pooling=2).shape == (4, 32)


@pytest.mark.parametrize("other", [kind for kind in KINDS if kind != "clip"])
def test_weights_of_another_kind_are_one_error(folders, tmp_path, other):
    folder = copied(folders["clip"], tmp_path / "encoder")
    shutil.copy(folders[other] / "model.safetensors", folder)
    spec = read_vision_spec(str(folder))
    line = the_line(VisionTower, spec)
    assert line.startswith(f"{folder}/model.safetensors: not this CLIP's weights (")
    assert line.endswith(" more); fetch the folder again") and len(line.split("\n")) == 1


@pytest.mark.parametrize("damage", ["missing", "unexpected", "misshapen"])
@each_kind
def test_every_name_must_be_there_and_no_other(folders, tmp_path, kind, damage):
    folder = copied(folders[kind], tmp_path / "encoder")
    tensors = load_file(folder / "model.safetensors")
    name = sorted(name for name in tensors if name.endswith("1.bias"))[0]
    if damage == "missing":
        del tensors[name]
    elif damage == "unexpected":
        tensors["encoder.other"] = tensors[name].clone()
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    line = the_line(VisionTower, read_vision_spec(str(folder)))
    assert line.startswith(
        f"{folder}/model.safetensors: not this {ENCODERS[kind].NAME}'s weights ("
    )
    assert {"missing": "missing", "unexpected": "unexpected", "misshapen": " is ("}[damage] in line


def test_what_reads_a_clip_alone_says_what_was_found(folders):
    folder = folders["siglip"]
    assert the_line(load_clip, read_vision_spec(str(folder))) == (
        f"{folder}: holds a SigLIP, and a CLIP is needed here; use a run that was trained with a"
        " CLIP"
    )


# -- the command ----------------------------------------------------------------------------------


@each_kind
def test_the_command_tells_what_it_makes_of_a_picture(folders, kind, capsys):
    vision_main([f"--vision={folders[kind]}", "--seconds=0.01", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (told["tokens"], told["dim"]) == (SIDE**2, 32) and told["pictures_per_second"] > 0


def test_every_member_is_tried_here():
    tried = {ENCODERS[kind] for kind in KINDS}
    assert tried == set(MEMBERS) and set(ENCODERS.values()) == tried


# -- in a run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", BUILDS)
def test_the_page_counts_the_tokens_that_a_run_will_have(folders, build):
    values = {"vision": str(folders[build]), "vision_features": "patches"}
    assert picture_shape(values) == read_vision_spec(str(folders[build])).shape
    assert picture_shape(values | {"vision_features": "pooled"}) == (1, 32)


def test_an_encoder_of_other_patches_is_refused_by_name_and_count(tmp_path):
    """To answer and to go on alike: what was found, what was wanted, and what would do."""
    run = runs.copy_of(runs.stopped_run(), tmp_path)
    found = write_encoder("siglip", tmp_path / "siglip", image_size=5 * PATCH)
    line = the_line(infer.main, ["--run", str(run), f"--vision={found}", "--prompt=x"])
    assert line == (
        f"{run}/checkpoint-000001: was trained on another picture encoder ({runs.VISION}) than"
        f" {found} (SigLIP: 25 tokens of 32 numbers a picture); name the right one with --vision"
    )
    line = the_line(runs.resume, run, f"--vision={found}")
    assert line.startswith("--resume: would not be exact, these differ: config.vision: ")
    assert f'"{found}" now; vision_fingerprint: ' in line
    assert line.endswith("; restore them, or go on all the same with --allow-changes")


def test_a_run_sees_by_another_encoder_than_clip(folders, tmp_path):
    """It trains, stops, goes on, and answers from a picture."""
    run = tmp_path / "run"
    folder = folders["dinov2_with_registers"]
    runs.start(run, "--stop-at-step=1", **runs.SHORT | {"vision": folder})
    runs.resume(run)
    picture = next((runs.world() / "images").iterdir())
    asked = ["--run", str(run), f"--image={picture}", "--prompt=What?", "--max-new-tokens=2"]
    assert infer.main(asked) == 0
