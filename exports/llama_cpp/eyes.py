"""CLIP and projector as llama.cpp reads them: its `mmproj`, in the form of LLaVA-1.5.

What llama.cpp does otherwise than we do, and a certificate therefore measures: it computes the
projector's GELU by its tanh formula, reads CLIP's activations from a table of float16, and makes
every picture square by padding it with the mean colour, which is our `--picture-fit pad`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from errors import PhiSightError
from model.encoders.clip import ClipConfig, ClipVision
from model.projectors.projector import Projector
from model.vision import VisionSpec, load_clip, read_clip_config
from model.vlm import VisionLanguageModel

ARCHITECTURE, PROJECTOR = "clip", "mlp"
_OF_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_ELSEWHERE = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
}
_OF_PROJECTOR = {"linear_1": "mm.0", "linear_2": "mm.2"}


def layers_read(spec: VisionSpec) -> int:
    """How many of CLIP's layers a picture goes through."""
    layers = read_clip_config(spec.folder).num_hidden_layers
    return spec.layer if spec.layer >= 0 else layers + 1 + spec.layer


def layers_kept(spec: VisionSpec) -> int:
    """How many are written: llama.cpp leaves out the last one, so that there is one more, where
    there is one. Behind the last of all it is told which state to take."""
    return min(layers_read(spec) + 1, read_clip_config(spec.folder).num_hidden_layers)


def describe(writer: Any, spec: VisionSpec, text_dim: int) -> None:
    """Write what is no tensor. `writer`: a `gguf.GGUFWriter`; `text_dim`: of an embedding. Raises
    `PhiSightError` for a preparation of pictures that llama.cpp does not have."""
    config, preparation = read_clip_config(spec.folder), spec.preparation
    if preparation.mean is None or preparation.std is None or preparation.scale is None:
        raise PhiSightError(
            f"{spec.folder}: its pictures are not normalised, and llama.cpp normalises every one;"
            " export it with --llava"
        )
    if not math.isclose(preparation.scale, 1 / 255, rel_tol=1e-6):
        raise PhiSightError(
            f"{spec.folder}: its pixels are multiplied by {preparation.scale:g}, and llama.cpp"
            " multiplies them by 1/255; export it with --llava"
        )
    writer.add_type("mmproj")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(PROJECTOR)
    writer.add_vision_use_gelu(config.hidden_act == "gelu")
    writer.add_vision_image_size(config.image_size)
    writer.add_vision_patch_size(config.patch_size)
    writer.add_vision_embedding_length(config.hidden_size)
    writer.add_vision_feed_forward_length(config.intermediate_size)
    writer.add_vision_block_count(layers_kept(spec))
    writer.add_vision_head_count(config.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(config.layer_norm_eps)
    writer.add_vision_projection_dim(text_dim)
    writer.add_vision_image_mean(list(preparation.mean))
    writer.add_vision_image_std(list(preparation.std))
    if layers_read(spec) == layers_kept(spec):
        writer.add_array("clip.vision.feature_layer", [layers_read(spec)])


def weights(spec: VisionSpec, projector: Projector) -> Iterator[tuple[str, Tensor]]:
    """(GGUF name, float32 tensor) of all that `describe` describes."""
    yield from _clip_weights(load_clip(spec), read_clip_config(spec.folder), layers_kept(spec))
    for name, tensor in projector.state_dict().items():
        module, _, kind = name.rpartition(".")
        yield f"{_OF_PROJECTOR[module]}.{kind}", tensor


@torch.no_grad()
def embeddings_behind_class(
    spec: VisionSpec, model: VisionLanguageModel, pictures: Sequence[Image.Image]
) -> Tensor:
    """(pictures, tokens, dim) as a llama.cpp with issue 25814 of its repository computes them: the
    class token stands behind the patches, which have one another's positions, and the first patch
    is left out for it. To tell that fault from others; nothing is exported so."""
    clip = load_clip(spec)
    embeddings = clip.embeddings
    patches = embeddings.patch_embedding(spec.preparation(pictures)).flatten(2).transpose(1, 2)
    last = embeddings.class_embedding.expand(len(patches), 1, -1)
    states = torch.cat([patches, last], dim=1) + embeddings.position_embedding.weight
    states = clip.pre_layrnorm(states)
    for layer in clip.encoder.layers[: layers_read(spec)]:
        states = layer(states)
    return copy.deepcopy(model.projector).cpu()(states[:, 1:])


def is_added(name: str) -> bool:
    """Whether a weight is added to states, and not multiplied with: it is kept in float32."""
    return name in ("v.class_embd", "v.position_embd.weight")


def _clip_weights(clip: ClipVision, config: ClipConfig, kept: int) -> Iterator[tuple[str, Tensor]]:
    # Older files had the two linear layers of an MLP under each other's name. llama.cpp tells them
    # by the width, and takes a square MLP for an old one.
    swapped = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    square = config.intermediate_size == config.hidden_size
    for name, tensor in clip.state_dict().items():
        if name in _ELSEWHERE:
            yield _ELSEWHERE[name], tensor
        elif name.startswith("encoder.layers."):
            number, rest = name.removeprefix("encoder.layers.").split(".", 1)
            module, _, kind = rest.rpartition(".")
            called = _OF_LAYER[module]
            called = swapped.get(called, called) if square else called
            if int(number) < kept:
                yield f"v.blk.{number}.{called}.{kind}", tensor
