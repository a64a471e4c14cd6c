"""The tiny preset's CLIP: it sees pictures and captions and never a question."""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel

from data import world
from tools.tiny.report import SEED, write_report
from tools.tiny.tokenizer import CAPTION_VOCABULARY, Encoder, build_tokenizer
from tools.tiny.told import every_thing

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's own
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
PAIRS = [(shape, colour) for shape in world.SHAPES for colour in world.COLOURS]
ATTRIBUTES = ("shape", "colour", "size")
UNLIKE = 70  # distance in RGB, 0 to 255 a channel, from which two colours are not alike


def one_changed(scene: world.Scene, rng: random.Random) -> world.Scene:
    """The same scene with one attribute or one place of one thing changed: a hard negative."""
    index = rng.randrange(len(scene.things))
    thing = scene.things[index]
    taken = {t.place for i, t in enumerate(scene.things) if i != index}
    while True:
        what = rng.choice(("shape", "colour", "size", "place"))
        if what == "place":
            row, column = rng.randrange(3), rng.randrange(3)
            other = replace(thing, x=(column + 0.5) * world.CELL, y=(row + 0.5) * world.CELL)
        elif what == "shape":
            other = replace(thing, shape=rng.choice(world.SHAPES))
        elif what == "colour":
            other = replace(thing, colour=rng.choice(list(world.COLOURS)))
        else:
            other = replace(thing, size=rng.choice(list(world.SIZES)))
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


def attribute_phrase(thing: world.Thing, attribute: str) -> str:
    """One attribute of a thing and its place: "a star in the top left", "a red object in ..."."""
    words = thing.shape if attribute == "shape" else f"{getattr(thing, attribute)} object"
    return f"{world.with_article(words)} in the {thing.place}"


def attribute_phrases(attribute: str) -> list[str]:
    """All that `attribute_phrase` can say."""
    return sorted({attribute_phrase(thing, attribute) for thing in every_thing()})


def unnamed_palette(rng: random.Random) -> dict[str, tuple[int, int, int]]:
    """A colour for every name that none of the named ones is like: a picture drawn with it shows
    what a shape is whatever its colour, and shows no held-out pair."""
    palette = {}
    for name in world.COLOURS:
        while True:
            red, green, blue = (rng.randrange(256) for _ in range(3))
            seen = min(red, green, blue) < 150  # against the background, which is bright
            if seen and all(
                math.dist((red, green, blue), named) > UNLIKE for named in world.COLOURS.values()
            ):
                break
        palette[name] = (red, green, blue)
    return palette


def draw_many(
    split: str, count: int, pairs: str, unnamed: bool = False
) -> tuple[list[world.Scene], torch.Tensor]:
    """Scenes and their pictures, (count, 3, 96, 96) uint8; `unnamed`: in other colours than the
    scenes say."""
    scenes, pixels = [], torch.empty(count, 3, world.PIXELS, world.PIXELS, dtype=torch.uint8)
    for index in tqdm(range(count), desc=f"drawing {split}", mininterval=10):
        rng = random.Random(f"{SEED}/clip-{split}/{index}")
        scene = world.make_scene(rng, pairs)
        scenes.append(scene)
        picture = world.draw(scene, unnamed_palette(rng) if unnamed else world.COLOURS)
        pixels[index] = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return scenes, pixels


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    mean = torch.tensor(IMAGE_MEAN).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / torch.tensor(IMAGE_STD).view(3, 1, 1)


class Phrases:
    """What patches are told apart by, in groups that are contrasted each by itself: whole things
    ("a big red star in the top left"), and one attribute and the place.

    A pair of shape and colour that no picture shows is in none of them. The attributes alone are
    what makes the features say shape and colour apart, so that a pair never shown is known by its
    parts.

    Attributes:
        texts: all of them.
        spans: group -> where in `texts` it lies.
    """

    def __init__(self) -> None:
        groups = {"thing": all_phrases([p for p in PAIRS if p not in world.HELD_OUT_PAIRS])}
        groups |= {attribute: attribute_phrases(attribute) for attribute in ATTRIBUTES}
        self.texts = [text for group in groups.values() for text in group]
        self.spans: dict[str, slice] = {}
        self._index: dict[str, dict[str, int]] = {}
        start = 0
        for name, group in groups.items():
            self.spans[name] = slice(start, start + len(group))
            self._index[name] = {text: i for i, text in enumerate(group)}
            start += len(group)

    def true_of(self, scenes: list[world.Scene], group: str) -> torch.Tensor:
        """(scenes, phrases of the group) bool: what is true of which scene."""
        index = self._index[group]
        true = torch.zeros(len(scenes), len(index), dtype=torch.bool)
        for number, scene in enumerate(scenes):
            for thing in scene.things:
                text = thing.phrase() if group == "thing" else attribute_phrase(thing, group)
                true[number, index[text]] = True
        return true


