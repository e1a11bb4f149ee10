"""The gateway when a node dies: another one goes on, and the client sees nothing of it."""

import asyncio
from typing import Any

import pytest

from services.gateway.sent_sequence import MAX_TRIES
from shared.errors import RefusedError
from shared.messages.inference import InferenceTask
from tests.integration.test_gateway_http import TEXT, URL, ask, error_of, events_of
from tests.support.gateway import TOKENIZER, World, gateway_world, says

TOKENS = TOKENIZER.encode(TEXT)
BEGINNING, NUM_BEGUN = TOKENIZER.decode(TOKENS[:3]), 3


async def answered(world: World, task: InferenceTask) -> None:
    await world.cluster.produce(task, *says(TEXT)(task))


async def begun(world: World, task: InferenceTask) -> None:
    """The first tokens of the answer, and no more."""
    await world.cluster.produce(task, *says(TEXT)(task)[:NUM_BEGUN])


async def lost(world: World, task: InferenceTask) -> InferenceTask:
    """The node dies; returns the task that comes instead."""
    await world.cluster.fail(task, 503, "stage 1 of node 0 was silent for 3 s")
    return await world.cluster.submitted.get()


@pytest.mark.parametrize(
    "fields", [{}, {"logprobs": 2}, {"stop": ["world"]}, {"max_tokens": 5}, {"echo": True}]
)
async def test_an_answer_is_the_one_of_an_undisturbed_cluster(fields: dict[str, Any]) -> None:
    async with gateway_world(says(TEXT)) as world:
        undisturbed = (await world.http.post(URL, json=ask(**fields))).json()
    async with gateway_world() as world, asyncio.TaskGroup() as group:
        answer = group.create_task(world.http.post(URL, json=ask(**fields)))
        task = await world.cluster.submitted.get()
        await begun(world, task)
        again = await lost(world, task)
        assert again.task_id != task.task_id
        assert again.prompt == (*task.prompt, *TOKENS[:NUM_BEGUN])
        assert (again.num_given, again.sampling) == (NUM_BEGUN, task.sampling)
        await answered(world, again)
        disturbed = (await answer).json()
    assert disturbed["choices"] == undisturbed["choices"]
    assert disturbed["usage"] == undisturbed["usage"]


async def test_a_stream_goes_on_where_it_was() -> None:
    async with gateway_world() as world, asyncio.TaskGroup() as group:
        answer = group.create_task(world.http.post(URL, json=ask(stream=True)))
        task = await world.cluster.submitted.get()
        await begun(world, task)
        await answered(world, await lost(world, task))
        events = events_of((await answer).text)
    assert "".join(choice["text"] for event in events for choice in event["choices"]) == TEXT


async def test_each_choice_goes_on_by_itself_and_what_the_old_node_still_says_counts_for_nothing() -> None:
    async with gateway_world() as world, asyncio.TaskGroup() as group:
        answer = group.create_task(world.http.post(URL, json=ask(n=2)))
        one, other = [await world.cluster.submitted.get() for _ in range(2)]
        await begun(world, one)
        again = await lost(world, one)
        await answered(world, one)
        await answered(world, other)
        await answered(world, again)
        choices = (await answer).json()["choices"]
    assert again.sampling.seed == one.sampling.seed != other.sampling.seed
    assert [choice["text"] for choice in choices] == [TEXT, TEXT]


async def test_a_cluster_whose_nodes_keep_dying_is_an_error_in_the_end() -> None:
    async with gateway_world() as world, asyncio.TaskGroup() as group:
        answer = group.create_task(world.http.post(URL, json=ask()))
        task = await world.cluster.submitted.get()
        for _ in range(MAX_TRIES - 1):
            task = await lost(world, task)
        await world.cluster.fail(task, 503, "the last node was lost")
        response = await answer
    assert response.status_code == 503
    assert error_of(response)["message"] == "the last node was lost"
    assert world.cluster.submitted.empty()


async def test_a_request_that_finds_no_other_node_is_told_of_both() -> None:
    async with gateway_world() as world, asyncio.TaskGroup() as group:
        answer = group.create_task(world.http.post(URL, json=ask()))
        task = await world.cluster.submitted.get()
        world.cluster.refusals.append(RefusedError("no node is ready"))
        await lost(world, task)
        message = error_of(await answer)["message"]
    assert "was silent" in message and message.endswith("it could not go on elsewhere: no node is ready")


async def test_no_answer_is_of_two_versions_where_they_are_pinned() -> None:
    async with gateway_world(weights_consistency="pinned") as world, asyncio.TaskGroup() as group:
        answer = group.create_task(world.http.post(URL, json=ask()))
        task = await lost(world, await world.cluster.submitted.get())
        await begun(world, task)
        await world.cluster.fail(task, 503, "the node was lost")
        assert (await answer).status_code == 503
    assert world.cluster.submitted.empty()
