"""The settings in the sidebar: how answers are made, recordings understood, and answers spoken."""

from __future__ import annotations

import gradio as gr
from gradio.components import Component

from web import texts
from web.page import Translated


class SettingsPanel:
    """Builds the panel inside the open `gr.Blocks`.

    Attributes:
        components: those whose values `settings_from` reads, in its order.
        language: chooses the interface language; not one of them.
    """

    def __init__(self, translated: Translated) -> None:
        t = translated
        with t(gr.Accordion(open=False, elem_id="settings"), label="settings"):
            self.language = t(
                gr.Dropdown(
                    [(name, code) for code, name in texts.LANGUAGES.items()],
                    value="en",
                    elem_id="language",
                ),
                label="interface_language",
            )
            self.components: list[Component] = [
                *self._sampling(t),
                *self._speech(t),
            ]

    @staticmethod
    def _sampling(t: Translated) -> list[Component]:
        return [
            t(
                gr.Slider(0, 2, 0, step=0.05, elem_id="temperature"),
                label="temperature",
                info="temperature_info",
            ),
            t(gr.Slider(0.05, 1, 1, step=0.05), label="top_p"),
            t(gr.Slider(0, 200, 0, step=1), label="top_k"),
            t(gr.Slider(1, 2, 1, step=0.05), label="repetition_penalty"),
            t(gr.Slider(1, 2048, 256, step=1, elem_id="max-new-tokens"), label="max_new_tokens"),
            t(gr.Textbox("", max_lines=1, elem_id="seed"), label="seed"),
        ]

    @staticmethod
    def _speech(t: Translated) -> list[Component]:
        return [
            t(
                gr.Dropdown(spoken_choices(texts.DEFAULT), value="", elem_id="spoken"),
                label="spoken_language",
                choices=spoken_choices,
            ),
            t(gr.Checkbox(False), label="translate"),
            t(gr.Checkbox(False), label="denoise"),
            t(gr.Checkbox(False, elem_id="aloud"), label="speak_answers"),
        ]


def spoken_choices(language: str) -> list[tuple[str, str]]:
    """(name, code) of the languages of recordings; only "detect" is in the interface language."""
    return [(name or texts.text("detect", language), code) for code, name in texts.SPOKEN.items()]
