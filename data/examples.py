"""Questions to begin with: a folder of pictures, each with a text of the same name beside it, whose
every line is a question about it.

    cat.jpg  cat.txt      What is the cat doing?
                          What colour is it?

A person may write such a folder; a run has one of its own (`RUN/examples`), of pictures that it was
not trained on.
"""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from unicodedata import category

from PIL import Image

from data.dataset import Message
from data.images import read_image_bytes, size_if_whole
from data.pictures import PictureFolders
from data.reading import as_png, check_image_file
from errors import PhiSightError, printable
from files import open_regular, read_regular, whole_folder
from paths import EXAMPLES

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".avif")  # what browsers show
MOST = 24  # questions; more are no longer a beginning
MOST_BYTES = 20 * 2**20  # of a picture, as of an upload
TEXT_BYTES = 16 * 2**10  # of a picture's questions
LONGEST = 500  # characters of a question
MOST_WRITTEN = 4
WRITTEN = re.compile(r"example_[0-9]+\.(png|jpg|txt)")  # the names of what is written here
WRITTEN_SIDE = 1024  # pixels; a larger picture is made smaller
WRITTEN_LENGTH = 200  # characters of a question that is picked: it has to fit on a card
REMEDY = "mend it, or take it out of the folder"


@dataclass(frozen=True)
class Example:
    """A question about a picture that lies on the disk."""

    question: str
    picture: str

    @property
    def key(self) -> str:
        """Names it among others, of this run and of another."""
        return sha256(f"{self.picture}\n{self.question}".encode()).hexdigest()[:16]


# -- reading --------------------------------------------------------------------------------------


def read_examples(folder: str | Path) -> list[Example]:
    """The examples of a folder, by the names of their pictures; names that begin with a point are
    passed over.

    Raises PhiSightError, which names the file, for a folder that cannot be listed or has none, and
    for every file in it that is neither a picture with questions nor a picture's questions.
    """
    folder = Path(folder)
    found: list[Example] = []
    pictures = _pictures_in(folder)
    for path in pictures:
        try:
            with open_regular(path, follow_links=False) as file:
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise _unusable(path, error.strerror or str(error)) from None
        if size > MOST_BYTES:
            raise _unusable(path, f"has {size:,} bytes, over the limit of {MOST_BYTES:,}")
        if size_if_whole(path) is None:  # else it would have to be decoded before the page is there
            check_image_file(path)
        found += [Example(question, str(path)) for question in _questions(path)]
    if len(found) > MOST:
        raise PhiSightError(f"{folder}: has {len(found)} questions; leave the {MOST} best")
    if not found:
        raise PhiSightError(
            f"{folder}: has no pictures with questions; put x.jpg and x.txt into it, a question a"
            " line"
        )
    return found


