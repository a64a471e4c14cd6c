"""How a conversation is written down in a record: one table of forms, one small file a kind.

A form says which keys it reads and gives the turns; what turns, pictures and the other keys mean is
the same in all of them and stands in `data.dataset`. A new form is a `Form` and its line here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.forms.captions import CAPTION, TEXT
from data.forms.form import Form, Turns
from data.forms.lists import CONVERSATIONS, MESSAGES
from data.forms.pairs import ALPACA, PROMPT, QUERY, QUESTION
from data.forms.texts import TEXTS
from data.record_keys import BadRecord

LISTS = (CONVERSATIONS, MESSAGES)
MADE = (QUERY, ALPACA, PROMPT, QUESTION, TEXTS)
FORMS = (*LISTS, *MADE, CAPTION, TEXT)

__all__ = ["FORMS", "Form", "Turns", "form_of"]


def form_of(record: Mapping[str, Any]) -> Form:
    """The form of a record. Raises `BadRecord` where it is of none, or of two that contradict.

    A list of turns goes before all else, as other keys are then data about the record; a caption
    is what remains.
    """
    for forms in (LISTS, MADE, (CAPTION,), (TEXT,)):
        found = [form for form in forms if form.is_one(record)]
        if len(found) > 1:
            first, second = (f"`{form.name.replace(', ', '`, `')}`" for form in found[:2])
            raise BadRecord(f"it has {first} and {second}; keep one of them")
        if found:
            return found[0]
    names = "; ".join(f"`{form.name.replace(', ', '`, `')}`" for form in FORMS)
    raise BadRecord(f"it has turns in none of the forms that are read: {names}")
