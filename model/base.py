"""Load a base model from a folder or the Hugging Face hub, in NF4, frozen and fingerprinted.

Weights are read by hand, tensor by tensor, and quantised as they are read, so the peak memory is
the quantised model plus one tensor. No pickle is opened and no code of the folder is run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

import documents
import hub
from config import QUANTIZATIONS
from data import chat
from data.chat_tokenizer import FolderTokenizer
from errors import PhiSightError
from files import byte_bar, hash_files
from lora.layer import secure_four_bit
from model import base_cache
from model.base_tensors import Sources, check_size, check_twin, files_of, match_tensors
from model.decoder import DecoderConfig, LanguageModel
from model.families import FAMILIES, Family
from ops.nf4 import PanelLinear, packed_weight, quantised, uses_panels
from stored import NotStored, StoredTensors, new_tensor, opened
from tensors import is_finite

LAYOUT = (
    "config.json, model.safetensors (or model.safetensors.index.json and its shards), "
    "tokenizer.json and tokenizer_config.json"
)
STRETCH = 64 * 2**20  # bytes of 4-bit weights that lie side by side
NOT_BASES = {
    "vision_config": ", a model that sees pictures itself",
    "img_processor": ", a model that sees pictures itself",
    "num_experts": ", a mixture of experts",
    "num_local_experts": ", a mixture of experts",
}
"""keys of a config.json that say what kind of model it is"""
LINE = 64  # bytes: weights begin with a line of the cache
DOWNLOADED = ["*.json", "*.safetensors", "tokenizer.model"]


@dataclass
class BaseModel:
    """A frozen language model with what is needed to name it, feed it and recognise it."""

    model: LanguageModel
    family: Family
    tokenizer: FolderTokenizer
    fingerprint: str
    """sha256 over config.json and the weight files: a checkpoint resumes on this base only."""
    name: str
    compute_dtype: torch.dtype
    hub_config: dict[str, object]
    """config.json as it stands"""


def load_base(
    id_or_folder: str | Path,
    revision: str | None,
    compute_dtype: torch.dtype,
    device: torch.device | str,
    quantization: str = "nf4",
    cache: str | Path = "",
) -> BaseModel:
    """Load a model of one of `FAMILIES`, quantise its linear layers but `lm_head`, freeze it.

    Args:
        id_or_folder: a folder that holds config.json, safetensors weights and tokenizer files, or
            a hub id such as "microsoft/Phi-3.5-mini-instruct". HF_HUB_OFFLINE is respected.
        revision: branch, tag or commit on the hub; of no meaning for a folder.
        compute_dtype: dtype of the activations and of all weights that are not quantised, but for
            a 16-bit embedding and head under float32 on a CPU: they stay as they are, in half the
            memory, and are multiplied exactly (see `ops.head`).
        quantization: "nf4" (arXiv:2305.14314), "nf4-nested" (its block scales quantised too), or
            "none" (plain linear layers in compute_dtype).
        cache: folder that keeps the quantised weights for the next start; empty for none. What is
            read from there is what quantising gives, bit by bit; see `model.base_cache`.

    Raises:
        PhiSightError: the model cannot be found or read, is of no known family, has missing,
            unexpected or misshapen tensors, or has no tokenizer that fits it.
    """
    if quantization not in QUANTIZATIONS:
        raise PhiSightError(
            f"quantization: {quantization!r} is unknown; choose one of {', '.join(QUANTIZATIONS)}"
        )
    device = torch.device(device)
    folder = find_folder(id_or_folder, revision)
    family, config = read_family(folder)
    weight_files = find_weight_files(folder)
    check_size(config, weight_files)
    tokenizer = load_tokenizer(folder, config)

    with torch.device("meta"):
        model = LanguageModel(config)
    sources = match_tensors(model, family, weight_files)
    fingerprint = hash_files([folder / "config.json", *weight_files], cache)
    if quantization == "none":
        fill(model, sources, compute_dtype, device)
    else:
        key = base_cache.key_of(
            fingerprint, quantization, device, uses_panels(device, compute_dtype)
        )
        kept = Path(cache) / key if cache else None
        nested = quantization == "nf4-nested"
        fill_quantised(model, sources, compute_dtype, device, kept, nested)
    finish(model, device, compute_dtype)
    hub_config = read_json(folder / "config.json")
    return BaseModel(
        model, family, tokenizer, fingerprint, str(id_or_folder), compute_dtype, hub_config
    )


# Files: found, and read without trusting them


def find_folder(id_or_folder: str | Path, revision: str | None) -> Path:
    """The local folder of a base model: the one given, or a snapshot downloaded from the hub."""
    return hub.find_folder(id_or_folder, revision, "base model", LAYOUT, DOWNLOADED)


def read_config(folder: Path) -> DecoderConfig:
    """What config.json says of the decoder. Raises as `read_family` does."""
    return read_family(folder)[1]


def read_family(folder: Path) -> tuple[Family, DecoderConfig]:
    """Of which family config.json is, and what it says of the decoder.

    Raises `PhiSightError` if it is missing, broken, or of a family that is not in `FAMILIES`.
    """
    path = folder / "config.json"
    raw = read_json(path)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(f"{kind!r} ({family.name})" for kind, family in FAMILIES.items())
        whose = next((said for key, said in NOT_BASES.items() if raw.get(key)), "")
        raise PhiSightError(
            f"{path}: model_type is {kind!r:.60}{whose}, which no family of bases has; give a model"
            f" of {known}"
        )
    if method := raw.get("quantization_config"):
        method = method.get("quant_method") if isinstance(method, dict) else None
        raise PhiSightError(
            f"{path}: the weights are quantised already (quant_method {method!r:.60}); give the"
            " original 16-bit model"
        )
    try:
        return FAMILIES[kind], FAMILIES[kind].decoder_config(raw)
    except PhiSightError as error:
        raise PhiSightError(f"{path}: {error}; restore the model's own config.json") from error


def find_weight_files(folder: Path, instead: str = "") -> list[Path]:
    """The safetensors files of a model, sorted by name; where there are none, the file `instead`,
    which picture encoders have.

    Raises `PhiSightError` if one is absent.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise PhiSightError(f"{index}: it has no weight_map; download the file again")
        names = sorted({str(name) for name in weight_map.values()})
    else:
        names = ["model.safetensors"]
        if instead and not (folder / names[0]).is_file() and (folder / instead).is_file():
            names = [instead]
    for name in names:
        if Path(name).name != name:  # an index must not reach out of its folder
            raise PhiSightError(f"{index}: {name} is not a file name; download the file again")
        if os.path.isfile(folder / name):  # False for a name that no system takes, too
            continue
        if any(folder.glob("*.bin")) and not index.is_file():
            raise PhiSightError(
                f"base model {folder}: its weights are pickle files (.bin), which can run code; "
                "convert them with transformers' save_pretrained, which writes safetensors"
            )
        if instead:
            raise PhiSightError(
                f"picture encoder {folder}: {name} is missing; it needs its weights in safetensors,"
                f" or {instead}"
            )
        raise PhiSightError(f"base model {folder}: {name} is missing; the layout is {LAYOUT}")
    return [folder / name for name in names]


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises `PhiSightError` if it is missing or not one."""
    try:
        return documents.read_json(path, own=False)
    except FileNotFoundError as error:
        raise PhiSightError(f"{path}: it is missing; the layout is {LAYOUT}") from error
    except OSError as error:
        raise PhiSightError(f"{path}: {error.strerror}; download the file again") from error
    except PhiSightError as error:
        raise PhiSightError(f"{path}: {error}; download the file again") from error


def load_tokenizer(folder: Path, config: DecoderConfig) -> FolderTokenizer:
    """The folder's tokenizer. Raises `PhiSightError` if absent or larger than the embedding."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise PhiSightError(f"base model {folder}: {name} is missing; the layout is {LAYOUT}")
    return chat.load_tokenizer(folder, embeddings=config.vocab_size)


