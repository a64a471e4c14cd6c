"""The bar of the model, the settings and the system prompt, beside the chat."""

from __future__ import annotations

import re

import pytest
import runs
from axe import findings
from kept import DAY, PHONE, Kept, ask, groups, reload
from pages import Site, User, served, wait_for, wait_with

from errors import PhiSightError
from speech.spoken import loaded_once
from web.examples import Examples
from web.model import Model
from web.start import facts
from web.start.facts import model_json


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    whisper = loaded_once(str(runs.ROOT / "assets/tiny/whisper/tiny.pt"))
    folder = tmp_path_factory.mktemp("conversations")
    with served(runs.assistant(), folder, runs.finished_run().parent, speech=whisper) as site:
        yield site


@pytest.fixture
def user(browser, site) -> User:
    user = User(browser, site)
    yield user
    user.close()


@pytest.fixture
def kept(user) -> Kept:
    return Kept(user)


# -- the beginning --------------------------------------------------------------------------------


def test_a_general_model_without_examples_offers_questions_about_a_picture_of_ones_own(
    browser, site, tmp_path, monkeypatch
):
    """They are put into the field, in the page's language, to be asked with a picture."""
    monkeypatch.setattr(facts, "WORLD_TOKENS", 0)  # below which a base has read the world alone
    monkeypatch.setattr(Examples, "now", lambda self: {})
    user = User(browser, site)
    page = user.page
    offered = page.locator(".welcome .idea")
    offered.last.wait_for()
    assert offered.count() == 5 and page.locator(".welcome .example").count() == 0
    assert page.locator(".lead").inner_text() == "Ask about a picture of yours."
    assert findings(page) == []
    field = page.locator("#question textarea")
    offered.nth(0).click()
    offered.nth(4).click()
    assert field.input_value() == "What could happen next?"
    field.fill("Tell me:")
    offered.nth(3).click()
    assert field.input_value() == "Tell me: Is anything unusual here?"
    user.close()


# -- the bar --------------------------------------------------------------------------------------


def test_the_bar_says_which_model_answers_and_explains_its_alignment(user, site):
    page, bar = user.page, user.page.locator(".chat-bar")
    step = site.assistant.provenance["step"]
    bar.locator(".bar-name", has_text=f"step {step}").wait_for()
    bar.get_by_text("This tiny model knows drawn shapes, in English.").wait_for()
    shares = model_json(Model(site.assistant))["alignment"]
    points = round(shares["right"] - shares["swapped"])
    chip = bar.get_by_role("button", name=re.compile("Alignment: "))
    assert chip.inner_text() in (f"{points} points", f"-{abs(points)} points")
    chip.focus()
    page.keyboard.press("Enter")
    about = page.get_by_role("dialog", name="How much the model looks")
    assert about.is_visible()
    for words in ("Right picture", "Another picture", "Blank picture", "with a grey picture"):
        assert words in about.inner_text()
    page.keyboard.press("Escape")
    assert not about.is_visible()
    assert chip.evaluate("one => one === document.activeElement")


def test_the_bar_tells_that_the_model_is_being_loaded_and_that_it_failed(browser, tmp_path):
    wait, failed = [True], []

    def load(source: str):
        wait_for(lambda: not wait)
        raise PhiSightError(f"{source}: its weights are damaged; take another one")

    model = Model(load=load, source="runs/mine")
    model.begin("runs/mine", failed.append)
    with served(model, tmp_path / "conversations", tmp_path) as site:
        user = User(browser, site)
        bar = user.page.locator(".chat-bar")
        bar.get_by_text("The model is being loaded").wait_for()
        assert "mine" in bar.inner_text()
        assert not bar.get_by_role("button", name=re.compile("Alignment: ")).is_visible()
        wait.clear()
        bar.get_by_text("its weights are damaged").wait_for()
        user.close()


