"""llama.cpp itself, asked through llama-cpp-python's bindings of its C functions.

    python -m exports.llama_cpp.reference QUESTIONS.json ANSWERS.npz
    python -m exports.llama_cpp.reference '{"quantise": …, "to": …, "as": "Q4_K_M"}'

A process of its own, under an interpreter that has `llama_cpp` and numpy and need not have torch:
llama.cpp ends a process where it meets a file that it does not like, and brings an OpenMP of its
own. `exports/llama_cpp/asked.py` starts it, and says what both files hold.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PIECE = 512  # tokens that are fed at once


class Model:
    """A GGUF, its `mmproj` if there is one, and a context for one conversation at a time, with
    llama.cpp's own defaults."""

    def __init__(self, path: str, mmproj: str | None, context: int, threads: int) -> None:
        import llama_cpp

        self.lib, self.threads = llama_cpp, threads
        # Errors alone: the lines of a start would be hundreds.
        self.told = llama_cpp.llama_log_callback(self._tell)  # must live as long as the library
        llama_cpp.llama_log_set(self.told, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise SystemExit(f"{path}: llama.cpp does not load it")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch = context, PIECE
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise SystemExit(f"{path}: llama.cpp makes no context of {context} tokens")
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.words = llama_cpp.llama_vocab_n_tokens(self.vocabulary)
        self.width = llama_cpp.llama_model_n_embd(self.model)
        self.batch = llama_cpp.llama_batch_init(PIECE, 0, 1)  # of tokens
        self.eyes = Eyes(self, mmproj) if mmproj else None

    @staticmethod
    def _tell(level: int, text: bytes, data: object) -> None:
        if level == 4:  # an error
            sys.stderr.buffer.write(text)

    def ids_of(self, text: str) -> list[int]:
        """Token ids of a text in which marks are marks."""
        data = text.encode()
        room = len(data) + 8
        ids = (self.lib.llama_token * room)()
        count = self.lib.llama_tokenize(self.vocabulary, data, len(data), ids, room, False, True)
        return list(ids[:count])

    def restart(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def feed(self, ids: Sequence[int], start: int, wanted: Sequence[bool]) -> list[np.ndarray]:
        """Feed tokens from position `start` on; the logits, (words,) float32, behind those that
        are wanted."""
        found = []
        for first in range(0, len(ids), PIECE):
            piece = range(first, min(first + PIECE, len(ids)))
            for index, place in enumerate(piece):
                self.batch.token[index], self.batch.pos[index] = ids[place], start + place
                self.batch.n_seq_id[index], self.batch.seq_id[index][0] = 1, 0
                self.batch.logits[index] = wanted[place]
            self.batch.n_tokens = len(piece)
            self._decode(self.batch)
            for index, place in enumerate(piece):
                if wanted[place]:
                    logits = self.lib.llama_get_logits_ith(self.context, index)
                    found.append(np.ctypeslib.as_array(logits, shape=(self.words,)).copy())
        return found

    def feed_embeddings(self, embeddings: np.ndarray, start: int) -> None:
        """Feed (tokens, width) embeddings of a picture from position `start` on."""
        for first in range(0, len(embeddings), PIECE):
            piece = np.ascontiguousarray(embeddings[first : first + PIECE], dtype=np.float32)
            batch = self.lib.llama_batch_init(len(piece), self.width, 1)
            try:
                ctypes.memmove(batch.embd, piece.ctypes.data, piece.nbytes)
                for index in range(len(piece)):
                    batch.pos[index], batch.logits[index] = start + first + index, False
                    batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
                batch.n_tokens = len(piece)
                self._decode(batch)
            finally:
                self.lib.llama_batch_free(batch)

    def _decode(self, batch: Any) -> None:
        if status := self.lib.llama_decode(self.context, batch):
            raise SystemExit(f"llama_decode ended with {status}")

    def read(
        self,
        ids: Sequence[int],
        pictures: Sequence[np.ndarray],
        image_id: int,
        wanted: Sequence[bool],
    ) -> list[np.ndarray]:
        """Feed a conversation from its beginning: token ids, and in place of each run of
        `image_id` of a picture's length its (tokens, width) embeddings."""
        self.restart()
        left, place, found = list(pictures), 0, []
        while place < len(ids):
            if ids[place] == image_id:
                picture = left.pop(0)
                self.feed_embeddings(picture, place)
                place += len(picture)
                continue
            end = place
            while end < len(ids) and ids[end] != image_id:
                end += 1
            found += self.feed(ids[place:end], place, wanted[place:end])
            place = end
        return found

    def answer(
        self, ids: Sequence[int], pictures: Sequence[np.ndarray], image_id: int, longest: int
    ) -> list[int]:
        """The greedy answer's ids, without the one that ends it."""
        [logits] = self.read(ids, pictures, image_id, [False] * (len(ids) - 1) + [True])
        made: list[int] = []
        while len(made) < longest:
            chosen = int(logits.argmax())
            if self.lib.llama_vocab_is_eog(self.vocabulary, chosen):
                break
            made.append(chosen)
            [logits] = self.feed([chosen], len(ids) + len(made) - 1, [True])
        return made


class Eyes:
    """llama.cpp's `mmproj`: pictures -> embeddings."""

    def __init__(self, model: Model, path: str) -> None:
        from llama_cpp import mtmd_cpp

        self.lib, self.width = mtmd_cpp, model.width
        settings = mtmd_cpp.mtmd_context_params_default()
        settings.use_gpu, settings.n_threads, settings.warmup = False, model.threads, False
        settings.print_timings = False
        self.told = model.told
        for setter in ("mtmd_log_set", "mtmd_helper_log_set"):
            if hasattr(mtmd_cpp, setter):
                getattr(mtmd_cpp, setter)(self.told, ctypes.c_void_p(0))
        self.context = mtmd_cpp.mtmd_init_from_file(path.encode(), model.model, settings)
        if not self.context:
            raise SystemExit(f"{path}: llama.cpp does not load it as mmproj")

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """(height, width, 3) bytes of any size -> (tokens, width) float32, prepared as llama.cpp
        prepares pictures."""
        lib = self.lib
        pixels = np.ascontiguousarray(pixels)
        data = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = lib.mtmd_bitmap_init(pixels.shape[1], pixels.shape[0], data)
        chunks = lib.mtmd_input_chunks_init()
        marker = lib.mtmd_default_marker()
        text = lib.mtmd_input_text()
        text.text, text.text_len, text.add_special, text.parse_special = (
            marker, len(marker), False, True,
        )  # fmt: skip
        try:
            bitmaps = (lib.mtmd_bitmap_p_ctypes * 1)(bitmap)
            if status := lib.mtmd_tokenize(self.context, chunks, ctypes.byref(text), bitmaps, 1):
                raise SystemExit(f"mtmd_tokenize ended with {status}")
            for number in range(lib.mtmd_input_chunks_size(chunks)):
                chunk = lib.mtmd_input_chunks_get(chunks, number)
                if lib.mtmd_input_chunk_get_type(chunk) != lib.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                    continue
                if status := lib.mtmd_encode_chunk(self.context, chunk):
                    raise SystemExit(f"mtmd_encode_chunk ended with {status}")
                count = lib.mtmd_input_chunk_get_n_tokens(chunk)
                made = lib.mtmd_get_output_embd(self.context)
                return np.ctypeslib.as_array(made, shape=(count, self.width)).copy()
            raise SystemExit("mtmd_tokenize gave no picture")
        finally:
            lib.mtmd_input_chunks_free(chunks)
            lib.mtmd_bitmap_free(bitmap)


def log_probability(logits: np.ndarray, token: int) -> float:
    """Of one token, in nats, from (words,) logits."""
    logits = logits.astype(np.float64)
    largest = logits.max()
    return float(logits[token] - largest - np.log(np.exp(logits - largest).sum()))


def of_supervised(
    model: Model,
    ids: Sequence[int],
    pictures: Sequence[np.ndarray],
    image_id: int,
    learnt: Sequence[bool],
) -> Iterator[float]:
    """The log-probability of every token of a conversation that is an answer's."""
    targets = [ids[place + 1] for place in range(len(ids) - 1) if learnt[place + 1]]
    found = model.read(ids[:-1], pictures, image_id, learnt[1:])
    return (log_probability(logits, target) for logits, target in zip(found, targets, strict=True))


def run(asked: dict[str, Any], pixels: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every answer as an array, by name; see `exports/llama_cpp/asked.py`."""
    model = Model(asked["model"], asked["mmproj"], asked["context"], asked["threads"])
    image_id = asked["image_id"]
    seen = {name: model.eyes(data) for name, data in pixels.items()} if model.eyes else {}
    made: dict[str, np.ndarray] = {f"embeddings/{name}": value for name, value in seen.items()}
    wrong = [n for n, (text, ids) in enumerate(asked["texts"]) if model.ids_of(text) != ids]
    made["wrong_texts"] = np.array(wrong, np.int64)
    for number, (ids, learnt, names) in enumerate(asked["conversations"]):
        pictures = [seen[name] for name in names]
        values = of_supervised(model, ids, pictures, image_id, learnt)
        made[f"conversation/{number}"] = np.array([*values], np.float64)
    for number, (ids, names) in enumerate(asked["questions"]):
        pictures = [seen[name] for name in names]
        answer = model.answer(ids, pictures, image_id, asked["longest"])
        made[f"answer/{number}"] = np.array(answer, np.int64)
    made["system"] = np.array(model.lib.llama_print_system_info().decode())
    made["version"] = np.array(model.lib.__version__)
    return made


def quantise(source: str, target: str, kind: str) -> None:
    """A GGUF of float16 with llama.cpp's own rounding, such as Q4_K_M."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    told = llama_cpp.llama_log_callback(Model._tell)
    llama_cpp.llama_log_set(told, ctypes.c_void_p(0))
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings)):
        free = shutil.disk_usage(Path(target).parent).free
        raise SystemExit(
            f"{source}: llama.cpp does not round it to {kind}, for which {free:,} bytes are free"
        )


def main() -> None:
    if len(sys.argv) == 2:
        asked = json.loads(sys.argv[1])
        quantise(asked["quantise"], asked["to"], asked["as"])
        return
    questions, answers = Path(sys.argv[1]), Path(sys.argv[2])
    asked = json.loads(questions.read_text(encoding="utf-8"))
    with np.load(asked["pixels"], allow_pickle=False) as pixels:
        made = run(asked, dict(pixels))
    np.savez(answers, allow_pickle=False, **made)


if __name__ == "__main__":
    main()
