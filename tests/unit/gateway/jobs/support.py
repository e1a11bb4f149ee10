"""A job as tests begin with it."""

from typing import Any

from services.gateway.jobs.happenings import Happening, Started, Validated
from services.gateway.jobs.job import Hyperparameters, Job
from services.gateway.jobs.transitions import Outcome, after

NOW_S = 1000


def new_job(*, n_epochs: int = 2, batch_size: int = 2, **changes: Any) -> Job:
    hyperparameters = Hyperparameters(n_epochs=n_epochs, batch_size=batch_size, learning_rate_multiplier=1.0)
    fields = {"id": "ftjob-0a", "number": 1, "created_at": NOW_S, "model": "m", "training_file": "file-1"}
    return Job.model_validate({**fields, "hyperparameters": hyperparameters, "seed": 1, **changes})


def running_job(num_examples: int = 5, **fields: Any) -> Job:
    """Two epochs of three steps, unless told otherwise."""
    return following(new_job(**fields), Validated(num_examples), Started())[-1].job


def following(job: Job, *happenings: Happening) -> list[Outcome]:
    """What becomes of the job, one happening after the other."""
    outcomes = []
    for happening in happenings:
        outcomes.append(after(job, happening, NOW_S))
        job = outcomes[-1].job
    return outcomes
