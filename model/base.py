"""Load a Phi-3 base model from a folder or the Hugging Face hub, in NF4, frozen and fingerprinted.

Weights are read by hand, tensor by tensor, and quantised as they are read, so the peak memory is
the quantised model plus one tensor. No pickle is opened and no code of the folder is run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes as bnb
import torch
from safetensors import SafetensorError, safe_open
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
from model.decoder import DecoderConfig, LanguageModel
from model.phi3 import decoder_config
from ops.nf4 import PanelLinear, packed_weight, quantised, uses_panels
from stored import NotStored, new_tensor, opened

FAMILIES: dict[str, Callable[[Mapping[str, object]], DecoderConfig]] = {"phi3": decoder_config}
"""model_type of a config.json -> how it is read"""
LAYOUT = (
    "config.json, model.safetensors (or model.safetensors.index.json and its shards), "
    "tokenizer.json and tokenizer_config.json"
)
STRETCH = 64 * 2**20  # bytes of 4-bit weights that lie side by side
LINE = 64  # bytes: weights begin with a line of the cache
DOWNLOADED = ["*.json", "*.safetensors", "tokenizer.model"]
STORED_DTYPES = ("F32", "F16", "BF16")


@dataclass
class BaseModel:
    """A frozen language model with what is needed to name it, feed it and recognise it."""

    model: LanguageModel
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
    """Load a Phi-3 model, quantise its linear layers except `lm_head`, and freeze everything.

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
        PhiSightError: the model cannot be found or read, is no Phi-3, has missing, unexpected or
            misshapen tensors, or has no tokenizer that fits it.
    """
    if quantization not in QUANTIZATIONS:
        raise PhiSightError(
            f"quantization: {quantization!r} is unknown; choose one of {', '.join(QUANTIZATIONS)}"
        )
    device = torch.device(device)
    folder = find_folder(id_or_folder, revision)
    config = read_config(folder)
    weight_files = find_weight_files(folder)
    tokenizer = load_tokenizer(folder, config)

    with torch.device("meta"):
        model = LanguageModel(config)
    sources = match_tensors(model, weight_files)
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
    return BaseModel(model, tokenizer, fingerprint, str(id_or_folder), compute_dtype, hub_config)


def choose_compute_dtype(device: torch.device | str) -> tuple[torch.dtype, str]:
    """The dtype to compute in on `device`, and the reason in words for the log.

    Raises:
        PhiSightError: the device is neither a CPU nor a CUDA GPU.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return torch.float32, "no GPU: 16-bit backward through NF4 takes a scalar path on a CPU"
    if device.type != "cuda":
        raise PhiSightError(f"device: {device.type} is not supported; choose cuda or cpu")
    # Asked by capability, as `torch.cuda.is_bf16_supported` also says yes to slow emulation.
    if torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16, "the GPU has bfloat16, which needs no loss scaler"
    return torch.float16, "the GPU has no bfloat16: float16 needs a loss scaler"


# Files: found, and read without trusting them


def find_folder(id_or_folder: str | Path, revision: str | None) -> Path:
    """The local folder of a base model: the one given, or a snapshot downloaded from the hub."""
    return hub.find_folder(id_or_folder, revision, "base model", LAYOUT, DOWNLOADED)


def read_config(folder: Path) -> DecoderConfig:
    """What config.json says of the decoder.

    Raises `PhiSightError` if it is missing, broken, or of a family that is not in `FAMILIES`.
    """
    path = folder / "config.json"
    raw = read_json(path)
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise PhiSightError(
            f"{path}: model_type is {family!r}, not {' or '.join(map(repr, FAMILIES))}; "
            "choose Phi-3.5-mini-instruct or another model of the Phi-3 layout"
        )
    if raw.get("quantization_config"):
        raise PhiSightError(
            f"{path}: the weights are quantised already; give the original 16-bit model"
        )
    try:
        return FAMILIES[family](raw)
    except PhiSightError as error:
        raise PhiSightError(f"{path}: {error}; restore the model's own config.json") from error


def find_weight_files(folder: Path, instead: str = "") -> list[Path]:
    """The safetensors files of a model, sorted by name; where there are none, the file `instead`.

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
        if (folder / name).is_file():
            continue
        if any(folder.glob("*.bin")) and not index.is_file():
            raise PhiSightError(
                f"base model {folder}: its weights are pickle files (.bin), which can run code; "
                "convert them with transformers' save_pretrained, which writes safetensors"
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


# Tensors: matched by name and shape before one is read, then put in place one at a time


def match_tensors(model: LanguageModel, weight_files: list[Path]) -> dict[str, Path]:
    """The file of each tensor that `model` (on the meta device) needs.

    Raises:
        PhiSightError: names every tensor that is missing, unexpected, double, misshapen, or of a
            dtype that is no 16- or 32-bit float.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        expected.pop("lm_head.weight")  # it is the embedding, stored once
    sources: dict[str, Path] = {}
    problems = []
    for path, name, shape, dtype in read_headers(weight_files):
        if name not in expected:
            problems.append(f"unexpected {name}")
        elif name in sources:
            problems.append(f"{name} is in both {sources[name].name} and {path.name}")
        elif shape != expected[name]:
            problems.append(f"{name} has shape {shape}, not {expected[name]}")
        elif dtype not in STORED_DTYPES:
            problems.append(f"{name} is {dtype}, not one of {', '.join(STORED_DTYPES)}")
        sources[name] = path
    problems += [f"missing {name}" for name in expected if name not in sources]
    if problems:
        raise PhiSightError(
            f"base model {weight_files[0].parent}: {', '.join(problems)}; "
            "the weight files do not belong to this config.json, download both again"
        )
    return sources


def read_headers(weight_files: list[Path]) -> Iterator[tuple[Path, str, tuple[int, ...], str]]:
    """(file, tensor name, shape, dtype) of every stored tensor; no tensor is read."""
    for path in weight_files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    stored = file.get_slice(name)
                    yield path, name, tuple(stored.get_shape()), stored.get_dtype()
        except (SafetensorError, OSError) as error:
            raise PhiSightError(f"{path}: {error}; download the file again") from error


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
    sources: dict[str, Path],
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
    stored = sum(path.stat().st_size for path in set(sources.values()))
    writer = base_cache.Writer(kept, plain + stored // 3)
    try:
        fill(model, sources, compute_dtype, device, writer)
        writer.close()
    finally:
        writer.discard()


def fill(
    model: nn.Module,
    sources: dict[str, Path],
    compute_dtype: torch.dtype,
    device: torch.device,
    writer: base_cache.Writer | None = None,
) -> None:
    """Read every tensor of `sources` into `model`, file by file, one tensor at a time; each is
    handed to `writer` as it is to be kept."""
    files = sorted(set(sources.values()))
    with byte_bar(sum(path.stat().st_size for path in files), "loading the base") as bar:
        for path in files:
            try:
                with opened(path) as file:
                    for name in [name for name, source in sources.items() if source == path]:
                        stored = file.read(name)
                        kept = put(model, name, stored, compute_dtype, device)
                        if writer:
                            writer.add(name, kept)
                        bar.update(stored.nbytes)
            except (OSError, NotStored) as error:
                raise PhiSightError(f"{path}: {error}; download the file again") from error
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
    if device.type == "cpu" and not empty.compress_statistics:
        weight, state = quantised(weight, empty.blocksize)
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
