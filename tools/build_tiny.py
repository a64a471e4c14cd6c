"""Make the tiny preset's assets from nothing: tokenizer, text-only base, CLIP, Whisper.

    python tools/build_tiny.py                       # all, in order
    python tools/build_tiny.py --only base           # one part again, see --help

Every part starts from a fixed seed. The base reads scenes told in words and sees no picture; the
CLIP sees pictures and captions and never sees a question; the Whisper hears what espeak-ng says
(tools/build_whisper.py). What each part measures about itself goes to `build_report.json` beside
it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import world  # noqa: E402
from errors import run_main  # noqa: E402
from tools import build_whisper  # noqa: E402
from tools.padding import pad_batch  # noqa: E402

SEED = 20260101
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
EMPTY = "nothing"
LOOK_UPS = ("colour", "shape", "size", "position")
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's own
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


# -- scenes told in words -------------------------------------------------------------------------


def code_word(thing: world.Thing) -> str:
    """Everything about a thing in one word of the tokenizer: "bigredstartopleft"."""
    return f"{thing.size}{thing.colour}{thing.shape}{thing.place.replace(' ', '')}"


class ComposedEmbedding(torch.nn.Module):
    """Token embedding in which a code word is the sum of the words it is made of (as in fastText,
    arXiv 1607.04606): what is learnt about one red thing is learnt about all. `table()` is the
    plain embedding that it amounts to, and that is saved."""

    def __init__(self, embedding: torch.nn.Embedding, encode: Encoder) -> None:
        super().__init__()
        self.embedding = embedding
        things = every_thing()
        words = [
            [encode(word)[0] for word in (t.size, t.colour, t.shape, *t.place.split())]
            for t in things
        ]
        used = sorted({word for row in words for word in row})
        sums = torch.zeros(len(things), len(used))  # how often each word stands in a code word
        for row, own in enumerate(words):
            for word in own:
                sums[row, used.index(word)] += 1
        self.register_buffer("codes", torch.tensor([encode(code_word(t))[0] for t in things]))
        self.register_buffer("words", torch.tensor(used))
        self.register_buffer("sums", sums)

    def table(self) -> torch.Tensor:
        """(vocabulary, dim)."""
        weight = self.embedding.weight
        return weight.index_copy(0, self.codes, self.sums @ weight[self.words])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.table())


def every_thing() -> list[world.Thing]:
    """One thing of every shape, colour, size and place."""
    return [
        world.Thing(shape, colour, size, (column + 0.5) * world.CELL, (row + 0.5) * world.CELL)
        for shape in world.SHAPES
        for colour in world.COLOURS
        for size in world.SIZES
        for row in range(3)
        for column in range(3)
    ]


def tell(scene: world.Scene, rng: random.Random, told: str) -> str:
    """The scene in words, one of four ways, so that the base learns to read and not to match.

    Two are prose, for `told` "any" only. Two are shorthand with one word a thing: a list ("list"
    tells this way alone), and a raster of 6 x 6 words in which a thing fills some of the four
    places of its cell. Reading a raster takes what reading patches takes: find the word that fits,
    count things and not words, skip what is empty.
    """
    if told == "any" and rng.random() < 0.2:
        if rng.random() < 0.5:
            return world.describe(scene)
        phrases = [f"{t.place}: {t.size} {t.colour} {t.shape}" for t in scene.things]
        return "; ".join(phrases) + "."
    if told == "list" or rng.random() < 0.25:
        return " ".join(code_word(thing) for thing in scene.things)
    raster = [EMPTY] * 36
    for thing in scene.things:
        corner = 12 * thing.row + 2 * thing.column
        places = [corner, corner + 1, corner + 6, corner + 7]
        for place in rng.sample(places, rng.randint(2, 4)):
            raster[place] = code_word(thing)
    return " ".join(raster)


@dataclass(frozen=True)
class Lesson:
    """One part of the base's curriculum: how scenes are told, what is asked, how many turns.

    Without `kinds` everything is asked, descriptions and two-step questions too.
    """

    told: str
    kinds: tuple[str, ...]
    turns: int


# Looking up one attribute by another is what every other kind builds on, and it is learnt at once
# or hardly at all: asked alone, about a short list, "colour" is right after 400 steps; with all
# kinds asked from the start it takes ten thousand (benchmarks/RESULTS.md). So the kinds come one
# after another, simplest first (curriculum learning, Bengio et al. 2009).
LOOK_UPS = ("colour", "shape", "size", "position")
LESSONS = (
    Lesson("list", ("colour",), 4),
    Lesson("list", ("colour", "shape"), 8),
    Lesson("list", LOOK_UPS, 10),
    Lesson("shorthand", LOOK_UPS, 10),
    Lesson("list", ("left_of", "above"), 10),
    Lesson("list", ("left_of", "above", "count_by_property", "existence"), 10),
    Lesson("shorthand", world.KINDS, 10),
    Lesson("any", (), 10),
)
PASSED = 90.0  # percent of its own questions that ends a lesson


def text_conversation(rng: random.Random, lesson: Lesson) -> list[tuple[str, str, str]]:
    """(kind, user text, answer) turns about one scene; the first user turn tells the scene."""
    exchanges: list[tuple[str, str, str]] = []
    while not exchanges:
        scene = world.make_scene(rng, "all")
        if not lesson.kinds:
            exchanges = world.ask_many(scene, rng, lesson.turns)
        elif len(scene.things) > 1:  # one thing alone leaves nothing to tell apart
            asked = [
                world.ask(scene, rng.choice(lesson.kinds), rng) for _ in range(3 * lesson.turns)
            ]
            unique = {exchange[1]: exchange for exchange in asked if exchange is not None}
            exchanges = list(unique.values())[: lesson.turns]
    if not lesson.kinds:
        two_step = world.ask(scene, world.TWO_STEP, rng)
        if two_step is not None and rng.random() < 0.7:
            exchanges.insert(rng.randint(0, len(exchanges)), two_step)
        if rng.random() < 0.2:
            exchanges.insert(rng.randint(0, len(exchanges)), world.detail(scene, rng))
    kind, question, answer = exchanges[0]
    told = tell(scene, rng, lesson.told)
    # The lessons tell first and ask then, as do half of the conversations that follow them.
    first = f"{told}\n{question}"
    if not lesson.kinds and rng.random() < 0.5:
        first = f"{question}\n{told}"
    return [(kind, first, answer), *exchanges[1:]]


def four_batches(
    encoder: Encoder, lesson: int, step: int, batch: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Padded ids and turn numbers of four batches, sorted by length so that little is padding.
    About one conversation in eight is from an earlier lesson: what was learnt is kept."""
    pool = []
    for index in range(4 * batch):
        rng = random.Random(f"{SEED}/base/{step}/{index}")
        drawn = lesson if rng.random() < 0.85 else rng.randint(0, lesson)
        pool.append(encoder.render(text_conversation(rng, LESSONS[drawn])))
    pool.sort(key=lambda row: len(row[0]))
    batches = [pool[i * batch : (i + 1) * batch] for i in range(4)]
    random.Random(f"{SEED}/base/{step}").shuffle(batches)
    return [pad_batch(rows) for rows in batches]


