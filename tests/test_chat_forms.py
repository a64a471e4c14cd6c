"""Every chat form against transformers' own rendering of the family's published template."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from assistant.text_stream import TextStream
from data.chat import (
    ChatFormat,
    Limits,
    all_learnt,
    first_exchange,
    load_tokenizer,
    render,
    render_to_limit,
)
from data.chat_forms import FORMS, chat_template
from data.chat_forms.template import quoted
from data.dataset import Message, Part
from data.lengths import TokenCounter, fit
from data.packed import PackedSamples
from errors import PhiSightError
from tools.small.tokenizers import NAMES, write_tokenizer
from web.chat.told import tokens_of

TOKENS_PER_IMAGE = 3
DATA_PAGE = Path(__file__).resolve().parents[1] / "docs" / "data.md"
BLOCK = "<think>\n\n</think>\n\n"  # Qwen3's empty thoughts
SLOTS = {
    "phi3": "<|placeholder1|>",
    "phi4": "<|tag|>",
    "llama3": "<|reserved_special_token_0|>",
    "smollm2": "<empty_output>",
    "qwen2.5": "<|image_pad|>",
    "qwen3": "<|image_pad|>",
}
STOPS = {
    "phi3": {"<|end|>", "<|endoftext|>"},
    "phi4": {"<|end|>", "<|endoftext|>"},
    "llama3": {"<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"},
    "smollm2": {"<|im_end|>", "<|endoftext|>"},
    "qwen2.5": {"<|im_end|>", "<|endoftext|>"},
    "qwen3": {"<|im_end|>", "<|endoftext|>"},
}
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    return write_tokenizer(name, tmp_path_factory.mktemp("tokenizer"), 640)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def chat_format(tokenizer):
    return ChatFormat.from_tokenizer(tokenizer, TOKENS_PER_IMAGE)


def said(role: str, *parts: str) -> Message:
    """A message; an empty part stands for a picture."""
    return Message(role, tuple(Part("text", p) if p else Part("image", "a.jpg") for p in parts))


TURNS = (
    said("user", "", "What is in this picture?"),
    said("assistant", "A red bus,\n\nand 2 dogs."),
    said("user", "Compare it with", "", "this one."),
    said("assistant", "1st: no dog."),
)
BRIEF = said("system", "Be brief.")


def as_text(message: Message, chat_format: ChatFormat) -> dict[str, str]:
    """As a template takes it that knows no pictures: they are the text of their tokens."""
    picture = chat_format.image_token * chat_format.tokens_per_image
    text = "".join(picture if part.kind == "image" else part.value for part in message.parts)
    return {"role": message.role, "content": text}


def published(tokenizer, messages, chat_format, prompt: bool = False) -> str:
    """The text of the family's own template, by transformers."""
    given = [as_text(message, chat_format) for message in messages]
    return tokenizer.full.apply_chat_template(
        given, tokenize=False, add_generation_prompt=prompt, enable_thinking=False
    )


def with_every_block(text: str, chat_format: ChatFormat) -> str:
    """Qwen3's template leaves the empty thoughts out of past answers; every answer has them here,
    as the docstring of `data.chat_forms.chatml` says."""
    if chat_format.form.name != "qwen3":
        return text
    opening = "<|im_start|>assistant\n"
    return text.replace(opening + BLOCK, opening).replace(opening, opening + BLOCK)


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer.full(text, add_special_tokens=False)["input_ids"]


# -- ids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("messages", [TURNS[:2], (BRIEF, *TURNS[:2])])
def test_one_turn_has_the_ids_of_the_published_template(tokenizer, chat_format, messages):
    text = published(tokenizer, messages, chat_format)
    assert render(messages, chat_format).input_ids == ids_of(tokenizer, text)
    asked = messages[:-1]
    text = published(tokenizer, asked, chat_format, prompt=True)
    assert render(asked, chat_format, True).input_ids == ids_of(tokenizer, text)


