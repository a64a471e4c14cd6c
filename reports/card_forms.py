"""What a folder that gets a model card is: a run, or an export of one; and how it is asked."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """What a folder that gets a card is."""

    what: str
    """ends the sentence "This folder holds ..." """
    library: str
    task: str
    relation: str
    """to the base, in the hub's words"""
    usage: str
    """code that asks the model; {where} is the folder's or the repository's name"""
    limit: str = ""
    """what whoever has the folder must know of the programs that read it"""


_TEXT = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{where}")
tokenizer = AutoTokenizer.from_pretrained("{where}")
messages = [{{"role": "user", "content": "Hello"}}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**ids)[0]))
```"""
_ASKED = """content = [
    {{"type": "image", "path": "picture.png"}},
    {{"type": "text", "text": "Describe the picture."}},
]
asked = [{{"role": "user", "content": content}}]
print(ask(text=asked, return_full_text=False)[0]["generated_text"])
```"""
_PIPELINE = (
    """```python
from transformers import AutoProcessor, pipeline

processor = AutoProcessor.from_pretrained("{where}", backend="pil")
ask = pipeline("image-text-to-text", model="{where}", processor=processor)
"""
    + _ASKED
)
_APART = (
    """```python
from peft import PeftModel
from transformers import AutoProcessor, LlavaForConditionalGeneration, pipeline

base = LlavaForConditionalGeneration.from_pretrained("{where}")
model = PeftModel.from_pretrained(base, "{where}/adapter").merge_and_unload()
processor = AutoProcessor.from_pretrained("{where}", backend="pil")
ask = pipeline("image-text-to-text", model=model, processor=processor)
"""
    + _ASKED
)
_PEFT = """```python
from peft import PeftModel

# base: the model that it was trained over, loaded by transformers as it was in the training. One
# in NF4: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"). Over the 16-bit weights
# it computes something else.
model = PeftModel.from_pretrained(base, "{where}")
```"""
_RUN = """```sh
python infer.py --run {where} --image picture.png --prompt "Describe the picture."
```"""
_LLAMA_CPP = """```sh
llama-mtmd-cli -m {where}/model-*.gguf --mmproj {where}/mmproj-f16.gguf --jinja --temp 0 \\
    --image picture.png -p "Describe the picture."
ollama create mine -f {where}/Modelfile && ollama run mine
```"""
FORMS = {
    "run": Form(
        "a run of PhiSight: the adapter and the projector, with the log of their training",
        "phisight",
        "image-text-to-text",
        "adapter",
        _RUN,
    ),
    "peft": Form("the adapter in PEFT's form", "peft", "text-generation", "adapter", _PEFT),
    "merge": Form(
        "the language model with the adapter merged: it reads text, and sees no pictures",
        "transformers",
        "text-generation",
        "finetune",
        _TEXT,
    ),
    "requantize": Form(
        "the language model with the adapter merged, in 4 bits: it reads text, and sees no"
        " pictures",
        "transformers",
        "text-generation",
        "quantized",
        _TEXT,
    ),
    "prune": Form(
        "the language model with the adapter merged and channels cut out: it reads text, and sees"
        " no pictures",
        "transformers",
        "text-generation",
        "finetune",
        _TEXT,
    ),
    "llava": Form(
        "the whole model as `LlavaForConditionalGeneration`, with its picture encoder and its"
        " processor",
        "transformers",
        "image-text-to-text",
        "finetune",
        _PIPELINE,
    ),
    "llava, adapter apart": Form(
        "the base as `LlavaForConditionalGeneration`, with its picture encoder and its processor,"
        " and the adapter beside it: in `adapter` for PEFT, in `adapter-vllm` for vLLM",
        "peft",
        "image-text-to-text",
        "adapter",
        _APART,
    ),
    "gguf": Form(
        "the merged language model for llama.cpp and Ollama, with CLIP and projector as `mmproj`",
        "gguf",
        "image-text-to-text",
        "quantized",
        _LLAMA_CPP,
        "**llama.cpp as it comes misreads the pictures** of every LLaVA since May 2025"
        " ([issue 25814](https://github.com/ggml-org/llama.cpp/issues/25814)), and answers much"
        " worse without saying so. Where that is not mended, build it by `python -m"
        " tools.llama_cpp FOLDER` of PhiSight, which mends it.",
    ),
}
"""by what a certificate calls it"""