# -- tokenizer ------------------------------------------------------------------------------------


def build_tokenizer(out: Path, shorthand: bool) -> None:
    """A byte-fallback BPE of Phi-3.5's make: same normaliser, decoder, specials and flags.

    With `shorthand` every code word is one token; the CLIP reads captions only and needs none.
    """
    rng = random.Random(f"{SEED}/tokenizer")
    corpus = []
    for _ in range(4000):
        scene = world.make_scene(rng, "all")
        corpus.append(world.describe(scene))
        for _, question, answer in world.ask_many(scene, rng, 9):
            corpus += [question, answer]
    corpus += [EMPTY] * 100
    corpus += [chr(code) for code in range(33, 127)] * 2
    things = every_thing() if shorthand else []
    corpus += [code_word(thing) for thing in things] * 8

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
    kept = 3 + 256 + len(PHI_SPECIALS)
    size = (VOCABULARY if shorthand else CAPTION_VOCABULARY) - kept
    learner.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=size, show_progress=False))
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
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "added_tokens_decoder": {
            str(index): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for index, token in sorted(tokenizer.get_added_tokens_decoder().items())
        },
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
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    cut = [code_word(t) for t in things if len(tokenizer.encode(code_word(t)).ids) != 1]
    if cut:
        raise RuntimeError(f"{len(cut)} code words are no single token, such as {cut[0]}")
    print(f"tokenizer: {tokenizer.get_vocab_size()} pieces")


