"""Phi-4-mini and Phi-4-multimodal, whose own token for a picture goes before the others."""

from data.chat_forms.form import ChatForm

PHI4 = ChatForm(
    name="phi4",
    models="Phi-4-mini",
    marks=(
        "<|user|>",
        "<|assistant|>",
        "<|system|>",
        "<|end|>",
        "<|endoftext|>",
        "<|tool_call|>",
    ),
    opening="<|{role}|>",
    closing="<|end|>",
    end="<|endoftext|>",
    padding="<|endoftext|>",
    stops=("<|end|>", "<|endoftext|>"),
    slots=("<|endoftext10|>", "<|tag|>", "<|endofprompt|>"),
)
