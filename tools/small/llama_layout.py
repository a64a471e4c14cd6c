"""SmolLM2 in Phi-3's layout -> the same weights in Llama's, with SmolLM2's own tokens and chat.

    python -m tools.small.llama_layout SMOLLM2_PHI3 OUT

The folder given has fused projections, and its tokenizer carries Phi-3's marks: `<|im_end|>` is
named `<|end|>`, and others were added behind the vocabulary, with rows of the embedding. Here the
projections are apart, the name is the old one again, and what was added is gone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from documents import read_json
from errors import PhiSightError, run_main
from files import new_folder
from model.base import find_weight_files, read_family
from model.decoder import DecoderConfig
from model.families import LLAMA
from tools.small import templates

END, OWN_END = "<|end|>", "<|im_end|>"
EMBEDDING = "model.embed_tokens.weight"


def write_llama(source: Path, out: Path) -> None:
    """Write the folder `out`, which must not be there.

    Raises:
        PhiSightError: `source` is not SmolLM2 in Phi-3's layout, or `out` cannot be written.
    """
    family, config = read_family(source)
    tokenizer = read_json(source / "tokenizer.json", own=False)
    if not family.is_fused or END not in tokenizer["model"]["vocab"]:
        raise PhiSightError(
            f"{source}: not SmolLM2 in Phi-3's layout (fused projections, {END} in the vocabulary);"
            " give the folder smollm2-phi3 of the real weights"
        )
    tokenizer = own_tokenizer(tokenizer)
    size = len(tokenizer["model"]["vocab"])
    state: dict[str, Tensor] = {}
    for path in find_weight_files(source):
        state |= load_file(path)
    state[EMBEDDING] = state[EMBEDDING][:size].clone()  # a view would be stored whole
    stored = {name: part.clone() for name, part in LLAMA.to_stored(state.items(), config)}
    with new_folder(out) as folder:
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
        texts = {
            "config.json": config_json(source, config, size),
            "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
            "tokenizer.json": tokenizer,
            "tokenizer_config.json": {
                "bos_token": "<|im_start|>",
                "eos_token": OWN_END,
                "pad_token": OWN_END,
                "unk_token": "<|endoftext|>",
                "add_prefix_space": False,
                "chat_template": templates.SMOLLM2,
                "clean_up_tokenization_spaces": False,
                "model_max_length": config.max_position_embeddings,
                "tokenizer_class": "PreTrainedTokenizerFast",
            },
        }
        for name, content in texts.items():
            text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8", newline="\n")


def own_tokenizer(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json without the tokens that were added behind its vocabulary, and with the old
    name of what ends a turn."""
    vocabulary = tokenizer["model"]["vocab"]
    names = {END: OWN_END}
    own = {names.get(token, token): number for token, number in vocabulary.items()}
    added = [
        one | {"content": names.get(one["content"], one["content"]), "rstrip": False}
        for one in tokenizer["added_tokens"]
        if one["id"] < len(vocabulary)
    ]
    return tokenizer | {"added_tokens": added, "model": tokenizer["model"] | {"vocab": own}}


def config_json(source: Path, config: DecoderConfig, vocabulary: int) -> dict[str, object]:
    """In the older form, with `rope_theta` at the top, which most of the hub's files have."""
    return {
        "architectures": [LLAMA.architecture],
        "model_type": LLAMA.model_type,
        "vocab_size": vocabulary,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": read_json(source / "config.json", own=False).get("dtype", "float32"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="SmolLM2 in Phi-3's layout")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    write_llama(options.source, options.out)
    print(f"{options.out}: SmolLM2 in Llama's layout")


if __name__ == "__main__":
    run_main(main)