def test_the_context_is_shown_and_its_oldest_turns_are_dropped_on_request(user, kept, site):
    most = site.assistant.context_tokens
    long = "What colour is the star? " * (most // 27)
    id = kept.add(long, long, "Is it red?", "Is it blue?")
    page = user.page
    page.goto(f"{site.url}/#/chat/{id}")
    full = page.get_by_role("button", name=re.compile(r"The context is \d+ % full"))
    before = int(full.inner_text().split()[0])
    assert before > 80
    offer = page.locator(".bar-offer")
    assert "the model no longer reads them" in offer.inner_text()
    offer.get_by_role("button", name="Leave out the oldest 2 questions").click()
    wait_with(page, lambda: not offer.is_visible())
    assert int(full.inner_text().split()[0]) < 20
    assert kept.store.load(id).dropped == 4  # two questions and their answers
    assert page.locator(".turn.user").count() == 4  # they stay visible
    full.click()
    about = page.get_by_role("dialog", name="How full the context is")
    about.get_by_role("button", name="Leave out the oldest question").click()
    wait_with(page, lambda: kept.store.load(id).dropped == 6)


def test_the_offer_to_drop_turns_is_closed_and_a_single_question_is_never_dropped(user, kept, site):
    long = "What colour is the star? " * (site.assistant.context_tokens // 10)
    two, one = kept.add(long, long), kept.add(long)
    page = user.page
    page.goto(f"{site.url}/#/chat/{two}")
    page.locator(".bar-offer").get_by_role("button", name="Close").click()
    wait_with(page, lambda: not page.locator(".bar-offer").is_visible())
    page.goto(f"{site.url}/#/chat/{one}")
    page.locator(".bar-chip[data-full=over]").wait_for()
    assert not page.locator(".bar-offer").is_visible()


def test_on_a_telephone_the_bar_stands_beside_the_menu_and_the_list_opens_over_the_room(
    browser, site
):
    user = User(browser, site, **PHONE)
    kept, page = Kept(user), user.page
    id = kept.add("What is it?", system="Answer in one word.")
    page.goto(f"{site.url}/#/chat/{id}")
    page.locator(".bar-share").wait_for()
    menu = page.locator(".sidebar-opener").bounding_box()
    for part in (".bar-model", ".bar-about", ".bar-chips"):
        box = page.locator(part).bounding_box()
        assert box["x"] >= menu["x"] + menu["width"] and box["x"] + box["width"] <= 390
    assert page.locator(".chat-bar").bounding_box()["height"] < 90
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for button in page.locator(".chat-bar button:visible").all():
        box = button.bounding_box()
        assert box["width"] >= 24 and box["height"] >= 24
    page.locator(".sidebar-opener").click()
    page.locator(".history a", has_text="What is it?").click()  # it is open: the room is behind
    wait_with(page, lambda: not page.locator(".history").is_visible())
    user.close()


# -- the settings ---------------------------------------------------------------------------------


def test_the_texts_change_with_the_language_and_the_choice_is_remembered(user, kept):
    kept.add("What is it?", age=1 * DAY)
    reload(user, 1)
    page = user.page
    page.locator(".history a").click()
    page.locator(".turn.assistant").wait_for()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Interface language").select_option("Deutsch")
    page.get_by_role("heading", name="Einstellungen").wait_for()  # the dialog itself, at once
    page.get_by_label("Längste Antwort").first.wait_for()
    assert page.evaluate("document.documentElement.lang") == "de"
    page.keyboard.press("Escape")
    page.get_by_role("link", name="Neues Gespräch").wait_for()
    wait_with(page, lambda: groups(page) == {"Gestern": ["What is it?"]})
    page.get_by_text("Dieses winzige Modell kennt gezeichnete Formen, auf Englisch.").wait_for()
    assert page.get_by_role("searchbox").get_attribute("placeholder") == "Gespräche durchsuchen"
    assert page.locator(".bar-system").get_attribute("title").startswith("Dem Modell")
    # What was asked and answered is nobody's to translate.
    assert page.locator(".turn.assistant").inner_text().startswith("about: What is it?")
    reload(user)
    page.get_by_role("link", name="Neues Gespräch").wait_for()
    assert page.evaluate("document.documentElement.lang") == "de"


def test_a_browser_that_speaks_chinese_is_met_in_chinese(browser, site):
    context = browser.new_context(locale="zh-CN")
    page = context.new_page()
    page.goto(site.url)
    page.get_by_role("link", name="新对话").wait_for()
    page.get_by_text("这个微型模型认识画出的图形，只懂英语。").wait_for()
    assert page.evaluate("document.documentElement.lang") == "zh"
    context.close()


def test_settings_are_remembered_and_sent_with_the_question(user):
    page = user.page
    sent = []
    page.on("request", lambda one: one.url.endswith("/ask") and sent.append(one.post_data_json))
    page.keyboard.press("Control+,")
    dialog = page.get_by_role("dialog", name="Settings")
    dialog.locator("input[type=number]").nth(0).fill("0.7")  # Temperature
    dialog.get_by_label("Top-k").first.evaluate(
        "one => { one.value = 40; one.dispatchEvent(new Event('input')) }"
    )
    dialog.get_by_label("Seed").fill("7 stars")
    assert (
        dialog.get_by_role("alert").inner_text() == "The seed must be a whole number of 0 or more."
    )
    dialog.get_by_label("Seed").fill("7")
    assert not dialog.get_by_role("alert").is_visible()
    dialog.get_by_label("Spoken language").select_option("Español")
    dialog.get_by_label("Dark").check()
    page.keyboard.press("Escape")
    reload(user)
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    ask(page, "What is it?")
    settings = sent[0]["settings"]
    assert (settings["temperature"], settings["top_k"], settings["seed"]) == (0.7, 40, "7")
    assert settings["spoken"] == "es"
    page.get_by_role("button", name="Settings").click()
    assert dialog.locator("input[type=number]").nth(0).input_value() == "0.7"
    dialog.get_by_role("button", name="Reset to defaults").click()
    assert dialog.locator("input[type=number]").nth(0).input_value() == "0"
    assert dialog.get_by_role("button", name="Reset to defaults").is_disabled()
    assert page.evaluate("document.documentElement.dataset.theme") is None
    assert page.evaluate("JSON.parse(localStorage['phisight.settings']).seed") == ""


def test_every_setting_says_what_it_does(user):
    user.page.get_by_role("button", name="Settings").click()
    user.page.locator(".setting").first.wait_for()
    for setting in user.page.locator(".setting").all():
        assert len(setting.locator("small").inner_text()) > 20
    for control in user.page.locator(".setting :is(input, select)[id]").all():
        described = control.get_attribute("aria-describedby")
        assert user.page.locator(f"#{described}").is_visible()


def test_what_the_whisper_cannot_do_is_not_offered(user, site):
    """The one of this page is small, hears English alone, and here is no voice."""
    page = user.page
    sent = []
    page.on("request", lambda one: one.url.endswith("/ask") and sent.append(one.post_data_json))
    page.evaluate(
        "localStorage['phisight.settings'] = JSON.stringify({translate: true, denoise: true})"
    )
    reload(user)
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("switch").first.wait_for()
    assert page.get_by_role("switch").all_inner_texts() == [""]
    assert page.get_by_role("switch", name="Reduce noise").is_checked()
    page.keyboard.press("Escape")
    ask(page, "What is it?")
    assert sent[0]["settings"]["denoise"] and not sent[0]["settings"]["translate"]


# -- the system prompt ----------------------------------------------------------------------------


def test_a_system_prompt_goes_with_the_first_question_and_is_changed_later(user, kept):
    page = user.page
    chip = page.locator(".bar-system")
    assert chip.get_attribute("aria-label") == "System prompt: none is set"
    chip.click()
    page.get_by_label("What the model is told").fill("Answer in one word.")
    page.get_by_role("button", name="Save").click()
    assert chip.get_attribute("aria-label") == "System prompt: one is set"
    assert "Answer in one word." in chip.get_attribute("title")
    ask(page, "What is it?")
    (id,) = kept.ids()
    assert kept.store.load(id).system == "Answer in one word."
    reload(user, 1)
    wait_with(page, lambda: "Answer in one word." in (chip.get_attribute("title") or ""))
    chip.click()
    page.get_by_role("button", name="Remove it").click()
    wait_with(page, lambda: kept.store.load(id).system == "")
    wait_with(page, lambda: chip.get_attribute("aria-label") == "System prompt: none is set")
    page.get_by_role("link", name="New conversation").click()
    assert chip.get_attribute("aria-label") == "System prompt: none is set"


# -- for everybody --------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "settings"), [("light", {}), ("dark", PHONE)])
def test_axe_finds_nothing_in_what_stands_beside_the_chat(browser, site, scheme, settings):
    user = User(browser, site, color_scheme=scheme, **settings)
    kept, page = Kept(user), user.page
    long = "What colour is the star? " * (site.assistant.context_tokens // 27)
    kept.damage(kept.add("Is it blue?", age=9 * DAY))
    kept.add("Is it red?", age=1 * DAY, pinned=True)
    page.goto(f"{site.url}/#/chat/{kept.add(long, long, system='Answer in one word.')}")
    page.locator(".bar-offer").get_by_role("button", name="Leave out").wait_for()
    page.locator(".bar-chip:has(.bar-points)").click()
    page.locator(".popover:popover-open").wait_for()
    assert findings(page) == []
    page.keyboard.press("Escape")
    page.locator(".bar-system").click()
    assert findings(page) == []
    page.keyboard.press("Escape")
    page.keyboard.press("Control+,")
    page.get_by_label("Seed").fill("none")
    assert findings(page) == []
    page.keyboard.press("Escape")
    if settings:
        page.locator(".sidebar-opener").click()
    page.locator(".history-row:not(.damaged) .history-more").first.click()
    assert findings(page) == []
    user.close()
