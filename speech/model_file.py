"""A `.pt` file in the layout of openai-whisper -> a Whisper, or one line that says why not.

The sizes that a file claims are compared with the tensors that it holds before anything is made by
them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from errors import PhiSightError

LARGEST_MODEL = 8 << 30  # bytes unpacked; the largest of OpenAI's has 6 GB in float32
LARGEST_DIMENSIONS = {
    "n_mels": 128,
    "n_audio_ctx": 1500,
    "n_audio_state": 4096,
    "n_audio_head": 64,
    "n_audio_layer": 64,
    "n_vocab": 60_000,
    "n_text_ctx": 4096,
    "n_text_state": 4096,
    "n_text_head": 64,
    "n_text_layer": 64,
}


def load_model_file(name: str, known: list[str]) -> Any:
    """The `whisper.model.Whisper` of a `.pt` file, on the CPU; `known` are the names that would do
    instead. Raises `PhiSightError`."""
    from whisper.model import ModelDimensions, Whisper

    from torch_files import NotRead, load_torch_file

    if not Path(name).is_file():
        raise PhiSightError(
            f"speech model {name}: no such file; name a .pt file, or one of {', '.join(known)}"
        )
    try:
        saved = load_torch_file(name, LARGEST_MODEL)
    except (NotRead, OSError) as error:
        raise _not_a_whisper(name, str(error)) from error
    if not isinstance(saved, dict) or not _has_sane_dimensions(saved.get("dims")):
        raise _not_a_whisper(name, "its dimensions are not Whisper's")
    dims, state = saved["dims"], saved.get("model_state_dict")
    if not isinstance(state, dict) or (reason := _what_differs(dims, state)):
        raise _not_a_whisper(name, reason if isinstance(state, dict) else "it has no weights")
    model = Whisper(ModelDimensions(**dims))
    model.load_state_dict(state)
    return model


def _what_differs(dims: dict[str, int], state: dict[str, Any]) -> str:
    """How `state` differs from the weights of a model of `dims`; empty if it does not."""
    import torch

    wanted = _shapes(dims)
    if missing := [key for key in wanted if key not in state]:
        return f"it lacks {len(missing)} of {len(wanted)} tensors, such as {missing[0]}"
    if len(state) > len(wanted):
        return f"it has {len(state)} tensors, a Whisper of its dimensions {len(wanted)}"
    for key, shape in wanted.items():
        found = state[key]
        if not isinstance(found, torch.Tensor) or found.shape != shape:
            return f"{key} has another shape than its dimensions say"
        if not found.is_floating_point():
            return f"{key} holds {found.dtype}, not floating-point numbers"
    return ""


def _shapes(dims: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by its name, as openai-whisper makes them.

    A model on torch's meta device would tell them too, after loading torch's compiler."""
    shapes: dict[str, tuple[int, ...]] = {}

    def both(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    for half, side, attentions in (
        ("encoder", "audio", ("attn",)),
        ("decoder", "text", ("attn", "cross_attn")),
    ):
        state = dims[f"n_{side}_state"]
        shapes[f"{half}.positional_embedding"] = (dims[f"n_{side}_ctx"], state)
        for layer in range(dims[f"n_{side}_layer"]):
            block = f"{half}.blocks.{layer}"
            for attention in attentions:
                for part in ("query", "value", "out"):
                    both(f"{block}.{attention}.{part}", state, state)
                shapes[f"{block}.{attention}.key.weight"] = (state, state)
                both(f"{block}.{attention}_ln", state)
            both(f"{block}.mlp.0", 4 * state, state)
            both(f"{block}.mlp.2", state, 4 * state)
            both(f"{block}.mlp_ln", state)
    state = dims["n_audio_state"]
    both("encoder.conv1", state, dims["n_mels"], 3)
    both("encoder.conv2", state, state, 3)
    both("encoder.ln_post", state)
    shapes["decoder.token_embedding.weight"] = (dims["n_vocab"], dims["n_text_state"])
    both("decoder.ln", dims["n_text_state"])
    return shapes


def _has_sane_dimensions(dims: Any) -> bool:
    """Whether `dims` holds Whisper's dimensions, whole numbers that fit together."""
    if not isinstance(dims, dict) or dims.keys() != LARGEST_DIMENSIONS.keys():
        return False
    limits = LARGEST_DIMENSIONS.items()
    if not all(type(dims[key]) is int and 1 <= dims[key] <= most for key, most in limits):
        return False
    return (
        dims["n_mels"] in (80, 128)
        and dims["n_audio_ctx"] == 1500
        and all(dims[f"n_{side}_state"] % dims[f"n_{side}_head"] == 0 for side in ("audio", "text"))
        and dims["n_vocab"] >= 51_864
    )


def _not_a_whisper(name: str, reason: str) -> PhiSightError:
    return PhiSightError(
        f"speech model {name}: is not a Whisper in the layout of openai-whisper"
        f' ({{"dims", "model_state_dict"}}; {reason}); name another .pt'
    )
