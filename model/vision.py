"""The eyes: a frozen picture encoder, pictures -> (pictures, tokens, dim).

python -m model.vision --vision assets/tiny/clip        # its sizes, and its speed here
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import hub
import stored
from config import Config, Parser
from errors import PhiSightError, run_main
from files import hash_files
from model.base import DOWNLOADED, find_weight_files, read_json
from model.encoders import encoder_of
from model.encoders.clip import ClipConfig, ClipVision
from model.encoders.encoder import EncoderConfig, PictureEncoder
from model.encoders.preparation import Preparation
from model.grid import blocks_of
from tensors import is_finite, mismatches
from torch_files import NotRead, load_torch_file
from workers.fitting import Fit, Fitted

FILES = "config.json, preprocessor_config.json and model.safetensors (or pytorch_model.bin)"
LAYOUT = f"it needs {FILES}"
WHAT = "picture encoder"  # in errors about a folder of which no more is known
# OpenAI's own CLIPs were published in this form, and some are still there in no other.
PICKLED = "pytorch_model.bin"
LARGEST_WEIGHTS = 64 << 30  # bytes of a file of that name
SMALL = 8 << 20  # numbers of an encoder that is made whatever its files hold


@dataclass(frozen=True)
class VisionSpec:
    """Which encoder, and how it is read: all that is needed to name features, computing none."""

    folder: Path
    config: EncoderConfig
    features: str
    """"patches": hidden layer `layer` without what stands in front of the patches (LLaVA takes -2,
    arXiv 2304.08485); "pooled": what the encoder itself makes one vector of a picture by"""
    layer: int
    pooling: int
    """this many by this many patches are averaged into one token; 1 for none"""
    shape: tuple[int, int]
    """(tokens, dim) of one picture"""
    key: str
    """names the weights, the preprocessing and the way of reading: features of one key are equal"""
    preparation: Preparation
    """what is done to a picture before the encoder sees it"""

    @property
    def told(self) -> str:
        """What it makes of a picture, as people read it."""
        tokens, dim = self.shape
        return f"{self.config.NAME}: {tokens} tokens of {dim} numbers a picture"


def read_vision_spec(
    id_or_folder: str,
    revision: str = "",
    features: str = "patches",
    layer: int = -2,
    pooling: int = 1,
    picture_fit: str = "crop",
    cache: str | Path = "",
) -> VisionSpec:
    """Find the encoder, check its config and fingerprint its files, without loading the weights.

    `picture_fit`: see `Config`. `cache`: a folder in which to remember the fingerprint, see
    `hash_files`. Raises PhiSightError for a folder that is of no encoder, pictures of another size
    than it reads, a layer or a vector that it does not have, and a `pooling` into which its grid of
    patches cannot be cut.
    """
    folder = find_encoder(id_or_folder, revision or None)
    files = [folder / "config.json", folder / "preprocessor_config.json"]
    _need(files[0])
    config = read_encoder_config(folder)  # first: of another kind of model, no file is missing
    _need(files[1])
    try:
        preparation = config.preparation(read_json(files[1]))
    except PhiSightError as error:
        raise PhiSightError(f"{files[1]}: {error}") from None
    side = _side_read(config, preparation, features, layer, pooling)
    shape = ((side // pooling) ** 2, config.hidden_size)
    weights = find_weight_files(folder, PICKLED)
    _check_size(folder, config, weights)
    digest = hash_files([*files, *weights], cache)
    said = f"{digest}/{features}/{layer}"
    # What is not pooled and not padded keeps the key that it had before there was a choice.
    said += f"/{pooling}" if pooling > 1 else ""
    said += "/pad" if picture_fit == "pad" else ""
    key = hashlib.sha256(said.encode()).hexdigest()[:16]
    if picture_fit == "pad":
        preparation = preparation.padded()
    return VisionSpec(folder, config, features, layer, pooling, shape, key, preparation)


def _need(file: Path) -> None:
    if not file.is_file():
        raise PhiSightError(f"{file}: no such file; {LAYOUT}")


def _check_size(folder: Path, config: EncoderConfig, weights: Sequence[Path]) -> None:
    """Raise `PhiSightError` for an encoder of far more numbers than its files have bytes, before
    any part of the model is made to its measure."""
    stored = sum(file.stat().st_size for file in weights)
    if config.least_numbers > max(stored, SMALL):
        raise PhiSightError(
            f"{folder}: config.json describes at least {config.least_numbers:,} numbers, and"
            f" {stored:,} bytes of weights are there; fetch the folder again"
        )


def _side_read(
    config: EncoderConfig, preparation: Preparation, features: str, layer: int, pooling: int
) -> int:
    """How many patches side by side are read, 1 where they are pooled. Raises `PhiSightError`."""
    name, layers = config.NAME, config.num_hidden_layers
    if not -layers - 1 <= layer <= layers:
        raise PhiSightError(f"--vision-layer {layer}: this {name} has {layers} layers; use -2")
    if features == "pooled" and not config.pools:
        raise PhiSightError(
            f"--vision-features pooled: this {name} has no head that pools; use patches"
        )
    side = config.side(preparation) if features == "patches" else 1
    if side % pooling:
        fitting = ", ".join(str(n) for n in range(1, side + 1) if side % n == 0)
        grid = f"this {name}'s {side} x {side} patches" if side > 1 else "the one pooled vector"
        raise PhiSightError(
            f"--feature-pooling {pooling}: does not divide {grid}; use one of {fitting}"
        )
    return side


def vision_of(config: Config) -> VisionSpec:
    """The encoder of a run, and how it is read. Raises as `read_vision_spec` does."""
    return read_vision_spec(
        config.vision,
        config.vision_revision,
        config.vision_features,
        config.vision_layer,
        config.feature_pooling,
        config.picture_fit,
        config.base_cache,
    )


def find_encoder(id_or_folder: str, revision: str | None) -> Path:
    """The local folder of an encoder: the one given, or a snapshot of the hub, in which the weights
    are safetensors if the hub has them so."""
    folder = hub.find_folder(id_or_folder, revision, WHAT, FILES, DOWNLOADED)
    if Path(id_or_folder).is_dir() or any(folder.glob("*.safetensors")):
        return folder
    return hub.find_folder(id_or_folder, revision, WHAT, FILES, [*DOWNLOADED, PICKLED])


def read_encoder_config(folder: Path) -> EncoderConfig:
    """Raises `PhiSightError` for a config.json of any other content."""
    try:
        return encoder_of(read_json(folder / "config.json"))
    except PhiSightError as error:
        raise PhiSightError(f"{folder}: not the folder of an encoder ({error}); {LAYOUT}") from None


def read_clip_config(folder: Path) -> ClipConfig:
    """The same, for what reads a CLIP alone. Raises `PhiSightError` for another encoder too."""
    config = read_encoder_config(folder)
    if not isinstance(config, ClipConfig):
        raise PhiSightError(
            f"{folder}: holds a {config.NAME}, and a CLIP is needed here; use a run that was"
            " trained with a CLIP"
        )
    return config


class VisionTower:
    """An encoder and the preparation of its pictures, frozen, in float32."""

    def __init__(self, spec: VisionSpec, device: torch.device | str = "cpu") -> None:
        self.prepare = spec.preparation
        self.model = load_encoder(spec).to(device)
        self.spec, self.device = spec, torch.device(device)
        # What pooling has cost: summed squares of the error and of the patches, the worst patch.
        self._pooled = [0.0, 0.0, 0.0]

    @property
    def fit(self) -> Fit:
        """How a picture is brought to the size that this tower reads."""
        return self.prepare.fit

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image | Fitted]) -> Tensor:
        """RGB pictures of any size, or fitted ones -> (pictures, tokens, dim) float32."""
        pixels = self.prepare(pictures).to(self.device)
        if self.spec.features == "pooled":
            return self.model.pooled(pixels)[:, None, :]
        states = self.model.hidden_state(pixels, self.spec.layer)
        patches = states[:, self.spec.config.in_front :]  # (pictures, patches, dim)
        if self.spec.pooling == 1:
            return patches
        tokens, blocks = pool_patches(patches, self.spec.pooling)
        errors = (blocks - tokens[:, :, None]).square().sum(-1)  # (pictures, tokens, block)
        sizes = blocks.square().sum(-1)
        self._pooled[0] += errors.sum().item()
        self._pooled[1] += sizes.sum().item()
        self._pooled[2] = max(self._pooled[2], (errors / sizes.clamp_min(1e-30)).max().item())
        return tokens

    def tally(self) -> list[float]:
        """What `notes` is told of: plain numbers, so that processes can exchange them."""
        return list(self._pooled)

    def notes(self, tallies: Sequence[Sequence[float]] = ()) -> str:
        """How far the patches lie from the tokens that stand for them, or nothing.

        tallies: of the towers of all processes that shared a job; without, of this one.
        """
        counted = [tally for tally in tallies or [self.tally()] if tally]
        errors, sizes = (sum(tally[i] for tally in counted) for i in (0, 1))
        if not sizes:
            return ""
        worst = max(tally[2] for tally in counted)
        pooling = self.spec.pooling
        return (
            f"{pooling} x {pooling} patches a token: relative RMS error"
            f" {100 * (errors / sizes) ** 0.5:.3g} %, worst patch {100 * worst**0.5:.3g} %"
        )


def pool_patches(patches: Tensor, pooling: int) -> tuple[Tensor, Tensor]:
    """(pictures, side * side, dim), row by row -> the mean of each block of `pooling` by `pooling`
    patches, (pictures, tokens, dim), and the blocks, (pictures, tokens, pooling * pooling, dim)."""
    blocks = blocks_of(patches, pooling)
    return blocks.mean(2), blocks


def load_encoder(spec: VisionSpec) -> PictureEncoder:
    """The encoder, frozen, in float32 on the CPU. Raises `PhiSightError`."""
    with torch.device("meta"):  # to draw weights takes longer than to read them
        model = spec.config.build()
    load_vision_weights(model, spec.config, find_weight_files(spec.folder, PICKLED))
    return model.requires_grad_(False).eval()


def load_clip(spec: VisionSpec) -> ClipVision:
    """The same, for what reads a CLIP alone. Raises `PhiSightError` for another encoder too."""
    read_clip_config(spec.folder)
    model = load_encoder(spec)
    assert isinstance(model, ClipVision)
    return model


def load_vision_weights(
    model: PictureEncoder, config: EncoderConfig, files: Sequence[Path]
) -> None:
    """The encoder's weights, strict: a text half, or a classifier, in the same files is not read.

    A file that holds such a part as well puts a prefix before the encoder's own names.
    """
    state: dict[str, Tensor] = {}
    for name, read in vision_tensors(config, files):
        if own := config.own_name(name):
            if own in state:
                raise PhiSightError(
                    f"{files[0]}: {name} is there twice, in one file or in two; fetch the folder"
                    " again"
                )
            state[own] = read().float()
            if not is_finite(state[own]):
                raise PhiSightError(
                    f"{files[0]}: {name} holds values that are not finite; fetch the folder again"
                )
    if problems := mismatches(model.state_dict(), state):
        told, more = ", ".join(problems[:3]), len(problems) - 3
        told += f" and {more} more" if more > 0 else ""
        raise PhiSightError(
            f"{files[0]}: not this {config.NAME}'s weights ({told}); fetch the folder again"
        )
    model.load_state_dict(state, strict=True, assign=True)


def vision_tensors(
    config: EncoderConfig, files: Sequence[Path]
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """The tensors of the encoder in its files, by transformers' names without their prefix, each
    with what reads it. Other parts of the same model are left out. Raises `PhiSightError`."""
    with contextlib.ExitStack() as stack:
        tables = [stack.enter_context(opened(file)) for file in files]
        prefix = next(
            (p for p in config.PREFIXES for t in tables for n in t.places if n.startswith(p)), ""
        )
        for tensors in tables:
            for name in tensors.places:
                if name.startswith(prefix):
                    yield name.removeprefix(prefix), partial(tensors.read, name)


@contextlib.contextmanager
def opened(file: Path) -> Iterator[stored.StoredTensors | PickledWeights]:
    """A file of weights, either form, for reading tensors by name. Raises `PhiSightError`."""
    try:
        if file.name == PICKLED:
            yield PickledWeights(file)
        else:
            with stored.opened(file) as tensors:
                yield tensors
    except (stored.NotStored, OSError) as error:
        raise PhiSightError(f"{file}: not readable ({error}); fetch it again") from None


class PickledWeights:
    """`pytorch_model.bin` with the look of `StoredTensors`.

    It is a pickle, read by torch's restricted unpickler: that knows tensors and plain containers,
    refuses all else, and runs nothing that the file names. Tensors stay in the file until asked.
    """

    def __init__(self, file: Path) -> None:
        try:
            content = load_torch_file(file, LARGEST_WEIGHTS)
        except NotRead as error:
            raise OSError(f"it is damaged, or holds more than tensors: {error}") from None
        if not isinstance(content, dict) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
        ):
            raise OSError("it holds something else than tensors by name")
        self._content = content

    @property
    def places(self) -> Mapping[str, object]:
        return self._content

    def read(self, name: str) -> Tensor:
        # A copy, as a parameter must not change with the file.
        return self._content[name].clone()


# -- the command ----------------------------------------------------------------------------------


def pictures_per_second(tower: VisionTower, seconds: float, batch_size: int = 8) -> float:
    """Measured on blank pictures of 640 x 480, preprocessing included; decoding is not."""
    picture = Image.new("RGB", (640, 480), (127, 127, 127))
    tower([picture])  # the first call also sets up
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        tower([picture] * batch_size)
        count += batch_size
    return count / elapsed


def main(arguments: list[str] | None = None) -> int:
    """Print what a tower makes of a picture, and how fast it is on this machine."""
    fields = Config.__dataclass_fields__
    parser = Parser(prog="model.vision", description=__doc__.splitlines()[0])
    parser.add_argument("--vision", required=True, help=fields["vision"].metadata["help"])
    for name, kind in (
        ("vision_revision", str),
        ("vision_features", str),
        ("vision_layer", int),
        ("feature_pooling", int),
        ("picture_fit", str),
    ):
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=fields[name].default,
            help=fields[name].metadata["help"],
            choices=fields[name].metadata["choices"],
        )
    parser.add_argument("--seconds", type=float, default=2.0, help="measure for so long")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args(arguments)
    if options.feature_pooling < 1:
        raise PhiSightError("--feature-pooling: must be at least 1")
    if not 0 < options.seconds < 3600:
        raise PhiSightError("--seconds: must be over 0 and under 3600")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec = read_vision_spec(
        options.vision,
        options.vision_revision,
        options.vision_features,
        options.vision_layer,
        options.feature_pooling,
        options.picture_fit,
    )
    rate = pictures_per_second(VisionTower(spec, device), options.seconds)
    tokens, dim = spec.shape
    if options.json:
        print(
            json.dumps(
                {"tokens": tokens, "dim": dim, "pictures_per_second": rate, "device": device}
            )
        )
    else:
        print(
            f"{spec.config.NAME} {options.vision}: {tokens} tokens of {dim} numbers a picture;"
            f" {rate:.3g} pictures a second on {device}"
        )
    return 0


if __name__ == "__main__":
    run_main(main)
