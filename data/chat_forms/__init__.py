"""The chats that models speak: one table of forms, one small file a family.

A form is data alone; what is made of it is the same for all and stands in `data.chat`. A new form
is a `ChatForm` and its line here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from data.chat_forms.chatml import QWEN3, QWEN25, SMOLLM2
from data.chat_forms.form import ChatForm
from data.chat_forms.llama3 import LLAMA3
from data.chat_forms.phi3 import PHI3
from data.chat_forms.phi4 import PHI4
from data.chat_forms.template import chat_template
from errors import PhiSightError

# The first form whose marks a tokenizer has is its own: Qwen3's tokens are Qwen2.5's and two more.
FORMS = (PHI3, PHI4, LLAMA3, QWEN3, QWEN25, SMOLLM2)

__all__ = ["FORMS", "ChatForm", "chat_template", "find_form", "find_slot"]


def find_form(
    id_of: Callable[[str], int | None], name: str, forms: Sequence[ChatForm] = FORMS
) -> ChatForm:
    """The form of the tokenizer `name`, in which `id_of` gives a token's id or None.

    Raises `PhiSightError` that names what it lacks of the form that it has most of.
    """
    missing = {form: [mark for mark in form.marks if id_of(mark) is None] for form in forms}
    for form in forms:
        if not missing[form]:
            return form
    nearest = min(forms, key=lambda form: len(missing[form]) / len(form.marks))
    raise PhiSightError(
        f"tokenizer {name}: has no {' '.join(missing[nearest])} of the chat of {nearest.models};"
        f" use the tokenizer of {', '.join(form.models for form in missing)}"
    )


def find_slot(form: ChatForm, id_of: Callable[[str], int | None], name: str) -> str:
    """The token that takes the places of pictures. Raises `PhiSightError` if there is none."""
    for slot in form.slots:
        if id_of(slot) is not None:
            return slot
    raise PhiSightError(
        f"tokenizer {name}: has none of {' '.join(form.slots)} to hold the place of a picture;"
        f" use the tokenizer of {form.models}"
    )