# -- base -----------------------------------------------------------------------------------------


class Encoder:
    """Conversation -> (ids, supervised) in Phi-3.5's chat form; words are looked up once."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.memory: dict[str, list[int]] = {}
        self.id = self.tokenizer.token_to_id

    def __call__(self, text: str) -> list[int]:
        if len(self.memory) > 200_000:
            self.memory.clear()
        if text not in self.memory:
            self.memory[text] = self.tokenizer.encode(text).ids
        return self.memory[text]

    def render(self, turns: list[tuple[str, str, str]]) -> tuple[list[int], list[int]]:
        ids, kinds = [], []
        for index, (_, text, answer) in enumerate(turns):
            prompt = [
                self.id("<|user|>"),
                *self(text),
                self.id("<|end|>"),
                self.id("<|assistant|>"),
            ]
            reply = [*self(answer), self.id("<|end|>")]
            ids += prompt + reply
            kinds += [-1] * len(prompt) + [index] * len(reply)
        return ids, kinds


def schedule(step: int, steps: int) -> float:
    """Warm-up over the first 4 %, then a cosine to 0."""
    warm = max(1, steps // 25)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + np.cos(np.pi * (step - warm) / max(1, steps - warm)))


@torch.no_grad()
def answer_accuracy(
    model: torch.nn.Module, encoder: Encoder, lesson: Lesson, count: int
) -> dict[str, float]:
    """Percent of answers whose every token is the most likely one, by kind, over fresh scenes."""
    model.eval()
    right, total = defaultdict(int), defaultdict(int)
    for index in range(0, count, 32):
        conversations = [
            text_conversation(random.Random(f"{SEED}/base-check/{index + i}"), lesson)
            for i in range(32)
        ]
        ids, turn = pad_batch([encoder.render(turns) for turns in conversations])
        with torch.autocast("cpu", torch.bfloat16):
            guess = model(input_ids=ids[:, :-1]).logits.argmax(-1)
        correct = guess == ids[:, 1:]
        for row, turns in enumerate(conversations):
            for number, (kind, _, _) in enumerate(turns):
                total[kind] += 1
                right[kind] += bool(correct[row][turn[row, 1:] == number].all())
    model.train()
    shares = {kind: 100 * right[kind] / total[kind] for kind in sorted(total)}
    one_step = [kind for kind in shares if kind in world.KINDS]
    shares["all_one_step"] = 100 * sum(right[k] for k in one_step) / sum(total[k] for k in one_step)
    return {kind: round(share, 2) for kind, share in shares.items()}


def build_base(out: Path, steps: int, batch: int, learning_rate: float) -> None:
    """The lessons one after another, each until it is passed, at a constant learning rate after a
    short warm-up; then `steps` of the last lesson, over which the rate falls to 0 (a cosine)."""
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(SEED)
    encoder = Encoder(out)
    config = Phi3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        # Many narrow heads: each is one more chance to hit on looking things up.
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        original_max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=encoder.id("<s>"),
        eos_token_id=encoder.id("<|endoftext|>"),
        pad_token_id=encoder.id("<|endoftext|>"),
        attn_implementation="sdpa",
        # 0.02 is meant for wide models: at this width attention would start out almost flat, and
        # looking things up would take thousands of steps to begin.
        initializer_range=0.07,
        # Half of each head is left unrotated: with 16 dimensions, matching by content needs
        # directions that do not turn with the distance.
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    )
    model = Phi3ForCausalLM(config).train()
    composed = ComposedEmbedding(model.model.embed_tokens, encoder)
    model.model.embed_tokens = composed
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    started, running, step, lesson, passed_at = time.time(), None, 0, 0, []
    bar = tqdm(desc="base", mininterval=10)
    last = len(LESSONS) - 1
    while lesson < last or step < passed_at[-1] + steps:
        done = 0.0 if lesson < last else (step - passed_at[-1]) / steps
        rate = learning_rate * min(1.0, (step + 1) / 40) * 0.5 * (1 + np.cos(np.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        if step % 4 == 0:
            batches = four_batches(encoder, lesson, step, batch)
        ids, turn = batches[step % 4]
        wanted = turn[:, 1:] >= 0
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
            logits = model.lm_head(hidden[wanted])
        loss = F.cross_entropy(logits.float(), ids[:, 1:][wanted])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        bar.update()
        bar.set_postfix(lesson=lesson, loss=f"{running:.4f}", refresh=False)
        if step % 100 == 0 and (lesson < last or step % 500 == 0):
            accuracy = answer_accuracy(model, encoder, LESSONS[lesson], 64)
            print(f"\nstep {step}, lesson {lesson}: loss {running:.4f}, {accuracy}", flush=True)
            save_base(model, composed, out)
            if lesson < last and accuracy["all_one_step"] >= PASSED:
                lesson += 1
                passed_at.append(step)
    save_base(model, composed, out)
    accuracy = answer_accuracy(model, encoder, LESSONS[last], 960)
    report(
        out,
        steps=step,
        lessons_passed_at=passed_at,
        batch=batch,
        seconds=round(time.time() - started),
        parameters=sum(p.numel() for p in model.parameters()),
        loss=running,
        exact_answers_percent=accuracy,
    )


def save_base(model: torch.nn.Module, composed: ComposedEmbedding, out: Path) -> None:
    """As a plain Phi-3 in bfloat16: the composed embedding becomes the table it amounts to."""
    from transformers import Phi3ForCausalLM

    state = {name: t for name, t in model.state_dict().items() if "embed_tokens" not in name}
    state["model.embed_tokens.weight"] = composed.table().detach()
    plain = Phi3ForCausalLM(model.config)
    plain.load_state_dict(state, strict=True)
    plain.to(torch.bfloat16).save_pretrained(out)


# -- CLIP -----------------------------------------------------------------------------------------


def one_changed(scene: world.Scene, rng: random.Random) -> world.Scene:
    """The same scene with one attribute or one place of one thing changed: a hard negative."""
    index = rng.randrange(len(scene.things))
    thing = scene.things[index]
    values = {
        "shape": thing.shape,
        "colour": thing.colour,
        "size": thing.size,
        "x": thing.x,
        "y": thing.y,
    }
    while True:
        changed = dict(values)
        what = rng.choice(("shape", "colour", "size", "place"))
        if what == "place":
            row, column = rng.randrange(3), rng.randrange(3)
            changed["x"], changed["y"] = (column + 0.5) * world.CELL, (row + 0.5) * world.CELL
        else:
            options = {
                "shape": world.SHAPES,
                "colour": list(world.COLOURS),
                "size": list(world.SIZES),
            }[what]
            changed[what] = rng.choice(options)
        other = world.Thing(**changed)
        taken = {t.place for i, t in enumerate(scene.things) if i != index}
        if (
            other.phrase() != thing.phrase()
            and other.place not in taken
            and other.pair not in world.HELD_OUT_PAIRS
        ):
            things = [*scene.things[:index], other, *scene.things[index + 1 :]]
            things.sort(key=lambda t: (t.row, t.column, t.x))
            return world.Scene(tuple(things), scene.background)


def all_phrases(pairs: list[tuple[str, str]]) -> list[str]:
    return [
        f"a {size} {colour} {shape} in the {place}"
        for shape, colour in pairs
        for size in world.SIZES
        for row in world.PLACES
        for place in row
    ]


def draw_many(split: str, count: int, pairs: str) -> tuple[list[world.Scene], torch.Tensor]:
    """Scenes and their pictures, (count, 3, 96, 96) uint8."""
    scenes, pixels = [], torch.empty(count, 3, world.PIXELS, world.PIXELS, dtype=torch.uint8)
    for index in tqdm(range(count), desc=f"drawing {split}", mininterval=10):
        scene = world.make_scene(random.Random(f"{SEED}/clip-{split}/{index}"), pairs)
        scenes.append(scene)
        pixels[index] = torch.from_numpy(np.array(world.draw(scene))).permute(2, 0, 1)
    return scenes, pixels


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    mean = torch.tensor(IMAGE_MEAN).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / torch.tensor(IMAGE_STD).view(3, 1, 1)


class ClipTrainer:
    """Two contrasts: the picture against whole captions, and its patches against short phrases.

    The first is CLIP's own (arXiv 2103.00020) with captions that differ in one attribute or place
    as extra negatives (NegCLIP, arXiv 2210.01936). The second lets the best patch answer for the
    picture (late interaction, FILIP, arXiv 2111.07783), against every phrase that is not true of
    it: it is what makes patch features say what is where.
    """

    def __init__(self, model: torch.nn.Module, encode: Encoder) -> None:
        self.model, self.encode = model, encode
        self.end = encode.id("<|endoftext|>")

    def tokens(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [[*self.encode(caption), self.end] for caption in captions]
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.end)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for row, values in enumerate(rows):
            ids[row, : len(values)] = torch.tensor(values)
            mask[row, : len(values)] = 1
        return ids, mask

    def text(self, captions: list[str]) -> torch.Tensor:
        ids, mask = self.tokens(captions)
        pooled = self.model.text_model(input_ids=ids, attention_mask=mask).pooler_output
        return F.normalize(self.model.text_projection(pooled).float(), dim=-1)

    def pictures(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(pictures, dim) of the whole and (pictures, patches, dim) of the patches, unit length."""
        vision = self.model.vision_model
        output = vision(pixel_values=normalise(pixels))
        patches = vision.post_layernorm(output.last_hidden_state[:, 1:])
        project = self.model.visual_projection
        return (
            F.normalize(project(output.pooler_output).float(), dim=-1),
            F.normalize(project(patches).float(), dim=-1),
        )

    def phrase_scores(self, patches: torch.Tensor, phrases: torch.Tensor) -> torch.Tensor:
        """(pictures, phrases): a soft maximum over the patches."""
        scale = self.model.logit_scale.exp()
        return torch.logsumexp(scale * patches @ phrases.T, dim=1)

    def loss(
        self,
        scenes: list[world.Scene],
        pixels: torch.Tensor,
        phrase_texts: list[str],
        phrase_index: dict[str, int],
        rng: random.Random,
    ) -> tuple[torch.Tensor, dict]:
        count = len(scenes)
        with torch.autocast("cpu", torch.bfloat16):
            captions = [world.describe(scene) for scene in scenes]
            captions += [world.describe(one_changed(scene, rng)) for scene in scenes]
            texts, phrases = self.text(captions), self.text(phrase_texts)
            whole, patches = self.pictures(pixels)
        scale = self.model.logit_scale.exp()
        to_text = scale * whole @ texts.T  # (pictures, 2 x pictures)
        target = torch.arange(count)
        whole_loss = (
            F.cross_entropy(to_text, target) + F.cross_entropy(to_text[:, :count].T, target)
        ) / 2

        scores = self.phrase_scores(patches, phrases)
        true = torch.zeros_like(scores, dtype=torch.bool)
        for row, scene in enumerate(scenes):
            true[row, [phrase_index[thing.phrase()] for thing in scene.things]] = True
        row, column = true.nonzero(as_tuple=True)
        others = scores.masked_fill(true, float("-inf")).logsumexp(dim=1)  # untrue phrases only
        own = scores[row, column]
        phrase_loss = (torch.logaddexp(others[row], own) - own).mean()
        return whole_loss + phrase_loss, {"whole": whole_loss.item(), "phrase": phrase_loss.item()}

    @torch.no_grad()
    def check(self, scenes: list[world.Scene], pixels: torch.Tensor) -> dict[str, float]:
        """Percent right: phrases ranked above every untrue one; captions above a changed twin."""
        rng = random.Random(f"{SEED}/clip-check")
        every_pair = [(s, c) for s in world.SHAPES for c in world.COLOURS]
        texts = all_phrases(every_pair)
        index = {text: i for i, text in enumerate(texts)}
        phrases = self.text(texts)
        right = total = twin = 0
        for start in range(0, len(scenes), 100):
            part = scenes[start : start + 100]
            whole, patches = self.pictures(pixels[start : start + 100])
            scores = self.phrase_scores(patches, phrases)
            captions = self.text([world.describe(s) for s in part])
            changed = self.text([world.describe(one_changed(s, rng)) for s in part])
            twin += ((whole * captions).sum(1) > (whole * changed).sum(1)).sum().item()
            for row, scene in enumerate(part):
                own = [index[thing.phrase()] for thing in scene.things]
                others = scores[row].clone()
                others[own] = float("-inf")
                right += (scores[row, own] > others.max()).sum().item()
                total += len(own)
        return {
            "phrases": round(100 * right / total, 2),
            "caption_over_changed": round(100 * twin / len(scenes), 2),
        }


