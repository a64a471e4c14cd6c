"""The routes of the page as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response

from api.responses import AsciiJSON
from web import texts
from web.errors import NotThere
from web.site import Site
from web.start.facts import model_json
from web.start.hearing import hearing
from web.temporary import MAX_UPLOAD


def router(site: Site) -> APIRouter:
    routes = APIRouter()

    @routes.get("/start")
    def start(request: Request) -> Response:
        return AsciiJSON(told(site, request.headers.get("accept-language")))

    @routes.get("/texts/{language}")
    def texts_in(language: str) -> Response:
        if language not in texts.LANGUAGES:
            raise NotThere("nothing_there")
        return AsciiJSON({key: row[language] for key, row in texts.TEXTS.items()})

    @routes.get("/examples/{key}")
    def picture(key: str) -> Response:
        example = site.examples.now().get(key)
        if example is None or not Path(example.picture).is_file():
            raise NotThere("nothing_there")
        return FileResponse(example.picture)

    return routes


def told(site: Site, accepted: str | None) -> dict[str, Any]:
    """What the page needs to begin; `accepted`: the browser's Accept-Language."""
    return {
        "model": model_json(site.model),
        "can": {
            "hear": site.speech is not None,
            **hearing(site.speech),
            "speak": site.voice is not None,
            "training": "none" if site.runs is None else "train" if site.may_train else "look",
            "public": site.runs is None,
        },
        "limits": {"upload": MAX_UPLOAD},
        "examples": [
            {"key": key, "question": example.question, "picture": f"examples/{key}"}
            for key, example in site.examples.now().items()
        ],
        "languages": texts.LANGUAGES,
        "spoken": texts.SPOKEN,
        "language": texts.best_language(accepted),
    }
