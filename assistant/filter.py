"""The content filter: one function that says how much of a text may be shown.

It is off by default. Any function with the signature of `ContentFilter` can take its place: it is
given everything that was said so far, so it needs no state and may be shared by many answers. The
default, `WordFilter`, blocks the words and phrases of a list:

- whole words only: "class" is not blocked by "ass". Scripts that write no spaces (Chinese,
  Japanese, Thai and their like) have no such bounds: there a word is blocked wherever it stands;
- in any case and any Unicode form: full-width letters, ligatures, composed or combining accents,
  invisible format characters in between;
- across any run of white space;
- safely while an answer streams: a tail that could still become a blocked word is held back until
  it has become something else.

A list of words catches words. It does not judge meaning, and spellings with digits pass it.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from errors import PhiSightError

# Scripts without spaces between words, as the names of their characters begin.
SPACELESS = (
    "CJK ",
    "HIRAGANA",
    "KATAKANA",
    "COMBINING KATAKANA",
    "BOPOMOFO",
    "THAI ",
    "LAO ",
    "KHMER ",
    "MYANMAR ",
    "TIBETAN ",
    "JAVANESE ",
)
END = ""  # the key in a node of the tree that says "a phrase ends here"; no character is empty


class ContentFilter(Protocol):
    """A function of the whole text so far, called again as the text grows."""

    def __call__(self, text: str, final: bool) -> int | None:
        """How many characters of `text` may be shown, or None if it is blocked.

        With `final` nothing more comes: the answer is then None or `len(text)`. A later call with
        more text must not give a smaller number. A question is asked about once, as final.
        """
        ...


class WordFilter:
    """Blocks whole words and phrases of a list; see the module's docstring for what counts."""

    def __init__(self, words: Iterable[str]) -> None:
        """Raises `PhiSightError` for a phrase that has nothing visible in it, or that begins with
        a combining mark, which belongs to the character before it."""
        self._tree: dict = {}
        for phrase in words:
            folded = " ".join("".join(c for c, _ in fold(phrase)).split())
            if not folded or _is_mark(folded[0]):
                raise PhiSightError(
                    f"blocked word {phrase!r}: has no letter to begin with; remove it"
                )
            node = self._tree
            for character in folded:
                node = node.setdefault(character, {})
            node[END] = {}
        firsts = "".join(map(re.escape, self._tree))
        self._first = re.compile(f"[{firsts}]" if firsts else "(?!)")

    def __call__(self, text: str, final: bool) -> int | None:
        origins: Sequence[int]
        if text.isascii():  # the same as `fold`, some hundred times as fast
            folded, origins = text.lower(), range(len(text))
        else:
            pairs = fold(text)
            folded, origins = "".join(c for c, _ in pairs), [origin for _, origin in pairs]
        settled = len(folded)
        while not final and settled and unicodedata.combining(folded[settled - 1]):
            settled -= 1  # a mark that comes may yet take its place before these
        held = None
        for match in self._first.finditer(folded, 0, settled):
            start = match.start()
            if start and _is_one_word(folded[start - 1], folded[start]):
                continue
            verdict = self._follow(folded, start, settled, final)
            if verdict == "blocked":
                return None
            if verdict == "open" and held is None:
                held = start
        return len(text) if held is None else origins[held]

    def _follow(self, folded: str, start: int, settled: int, final: bool) -> str:
        """ "blocked", "open" (more text could make it so) or "free": the phrases at `start`."""
        node, place = self._tree, start
        while place < settled:
            character = folded[place]
            if character.isspace():
                character = " "
                while place + 1 < settled and folded[place + 1].isspace():
                    place += 1
            if character not in node:
                return "free"
            node = node[character]
            place += 1
            if END in node and place < len(folded):
                after = folded[place]
                if not _is_mark(after) and not _is_one_word(folded[place - 1], after):
                    return "blocked"
        if final:
            return "blocked" if END in node else "free"
        return "open"


def load_words(path: str | Path) -> list[str]:
    """The words and phrases of a UTF-8 file, one a line; lines that begin with # are comments.

    Raises `PhiSightError` if it cannot be read or has none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise PhiSightError(f"{path}: is not UTF-8; save it as UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PhiSightError(f"{path}: cannot be read ({reason}); check the name") from error
    words = [line.strip() for line in lines]
    words = [word for word in words if word and not word.startswith("#")]
    if not words:
        raise PhiSightError(f"{path}: has no words; write one a line, or leave the filter off")
    return words


def fold(text: str) -> list[tuple[str, int]]:
    """Each character of the compatibility-decomposed, case-folded text with its origin's index.

    Two texts fold to the same characters if they are the same in NFKC after case folding. The
    decomposed form is used because it can be made character by character, so that every folded one
    knows where it came from. Format characters, such as zero-width joiners, are left out.
    """
    pairs = [
        (part, origin)
        for origin, character in enumerate(text)
        if unicodedata.category(character) != "Cf"
        for part in _decomposed(character)
    ]
    begin = 0  # marks on one character stand in the order of their classes
    while begin < len(pairs):
        end = begin
        while end < len(pairs) and unicodedata.combining(pairs[end][0]):
            end += 1
        if end - begin > 1:
            pairs[begin:end] = sorted(
                pairs[begin:end], key=lambda pair: unicodedata.combining(pair[0])
            )
        begin = end + 1
    return [(part, origin) for character, origin in pairs for part in character.casefold()]


@functools.lru_cache(maxsize=4096)
def _decomposed(character: str) -> str:
    return unicodedata.normalize("NFKD", character)


def _is_mark(character: str) -> bool:
    """Whether it belongs to the character before it."""
    return unicodedata.category(character).startswith("M")


def _is_one_word(left: str, right: str) -> bool:
    """Whether two neighbours stand inside one word."""
    return _joins(left) and _joins(right)


@functools.lru_cache(maxsize=4096)
def _joins(character: str) -> bool:
    if not character.isalnum() and not _is_mark(character):
        return False
    return not unicodedata.name(character, "").startswith(SPACELESS)
