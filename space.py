"""The web app as a Space of the Hugging Face hub runs it: its settings, its storage, its flags.

`export.py --space` writes a folder of this project's code, a trained run and `space.json`. Where
that file lies beside app.py, app.py takes its flags from here. Nothing but a Space's own storage is
written to: caches go to one folder below it, which is chosen before torch and Gradio are loaded.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from documents import FLAG, TEXT, json_bytes, read_json, require
from errors import PhiSightError
from system import disk

FILE = "space.json"
MOST_BYTES = 64 * 2**10  # of that file
HUB = "https://huggingface.co"  # whose page of a Space shows it in a frame
FOLDER = "PHISIGHT_STORAGE"  # names the folder that everything is kept in
STORED = "storage"  # the folder below the Space's own, where nothing else is said
FRAMES = "PHISIGHT_FRAMES"  # names more sites that may show the page in a frame
PERSISTENT = Path("/data")  # where a Space has its persistent storage, if it has any
_FIELDS = {
    "run": TEXT,
    "base": TEXT,
    "base_revision": TEXT,
    "vision": TEXT,
    "vision_revision": TEXT,
    "speech": TEXT,
    "keeps_base": FLAG,
    "examples": TEXT,
}


@dataclass(frozen=True)
class Space:
    """What a Space shows. Folders are relative to the one that `space.json` lies in."""

    run: str
    """a folder, or `hf:owner/name@revision` for a run of the hub"""
    base: str
    """a folder or a hub id; so is `vision`"""
    vision: str
    base_revision: str = ""
    """of the hub; empty for folders"""
    vision_revision: str = ""
    speech: str = ""
    """the Whisper that listens, a file or OpenAI's name; empty for none"""
    keeps_base: bool = False
    """whether the quantised base is kept for the next start"""
    examples: str = "examples"
    """the folder of the questions to begin with; empty for none"""

    def write(self, folder: Path) -> None:
        (folder / FILE).write_bytes(json_bytes(FILE, dataclasses.asdict(self)))


def found_in(folder: Path) -> Space | None:
    """The Space whose `space.json` lies in a folder; None where there is none. Raises
    `PhiSightError` for one that cannot be used."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        values = read_json(path, MOST_BYTES)
        require(values, _FIELDS)
    except OSError as error:
        raise PhiSightError(f"{path}: {error.strerror or error}; export the Space again") from None
    except PhiSightError as error:
        raise PhiSightError(f"{path}: {error}; export the Space again") from None
    return Space(**{name: values[name] for name in _FIELDS})


@dataclass(frozen=True)
class Storage:
    """Where a Space writes."""

    kept: Path
    """what makes the next start faster: models of the hub, the quantised base, compiled code"""
    passing: Path
    """what visitors leave: uploads, conversations; a Space forgets it when it restarts"""

    @classmethod
    def of(cls, folder: Path, environ: Mapping[str, str]) -> Storage:
        """Of a Space in `folder`: where PHISIGHT_STORAGE says, else below the folder itself, else a
        private temporary folder; in a Space with persistent storage, that keeps what can be kept.

        Raises `PhiSightError` where nothing can be written.
        """
        named = environ.get(FOLDER)
        own = _writable(Path(named)) if named else _own(folder)
        persistent = not named and "SPACE_ID" in environ and PERSISTENT.is_dir()
        if persistent and os.access(PERSISTENT, os.W_OK):
            return cls(_writable(PERSISTENT / "phisight"), own)
        return cls(own, own)

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """The variables that have libraries write below this storage; what is set already stays.

        A Space's machine may have more processors than the Space may use; how many these are can be
        said as containers are limited ("7500m"), which OpenMP does not read.
        """
        cache = self.kept / "cache"
        wanted = {
            "HF_HOME": self.kept / "huggingface",
            "XDG_CACHE_HOME": cache,
            "NUMBA_CACHE_DIR": cache / "numba",
            "TRITON_CACHE_DIR": cache / "triton",
            "TORCHINDUCTOR_CACHE_DIR": cache / "inductor",
            "CUDA_CACHE_PATH": cache / "cuda",
            "TMPDIR": self.passing / "tmp",
            "GRADIO_TEMP_DIR": self.passing / "tmp",
        }
        chosen = {name: str(path) for name, path in wanted.items() if not environ.get(name)}
        threads = environ.get("OMP_NUM_THREADS") or environ.get("CPU_CORES", "")
        if threads.isdigit():
            chosen["OMP_NUM_THREADS"] = threads
        elif milli := re.fullmatch(r"([0-9]{1,9})m", threads):
            chosen["OMP_NUM_THREADS"] = str(max(1, int(milli[1]) // 1000))
        return chosen


def _own(folder: Path) -> Path:
    """The storage below the folder of a Space, or where that is read-only a temporary folder, the
    same at each start."""
    if os.access(folder, os.W_OK):
        return _writable(folder / STORED)
    name = re.sub(r"\W+", "-", str(folder)).strip("-")
    return _writable(Path(tempfile.gettempdir()) / f"phisight-{disk.user()}-{name[-80:]}")


def _writable(path: Path) -> Path:
    """A folder that is made, or there already and ours alone, as compiled code lies in it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.is_symlink() or not disk.is_own(path.stat()):
            raise PhiSightError(
                f"{path}: belongs to somebody else; name another folder in {FOLDER}"
            )
        (path / ".writable").write_bytes(b"")
    except OSError as error:
        reason = error.strerror or error
        raise PhiSightError(f"{path}: {reason}; name a folder to write in {FOLDER}") from None
    return path.absolute()


