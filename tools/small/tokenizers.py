"""Small tokenizers of every family, with its marks and its way to cut text."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers.pre_tokenizers import PreTokenizer

from data import world
from errors import PhiSightError
from tools.small import templates
from tools.tiny.tokenizer import (
    PHI_SPECIALS,
    declared_tokens,
    learned_pieces,
    tokenizer_config,
    with_byte_fallback,
)

BYTES = 256
SCENES = 200
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_WORDS = QWEN_WORDS.replace(r"\p{N}|", r"\p{N}{1,3}|")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PHI4_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SHORT}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SHORT}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class ByteLevel:
    """What tells the byte-level BPE of one family from those of the others."""

    words: str
    """how text is cut, as a regular expression; empty for GPT-2's way with single digits"""
    specials: tuple[str, ...]
    template: str
    end: str
    padding: str
    begin: str | None = None
    plain: tuple[str, ...] = ()
    """added tokens that are not special, behind the special ones"""
    swallowing: tuple[str, ...] = ()
    """those that swallow the white space behind them"""
    specials_first: bool = False
    composes: bool = False
    """whether text is brought into Unicode's NFC"""
    whole_words: bool = False
    """whether a word that is a token is taken without merges"""


_QWEN = ByteLevel(
    QWEN_WORDS,
    specials=(
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>"),
        *("<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>"),
        *("<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
        *("<|image_pad|>", "<|video_pad|>"),
    ),
    plain=(
        *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>"),
        *("<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
    ),
    template=templates.QWEN25,
    end="<|im_end|>",
    padding="<|endoftext|>",
    composes=True,
)
FAMILIES = {
    "phi4": ByteLevel(
        PHI4_WORDS,
        specials=(
            *("<|endoftext|>", "<|endofprompt|>", "<|assistant|>", "<|end|>", "<|user|>"),
            *("<|system|>", "<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>"),
            *("<|tool_response|>", "<|tag|>"),
        ),
        swallowing=("<|assistant|>", "<|end|>", "<|user|>", "<|system|>", "<|tag|>"),
        template=templates.PHI4,
        begin="<|endoftext|>",
        end="<|endoftext|>",
        padding="<|endoftext|>",
    ),
    "llama3": ByteLevel(
        LLAMA3_WORDS,
        specials=(
            *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"),
            *("<|reserved_special_token_1|>", "<|finetune_right_pad_id|>"),
            *("<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>"),
            *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
        ),
        template=templates.LLAMA3,
        begin="<|begin_of_text|>",
        end="<|eot_id|>",
        padding="<|finetune_right_pad_id|>",
        whole_words=True,
    ),
    "smollm2": ByteLevel(
        "",
        specials=(
            *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>"),
            *("<file_sep>", "<filename>", "<gh_stars>", "<issue_start>", "<issue_comment>"),
            *("<issue_closed>", "<jupyter_start>", "<jupyter_text>", "<jupyter_code>"),
            *("<jupyter_output>", "<jupyter_script>", "<empty_output>"),
        ),
        template=templates.SMOLLM2,
        begin="<|im_start|>",
        end="<|im_end|>",
        padding="<|im_end|>",
        specials_first=True,
    ),
    "qwen2.5": _QWEN,
    "qwen3": ByteLevel(
        QWEN_WORDS,
        specials=_QWEN.specials,
        plain=(*_QWEN.plain, "<tool_response>", "</tool_response>", "<think>", "</think>"),
        template=templates.QWEN3,
        end="<|im_end|>",
        padding="<|endoftext|>",
        composes=True,
    ),
}
NAMES = ("phi3", *FAMILIES)
"""as the chat forms are called"""


def write_tokenizer(name: str, folder: str | Path, size: int) -> Path:
    """Write tokenizer.json and tokenizer_config.json, with its chat template, of a tokenizer of the
    family `name` that has at most `size` tokens, learned from what is said of the picture world.

    The files are the same at every call. Returns the folder. Raises `PhiSightError` for a name that
    is none of `NAMES`, and for a size that has no room for the bytes and the family's marks.
    """
    folder = Path(folder)
    if name not in NAMES:
        raise PhiSightError(f"tokenizer {name}: is none of {', '.join(NAMES)}; choose one of them")
    specials = len(PHI_SPECIALS) + 3 if name == "phi3" else _added(FAMILIES[name])
    least = BYTES + specials + 150  # Phi-3's has every letter beside the bytes
    if size < least:
        raise PhiSightError(f"tokenizer {name}: {size} tokens are too few; take {least} or more")
    if name == "phi3":
        tokenizer = with_byte_fallback(learned_pieces(_corpus(), size - BYTES - specials))
        config = tokenizer_config(tokenizer)
    else:
        tokenizer = _byte_level(FAMILIES[name], size)
        config = _config(FAMILIES[name], tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=1), encoding="utf-8", newline="\n"
    )
    return folder


def _added(family: ByteLevel) -> int:
    return len(family.specials) + len(family.plain)


def _corpus() -> list[str]:
    rng = random.Random("small tokenizer")
    corpus = [chr(code) for code in range(33, 127)]
    for _ in range(SCENES):
        scene = world.make_scene(rng, "all")
        corpus.append(world.describe(scene))
        for _, question, answer in world.ask_many(scene, rng, 6):
            corpus += [question, answer]
    return corpus


def _byte_level(family: ByteLevel, size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=family.whole_words))
    if family.composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _words(family.words)
    tokenizer.decoder = decoders.ByteLevel()
    first = list(family.specials) if family.specials_first else []
    trainer = trainers.BpeTrainer(
        vocab_size=size - (0 if first else _added(family)),
        special_tokens=first,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    if family.begin and not first and family.begin != family.end:
        # As the published one has it, for text that is no chat; no chat is encoded by it.
        begin = (family.begin, tokenizer.get_vocab_size() + family.specials.index(family.begin))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.begin} $A", special_tokens=[begin]
        )
    tokenizer.add_special_tokens([_token(family, text) for text in family.specials])
    tokenizer.add_tokens([_token(family, text) for text in family.plain])
    return tokenizer


def _words(pattern: str) -> PreTokenizer:
    if not pattern:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _token(family: ByteLevel, text: str) -> AddedToken:
    return AddedToken(text, rstrip=text in family.swallowing, normalized=False)


def _config(family: ByteLevel, tokenizer: Tokenizer) -> dict[str, object]:
    """`tokenizer_config.json` as transformers reads it."""
    return {
        "added_tokens_decoder": declared_tokens(tokenizer),
        "bos_token": family.begin,
        "eos_token": family.end,
        "pad_token": family.padding,
        "chat_template": family.template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
