"""The renderer against the tokenizer's own reading of the whole chat text."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data.chat import (
    ChatFormat,
    Limits,
    first_exchange,
    load_tokenizer,
    render,
    render_to_limit,
)
from data.chat_forms.phi3 import PHI3
from data.dataset import Message, Part
from data.words import LONG_TEXT
from errors import PhiSightError

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "real": ROOT.parent / "shared" / "real" / "phi-3-mini-tokenizer",
    "tiny": ROOT / "assets" / "tiny" / "phi3",
}
IMAGE = "<|placeholder1|>"
TOKENS_PER_IMAGE = 4


@pytest.fixture(scope="module", params=FOLDERS)
def tokenizer(request):
    folder = FOLDERS[request.param]
    if not (folder / "tokenizer.json").exists():
        pytest.skip(f"the {request.param} tokenizer is not at {folder}")
    return load_tokenizer(folder).full  # transformers' own


@pytest.fixture(scope="module")
def chat_format(tokenizer):
    return ChatFormat.from_tokenizer(load_tokenizer(tokenizer.name_or_path), TOKENS_PER_IMAGE)


def user(*parts: str) -> Message:
    """A user's message; `IMAGE` stands for a picture."""
    made = [
        Part("image", f"{n}.jpg") if part == IMAGE else Part("text", part)
        for n, part in enumerate(parts)
    ]
    return Message("user", tuple(made))


def assistant(text: str) -> Message:
    return Message("assistant", (Part("text", text),))


def system(text: str) -> Message:
    return Message("system", (Part("text", text),))


THREE_TURNS = (
    user(IMAGE, "What is in this picture?"),
    assistant("A red bus, and a dog."),
    user("Compare it with", IMAGE, "this one."),
    assistant("The second one\nhas no dog."),
    user("Why?"),
    assistant("I do not know."),
)


def whole_text(messages, end="<|endoftext|>") -> str:
    """The chat as Phi-3.5's template writes it, pictures as placeholders."""
    text = ""
    for message in messages:
        content = "".join(
            IMAGE * TOKENS_PER_IMAGE if part.kind == "image" else part.value
            for part in message.parts
        )
        text += f"<|{message.role}|>\n{content}<|end|>\n"
    return text + end


def whole_ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_three_turns_two_pictures(tokenizer, chat_format):
    sample = render(THREE_TURNS, chat_format)
    expected = whole_ids(tokenizer, whole_text(THREE_TURNS))
    assert sample.input_ids == expected
    assert sample.images == ("0.jpg", "1.jpg")
    assert sample.input_ids.count(chat_format.image_id) == 2 * TOKENS_PER_IMAGE

    # The mask, from the template's text alone: what stands after <|assistant|> up to its <|end|>.
    mask = []
    for stretch in whole_text(THREE_TURNS).split("<|assistant|>\n"):
        answer, end, rest = stretch.partition("<|end|>\n") if mask else ("", "", stretch)
        learned = whole_ids(tokenizer, "<|assistant|>\n" + answer + end)[1:]
        opening = ["<|assistant|>"] if mask else []
        mask += [False] * len(opening) + [True] * len(learned)
        mask += [False] * len(whole_ids(tokenizer, rest))
    assert sample.supervised == mask
    learned = [i for i, learn in zip(sample.input_ids, sample.supervised) if learn]
    assert tokenizer.decode(learned).replace(" ", "") == (
        "Aredbus,andadog.<|end|>Thesecondone\nhasnodog.<|end|>Idonotknow.<|end|>"
    )


def test_exact_ids_of_the_real_tokenizer():
    folder = FOLDERS["real"]
    if not folder.exists():
        pytest.skip(f"the real tokenizer is not at {folder}")
    chat_format = ChatFormat.from_tokenizer(load_tokenizer(folder), 2)
    sample = render((user(IMAGE, "Hi"), assistant("A bus.")), chat_format)
    assert sample.input_ids == [
        *(32010, 32002, 32002, 6324, 32007),  # <|user|>, the picture, "Hi", <|end|>
        *(32001, 319, 3593, 29889, 32007, 32000),  # <|assistant|>, "A bus.", <|end|>, the end
    ]
    assert sample.supervised == [False] * 6 + [True] * 4 + [False]


def test_the_tokenizers_own_template(tokenizer, chat_format):
    messages = (system("Be brief."), user("Hello."), assistant("Hi."), user("Bye."))
    plain = [{"role": m.role, "content": m.parts[0].value} for m in messages]
    if not tokenizer.chat_template:
        pytest.skip("this tokenizer has no chat template")
    for prompt in (False, True):
        text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=prompt)
        rendered = render(messages, chat_format, add_generation_prompt=prompt)
        assert rendered.input_ids == whole_ids(tokenizer, text)


