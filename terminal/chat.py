"""A conversation in the terminal."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from assistant.answer import Answer
from assistant.assistant import Assistant
from assistant.messages import answer_message, user_message
from data.dataset import Message
from data.reading import check_image_file
from errors import PhiSightError
from speech.whisper import TooLong

HELP = """\
/image PATH   show a picture; the next question is about it (several: one line each)
/audio PATH   ask by a recording
/clear        begin a new conversation
/save [FILE]  write the conversation as JSON (LLaMA-Factory's messages and images form)
/quit         leave (or Ctrl-D); Ctrl-C stops an answer"""


class Terminal:
    """Reads lines, answers them, remembers the conversation."""

    def __init__(
        self,
        ask: Callable[[Sequence[Message]], Answer],
        listen: Callable[[str], str] | None = None,
        read: Callable[[str], str] = input,
        write: Callable[..., None] = print,
    ) -> None:
        """`ask`: messages -> the answer; `listen`: an audio file -> what was said in it, or
        None without a speech model."""
        self.ask, self.listen, self.read, self.write = ask, listen, read, write
        self.messages: list[Message] = []
        self.images: list[str] = []
        """paths of the pictures that the next question is about"""

    def run(self) -> int:
        """Until /quit or the end of the input. An error is printed, and it goes on."""
        self.write("Ask a question; /help tells more.")
        while True:
            try:
                line = self.read("> ").strip()
            except EOFError:
                self.write()
                return 0
            except KeyboardInterrupt:  # at the prompt there is nothing to stop
                self.write("\n/quit or Ctrl-D leaves")
                continue
            if line == "/quit":
                return 0
            try:
                self._handle(line)
            except PhiSightError as error:
                self.write(f"error: {error}")

    def _handle(self, line: str) -> None:
        """A command, or a question."""
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if not line:
            return
        if command == "/help":
            self.write(HELP)
        elif command == "/clear":
            self.messages, self.images = [], []
            self.write("a new conversation")
        elif command == "/image":
            check_image_file(argument)  # a picture that cannot be used is refused at once
            self.images.append(argument)
            self.write(f"picture {len(self.images)}: {argument}")
        elif command == "/audio":
            if self.listen is None:
                raise PhiSightError("/audio: no speech model is loaded; type the question")
            try:
                question = self.listen(argument)
            except TooLong as error:  # what was written down is not lost
                self.write(f"heard: {error.text}")
                raise
            self.write(f"heard: {question}")
            self.answer(question)
        elif command == "/save":
            self.save(argument)
        elif command.startswith("/"):
            raise PhiSightError(f"{command}: no such command; /help lists them")
        else:
            self.answer(line)

    def answer(self, prompt: str) -> None:
        """Ask, print the pieces, and remember both. Ctrl-C stops the answer and keeps its part."""
        asked = [*self.messages, user_message(prompt, self.images)]
        reply, text = self.ask(asked), ""
        try:
            for piece in reply:
                text += piece
                self.write(piece, end="", flush=True)
        except KeyboardInterrupt:
            reply.cancel()
            self.write(" [stopped]", end="")
        self.write()
        if text.strip():  # a question without any answer is forgotten
            self.messages, self.images = [*asked, answer_message(text)], []

    def save(self, name: str) -> None:
        """Write the conversation in a form that the data reader takes. Never over a file."""
        path = Path(name or time.strftime("conversation-%Y%m%d-%H%M%S.json"))
        if not self.messages:
            raise PhiSightError(f"{path}: nothing was said yet; ask something first")
        text = json.dumps([as_record(self.messages)], ensure_ascii=False, indent=1)
        try:
            with path.open("x", encoding="utf-8", newline="\n") as file:
                file.write(text + "\n")
        except FileExistsError:
            raise PhiSightError(f"{path}: exists already; give another name") from None
        except OSError as error:
            raise PhiSightError(f"{path}: {error.strerror}; give another name") from None
        self.write(f"saved as {path}")


def converse(
    ask: Callable[[Sequence[Message]], Answer], options: argparse.Namespace, assistant: Assistant
) -> int:
    """`infer.py --chat`: until the person leaves."""
    from speech.recordings import read_audio
    from terminal.hearing import listening

    listen = listening(options, assistant)
    return Terminal(ask, lambda path: listen(read_audio(path))).run()


def as_record(messages: Sequence[Message]) -> dict[str, list]:
    """LLaMA-Factory's form: pictures as <image> in the text, their paths beside."""
    return {
        "messages": [
            {
                "role": message.role,
                "content": "\n".join(
                    "<image>" if part.kind == "image" else part.value for part in message.parts
                ),
            }
            for message in messages
        ],
        "images": [
            part.value for message in messages for part in message.parts if part.kind == "image"
        ],
    }
