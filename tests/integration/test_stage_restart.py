"""A stage that dies and comes back takes the requests in flight with it, clearly, and no others."""

from pathlib import Path

import pytest

from shared.messages.training import ForwardDone
from tests.support.models import save_tiny_model
from tests.support.node import running_node
from tests.support.training import messages, random_batches

PROMPT = [3, 14, 15, 92, 65, 35]


@pytest.mark.parametrize(("num_stages", "stage"), [(2, 1), (3, 1), (3, 2)])
async def test_requests_in_flight_fail_once_and_later_ones_succeed(
    num_stages: int, stage: int, tmp_path: Path
) -> None:
    save_tiny_model("llama", tmp_path / "model")
    async with running_node(tmp_path / "model", num_stages, tmp_path) as node:
        expected = await node.complete(PROMPT, max_tokens=12)
        lost = [await node.start(PROMPT, max_tokens=3000) for _ in range(3)]
        for answer in lost:
            await answer.first_token()
        await node.replace(stage)
        await node.ready()
        for answer in lost:
            await answer.end()
            assert answer.failure is not None
            assert (answer.failure.code, answer.finish) == (503, None)
            assert answer.failure.reason == f"stage {stage} of the node was restarted"
        again = await node.complete(PROMPT, max_tokens=12)
        assert again.token_ids == expected.token_ids
        assert node.heartbeats.keys() == set(range(num_stages))


async def test_the_first_stage_comes_back_empty_and_serves(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "model")
    async with running_node(tmp_path / "model", 2, tmp_path) as node:
        expected = await node.complete(PROMPT, max_tokens=12)
        lost = await node.start(PROMPT, max_tokens=3000)
        await lost.first_token()
        await node.replace(0)
        await node.ready()
        assert (await node.complete(PROMPT, max_tokens=12)).token_ids == expected.token_ids
        await node.heard(lambda: node.heartbeats[0].kv_blocks_used == 0)


@pytest.mark.parametrize("num_stages", [2, 3])
async def test_requests_wait_until_a_new_stage_is_linked(num_stages: int, tmp_path: Path) -> None:
    """Too large to go inline, they would otherwise go down an arena that nobody reads."""
    save_tiny_model("llama", tmp_path / "model")
    last = num_stages - 1
    async with running_node(tmp_path / "model", num_stages, tmp_path) as node:
        for epoch in (1, 2):
            await node.replace(last)
            assert not node.heartbeats[last].ready
            early = [await node.start(PROMPT * 60, max_tokens=4) for _ in range(3)]
            for answer in early:
                await answer.end()
                assert answer.finish == "length"
            await node.restore(epoch=epoch)
            for message in messages(f"b{epoch}", random_batches(1, 1)[0], epoch=epoch):
                await node.feed(message)
            assert isinstance((await node.report()).event, ForwardDone)
