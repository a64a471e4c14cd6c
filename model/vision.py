"""The eyes: a frozen CLIP vision tower, pictures -> (pictures, tokens, dim).

python -m model.vision --vision assets/tiny/clip        # its sizes, and its speed here
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from model.clip import ClipConfig, ClipVision, Preparation
from torch_files import NotRead, load_torch_file
from workers.fitting import Fit, Fitted

FILES = "config.json, preprocessor_config.json and model.safetensors (or pytorch_model.bin)"
LAYOUT = f"it needs {FILES}"
# OpenAI's own CLIPs were published in this form, and some are still there in no other.
PICKLED = "pytorch_model.bin"
LARGEST_WEIGHTS = 64 << 30  # bytes of a file of that name


@dataclass(frozen=True)
class VisionSpec:
    """Which CLIP, and how it is read: all that is needed to name features without computing any."""

    folder: Path
    features: str
    """"patches": hidden layer `layer` without the class token (LLaVA takes -2, arXiv 2304.08485);
    "pooled": the pooled class token as one vector"""
    layer: int
    pooling: int
    """this many by this many patches are averaged into one token; 1 for none"""
    shape: tuple[int, int]
    """(tokens, dim) of one picture"""
    key: str
    """names the weights, the preprocessing and the way of reading: features of one key are equal"""
    preparation: Preparation
    """what is done to a picture before the CLIP sees it"""


def read_vision_spec(
    id_or_folder: str,
    revision: str = "",
    features: str = "patches",
    layer: int = -2,
    pooling: int = 1,
    picture_fit: str = "crop",
    cache: str | Path = "",
) -> VisionSpec:
    """Find the CLIP, check its config and fingerprint its files, without loading the weights.

    `picture_fit`: see `Config`. `cache`: a folder in which to remember the fingerprint, see
    `hash_files`. Raises PhiSightError for a folder that is no CLIP's, a layer that it does not
    have, and a `pooling` into which its grid of patches cannot be cut.
    """
    folder = find_clip(id_or_folder, revision or None)
    files = [folder / "config.json", folder / "preprocessor_config.json"]
    for file in files:
        if not file.is_file():
            raise PhiSightError(f"{file}: no such file; {LAYOUT}")
    config = read_clip_config(folder)
    side = config.image_size // config.patch_size  # of the grid of patches
    layers = config.num_hidden_layers
    if not -layers - 1 <= layer <= layers:
        raise PhiSightError(f"--vision-layer {layer}: this CLIP has {layers} layers; use -2")
    side = side if features == "patches" else 1
    if side % pooling:
        fitting = ", ".join(str(n) for n in range(1, side + 1) if side % n == 0)
        grid = f"this CLIP's {side} x {side} patches" if side > 1 else "the one pooled vector"
        raise PhiSightError(
            f"--feature-pooling {pooling}: does not divide {grid}; use one of {fitting}"
        )
    shape = ((side // pooling) ** 2, config.hidden_size)
    digest = hash_files([*files, *find_weight_files(folder, PICKLED)], cache)
    said = f"{digest}/{features}/{layer}"
    # What is not pooled and not padded keeps the key that it had before there was a choice.
    said += f"/{pooling}" if pooling > 1 else ""
    said += "/pad" if picture_fit == "pad" else ""
    key = hashlib.sha256(said.encode()).hexdigest()[:16]
    preparation = read_preparation(folder)
    if picture_fit == "pad":
        preparation = preparation.padded()
    return VisionSpec(folder, features, layer, pooling, shape, key, preparation)


def vision_of(config: Config) -> VisionSpec:
    """The CLIP of a run, and how it is read. Raises as `read_vision_spec` does."""
    return read_vision_spec(
        config.vision,
        config.vision_revision,
        config.vision_features,
        config.vision_layer,
        config.feature_pooling,
        config.picture_fit,
        config.base_cache,
    )


def find_clip(id_or_folder: str, revision: str | None) -> Path:
    """The local folder of a CLIP: the one given, or a snapshot of the hub, in which the weights are
    safetensors if the hub has them so."""
    folder = hub.find_folder(id_or_folder, revision, "CLIP", FILES, DOWNLOADED)
    if Path(id_or_folder).is_dir() or any(folder.glob("*.safetensors")):
        return folder
    return hub.find_folder(id_or_folder, revision, "CLIP", FILES, [*DOWNLOADED, PICKLED])


def read_clip_config(folder: Path) -> ClipConfig:
    """Raises `PhiSightError` for a config.json of any other content."""
    try:
        return ClipConfig.from_dict(read_json(folder / "config.json"))
    except PhiSightError as error:
        raise PhiSightError(f"{folder}: not a CLIP folder ({error}); {LAYOUT}") from None


def read_preparation(folder: Path) -> Preparation:
    """Raises `PhiSightError` for a preprocessor_config.json of any other content."""
    try:
        return Preparation.from_dict(read_json(folder / "preprocessor_config.json"))
    except PhiSightError as error:
        raise PhiSightError(f"{folder}: {error}; {LAYOUT}") from None


class VisionTower:
    """CLIP's vision transformer and the preparation of its pictures, frozen, in float32."""

    def __init__(self, spec: VisionSpec, device: torch.device | str = "cpu") -> None:
        self.prepare = spec.preparation
        config = read_clip_config(spec.folder)
        sides, made = (config.image_size, config.image_size), self.fit.crop or self.fit.size
        if made != sides:
            raise PhiSightError(
                f"{spec.folder}: preprocessor_config.json makes pictures of {made}, config.json"
                f" takes {sides}; fetch both again"
            )
        self.model = load_clip(spec).to(device)
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
        patches = self.model.hidden_state(pixels, self.spec.layer)[
            :, 1:
        ]  # (pictures, patches, dim)
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
    pictures, count, dim = patches.shape
    across = math.isqrt(count) // pooling
    grid = patches.reshape(pictures, across, pooling, across, pooling, dim).transpose(2, 3)
    blocks = grid.reshape(pictures, across * across, pooling * pooling, dim)
    return blocks.mean(2), blocks


def load_clip(spec: VisionSpec) -> ClipVision:
    """The vision half of a CLIP, frozen, in float32 on the CPU. Raises `PhiSightError`."""
    with torch.device("meta"):  # to draw weights takes longer than to read them
        model = ClipVision(read_clip_config(spec.folder))
    load_vision_weights(model, find_weight_files(spec.folder, PICKLED))
    return model.requires_grad_(False).eval()


def load_vision_weights(model: ClipVision, files: Sequence[Path]) -> None:
    """The vision half of a CLIP checkpoint, strict: the text half is not read.

    A file calls these tensors `vision_model.…`, and the module leaves that prefix out.
    """
    prefix = "vision_model."
    state: dict[str, Tensor] = {}
    for file in files:
        with opened(file) as tensors:
            for name in tensors.places:
                if name.startswith(prefix) and not name.endswith(".position_ids"):
                    state[name.removeprefix(prefix)] = tensors.read(name).float()
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise PhiSightError(
            f"{files[0]}: not this CLIP's weights ({reason}); fetch the folder again"
        ) from None


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
    parser.add_argument("--vision", required=True, help="CLIP: hub id or local folder")
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
            f"{options.vision}: {tokens} tokens of {dim} numbers a picture;"
            f" {rate:.3g} pictures a second on {device}"
        )
    return 0


if __name__ == "__main__":
    run_main(main)
