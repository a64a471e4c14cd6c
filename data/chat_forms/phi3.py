"""Phi-3 and Phi-3.5 mini. Their marks swallow the white space behind them, so that the newlines
below are in the text of a chat and never among its ids."""

from data.chat_forms.form import ChatForm

PHI3 = ChatForm(
    name="phi3",
    models="Phi-3 and Phi-3.5 mini",
    marks=(
        "<|user|>",
        "<|assistant|>",
        "<|system|>",
        "<|end|>",
        "<|endoftext|>",
        "<|placeholder1|>",
    ),
    opening="<|{role}|>\n",
    closing="<|end|>",
    after="\n",
    end="<|endoftext|>",
    padding="<|endoftext|>",
    stops=("<|end|>", "<|endoftext|>"),
    slots=("<|placeholder1|>",),
)
