"""A run in one file, for a colleague who goes on with it, to the bit on the same kind of machine.

    checkpoint-000955/ ...           every checkpoint that the run kept
    metrics.jsonl                    the log, up to the newest of them
    README.md  curves.png  quarantine.jsonl
    packed/base/  packed/vision/     the base and the encoder, if they are to go along
    packed/conversations.json  packed/images/       and the data
    examples/                        goes along with it: pictures and questions to begin with

Unpacked, the folder is the run. What lies under `packed/` is taken in place of what the checkpoint
names, which lay on another machine (`packed_parts`); their fingerprints are compared as ever. What
is not packed is found as the config says, or by the flags that `unpack` names.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import config as configs
import config_values
import hub
from archive import CHANGED, Member, extract, write_archive
from checkpoint_state import CHECKPOINT, Checkpoint, need_run
from config import Config
from data.sources import Source
from errors import PhiSightError, printable
from fields import as_texts, split_weight
from files import former_name, hash_files, new_folder
from manifest import MANIFEST, files_below
from paths import EXAMPLES, command, typed
from reports.card import CARD, hub_id, license_id, model_card
from reports.log import METRICS

PACKED = "packed"
DATA = f"{PACKED}/conversations.json"  # of either form: it is told by what is in it
FOLDERS = {"base": f"{PACKED}/base", "vision": f"{PACKED}/vision", "images": f"{PACKED}/images"}
BESIDE = ("curves.png", "quarantine.jsonl")  # what a run has beside checkpoints and log
# What is read of a model's folder beside its weights, and says what may be done with it.
OF_A_MODEL = re.compile(
    r"(config|generation_config|preprocessor_config|tokenizer|tokenizer_config|added_tokens"
    r"|special_tokens_map|model\.safetensors\.index)\.json|tokenizer\.model|chat_template\.jinja"
    r"|README\.md|LICENSE(\.md|\.txt)?"
)
_WEIGHTS = re.compile(r"[A-Za-z0-9][\w.-]*\.safetensors", re.ASCII)
_OF_A_RUN = re.compile(
    rf"{CHECKPOINT}/(tokenizer/)?[A-Za-z0-9][\w.-]*|{re.escape(METRICS)}|{CARD}"
    rf"|{'|'.join(map(re.escape, BESIDE))}"
    rf"|{EXAMPLES}/[^/]+\.(png|jpe?g|webp|gif|bmp|avif|txt)"
    rf"|{re.escape(DATA)}|{FOLDERS['images']}/.+",
    re.ASCII | re.DOTALL,
)
PARTS = {
    "base": "the base's weights and tokenizer",
    "vision": "the picture encoder's weights",
    "data": "the conversations and their pictures",
}


# -- packing --------------------------------------------------------------------------------------


def pack(
    newest: Checkpoint,
    folders: Sequence[Path],
    records: Sequence[dict[str, Any]],
    out: Path,
    parts: Sequence[str] = (),
    license: str = "",
) -> str:
    """Write a run to the archive `out`, whole or not at all. Returns a line about it.

    Args:
        newest: its newest checkpoint, verified; of `folders` those before it go along too.
        records: the log up to the newest.
        parts: names of `PARTS` that go along.
        license: for the card, see `reports.card.model_card`.

    Raises:
        PhiSightError: `out` is there already or cannot be written, or a part is gone, or is not the
            one that the run was trained with.
    """
    need_run(newest)
    run = newest.path.parent
    config = config_values.from_dict(newest.config["config"], str(newest.path))
    config = configs.replace(config, **packed_parts(run))
    card = model_card(newest, records, license=license)
    members = [Member(CARD, card.encode())]
    if records:
        size = newest.trainer_state["metrics_offset"]
        members.append(Member(METRICS, run / METRICS, size))
    members += [Member(name, run / name) for name in BESIDE if (run / name).is_file()]
    # A training may have saved a newer one since, which nobody has verified.
    known = folders[: folders.index(newest.path)] if newest.path in folders else []
    for folder in (*known, newest.path):
        name = former_name(folder) or folder.name
        held = files_below(folder)
        if MANIFEST not in held:
            raise PhiSightError(f"{folder}: {CHANGED}")
        members += [Member(f"{name}/{file}", folder / file) for file in held]
    made = {"base": _base, "vision": _vision, "data": _data}
    for part in parts:
        members += made[part](config, newest)
    size = write_archive(out, members)
    more = f", with {', '.join(PARTS[part] for part in parts)}" if parts else ""
    return (
        f"{out}: step {newest.step} of {run}{more}; {len(members):,} files, {size:,} bytes."
        f" Unpack it with: {command('checkpoints.py')} unpack {typed(str(out))} FOLDER"
    )


def _base(config: Config, saved: Checkpoint) -> Iterator[Member]:
    from model import base as base_model  # seconds, and of no use where no base goes along

    folder = base_model.find_folder(config.base, config.base_revision or None)
    weights = base_model.find_weight_files(folder)
    found = hash_files([folder / "config.json", *weights], config.base_cache)
    if found != saved.config["base_fingerprint"]:
        raise _other("base", config.base)
    return _model_members("base", folder, weights)


def _vision(config: Config, saved: Checkpoint) -> Iterator[Member]:
    from model.base import find_weight_files
    from model.vision import PICKLED, vision_of

    spec = vision_of(config)
    if spec.key != saved.config["vision_fingerprint"]:
        raise _other("vision", config.vision)
    weights = find_weight_files(spec.folder, PICKLED)
    if any(path.suffix != ".safetensors" for path in weights):
        raise PhiSightError(
            f"--with-vision: {weights[0]} is a pickle file, which no archive takes along; the"
            " colleague downloads this picture encoder himself"
        )
    return _model_members("vision", spec.folder, weights)


def _other(part: str, where: str) -> PhiSightError:
    return PhiSightError(
        f"--with-{part}: {where} is not the one that the run was trained with; put it back, or"
        f" leave --with-{part} out"
    )


def _model_members(part: str, folder: Path, weights: Sequence[Path]) -> Iterator[Member]:
    beside = (path for path in folder.iterdir() if OF_A_MODEL.fullmatch(path.name))
    for path in (*weights, *(path for path in beside if path.is_file())):
        yield Member(f"{FOLDERS[part]}/{path.name}", path)


def _data(config: Config, saved: Checkpoint) -> Iterator[Member]:
    """The conversations, and those of their pictures that are there: the others were missing in
    the training too."""
    from data.containers import captions
    from data.pictures import UNPACKED, PictureFolders
    from data.sources import sources_of

    if "data_fingerprint" not in saved.config:
        raise PhiSightError("--with-data: the run names no data; leave it out")
    remedy = "put the data back, or leave --with-data out"
    found = sources_of(config, remedy)
    if len(found) > 1 or not found[0].path.is_file() or captions.is_one(found[0].path):
        raise PhiSightError(
            "--with-data: several sources, folders and CSV are not packed; take them along beside"
            " the archive, and give --data and --images there"
        )
    if hub.is_reference(config.data[0]):
        raise PhiSightError("--with-data: the data are fetched from the hub there; leave it out")
    (source,) = found
    if source.weight != 1:
        raise PhiSightError(
            f"--with-data: how often {source.path} is taken is not packed; take it along beside the"
            " archive, and give --data and --images there"
        )
    names = _picture_names(source)
    yield Member(DATA, source.path)
    examples = saved.path.parent / EXAMPLES
    for path in sorted(examples.iterdir()) if examples.is_dir() else ():
        if path.is_file() and _OF_A_RUN.fullmatch(f"{EXAMPLES}/{path.name}"):
            yield Member(f"{EXAMPLES}/{path.name}", path)
    folders = PictureFolders.of(config)
    for name in sorted(names):  # none of them leaves its folder: see `data.pictures`
        if not name.startswith(UNPACKED) and folders.path_of(name).is_file():
            yield Member(f"{FOLDERS['images']}/{name}", folders.path_of(name))


def _picture_names(source: Source) -> set[str]:
    """The pictures of the conversations, which must be named so that they are found elsewhere."""
    from data.dataset import Conversation, conversation_or_fault

    names: set[str] = set()
    elsewhere = replace(source.pictures, folder=None)
    for where, record in source.records():
        read = conversation_or_fault(record, source.pictures)
        if isinstance(read, Conversation):
            if conversation_or_fault(record, elsewhere) != read:
                raise PhiSightError(
                    f"--with-data: {where} names a picture by an absolute path, which is another"
                    " one there; name it relative to the image folder, or leave --with-data out"
                )
            names.update(read.images)
    return names


# -- unpacking ------------------------------------------------------------------------------------


def unpack(archive: Path, folder: Path, verified: Callable[[Path], Checkpoint]) -> str:
    """Unpack a run into a new folder, which gets its name when all of it is verified: the archive
    by its own hashes, the run by `verified`. Returns what to type next.

    Args:
        verified: checks a run's folder and returns its newest checkpoint; raises `PhiSightError`.

    Raises:
        PhiSightError: the archive is another one or damaged, does not fit on the disk, or holds no
            run that is intact, or `folder` is there already. Nothing is left then.
    """
    with new_folder(folder) as temporary:
        try:
            extract(archive, temporary, _problem_of)
        except OSError as error:
            if error.filename != str(archive):
                raise
            raise PhiSightError(f"{archive}: {error.strerror}; name an archive") from error
        try:
            newest = verified(temporary)
            need_run(newest)
            config = config_values.from_dict(newest.config["config"], str(newest.path))
        except PhiSightError as error:
            reason = str(error).replace(str(temporary), "in it")
            raise PhiSightError(f"{archive}: {reason}; nothing was unpacked") from error
    return _what_next(folder, newest, config)


def _problem_of(name: str) -> str:
    """What is wrong with the name of a file in an archive: a run has files of these names alone,
    and a model none that could be code."""
    for part in ("base", "vision"):
        place, _, file = name.rpartition("/")
        if place == FOLDERS[part] and (OF_A_MODEL.fullmatch(file) or _WEIGHTS.fullmatch(file)):
            return ""
    return "" if _OF_A_RUN.fullmatch(name) else "is of no file of a run"


def packed_parts(run: str | Path) -> dict[str, str]:
    """Where base, encoder, data and pictures lie that were unpacked with a run, by config field."""
    run = Path(run)
    places = {field: run / folder for field, folder in FOLDERS.items()}
    found = {field: str(place) for field, place in places.items() if place.is_dir()}
    return found | ({"data": str(run / DATA)} if (run / DATA).is_file() else {})


def _what_next(folder: Path, newest: Checkpoint, config: Config) -> str:
    there = packed_parts(folder)
    missing = [
        field
        for field in ("base", "vision", "data", "images")
        if field not in there
        and any(
            not (hub_id(place) or hub.is_reference(place) or Path(place).exists())
            for value in as_texts(getattr(config, field))
            for place in [split_weight(value)[0] if field == "data" else value]
        )
    ]
    run = f" --run {typed(str(folder))}"
    of_model = "".join(f" --{field} ..." for field in missing if field in ("base", "vision"))
    lines = [
        f"{folder}: step {newest.step}, verified",
        f"ask it with: {command('infer.py')}{run}{of_model}",
    ]
    if newest.state["optimizer"]:
        flags = "".join(f" --{field} ..." for field in missing)
        lines.append(f"go on with it: {command('train.py')} --resume{run}{flags}")
    if missing:
        told = ", ".join(f"--{f} ({printable(_names(config, f), 60)})" for f in missing)
        lines.append(
            f"not in the archive and not found here: {told}; say where they lie, others than those"
            " of the training are refused"
        )
    return "\n".join(lines)


def _names(config: Config, field: str) -> str:
    return " ".join(Path(value).name for value in as_texts(getattr(config, field)))


# -- the command ----------------------------------------------------------------------------------


def add_commands(commands: argparse._SubParsersAction) -> None:
    """`pack` and `unpack`, among the commands of checkpoints.py."""
    packer = commands.add_parser("pack", help="a run in one file, for a colleague to go on with")
    packer.add_argument("run", type=Path, help="a run folder")
    packer.add_argument("out", type=Path, help="the archive to write, such as run.tar")
    for part, words in PARTS.items():
        packer.add_argument(f"--with-{part}", action="store_true", help=f"{words} too")
    packer.add_argument(
        "--license", type=license_id, metavar="ID", help="what the card says, as mit"
    )
    unpacker = commands.add_parser("unpack", help="the run of an archive into a new folder")
    unpacker.add_argument("archive", type=Path, help="what pack wrote")
    unpacker.add_argument("folder", type=Path, help="the folder to make, which is the run then")


def chosen_parts(options: argparse.Namespace) -> list[str]:
    return [part for part in PARTS if getattr(options, f"with_{part}")]
