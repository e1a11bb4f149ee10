"""A sequence that is sent again when its node is gone."""

import pytest

from services.gateway.sent_sequence import MAX_TRIES, SentSequence, SequenceSpec
from shared.messages.inference import InferenceTask, Sampling, SequenceResult, TokenLogprob

SPEC = SequenceSpec(prompt=(1, 2, 3), sampling=Sampling(max_tokens=8), prompt_logprobs=True)


def token(index: int) -> SequenceResult:
    return SequenceResult(task_id="t", token=TokenLogprob(token=10 + index), index=index)


def sent(*results: SequenceResult) -> SentSequence:
    sequence = SentSequence(SPEC)
    send(sequence)
    for result in results:
        sequence.note(result)
    return sequence


def send(sequence: SentSequence) -> InferenceTask:
    return sequence.next_task(f"t{sequence.num_tries}", gateway="g", waited_s=0.5, timeout_s=5.0)


def test_the_next_node_goes_on_behind_the_tokens_that_have_come() -> None:
    sequence = sent(token(0), token(1), token(1), token(2))
    assert sequence.can_go_on(may_mix_weights=True)
    task = send(sequence)
    assert (task.task_id, task.prompt, task.num_given) == ("t1", (1, 2, 3, 10, 11, 12), 3)
    assert task.most_tokens == 3 + 8
    assert not task.prompt_logprobs, "they have come"
    assert task.objective.when_late == "serve_last"


def test_without_a_token_it_begins_again() -> None:
    sequence = sent()
    assert sequence.can_go_on(may_mix_weights=False)
    task = send(sequence)
    assert (task.prompt, task.num_given, task.prompt_logprobs) == ((1, 2, 3), 0, True)


@pytest.mark.parametrize(
    ("results", "may_mix_weights"),
    [
        ([SequenceResult(task_id="t", prompt=(TokenLogprob(token=2, logprob=-1.0),))], True),
        ([token(0), token(2)], True),
        ([token(0)], False),
    ],
    ids=["scored in part", "a token was lost", "other weights"],
)
def test_what_could_not_be_the_same_answer_ends(results: list[SequenceResult], may_mix_weights: bool) -> None:
    assert not sent(*results).can_go_on(may_mix_weights=may_mix_weights)


def test_the_tries_are_bounded() -> None:
    sequence = sent()
    for _ in range(MAX_TRIES - 1):
        assert sequence.can_go_on(may_mix_weights=True)
        send(sequence)
    assert not sequence.can_go_on(may_mix_weights=True)
