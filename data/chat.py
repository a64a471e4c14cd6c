"""The one renderer: messages -> token ids and label mask, for training and for inference alike.

What stands around the messages is the form of the tokenizer's family (`data.chat_forms`).

Why piece by piece gives the ids of the whole text
--------------------------------------------------
A tokenizer cuts the whole text of a chat at its special tokens and encodes each stretch between
them by itself. So encoding each stretch alone gives the same ids, on two conditions.

The first is that a stretch is cut where we cut it. Phi-3's marks have `rstrip=True`: each swallows
the white space that follows it, so the newlines of its template never become tokens. Other forms
have a newline before what is said, which belongs to the same stretch; but byte-level tokenizers cut
between a newline and what is no white space. Both hold for text that is stripped.

The second is that the tokenizer treats every stretch alike. It fails silently when transformers 5
loads a Phi-3 tokenizer as `LlamaTokenizer` (it does where a folder has no config.json): then only
the first stretch gets its `▁`, and every answer begins with an id that the base model was not
trained on. `ChatFormat.from_tokenizer` compares pieces and whole on a sample and refuses such a
tokenizer; `load_tokenizer` always loads it right.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from tokenizers import Tokenizer

import hub
from data.chat_forms import FORMS, ChatForm, find_form, find_slot
from data.chat_tokenizer import FolderTokenizer
from data.dataset import Message, Part, Role
from data.words import TextEncoder
from errors import PhiSightError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_tokenizer(
    name: str | Path, revision: str | None = None, embeddings: int | None = None
) -> FolderTokenizer:
    """Load tokenizer.json exactly as it is, from a folder or a hub id.

    `AutoTokenizer` may rebuild the tokenizer from its class name instead (see the module's
    docstring). `embeddings`: how many a model has that is to read its ids; None for no model.
    Raises PhiSightError if it cannot be loaded, or has more tokens than the model has embeddings.
    """
    # Not by the hub id: transformers asks for seven files, and for minutes if nobody answers.
    folder = hub.find_folder(name, revision, "tokenizer", hub.TOKENIZER_LAYOUT, hub.TOKENIZER_FILES)
    tokenizer = FolderTokenizer(folder)
    if embeddings is not None and tokenizer.embeddings > embeddings:
        raise PhiSightError(
            f"tokenizer of {name}: it has {tokenizer.embeddings} tokens and the model {embeddings} "
            "embeddings; use the tokenizer that belongs to the model"
        )
    return tokenizer


@dataclass(frozen=True)
class ChatFormat:
    """A form of chat in the ids of one tokenizer, the length of a picture, and an encoder of plain
    text."""

    form: ChatForm
    openings: dict[str, tuple[int, ...]] = field(hash=False)
    """by role; an answer is generated behind that of "assistant" """
    heads: dict[str, tuple[int, ...]] = field(hash=False)
    """by the role of the first message: what stands before it, such as a default system message"""
    closing: tuple[int, ...]
    """the mark that closes a message, which an answer learns, and what follows it"""
    ending: tuple[int, ...]
    """what stands behind the last message in training"""
    stop_ids: frozenset[int]
    padding_id: int
    image_token: str
    image_id: int
    tokens_per_image: int
    text_encoder: TextEncoder = field(repr=False, compare=False)

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: FolderTokenizer | PreTrainedTokenizerFast,
        tokens_per_image: int,
        forms: Sequence[ChatForm] = FORMS,
    ) -> ChatFormat:
        """The first of the `forms` whose marks the tokenizer has, in its ids.

        Raises PhiSightError if a token is missing, if `tokens_per_image` is not positive, or if the
        ids of a whole chat differ from the ids of its pieces.
        """
        if tokens_per_image < 1:
            raise PhiSightError(f"tokens per image: {tokens_per_image} is too few; give 1 or more")
        backend, name = tokenizer.backend_tokenizer, tokenizer.name_or_path
        form = find_form(backend.token_to_id, name, forms)
        slot = find_slot(form, backend.token_to_id, name)

        def ids_of(text: str) -> tuple[int, ...]:
            return tuple(backend.encode(text, add_special_tokens=False).ids)

        def mark_id(mark: str) -> int:
            if (number := backend.token_to_id(mark)) is None:
                raise PhiSightError(
                    f"tokenizer {name}: has no {mark} of the chat of {form.models}; use the"
                    " model's own tokenizer"
                )
            return number

        chat_format = cls(
            form,
            {role: ids_of(form.opening_of(role)) for role in get_args(Role)},
            {role: ids_of(form.before(role)) for role in get_args(Role)},
            ids_of(form.closing + form.after),
            ids_of(form.end),
            frozenset(map(mark_id, form.stops)),
            mark_id(form.padding),
            slot,
            mark_id(slot),
            tokens_per_image,
            TextEncoder(_plain_text_encoder(backend)),
        )
        chat_format._check_spelling(backend.token_to_id, name)
        chat_format._check_pieces(backend, tokenizer)
        return chat_format

    @property
    def end_id(self) -> int:
        """The mark that closes a message."""
        return self.closing[0]

    def encode_text(self, text: str) -> list[int]:
        """Ids of the stripped text, in which special tokens that a person typed are plain text."""
        return self.text_encoder(text)

    def bare_tokens(self, messages: Sequence[Message]) -> int:
        """How many tokens a training conversation of these has beside its messages."""
        return len(self.heads[messages[0].role]) + len(self.ending)

    def frame_tokens(self, role: str) -> int:
        """How many tokens stand around what is said in a message of `role`."""
        return len(self.openings[role]) + len(self.closing)

    def _check_spelling(self, id_of: Callable[[str], int | None], name: str) -> None:
        """Raise `PhiSightError` if text that a person types can become a mark or a picture's slot:
        by being written as it, or by a letter that the tokenizer does not know."""
        for mark in dict.fromkeys((*self.form.marks, *self.form.stops, self.image_token)):
            for text in (mark, f" {mark}", UNKNOWN_LETTER):
                if id_of(mark) in self.encode_text(text):
                    raise PhiSightError(
                        f"tokenizer {name}: makes {mark} of the text {text!r}, which anyone may"
                        f" type; use the tokenizer of {self.form.models}"
                    )

    def _check_pieces(
        self, backend: Tokenizer, tokenizer: FolderTokenizer | PreTrainedTokenizerFast
    ) -> None:
        pictures = {"image": self.image_token * self.tokens_per_image}

        def written(message: Message) -> str:
            said = "".join(pictures.get(part.kind, part.value) for part in message.parts)
            return self.form.message(message.role, said)

        def ids_of(text: str) -> list[int]:
            return backend.encode(text, add_special_tokens=False).ids

        alike = all(
            ids_of(mark) == [backend.token_to_id(mark)]
            for mark in (*self.form.marks, self.image_token)
        )
        for messages in (_SAMPLE, _SAMPLE[1:]):  # with a system message and without one
            before = self.form.before(messages[0].role)
            whole = before + "".join(map(written, messages)) + self.form.end
            alike = alike and ids_of(whole) == render(messages, self).input_ids
        if not alike:
            raise PhiSightError(
                f"tokenizer {tokenizer.name_or_path} ({type(tokenizer).__name__}): the ids of a "
                "whole chat differ from the ids of its pieces; keep the model's config.json beside "
                "it, or load it as PreTrainedTokenizerFast"
            )


UNKNOWN_LETTER = "\U00013080"  # which few tokenizers have whole: an Egyptian hieroglyph
# A letter, a digit, an accent and a sign each stand behind an opening.
_SAMPLE = (
    Message("system", (Part("text", "Be brief."),)),
    Message("user", (Part("image", "cat.jpg"), Part("text", "What is it?"))),
    Message("assistant", (Part("text", "A cat.\n\nBlack"),)),
    Message("user", (Part("text", "2 + 2?"), Part("image", "sum.jpg"))),
    Message("assistant", (Part("text", "(4)"),)),
    Message("user", (Part("text", "\u0301a"),)),
    Message("assistant", (Part("text", "What?"),)),
)


def _plain_text_encoder(backend: Tokenizer) -> Tokenizer:
    """The same tokenizer without its added tokens, so that no text can spell one.

    `split_special_tokens=True` is not enough: Phi-3 declares `</s>` as added but not special, and a
    person who types it would still get id 2.
    """
    description = json.loads(backend.to_str())
    description.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
    return Tokenizer.from_str(json.dumps(description))


@dataclass(frozen=True)
class Limits:
    """How long a conversation may be; 0 for no limit."""

    text_tokens: int = 0
    """tokens, those of pictures not counted"""
    row_tokens: int = 0
    """all tokens: what a row holds"""
    positions: int = 0
    """all tokens: what the base was made for"""

    @property
    def tokens(self) -> int:
        """The least of the limits of all tokens; 0 for none."""
        return min(filter(None, (self.row_tokens, self.positions)), default=0)

    def hold(self, text_tokens: int, tokens: int) -> bool:
        """Whether a conversation of so many tokens of text, and in all, is within them."""
        return (not self.text_tokens or text_tokens <= self.text_tokens) and (
            not self.tokens or tokens <= self.tokens
        )

    def reason(self, text_tokens: int, pictures: int, tokens: int) -> str:
        """Why a conversation whose first turn has so many cannot be used."""
        if self.text_tokens and text_tokens > self.text_tokens:
            return (
                f"conversation: its first turn has {text_tokens} text tokens and the limit is"
                f" {self.text_tokens}; raise --max-text-tokens or shorten the conversation"
            )
        limit, remedy = f"the base has {self.positions} positions", "leave some of it out"
        if self.tokens == self.row_tokens:
            limit, remedy = f"--row-tokens {self.row_tokens} is less", "raise it"
        return (
            f"conversation: its first turn has {tokens} tokens, {tokens - text_tokens} of them of"
            f" {pictures} pictures, and {limit}; {remedy}"
        )


NOTHING_LEARNT = "conversation: none of the answers that fit is to be learnt; raise the limits"


@dataclass(frozen=True)
class RenderedSample:
    """Ids, and for each id whether the model learns to predict it; pictures in slot order.

    The slot of a picture is a run of `tokens_per_image` image ids; slots of pictures that stand
    side by side touch.
    """

    input_ids: list[int]
    supervised: list[bool]
    images: tuple[str, ...]


def render(
    messages: Sequence[Message], chat_format: ChatFormat, add_generation_prompt: bool = False
) -> RenderedSample:
    """Render messages in the chat form: the ids of its template, pictures as image ids.

    Supervised are the tokens of each answer that is `learnt` and the mark that closes it: what the
    form has behind that mark comes after the model has stopped. `add_generation_prompt` opens an
    answer in the place of what ends a conversation in training. Text next to text in one message
    is joined by a newline.

    Raises PhiSightError for a picture in a message that is not the user's.
    """
    draft = _Draft(chat_format)
    for message in messages:
        draft.add(message)
    return draft.closed_by(
        chat_format.openings["assistant"] if add_generation_prompt else chat_format.ending
    )


def render_to_limit(
    messages: Sequence[Message], chat_format: ChatFormat, limits: Limits
) -> tuple[RenderedSample, int]:
    """Render a training conversation, without the last turns (question and answer) that do not fit.

    A system message stays. Every message is tokenised once. Returns the sample, equal to what
    `render` gives for the messages that are kept, and the number of turns dropped.

    Raises PhiSightError, naming the numbers, if the first turn alone is too long or nothing that
    fits is learnt, and ValueError if the messages do not end with an answer.
    """
    if not messages or messages[-1].role != "assistant":
        raise ValueError("the messages must end with the assistant's answer")
    draft = _Draft(chat_format)
    fitting: tuple[int, int] | None = None  # ids and pictures up to the last answer that fits
    kept_turns = 0
    for message in messages:
        pictures = sum(part.kind == "image" for part in message.parts)
        if not limits.hold(0, len(draft.input_ids) + pictures * chat_format.tokens_per_image):
            break  # before their ids are made: one record may name a million pictures
        draft.add(message)
        if message.role != "assistant":
            continue
        end = len(chat_format.ending)
        if not limits.hold(draft.text_tokens + end, len(draft.input_ids) + end):
            break
        fitting, kept_turns = (len(draft.input_ids), len(draft.images)), kept_turns + 1
    if fitting is None:
        raise PhiSightError(limits.reason(*_first_turn_length(messages, chat_format)))
    draft.cut(*fitting)
    if not any(draft.supervised):
        raise PhiSightError(NOTHING_LEARNT)
    turns = sum(message.role == "assistant" for message in messages)
    return draft.closed_by(chat_format.ending), turns - kept_turns


def too_many_pictures(messages: Sequence[Message], chat_format: ChatFormat, limits: Limits) -> str:
    """Why a conversation cannot be used whose first turn is too long by its pictures alone; empty
    for any other, of which nothing is tokenised."""
    pictures = 0
    for message in messages:
        pictures += sum(part.kind == "image" for part in message.parts)
        if message.role == "assistant":
            break
    if limits.hold(0, pictures * chat_format.tokens_per_image):
        return ""
    return limits.reason(*_first_turn_length(messages, chat_format))


def _first_turn_length(messages: Sequence[Message], chat_format: ChatFormat) -> tuple[int, ...]:
    """Tokens of text, pictures, and all tokens up to the first answer, and what ends it there."""
    text_tokens, pictures = chat_format.bare_tokens(messages), 0
    for message in messages:
        text_tokens += chat_format.frame_tokens(message.role)
        for kind, value in message_pieces(message):
            if kind == "text":
                text_tokens += len(chat_format.encode_text(value))
            pictures += kind == "image"
        if message.role == "assistant":
            break
    return text_tokens, pictures, text_tokens + pictures * chat_format.tokens_per_image


def all_learnt(sample: RenderedSample, chat_format: ChatFormat) -> RenderedSample:
    """The sample with every token of text learnt, whoever says it, but the first, before which
    nothing stands. Pictures' tokens are no text: there is nothing that the model could say."""
    learnt = [token != chat_format.image_id for token in sample.input_ids]
    return replace(sample, supervised=[False, *learnt[1:]])


