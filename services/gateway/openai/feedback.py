"""The routes of feedback on answers."""

from typing import Annotated

from fastapi import FastAPI, Query, Request

from services.gateway.feedback.objects import FeedbackObject, FeedbackRequest
from services.gateway.feedback.service import Feedback
from services.gateway.http.auth import caller_of
from services.gateway.jobs.paging import ObjectList, Page


def add_feedback(app: FastAPI, feedback: Feedback) -> None:
    """Serve corrections and ratings of answers, and the list of them."""

    @app.post("/v1/feedback")
    async def give_feedback(asked: FeedbackRequest, request: Request) -> FeedbackObject:
        return await feedback.give(asked, caller_of(request).key)

    @app.get("/v1/feedback")
    async def list_feedback(page: Annotated[Page, Query()], request: Request) -> ObjectList[FeedbackObject]:
        return await feedback.list_feedback(page, caller_of(request).key)
