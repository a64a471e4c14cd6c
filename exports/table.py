"""Every format that export.py writes or reads: one file and one line here for each."""

from __future__ import annotations

from exports import llava, merge, peft_adapter, peft_import, prune, push, requantize, seed, space
from exports.form import Form
from exports.llama_cpp import export as gguf

EXPORTS: dict[str, Form] = {
    "--merge": merge.FORM,
    "--llava": llava.FORM,
    "--requantize": requantize.FORM,
    "--prune": prune.FORM,
    "--gguf": gguf.FORM,
    "--peft": peft_adapter.EXPORT,
    "--push": push.FORM,
    "--space": space.FORM,
}
IMPORTS: dict[str, Form] = {
    "--import-peft": peft_import.IMPORT,
    "--import-seed": seed.FORM,
}
FORMS = EXPORTS | IMPORTS
