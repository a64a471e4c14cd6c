"""A tokenizer.json as llama.cpp reads it: tokens, their kinds, and scores or merges.

llama.cpp has its own tokenizers. Two of them are those of the bases here: SentencePiece's, which
Phi-3 has, and byte-level BPE. Whether the ids come out equal is not decided here but measured by
llama.cpp itself on the texts of a certificate.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from errors import PhiSightError

SPACE = "▁"  # SentencePiece's mark of a space
# llama.cpp lets the marks of a chat swallow the white space after them, as Phi-3's do, only for a
# model whose name has this in it, and loads a model of this name only if it has these tokens.
NAMED, NEEDED = "phi-3", ("<unk>", "<s>", "</s>", "<|endoftext|>")
REMEDY = "export it with --merge or --llava, for programs that read tokenizer.json"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT, _NO_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_SHORT}|{_NO_WORD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_SPACES}"
_GPT_4O = (
    rf"{_NO_WORD}{_UPPER}*{_LOWER}+{_SHORT}?|{_NO_WORD}{_UPPER}+{_LOWER}*{_SHORT}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_SPACES}"
)
_BYTES = ("ByteLevel", {"add_prefix_space": False, "use_regex": True})


def _by(pattern: str) -> list[tuple[str, dict[str, Any]]]:
    cut = {"pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [("Split", cut), ("ByteLevel", {"add_prefix_space": False, "use_regex": False})]


# What stands before the merges of byte-level BPE, by llama.cpp's name for it.
_SPLITS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "gpt-2": [_BYTES],
    "smollm": [("Digits", {"individual_digits": True}), _BYTES],
    "qwen2": _by(_QWEN2),
    "llama-bpe": _by(_QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")),
    "gpt-4o": _by(_GPT_4O),
}
# Those under which llama.cpp takes a word that is a token as it is, without merges.
_WHOLE_WORDS = ("llama-bpe",)
# Text that is not in Unicode's NFC gets other ids by llama.cpp, which composes nothing.
_NORMALIZERS = {"qwen2": {"type": "NFC"}}


class Kind(enum.IntEnum):
    """llama.cpp's kinds of tokens."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF says of a tokenizer. Lists are by id, as long as the table of embeddings."""

    model: str
    """"llama" for SentencePiece's, "gpt2" for byte-level BPE"""
    split: str
    """how llama.cpp calls the way in which text is split before it is merged"""
    tokens: list[str]
    kinds: list[int]
    scores: list[float] = field(default_factory=list)
    """of SentencePiece's: the highest pair is merged first"""
    merges: list[str] = field(default_factory=list)
    """of byte-level BPE"""

    @property
    def line_end(self) -> str:
        """What follows the marks of a chat: a line end, if llama.cpp lets them swallow it."""
        return "\n" if set(NEEDED) <= set(self.tokens) else ""


def vocabulary_of(content: Mapping[str, Any], size: int) -> Vocabulary:
    """From a tokenizer.json, for a model of `size` embeddings: those behind the last token are
    named [PAD…] and unused. Raises `PhiSightError` for a tokenizer that llama.cpp does not have."""
    model = content["model"]
    if model.get("type") != "BPE":
        raise PhiSightError(f"--gguf: its tokenizer is {model.get('type')}, not BPE; {REMEDY}")
    ids = dict(model["vocab"])
    for mark in content["added_tokens"]:
        ids.setdefault(mark["content"], mark["id"])  # a piece of the model keeps its own id
    if (last := max(ids.values())) >= size:
        raise PhiSightError(
            f"--gguf: its tokenizer has the id {last} and the model {size} embeddings; {REMEDY}"
        )
    tokens, kinds = _unused(ids, size), [Kind.UNUSED.value] * size
    for token, number in ids.items():
        tokens[number], kinds[number] = token, Kind.NORMAL.value
    merges = [(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    if _is_sentencepiece(content):
        kinds = [_piece_kind(token, kind) for token, kind in zip(tokens, kinds, strict=True)]
        _add_marks(content, ids, kinds)
        scores = _scores(model["vocab"], merges, size)
        return Vocabulary("llama", "default", tokens, kinds, scores)
    split = _split_of(content)
    _add_marks(content, ids, kinds)
    return Vocabulary("gpt2", split, tokens, kinds, merges=[" ".join(pair) for pair in merges])


def _is_sentencepiece(content: Mapping[str, Any]) -> bool:
    """Whether every stretch gets a mark in front, spaces become marks, and what has no token is
    spelled in bytes."""
    wanted = [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ]
    normalizer = content.get("normalizer") or {}
    return (
        content["model"].get("byte_fallback") is True
        and normalizer.get("normalizers") == wanted
        and content.get("pre_tokenizer") is None
    )


def _piece_kind(token: str, kind: int) -> int:
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return Kind.BYTE.value if is_byte else kind


def _scores(vocabulary: Mapping[str, int], merges: list, size: int) -> list[float]:
    """SentencePiece merges the pair whose token has the highest score: minus the rank of the first
    merge that gives it."""
    scores = [-float(len(merges))] * size
    for rank, (first, second) in reversed([*enumerate(merges)]):
        scores[vocabulary[first + second]] = -float(rank)
    return scores


def _split_of(content: Mapping[str, Any]) -> str:
    given = content.get("pre_tokenizer") or {}
    steps = given.get("pretokenizers") or [given]
    for name, wanted in _SPLITS.items():
        if len(steps) == len(wanted) and all(
            step.get("type") == kind and all(step.get(key) == value for key, value in facts.items())
            for step, (kind, facts) in zip(steps, wanted, strict=True)
        ):
            whole_words = bool(content["model"].get("ignore_merges"))
            same = content.get("normalizer") in (None, _NORMALIZERS.get(name))
            if same and whole_words == (name in _WHOLE_WORDS):
                return name
    described = ", ".join(str(step.get("type")) for step in steps)
    raise PhiSightError(
        f"--gguf: its tokenizer splits text by {described or 'nothing'}, which this export does not"
        f" know in llama.cpp; {REMEDY}"
    )


def _add_marks(content: Mapping[str, Any], ids: Mapping[str, int], kinds: list[int]) -> None:
    """The tokens that are found in a text before it is split."""
    for mark in content["added_tokens"]:
        kind = Kind.CONTROL if mark["special"] else Kind.USER_DEFINED
        kinds[ids[mark["content"]]] = kind.value
    if (unknown := ids.get(content["model"].get("unk_token"))) is not None:
        kinds[unknown] = Kind.UNKNOWN.value


def _unused(ids: Mapping[str, int], size: int) -> list[str]:
    """Names for embeddings without a token, none of which a token has: llama.cpp ends where two are
    equal."""
    end = "]"
    while any(token.startswith("[PAD") and token.endswith(end) for token in ids):
        end = "_" + end
    return [f"[PAD{number}{end}" for number in range(size)]


def write_vocabulary(writer: Any, vocabulary: Vocabulary, marks: Mapping[str, int | None]) -> None:
    """`writer`: a `gguf.GGUFWriter`. `marks`: the ids of "bos", "eos", "eot", "unk" and "pad"."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for name, number in marks.items():
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    # The chat begins with a mark of its own; nothing is put before it.
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.model == "llama")
