"""What the keys of a record ask for, beside its turns: honoured, refused with a reason, or counted.

A key that is passed over in silence changes what a record means: a turn that must not be learnt is
learnt, a film is trained as text. So every key belongs to one of three kinds. Those that can be
honoured are (`system`, `loss`). Those that ask for what training cannot do set the record aside.
All others are data about the record (`source`, `width`); `unread_keys` names them for a count.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from data.stream import RepeatedKeys, kind_of
from errors import printable

# Why a record is set aside, for the counts of a report.
TOO_LONG = "too long"
BAD_PICTURE = "missing or broken picture"
UNLIKE_PICTURES = "pictures and <image> differ"
UNSUPERVISED = "no supervised token"
NOT_DONE = "asks for what is not done"
MALFORMED = "malformed"
FAULTS = (UNLIKE_PICTURES, UNSUPERVISED, NOT_DONE, MALFORMED)  # of a record itself
KINDS = (*FAULTS, TOO_LONG, BAD_PICTURE)

SYSTEM_KEYS = ("system", "system_prompt", "system_message")  # beside the turns
PICTURE_KEYS = ("image", "images")  # of a record or of a turn
RECORD_KEYS = frozenset({"id", *PICTURE_KEYS})  # beside those of its form
PART_KEYS = {"type", "text", "image", "image_url", "path", "url", "index"}

# true, or 1: learn from this turn. As ms-swift, OpenAI, axolotl and mistral-finetune name it.
LEARN_KEYS = {
    *("loss", "loss_weight", "loss_scale", "loss_mask", "compute_loss", "weight", "sample_weight"),
    *("train", "training", "trainable", "is_trainable", "learn", "supervised"),
}
# true: do not learn from it. A number is refused: 0 may be "out of the loss" or "not masked".
MASK_KEYS = {"mask", "masked", "mask_loss", "ignore", "ignored", "ignore_loss", "skip_loss"}
# Unknown keys of a turn that speak of the same: what they say cannot be known.
OF_LEARNING = re.compile(
    r"(?:^|_)(?:loss|losses|weights?|mask|masks|masked|ignored?|skip|skipped|excluded?|grad"
    r"|backprop|train|trained|training|trainable|learn|learned|learnt|supervised?"
    r"|supervision)(?:_|$)"
)
# Of those, the ones that say no.
AGAINST = re.compile(
    r"(?:^|_)(?:no|not|dont|never|without|mask|masks|masked|ignored?|skip|skipped|excluded?)(?:_|$)"
)
# NeMo's `mask` names the speaker whose words are not learnt, which is what is done anyway.
ASKERS = ("user", "human")

HOLDER = r"(?:_?(?:path|file|file_?name|name|ur[li]|list|data|bytes|base64|b64))?s?"
MEDIA = re.compile(
    rf"(?:input_)?(?:video|audio|speech|sound|music|movie|film|frame|point_?cloud|pdf|media"
    rf"|attachment)s?{HOLDER}"
)
PICTURES_ELSEWHERE = re.compile(rf"(?:input_)?(?:image|img|picture|photo|pic)s?{HOLDER}")
MORE_PICTURES = re.compile(r"(?:image|img|picture|photo|pic)s?_?\d+")  # image_2
MEDIA_FILE = re.compile(
    r"\.(?:png|jpe?g|webp|gif|bmp|tiff?|heic|avif|mp4|mov|avi|mkv|webm|wav|mp3|flac|ogg|m4a)$", re.I
)
# What belongs to a conversation and has no place in the chats of this model.
TOOLS = {"tools", "functions", "tool_calls", "function_call", "tool_call_id", "documents"}
THOUGHTS = {"reasoning_content", "reasoning", "thinking"}  # of a turn
INNER_CAPITAL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
EMPTY_TEXTS = ("", "[]", "{}", "null", "none")


class BadRecord(Exception):
    """The reason why a record is bad, without its place; `kind` is one of `FAULTS`."""

    def __init__(self, reason: str, kind: str = MALFORMED) -> None:
        super().__init__(reason)
        self.kind = kind


def named(key: str) -> str:
    """A key of a file as a reason shows it."""
    return f"`{printable(key, 40)}`"


def checked_text(text: str, what: str) -> str:
    """JSON can spell half of a surrogate pair, which no tokenizer and no file system takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRecord(f"the {what} is not valid Unicode") from None
    return text


def check_written_once(fields: Mapping[str, Any], what: str) -> None:
    """Raise BadRecord for a key that stands there twice: one of its values would silently win."""
    if isinstance(fields, RepeatedKeys):
        raise BadRecord(f"{what} has {named(fields.repeated)} twice; keep one of them")


