"""The tokenizers of the tiny preset's base and CLIP, in the form of Phi-3.5's own."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from data import world
from errors import PhiSightError
from tools.tiny.report import SEED
from tools.tiny.told import EMPTY, Turn, code_word, every_thing

PHI_SPECIALS = (  # Phi-3.5's special tokens in the order of their ids, with their rstrip flag
    ("<|endoftext|>", False),
    ("<|assistant|>", True),
    ("<|placeholder1|>", True),
    ("<|placeholder2|>", True),
    ("<|placeholder3|>", True),
    ("<|placeholder4|>", True),
    ("<|system|>", True),
    ("<|end|>", True),
    ("<|placeholder5|>", True),
    ("<|placeholder6|>", True),
    ("<|user|>", True),
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{{ '<|assistant|>\\n' if add_generation_prompt else eos_token }}"
)
VOCABULARY = 1280
CAPTION_VOCABULARY = 640


def build_tokenizer(out: Path, shorthand: bool) -> None:
    """A byte-fallback BPE of Phi-3.5's make: same normaliser, decoder, specials and flags.

    With `shorthand` every code word is one token; the CLIP reads captions only and needs none.
    """
    code_words = [code_word(thing) for thing in every_thing()] if shorthand else []
    special = 3 + 256 + len(PHI_SPECIALS)
    learner = learned_pieces(
        tokenizer_corpus(code_words),
        size=(VOCABULARY if shorthand else CAPTION_VOCABULARY) - special,
    )
    tokenizer = with_byte_fallback(learner)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = tokenizer_config(tokenizer)
    (out / "tokenizer_config.json").write_text(
        json.dumps(config, indent=1), encoding="utf-8", newline="\n"
    )
    cut = [word for word in code_words if len(tokenizer.encode(word).ids) != 1]
    if cut:
        raise RuntimeError(f"{len(cut)} code words take several tokens, such as {cut[0]}")
    print(f"tokenizer: {tokenizer.get_vocab_size()} pieces")


def tokenizer_corpus(code_words: list[str]) -> list[str]:
    """Descriptions, questions and answers, single characters, and the code words."""
    rng = random.Random(f"{SEED}/tokenizer")
    corpus = []
    for _ in range(4000):
        scene = world.make_scene(rng, "all")
        corpus.append(world.describe(scene))
        for _, question, answer in world.ask_many(scene, rng, 9):
            corpus += [question, answer]
    corpus += [EMPTY] * 100
    corpus += [chr(code) for code in range(33, 127)] * 2
    return corpus + code_words * 8


def learned_pieces(corpus: list[str], size: int) -> Tokenizer:
    """A BPE of `size` pieces learned from the corpus, without special tokens."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    # Words and punctuation are learned apart, so that no merge crosses a word, as in SentencePiece.
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("▁", "merged_with_next"),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Split("\n", "isolated"),
        ]
    )
    learner.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    return learner


def with_byte_fallback(learner: Tokenizer) -> Tokenizer:
    """The learned pieces after Llama's three and one a byte, then Phi-3.5's special tokens."""
    learned = json.loads(learner.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted(learned["vocab"], key=learned["vocab"].get)
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            [tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = learner.normalizer
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken("<unk>", normalized=False), AddedToken("<s>", normalized=False)]
    )
    tokenizer.add_tokens([AddedToken("</s>", rstrip=True, normalized=False)])
    tokenizer.add_special_tokens(
        [AddedToken(text, rstrip=rstrip, normalized=False) for text, rstrip in PHI_SPECIALS]
    )
    return tokenizer


def declared_tokens(tokenizer: Tokenizer) -> dict[str, dict[str, object]]:
    """The `added_tokens_decoder` of a tokenizer_config.json."""
    return {
        str(index): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for index, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, object]:
    """`tokenizer_config.json` as transformers reads it."""
    return {
        "added_tokens_decoder": declared_tokens(tokenizer),
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


class Encoder:
    """Conversation -> (ids, supervised) in Phi-3.5's chat form; words are looked up once."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.memory: dict[str, list[int]] = {}

    def id(self, token: str) -> int:
        """The number of a special token."""
        number = self.tokenizer.token_to_id(token)
        if number is None:
            raise PhiSightError(f"{token}: is not in the tokenizer; build the tokenizer anew")
        return number

    def __call__(self, text: str) -> list[int]:
        """Ids of a text, to read only: they are kept."""
        if len(self.memory) > 200_000:
            self.memory.clear()
        if text not in self.memory:
            self.memory[text] = self.tokenizer.encode(text).ids
        return self.memory[text]

    def render(self, turns: list[Turn]) -> tuple[list[int], list[int]]:
        """Ids, and for each the number of the turn whose answer it belongs to or -1."""
        ids: list[int] = []
        numbers: list[int] = []
        for number, (_, text, answer) in enumerate(turns):
            prompt = [
                self.id("<|user|>"),
                *self(text),
                self.id("<|end|>"),
                self.id("<|assistant|>"),
            ]
            reply = [*self(answer), self.id("<|end|>")]
            ids += prompt + reply
            numbers += [-1] * len(prompt) + [number] * len(reply)
        return ids, numbers
