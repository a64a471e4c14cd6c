"""Where a model lies: the folder that a person names, or a snapshot from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from errors import PhiSightError

TOKENIZER_LAYOUT = "tokenizer.json and tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def find_folder(
    id_or_folder: str | Path,
    revision: str | None,
    what: str,
    layout: str,
    wanted: Sequence[str],
) -> Path:
    """The local folder of a model: the one given, or a snapshot that is downloaded or is in the
    hub's cache. HF_HUB_OFFLINE is respected.

    `what` names the model's part in errors, `layout` the files of a folder that would do instead,
    and `wanted` are the patterns of what is downloaded. Raises `PhiSightError` if there is none.
    """
    folder = Path(id_or_folder)
    if folder.is_dir():
        return folder
    name = str(id_or_folder)
    if folder.exists() or folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise PhiSightError(f"{what} {name}: there is no such folder; give one with {layout}")
    return _snapshot(name, revision, what, layout, wanted)


def _snapshot(
    name: str, revision: str | None, what: str, layout: str, wanted: Sequence[str]
) -> Path:
    import huggingface_hub  # 0.1 s, and no use where a folder is given
    from huggingface_hub import constants, errors

    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(wanted))
        )
    # Every network, cache and naming error of the hub; most of its own are OSError or ValueError.
    except (
        OSError,
        ValueError,
        errors.HTTPError,
        errors.EntryNotFoundError,
        errors.RevisionResolutionError,
        errors.CachedRepoTreeNotFoundError,
        errors.XetDownloadError,
    ) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if constants.is_offline_mode():
            reason = "HF_HUB_OFFLINE is set, and the hub's cache on this machine lacks it"
        raise PhiSightError(
            f"{what} {name}: it is not a folder and the hub did not give it ({reason}); "
            f"download it elsewhere and give a folder with {layout}"
        ) from error
