"""`export.py --gguf DIR`: the merged model and its eyes, as llama.cpp and Ollama read them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assistant.assistant import Assistant
from errors import PhiSightError
from exports import measure
from exports.alignment import alignment_of, scored
from exports.folder import MAX_NEW_TOKENS, new_folder
from exports.form import Form, folder_to_write
from exports.llama_cpp import certificate, eyes, language, weights
from exports.llama_cpp.asked import INSTALL, find_llama, round_by_llama
from exports.llama_cpp.vocabulary import NAMED, Vocabulary, vocabulary_of, write_vocabulary
from exports.llava import check_pictures
from exports.measure import MERGE_METHODS, Probe, Tolerance
from exports.measured import GREEDY_EQUAL_IN_4_BITS, export_measured
from lora.merge import merged_weights
from model.base import find_folder
from model.decoder import LanguageModel

CERTIFICATE = "gguf_certificate.json"
MMPROJ, MODELFILE = "mmproj-f16.gguf", "Modelfile"
IN_16_BITS = "model-f16.gguf"
# llama.cpp's forms of 4 bits are no corrected ones, as `--requantize` writes them.
IN_4_BITS = Tolerance(0.05, GREEDY_EQUAL_IN_4_BITS)
TOLERANCES = {
    "f16": Tolerance(),
    "q8_0": Tolerance(greedy_equal=95.0),
    "q4_0": IN_4_BITS,
    "q4_k_m": IN_4_BITS,
}


def export_gguf(
    assistant: Assistant,
    out: str | Path,
    dtype: torch.dtype,
    probe: Probe,
    tolerance: Tolerance | None,
    quantise: str,
    python: str,
) -> dict[str, Any]:
    """Write model, eyes and Modelfile, ask llama.cpp under `python`, and keep them if it agrees.

    Returns the certificate. `dtype` is not looked at: `quantise` says how weights are stored.

    Raises:
        PhiSightError: a part cannot be held, llama.cpp does not load it or gives other token ids,
            the result is past the tolerance, or the disk refuses. Nothing is left then.
    """
    check_pictures(assistant, "--gguf", "llama.cpp")
    config = assistant.parts.base.model.config
    language.need_shape(config)
    with new_folder(out) as folder:
        ours = certificate.our_side(assistant, probe)
        model = write_language_model(assistant, folder, quantise, python)
        write_eyes(assistant, folder)
        write_modelfile(assistant, folder, model)
        theirs = certificate.ask_llama(
            assistant, probe, python, model, folder / MMPROJ, vocabulary_in(assistant).line_end
        )
        version = f"llama.cpp by llama-cpp-python {theirs.told.version}"
        run_sees = alignment_of(assistant, probe, ours["with_picture"].answers)
        return measure.certify(
            folder / CERTIFICATE,
            "gguf",
            assistant,
            probe,
            ours["with_picture"].measured,
            theirs.sides["with_picture"].measured,
            tolerance,
            answers_after_by=f"{version}, greedily",
            dtype=quantise,
            method=MERGE_METHODS[assistant.config.merge_rounding],
            texts_of_equal_ids=theirs.texts,
            context={"note": language.context_note(config, theirs.tokens)},
            **{seen: certificate.compared(side, theirs.sides[seen]) for seen, side in ours.items()},
            pictures=certificate.picture_differences(assistant, probe, theirs.told),
            alignment=scored(probe, theirs.answers, version, run_sees),
            processor_by_llama_cpp=theirs.told.system,
        )


def vocabulary_in(assistant: Assistant) -> Vocabulary:
    """The tokenizer of the run's base. Raises `PhiSightError` for one that llama.cpp lacks."""
    folder = find_folder(assistant.config.base, assistant.config.base_revision or None)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return vocabulary_of(content, assistant.parts.base.model.config.vocab_size)


def write_language_model(assistant: Assistant, folder: Path, quantise: str, python: str) -> Path:
    """The merged language model with its tokenizer and chat template. Returns its file."""
    parts = assistant.parts
    config = parts.base.model.config
    vocabulary = vocabulary_in(assistant)
    marks = parts.chat_format
    beginning = parts.base.hub_config.get("bos_token_id")

    def describe(writer: Any) -> None:
        writer.add_type("model")
        # See `vocabulary.NAMED`.
        writer.add_name(
            f"{name_of(assistant)} ({NAMED})" if vocabulary.line_end else name_of(assistant)
        )
        write_provenance(writer, assistant)
        writer.add_file_type(getattr(weights.need_gguf().LlamaFileType, file_type))
        writer.add_quantization_version(2)
        language.describe(writer, config)
        known = {
            "bos": beginning if isinstance(beginning, int) else None,
            "eos": marks.end_of_text_id,
            "eot": marks.end_id,
            "pad": marks.end_of_text_id,
        }
        write_vocabulary(writer, vocabulary, known)
        writer.add_chat_template(certificate.template_of(vocabulary.line_end))

    _, _, file_type = weights.QUANTISATIONS[quantise]
    by_llama = quantise == "q4_k_m"
    written = folder / (IN_16_BITS if by_llama else f"model-{quantise}.gguf")
    shapes = language.shapes_of(config)
    values = [*language_weights(parts.base.model)]
    kinds = {
        name: (shapes[name], weights.kind_of(name, shapes[name], quantise)) for name, _ in values
    }
    computed = ((name, compute()) for name, compute in values)  # one at a time
    weights.write(written, language.ARCHITECTURE, describe, kinds, computed)
    if not by_llama:
        return written
    rounded = folder / f"model-{quantise}.gguf"
    round_by_llama(python, written, rounded, quantise.upper())
    written.unlink()
    return rounded


