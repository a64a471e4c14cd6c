"""The training room in a real browser: a run as it grows, and what a reader does with it."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
from pages import Site, User, served, wait_with
from PIL import Image

import checkpoints
from training.lock import RunLock
from web.model import Model

MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script>"


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def site(logs: Path) -> Iterator[Site]:
    """The app without a model: it is not needed to look at runs."""
    with served(Model(), logs.parent / "conversations", logs) as site:  # type: ignore[arg-type]
        yield site


@pytest.fixture
def user(browser, site) -> Iterator[User]:
    user = User(browser, site)
    yield user
    user.close()


def go(user: User, run: str = "") -> Any:
    """Open the room; returns the page."""
    user.page.goto(f"{user.site.url}/#/training{f'/{run}' if run else ''}")
    user.page.locator(".training-page :is(h1)").first.wait_for()
    return user.page


def whole_log() -> list[bytes]:
    return (runs.finished_run() / "metrics.jsonl").read_bytes().splitlines(keepends=True)


def long_log(records: int, **more: object) -> str:
    lines = []
    for step in range(1, records + 1):
        train = {"kind": "train", "step": step, "total_steps": 100, "loss": 4 / step, "lr": 1e-3}
        timing = {"tokens_per_second": 90 + step, "memory_mb": 512.0}
        lines.append(json.dumps(train | {"gradient_norm": 1.0, "timing": timing} | more))
    return "\n".join(lines) + "\n"


def run_in(logs: Path, name: str, text: str | bytes) -> Path:
    (logs / name).mkdir(exist_ok=True)
    log = logs / name / "metrics.jsonl"
    log.write_bytes(text.encode() if isinstance(text, str) else text)
    return log


def drawn(page: Any, title: str) -> dict[str, int]:
    """How many lines and dots a chart shows."""
    chart = page.locator(".chart", has=page.get_by_role("heading", name=title, exact=True)).first
    return {"lines": chart.locator("path.line").count(), "dots": chart.locator("circle").count()}


# -- a run as it grows ----------------------------------------------------------------------------


def test_a_run_without_records_then_one_then_all_and_a_damaged_and_a_removed_log(user, logs):
    log = run_in(logs, "mine", b"")
    page = go(user, "mine")
    empty, charts = page.locator(".chart-empty:visible"), page.locator(".chart")
    wait_with(page, lambda: 0 < empty.count() == charts.count())
    lines = whole_log()
    log.write_bytes(lines[0])
    wait_with(page, lambda: drawn(page, "Loss") == {"lines": 0, "dots": 1})
    wait_with(page, lambda: drawn(page, "Gradient norm")["dots"] >= 1)  # one point alone is seen
    step = json.loads(lines[0])["step"]
    page.locator(".progress-words", has_text=str(step)).wait_for()
    assert page.locator(".meter-bar").count() == 0
    log.write_bytes(b"".join(lines))
    wait_with(page, lambda: drawn(page, "Loss")["lines"] >= 1)
    wait_with(page, lambda: drawn(page, "Gradient norm")["lines"] >= 1)
    assert drawn(page, "Gradient norm")["dots"] == 0
    last = json.loads(next(line for line in reversed(lines) if b'"evaluation"' in line))
    meter = last["alignment"]
    wait_with(page, lambda: page.locator(".meter-bar").count() == 3)
    page.locator(".meter-bar.right", has_text=f"{meter['right']:.1f} %").wait_for()
    gap = meter["right"] - meter["swapped"]
    wait_with(page, lambda: page.locator(".meter-figure").inner_text() == f"{gap:.1f}")
    log.write_bytes(b"".join(lines) + b"<script>alert(1)</script>\n")
    page.locator(".notice", has_text="is not JSON").wait_for()
    assert drawn(page, "Loss")["lines"] >= 1
    log.write_bytes(b"".join(lines))
    wait_with(page, lambda: not page.locator(".notice").is_visible())
    shutil.rmtree(logs / "mine")
    # What was just being read says it first, the dashboard at its next turn.
    page.locator(".dashboard > p.nothing", has_text="or never was").wait_for()
    page.locator(".dashboard-body").wait_for(state="hidden")
    page.get_by_role("link", name="All runs").first.click()
    page.get_by_text("No run has been trained here yet").wait_for()


def test_a_run_that_begins_after_the_page_was_opened_comes_first_and_is_marked(user, logs):
    run_in(logs, "former", long_log(9))
    page = go(user)
    page.locator(".run[data-run=former]").wait_for()
    begun = run_in(logs, "begun", long_log(3))
    with RunLock(begun.parent):
        os.utime(begun)
        os.utime(logs / "former" / "metrics.jsonl", (time.time() + 60,) * 2)  # and yet it is second
        first = page.locator(".run").first
        wait_with(page, lambda: first.get_attribute("data-run") == "begun")
        wait_with(page, lambda: "training now" in first.inner_text())
        assert "training now" not in page.locator(".run[data-run=former]").inner_text()
        listed = page.locator(".run-links li").first
        wait_with(page, lambda: listed.inner_text().startswith("begun"))
    wait_with(page, lambda: "ended without a save" in page.locator(".runs").inner_text())


def test_what_a_log_holds_is_text(user, logs):
    sample = dict.fromkeys(("picture", "question", "answer", "right_answer"), MARKUP)
    alert = {"kind": "alert", "step": 1, "alert": "unmoved_owner", "owner": MARKUP}
    more = [json.dumps({"kind": "samples", "step": 3, "samples": [sample]}), json.dumps(alert)]
    run_in(logs, "mine", long_log(3) + "\n".join(more) + "\n")
    entry = {"where": MARKUP, "id": MARKUP, "reason": MARKUP}
    (logs / "mine" / "quarantine.jsonl").write_text(json.dumps(entry) + "\n")
    page = go(user, "mine")
    page.locator(".sample-question", has_text=MARKUP).wait_for()
    page.locator(".alerts summary").click()
    page.locator(".alerts li", has_text="onerror").wait_for()
    page.locator(".reason summary").click()
    page.locator(".reason li", has_text="onerror").wait_for()
    assert page.locator(".training-page img, .training-page script").count() == 0


# -- curves ---------------------------------------------------------------------------------------


def test_curves_are_pointed_at_zoomed_and_kept_so_while_the_log_grows(user, logs):
    log = run_in(logs, "mine", long_log(40))
    page = go(user, "mine")
    plot = page.get_by_role("slider", name="Loss", exact=True)
    wait_with(page, lambda: drawn(page, "Loss")["lines"] == 1)
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 80)
    tip = plot.locator(".chart-tip")
    tip.wait_for()
    step = int(re.search(r"Step (\d+)", tip.inner_text())[1])
    assert 15 < step < 25 and f"{4 / step:.4g}"[:4] in tip.inner_text()
    assert page.locator(".small-charts .chart-tip:visible").count() == 0  # only a line in others
    left, right = box["x"] + box["width"] * 0.3, box["x"] + box["width"] * 0.7
    page.mouse.move(left, box["y"] + 90)
    page.mouse.down()
    page.mouse.move(right, box["y"] + 95, steps=4)
    page.mouse.up()
    page.get_by_role("button", name="Show all steps").wait_for()
    low, high = (int(plot.get_attribute("aria-valuemin")), int(plot.get_attribute("aria-valuemax")))
    assert 5 < low < 15 and 22 < high < 35
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    told = plot.get_attribute("aria-valuetext")
    log.write_text(long_log(60))
    page.locator(".progress-words", has_text="60").wait_for()
    page.wait_for_timeout(300)
    assert (int(plot.get_attribute("aria-valuemin")), plot.get_attribute("aria-valuetext")) == (
        low,
        told,
    )
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 80)
    page.mouse.wheel(0, -200)
    wait_with(page, lambda: int(plot.get_attribute("aria-valuemin")) > low)
    page.keyboard.press("0")
    wait_with(page, lambda: plot.get_attribute("aria-valuemax") == "60")
    page.get_by_role("button", name="Show all steps").wait_for(state="hidden")


def test_smoothing_keeps_the_raw_curve_faint_and_the_logarithm_is_remembered(user, logs):
    run_in(logs, "mine", long_log(40))
    page = go(user, "mine")
    chart = page.locator(".curves > .chart .chart-plot")
    wait_with(page, lambda: chart.locator("path").count() == 1)
    labels = chart.locator("svg text").all_text_contents()
    page.get_by_role("slider", name="Smoothing").fill("0.9")
    wait_with(page, lambda: chart.locator("path").count() == 2)
    assert chart.locator("path:not(.line)").get_attribute("opacity") == "0.28"
    page.get_by_label("Logarithmic").check()
    wait_with(page, lambda: chart.locator("svg text").all_text_contents() != labels)
    page.reload()
    wait_with(page, lambda: chart.locator("path").count() == 2)
    assert page.get_by_label("Logarithmic").is_checked()


def test_curves_are_saved_as_a_picture_and_as_a_table(user, logs, tmp_path):
    run_in(logs, "mine", long_log(40))
    page = go(user, "mine")
    wait_with(page, lambda: drawn(page, "Loss")["lines"] == 1)
    with page.expect_download() as saved:
        page.locator(".curves > .chart").get_by_role("button", name="Save as a picture").click()
    saved.value.save_as(tmp_path / "loss.png")
    picture = Image.open(tmp_path / "loss.png").convert("RGB")
    assert saved.value.suggested_filename == "mine-Loss.png" and picture.width > 1000
    colours = {colour for _, colour in picture.getcolors(1 << 24)}
    assert (11, 97, 87) in colours and (255, 255, 255) in colours  # the curve and the paper
    with page.expect_download() as saved:
        page.get_by_role("button", name="CSV").click()
    saved.value.save_as(tmp_path / "curves.csv")
    assert len((tmp_path / "curves.csv").read_text().splitlines()) == 41


def test_ticked_runs_are_laid_over_each_other_and_their_recipes_compared(user, logs):
    for name in ("one", "two"):
        shutil.copytree(runs.finished_run(), logs / name)
    facts = next((logs / "two").glob("checkpoint-*")) / "config.json"
    for facts in (logs / "two").glob("checkpoint-*/config.json"):
        changed = json.loads(facts.read_text())
        changed["config"]["lora_rank"] = 77
        facts.write_text(json.dumps(changed))
    page = go(user)
    page.get_by_label("Compare one").check()
    page.get_by_text("Tick one more run").wait_for()
    page.get_by_label("Compare two").check()
    wait_with(page, lambda: drawn(page, "Loss")["lines"] == 2)
    strokes = page.locator(".comparison > div > .chart path.line").evaluate_all(
        "all => all.map(path => getComputedStyle(path).stroke)"
    )
    assert len(set(strokes)) == 2
    row = page.locator(".compared tr", has_text="lora_rank")
    row.wait_for()  # recipes come after the curves
    assert row.locator("td").all_inner_texts()[1] == "77"
    assert page.locator(".compared tr", has_text="batch_size").count() == 0
    page.get_by_role("button", name="End the comparison").first.click()
    wait_with(page, lambda: not page.locator(".comparison").is_visible())


# -- samples, checkpoints, recipe -----------------------------------------------------------------


def test_samples_pictures_recipe_and_a_checkpoint_that_is_verified_and_chatted_with(browser, logs):
    run = Path(shutil.copytree(runs.finished_run(), logs / "done"))
    newest = checkpoints.checkpoints_in(run)[-1]
    asked = []
    model = Model(load=lambda source: asked.append(source) or runs.assistant())
    with served(model, logs.parent / "conversations", logs) as site:  # type: ignore[arg-type]
        user = User(browser, site)
        page = go(user, "done")
        page.locator(".sample img[src]").first.wait_for()
        lines = [json.loads(line) for line in whole_log()]
        samples = [line for line in lines if line["kind"] == "samples"]
        rightly = [s["answer"] == s["right_answer"] for s in samples[-1]["samples"]]
        wait_with(page, lambda: page.locator(".sample.is-right").count() == sum(rightly))
        page.get_by_role("button", name="Evaluation before").click()
        page.locator(".samples-tools output", has_text=str(samples[-2]["step"])).wait_for()
        page.locator("button.sample-picture").first.click()
        wait_with(page, lambda: page.locator(".lightbox img").evaluate("i => i.naturalWidth > 0"))
        page.keyboard.press("Escape")
        row = page.locator(".recipe-groups .differs", has_text="accumulation")
        assert "preset: 4" in row.inner_text() and "micro-batches" in row.inner_text()
        page.get_by_role("button", name="Verify").first.click()
        page.locator(".checkpoints .pill.good", has_text="intact").first.wait_for()
        page.get_by_role("button", name="Chat with this one").first.click()
        page.wait_for_url("**/#/chat")
        wait_with(page, lambda: asked == [str(newest)])
        user.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_long_texts_stay_in_the_window(browser, site, logs, width):
    sample = {"picture": "train_000002.png", "question": "What does the picture show?"}
    sample |= dict.fromkeys(("answer", "right_answer"), "a big purple circle and " * 9 + "x" * 90)
    record = json.dumps({"kind": "samples", "step": 9, "samples": [sample] * 3})
    name = "a-run-with-a-name-that-is-far-longer-than-names-of-runs-usually-are"
    run_in(logs, name, b"".join(whole_log()) + record.encode() + b"\n")
    user = User(browser, site, viewport={"width": width, "height": 860})
    page = go(user)
    page.locator(".run").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    go(user, name)
    page.locator(".sample").nth(2).wait_for()
    page.locator(".chart path.line").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.locator(".sample-words").evaluate_all(
        "all => all.map(one => one.getBoundingClientRect().toJSON())"
    )
    user.close()
    assert min(box["width"] for box in boxes) > 150


def test_the_room_follows_the_language(user, logs):
    run_in(logs, "mine", b"".join(whole_log()))
    page = go(user, "mine")
    page.get_by_role("heading", name="Alignment").wait_for()
    page.evaluate("localStorage.setItem('phisight.language', '\"de\"')")
    page.reload()
    page.get_by_role("heading", name="Bildbezug").wait_for()
    page.locator(".chart-legend", has_text="richtiges Bild").wait_for()
    page.locator(".progress-words", has_text="Schritt").wait_for()
