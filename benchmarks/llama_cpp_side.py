"""llama.cpp's side of benchmarks/decode.py, through llama-cpp-python's bindings of its C functions.

    python -m benchmarks.llama_cpp_side '{"write": {…}}'      a GGUF of a shape, random weights
    python -m benchmarks.llama_cpp_side '{"requantise": …}'   a GGUF with its Q4_1 tensors in Q4_0
    python -m benchmarks.llama_cpp_side '{"measure": …}'      tokens/s of a GGUF

It runs under an interpreter of its own that has `llama-cpp-python` and `gguf` (and numpy, which
both bring), and needs nothing else of this project's packages. benchmarks/decode.py starts it.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks import measuring
from exports.llama_cpp import language

BLOCK = 1 << 16  # blocks of weights that are drawn, and then used over and over


def kind_of(name: str, shape: tuple[int, ...], width: int) -> str:
    """The type of a tensor as `llama-quantize … Q4_0` leaves it: the head in Q6_K, norms and
    factors in float32, all else in Q4_0."""
    if len(shape) == 1:
        return "F32"
    if name == "output.weight":
        return "Q6_K" if width % 256 == 0 else "Q8_0"  # Q6_K's blocks are of 256
    return "Q4_0"


def random_blocks(kind: str, rng: np.random.Generator) -> np.ndarray:
    """(BLOCK, bytes of a block) uint8 of weights of a deviation of about 0.02."""
    import gguf

    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (BLOCK, size), dtype=np.uint8)
    spread = rng.uniform(0.5, 1.5, BLOCK)
    if kind == "Q4_0":  # scale, 32 codes of deviation 4.6
        blocks[:, :2] = (0.0043 * spread).astype(np.float16)[:, None].view(np.uint8)
    elif kind == "Q8_0":  # scale, 32 codes of deviation 74
        blocks[:, :2] = (0.00027 * spread).astype(np.float16)[:, None].view(np.uint8)
    else:  # Q6_K: 256 codes of deviation 18, 16 scales of 8 bits, scale
        blocks[:, 192:208] = rng.integers(16, 64, (BLOCK, 16), dtype=np.uint8)
        blocks[:, 208:] = (0.00003 * spread).astype(np.float16)[:, None].view(np.uint8)
    return blocks


def write(path: Path, config: Any) -> None:
    """A GGUF of the shape of a `DecoderConfig` with random weights, one tensor in memory at a time.

    Without a vocabulary: what is measured is fed with token ids.
    """
    import gguf

    writer = gguf.GGUFWriter(path, language.PHI3.name)
    writer.add_name("random weights")
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    language.describe(writer, config)
    writer.add_quantization_version(2)
    rng = np.random.default_rng(0)
    drawn = {kind: random_blocks(kind, rng) for kind in ("Q4_0", "Q6_K", "Q8_0")}
    factors = language.factors_of(config)
    tensors = [
        (name, shape, kind_of(name, shape, config.hidden_size))
        for name, shape in language.shapes_of(config).items()
    ]
    for name, shape, kind in tensors:
        quantised = gguf.GGMLQuantizationType[kind]
        stored = gguf.quant_shape_to_byte_shape(shape, quantised) if kind != "F32" else shape
        dtype = np.dtype(np.float32 if kind == "F32" else np.uint8)
        size = int(np.prod(stored)) * dtype.itemsize
        writer.add_tensor_info(name, stored, dtype, size, quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape, kind in tensors:
        if name in factors:
            writer.write_tensor_data(np.array(factors[name], np.float32))
        elif kind == "F32":
            writer.write_tensor_data(np.ones(shape, np.float32))
        else:
            count, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
            blocks = int(np.prod(shape)) // count
            repeated = np.resize(drawn[kind], (blocks, size))
            writer.write_tensor_data(repeated)
    writer.close()


def config_of(fields: Mapping[str, Any]) -> Any:
    """What has the fields of a `DecoderConfig`, whose own class needs torch."""
    return SimpleNamespace(**{**fields, "rope": SimpleNamespace(**fields["rope"])})


def requantise(source: Path, target: Path) -> None:
    """`source` with the tensors that are Q4_1 in Q4_0; all else as it is."""
    import gguf

    reader = gguf.GGUFReader(source)
    q4_0, q4_1 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q4_1
    fields = {field.name: field for field in reader.fields.values()}
    writer = gguf.GGUFWriter(target, fields["general.architecture"].contents())
    for name, field in fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        data, kind = tensor.data, tensor.tensor_type
        if kind == q4_1:
            # Not `gguf.quants.quantize`, which goes by 16 rows at a time and takes minutes.
            weights = gguf.quants.Q4_1.dequantize_rows(data)
            data, kind = gguf.quants.Q4_0.quantize_rows(weights), q4_0
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Context:
    """A GGUF, loaded with llama.cpp's own defaults, and a context of it for some prompts."""

    def __init__(self, path: str, plan: measuring.Plan) -> None:
        import llama_cpp

        self.lib = llama_cpp
        # Errors alone: the lines of a start would be thousands.
        quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        self.quiet = quiet  # must live as long as the library may call it
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise SystemExit(f"{path}: llama.cpp cannot load it")
        settings = llama_cpp.llama_context_default_params()
        each = max(*plan.contexts, measuring.WARM_UP) + plan.tokens + 8
        settings.n_ctx = plan.rows * (-(-each // 256) * 256)  # it rounds each row's share itself
        settings.n_seq_max = plan.rows
        settings.n_threads = settings.n_threads_batch = plan.threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise SystemExit(f"{path}: llama.cpp makes no context of {settings.n_ctx} tokens")
        self.most = settings.n_batch  # tokens that are fed in one call
        self.batch = llama_cpp.llama_batch_init(self.most, 0, plan.rows)
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.words = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def decode(self, tokens: list[list[int]], start: int) -> list[int]:
        """Feed each row its tokens from position `start` on; the likeliest next token of each."""
        fed = [
            (row, start + place, token, place == len(ids) - 1)
            for row, ids in enumerate(tokens)
            for place, token in enumerate(ids)
        ]
        chosen: list[int] = []  # rows end in their order
        for first in range(0, len(fed), self.most):
            piece = fed[first : first + self.most]
            for index, (row, position, token, last) in enumerate(piece):
                self.batch.token[index], self.batch.pos[index] = token, position
                self.batch.n_seq_id[index], self.batch.seq_id[index][0] = 1, row
                self.batch.logits[index] = last
            self.batch.n_tokens = len(piece)
            if status := self.lib.llama_decode(self.context, self.batch):
                raise SystemExit(f"llama_decode ended with {status}")
            ends = [index for index, (*_, last) in enumerate(piece) if last]
            chosen += [self.likeliest(end) for end in ends]
        return chosen

    def likeliest(self, index: int) -> int:
        logits = self.lib.llama_get_logits_ith(self.context, index)
        return int(np.ctypeslib.as_array(logits, shape=(self.words,)).argmax())

    def answer(self, prompts: list[list[int]], tokens: int, seconds: float) -> list[float]:
        """See `measuring.Answer`."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        clocks = measuring.Clocks(tokens, seconds)
        chosen, start = self.decode(prompts, 0), len(prompts[0])
        while not clocks.tick():
            chosen = self.decode([[token] for token in chosen], start)
            start += 1
        return clocks.read


def step_bytes(path: str) -> dict[str, int]:
    """Bytes that decoding one token reads: of the weights, and of keys and values for each token
    of the context (float16, llama.cpp's default)."""
    import gguf

    reader = gguf.GGUFReader(path)
    size = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}
    if "output.weight" in size:
        del size["token_embd.weight"]  # of which a step reads one row
    fields = {field.name.split(".", 1)[-1]: field for field in reader.fields.values()}
    layers, width, heads, key_values = (
        fields[name].contents()
        for name in (
            "block_count", "embedding_length", "attention.head_count", "attention.head_count_kv",
        )
    )  # fmt: skip
    return {"weights": sum(size.values()), "a_token": layers * 2 * key_values * width // heads * 2}


def run_measure(path: str, plan: measuring.Plan) -> dict[str, Any]:
    """All that is measured of the GGUF at `path`."""
    started = time.perf_counter()
    context = Context(path, plan)
    loaded = time.perf_counter() - started
    found = measuring.measure(context.answer, plan)
    return {
        **found,
        "load_seconds": round(loaded, 2),
        **measuring.memory(),
        "step_bytes": step_bytes(path),
        "system": context.lib.llama_print_system_info().decode(),
        "version": context.lib.__version__,
    }


def main() -> None:
    asked = measuring.argument()
    if "write" in asked:
        write(Path(asked["write"]), config_of(asked["config"]))
        measuring.report({"bytes": Path(asked["write"]).stat().st_size})
    elif "requantise" in asked:
        requantise(Path(asked["requantise"]), Path(asked["to"]))
        measuring.report({"bytes": Path(asked["to"]).stat().st_size})
    elif "first" in asked:  # a cold start: load, read a prompt, choose a token
        plan = measuring.Plan(threads=asked["threads"], contexts=(16,), tokens=1)
        Context(asked["first"], plan).answer(plan.prompts(16), 0, 0)
        measuring.report({})
    else:
        plan = measuring.plan_of(asked["plan"])
        measuring.report(run_measure(asked["measure"], plan))


if __name__ == "__main__":
    main()