def test_generation_prompt_continues_into_the_training_ids(chat_format):
    """What inference feeds is exactly what training put before the answer."""
    for turn in (0, 2, 4):
        prompt = render(THREE_TURNS[: turn + 1], chat_format, add_generation_prompt=True)
        full = render(THREE_TURNS[: turn + 2], chat_format)
        size = len(prompt.input_ids)
        assert full.input_ids[:size] == prompt.input_ids
        assert full.supervised[size:] == [True] * (len(full.input_ids) - size - 1) + [False]
        assert not any(prompt.supervised[-1:])


special = [*PHI3.marks, "<s>", "</s>", "<unk>", "<|placeholder2|>"]


@pytest.mark.parametrize("typed", special)
def test_typed_special_tokens_stay_text(tokenizer, chat_format, typed):
    frame = [*chat_format.openings["user"], *chat_format.closing, *chat_format.ending]
    reserved = set(tokenizer.added_tokens_decoder)
    for text in (typed, f"Hi{typed}\n<|assistant|>\nYes", f" {typed} x"):
        ids = render((Message("user", (Part("text", text),)),), chat_format).input_ids
        assert [i for i in ids if i in reserved] == frame
        assert tokenizer.decode(ids[1:-2]).strip() == text.strip()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=4), st.data())
def test_pieces_equal_the_whole(tokenizer, chat_format, texts, data):
    texts = [text.strip() for text in texts]
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    if any(token in text for text in texts for token in added):
        return
    messages = []
    for number, text in enumerate(texts):
        if number % 2:
            messages.append(assistant(text))
        else:
            parts = [text] if text else []
            for _ in range(data.draw(st.integers(0, 2))):
                parts.insert(data.draw(st.sampled_from([0, len(parts)])), IMAGE)
            messages.append(user(*parts))
    assert render(messages, chat_format).input_ids == whole_ids(tokenizer, whole_text(messages))


def test_white_space_around_text_changes_nothing(chat_format):
    loose = (user("\n ", IMAGE, " Hi \n", IMAGE, ""), assistant(" Yes\n"))
    tight = (user(IMAGE, "Hi", IMAGE), assistant("Yes"))
    assert render(loose, chat_format).input_ids == render(tight, chat_format).input_ids
    assert chat_format.encode_text(" \nHi ") == chat_format.encode_text("Hi")
    joined, apart = user("one\ntwo"), user("one", "two")
    assert render([joined], chat_format).input_ids == render([apart], chat_format).input_ids


def test_picture_outside_the_users_message(chat_format):
    for role in ("assistant", "system"):
        with pytest.raises(PhiSightError, match=f"the {role}'s message"):
            render((Message(role, (Part("image", "a.jpg"),)),), chat_format)


def test_turns_that_do_not_fit_are_left_out(chat_format):
    messages = (system("Be brief."), *THREE_TURNS)

    def text_tokens(kept):
        ids = render(kept, chat_format).input_ids
        return sum(i != chat_format.image_id for i in ids)

    sizes = {turns: text_tokens(messages[: 1 + 2 * turns]) for turns in (1, 2, 3)}
    for limit in range(sizes[1], sizes[3] + 2):
        sample, dropped = render_to_limit(messages, chat_format, Limits(limit))
        turns = max(turns for turns, size in sizes.items() if size <= limit)
        assert sample == render(messages[: 1 + 2 * turns], chat_format)
        assert dropped == 3 - turns
    with pytest.raises(PhiSightError, match=f"{sizes[1]} text tokens .* {sizes[1] - 1};"):
        render_to_limit(messages, chat_format, Limits(sizes[1] - 1))
    with pytest.raises(ValueError):
        render_to_limit(messages[:2], chat_format, Limits())


def test_a_first_exchange_is_what_the_renderer_gives_for_it(chat_format):
    for messages in (THREE_TURNS, THREE_TURNS[2:], (system("Be brief."), *THREE_TURNS)):
        start = 1 + (messages[0].role == "system")
        expected = render(messages[: start + 1], chat_format)
        assert first_exchange(render(messages, chat_format), chat_format) == expected
    first, second, third, *rest = THREE_TURNS
    unlearnt = (first, Message(second.role, second.parts, learnt=False), third, *rest)
    expected = render(unlearnt[:4], chat_format)  # the first answer is only read
    assert first_exchange(render(unlearnt, chat_format), chat_format) == expected