def check_keys(
    fields: Mapping[str, Any],
    what: str,
    has_pictures: bool,
    read: Collection[str],
    is_record: bool = False,
) -> None:
    """Raise BadRecord for a key of a record or of a turn that asks for what cannot be done.

    `what` begins the reason ("the record", "turn 2"); `has_pictures`: some are named where they are
    looked for, so that another key that looks like a picture's is data about it; `read`: the keys
    that are read, beside those of pictures.
    """
    check_written_once(fields, what)
    for key, value in fields.items():
        if key in read or key in RECORD_KEYS:
            continue
        if key in ("label", "kto_tag") and value is False:  # of a preference: what to avoid
            raise BadRecord(f"{what} has `{key}` false: its answer is a bad one", NOT_DONE)
        if _is_empty(value):
            continue
        name = plain(key)
        if name in TOOLS or not is_record and (name in THOUGHTS or name in SYSTEM_KEYS):
            raise BadRecord(f"{what} has {named(key)}, which cannot be trained", NOT_DONE)
        if not isinstance(value, (str, list, dict)):
            continue
        if MEDIA.fullmatch(name):
            raise BadRecord(f"{what} has {named(key)}: only pictures and text are read", NOT_DONE)
        elsewhere = PICTURES_ELSEWHERE.fullmatch(name) or _names_media(value)
        if MORE_PICTURES.fullmatch(name) or not has_pictures and elsewhere:
            raise BadRecord(
                f"{what} has {named(key)}, where no picture is looked for; call it `image`"
            )


def plain(key: str) -> str:
    """`lossWeight`, `Loss-weight` -> `loss_weight`."""
    return INNER_CAPITAL.sub("_", key.strip()).lower().replace("-", "_")


def _names_media(value: object) -> bool:
    """Whether a value is the name of a picture, a film or a recording, or a list of such."""
    first = value[0] if isinstance(value, list) else value
    return isinstance(first, str) and bool(MEDIA_FILE.search(first[-8:]))


def _is_empty(value: object) -> bool:
    return value in (None, False, [], {}) or (
        isinstance(value, str) and value.strip().lower() in EMPTY_TEXTS
    )


def says_learn(fields: Mapping[str, Any], what: str, is_record: bool = False) -> bool | None:
    """Whether a turn or a record is to be learnt from; None where it does not say.

    Raises BadRecord where it says so by halves, in words that are not known, or both yes and no.
    """
    said: dict[bool, str] = {}
    for key, value in fields.items():
        if value is None:
            continue
        name = plain(key)
        if is_record and name == "mask" and _names_askers(value):
            continue
        if name in LEARN_KEYS and value in (True, False):  # 1 and 0 as well
            said[bool(value)] = key
        elif name in MASK_KEYS and isinstance(value, bool):
            said[not value] = key
        elif name in LEARN_KEYS | MASK_KEYS:
            raise BadRecord(
                f"{what}: {named(key)} is {_shown(value)}; an answer is learnt or it is not: say"
                " `loss`: true or false",
                NOT_DONE,
            )
        elif OF_LEARNING.search(name) and (
            not is_record
            or isinstance(value, (list, dict))  # one for each turn
            # `train_on_inputs`: true, `skip`: true, `use_for_training`: false
            or value is (name.startswith("train_on_") or bool(AGAINST.search(name)))
        ):
            raise BadRecord(
                f"{what} has {named(key)}, which may say what is learnt and is not known; say"
                " `loss`: true or false in each turn",
                NOT_DONE,
            )
    if len(said) == 2:
        raise BadRecord(
            f"{what}: {named(said[True])} and {named(said[False])} contradict each other"
        )
    return next(iter(said), None)


def _names_askers(value: object) -> bool:
    return isinstance(value, str) and value.strip().lower() in ASKERS


def _shown(value: object) -> str:
    """A number itself, of anything else what it is."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return printable(value, 30) if is_number else kind_of(value)


def check_record_is_learnt(record: Mapping[str, Any]) -> None:
    """Raise BadRecord where the record as a whole is not to be learnt from."""
    if says_learn(record, "the record", is_record=True) is False:
        raise BadRecord("it says itself that it is not to be learnt", UNSUPERVISED)


def system_text(record: Mapping[str, Any]) -> str:
    """The system message that stands beside the turns, stripped; empty if there is none."""
    texts: dict[str, str] = {}
    for key, value in record.items():
        if plain(key) not in SYSTEM_KEYS or value is None or value in ([], {}):
            continue
        if not isinstance(value, str):
            raise BadRecord(f"{named(key)} is {kind_of(value)}, not text")
        if value.strip():
            texts[checked_text(value.strip(), f"text of `{key}`")] = key
    if len(texts) > 1:
        first, second, *_ = texts.values()
        raise BadRecord(
            f"{named(first)} and {named(second)} are two system messages; keep one of them"
        )
    return next(iter(texts), "")


def unread_of_record(record: Mapping[str, Any], keys: Collection[str]) -> Iterator[str]:
    """Every key of a record that nothing reads; `keys` are those of its form."""
    read = (LEARN_KEYS | MASK_KEYS).union(SYSTEM_KEYS)
    for key in record:
        if key not in RECORD_KEYS and key not in keys and plain(key) not in read:
            yield key


def unread_of_turn(turn: object, role_key: str, text_key: str) -> Iterator[str]:
    """Every key of a turn ("turn: name"), and of its parts, that nothing reads."""
    if not isinstance(turn, dict):
        return
    for key in turn:
        read = key in (role_key, text_key, *PICTURE_KEYS)
        if not read and plain(key) not in LEARN_KEYS | MASK_KEYS:
            yield f"turn: {key}"
    parts = turn.get(text_key)
    for part in parts if isinstance(parts, list) else ():
        if isinstance(part, dict):
            yield from (f"part: {key}" for key in part if key not in PART_KEYS)