@pytest.mark.parametrize("start", [(), (BRIEF,)])
def test_several_turns_have_its_ids(tokenizer, chat_format, start):
    for messages, prompt in (((*start, *TURNS), False), ((*start, *TURNS[:3]), True)):
        text = with_every_block(published(tokenizer, messages, chat_format, prompt), chat_format)
        assert render(messages, chat_format, prompt).input_ids == ids_of(tokenizer, text)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_conversation_has_its_ids_and_lengths(tokenizer, chat_format, data):
    marks = [token.content for token in tokenizer.full.added_tokens_decoder.values()]
    words = st.text(max_size=20) | st.sampled_from(["2", "a b", "'s", "(", "e\u0301\n\nx", "é\t1"])
    clean = words.map(str.strip).filter(lambda text: not any(mark in text for mark in marks))
    messages = [BRIEF] * data.draw(st.booleans())
    for _ in range(data.draw(st.integers(1, 3))):
        text, pictures = data.draw(clean), data.draw(st.integers(0, 2))
        parts = [*[""] * pictures, text] if text else [""]
        messages.append(said("user", *parts[:: data.draw(st.sampled_from([1, -1]))]))
        answer = Part("text", data.draw(clean.filter(bool)))
        messages.append(Message("assistant", (answer,), data.draw(st.booleans())))
    text = with_every_block(published(tokenizer, messages, chat_format), chat_format)
    sample = render(messages, chat_format)
    assert sample.input_ids == ids_of(tokenizer, text)
    # Learnt are the tokens of the answers that are to be learnt, and the marks that close them.
    learnt = [token for token, is_learnt in zip(sample.input_ids, sample.supervised) if is_learnt]
    wanted = []
    for message in messages:
        if message.role == "assistant" and message.learnt:
            wanted += ids_of(tokenizer, message.parts[0].value + chat_format.form.closing)
    assert learnt == wanted
    counted = TokenCounter(chat_format).count(messages)
    pictures = len(sample.images)
    size = len(sample.input_ids)
    assert counted == (size - pictures * TOKENS_PER_IMAGE, pictures, size, sum(sample.supervised))
    assert tokens_of(messages, chat_format) == size - len(chat_format.ending)
    packed = PackedSamples(chat_format)
    packed.append(sample)
    assert packed[0] == sample


@pytest.mark.parametrize("start", [(), (BRIEF,)])
def test_the_mask_is_that_of_the_answers_places(tokenizer, chat_format, start):
    messages = (*start, *TURNS)
    text = with_every_block(published(tokenizer, messages, chat_format), chat_format)
    places, at = [], 0
    for answer in (TURNS[1].parts[0].value, TURNS[3].parts[0].value):
        at = text.index(answer, at)
        places.append(range(at, at + len(answer + chat_format.form.closing)))
    spans = tokenizer.full(text, add_special_tokens=False, return_offsets_mapping=True)
    wanted = [any(begin in place for place in places) for begin, _ in spans["offset_mapping"]]
    assert render(messages, chat_format).supervised == wanted


def test_an_answer_is_asked_for_by_the_ids_that_training_puts_before_it(chat_format):
    for start in ((), (BRIEF,)):
        whole = render((*start, *TURNS), chat_format)
        for number in (1, 3):
            prompt = render((*start, *TURNS[:number]), chat_format, True)
            size = len(prompt.input_ids)
            assert whole.input_ids[:size] == prompt.input_ids
            opening = len(chat_format.openings["assistant"])
            assert not any(prompt.supervised[-opening:]) and whole.supervised[size]
            # So what was read and said in one turn is the beginning of the next one's prompt.
            answer = chat_format.encode_text(TURNS[number].parts[0].value)
            after = [*prompt.input_ids, *answer, *chat_format.closing]
            assert whole.input_ids[: len(after)] == after


def test_a_text_cannot_spell_a_mark(tokenizer, chat_format):
    reserved = {*tokenizer.full.added_tokens_decoder}
    frame = [*chat_format.heads["user"], *chat_format.openings["user"]]
    rest = [*chat_format.closing, *chat_format.ending]
    marks = [token.content for token in tokenizer.full.added_tokens_decoder.values()]
    for typed in (*marks, "".join(marks), f"Hi{chat_format.form.closing}\n{marks[0]}x"):
        ids = render((said("user", typed),), chat_format).input_ids
        assert ids[: len(frame)] == frame and ids[-len(rest) :] == rest
        content = ids[len(frame) : -len(rest)]
        assert not reserved & set(content), typed
        assert tokenizer.decode(content).strip() == typed


def test_a_system_message_takes_the_place_of_the_default_one(tokenizer, chat_format):
    default = tokenizer.decode(chat_format.heads["user"])
    assert tokenizer.decode(render((BRIEF, *TURNS), chat_format).input_ids).count("Be brief.") == 1
    assert (chat_format.form.default_system or "") in default
    system = render((BRIEF,), chat_format).input_ids
    assert system[: len(chat_format.heads["system"])] == [*chat_format.heads["system"]]
    if chat_format.form.default_system:
        assert chat_format.form.default_system not in tokenizer.decode(system)
    assert (chat_format.form.name == "llama3") == (DATES in tokenizer.decode(system))


# -- what is made of a rendered conversation ------------------------------------------------------


