"""The tiny preset's Whisper in training: its vocabulary, spectrograms, model and file."""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from files import whole_file
from tools.padding import pad_batch
from tools.tiny.utterances import words_of

HOP = 160  # samples of a mel frame
DIMENSIONS = {
    "n_mels": 80,
    "n_audio_ctx": 1500,
    "n_audio_state": 128,
    "n_audio_head": 4,
    "n_audio_layer": 4,
    "n_vocab": 51864,  # English only: no language tokens
    "n_text_ctx": 96,  # half of it may be answer: the longest question has 14 tokens
    "n_text_state": 128,
    "n_text_head": 4,
    "n_text_layer": 2,
}
# -- batches --------------------------------------------------------------------------------------


class Vocabulary:
    """The tokens that are ever said, of the 51,864 of Whisper's English tokenizer."""

    def __init__(self, texts: list[str]) -> None:
        from whisper.tokenizer import get_tokenizer

        self.tokenizer = get_tokenizer(multilingual=False)
        special = self.tokenizer
        self.start, self.plain = special.sot, special.no_timestamps
        self.end, self.none = special.eot, special.no_speech
        said = {token for text in texts for token in self.encode(text)}
        self.used = sorted(said | {self.start, self.plain, self.end, self.none})
        self.place = {token: place for place, token in enumerate(self.used)}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(" " + text)

    def rows(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """(rows, length) inputs and targets as places in `used`; -1 is not a target. The text ""
        is no speech: the first target says so, and the text that follows is empty."""
        rows = []
        for text in texts:
            tokens = [self.start, self.plain, *(self.encode(text) if text else []), self.end]
            targets = [self.plain if text else self.none, *tokens[2:]]
            rows.append(([self.place[t] for t in tokens[:-1]], [self.place[t] for t in targets]))
        return pad_batch(rows)


def log_mels(sounds: list[np.ndarray], filters: Tensor) -> tuple[Tensor, Tensor]:
    """Whisper's log-mel spectrogram of a batch: (rows, 80, frames), and (rows,) the value of the
    silence with which it goes on. The frames end at least 12 after the longest sound."""
    samples = max(map(len, sounds)) + 12 * HOP
    samples = (samples // (20 * HOP) + 1) * 20 * HOP
    padded = torch.zeros(len(sounds), samples)
    for row, sound in enumerate(sounds):
        padded[row, : len(sound)] = torch.from_numpy(sound)
    spectrum = torch.stft(padded, 400, HOP, window=torch.hann_window(400), return_complex=True)
    power = torch.view_as_real(spectrum[..., :-1]).square().sum(-1)
    mels = torch.clamp(filters @ power, min=1e-10).log10()
    loudest = mels.amax((1, 2), keepdim=True)
    mels = (torch.maximum(mels, loudest - 8.0) + 4.0) / 4.0
    silence = (torch.clamp(loudest - 8.0, min=-10.0) + 4.0) / 4.0
    return mels, silence[:, 0, 0]


CHARACTERS = " abcdefghijklmnopqrstuvwxyz"


def spelled(texts: list[str]) -> tuple[Tensor, Tensor]:
    """(rows, length) letters, 0 is the blank and 1 the space; (rows,) their numbers."""
    rows = [
        torch.tensor([CHARACTERS.index(c) + 1 for c in " ".join(words_of(text))]) for text in texts
    ]
    lengths = torch.tensor([len(row) for row in rows])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths


# -- the model in training ------------------------------------------------------------------------


class Listener(torch.nn.Module):
    """Whisper's own modules, with a forward pass that leaves out what a short sound never uses.

    Two things make it cheap and change nothing of what is computed, but for sampling. After the
    sound come up to 28 seconds of silence whose places all hold the same value plus their position:
    a few of them, drawn anew for each batch, stand for all, and attention counts each as many
    times as it stands for. And of the 51,864 tokens only those ever said have a row of their own;
    all others share one, so one logit stands for theirs.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        from whisper.model import ModelDimensions, Whisper

        super().__init__()
        self.vocabulary = vocabulary
        self.whisper = Whisper(ModelDimensions(**DIMENSIONS))
        state = DIMENSIONS["n_text_state"]
        del self.whisper.decoder.token_embedding  # comes back, composed, in `state`
        self.rows = torch.nn.Parameter(torch.randn(len(vocabulary.used), state) * 0.05)
        self.other = torch.nn.Parameter(torch.zeros(state))
        self.letters = torch.nn.Linear(state, len(CHARACTERS) + 1)  # for training only
        torch.nn.init.normal_(self.whisper.decoder.positional_embedding, std=0.02)
        with torch.no_grad():  # else the positions, which never change, drown what is heard
            self.whisper.encoder.conv1.weight *= 3
            self.whisper.encoder.conv2.weight *= 3

    def state(self) -> dict[str, Tensor]:
        """The state dictionary of a plain Whisper."""
        table = self.other.detach().repeat(DIMENSIONS["n_vocab"], 1)
        table[self.vocabulary.used] = self.rows.detach()
        return {**self.whisper.state_dict(), "decoder.token_embedding.weight": table}

    def encode(self, mels: Tensor, silence: Tensor, stand_ins: int = 32) -> tuple[Tensor, Tensor]:
        """(rows, places, state) and (places,) log of how many places each stands for."""
        encoder = self.whisper.encoder
        positions = encoder.positional_embedding
        x = self._convolve(mels)  # (rows, frames / 2, state)
        heard = x.shape[1]
        tail = self._convolve(silence[:, None, None].expand(-1, 80, 12))[:, 3:4]
        stand_ins = min(stand_ins, len(positions) - heard)
        chosen = heard + torch.randperm(len(positions) - heard)[:stand_ins]
        x = torch.cat([x + positions[:heard], tail + positions[chosen]], 1)
        weight = torch.zeros(x.shape[1])
        weight[heard:] = math.log((len(positions) - heard) / stand_ins)
        for block in encoder.blocks:
            x = x + attend(block.attn, block.attn_ln(x), None, weight)
            x = x + block.mlp(block.mlp_ln(x))
        return encoder.ln_post(x), weight

    def _convolve(self, mels: Tensor) -> Tensor:
        encoder = self.whisper.encoder
        return F.gelu(encoder.conv2(F.gelu(encoder.conv1(mels)))).transpose(1, 2)

    def decode(self, tokens: Tensor, heard: Tensor, weight: Tensor) -> Tensor:
        """(rows, length) places in the vocabulary -> (rows, length, used + 1) logits; the last
        stands for all tokens that are never said."""
        decoder = self.whisper.decoder
        x = F.embedding(tokens, self.rows) + decoder.positional_embedding[: tokens.shape[1]]
        for block in decoder.blocks:
            x = x + attend(block.attn, block.attn_ln(x), None, None, causal=True)
            x = x + attend(block.cross_attn, block.cross_attn_ln(x), heard, weight)
            x = x + block.mlp(block.mlp_ln(x))
        x = decoder.ln(x)
        logits = (x @ torch.cat([self.rows, self.other[None]]).T).float()
        others = math.log(DIMENSIONS["n_vocab"] - len(self.rows))
        return torch.cat([logits[..., :-1], logits[..., -1:] + others], -1)

    def forward(self, mels: Tensor, silence: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        """(text loss, spelling loss): cross-entropy a token, and CTC (Graves et al. 2006) a letter
        over the encoder's output, which teaches it at once where each sound is."""
        heard, weight = self.encode(mels, silence)
        inputs, targets = self.vocabulary.rows(texts)
        logits = self.decode(inputs, heard, weight)
        text_loss = F.cross_entropy(
            logits[targets >= 0], targets[targets >= 0], label_smoothing=0.02
        )
        frames = mels.shape[2] // 2
        letters = self.letters(heard[:, :frames]).float().log_softmax(-1)
        wanted, lengths = spelled(texts)
        spelling_loss = F.ctc_loss(
            letters.transpose(0, 1),
            wanted,
            torch.full((len(texts),), frames),
            lengths,
            zero_infinity=True,
            reduction="sum",
        ) / lengths.sum().clamp(min=1)
        return text_loss, spelling_loss


class Attention(Protocol):
    """What is used of Whisper's MultiHeadAttention."""

    n_head: int
    query: torch.nn.Linear
    key: torch.nn.Linear
    value: torch.nn.Linear
    out: torch.nn.Linear


def attend(
    attention: Attention,
    x: Tensor,
    memory: Tensor | None,
    weight: Tensor | None,
    causal: bool = False,
) -> Tensor:
    """Whisper's attention; `weight` (keys,) is added to the scores of each key."""
    source = x if memory is None else memory

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(2, (attention.n_head, -1)).transpose(1, 2)

    # Written out: torch's fused attention takes eight times as long backwards on a CPU.
    query = heads(attention.query(x))
    scores = query @ heads(attention.key(source)).transpose(2, 3) * query.shape[3] ** -0.5
    if weight is not None:
        scores = scores + weight.to(scores.dtype)
    if causal:
        later = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    out = scores.softmax(-1).to(query.dtype) @ heads(attention.value(source))
    return attention.out(out.transpose(1, 2).flatten(2))


def save(listener: Listener, path: Path) -> None:
    """In Whisper's own layout, float16. The rows of never-said tokens are all alike, so the zip
    that a `.pt` is gets compressed: 3 MB instead of 17. `torch.load` reads either."""
    state = {
        name: t.detach().half() if t.is_floating_point() else t
        for name, t in listener.state().items()
    }
    plain = io.BytesIO()
    torch.save({"dims": DIMENSIONS, "model_state_dict": state}, plain)
    with (
        whole_file(path) as temporary,
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(temporary, "w") as target,
    ):
        for entry in source.infolist():
            dated = zipfile.ZipInfo(entry.filename, (1980, 1, 1, 0, 0, 0))
            target.writestr(dated, source.read(entry), zipfile.ZIP_DEFLATED, 9)
