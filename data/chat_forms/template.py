"""A chat form as a template in Jinja, for programs that make the text of a chat."""

from __future__ import annotations

from data.chat_forms.form import ChatForm


def chat_template(form: ChatForm, picture: str, shown: str) -> str:
    """A chat template that gives what `data.chat.render` does, from messages of roles and parts of
    "text" and pictures: text is stripped, and text next to text is joined by a newline.

    `picture`: the type of a part that is a picture; `shown`: the expression that stands for it.
    """
    before, after = form.opening.split("{role}")
    answer = quoted(form.opening_of("assistant"))
    return (
        _begin(form)
        + "{% for message in messages %}{{ "
        + f"{quoted(before)} + message['role'] + {quoted(after)}"
        + " }}"
        + _lead("system", form.system_lead)
        + _lead("assistant", form.answer_lead)
        + "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
        "{% set last = namespace(text=false) %}"
        "{% for part in message['content'] %}{% if part['type'] == '" + picture + "' %}"
        "{{ " + shown + " }}{% set last.text = false %}"
        "{% elif part['text'] | trim %}"
        "{{ ('\\n' if last.text else '') + (part['text'] | trim) }}{% set last.text = true %}"
        "{% endif %}{% endfor %}{% endif %}{{ " + quoted(form.closing + form.after) + " }}"
        "{% endfor %}{{ " + answer + " if add_generation_prompt else " + quoted(form.end) + " }}"
    )


def quoted(text: str) -> str:
    """A text as Jinja writes it down."""
    for plain, escaped in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n")):
        text = text.replace(plain, escaped)
    return f"'{text}'"


def _begin(form: ChatForm) -> str:
    begin = "{{ " + quoted(form.begin) + " }}" if form.begin else ""
    if form.default_system is None:
        return begin
    default = quoted(form.message("system", form.default_system))
    return begin + "{% if messages[0]['role'] != 'system' %}{{ " + default + " }}{% endif %}"


def _lead(role: str, text: str) -> str:
    if not text:
        return ""
    return "{% if message['role'] == '" + role + "' %}{{ " + quoted(text) + " }}{% endif %}"