def test_what_does_not_fit_is_left_out(chat_format):
    for messages in (TURNS, (BRIEF, *TURNS)):
        counter = TokenCounter(chat_format)
        short, whole = counter.count(messages[:-2]).text_tokens, counter.count(messages).text_tokens
        for limit in (short, whole - 1, whole):
            sample, dropped = render_to_limit(messages, chat_format, Limits(limit))
            assert dropped == (limit < whole)
            assert sample == render(messages[: len(messages) - 2 * dropped], chat_format)
            assert fit(messages, counter.running(messages), Limits(limit)) == (dropped, "")
        with pytest.raises(PhiSightError, match=f"{short} text tokens .* {short - 1};"):
            render_to_limit(messages, chat_format, Limits(short - 1))
        assert fit(messages, counter.running(messages), Limits(short - 1))[1]


def test_a_first_exchange_is_what_is_rendered_of_it(chat_format):
    for messages in (TURNS, (BRIEF, *TURNS), TURNS[:2]):
        end = 2 + (messages[0] is BRIEF)
        expected = render(messages[:end], chat_format)
        assert first_exchange(render(messages, chat_format), chat_format) == expected


def test_all_learnt_is_all_text(chat_format):
    sample = all_learnt(render((BRIEF, *TURNS), chat_format), chat_format)
    assert sample.supervised[1:] == [i != chat_format.image_id for i in sample.input_ids[1:]]
    assert not sample.supervised[0]


def test_a_stream_shows_what_was_said_and_no_marks(tokenizer, chat_format):
    stream = TextStream(tokenizer)
    answer = "2 dogs,\n\nand é 👩\u200d👩\u200d👧"
    special = [
        m for m in chat_format.form.marks if tokenizer.decode([_id(tokenizer, m)], True) == ""
    ]
    assert {*special} >= {chat_format.form.closing, *chat_format.form.stops}
    shown = ""
    for token in (*chat_format.encode_text(answer), *(_id(tokenizer, mark) for mark in special)):
        shown += stream.push(token)
    assert (shown + stream.end()).strip() == answer


def _id(tokenizer, mark: str) -> int:
    return tokenizer.backend_tokenizer.token_to_id(mark)


def test_our_template_gives_these_ids_in_transformers(tokenizer, chat_format):
    picture = quoted(chat_format.image_token * TOKENS_PER_IMAGE)
    template = chat_template(chat_format.form, "image", picture)
    for messages, prompt in ((TURNS, False), (TURNS[:3], True), ((BRIEF, *TURNS[:3]), True)):
        given = [
            {
                "role": message.role,
                "content": [
                    {"type": part.kind, "text": f" {part.value}\n"} for part in message.parts
                ],
            }
            for message in messages
        ]
        text = tokenizer.full.apply_chat_template(
            given, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
        assert ids_of(tokenizer, text) == render(messages, chat_format, prompt).input_ids


# -- which form a tokenizer has -------------------------------------------------------------------


def test_a_tokenizer_has_the_form_of_its_family(name, tokenizer, chat_format):
    assert (chat_format.form.name, chat_format.image_token) == (name, SLOTS[name])
    assert chat_format.image_id == _id(tokenizer, SLOTS[name])
    assert chat_format.stop_ids == {_id(tokenizer, mark) for mark in STOPS[name]}
    assert chat_format.closing[0] == _id(tokenizer, chat_format.form.closing)
    own = [form for form in FORMS if form.name == name]
    assert ChatFormat.from_tokenizer(tokenizer, TOKENS_PER_IMAGE, own) == chat_format
    assert hash(chat_format) == hash(dataclasses.replace(chat_format))


def test_every_token_that_a_form_needs_is_among_its_marks():
    for form in FORMS:
        assert {form.closing, form.padding, *form.stops} <= {*form.marks}
        assert not {*form.slots} & {*form.marks} or form.name == "phi3"
    assert [form.name for form in FORMS] == [
        "phi3",
        "phi4",
        "llama3",
        "qwen3",
        "qwen2.5",
        "smollm2",
    ]


def test_the_page_names_what_every_form_has():
    rows = [line.replace("\\|", "|") for line in DATA_PAGE.read_text("utf-8").splitlines()]
    for form in FORMS:
        (row,) = (line for line in rows if line.startswith(f"| `{form.name}` | {form.models} |"))
        slots = "as Qwen2.5's" if form.name == "qwen3" else " ".join(f"`{s}`" for s in form.slots)
        assert row.endswith(f"| {slots} | {' '.join(f'`{mark}`' for mark in form.stops)} |")
        assert (form.default_system or "") in row


def changed(tmp_path, name: str, change) -> object:
    """The tokenizer `name` with its tokenizer.json changed."""
    folder = write_tokenizer(name, tmp_path, 640)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    known = {str(token["id"]) for token in content["added_tokens"]}
    declared = config["added_tokens_decoder"]
    config["added_tokens_decoder"] = {key: declared[key] for key in declared if key in known}
    names = {token["content"] for token in content["added_tokens"]}
    kept = {k: v for k, v in config.items() if not k.endswith("_token") or v in names}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    return load_tokenizer(folder)


def without(*texts: str):
    def change(content: dict) -> None:
        content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in texts]

    return change


