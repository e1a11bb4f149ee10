"""The routes of fine-tuning jobs, in OpenAI's words."""

from collections.abc import Callable
from typing import Annotated

from fastapi import FastAPI, Query, Request
from pydantic import ConfigDict, Field

from services.gateway.http.auth import caller_of
from services.gateway.jobs.fine_tuning import FineTuning
from services.gateway.jobs.job import Job, matches
from services.gateway.jobs.objects import FineTuningJob, JobCheckpoint, JobEvent
from services.gateway.jobs.paging import ObjectList, Page
from services.gateway.jobs.requests import JobRequest
from services.gateway.openai.schema import unsupported

_METADATA = {
    "name": "metadata",
    "in": "query",
    "description": "Only jobs with these: `metadata[key]=value`, or `metadata=null` for jobs without any.",
    "style": "deepObject",
    "explode": True,
    "schema": {"type": "object", "additionalProperties": {"type": "string"}},
}


class JobsPage(Page):
    """Which jobs are wanted; further parameters filter by metadata."""

    model_config = ConfigDict(extra="allow")

    def wanted(self) -> Callable[[Job], bool]:
        """Raises ApiError (400) naming a parameter that is no filter."""
        further = dict(self.model_extra or {})
        if further.get("metadata") == "null":
            del further["metadata"]
            metadata = None
        else:
            names = [name for name in further if name.startswith("metadata[") and name.endswith("]")]
            metadata = {name[len("metadata[") : -1]: further.pop(name) for name in names}
        for name in further:
            raise unsupported(name)
        return lambda job: matches(job, metadata)


class CheckpointsPage(Page):
    """Which checkpoints are wanted."""

    limit: Annotated[int, Field(ge=1, le=100)] = 10


def add_jobs(app: FastAPI, fine_tuning: FineTuning) -> None:
    """Serve the creation, the cancelling and the lists of jobs."""
    _add_jobs(app, fine_tuning)
    _add_lists(app, fine_tuning)


def _add_jobs(app: FastAPI, fine_tuning: FineTuning) -> None:
    @app.post("/v1/fine_tuning/jobs")
    async def create_job(asked: JobRequest, request: Request) -> FineTuningJob:
        asked.check_method()
        return await fine_tuning.create(asked, caller_of(request).key)

    @app.get("/v1/fine_tuning/jobs/{job_id}")
    async def show_job(job_id: str) -> FineTuningJob:
        return fine_tuning.show(job_id)

    @app.post("/v1/fine_tuning/jobs/{job_id}/cancel")
    async def cancel_job(job_id: str) -> FineTuningJob:
        return await fine_tuning.cancel(job_id)


def _add_lists(app: FastAPI, fine_tuning: FineTuning) -> None:
    @app.get("/v1/fine_tuning/jobs", openapi_extra={"parameters": [_METADATA]})
    async def list_jobs(page: Annotated[JobsPage, Query()]) -> ObjectList[FineTuningJob]:
        return fine_tuning.list_jobs(page, page.wanted())

    @app.get("/v1/fine_tuning/jobs/{job_id}/events")
    async def list_events(job_id: str, page: Annotated[Page, Query()]) -> ObjectList[JobEvent]:
        return await fine_tuning.list_events(job_id, page)

    @app.get("/v1/fine_tuning/jobs/{job_id}/checkpoints")
    async def list_checkpoints(
        job_id: str, page: Annotated[CheckpointsPage, Query()]
    ) -> ObjectList[JobCheckpoint]:
        return await fine_tuning.list_checkpoints(job_id, page)
