"""The vision tower against transformers, and the key that names its features."""

import json
import shutil

import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPModel
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from errors import PhiSightError
from model.encoders.preparation import Preparation
from model.vision import VisionTower, read_vision_spec

CLIP = ROOT / "assets/tiny/clip"


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny CLIP to change or break."""
    return shutil.copytree(CLIP, tmp_path / "clip")


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Noise in three sizes, none of them the tower's own."""
    generator = torch.Generator().manual_seed(0)
    return [
        Image.frombytes(
            "RGB",
            (width, height),
            bytes(torch.randint(256, (3 * width * height,), generator=generator).tolist()),
        )
        for width, height in ((40, 60), (130, 97), (200, 20))
    ]


@pytest.fixture(scope="module")
def expected(pictures):
    """What transformers' own CLIP computes for the same pictures."""
    clip = CLIPModel.from_pretrained(CLIP, dtype=torch.float32).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(CLIP)(pictures, return_tensors="pt")
    with torch.no_grad():
        return clip.vision_model(pixels["pixel_values"], output_hidden_states=True)


def edit(path, **changes) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


# -- what it computes -----------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [-2, -1, 0, 1])
def test_patches_are_those_of_clip(pictures, expected, layer):
    spec = read_vision_spec(str(CLIP), layer=layer)
    found = VisionTower(spec)(pictures)
    assert torch.equal(found, expected.hidden_states[layer][:, 1:])
    assert found.shape == (len(pictures), *spec.shape) and found.dtype == torch.float32


def test_pooled_is_that_of_clip(pictures, expected):
    spec = read_vision_spec(str(CLIP), features="pooled")
    found = VisionTower(spec)(pictures)
    assert torch.equal(found, expected.pooler_output[:, None])
    assert spec.shape == (1, found.shape[2])


def test_a_picture_has_the_same_features_in_any_company(pictures):
    tower = VisionTower(read_vision_spec(str(CLIP)))
    alone = torch.cat([tower([picture]) for picture in pictures])
    torch.testing.assert_close(tower(pictures), alone, rtol=1e-5, atol=1e-5)


def test_the_tower_is_frozen(pictures):
    tower = VisionTower(read_vision_spec(str(CLIP)))
    assert not tower.model.training
    assert not any(parameter.requires_grad for parameter in tower.model.parameters())
    assert not tower(pictures).requires_grad


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"size": 50, "crop_size": 40},  # as the first CLIPs were published
        {"size": {"height": 33, "width": 50}, "do_center_crop": False},
        {"do_resize": False, "crop_size": {"height": 61, "width": 47}},  # black is added
        {"do_resize": False, "crop_size": {"height": 20, "width": 201}},
        {"resample": 2, "do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 0.5, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 0.5]},
    ],
)
def test_pictures_are_prepared_as_transformers_does(folder, pictures, changes):
    edit(folder / "preprocessor_config.json", **changes)
    theirs = CLIPImageProcessorPil.from_pretrained(folder)
    ours = Preparation.from_dict(json.loads((folder / "preprocessor_config.json").read_text()))
    for picture in pictures:
        expected = theirs([picture], return_tensors="pt")["pixel_values"]
        assert torch.equal(ours([picture]), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": "large"},
        {"size": {"longest_edge": 3}},
        {"crop_size": None},
        {"resample": 77},
        {"image_mean": 3},
        {"image_std": ["a"]},
        {"do_pad": True},
        {"crop_size": 95},
    ],
)
def test_a_preparation_that_is_not_known_is_one_error(folder, changes):
    edit(folder / "preprocessor_config.json", **changes)
    with pytest.raises(PhiSightError, match="preprocessor|preparation"):
        VisionTower(read_vision_spec(str(folder)))


@pytest.mark.parametrize("changes", [{}, {"size": 50, "crop_size": 40}, {"do_normalize": False}])
def test_pictures_are_padded_as_llava_does(folder, pictures, changes):
    edit(folder / "preprocessor_config.json", **changes)
    theirs = LlavaImageProcessorPil.from_pretrained(folder, do_pad=True)
    ours = Preparation.from_dict(json.loads((folder / "preprocessor_config.json").read_text()))
    ours = ours.padded()
    for picture in pictures:
        expected = theirs([picture], return_tensors="pt")["pixel_values"]
        assert torch.equal(ours([picture]), expected)
        assert torch.equal(ours([ours.fit(picture)]), expected)  # fitted where it was decoded


# -- the key --------------------------------------------------------------------------------------


def test_the_key_names_the_files_and_not_their_folder(folder):
    assert read_vision_spec(str(folder)).key == read_vision_spec(str(CLIP)).key


