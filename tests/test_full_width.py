"""Two layers of the real width: what the tiny preset proves, at the sizes of Phi-3.5 and CLIP.

The vocabulary has 4,096 entries and not 32,064: embeddings would be most of the weights, and of the
time. benchmarks/full_shape.py measures the whole.
"""

import json
from pathlib import Path

import bitsandbytes as bnb
import numpy
import pytest
import runs
import torch
from PIL import Image
from random_model import logits_of
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, Phi3Config, Phi3ForCausalLM

from assistant.assistant import Assistant
from benchmarks.full_shape import write_base
from data.dataset import Message, Part
from model.base import find_weight_files, load_base, read_config, read_json
from model.vision import VisionTower, read_vision_spec
from ops.nf4 import base_weight

WIDTH, INNER, VOCABULARY, HEAD = 3072, 8192, 4096, 96
SWITCH = 32  # positions after which LongRoPE's long factors hold; the real 4,096 would take minutes


# -- Phi-3.5 --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def phi(tmp_path_factory):
    """A folder as on the hub: random bfloat16 in shards, with their index."""
    folder = tmp_path_factory.mktemp("full-width") / "phi"
    write_base(
        folder,
        layers=2,
        shard_bytes=200 * 10**6,
        vocab_size=VOCABULARY,
        original_max_position_embeddings=SWITCH,
        eos_token_id=2,
        pad_token_id=2,
    )
    yield folder
    for file in find_weight_files(folder):  # most of a gigabyte
        file.unlink()


@pytest.fixture(scope="module")
def trained(phi, tmp_path_factory):
    """One step of training, typed as a person types it; the folder of the run."""
    folder = tmp_path_factory.mktemp("full-width-run")
    runs.start(
        folder / "run",
        base=phi,
        base_cache=folder / "cache",
        row_tokens=0,
        max_steps=1,
        warmup_fraction=0,
        accumulation=1,
        evaluate_steps=0,
        log_steps=1,
        gradient_checkpointing="products",
    )
    yield folder / "run"
    for file in folder.rglob("part-*"):
        file.unlink()


def test_the_folder_has_the_real_layout(phi):
    assert len(find_weight_files(phi)) > 2 and (phi / "model.safetensors.index.json").is_file()
    config = read_config(phi)
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (
        WIDTH,
        INNER,
        VOCABULARY,
    )
    assert config.rope.crossing == SWITCH
    assert len(config.rope.short_factors) == len(config.rope.long_factors) == HEAD // 2


def test_one_training_step_moves_adapter_and_projector(trained):
    record = next(
        json.loads(line)
        for line in (trained / "metrics.jsonl").open()
        if json.loads(line)["kind"] == "train"
    )
    assert 0 < record["loss"] < 30 and record["supervised_tokens"] > 0
    assert set(record["update_norms"]) == {"lora", "projector"}
    assert all(moved > 0 for moved in record["update_norms"].values())
    [checkpoint] = trained.glob("checkpoint-*")
    adapter = load_file(checkpoint / "lora_weights.safetensors")
    widths = {
        name.split(".")[-2]: (len(b), adapter[name[:-1] + "A"].shape[1])
        for name, b in adapter.items()
        if name.endswith("lora_B")
    }
    assert widths == {
        "qkv_proj": (3 * WIDTH, WIDTH),
        "o_proj": (WIDTH, WIDTH),
        "gate_up_proj": (2 * INNER, WIDTH),
        "down_proj": (WIDTH, INNER),
    }
    assert all(b.abs().max() > 0 for name, b in adapter.items() if name.endswith("lora_B"))


def test_the_second_start_reads_the_kept_base_and_answers(trained, monkeypatch):
    monkeypatch.setattr("model.base.quantize", None)  # calling it would be a TypeError
    assistant = Assistant.load(trained)
    picture = next(Path(runs.world() / "images").iterdir())
    question = Message("user", (Part("image", str(picture)), Part("text", "What is there?")))
    assert isinstance("".join(assistant.reply([question], max_new_tokens=3)), str)


def test_logits_are_those_of_transformers_over_the_dequantised_weights(phi, trained):
    """With the short factors of LongRoPE, and, past its switch, with the long ones."""
    cache = trained.parent / "cache"
    ours = load_base(phi, None, torch.float32, "cpu", "nf4", cache).model
    weights = {name: parameter.data.float() for name, parameter in ours.named_parameters()}
    for name, module in ours.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weights[f"{name}.weight"] = base_weight(module)
    config = Phi3Config.from_pretrained(phi)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        reference = Phi3ForCausalLM(config)
    reference.load_state_dict(weights, strict=True, assign=True)
    reference.model.rotary_emb = type(reference.model.rotary_emb)(config=config)
    reference.eval()
    generator = torch.Generator().manual_seed(0)
    for length in (SWITCH - 8, SWITCH + 8):
        ids = torch.randint(VOCABULARY, (1, length), generator=generator)
        with torch.no_grad():
            found, expected = logits_of(ours, ids[0])[None], reference(ids).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    last = "model.layers.1.mlp.down_proj.weight"
    stored = load_file(phi / read_json(phi / "model.safetensors.index.json")["weight_map"][last])
    gap = (weights[last] - stored[last].float()).abs().max()
    assert 0 < gap < 0.153 * stored[last].abs().max()  # half of NF4's widest gap