def build_clip(out: Path, steps: int, batch: int, learning_rate: float, pictures: int) -> None:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(SEED)
    build_tokenizer(out, shorthand=False)
    encode = Encoder(out)
    end = encode.id("<|endoftext|>")
    config = CLIPConfig(
        text_config={
            "vocab_size": CAPTION_VOCABULARY,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "max_position_embeddings": 64,
            "bos_token_id": encode.id("<s>"),
            "eos_token_id": end,
            "pad_token_id": end,
            "projection_dim": 96,
        },
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": world.PIXELS,
            "patch_size": 16,
            "projection_dim": 96,
        },
        projection_dim=96,
    )
    model = CLIPModel(config).train()
    with torch.no_grad():
        model.logit_scale.fill_(np.log(14.0))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.02
    )
    trainer = ClipTrainer(model, encode)
    scenes, pixels = draw_many("train", pictures, "seen")
    checks = {
        "held_out": draw_many("held-out", 400, "seen"),
        "novel_pairs": draw_many("novel", 400, "novel"),
    }
    seen_pairs = [
        (s, c) for s in world.SHAPES for c in world.COLOURS if (s, c) not in world.HELD_OUT_PAIRS
    ]
    phrase_texts = all_phrases(seen_pairs)
    phrase_index = {text: i for i, text in enumerate(phrase_texts)}
    started = time.time()
    rng = random.Random(f"{SEED}/clip")
    for step in (bar := tqdm(range(steps), desc="clip", mininterval=10)):
        chosen = [rng.randrange(pictures) for _ in range(batch)]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(step, steps)
        loss, parts = trainer.loss(
            [scenes[i] for i in chosen], pixels[chosen], phrase_texts, phrase_index, rng
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=np.log(100.0))
        bar.set_postfix(parts, refresh=False)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            model.eval()
            accuracy = {name: trainer.check(*pair) for name, pair in checks.items()}
            model.train()
            print(f"\nclip step {step + 1}: {parts} {accuracy}", flush=True)
            model.half().save_pretrained(out)
            model.float()
    preprocessor = {
        "crop_size": {"height": world.PIXELS, "width": world.PIXELS},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(IMAGE_STD),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": world.PIXELS},
    }
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=1))
    report(
        out,
        steps=steps,
        batch=batch,
        pictures=pictures,
        seconds=round(time.time() - started),
        parameters=sum(p.numel() for p in model.parameters()),
        percent_right=accuracy,
    )


