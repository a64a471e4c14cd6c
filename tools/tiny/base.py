"""The tiny preset's base: a Phi-3 that learns to read scenes told in words, lesson by lesson."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import Phi3Config, Phi3ForCausalLM

from data import world
from tools.padding import pad_batch
from tools.tiny.report import SEED, write_report
from tools.tiny.tokenizer import VOCABULARY, Encoder
from tools.tiny.told import LESSONS, PASSED, Lesson, code_word, every_thing, text_conversation


class ComposedEmbedding(torch.nn.Module):
    """Token embedding in which a code word is the sum of the words it is made of (as in fastText,
    arXiv 1607.04606): what is learnt about one red thing is learnt about all. `table()` is the
    plain embedding that it amounts to, and that is saved."""

    codes: torch.Tensor  # (code words,) their ids
    words: torch.Tensor  # (words,) the ids of the words that they are made of
    sums: torch.Tensor  # (code words, words) how often each word stands in a code word

    def __init__(self, embedding: torch.nn.Embedding, encode: Encoder) -> None:
        super().__init__()
        self.embedding = embedding
        things = every_thing()
        words = [
            [encode(word)[0] for word in (t.size, t.colour, t.shape, *t.place.split())]
            for t in things
        ]
        used = sorted({word for row in words for word in row})
        sums = torch.zeros(len(things), len(used))
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
    return batches_of_pool(pool, batch, f"{SEED}/base/{step}")


def batches_of_pool(
    pool: list[tuple[list[int], list[int]]], batch: int, seed: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Four batches of rendered conversations of about one length each, in a drawn order."""
    pool = sorted(pool, key=lambda row: len(row[0]))
    batches = [pool[i * batch : (i + 1) * batch] for i in range(4)]
    random.Random(seed).shuffle(batches)
    return [pad_batch(rows) for rows in batches]


@torch.no_grad()
def answer_accuracy(
    model: torch.nn.Module, encoder: Encoder, lesson: Lesson, count: int
) -> dict[str, float]:
    """Percent of answers whose every token is the most likely one, by kind, over fresh scenes."""
    model.eval()
    right: dict[str, int] = defaultdict(int)
    total: dict[str, int] = defaultdict(int)
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


def base_config(encoder: Encoder) -> Phi3Config:
    return Phi3Config(
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


def answer_loss(model: Phi3ForCausalLM, ids: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the tokens of answers; `ids` and `turn` are (rows, length)."""
    wanted = turn[:, 1:] >= 0
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
        logits = model.lm_head(hidden[wanted])
    return F.cross_entropy(logits.float(), ids[:, 1:][wanted])


def build_base(out: Path, steps: int, batch: int, learning_rate: float) -> None:
    """The lessons one after another, each until it is passed, at a constant learning rate after a
    short warm-up; then `steps` of the last lesson, over which the rate falls to 0 (a cosine)."""
    torch.manual_seed(SEED)
    encoder = Encoder(out)
    model = Phi3ForCausalLM(base_config(encoder)).train()
    composed = ComposedEmbedding(model.model.embed_tokens, encoder)
    model.model.embed_tokens = composed
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    started, running, step, lesson = time.time(), None, 0, 0
    passed_at: list[int] = []
    bar = tqdm(desc="base", mininterval=10)
    last = len(LESSONS) - 1
    while lesson < last or step < passed_at[-1] + steps:
        done = 0.0 if lesson < last else (step - passed_at[-1]) / steps
        rate = learning_rate * min(1.0, (step + 1) / 40) * 0.5 * (1 + np.cos(np.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        if step % 4 == 0:
            batches = four_batches(encoder, lesson, step, batch)
        loss = answer_loss(model, *batches[step % 4])
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
    write_report(
        out,
        steps=step,
        lessons_passed_at=passed_at,
        batch=batch,
        seconds=round(time.time() - started),
        parameters=sum(p.numel() for p in model.parameters()),
        loss=running,
        exact_answers_percent=accuracy,
    )


def save_base(model: Phi3ForCausalLM, composed: ComposedEmbedding, out: Path) -> None:
    """As a plain Phi-3 in bfloat16: the composed embedding becomes the table it amounts to."""
    state = {name: t for name, t in model.state_dict().items() if "embed_tokens" not in name}
    state["model.embed_tokens.weight"] = composed.table().detach()
    plain = Phi3ForCausalLM(model.config)
    plain.load_state_dict(state, strict=True)
    encoder = Encoder(out)
    ends = [encoder.id("<|endoftext|>"), encoder.id("<|end|>")]  # the second ends a turn
    plain.generation_config.eos_token_id = ends
    plain.bfloat16().save_pretrained(out)
