"""The routes of fine-tuning jobs, in OpenAI's words."""

from collections.abc import Callable, Mapping

from fastapi import FastAPI, Request, Response

from services.gateway.http.bodies import json_response
from services.gateway.jobs.fine_tuning import FineTuning
from services.gateway.jobs.job import Job, matches
from services.gateway.jobs.paging import check_query, read_page
from services.gateway.jobs.requests import JobRequest

MAX_LISTED = 100


def add_jobs(app: FastAPI, fine_tuning: FineTuning) -> None:
    """Serve the creation, the cancelling and the lists of jobs."""
    _add_jobs(app, fine_tuning)
    _add_lists(app, fine_tuning)


def _add_jobs(app: FastAPI, fine_tuning: FineTuning) -> None:
    @app.post("/v1/fine_tuning/jobs")
    async def create_job(asked: JobRequest) -> Response:
        asked.check_method()
        return json_response(await fine_tuning.create(asked))

    @app.get("/v1/fine_tuning/jobs/{job_id}")
    async def show_job(job_id: str) -> Response:
        return json_response(fine_tuning.show(job_id))

    @app.post("/v1/fine_tuning/jobs/{job_id}/cancel")
    async def cancel_job(job_id: str) -> Response:
        return json_response(await fine_tuning.cancel(job_id))


def _add_lists(app: FastAPI, fine_tuning: FineTuning) -> None:
    @app.get("/v1/fine_tuning/jobs")
    async def list_jobs(request: Request) -> Response:
        query = dict(request.query_params)
        wanted = _wanted(query)
        check_query(query, ("after", "limit"))
        page = read_page(query, default_limit=20, max_limit=MAX_LISTED)
        return json_response(fine_tuning.list_jobs(page, wanted))

    @app.get("/v1/fine_tuning/jobs/{job_id}/events")
    async def list_events(request: Request, job_id: str) -> Response:
        check_query(request.query_params, ("after", "limit"))
        page = read_page(request.query_params, default_limit=20, max_limit=MAX_LISTED)
        return json_response(await fine_tuning.list_events(job_id, page))

    @app.get("/v1/fine_tuning/jobs/{job_id}/checkpoints")
    async def list_checkpoints(request: Request, job_id: str) -> Response:
        check_query(request.query_params, ("after", "limit"))
        page = read_page(request.query_params, default_limit=10, max_limit=MAX_LISTED)
        return json_response(await fine_tuning.list_checkpoints(job_id, page))


def _wanted(query: dict[str, str]) -> Callable[[Job], bool]:
    """Takes the filter by metadata out of the query: `metadata[key]=value`, or `metadata=null`."""
    if query.get("metadata") == "null":
        del query["metadata"]
        return lambda job: matches(job, None)
    names = [name for name in query if name.startswith("metadata[") and name.endswith("]")]
    metadata: Mapping[str, str] = {name[len("metadata[") : -1]: query.pop(name) for name in names}
    return lambda job: matches(job, metadata)