# Tensors: put in place one at a time


def swap_linear_layers(model: nn.Module, compute_dtype: torch.dtype, nested: bool) -> None:
    """Put an empty `Linear4bit` in the place of every linear layer except `lm_head`.

    Raises:
        PhiSightError: a layer has a size that bitsandbytes does not handle well everywhere.
    """
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or name == "lm_head":
            continue
        parent_name, _, child_name = name.rpartition(".")
        four_bit = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=compute_dtype,
            compress_statistics=nested,
            quant_type="nf4",
            device="meta",
        )
        # 64 is the block size of QLoRA. A row that is no whole number of them gets smaller blocks,
        # for the reason that `secure_four_bit` gives; Phi-3.5-mini (3072, 8192) has 64 throughout.
        packed_weight(four_bit).blocksize = 64 if linear.in_features % 64 == 0 else 32
        secure_four_bit(four_bit)
        setattr(model.get_submodule(parent_name), child_name, four_bit)


def fill_quantised(
    model: nn.Module,
    sources: Sources,
    compute_dtype: torch.dtype,
    device: torch.device,
    kept: Path | None,
    nested: bool,
) -> None:
    """Read the weights from the cache entry `kept`, or quantise them, and keep them there if it has
    a name."""
    swap_linear_layers(model, compute_dtype, nested)
    if kept is None:
        fill(model, sources, compute_dtype, device)
        return
    if base_cache.read_into(model, kept, set(sources), compute_dtype, device):
        return
    swap_linear_layers(model, compute_dtype, nested)  # again: some may have been filled
    # Half a byte a weight and a scale for 32 or 64 of them are under a third of the 16-bit files;
    # what is not quantised is kept as it is.
    plain = sum(
        parameter.numel() * 2
        for name, parameter in model.named_parameters()
        if not isinstance(parameter, bnb.nn.Params4bit)
    )
    stored = sum(path.stat().st_size for path in files_of(sources))
    writer = base_cache.Writer(kept, plain + stored // 3)
    try:
        fill(model, sources, compute_dtype, device, writer)
        writer.close()
    finally:
        writer.discard()


def fill(
    model: nn.Module,
    sources: Sources,
    compute_dtype: torch.dtype,
    device: torch.device,
    writer: base_cache.Writer | None = None,
) -> None:
    """Read every tensor of `sources` into `model`, file by file, one parameter at a time; each is
    handed to `writer` as it is to be kept."""
    paths = files_of(sources)
    order = sorted(sources, key=lambda name: paths.index(sources[name][0].path))
    with (
        byte_bar(sum(path.stat().st_size for path in paths), "loading the base") as bar,
        contextlib.ExitStack() as open_files,
    ):
        files: dict[Path, StoredTensors] = {}
        for name in order:
            parts = []
            for place in sources[name]:
                try:
                    if place.path not in files:
                        files[place.path] = open_files.enter_context(opened(place.path))
                    parts.append(files[place.path].read(place.name))
                except (OSError, NotStored) as error:
                    raise PhiSightError(
                        f"{place.path}: {error}; download the file again"
                    ) from error
                if place.twin:
                    check_twin(parts[0], place.twin)
                if not is_finite(parts[-1]):
                    raise PhiSightError(
                        f"{place.path}: {place.name} holds values that are not finite; download the"
                        " file again"
                    )
            stored = parts[0] if len(parts) == 1 else torch.cat(parts)
            kept = put(model, name, stored, compute_dtype, device)
            if writer:
                writer.add(name, kept)
            bar.update(stored.nbytes)
        bar.update(bar.total - bar.n)  # the headers


def put(
    model: nn.Module, name: str, stored: Tensor, compute_dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Make the parameter `name` of what its file holds, which may become part of it; the tensors
    that are to be kept of it, by what follows its name."""
    module_name, _, parameter_name = name.rpartition(".")
    module = model.get_submodule(module_name)
    if not (isinstance(module, bnb.nn.Linear4bit) and parameter_name == "weight"):
        kept = base_cache.dtype_to_keep(name, stored.dtype, compute_dtype, device)
        parameter = nn.Parameter(stored.to(device=device, dtype=kept), requires_grad=False)
        setattr(module, parameter_name, parameter)
        return {"": stored}
    weight = quantize(stored, module, compute_dtype, device)
    module.weight = weight
    if not uses_panels(device, compute_dtype):
        return {"": weight.detach(), **weight.quant_state.as_dict(packed=True)}
    layer = PanelLinear.of(module)
    model.set_submodule(module_name, layer)
    return {"": layer.panels.codes, base_cache.SCALES: layer.panels.scales}


def quantize(
    weight: Tensor, module: bnb.nn.Linear4bit, compute_dtype: torch.dtype, device: torch.device
) -> bnb.nn.Params4bit:
    """An (out_features, in_features) weight in NF4 on `device`, to become `module.weight`."""
    empty = packed_weight(module)
    state = None
    if device.type == "mps" and empty.compress_statistics:
        raise PhiSightError(
            "--quantization nf4-nested: is not unpacked on Apple's GPU; use --quantization nf4, or"
            " --device cpu"
        )
    if device.type in ("cpu", "mps") and not empty.compress_statistics:
        weight, state = quantised(weight, empty.blocksize, device)
        module.quant_state = state
    parameter = bnb.nn.Params4bit(
        weight,
        requires_grad=False,
        quant_state=state,
        blocksize=empty.blocksize,
        compress_statistics=empty.compress_statistics,
        quant_type="nf4",
        module=module,
        bnb_quantized=state is not None,
    )
    if state is None:  # its first move is what quantises it
        parameter = parameter.to(device)  # type: ignore[misc]  # `self` is annotated wrongly
    # Dequantisation returns this dtype, which starts as that of the file. The forward dequantises
    # to the compute dtype but the backward to this one, so they must agree: a bfloat16 file run in
    # float32 would otherwise get gradients through weights rounded a second time.
    parameter.quant_state.dtype = compute_dtype
    return parameter


def finish(
    model: LanguageModel, device: torch.device, compute_dtype: torch.dtype | None = None
) -> None:
    """Tie what is tied, freeze, lay 4-bit weights side by side, and switch to eval mode."""
    model.tie()
    settle_panels(model)
    model.model.embed_tokens.states_dtype = compute_dtype
    model.model.rotary.to(device)  # whose frequencies are computed, not stored
    model.requires_grad_(False)
    model.eval()


def settle_panels(model: nn.Module) -> None:
    """Move the weights of `PanelLinear`s into stretches of memory of some layers each, which are
    long enough for large pages: a token reads them all, and reads them half again as fast there."""
    waiting: list[PanelLinear] = []
    layers = [layer for layer in model.modules() if isinstance(layer, PanelLinear)]
    for layer in layers:
        waiting.append(layer)
        if sum(one.panels.nbytes for one in waiting) >= STRETCH or layer is layers[-1]:
            settle(waiting)
            waiting = []


def settle(layers: Sequence[PanelLinear]) -> None:
    sizes = [
        -(-part.nbytes // LINE) * LINE
        for layer in layers
        for part in (layer.panels.codes, layer.panels.scales)
    ]
    places = iter(new_tensor((sum(sizes),), torch.uint8).split(sizes))

    def moved(tensor: Tensor) -> Tensor:
        place = next(places)[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return place.copy_(tensor)

    for layer in layers:
        old = layer.panels
        layer.hold(dataclasses.replace(old, codes=moved(old.codes), scales=moved(old.scales)))


def language_model(config: DecoderConfig, weights: Iterable[tuple[str, Tensor]]) -> LanguageModel:
    """A frozen model of these weights as they are, all of which are given, each once."""
    with torch.device("meta"):
        model = LanguageModel(config)
    state = dict(weights)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    finish(model, state["model.embed_tokens.weight"].device)
    return model
