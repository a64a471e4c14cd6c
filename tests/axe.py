"""What axe-core finds in a page: what keeps people out who read or steer it otherwise.

The script is taken from the installed package; nothing is loaded from anywhere, and a page's policy
does not apply to it.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest

GRAVE = ("serious", "critical")
# 24 px at least for what is touched is asked for by WCAG 2.2; axe leaves it out if not told so.
RUN = """async () => {
    const found = await axe.run(document, {
        resultTypes: ["violations"],
        rules: {"target-size": {enabled: true}},
    });
    return found.violations.map(({id, impact, help, nodes}) => ({
        id, impact, help,
        where: nodes.slice(0, 8).map(({target, failureSummary, html}) =>
            [target.join(" "), html.slice(0, 120), failureSummary.replace(/\\s+/g, " ")]
                .join(" | ")),
    }));
}"""


@cache
def script() -> str:
    """axe-core; skips the test where its package is not installed."""
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None or found.origin is None:
        pytest.skip("axe-playwright-python is not installed")
    return Path(found.origin).with_name("axe.min.js").read_text(encoding="utf-8")


def findings(page: Any) -> list[str]:
    """The serious and critical violations in a page as it is shown now, each with its places."""
    page.evaluate("document.fonts.ready.then(() => true)")
    page.evaluate(  # what is half faded in has no contrast yet
        """() => Promise.all(document.getAnimations()
            .filter((one) => one.effect?.getTiming().iterations !== Infinity)
            .map((one) => one.finished.catch(() => 0)))"""
    )
    if not page.evaluate("typeof axe === 'object'"):
        page.evaluate(script())
    return [
        f"{one['impact']} {one['id']}: {one['help']}\n    " + "\n    ".join(one["where"])
        for one in page.evaluate(RUN)
        if one["impact"] in GRAVE
    ]