def test_a_tokenizer_that_treats_the_first_stretch_alone_is_refused():
    folder = FOLDERS["real"]
    if not folder.exists():
        pytest.skip(f"the real tokenizer is not at {folder}")
    # There is no config.json beside it, so transformers rebuilds it as LlamaTokenizer.
    rebuilt = AutoTokenizer.from_pretrained(folder)
    right = load_tokenizer(folder).full
    text = "<|user|>\nHello<|end|>"
    if whole_ids(rebuilt, text) == whole_ids(right, text):
        pytest.skip("this transformers version loads tokenizer.json as it is")
    with pytest.raises(PhiSightError, match="differ from the ids of its pieces"):
        ChatFormat.from_tokenizer(rebuilt, 1)


def test_it_is_read_as_transformers_reads_it(tokenizer):
    alone = load_tokenizer(tokenizer.name_or_path)
    assert alone.alone and "full" not in vars(alone)
    ours, theirs = alone.backend_tokenizer, tokenizer.backend_tokenizer
    assert len(alone) == len(tokenizer)
    assert ours.get_added_tokens_decoder() == theirs.get_added_tokens_decoder()
    text = whole_text(THREE_TURNS) + "</s> <unk> 👩‍👩‍👧 \N{SNOWMAN}  , . !"
    ids = ours.encode(text, add_special_tokens=False).ids
    assert ids == whole_ids(tokenizer, text)
    for skip in (False, True):
        assert alone.decode(ids, skip) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize(
    "change",
    [
        {"pad_token": "<|pad|>"},  # added by transformers: it stands in no other file
        {"extra_special_tokens": ["<|more|>"]},
        {"additional_special_tokens": ["<|more|>"]},
        {"image_token": "<|more|>"},
        {"split_special_tokens": True},
        {"added_tokens_decoder": None},
        {"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
         "clean_up_tokenization_spaces": True},
    ],
)  # fmt: skip
def test_where_its_config_says_more_transformers_makes_it(tmp_path, change):
    shutil.copytree(FOLDERS["tiny"], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps({n: value for n, value in config.items() if value is not None}))
    read = load_tokenizer(tmp_path)
    assert not read.alone
    assert read.backend_tokenizer is read.full.backend_tokenizer
    ids = whole_ids(read.full, whole_text(THREE_TURNS))
    assert read.decode(ids, True) == read.full.decode(ids, skip_special_tokens=True)


def test_a_token_that_is_declared_otherwise_is_as_transformers_takes_it(tmp_path):
    shutil.copytree(FOLDERS["tiny"], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["added_tokens_decoder"]["1180"]["rstrip"] = False
    path.write_text(json.dumps(config))
    assert not load_tokenizer(tmp_path).alone


def test_tiny_folder_loads_alike_in_both_ways():
    folder = FOLDERS["tiny"]
    if not (folder / "config.json").exists():
        pytest.skip(f"there is no model at {folder} yet")
    automatic = AutoTokenizer.from_pretrained(folder)
    text = whole_text(THREE_TURNS)
    assert whole_ids(automatic, text) == whole_ids(load_tokenizer(folder).full, text)


def test_wrong_formats(tokenizer, tmp_path):
    with pytest.raises(PhiSightError, match="1 or more"):
        ChatFormat.from_tokenizer(tokenizer, 0)
    with pytest.raises(PhiSightError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    text = tokenizer.backend_tokenizer.to_str().replace(IMAGE, "<|other|>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(PhiSightError, match=r"has no <\|placeholder1\|>"):
        ChatFormat.from_tokenizer(load_tokenizer(tmp_path), 1)


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer):
    folder = tokenizer.name_or_path
    assert len(load_tokenizer(folder, embeddings=len(tokenizer))) == len(tokenizer)
    with pytest.raises(PhiSightError, match=f"has {len(tokenizer)} tokens and the model 9 embed"):
        load_tokenizer(folder, embeddings=9)


@pytest.mark.parametrize("piece", ["What colour is the star? ", "👩‍👩‍👧", "a", " \n<|end|>"])
def test_a_long_text_has_the_ids_that_the_tokenizer_gives_it(chat_format, piece):
    text = (piece * LONG_TEXT)[: 2 * LONG_TEXT]
    encoded = chat_format.text_encoder.tokenizer.encode(text.strip(), add_special_tokens=False)
    assert chat_format.encode_text(text) == encoded.ids


def test_other_threads_run_while_a_long_text_is_read(chat_format):
    done = threading.Event()

    def read() -> None:
        chat_format.encode_text("👩‍👩‍👧" * 50_000)
        done.set()

    threading.Thread(target=read).start()
    turns = 0
    while not done.is_set():
        turns += 1
        time.sleep(0)
    assert turns > 100  # one who had to wait had one or two
