"""The routes of the training room that look: at runs, their curves and their checkpoints."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from api.responses import AsciiJSON
from web.errors import NotThere
from web.replies import content_disposition
from web.site import Site
from web.training.curves import part_of, table_of
from web.training.dashboard import dashboard, samples
from web.training.pictures import names_in, picture
from web.training.recipe import read_config
from web.training.runs import LONGEST_NAME, Run, Runs
from web.training.saved import Verified, checkpoint_of, checkpoints_of

Step = Annotated[float | None, Query(ge=-1, le=2**53, allow_inf_nan=False)]


class Choice(BaseModel):
    """Which checkpoint the page is to chat with."""

    model_config = ConfigDict(extra="forbid")

    run: str = Field(min_length=1, max_length=LONGEST_NAME)
    checkpoint: str = Field(min_length=1, max_length=40)


def router(site: Site) -> APIRouter:
    """A public page shows no runs: its router has none of these routes."""
    routes = APIRouter()
    if site.runs is not None:
        runs, verified = Runs(site.runs), Verified()
        add_looking(routes, runs, verified)
        add_checkpoints(routes, site, runs, verified)
    return routes


def add_looking(routes: APIRouter, runs: Runs, verified: Verified) -> None:
    @routes.get("/runs")
    def listed() -> Response:
        return AsciiJSON(runs.listed())

    @routes.get("/runs/{name}")
    def one(name: str) -> Response:
        run = runs.open(name)
        with run.lock:
            return AsciiJSON(dashboard(run, name, verified))

    @routes.get("/runs/{name}/samples")
    def answers(name: str) -> Response:
        run = runs.open(name)
        with run.lock:
            return AsciiJSON({"evaluations": samples(run)})

    @routes.get("/runs/{name}/curves")
    def curves(
        name: str,
        since: Step = None,
        until: Step = None,
        version: Annotated[str, Query(max_length=60)] = "",
    ) -> Response:
        run = runs.open(name)
        with run.lock:
            return AsciiJSON(curves_json(run, since, until, version))

    @routes.get("/runs/{name}/curves.csv")
    def table(name: str) -> Response:
        run = runs.open(name)
        with run.lock:
            run.read()
            series = run.series()
        headers = content_disposition(f"{name}-curves.csv")
        return StreamingResponse(table_of(series), media_type="text/csv", headers=dict(headers))

    @routes.get("/runs/{name}/pictures/{file:path}")
    def sample_picture(name: str, file: str) -> Response:
        run = runs.open(name)
        with run.lock:
            run.read()
            is_named = file in names_in(run.log.records)
        found = checkpoints_of(run.folder)
        if not is_named or not found:
            raise NotThere("nothing_there")
        data, kind = picture(read_config(found[0][1]), file)
        return Response(data, media_type=kind, headers={"cache-control": "private, max-age=3600"})


def add_checkpoints(routes: APIRouter, site: Site, runs: Runs, verified: Verified) -> None:
    @routes.post("/runs/{name}/checkpoints/{checkpoint}/verify")
    def verify(name: str, checkpoint: str) -> Response:
        return AsciiJSON(verified.verify(checkpoint_of(runs.folder_of(name), checkpoint)))

    @routes.post("/model")
    def chat_with(choice: Choice) -> Response:
        folder = checkpoint_of(runs.folder_of(choice.run), choice.checkpoint)
        site.model.begin(str(folder))
        return AsciiJSON({})


def curves_json(run: Run, since: float | None, until: float | None, version: str) -> dict[str, Any]:
    """The series, or those of their points that are of the step `since` and later, where what the
    page has is of the same `version`."""
    run.read()
    series, is_more = run.series(), since is not None and version == run.version
    begin = since if is_more or until is not None else None
    last = max((points[-1][0] for points in series.values()), default=0)
    parts = {name: part_of(points, begin, until) for name, points in series.items()}
    return {
        "version": run.version,
        "more": is_more,
        "last": last,
        "whole": all(
            len(parts[name]) == len(points) for name, points in series.items() if begin is None
        ),
        "series": parts,
    }