def report(out: Path, **facts: object) -> None:
    facts |= {"seed": SEED, "torch": torch.__version__, "threads": torch.get_num_threads()}
    (out / "build_report.json").write_text(json.dumps(facts, indent=1))
    print(json.dumps(facts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "tiny")
    parser.add_argument("--only", choices=("tokenizer", "base", "clip", "whisper"))
    parser.add_argument("--base-steps", type=int, default=4500, help="of the last lesson")
    parser.add_argument("--base-batch", type=int, default=12)
    parser.add_argument("--base-lr", type=float, default=1e-3)
    parser.add_argument("--clip-steps", type=int, default=2400)
    parser.add_argument("--clip-batch", type=int, default=64)
    parser.add_argument("--clip-lr", type=float, default=1e-3)
    parser.add_argument("--clip-pictures", type=int, default=24000)
    parser.add_argument("--whisper-steps", type=int, default=2800)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.only in (None, "tokenizer"):
        build_tokenizer(options.out / "phi3", shorthand=True)
    if options.only in (None, "base"):
        build_base(options.out / "phi3", options.base_steps, options.base_batch, options.base_lr)
    if options.only in (None, "clip"):
        build_clip(
            options.out / "clip",
            options.clip_steps,
            options.clip_batch,
            options.clip_lr,
            options.clip_pictures,
        )
    if options.only in (None, "whisper"):
        build_whisper.build(
            options.out / "whisper", ROOT / "cache" / "speech", options.whisper_steps
        )


if __name__ == "__main__":
    run_main(main)