def _pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder in order. Raises PhiSightError for what is neither picture nor
    questions, and for too many."""
    try:
        with os.scandir(folder) as entries:
            shown = (Path(entry.path) for entry in entries if entry.name[0] != ".")
            paths = sorted(islice(shown, 2 * MOST + 1))
    except OSError as error:
        raise PhiSightError(
            f"{folder}: {error.strerror or error}; give a folder of pictures"
        ) from None
    if len(paths) > 2 * MOST:
        raise PhiSightError(f"{folder}: holds more than {MOST} pictures; leave the best")
    pictures: dict[str, Path] = {}
    for path in paths:
        if path.suffix.lower() not in SUFFIXES:
            continue
        if other := pictures.get(path.stem):
            raise _unusable(path, f"has the name of {other.name}, so that both have one text")
        pictures[path.stem] = path
    for path in paths:
        if path.suffix != ".txt" and path.suffix.lower() not in SUFFIXES:
            raise _unusable(path, f"is neither questions (.txt) nor of {', '.join(SUFFIXES)}")
        if path.suffix == ".txt" and path.stem not in pictures:
            raise _unusable(path, "has no picture of that name beside it")
    return list(pictures.values())


def _questions(picture: Path) -> list[str]:
    """The lines of the text beside a picture, without blank ones."""
    path = picture.with_suffix(".txt")
    try:
        text = read_regular(path, TEXT_BYTES, follow_links=False).decode("utf-8-sig")
    except FileNotFoundError:
        raise PhiSightError(
            f"{printable(picture, 250)}: has no questions; write some into {path.name} beside it,"
            " a line for each"
        ) from None
    except OSError as error:
        raise _unusable(path, error.strerror or str(error)) from None
    except UnicodeDecodeError:
        raise _unusable(path, "is not UTF-8 text") from None
    lines = [" ".join(line.split()) for line in text.splitlines()]
    questions = [line for line in lines if line]
    if not questions:
        raise _unusable(path, "holds no question")
    for line in questions:
        if len(line) > LONGEST:
            raise _unusable(path, f"a question has over {LONGEST} characters")
        if any(category(letter) == "Cc" for letter in line):
            raise _unusable(path, "a question has control characters")
    return questions


def _unusable(path: Path, reason: str) -> PhiSightError:
    return PhiSightError(f"{printable(path, 250)}: {reason}; {REMEDY}")


# -- writing --------------------------------------------------------------------------------------


def write_examples(
    folder: Path, asked: Iterable[tuple[str, Path]], most: int = MOST_WRITTEN
) -> int:
    """Write the first `most` (question, picture) into an empty folder; returns how many.

    A picture is drawn anew, so that what was noted in its file stays there; one that is gone or
    cannot be read is passed over.
    """
    count = 0
    for question, source in asked:
        if count == most:
            break
        try:
            png = as_png(read_image_bytes(source), source.name)
        except PhiSightError:
            continue
        count += 1
        path = folder / f"example_{count}.{'png' if source.suffix.lower() == '.png' else 'jpg'}"
        with Image.open(io.BytesIO(png)) as picture:
            picture.thumbnail((WRITTEN_SIDE, WRITTEN_SIDE))
            picture.save(path, quality=90)
        path.with_suffix(".txt").write_text(f"{question}\n", encoding="utf-8", newline="\n")
    return count


def give_examples(
    run: Path, validation: Sequence[Sequence[Message]], images: PictureFolders, anew: bool
) -> None:
    """Have a run carry examples of its own, of its `validation` conversations; none where these
    have none that fit. `anew`: in place of those that a former run has written there; whatever else
    lies in the folder or under its name is a person's own, and stays.

    Raises PhiSightError where they cannot be written.
    """
    folder = run / EXAMPLES
    try:
        if anew and folder.is_dir() and not folder.is_symlink():
            if all(WRITTEN.fullmatch(name) for name in os.listdir(folder)):
                shutil.rmtree(folder)
        if os.path.lexists(folder):  # those of the run's beginning, or a person's own
            return
        run.mkdir(parents=True, exist_ok=True)
        picked = [(question, images.path_of(name)) for question, name in pick(validation)]
        with whole_folder(folder) as temporary:
            count = write_examples(temporary, picked)
        if not count:
            folder.rmdir()
    except OSError as error:
        raise PhiSightError(
            f"{folder}: cannot be written ({error.strerror or error}); make room or mend the folder"
        ) from error


def pick(conversations: Iterable[Sequence[Message]]) -> Iterator[tuple[str, str]]:
    """(question, name of its picture) of conversations whose first question is a short one about
    one picture: no picture and no question twice, and those first that begin with a new word, so
    that a few are of different kinds."""
    fitting = list(dict.fromkeys(filter(None, map(_first_question, conversations))))
    first: dict[str, tuple[str, str]] = {}
    for question, name in fitting:
        if all(name != used for _, used in first.values()):
            first.setdefault(question.split()[0].casefold(), (question, name))
    told: set[str] = set()
    for question, name in (*first.values(), *fitting):
        if not told & {question.casefold(), name}:
            told |= {question.casefold(), name}
            yield question, name


def _first_question(messages: Sequence[Message]) -> tuple[str, str] | None:
    asked = next((message for message in messages if message.role == "user"), None)
    if asked is None:
        return None
    pictures = [place for place, part in enumerate(asked.parts) if part.kind == "image"]
    question = " ".join(" ".join(p.value for p in asked.parts if p.kind == "text").split())
    short = 0 < len(question) <= WRITTEN_LENGTH and question.isprintable()
    if not short or len(pictures) != 1 or pictures[0] not in (0, len(asked.parts) - 1):
        return None
    return question, asked.parts[pictures[0]].value