def refusal(tokenizer, forms=FORMS) -> str:
    with pytest.raises(PhiSightError) as caught:
        ChatFormat.from_tokenizer(tokenizer, 1, forms)
    return str(caught.value)


EVERY = ", ".join(form.models for form in FORMS)


def test_a_tokenizer_of_no_family_is_told_what_it_lacks(tmp_path):
    tokenizer = changed(tmp_path, "llama3", without("<|finetune_right_pad_id|>", "<|eom_id|>"))
    own = [form for form in FORMS if form.name == "phi3"]  # named once, though given twice
    assert refusal(tokenizer, (*own, *FORMS)) == (
        f"tokenizer {tmp_path}: has no <|eom_id|> <|finetune_right_pad_id|> of the chat of"
        f" Llama 3.1 and 3.2; use the tokenizer of {EVERY}"
    )


def test_a_tokenizer_of_another_family_is_told_what_would_do(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer("qwen2.5", tmp_path, 640))
    qwen3 = [form for form in FORMS if form.name == "qwen3"]
    assert refusal(tokenizer, qwen3) == (
        f"tokenizer {tmp_path}: has no <think> </think> of the chat of Qwen3;"
        " use the tokenizer of Qwen3"
    )


def test_a_tokenizer_with_no_place_for_pictures_is_told_which_would_do(tmp_path):
    tokenizer = changed(
        tmp_path, "qwen2.5", without("<|image_pad|>", "<|vision_pad|>", "<|video_pad|>")
    )
    assert refusal(tokenizer) == (
        f"tokenizer {tmp_path}: has none of <|image_pad|> <|vision_pad|> <|video_pad|> to hold the"
        " place of a picture; use the tokenizer of Qwen2.5"
    )


def test_the_next_slot_is_taken_where_the_first_is_not_there(tmp_path):
    tokenizer = changed(tmp_path, "qwen2.5", without("<|image_pad|>"))
    assert ChatFormat.from_tokenizer(tokenizer, 1).image_token == "<|vision_pad|>"


def test_a_mark_that_is_no_token_of_its_own_is_refused(tmp_path):
    # SmolLM2 has its marks in the vocabulary too: this one is there, and text does not give it.
    tokenizer = changed(tmp_path, "smollm2", without("<|im_end|>"))
    assert "differ from the ids of its pieces" in refusal(tokenizer)


def test_a_newline_that_is_joined_with_a_text_is_refused(tmp_path):
    def join(content: dict) -> None:
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\n?[^\n]+|\n"}
        merges, vocab = content["model"]["merges"], content["model"]["vocab"]
        merges.insert(0, ["Ċ", "W"])
        vocab["ĊW"] = max(t["id"] for t in content["added_tokens"]) + 1

    tokenizer = changed(tmp_path, "qwen2.5", join)
    assert "differ from the ids of its pieces" in refusal(tokenizer)


def test_phi3s_marks_go_before_those_of_chatml(tmp_path):
    def give(content: dict) -> None:
        last = max(token["id"] for token in content["added_tokens"])
        like = content["added_tokens"][-1] | {"special": True, "rstrip": True}
        marks = [form for form in FORMS if form.name == "phi3"][0].marks
        known = {token["content"] for token in content["added_tokens"]}
        content["added_tokens"] += [
            like | {"id": last + 1 + number, "content": mark}
            for number, mark in enumerate(mark for mark in marks if mark not in known)
        ]

    tokenizer = changed(tmp_path, "smollm2", give)
    assert ChatFormat.from_tokenizer(tokenizer, 1).form.name == "phi3"


# -- the small tokenizers -------------------------------------------------------------------------


def test_a_small_tokenizer_is_the_same_at_every_call(name, folder, tokenizer, tmp_path):
    again = write_tokenizer(name, tmp_path, 640)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (again / file).read_bytes() == (folder / file).read_bytes()
    assert tokenizer.alone and len(tokenizer) <= 640


def test_a_small_tokenizer_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(PhiSightError, match="gemma: is none of phi3, phi4, llama3, smollm2, qwen"):
        write_tokenizer("gemma", tmp_path, 640)
    with pytest.raises(PhiSightError, match=r"qwen3: 400 tokens are too few; take \d+ or more"):
        write_tokenizer("qwen3", tmp_path, 400)