def phrase_loss(scores: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Every true phrase against all that are untrue of its picture; both (pictures, phrases)."""
    row, column = true.nonzero(as_tuple=True)
    others = scores.masked_fill(true, float("-inf")).logsumexp(dim=1)  # untrue phrases only
    own = scores[row, column]
    return (torch.logaddexp(others[row], own) - own).mean()


class ClipTrainer:
    """Two contrasts: the picture against whole captions, and its patches against short phrases.

    The first is CLIP's own (arXiv 2103.00020) with captions that differ in one attribute or place
    as extra negatives (NegCLIP, arXiv 2210.01936). The second lets the best patch answer for the
    picture (late interaction, FILIP, arXiv 2111.07783), against every phrase that is not true of
    it: it is what makes patch features say what is where.
    """

    def __init__(self, model: CLIPModel, encode: Encoder) -> None:
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
        unnamed: int,
        phrases: Phrases,
        rng: random.Random,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """All contrasts' losses, added, and each alone. The last `unnamed` pictures are in other
        colours than their scenes say: they are told of in words without a colour only."""
        named = len(scenes) - unnamed
        with torch.autocast("cpu", torch.bfloat16):
            captions = [world.describe(scene) for scene in scenes[:named]]
            captions += [world.describe(one_changed(scene, rng)) for scene in scenes[:named]]
            texts, of_phrases = self.text(captions), self.text(phrases.texts)
            whole, patches = self.pictures(pixels)
        losses = {"whole": self.caption_loss(whole[:named], texts)}
        scores = self.phrase_scores(patches, of_phrases)
        for name, span in phrases.spans.items():
            of = scenes if name in ("shape", "size") else scenes[:named]
            true = phrases.true_of(of, name)
            losses[name] = phrase_loss(scores[: len(of), span], true)
        total = torch.stack(list(losses.values())).sum()
        return total, {name: value.item() for name, value in losses.items()}

    def caption_loss(self, whole: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """CLIP's contrast; `texts` are the pictures' own captions and then the changed ones."""
        count = len(whole)
        to_text = self.model.logit_scale.exp() * whole @ texts.T  # (pictures, 2 x pictures)
        target = torch.arange(count)
        return (
            F.cross_entropy(to_text, target) + F.cross_entropy(to_text[:, :count].T, target)
        ) / 2

    @torch.no_grad()
    def check(self, scenes: list[world.Scene], pixels: torch.Tensor) -> dict[str, float]:
        """Percent right: phrases ranked above every untrue one; captions above a changed twin."""
        rng = random.Random(f"{SEED}/clip-check")
        texts = all_phrases(PAIRS)
        index = {text: i for i, text in enumerate(texts)}
        phrases = self.text(texts)
        right, total, twin = 0, 0, 0
        for start in range(0, len(scenes), 100):
            part = scenes[start : start + 100]
            whole, patches = self.pictures(pixels[start : start + 100])
            scores = self.phrase_scores(patches, phrases)
            captions = self.text([world.describe(s) for s in part])
            changed = self.text([world.describe(one_changed(s, rng)) for s in part])
            twin += int(((whole * captions).sum(1) > (whole * changed).sum(1)).sum())
            for row, scene in enumerate(part):
                own = [index[thing.phrase()] for thing in scene.things]
                others = scores[row].clone()
                others[own] = float("-inf")
                right += int((scores[row, own] > others.max()).sum())
                total += len(own)
        return {
            "phrases": round(100 * right / total, 2),
            "caption_over_changed": round(100 * twin / len(scenes), 2),
        }


def clip_config(encode: Encoder) -> CLIPConfig:
    end = encode.id("<|endoftext|>")
    return CLIPConfig(
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


def build_clip(out: Path, steps: int, batch: int, learning_rate: float, pictures: int) -> None:
    """Train on `pictures` scenes and save in the hub's layout, in float16."""
    torch.manual_seed(SEED)
    build_tokenizer(out, shorthand=False)
    encode = Encoder(out)
    model = CLIPModel(clip_config(encode)).train()
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
    others, other_pixels = draw_many("unnamed", pictures // 2, "all", unnamed=True)
    phrases = Phrases()
    started = time.time()
    rng = random.Random(f"{SEED}/clip")
    for step in (bar := tqdm(range(steps), desc="clip", mininterval=10)):
        chosen = [rng.randrange(pictures) for _ in range(batch)]
        more = [rng.randrange(len(others)) for _ in range(batch // 2)]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(step, steps)
        loss, parts = trainer.loss(
            [scenes[i] for i in chosen] + [others[i] for i in more],
            torch.cat([pixels[chosen], other_pixels[more]]),
            len(more),
            phrases,
            rng,
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=np.log(100.0))
        bar.set_postfix(parts, refresh=False)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            accuracy = checked_and_saved(trainer, checks, out)
            print(f"\nclip step {step + 1}: {parts} {accuracy}", flush=True)
    write_preprocessor(out)
    write_report(
        out,
        steps=steps,
        batch=batch,
        pictures=pictures,
        seconds=round(time.time() - started),
        parameters=sum(p.numel() for p in model.parameters()),
        percent_right=accuracy,
    )


def checked_and_saved(
    trainer: ClipTrainer, checks: dict[str, tuple[list[world.Scene], torch.Tensor]], out: Path
) -> dict[str, dict[str, float]]:
    """Save the model in float16; its accuracy on each set of pictures, measured before."""
    model = trainer.model
    model.eval()
    accuracy = {name: trainer.check(*pair) for name, pair in checks.items()}
    model.train()
    model.half().save_pretrained(out)
    model.float()  # as rounded: training goes on from what was saved
    return accuracy


def write_preprocessor(out: Path) -> None:
    """`preprocessor_config.json`, as transformers' CLIPImageProcessor reads it."""
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
    (out / "preprocessor_config.json").write_text(
        json.dumps(preprocessor, indent=1), encoding="utf-8", newline="\n"
    )


def schedule(step: int, steps: int) -> float:
    """Warm-up over the first 4 %, then a cosine to 0."""
    warm = max(1, steps // 25)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + np.cos(np.pi * (step - warm) / max(1, steps - warm)))