# -- CLIP -----------------------------------------------------------------------------------------


def write_clip(folder: Path, side: int, patch: int, width: int, heads: int, projected: int) -> None:
    """A whole random CLIP as OpenAI's lie on the hub: both towers in one float32 file, position
    numbers among the weights, sizes in preprocessor_config.json as plain numbers. Two layers a
    tower; the text one, which nothing here reads, is narrow."""
    config = CLIPConfig(
        vision_config={
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "image_size": side,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "patch_size": patch,
            "projection_dim": projected,
        },
        text_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "projection_dim": projected,
        },
        projection_dim=projected,
    )
    torch.manual_seed(3)
    state = dict(CLIPModel(config).state_dict())
    for name, tensor in state.items():
        if tensor.dim() == 1 and "norm" in name:  # ones and zeros would hide one never loaded
            state[name] = tensor + 0.1 * torch.randn(tensor.shape)
    places = (side // patch) ** 2 + 1
    state["vision_model.embeddings.position_ids"] = torch.arange(places)[None]
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    folder.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    config.architectures = ["CLIPModel"]
    config.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "crop_size": side,
                "do_center_crop": True,
                "do_normalize": True,
                "do_resize": True,
                "feature_extractor_type": "CLIPFeatureExtractor",
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
                "resample": 3,
                "size": side,
            }
        )
    )


CLIPS = {  # the presets' CLIP, and the seed's
    "ViT-L/14-336": dict(side=336, patch=14, width=1024, heads=16, projected=768),
    "ViT-B/32": dict(side=224, patch=32, width=768, heads=12, projected=512),
}


@pytest.fixture(scope="module", params=CLIPS)
def clip(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "clip"
    write_clip(folder, **CLIPS[request.param])
    yield folder, CLIPS[request.param]
    (folder / "model.safetensors").unlink()


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Noise, upright and lying."""
    random = numpy.random.default_rng(0)
    return [
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=numpy.uint8))
        for height, width in ((360, 480), (400, 300))
    ]


def pixels_by_hand(picture: Image.Image, side: int) -> torch.Tensor:
    """(3, side, side): the short side to `side` by bicubic, the middle cut out, OpenAI's scale."""
    width, height = picture.size
    scale = side / min(width, height)
    picture = picture.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    values = numpy.asarray(picture.crop((left, top, left + side, top + side)), dtype=numpy.float64)
    mean = numpy.array([0.48145466, 0.4578275, 0.40821073])
    std = numpy.array([0.26862954, 0.26130258, 0.27577711])
    return torch.tensor((values / 255 - mean) / std).permute(2, 0, 1)


def test_a_clip_as_the_hub_has_it_sees_what_transformers_does(clip, pictures):
    folder, size = clip
    reference = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(pictures, return_tensors="pt")
    pixels = pixels["pixel_values"]
    assert pixels.shape == (2, 3, size["side"], size["side"])
    by_hand = torch.stack([pixels_by_hand(picture, size["side"]) for picture in pictures])
    torch.testing.assert_close(pixels.double(), by_hand, atol=1e-5, rtol=0)
    with torch.no_grad():
        expected = reference.vision_model(pixels, output_hidden_states=True)
        projected = reference.get_image_features(pixels)
    patches = (size["side"] // size["patch"]) ** 2
    for features, layer, wanted in (
        ("patches", -2, expected.hidden_states[-2][:, 1:]),
        ("pooled", -2, expected.pooler_output[:, None]),
    ):
        spec = read_vision_spec(str(folder), features=features, layer=layer)
        assert spec.shape == (patches if features == "patches" else 1, size["width"])
        found = VisionTower(spec)(pictures)
        assert found.shape == (2, *spec.shape) and torch.equal(found, wanted)
    # What the seed's projector read is one linear layer away from our pooled vector.
    matrix = load_file(folder / "model.safetensors")["visual_projection.weight"]
    projected = getattr(projected, "pooler_output", projected)
    torch.testing.assert_close(found[:, 0] @ matrix.T, projected, atol=1e-5, rtol=1e-4)
