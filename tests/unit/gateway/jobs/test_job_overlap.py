"""Which jobs' batches were on a node while a request waited for its first token."""

from services.gateway.jobs.job_overlap import JobOverlap


def test_a_job_counts_while_it_is_there_and_for_who_came_before_it_left() -> None:
    overlap = JobOverlap()
    overlap.see("a", {1}, now_s=10.0)
    assert overlap.during((1,), since_s=9.0) == ["a"]
    assert overlap.during((1,), since_s=11.0) == ["a"], "it is still there"
    assert overlap.during((2,), since_s=0.0) == []
    overlap.see("a", set(), now_s=20.0)
    assert overlap.during((1,), since_s=19.0) == ["a"]
    assert overlap.during((1,), since_s=21.0) == []


def test_jobs_on_several_nodes_count_once_for_a_request_on_several_nodes() -> None:
    overlap = JobOverlap()
    overlap.see("a", {1, 2}, now_s=10.0)
    overlap.see("b", {2}, now_s=10.0)
    assert sorted(overlap.during((1, 2), since_s=10.0)) == ["a", "b"]
    assert overlap.during((1,), since_s=10.0) == ["a"]


def test_a_forgotten_job_counts_no_more() -> None:
    overlap = JobOverlap()
    overlap.see("a", {1}, now_s=10.0)
    overlap.see("a", set(), now_s=11.0)
    overlap.forget("a")
    assert overlap.during((1,), since_s=0.0) == []