def test_the_key_changes_with_all_that_changes_the_features(folder):
    keys = {read_vision_spec(str(folder)).key}

    def is_new(**reading) -> bool:
        key = read_vision_spec(str(folder), **reading).key
        known = key in keys
        keys.add(key)
        return not known

    assert not is_new()
    assert is_new(layer=-1)
    assert is_new(features="pooled")
    assert is_new(picture_fit="pad") and not is_new(picture_fit="crop")
    edit(folder / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    assert is_new()
    tensors = load_file(folder / "model.safetensors")
    tensors["vision_model.post_layernorm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert is_new()
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", vision_config=config["vision_config"] | {"layer_norm_eps": 1e-3})
    assert is_new()


# -- weights that are published as a pickle -------------------------------------------------------


def to_pickle(folder, zipped: bool = True) -> dict:
    """pytorch_model.bin in the place of model.safetensors, in the form of today or of before."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors["vision_model.embeddings.position_ids"] = torch.arange(37)[None]
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    return tensors


@pytest.mark.parametrize("zipped", [True, False])
def test_a_clip_with_a_pickle_only_sees_the_same(folder, pictures, expected, zipped):
    safe = read_vision_spec(str(folder)).key
    to_pickle(folder, zipped)
    spec = read_vision_spec(str(folder))
    assert torch.equal(VisionTower(spec)(pictures), expected.hidden_states[-2][:, 1:])
    assert spec.key != safe  # other bytes
    shutil.copy(CLIP / "model.safetensors", folder)
    assert read_vision_spec(str(folder)).key == safe  # safetensors are preferred


class Harm:
    """What a pickle can do to who reads it."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(folder, tmp_path, zipped):
    tensors = to_pickle(folder, zipped)
    harm = tmp_path / "harm"
    torch.save(
        tensors | {"harm": Harm(harm)},
        folder / "pytorch_model.bin",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(PhiSightError, match=r"pytorch_model\.bin: .*damaged, or holds more than"):
        VisionTower(read_vision_spec(str(folder)))
    assert not harm.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02.", b"no pickle at all"])
def test_a_pickle_of_any_content_is_one_error(folder, content):
    to_pickle(folder)
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(PhiSightError, match=r"pytorch_model\.bin: "):
        VisionTower(read_vision_spec(str(folder)))


@pytest.mark.parametrize("content", [[1], {"a": 1}, {1: torch.ones(1)}, torch.ones(1)])
def test_a_pickle_of_something_else_is_one_error(folder, content):
    to_pickle(folder)
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(PhiSightError, match="something else than tensors by name"):
        VisionTower(read_vision_spec(str(folder)))


# -- what is missing or wrong ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(PhiSightError, match=name.replace(".", r"\.")) as caught:
        read_vision_spec(str(folder))
    assert str(folder) in str(caught.value)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(PhiSightError, match="nowhere"):
        read_vision_spec(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_json_that_is_none_is_an_error(folder, name):
    (folder / name).write_text("{oh")
    with pytest.raises(PhiSightError, match="clip"):
        VisionTower(read_vision_spec(str(folder)))


@pytest.mark.parametrize("layer", [99, -99])
def test_a_layer_that_is_not_there_is_named(layer):
    with pytest.raises(PhiSightError, match=f"--vision-layer {layer}"):
        read_vision_spec(str(CLIP), layer=layer)


def test_every_layer_that_is_allowed_is_there(pictures):
    layers = json.loads((CLIP / "config.json").read_text())["vision_config"]["num_hidden_layers"]
    for layer in (-layers - 1, layers):
        spec = read_vision_spec(str(CLIP), layer=layer)
        assert VisionTower(spec)(pictures[:1]).shape == (1, *spec.shape)
        with pytest.raises(PhiSightError):
            read_vision_spec(str(CLIP), layer=layer + (1 if layer > 0 else -1))


@pytest.mark.parametrize("damage", ["cut", "missing", "unexpected", "misshapen"])
def test_weights_that_do_not_fit_are_an_error(folder, damage):
    path = folder / "model.safetensors"
    name = "vision_model.post_layernorm.weight"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        tensors = load_file(path)
        if damage == "missing":
            del tensors[name]
        elif damage == "unexpected":
            tensors["vision_model.other"] = tensors[name].clone()
        else:
            tensors[name] = tensors[name][:-1].clone()
        save_file(tensors, path, {"format": "pt"})
    with pytest.raises(PhiSightError, match=r"model\.safetensors"):
        VisionTower(read_vision_spec(str(folder)))


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "5",
        "{",
        '{"model_type": "clip", "vision_config": []}',
        '{"model_type": "clip_vision_model", "patch_size": 0}',
        '{"model_type": "clip_vision_model", "hidden_size": "wide"}',
    ],
)
def test_a_config_of_any_content_is_one_error(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(PhiSightError, match="not the folder of an encoder"):
        read_vision_spec(str(folder))


def test_a_language_model_is_no_clip():
    with pytest.raises(PhiSightError, match="phi3"):
        read_vision_spec(str(ROOT / "assets/tiny/phi3"))