def first_exchange(sample: RenderedSample, chat_format: ChatFormat) -> RenderedSample:
    """A rendered conversation cut after its first answer that is learnt: what `render` gives for
    that much."""
    learnt = [*sample.supervised, False]
    end = learnt.index(False, learnt.index(True))
    ids = sample.input_ids[:end]
    pictures = ids.count(chat_format.image_id) // chat_format.tokens_per_image
    rest = (*chat_format.closing[1:], *chat_format.ending)
    return RenderedSample(
        [*ids, *rest],
        [*sample.supervised[:end], *[False] * len(rest)],
        sample.images[:pictures],
    )


def to_first_answer(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages that `first_exchange` keeps: all up to the first answer that is learnt."""
    ends = (i for i, m in enumerate(messages, 1) if m.role == "assistant" and m.learnt)
    return tuple(messages[: next(ends)])


@dataclass
class _Draft:
    """A sample that messages are added to."""

    chat_format: ChatFormat
    input_ids: list[int] = field(default_factory=list)
    supervised: list[bool] = field(default_factory=list)
    images: list[str] = field(default_factory=list)

    @property
    def text_tokens(self) -> int:
        return len(self.input_ids) - len(self.images) * self.chat_format.tokens_per_image

    def add(self, message: Message) -> None:
        content, images = _message_ids(message, self.chat_format)
        is_learnt = message.role == "assistant" and message.learnt
        opening, closing = self.chat_format.openings[message.role], self.chat_format.closing
        if not self.input_ids:
            opening = (*self.chat_format.heads[message.role], *opening)
        self.input_ids += [*opening, *content, *closing]
        self.supervised += [False] * len(opening)
        self.supervised += [is_learnt] * (len(content) + 1)
        self.supervised += [False] * (len(closing) - 1)
        self.images += images

    def cut(self, ids: int, images: int) -> None:
        """Keep the first `ids` tokens, which hold `images` pictures."""
        del self.input_ids[ids:], self.supervised[ids:], self.images[images:]

    def closed_by(self, last: Sequence[int]) -> RenderedSample:
        """The sample with `last` as its last ids, which are not learnt."""
        return RenderedSample(
            [*self.input_ids, *last],
            [*self.supervised, *[False] * len(last)],
            tuple(self.images),
        )


def message_pieces(message: Message) -> Iterator[tuple[str, str]]:
    """("text", what is encoded as one stretch) and ("image", name), in order.

    Raises PhiSightError for a picture in a message that is not the user's.
    """
    pending: list[str] = []  # text parts that no picture has separated yet
    for part in message.parts:
        if part.kind == "text":
            pending.append(part.value.strip())
            continue
        if text := "\n".join(filter(None, pending)):
            yield "text", text
        pending.clear()
        if message.role != "user":
            raise PhiSightError(
                f"picture {part.value}: stands in the {message.role}'s message; "
                "put it into the user's"
            )
        yield "image", part.value
    if text := "\n".join(filter(None, pending)):
        yield "text", text


def _message_ids(message: Message, chat_format: ChatFormat) -> tuple[list[int], list[str]]:
    """The ids between what opens a message and what closes it, and its pictures."""
    ids: list[int] = []
    images: list[str] = []
    for kind, value in message_pieces(message):
        if kind == "text":
            ids += chat_format.encode_text(value)
        else:
            ids += [chat_format.image_id] * chat_format.tokens_per_image
            images.append(value)
    return ids, images
