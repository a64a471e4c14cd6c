"""The texts of the web app in every interface language, a file for each room of the page.

Questions, answers and error lines are never translated: they are passed through as they are.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

LANGUAGES = {"en": "English", "es": "Español", "de": "Deutsch", "zh": "中文"}
DEFAULT = "en"

# What is spoken, for the recogniser: "" is detected. Names in the language itself.
SPOKEN = {
    "": "",
    "en": "English",
    "es": "Español",
    "de": "Deutsch",
    "zh": "中文",
    "fr": "Français",
    "it": "Italiano",
    "pt": "Português",
    "nl": "Nederlands",
    "pl": "Polski",
    "ru": "Русский",
    "uk": "Українська",
    "tr": "Türkçe",
    "ar": "العربية",
    "hi": "हिन्दी",
    "ja": "日本語",
    "ko": "한국어",
}

_FOLDER = Path(__file__).parent
TEXTS: dict[str, dict[str, str]] = {
    key: row
    for path in sorted(_FOLDER.glob("*.json"))
    for key, row in json.loads(path.read_text(encoding="utf-8")).items()
}
"""Every text by its key, then by language. A room's texts lie in its own file beside this one."""


def text(key: str, language: str, **values: object) -> str:
    """The text called `key`; {names} in it are filled from `values`. A language without a table
    gets English; an unknown key is a mistake in the program (KeyError)."""
    row = TEXTS[key]
    return row.get(language, row[DEFAULT]).format(**values)


def best_language(accepted: str | None) -> str:
    """The interface language that an Accept-Language header likes best (RFC 9110, 12.5.4)."""
    wanted = []
    for place, item in enumerate((accepted or "")[:1000].split(",")):
        name, _, weight = item.strip().partition(";")
        matched = re.fullmatch(r"\s*q=([01](?:\.\d{0,3})?)\s*", weight) if weight else None
        if weight and matched is None:
            continue
        wanted.append((-(float(matched[1]) if matched else 1.0), place, name.split("-")[0].lower()))
    return next(
        (name for weight, _, name in sorted(wanted) if weight and name in LANGUAGES), DEFAULT
    )
