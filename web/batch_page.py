"""The batch tab: one question about many pictures, answered side by side into a table and a CSV."""

from __future__ import annotations

import csv
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import gradio as gr

from assistant.answer import Answer
from assistant.assistant import Assistant
from data.dataset import Message, Part
from errors import PhiSightError
from web import texts
from web.conversation import clean_text
from web.errors import RequestError
from web.page import QUEUED, Translated, Updates, errors_shown, window_of
from web.session import Session
from web.settings import Settings, settings_from
from web.settings_panel import SettingsPanel
from web.temporary import made_file
from web.uploads import read_picture

MAX_PICTURES = 500
AT_ONCE = 8  # questions that wait for the engine, which computes them together
REFRESH_SECONDS = 0.2
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would run


class BatchPage:
    """Builds the tab inside the open `gr.Blocks` and answers its events."""

    def __init__(self, assistant: Assistant, translated: Translated) -> None:
        self.assistant, self.translated = assistant, translated
        # By window, as long as its batch runs.
        self._stops: WeakValueDictionary[str, threading.Event] = WeakValueDictionary()

    def build(self) -> None:
        t = self.translated
        t(gr.Markdown(), value="batch_intro")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                self.files = t(
                    gr.File(
                        file_count="multiple",
                        file_types=["image"],
                        height=190,
                        elem_id="batch-files",
                    ),
                    label="pictures",
                )
                self.question = t(gr.Textbox(lines=2, elem_id="batch-question"), label="question")
                with gr.Row():
                    self.run = t(
                        gr.Button(variant="primary", elem_id="batch-run"), value="run_batch"
                    )
                    self.stop = t(gr.Button(elem_id="batch-stop"), value="stop")
            with gr.Column(scale=3, min_width=280):
                self.note = gr.Markdown(elem_id="batch-note")
                self.table = t(
                    gr.Dataframe(
                        headers=header(texts.DEFAULT),
                        type="array",
                        column_count=2,
                        interactive=False,
                        wrap=True,
                        show_label=False,
                        buttons=[],
                        elem_id="batch-table",
                        column_widths=["40%", "60%"],
                    ),
                    headers=header,
                )
                self.download = t(
                    gr.DownloadButton(visible=False, elem_id="batch-download"), label="download_csv"
                )

    def connect(self, session: gr.State, settings: SettingsPanel) -> None:
        shown = [self.table, self.note, self.download]
        self.run.click(
            self.on_run,
            [session, self.files, self.question, *settings.components],
            shown,
            **QUEUED,
        )
        self.stop.click(self.on_stop, None, None, queue=False, api_visibility="private")

    def on_run(
        self,
        request: gr.Request,
        session: Session,
        files: list[str] | None,
        question: str,
        *values: Any,
    ) -> Iterator[Updates]:
        language = session.language
        with errors_shown(language):
            question = clean_text(question or "").strip()
            if not files or not question:
                raise RequestError("batch_needs")
            if len(files) > MAX_PICTURES:
                raise PhiSightError(texts.text("batch_too_many", language, most=MAX_PICTURES))
            settings = settings_from(values)
            rows = [[Path(path).name, ""] for path in files]
            stop = self._stops[window_of(request)] = threading.Event()
            yield self._shown(rows, 0, language)
            done, last = 0, time.perf_counter()
            for index, answer in answers(self.assistant, files, question, settings, stop):
                rows[index][1], done = answer, done + 1
                if time.perf_counter() - last > REFRESH_SECONDS:
                    yield self._shown(rows, done, language)
                    last = time.perf_counter()
            table = write_csv(rows, language)
            try:
                yield {
                    **self._shown(rows, done, language),
                    self.download: gr.update(value=table, visible=True),
                }
            finally:  # Gradio has copied it by now
                Path(table).unlink(missing_ok=True)

    def on_stop(self, request: gr.Request) -> None:
        self.stop_window(window_of(request))

    def stop_window(self, window: str) -> None:
        """End the batch of a window."""
        stop = self._stops.get(window)
        if stop is not None:
            stop.set()

    def _shown(self, rows: list[list[str]], done: int, language: str) -> Updates:
        return {
            self.table: gr.update(value=[list(row) for row in rows], headers=header(language)),
            self.note: texts.text("batch_done", language, done=done, total=len(rows)),
            self.download: gr.update(visible=False),
        }


def header(language: str) -> list[str]:
    return [texts.text("picture", language), texts.text("answer", language)]


def answers(
    assistant: Assistant,
    paths: Sequence[str],
    question: str,
    settings: Settings,
    stop: threading.Event,
) -> Iterator[tuple[int, str]]:
    """(index, answer) of every picture as it is ready, in no order. A picture that cannot be used
    gets its error as its answer; after `stop` is set nothing more comes."""
    replies: list[Answer] = []

    def ask(index: int) -> tuple[int, str]:
        if stop.is_set():
            return index, ""
        try:
            path = Path(paths[index])
            message = Message("user", (Part("image", path.name), Part("text", question)))
            reply = assistant.reply(
                [message],
                settings.max_new_tokens,
                settings.sampling,
                settings.seed,
                pictures={path.name: read_picture(path)},
            )
            replies.append(reply)
            if stop.is_set():  # it was, while the picture was looked at
                reply.cancel()
            return index, "".join(reply).strip()
        except PhiSightError as error:
            return index, f"({' '.join(str(error).split())})"

    with ThreadPoolExecutor(AT_ONCE) as pool:
        waiting = {pool.submit(ask, index) for index in range(len(paths))}
        try:
            while waiting and not stop.is_set():
                ready, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in ready)
        finally:  # stopped, or the page was closed
            stop.set()
            for reply in replies:
                reply.cancel()


def write_csv(rows: Sequence[Sequence[str]], language: str) -> str:
    """The path of a CSV that spreadsheets open as text: UTF-8 with a byte order mark, and no
    cell a formula."""
    path = made_file(".csv")
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        for row in (header(language), *rows):
            writer.writerow([f"'{cell}" if cell.startswith(FORMULA) else cell for cell in row])
    return str(path)
