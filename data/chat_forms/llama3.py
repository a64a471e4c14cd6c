"""Llama 3.1 and 3.2. Their template writes a system message always, which begins with two dates.

The template takes today's date where a program tells it one. A model would then be asked otherwise
on every day than it was trained, so the date is the one that stands in the template.
"""

from data.chat_forms.form import ChatForm

LLAMA3 = ChatForm(
    name="llama3",
    models="Llama 3.1 and 3.2",
    marks=(
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|finetune_right_pad_id|>",
    ),
    begin="<|begin_of_text|>",
    opening="<|start_header_id|>{role}<|end_header_id|>\n\n",
    closing="<|eot_id|>",
    padding="<|finetune_right_pad_id|>",
    stops=("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
    slots=("<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    system_lead="Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n",
    default_system="",
)
