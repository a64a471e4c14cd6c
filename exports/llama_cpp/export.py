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
from data.chat_forms import ChatForm
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
from model.base import BaseModel, find_folder
from model.decoder import DecoderConfig, LanguageModel
from model.encoders.clip import ClipConfig

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
    check_run(assistant)
    config = assistant.parts.base.model.config
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


def check_run(assistant: Assistant) -> None:
    """Raise `PhiSightError` for a run that llama.cpp cannot hold."""
    check_pictures(assistant, "--gguf", "llama.cpp", [ClipConfig])
    architecture_of(assistant)


def vocabulary_in(assistant: Assistant) -> Vocabulary:
    """The tokenizer of the run's base. Raises `PhiSightError` for one that llama.cpp lacks."""
    folder = find_folder(assistant.config.base, assistant.config.base_revision or None)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return vocabulary_of(content, assistant.parts.base.model.config.vocab_size)


def write_language_model(assistant: Assistant, folder: Path, quantise: str, python: str) -> Path:
    """The merged language model with its tokenizer and chat template. Returns its file."""
    parts = assistant.parts
    config = parts.base.model.config
    architecture, vocabulary = architecture_of(assistant), vocabulary_in(assistant)
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
        language.describe(writer, config, architecture)
        known = {
            "bos": beginning if isinstance(beginning, int) else None,
            # The last of those at which an answer ends; llama.cpp knows the others by their names.
            "eos": parts.base.tokenizer.backend_tokenizer.token_to_id(marks.form.stops[-1]),
            "eot": marks.end_id,
            "pad": marks.padding_id,
        }
        write_vocabulary(writer, vocabulary, known)
        writer.add_chat_template(certificate.template_of(marks, vocabulary.line_end))

    _, _, file_type = weights.QUANTISATIONS[quantise]
    by_llama = quantise == "q4_k_m"
    written = folder / (IN_16_BITS if by_llama else f"model-{quantise}.gguf")
    shapes = language.shapes_of(config, architecture)
    kinds = {
        name: (shapes[name], weights.kind_of(name, shapes[name], quantise))
        for name in names_of(parts.base)
    }
    values = language_weights(parts.base, architecture)  # one at a time
    weights.write(written, architecture.name, describe, kinds, values)
    if not by_llama:
        return written
    rounded = folder / f"model-{quantise}.gguf"
    round_by_llama(python, written, rounded, quantise.upper())
    written.unlink()
    return rounded


def architecture_of(assistant: Assistant) -> language.Architecture:
    """llama.cpp's for the run's base. Raises `PhiSightError` where it has none."""
    base = assistant.parts.base
    return language.architecture_for(base.family.model_type, base.model.config)


def own_weights(model: LanguageModel) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """As `merged_weights`; a head that is the embedding is left out."""
    for name, computed in merged_weights(model):
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            yield name, computed


def rope_factors(config: DecoderConfig) -> dict[str, Tensor]:
    """What llama.cpp multiplies wavelengths by, by its name in a GGUF."""
    found = {name: torch.tensor(value) for name, value in language.factors_of(config).items()}
    if config.rope.stretch:
        steps = torch.arange(0, config.rope.dims, 2, dtype=torch.float) / config.rope.dims
        frequencies = 1.0 / config.rope.theta**steps
        found[language.FREQUENCIES] = frequencies / config.rope.stretch(frequencies)
    return found


def names_of(base: BaseModel) -> list[str]:
    """The GGUF names of the weights of `language_weights`, in its order."""
    config = base.model.config
    parts = ((base.family.stored(name, config) or (name,)) for name, _ in own_weights(base.model))
    return [*(language.gguf_name(name) for names in parts for name in names), *rope_factors(config)]


def language_weights(
    base: BaseModel, architecture: language.Architecture
) -> Iterator[tuple[str, Tensor]]:
    """(GGUF name, float32 tensor) of the merged model, one at a time."""
    config = base.model.config
    computed = ((name, compute()) for name, compute in own_weights(base.model))
    for stored, tensor in base.family.to_stored(computed, config):
        name = language.gguf_name(stored)
        yield name, language.in_pairs(name, tensor, config) if architecture.neighbours else tensor
    yield from rope_factors(config).items()


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


def ollama_template(form: ChatForm) -> str:
    """The chat in the language of Ollama's templates; it puts pictures before the text."""
    before = form.begin
    if form.default_system is not None:
        default = form.message("system", form.default_system)
        before += f'{{{{ if ne (index .Messages 0).Role "system" }}}}{default}{{{{ end }}}}'
    leads = (("system", form.system_lead), ("assistant", form.answer_lead))
    turn = form.opening.replace("{role}", "{{ .Role }}") + "".join(
        f'{{{{ if eq .Role "{role}" }}}}{lead}{{{{ end }}}}' for role, lead in leads if lead
    )
    turn += "{{ .Content }}" + form.closing + form.after
    return f"{before}{{{{ range .Messages }}}}{turn}{{{{ end }}}}{form.opening_of('assistant')}"


def write_modelfile(assistant: Assistant, folder: Path, model: Path) -> None:
    """What `ollama create NAME -f Modelfile` reads."""
    form = certificate.form_of(assistant.parts.chat_format, vocabulary_in(assistant).line_end)
    context = language.usual_context(assistant.parts.base.model.config)
    tokenizer = assistant.parts.base.tokenizer
    ends = [tokenizer.decode([end], skip_special_tokens=False) for end in assistant.stop_ids]
    lines = [
        f"FROM ./{model.name}",
        f"FROM ./{MMPROJ}",
        f'TEMPLATE """{ollama_template(form)}"""',
        "PARAMETER temperature 0",
        f"PARAMETER num_ctx {context}",
        f"PARAMETER num_predict {MAX_NEW_TOKENS}",
        *(f'PARAMETER stop "{end}"' for end in ends),
    ]
    (folder / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def run(options: argparse.Namespace) -> str:
    """`export.py --gguf DIR`."""
    out = folder_to_write(options, "--gguf")
    if options.dtype != "bfloat16":
        raise PhiSightError("--dtype: --gguf stores weights as --quantize says; leave it out")
    weights.need_gguf()
    python = find_llama(options.llama_python)

    def check(assistant: Assistant) -> None:
        check_run(assistant)  # first: nobody should build llama.cpp for a run that it cannot hold
        if python is None:
            raise PhiSightError(
                "--gguf: llama-cpp-python is not installed, which measures the files before they"
                f" get their name: {INSTALL}"
            )

    quantise = options.quantize
    write = partial(export_gguf, quantise=quantise, python=python or "")
    return export_measured(options, out, write, TOLERANCES[quantise], check)


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