def flags(space: Space, folder: Path, storage: Storage, environ: Mapping[str, str]) -> list[str]:
    """What to type after app.py for a Space that lies in `folder`.

    In a Space (SPACE_ID is set) everybody may ask who reaches it through the hub's proxy, under the
    Space's own names (SPACE_HOST), and the hub's page may show it in a frame. Elsewhere the page is
    for this machine alone. Raises `PhiSightError` where a Space has no name.
    """
    in_space = "SPACE_ID" in environ
    hosts = [name.strip() for name in environ.get("SPACE_HOST", "").split(",") if name.strip()]
    if in_space and not hosts:
        raise PhiSightError("SPACE_HOST: is not set; set it to the Space's name, as in x.hf.space")
    usual_host = "0.0.0.0" if in_space else "127.0.0.1"

    def located(name: str) -> str:
        return str(folder / name) if (folder / name).exists() else name  # else a hub's name

    frames = [HUB, *environ.get(FRAMES, "").split()]
    return [
        f"--run={located(space.run)}",
        f"--base={located(space.base)}",
        f"--base-revision={space.base_revision}",
        f"--vision={located(space.vision)}",
        f"--vision-revision={space.vision_revision}",
        f"--base-cache={storage.kept / 'bases' if space.keeps_base else ''}",
        f"--speech={located(space.speech) if space.speech else ''}",
        "--threads=0",  # as many as `Storage.environment` says, not as on the machine that trained
        *([f"--examples={folder / space.examples}"] if space.examples else ()),
        f"--conversations={storage.passing / 'conversations'}",
        "--public",
        f"--host={environ.get('GRADIO_SERVER_NAME') or usual_host}",
        f"--port={environ.get('GRADIO_SERVER_PORT') or 7860}",
        *(["--without-key"] if in_space else ()),
        *(f"--allow-host={host}" for host in hosts),
        *(f"--allow-frame={site}" for site in frames),
    ]


def begin(folder: Path) -> list[str]:
    """Prepare the storage of a Space in `folder`, set the environment of this process, and return
    the flags of app.py; none, and nothing is done, where there is no Space.

    Has to be called before torch and huggingface_hub are loaded. Raises `PhiSightError`.
    """
    space = found_in(folder)
    if space is None:
        return []
    storage = Storage.of(folder, os.environ)
    chosen = flags(space, folder, storage, os.environ)
    os.environ.update(storage.environment(os.environ))
    tempfile.tempdir = None  # which may have been looked up already
    for name in ("TMPDIR", "GRADIO_TEMP_DIR", "XDG_CACHE_HOME", "HF_HOME"):
        try:
            Path(os.environ[name]).mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise PhiSightError(
                f"{name}: {os.environ[name]}: {error.strerror or error}; unset it, or name a folder"
                " to write in"
            ) from None
    preloaded = Path(os.path.expanduser("~/.cache/huggingface/hub"))
    own = Path(os.environ["HF_HOME"]) / "hub"
    try:
        link_preloaded(preloaded, own)
    except OSError as error:
        raise PhiSightError(
            f"{own}: {error.strerror or error}; make room, or name a folder to write in HF_HOME"
        ) from None
    return chosen


def link_preloaded(preloaded: Path, own: Path) -> None:
    """Have the hub's cache in `own` show what the hub has put into another one when it built the
    Space (`preload_from_hub`), which is only read."""
    if preloaded.absolute() == own.absolute():
        return
    for path in preloaded.glob("models--*/**/*"):
        ours = own / path.relative_to(preloaded)
        if not path.is_file() or ours.exists():
            continue
        ours.parent.mkdir(parents=True, exist_ok=True)
        ours.unlink(missing_ok=True)  # a link of a former Space, to what was elsewhere
        if path.relative_to(preloaded).parts[1] == "refs":
            shutil.copyfile(path, ours)  # which newer ones may replace
        else:
            ours.symlink_to(path.resolve())
