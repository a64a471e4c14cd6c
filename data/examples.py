"""Questions to begin with, in a folder: `examples.json` names each one and the file of its picture
beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from documents import TEXT, json_bytes, read_json, require
from errors import PhiSightError

LISTED = "examples.json"
MOST_BYTES = 2**20  # of that file
_FORM = {"examples": [{"question": TEXT, "picture": TEXT}]}


@dataclass(frozen=True)
class Example:
    """A question about a picture that lies on the disk."""

    question: str
    picture: str


def write_examples(folder: Path, examples: Sequence[Example]) -> None:
    """List examples whose pictures lie in `folder`."""
    listed = [{"question": e.question, "picture": Path(e.picture).name} for e in examples]
    (folder / LISTED).write_bytes(json_bytes(LISTED, {"examples": listed}))


def read_examples(folder: str | Path) -> list[Example]:
    """The examples of a folder. Raises PhiSightError where one cannot be shown."""
    path = Path(folder) / LISTED
    try:
        listed = read_json(path, MOST_BYTES)
        require(listed, _FORM)
    except OSError as error:
        raise _unusable(path, error.strerror or str(error)) from None
    except PhiSightError as error:
        raise _unusable(path, str(error)) from None
    examples = []
    for example in listed["examples"]:
        picture = example["picture"]
        if Path(picture).name != picture or not (path.parent / picture).is_file():
            raise _unusable(path, f"{picture!r} is not a file beside it")
        examples.append(Example(example["question"], str(path.parent / picture)))
    return examples


def _unusable(path: Path, reason: str) -> PhiSightError:
    return PhiSightError(f"{path}: {reason}; write it again, or leave --examples out")
