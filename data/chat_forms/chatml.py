"""ChatML and the families that speak it: SmolLM2, Qwen2.5, and Qwen3 without thinking.

Qwen3's template opens the answer that is asked for with an empty block of thoughts, and leaves the
block out of the answers before it. A row of several turns could then not be trained as it is asked:
each of its answers is the one that is asked for and, to the turns behind it, a past one. So every
answer has the block here. One turn has the ids of the template; with more turns the past answers
have the block too, in training and in answering alike.
"""

from dataclasses import replace

from data.chat_forms.form import ChatForm

_MARKS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_QWEN_MARKS = (*_MARKS, "<|fim_prefix|>")

SMOLLM2 = ChatForm(
    name="smollm2",
    models="SmolLM2",
    marks=(*_MARKS, "<repo_name>"),
    opening="<|im_start|>{role}\n",
    closing="<|im_end|>",
    after="\n",
    padding="<|endoftext|>",
    stops=("<|im_end|>", "<|endoftext|>"),
    slots=("<empty_output>", "<jupyter_script>", "<gh_stars>"),
    default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
)
QWEN25 = replace(
    SMOLLM2,
    name="qwen2.5",
    models="Qwen2.5",
    marks=_QWEN_MARKS,
    slots=("<|image_pad|>", "<|vision_pad|>", "<|video_pad|>"),
    default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
)
QWEN3 = replace(
    QWEN25,
    name="qwen3",
    models="Qwen3",
    marks=(*_QWEN_MARKS, "<think>", "</think>"),
    default_system=None,
    answer_lead="<think>\n\n</think>\n\n",
)
