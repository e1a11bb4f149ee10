"""The gateway's account of requests: in time, late, or refused and why."""

from pathlib import Path

from shared.errors import RefusedError
from tests.support.gateway import DEADLINE_S, gateway_world, says
from tests.unit.gateway.http.test_auth import ASKED, bearer, make_key

URL = "/v1/completions"


async def test_metrics_tell_what_was_in_time_and_why_others_were_refused(tmp_path: Path) -> None:
    token = make_key(tmp_path, "admin", service_class="batch", tokens_per_minute=200)
    answers = []
    async with gateway_world(says("one two"), run_dir=tmp_path) as world:
        world.http.headers.update(bearer(token))
        for ttft_s, tbt_s in ((DEADLINE_S, DEADLINE_S), (1e-9, None), (DEADLINE_S, 1e-9), (None, None)):
            world.cluster.ttft_s, world.cluster.tbt_s = ttft_s, tbt_s
            answers.append(await world.http.post(URL, json=ASKED))
        world.cluster.refusals = [RefusedError("late", code=429)]
        answers += [await world.http.post(URL, json=ASKED | more) for more in ({}, {"n": 0})]
        answers.append(await world.http.post(URL, json=ASKED | {"prompt": "long " * 200}))
        text = (await world.http.get("/metrics")).text
    assert [answer.status_code for answer in answers] == [200, 200, 200, 200, 429, 400, 429]
    for line in (
        'lemix_requests_in_time_total{class="batch"} 1.0',
        'lemix_requests_late_total{class="batch"} 2.0',
        'lemix_requests_refused_total{class="batch",reason="cluster"} 1.0',
        'lemix_requests_refused_total{class="batch",reason="invalid"} 1.0',
        'lemix_requests_refused_total{class="batch",reason="key"} 1.0',
        'lemix_requests_total{outcome="refused"} 3.0',
        'lemix_requests_total{outcome="completed"} 4.0',
    ):
        assert line in text.splitlines()
