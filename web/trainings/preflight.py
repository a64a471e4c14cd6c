"""The preflight of a data set, before anything is trained on it: `python -m data.preflight`."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

import config as configs
import config_values
import hub
import paths
from config import flag_of
from documents import read_json
from errors import PhiSightError
from fields import as_texts, split_weight
from presets import PRESETS
from web.errors import RequestError
from web.replies import Event
from web.trainings.children import TookTooLong, lines_of
from web.trainings.command import Command, Names, Text, Values, clean, expanded

SECONDS = 1800.0  # of one preflight; the pictures of a large data set take minutes
AT_ONCE = 2
PICTURES = "images"  # the folder of pictures beside the conversations
USUAL = ("train.json", "train.jsonl")  # the conversations in a folder that holds other files too
SHOWN = 6  # names in an error
COUNTED = re.compile(r"( *)(\S.*?) +([\d,]+)(?:  \((.*)\))?")
ASIDE = re.compile(r"(?:set aside: |\.\.\. and ([\d,]+) more)")
PASSED_ON = (
    "unpacked",
    "max_text_tokens",
    "row_tokens",
    "feature_pooling",
    "feature_storage",
    "features",
)

_places = threading.BoundedSemaphore(AT_ONCE)


class PreflightForm(BaseModel):
    """What is to be looked through, and with which values of the config."""

    model_config = ConfigDict(extra="forbid")

    data: Text | Names
    images: Text | Names = ""
    preset: Annotated[str, Field(max_length=64)]
    values: Values = {}


def found(data: Sequence[str], images: Sequence[str]) -> tuple[list[str], list[str]]:
    """The sources and the folders of their pictures as training is given them: where a folder was
    named that has one file of conversations, that file, and the pictures beside it.

    Raises PhiSightError for what is neither file nor folder, and for a folder in which it is not
    clear which file is meant.
    """
    for typed in (*data, *images):
        if problem := paths.problem_of(typed):
            raise PhiSightError(f"the path {problem}")
    places = [text.strip() for text in data if text.strip()]
    pictures = [expanded(text.strip()) for text in images if text.strip()]
    if not places:
        raise RequestError("training_data_missing")
    sources = [_source(place) for place in places]
    beside = Path(expanded(places[0])) / PICTURES
    if len(places) == 1 and not pictures and os.path.isdir(beside):
        pictures = [str(beside)]
    for folder in pictures:
        if not os.path.isdir(folder):
            raise PhiSightError(f"{folder}: no such folder; name the folder of the pictures")
    return sources, pictures


def _source(typed: str) -> str:
    """One of the sources, with what stands behind its name."""
    name, _ = split_weight(typed)
    if hub.is_reference(name):
        return typed
    path = Path(expanded(name))
    # Asked of os.path, which takes what cannot be looked at for what is not there.
    if os.path.isdir(path):
        path = conversations_in(path)
    elif not os.path.isfile(path):
        is_there = os.path.exists(path)
        what = "is neither a file nor a folder" if is_there else "no such file or folder"
        raise PhiSightError(f"{path}: {what}; name the file of the conversations, or its folder")
    return f"{path}{typed[len(name) :]}"


def conversations_in(folder: Path) -> Path:
    """The one file of conversations in a folder; the folder, where it holds other data."""
    try:
        files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".jsonl"))
    except OSError as error:
        raise PhiSightError(f"{folder}: {error.strerror}; name another folder") from error
    usual = [path for path in files if path.name in USUAL and os.path.isfile(path)]
    if len(usual) == 1:
        return usual[0]
    if len(files) == 1 and os.path.isfile(files[0]):
        return files[0]
    if not files:
        return folder  # the preflight says what is wrong with it
    names = ", ".join(path.name for path in files[:SHOWN]) + (", ..." if files[SHOWN:] else "")
    raise PhiSightError(f"{folder}: holds {names}; name the file of the conversations")


def preflight(form: PreflightForm, left: Callable[[], bool]) -> Iterator[Event]:
    """The report as events: "data" (what was found), "count", "aside" and "line" as it is printed,
    "done". `left` says that the page has gone, which ends the work.

    Raises `RequestError` where too many are under way; PhiSightError for what cannot be read.
    """
    if form.preset not in PRESETS:
        raise PhiSightError(f"{form.preset}: no such preset; choose from {', '.join(PRESETS)}")
    data, images = found(as_texts(form.data), as_texts(form.images))
    if not _places.acquire(blocking=False):
        raise RequestError("training_preflights", most=AT_ONCE)
    try:
        yield "data", {"data": data, "images": images}
        last: str | int = ""
        for line in lines_of(arguments(data, images, form), left, SECONDS):
            if isinstance(line, int) and line not in (0, 1):  # 1: something is set aside
                raise PhiSightError(str(last).removeprefix("error: ") or "the preflight failed")
            if isinstance(line, int):
                yield "done", {"set_aside": line == 1}
            else:
                yield event_of(line)
            last = line
    except TookTooLong:
        raise RequestError("training_preflight_long", minutes=round(SECONDS / 60)) from None
    finally:
        _places.release()


def arguments(data: Sequence[str], images: Sequence[str], form: PreflightForm) -> list[str]:
    """What python is given."""
    checked = Command()
    values = config_values.plain(configs.default_config(form.preset)) | clean(
        form.values, checked, ()
    )
    given = ["-m", "data.preflight", f"--tokenizer={values['base']}"]
    given += [f"--data={text}" for text in data] + [f"--images={folder}" for folder in images]
    given += [f"{flag_of(name)}={values[name]}" for name in PASSED_ON]
    tokens, width = picture_shape(values)
    return [
        *given,
        f"--tokens-per-image={tokens}",
        f"--feature-dim={width}",
        f"--picture-tokens={in_text(values, tokens)}",
    ]


def in_text(values: Mapping[str, Any], tokens: int) -> int:
    """Tokens of a picture in the text, of so many before they are pooled. Raises `PhiSightError`
    for a number that the projector cannot take."""
    from model.projectors import PROJECTORS  # torch, which the page is shown without

    pooled = -(-tokens // values["feature_pooling"] ** 2)
    return PROJECTORS[values["projector"]].tokens_of(pooled, values["projector_queries"])


def picture_shape(values: Mapping[str, Any]) -> tuple[int, int]:
    """Tokens of a picture, before they are pooled, and numbers of a token; where the encoder is not
    at hand, those of CLIP L/14 at 336 pixels."""
    tokens, width = 576, 1024
    folder = Path(values["vision"])
    if os.path.isfile(folder / "config.json"):
        from model.encoders import encoder_of  # it loads torch, which no page waits for

        try:
            encoder = encoder_of(read_json(folder / "config.json", own=False))
            described = read_json(folder / "preprocessor_config.json", own=False)
            side = encoder.side(encoder.preparation(described))
        except (OSError, PhiSightError) as error:
            raise PhiSightError(f"{folder}: {error}; name another encoder") from None
        tokens, width = side**2, encoder.hidden_size
    return (1 if values["vision_features"] == "pooled" else tokens), width


def event_of(line: str) -> Event:
    """A line of the report: a count with its label and note, a record set aside, or as it is."""
    if counted := COUNTED.fullmatch(line):
        indent, label, number, note = counted.groups()
        amount = int(number.replace(",", ""))
        return "count", {"label": label, "inner": bool(indent), "number": amount, "note": note}
    if aside := ASIDE.match(line):
        return "aside", {"text": line, "count": int((aside[1] or "1").replace(",", ""))}
    return "line", {"text": line}