def language_weights(model: LanguageModel) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """GGUF names of the merged model with what computes each tensor; a head that is the embedding
    stands there once."""
    for name, computed in merged_weights(model):
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            yield language.gguf_name(name), computed
    for name, factors in language.factors_of(model.config).items():
        yield name, partial(torch.tensor, factors)


def write_eyes(assistant: Assistant, folder: Path) -> None:
    """CLIP and projector as `mmproj`, in float16."""
    spec, model = assistant.parts.vision, assistant.model
    width = assistant.parts.base.model.config.hidden_size
    named = dict(eyes.weights(spec, model.projector))

    def describe(writer: Any) -> None:
        writer.add_name(name_of(assistant))
        write_provenance(writer, assistant)
        writer.add_file_type(weights.need_gguf().LlamaFileType.MOSTLY_F16)
        eyes.describe(writer, spec, width)

    kinds = {
        name: (
            tuple(tensor.shape),
            "F32" if eyes.is_added(name) else weights.kind_of(name, tuple(tensor.shape), "f16"),
        )
        for name, tensor in named.items()
    }
    weights.write(folder / MMPROJ, eyes.ARCHITECTURE, describe, kinds, named.items())


def write_provenance(writer: Any, assistant: Assistant) -> None:
    """The chain from the data to these weights, which the certificate and the card name too."""
    for name, value in assistant.provenance.items():
        if value is not None:
            writer.add_string(f"phisight.{name}", str(value))


def name_of(assistant: Assistant) -> str:
    """What programs show as the model's name."""
    return Path(assistant.config.run).name


def write_modelfile(assistant: Assistant, folder: Path, model: Path) -> None:
    """What `ollama create NAME -f Modelfile` reads."""
    end = vocabulary_in(assistant).line_end
    # In the language of Ollama's templates; it puts pictures before the text.
    turn = f"<|{{{{ .Role }}}}|>{end}{{{{ .Content }}}}<|end|>{end}"
    context = language.usual_context(assistant.parts.base.model.config)
    tokenizer = assistant.parts.base.tokenizer
    ends = [tokenizer.decode([end], skip_special_tokens=False) for end in assistant.stop_ids]
    lines = [
        f"FROM ./{model.name}",
        f"FROM ./{MMPROJ}",
        f'TEMPLATE """{{{{- range .Messages }}}}{turn}{{{{ end }}}}<|assistant|>{end}"""',
        "PARAMETER temperature 0",
        f"PARAMETER num_ctx {context}",
        f"PARAMETER num_predict {MAX_NEW_TOKENS}",
        *(f'PARAMETER stop "{end}"' for end in ends),
    ]
    (folder / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(options: argparse.Namespace) -> str:
    """`export.py --gguf DIR`."""
    out = folder_to_write(options, "--gguf")
    if options.dtype != "bfloat16":
        raise PhiSightError("--dtype: --gguf stores weights as --quantize says; leave it out")
    weights.need_gguf()
    python = find_llama(options.llama_python)
    if python is None:
        raise PhiSightError(
            "--gguf: llama-cpp-python is not installed, which measures the files before they get"
            f" their name: {INSTALL}"
        )
    quantise = options.quantize
    write = partial(export_gguf, quantise=quantise, python=python)
    return export_measured(options, out, write, TOLERANCES[quantise])


FORM = Form(
    run,
    {"metavar": "DIR", "help": "for llama.cpp and Ollama: GGUF, mmproj with CLIP, Modelfile"},
    {
        "--quantize": {
            "choices": tuple(weights.QUANTISATIONS),
            "default": "q8_0",
            "help": "with --gguf: how weights are stored (%(default)s)",
        },
        "--llama-python": {
            "metavar": "FILE",
            "help": "with --gguf: the interpreter that has llama-cpp-python, if not this one",
        },
    },
    carries_pictures=True,
)
