"""The routes by which a page trains and exports; see the package."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from api.responses import AsciiJSON
from errors import PhiSightError
from web.errors import NotAllowed, RequestError
from web.replies import Event, content_disposition, event_stream, from_thread
from web.site import Site
from web.trainings import launch
from web.trainings.command import (
    Command,
    TrainingForm,
    Values,
    command_of,
    resumable,
    resume_command,
    run_folder,
)
from web.trainings.downloads import zipped
from web.trainings.exports import DONE, Exports
from web.trainings.fields import form_json
from web.trainings.forms import forms_json
from web.trainings.preflight import PreflightForm, preflight
from web.trainings.recipes import named_checkpoint, recipe_of

LISTED = 50  # trainings, the newest


class ResumeForm(BaseModel):
    model_config = ConfigDict(extra="forbid")

    values: Values = {}


class ExportForm(BaseModel):
    model_config = ConfigDict(extra="forbid")

    form: Annotated[str, Field(max_length=40)]
    checkpoint: Annotated[str, Field(max_length=40)] = ""
    """the name of its folder; the newest where none is named"""
    options: Values = {}


def router(site: Site) -> APIRouter:
    def allowed() -> None:
        if not site.may_train or site.runs is None:
            raise NotAllowed("training_not_allowed")

    exports = Exports()
    site.closing.append(exports.close)
    routes = APIRouter(dependencies=[Depends(allowed)])
    _add_trainings(routes, site)
    _add_runs(routes, site)
    _add_exports(routes, site, exports)
    return routes


def runs_of(site: Site) -> Path:
    assert site.runs is not None  # else `allowed` has refused
    return site.runs


def _add_trainings(routes: APIRouter, site: Site) -> None:
    @routes.get("/trainings/fields")
    def fields() -> Response:
        return AsciiJSON(form_json() | {"resumable": sorted(resumable())})

    @routes.get("/trainings")
    def trainings() -> Response:
        runs = runs_of(site)
        known = [launch.training_json(runs / name) for name in launch.names(runs)]
        started = sorted(filter(None, known), key=lambda one: one["began"], reverse=True)
        return AsciiJSON({"trainings": started[:LISTED], "at_once": site.trainings_at_once})

    @routes.get("/trainings/recipes/{name}")
    def recipe(name: str) -> Response:
        return AsciiJSON(recipe_of(run_folder(runs_of(site), name)))

    @routes.post("/trainings/preflight")
    async def look_through(form: PreflightForm) -> StreamingResponse:
        async def events() -> AsyncIterator[Event]:
            async for event in from_thread(lambda left: preflight(form, left)):
                yield event

        return event_stream(events(), "a preflight")

    @routes.post("/trainings/command")
    def command(form: TrainingForm) -> Response:
        made = command_of(form, runs_of(site))
        return AsciiJSON({"command": made.line, "problems": made.problems})

    @routes.post("/trainings/start")
    def start(form: TrainingForm) -> Response:
        runs = runs_of(site)
        made = command_of(form, runs)
        check(made)
        record = launch.start(runs, runs / form.name, made, site.trainings_at_once)
        return AsciiJSON({"name": form.name, "command": record["command"]})


def _add_runs(routes: APIRouter, site: Site) -> None:
    @routes.post("/runs/{name}/stop")
    def stop(name: str) -> Response:
        launch.stop(run_folder(runs_of(site), name))
        return AsciiJSON({})

    @routes.post("/runs/{name}/resume")
    def resume(name: str, form: ResumeForm) -> Response:
        runs = runs_of(site)
        folder = run_folder(runs, name)
        launch.check_resumable(folder)
        made = resume_command(folder, form.values)
        check(made)
        record = launch.start(runs, folder, made, site.trainings_at_once)
        return AsciiJSON({"name": name, "command": record["command"]})


def check(made: Command) -> None:
    """Raises the first thing that is wrong with a command."""
    for problem in made.problems:
        if problem["key"]:
            raise RequestError(problem["key"])
        where = f"{problem['field']}: " if problem["field"] else ""
        raise PhiSightError(where + problem["text"])


def _add_exports(routes: APIRouter, site: Site, exports: Exports) -> None:
    @routes.get("/exports/forms")
    def forms() -> Response:
        return AsciiJSON({"forms": forms_json()})

    @routes.post("/runs/{name}/exports")
    def begin(name: str, form: ExportForm) -> Response:
        run = run_folder(runs_of(site), name)
        checkpoint = named_checkpoint(run, form.checkpoint)
        return AsciiJSON(exports.begin(run, checkpoint, form.form, form.options).as_json())

    @routes.get("/exports")
    def all_exports() -> Response:
        return AsciiJSON({"exports": [job.as_json() for job in exports.all()]})

    @routes.get("/exports/{id}/download")
    def download(id: str) -> Response:
        job = exports.get(id)
        if job.state != DONE:
            raise RequestError("export_not_ready")
        headers: dict[str, Any] = dict(content_disposition(f"{job.folder.name}.zip"))
        return StreamingResponse(zipped(job.folder), media_type="application/zip", headers=headers)

    @routes.delete("/exports/{id}")
    def remove(id: str) -> Response:
        exports.remove(id)
        return AsciiJSON({})
