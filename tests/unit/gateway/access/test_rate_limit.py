"""A bucket against a plain count of what a minute allows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.access.keys import Key
from services.gateway.access.meter import Meter
from services.gateway.access.rate_limit import Bucket
from services.gateway.http.errors import ApiError


def test_what_was_taken_comes_back_evenly() -> None:
    bucket = Bucket.full(60, now_s=10.0).without(30)
    assert bucket.at(20.0).left == pytest.approx(40)
    assert bucket.at(1000.0).left == 60
    assert bucket.wait_s(31) == pytest.approx(1.0)
    assert bucket.reset_s == pytest.approx(30.0)


def test_more_than_a_whole_bucket_waits_for_the_whole_bucket() -> None:
    bucket = Bucket.full(60, now_s=0.0)
    assert bucket.wait_s(1000) == 0
    assert bucket.without(1000).wait_s(1000) == pytest.approx(1000)


@given(
    per_minute=st.integers(1, 600),
    steps=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50)), max_size=40),
)
def test_no_minute_gives_more_than_two_buckets_and_a_wait_is_true(
    per_minute: int, steps: list[tuple[float, int]]
) -> None:
    now_s, bucket, taken = 0.0, Bucket.full(per_minute, 0.0), []
    for passed_s, amount in steps:
        now_s += passed_s
        bucket, amount = bucket.at(now_s), min(amount, per_minute)
        wait_s = bucket.wait_s(amount)
        assert bucket.at(now_s + wait_s + 1e-6).wait_s(amount) == 0
        if wait_s == 0:
            bucket = bucket.without(amount)
            taken.append((now_s, amount))
    for begin_s, _ in taken:
        within = sum(amount for at_s, amount in taken if begin_s <= at_s < begin_s + 60)
        assert within <= 2 * per_minute + 1e-6


class Clock:
    seconds = 0.0

    def now_s(self) -> float:
        return self.seconds

    def wall_s(self) -> float:
        return self.seconds


def meter(clock: Clock, **limits: int) -> Meter:
    return Meter(Key(id="a", name="a", digest="", scopes=("infer",), created_at=0, **limits), clock)


def test_one_request_too_many_is_told_when_to_come_again() -> None:
    clock = Clock()
    mine = meter(clock, requests_per_minute=2)
    mine.count_request()
    mine.count_request()
    with pytest.raises(ApiError, match="2 requests a minute") as caught:
        mine.count_request()
    assert caught.value.status == 429
    assert caught.value.headers["retry-after"] == "30"
    assert mine.headers()["x-ratelimit-remaining-requests"] == "0"
    clock.seconds = 30.0
    mine.count_request()


def test_tokens_of_prompts_and_completions_count() -> None:
    clock = Clock()
    mine = meter(clock, tokens_per_minute=60)
    mine.count_prompt(40)
    mine.count_completion(50)
    assert mine.headers() == {
        "x-ratelimit-limit-tokens": "60",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "90.000s",
    }
    with pytest.raises(ApiError) as caught:
        mine.count_prompt(1)
    assert caught.value.headers["retry-after"] == "31"


def test_without_limits_nothing_is_counted_or_told() -> None:
    mine = meter(Clock())
    for _ in range(1000):
        mine.count_request()
        mine.count_prompt(10**6)
        mine.count_completion(10**6)
    assert mine.headers() == {}
