"""The two runs that benchmarks/vs_peft_trainer.py trains.

tiny: assets/tiny/phi3 and its picture world, 6 rows a step as in the preset.
mid: 4 layers, 1024 wide, Phi-3's vocabulary of 32,064, random weights; every conversation has a
picture. Its texts are as long as LLaVA's: conversations, descriptions and explanations in the
shares of LLaVA-Instruct-150K, with lognormal lengths fitted to 90 real questions and answers.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

import config as configs
from config import Config
from data.chat import load_tokenizer
from data.world import write_world

ROOT = Path(__file__).resolve().parent.parent
# Turns of question and answer, share of LLaVA-Instruct-150K, and (mean, deviation) of the logarithm
# of the tokens of a question and of an answer, in Phi-3's tokens.
KINDS = (
    ((3, 6), 58, (2.41, 0.18), (3.00, 0.43)),  # conversation
    ((1, 1), 23, (2.22, 0.26), (4.62, 0.23)),  # description
    ((1, 1), 77, (2.68, 0.25), (4.92, 0.23)),  # explanation
)


def tiny_config(folder: Path, steps: int) -> Config:
    """The tiny preset on enough pictures for `steps` steps."""
    write_world(folder / "world", pictures=30 + 10 * steps, held_out=1)
    return configs.replace(
        configs.default_config("tiny"),
        base=str(ROOT / "assets/tiny/phi3"),
        vision=str(ROOT / "assets/tiny/clip"),
        data=str(folder / "world/train.json"),
        images=str(folder / "world/images"),
        features=str(folder / "features"),
        run=str(folder / "run"),
    )


def mid_config(folder: Path, steps: int, picture_tokens: int) -> Config:
    """4 layers of 1024 in NF4, random weights, on conversations of LLaVA's lengths."""
    write_models(folder, round(picture_tokens**0.5))
    write_world(folder / "world", pictures=24, held_out=1)
    pictures = sorted(path.name for path in (folder / "world/images").glob("train_*"))
    records = list(llava_like(pictures, 8 * steps + 40))
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    return configs.replace(
        configs.default_config("phi35"),
        base=str(folder / "base"),
        vision=str(folder / "clip"),
        data=str(folder / "data.json"),
        images=str(folder / "world/images"),
        features=str(folder / "features"),
        run=str(folder / "run"),
        max_text_tokens=480,
        row_tokens=1024,
        batch_size=2,
        accumulation=1,
        gradient_checkpointing="none",
    )


def write_models(folder: Path, side: int) -> None:
    """A Phi-3 and a CLIP of side x side patches with random weights, in the hub's layout."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    Phi3ForCausalLM(
        Phi3Config(
            vocab_size=32064,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=4,
            num_attention_heads=16,
            num_key_value_heads=16,
            max_position_embeddings=4096,
            original_max_position_embeddings=4096,
            tie_word_embeddings=False,
        )
    ).save_pretrained(folder / "base")
    for file in (ROOT / "assets/tiny/phi3").glob("tokenizer*"):
        shutil.copy(file, folder / "base")
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=16,
            image_size=8 * side,
            patch_size=8,
            projection_dim=64,
        )
    )
    clip.config.save_pretrained(folder / "clip")
    save_file(
        {
            f"vision_model.{name}": tensor
            for name, tensor in clip.state_dict().items()
            if not name.endswith("position_ids")
        },
        folder / "clip/model.safetensors",
    )
    preprocessor = json.loads(
        (ROOT / "assets/tiny/clip/preprocessor_config.json").read_text(encoding="utf-8")
    )
    preprocessor |= {
        "crop_size": {"height": 8 * side, "width": 8 * side},
        "size": {"shortest_edge": 8 * side},
    }
    (folder / "clip/preprocessor_config.json").write_text(
        json.dumps(preprocessor), encoding="utf-8"
    )


def llava_like(pictures: Sequence[str], count: int) -> Iterator[dict]:
    """Records in LLaVA's form whose texts are as long as its own; nothing to learn from."""
    rng = random.Random(0)
    tokenizer = load_tokenizer(ROOT / "assets/tiny/phi3")
    words = [
        token.removeprefix("▁")
        for token in sorted(tokenizer.backend_tokenizer.get_vocab())
        if token.startswith("▁") and token[1:].isalpha()
    ]

    def text(shape: tuple[float, float]) -> str:
        return " ".join(rng.choices(words, k=max(1, round(rng.lognormvariate(*shape)))))

    for number in range(count):
        turns, _, question, answer = rng.choices(KINDS, [share for _, share, _, _ in KINDS])[0]
        said: list[dict] = []
        for turn in range(rng.randint(*turns)):
            asked = text(question) if turn else "<image>\n" + text(question)
            said += [{"from": "human", "value": asked}, {"from": "gpt", "value": text(answer)}]
        yield {"id": str(number), "image": pictures[number % len(pictures)], "conversations": said}
