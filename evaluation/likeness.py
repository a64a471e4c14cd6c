"""How alike two pictures are to a model: their features, compared.

python -m data.features compare a.jpg b.jpg                     # by the encoder of the tiny preset
python -m data.features compare a.jpg b.jpg --run runs/mine     # by a run's, read as the run does
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

import checkpoints
import config as configs
import config_values
from checkpoint_state import need_run
from config import FIELDS, TYPES, Config, flag_of
from data.feature_form import as_stored
from data.features import blank_picture, file_hash
from data.reading import check_image_file, fit_files
from errors import PhiSightError, printable, run_main
from model.devices import choose_device
from model.vision import VisionTower, vision_of
from packing import packed_parts
from presets import DEFAULT_PRESET, PRESETS
from workers.fitting import Fitted, share_cut_off

CHOSEN = (
    "vision", "vision_revision", "vision_features", "vision_layer", "feature_pooling",
    "picture_fit", "feature_storage", "device",
)  # fmt: skip
"""the fields of a config that say what a picture becomes"""
# Of how far both are from a grey picture. By `benchmarks.likeness`, 60 pictures of the world and
# their JPEGs of quality 75 had at most 0.081, and 200 pairs of different pictures at least 0.252.
NEARLY, ALIKE = 0.1, 0.25


@dataclass(frozen=True)
class Likeness:
    """Two pictures as a model is given them."""

    tokens: int
    dim: int
    same_file: bool
    """whether their files have the same bytes"""
    same_pixels: bool
    """whether the encoder is given the same pixels"""
    same_features: bool
    cosine_of_means: float
    """of the means over all tokens"""
    cosine_mean: float
    """of the cosines of the tokens of one place"""
    cosine_min: float
    least_alike: tuple[int, int]
    """row and column, from 0, of the token of the smallest cosine: where they differ most"""
    relative_difference: float
    """root mean square of the difference, by that of the features of both"""
    of_grey: float
    """that of the difference, by how far both are from a grey picture: 0 for equal features"""

    @property
    def meaning(self) -> str:
        """What it says, as a sentence."""
        if self.same_features:
            if self.same_file:
                return "the same picture: the files have the same bytes"
            if self.same_pixels:
                same = "the encoder is given the same pixels of both"
                return f"the model cannot tell them apart: {same}"
            return "the model cannot tell them apart: their features are equal"
        share = f"{100 * self.of_grey:.3g} % as far from each other as from a grey picture"
        if self.of_grey < NEARLY:
            return f"nearly the same to the model: {share}"
        if self.of_grey < ALIKE:
            return f"alike to the model: {share}"
        return f"two different pictures to the model: {share}"


def likeness(files: Sequence[Path], pictures: Sequence[Fitted], features: Tensor) -> Likeness:
    """files, pictures: two; features: (3, tokens, dim) float32 of both and a grey one."""
    first, second, grey = features.double()
    cosines = cosine_similarity(first, second, dim=-1)  # (tokens,)
    lowest, side = int(cosines.argmin()), math.isqrt(len(cosines))

    def gap(a: Tensor, b: Tensor) -> float:
        return (a - b).square().mean().sqrt().item()

    from_grey = (gap(first, grey) + gap(second, grey)) / 2
    size = torch.stack([first, second]).square().mean().sqrt().item()
    difference = gap(first, second)
    return Likeness(
        tokens=len(first),
        dim=first.shape[1],
        same_file=len({file_hash(file) for file in files}) == 1,
        same_pixels=numpy.array_equal(pictures[0].pixels, pictures[1].pixels),
        same_features=torch.equal(first, second),
        cosine_of_means=cosine_similarity(first.mean(0), second.mean(0), dim=0).item(),
        cosine_mean=cosines.mean().item(),
        cosine_min=cosines.min().item(),
        least_alike=divmod(lowest, side),
        relative_difference=difference / size if size else 0.0,
        of_grey=difference / from_grey if from_grey else 0.0,
    )


# -- the command ----------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = configs.Parser(prog="data.features", description="The features of pictures.")
    commands = parser.add_subparsers(dest="command", required=True)
    compare = commands.add_parser("compare", help="how alike two pictures are to a model")
    compare.add_argument("pictures", nargs=2, type=Path, metavar="PICTURE")
    compare.add_argument("--run", help="as this run reads them, or hf:owner/name[@revision]")
    compare.add_argument(
        "--preset", choices=sorted(PRESETS), help=f"as this preset does ({DEFAULT_PRESET})"
    )
    for name in CHOSEN:
        about, choices = FIELDS[name].metadata["help"], FIELDS[name].metadata["choices"]
        compare.add_argument(flag_of(name), type=TYPES[name], choices=choices, help=about)
    compare.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args(arguments)
    if options.run and options.preset:
        raise PhiSightError("--run --preset: whose encoder? give one of them")
    return options


def config_of(options: argparse.Namespace) -> Config:
    """What the flags, the run or the preset say of pictures. Raises `PhiSightError`."""
    if options.run:
        checkpoint = checkpoints.resolve(options.run)
        need_run(checkpoint)
        config = config_values.from_dict(checkpoint.config["config"], checkpoint.name)
        config = configs.replace(config, device="auto", **packed_parts(checkpoint.path.parent))
    else:
        config = configs.default_config(options.preset or DEFAULT_PRESET)
    given = {name: getattr(options, name) for name in CHOSEN}
    return configs.replace(config, **{n: value for n, value in given.items() if value is not None})


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, however alike they are; 2 on errors."""
    options = parse(arguments)
    files, config = options.pictures, config_of(options)
    sizes = [check_image_file(file) for file in files]
    tower = VisionTower(vision_of(config), choose_device(config.device)[0])
    pictures: list[Fitted] = []
    for picture in fit_files(files, tower.fit):
        if isinstance(picture, PhiSightError):
            raise picture
        pictures.append(picture)
    with_grey = [*pictures, tower.fit(blank_picture())]
    found = likeness(files, pictures, as_stored(tower(with_grey), config.feature_storage).cpu())
    unseen = [share_cut_off(*size) if tower.fit.cuts else 0.0 for size in sizes]
    if options.json:
        made = {"pictures": [str(file) for file in files], "clip": str(tower.spec.folder)}
        print(json.dumps(made | asdict(found) | {"cut_off": unseen, "meaning": found.meaning}))
        return 0
    print(f"{printable(files[0])} and {printable(files[1])}: {found.meaning}")
    encoder = f"{tower.spec.config.NAME} {tower.spec.folder}"
    print(f"{encoder}: {found.tokens} tokens of {found.dim} numbers a picture")
    print(f"cosine of the mean features  {found.cosine_of_means:.6f}")
    print(f"cosine by token, mean        {found.cosine_mean:.6f}")
    row, column = found.least_alike
    where = "" if found.same_features else f", row {row}, column {column}"
    print(f"cosine by token, smallest    {found.cosine_min:.6f}{where}")
    print(f"relative RMS difference      {100 * found.relative_difference:.3g} %")
    for file, share in zip(files, unseen):
        if share:
            print(f"{printable(file)}: --picture-fit crop leaves {share:.0%} of it unseen")
    return 0


if __name__ == "__main__":
    run_main(main)
