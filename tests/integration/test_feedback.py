"""Answers that are corrected over HTTP by the official client, in front of a scripted trainer."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from services.gateway.feedback import service
from services.gateway.feedback.service import FILE_NAME, MAX_OF_ANSWER
from services.trainer.intake.data import read_body
from shared.bus.memory import MemoryBroker
from shared.encoding import LabelledTokens
from shared.examples import Conversation, Preference, PromptCompletion
from tests.integration.test_fine_tuning_api import Api, api, refusal
from tests.support.chat_templates import CHATML, QWEN
from tests.support.fake_trainer import FakeTrainer
from tests.support.gateway import MODEL, TOKENIZER, embedded_encoder, gateway_world, says
from tests.support.waiting import LOOK_EVERY_S, until
from tests.unit.gateway.http.test_auth import bearer, make_key

SAID = "It is Rome."
RIGHT = "It is Paris."
MESSAGES: list[Any] = [
    {"role": "developer", "content": "Be short."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "The capital of France?"},
]
BEFORE = [{"role": "system", "content": "Be short."}, *MESSAGES[1:]]
ALONE = {"feedback_batch_after_s": 0.0}
"""Corrections do not wait for others."""


@asynccontextmanager
async def feedback_api(
    broker: MemoryBroker | None = None, trainer: FakeTrainer | None = None, **options: Any
) -> AsyncIterator[Api]:
    async with api(broker, trainer, script=says(SAID), feedback=True, **options) as here:
        yield here


async def ask(here: Api, **fields: Any) -> str:
    """The id of a chat's answer that is remembered."""
    fields = {"model": MODEL, "messages": MESSAGES, "store": True, **fields}
    return str((await here.client.chat.completions.create(**fields)).id)


async def correct(here: Api, answer_id: str, correction: object = RIGHT, **fields: Any) -> dict[str, Any]:
    body = {"id": answer_id, "correction": correction, **fields}
    return await here.client.post("/feedback", body=body, cast_to=dict[str, Any])


async def listed(here: Api, **query: Any) -> list[dict[str, Any]]:
    page = await here.client.get("/feedback", cast_to=dict[str, Any], options={"params": query})
    data: list[dict[str, Any]] = page["data"]
    return data


async def until_status(here: Api, *statuses: str) -> list[dict[str, Any]]:
    """The list, once the lessons of the newest feedback stand so."""
    while statuses_of(found := await listed(here)) != statuses:  # noqa: ASYNC110  # a client can only ask
        await asyncio.sleep(LOOK_EVERY_S)
    return found


def statuses_of(found: list[dict[str, Any]]) -> tuple[str, ...]:
    """How the lessons of the newest feedback stand."""
    return tuple(lesson["status"] for lesson in found[0]["lessons"])


def content_below(folder: Path) -> bytes:
    """All that is in the files of a folder."""
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def published(trainer: FakeTrainer) -> list[Any]:
    """The examples that were published, as the trainer reads them."""
    return [example for body in trainer.bodies for example in read_body(json.dumps(body).encode()).examples]


def learnt_text(example: LabelledTokens) -> str:
    return TOKENIZER.decode([example.tokens[row + 1] for row in example.label_rows])


async def test_a_correction_is_learnt_as_an_example_and_as_a_preference_until_it_is_durable() -> None:
    async with feedback_api(**ALONE) as here:
        answer_id = await ask(here)
        given = await correct(here, answer_id, score=-1)
        assert (given["object"], given["answer_id"], given["choice"]) == ("feedback", answer_id, 0)
        assert (given["score"], given["status"]) == (-1, "pending")
        here.trainer.allow(2)
        (shown,) = await until_status(here, "applied", "applied")
        await here.trainer.save()
        (shown,) = await until_status(here, "durable", "durable")

        assert [(each["kind"], each["batch_id"]) for each in shown["lessons"]] == [
            ("example", here.trainer.applied[0]),
            ("preference", here.trainer.applied[1]),
        ]
        for body, lesson in zip(here.trainer.bodies, shown["lessons"], strict=True):
            assert body["producer"] == "anonymous"
            assert body["sources"] == [
                {"id": given["id"], "producer": "anonymous", "sha256": lesson["sha256"]}
            ]
        example, preference = published(here.trainer)
    right = {"role": "assistant", "content": RIGHT}
    assert isinstance(example, Conversation)
    assert example.model_dump(exclude_unset=True)["messages"] == [
        *BEFORE[:2],
        BEFORE[2] | {"weight": 0},
        BEFORE[3],
        right,
    ]
    assert isinstance(preference, Preference)
    assert preference.model_dump(exclude_unset=True) == {
        "input": {"messages": BEFORE},
        "preferred_output": [right],
        "non_preferred_output": [{"role": "assistant", "content": SAID}],
    }


async def test_of_a_corrected_conversation_the_correction_alone_is_learnt() -> None:
    async with feedback_api(**ALONE) as here:
        await correct(here, await ask(here))
        here.trainer.allow(2)
        await here.until_applied(2)
        example, preference = published(here.trainer)
    encoder = embedded_encoder(CHATML, TOKENIZER)
    preferred, other = encoder.sequences(preference)
    (alone,) = encoder.sequences(example)
    assert alone == preferred
    assert learnt_text(alone).startswith(RIGHT)
    assert learnt_text(other).startswith(SAID)
    assert learnt_text(alone).removeprefix(RIGHT) == learnt_text(other).removeprefix(SAID)
    rendered = TOKENIZER.decode(list(alone.tokens))
    assert rendered.endswith(learnt_text(alone))


async def test_whatever_is_not_asked_to_be_stored_is_neither_kept_nor_trained(tmp_path: Path) -> None:
    broker = MemoryBroker()
    async with feedback_api(broker, run_dir=tmp_path, **ALONE) as here:
        client = here.client
        for number in range(20):
            secret: list[Any] = [{"role": "user", "content": f"secret {number}"}]
            await client.chat.completions.create(model=MODEL, messages=secret, store=False)
            await client.completions.create(model=MODEL, prompt=f"secret {number}")
            await client.responses.create(model=MODEL, input=f"secret {number}")
            async for _ in await client.chat.completions.create(model=MODEL, messages=secret, stream=True):
                pass
        answer_id = await ask(here)
        rated = await client.post("/feedback", body={"id": answer_id, "score": 0.5}, cast_to=dict[str, Any])
        assert (rated["status"], rated["lessons"]) == ("rated", [])
        await correct(here, answer_id)
        here.trainer.allow(9)
        await until_status(here, "applied", "applied")
    assert len(here.trainer.applied) == 2, "the correction's"
    for body, _ in broker.streams["LEMIX_TRAIN"].messages:
        assert b"secret" not in body
    kept = content_below(tmp_path)
    assert b"Be short." in kept
    assert b"secret" not in kept


async def test_the_same_feedback_counts_once_and_another_correction_again() -> None:
    async with feedback_api(**ALONE) as here:
        answer_id = await ask(here)
        first = await correct(here, answer_id)
        again = await correct(here, answer_id, {"role": "assistant", "content": RIGHT})
        other = await correct(here, answer_id, "Paris, of course.")
        assert again["id"] == first["id"] != other["id"]
        here.trainer.allow(9)
        await here.until_applied(4)
        await correct(here, answer_id)
        assert [each["id"] for each in await listed(here)] == [other["id"], first["id"]]
        await asyncio.gather(*(correct(here, answer_id, "Paris") for _ in range(5)))
        await here.until_applied(6)
        assert len(published(here.trainer)) == 6


async def test_streams_completions_and_responses_are_remembered_too() -> None:
    async with feedback_api(**ALONE) as here:
        client = here.client
        async for chunk in await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, store=True, stream=True, n=2
        ):
            streamed = chunk.id
        completion = await client.completions.create(
            model=MODEL, prompt=["a ", "b "], n=2, extra_body={"store": True}
        )
        response = await client.responses.create(
            model=MODEL, input="The capital?", instructions="Be short.", store=True
        )
        assert response.to_dict()["store"] is True
        assert len((await correct(here, streamed, choice=1))["lessons"]) == 2
        kinds = [each["kind"] for each in (await correct(here, completion.id, "x", choice=2))["lessons"]]
        assert kinds == ["example"]
        await correct(here, response.id)
        here.trainer.allow(9)
        await here.until_applied(3)
        await until_status(here, "applied", "applied")
        found = published(here.trainer)
    assert PromptCompletion(prompt="b ", completion="x") in found
    chats = [each for each in found if isinstance(each, Conversation)]
    (of_response,) = [each for each in chats if each.messages[-2].content == "The capital?"]
    assert [message.role for message in of_response.messages] == ["system", "user", "assistant"]


async def test_calls_of_tools_are_corrected_by_messages() -> None:
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    async with feedback_api(template=QWEN, **ALONE) as here:
        await correct(here, await ask(here, tools=[tool]), message)
        here.trainer.allow(2)
        await here.until_applied(2)
        example = published(here.trainer)[0]
    assert example.tools == [tool]
    assert example.messages[-1].tool_calls == [call]


async def test_without_the_setting_nothing_is_remembered_and_errors_name_it(tmp_path: Path) -> None:
    async with api(script=says(SAID), run_dir=tmp_path) as here:
        for asked in (
            ask(here),
            here.client.completions.create(model=MODEL, prompt="x", extra_body={"store": True}),
            here.client.responses.create(model=MODEL, input="x", store=True),
        ):
            error = await refusal(asked)
            assert (error["status"], error["param"]) == (400, "store")
            assert "LEMIX_FEEDBACK" in error["message"]
        for request in (correct(here, "chatcmpl-1"), listed(here)):
            error = await refusal(request)
            assert (error["status"], error["code"]) == (404, "feedback_is_off")
            assert "LEMIX_FEEDBACK" in error["message"]
    assert not (tmp_path / FILE_NAME).exists()


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"correction": ""}, "correction", "says nothing"),
        ({"correction": " \n"}, "correction", "says nothing"),
        ({"correction": None}, "correction", "or a 'score'"),
        ({"correction": {"role": "user", "content": "x"}}, "correction.role", "assistant"),
        ({"correction": {"role": "assistant"}}, "correction", "needs 'content'"),
        ({"correction": 7}, "correction", ""),
        ({"correction": SAID}, "correction", "the answer itself"),
        ({"correction": "long " * 5_000}, "correction", "tokens"),
        ({"correction": "x", "choice": 1}, "choice", "the answer has 1"),
        ({"correction": "x", "choice": -1}, "choice", ""),
        ({"correction": "x", "score": 1.5}, "score", ""),
        ({"correction": "x", "colour": "red"}, "colour", "not supported"),
    ],
)
async def test_a_wrong_correction_is_refused_by_name(fields: Any, param: str, reason: str) -> None:
    async with feedback_api() as here:
        answer_id = await ask(here)
        error = await refusal(
            here.client.post("/feedback", body={"id": answer_id, **fields}, cast_to=dict[str, Any])
        )
        assert (error["status"], error["param"]) == (400, param)
        assert reason in error["message"]
        assert await listed(here) == []


async def test_answers_that_could_not_be_learnt_from_are_not_stored() -> None:
    async with feedback_api() as here:
        error = await refusal(ask(here, extra_body={"chat_template_kwargs": {"enable_thinking": True}}))
        assert (error["status"], error["param"]) == (400, "store")
        for fields in ({"prompt": [1, 2]}, {"prompt": "x", "echo": True}):
            asked = here.client.completions.create(model=MODEL, extra_body={"store": True}, **fields)
            assert (await refusal(asked))["param"] == "store"


async def test_an_answer_that_is_not_remembered_is_unknown(tmp_path: Path) -> None:
    async with feedback_api(feedback_max_age_s=0.000_001, run_dir=tmp_path) as here:
        for answer_id in ("chatcmpl-1", await ask(here), await ask(here, store=False)):
            error = await refusal(correct(here, answer_id))
            assert (error["status"], error["code"]) == (404, "answer_not_found")


async def test_only_the_key_that_asked_or_one_that_may_train_gives_feedback(tmp_path: Path) -> None:
    tokens = {
        name: make_key(tmp_path, *scopes)
        for name, scopes in (("mine", ["infer"]), ("trains", ["infer", "train"]), ("boss", ["admin"]))
    }
    asked = {"model": MODEL, "messages": MESSAGES, "store": True}
    async with gateway_world(says(SAID), run_dir=tmp_path, feedback=True, **ALONE) as world:

        async def give(name: str, answer_id: str, correction: str) -> int:
            body = {"id": answer_id, "correction": correction}
            given = await world.http.post("/v1/feedback", json=body, headers=bearer(tokens[name]))
            return given.status_code

        async def shown(name: str) -> int:
            found = await world.http.get("/v1/feedback", headers=bearer(tokens[name]))
            return len(found.json()["data"])

        answers = {
            name: (await world.http.post("/v1/chat/completions", json=asked, headers=bearer(token))).json()[
                "id"
            ]
            for name, token in tokens.items()
        }
        assert await give("mine", answers["mine"], "a") == 200
        assert await give("mine", answers["boss"], "b") == 404
        assert await give("trains", answers["mine"], "c") == 200
        assert await give("boss", answers["trains"], "d") == 200
        assert [await shown(name) for name in tokens] == [1, 1, 1]
        without = await world.http.post("/v1/feedback", json={"id": answers["mine"], "correction": "e"})
        assert without.status_code == 401


async def test_the_lineage_of_a_batch_names_every_key_whose_feedback_it_is(tmp_path: Path) -> None:
    broker = MemoryBroker()
    tokens = [make_key(tmp_path, "infer"), make_key(tmp_path, "infer", "train")]
    trainer = FakeTrainer(broker.connect())
    running = asyncio.create_task(trainer.run())
    options = {"feedback": True, "feedback_batch_size": 2, "feedback_batch_after_s": 3600.0}
    async with gateway_world(says(SAID), broker=broker, run_dir=tmp_path, **options) as world:
        for token in tokens:
            asked = {"model": MODEL, "prompt": "x", "store": True}
            answered = await world.http.post("/v1/completions", json=asked, headers=bearer(token))
            body = {"id": answered.json()["id"], "correction": "y"}
            await world.http.post("/v1/feedback", json=body, headers=bearer(token))
        await until(lambda: bool(trainer.bodies))
    running.cancel()
    (body,) = trainer.bodies
    assert body["producer"] == "me (infer), me (infertrain)"
    assert [source["producer"] for source in body["sources"]] == ["me (infer)", "me (infertrain)"]


async def test_answers_feedback_and_batches_outlive_the_gateway(tmp_path: Path) -> None:
    broker = MemoryBroker()
    trainer = FakeTrainer(broker.connect())
    running = asyncio.create_task(trainer.run())
    async with feedback_api(broker, trainer, run_dir=tmp_path, **ALONE) as here:
        corrected, other = await ask(here), await ask(here)
        await correct(here, corrected)
        await until(lambda: len(trainer.bodies) == 1)
    trainer.allow(9)
    await until(lambda: len(trainer.applied) >= 1)
    async with feedback_api(broker, trainer, run_dir=tmp_path, seed=1, **ALONE) as here:
        await until_status(here, "applied", "applied")
        await correct(here, corrected)
        await correct(here, other)
        await until(lambda: len(trainer.applied) == 4)
        assert len(await listed(here)) == 2
    running.cancel()
    assert trainer.num_repeated == 0
    assert len(set(trainer.applied)) == len(published(trainer)) == 4


async def test_corrections_wait_for_others_up_to_a_limit_of_time() -> None:
    async with feedback_api(feedback_batch_size=3, feedback_batch_after_s=3600.0) as here:
        here.trainer.allow(9)
        for number in range(7):
            await correct(here, await ask(here, messages=[{"role": "user", "content": f"{number}"}]))
        await here.until_applied(4)
        assert [len(body["examples"]) for body in here.trainer.bodies] == [3, 3, 3, 3]
        (newest, *_) = await listed(here)
        assert [each["batch_id"] for each in newest["lessons"]] == [None, None]


async def test_of_a_batch_the_lessons_that_are_held_out_are_shown_so_and_no_others(tmp_path: Path) -> None:
    broker = MemoryBroker()
    trainer = FakeTrainer(broker.connect(), held_out=(0, 2))
    running = asyncio.create_task(trainer.run())
    options: Any = {"run_dir": tmp_path, "feedback_batch_size": 3, "feedback_batch_after_s": 3600.0}

    def shown(found: list[dict[str, Any]]) -> list[list[tuple[str, int | None]]]:
        return [[(each["status"], each["version"]) for each in one["lessons"]] for one in found]

    async with feedback_api(broker, trainer, **options) as here:
        for number in range(3):
            await correct(here, await ask(here), f"Force {number}.")
        assert {each["status"] for each in await listed(here)} == {"pending"}
        trainer.allow(2)
        held_out = [("held_out", None)] * 2
        assert shown(await until_status(here, "held_out", "held_out")) == [
            held_out,
            [("applied", 1), ("applied", 2)],
            held_out,
        ]
    trainer.is_mute = True
    await trainer.save()
    async with feedback_api(broker, trainer, seed=1, **options) as here:
        async with asyncio.timeout(60.0):
            while (now := await listed(here))[1]["status"] != "durable":  # noqa: ASYNC110
                await asyncio.sleep(LOOK_EVERY_S)
        assert shown(now) == [held_out, [("durable", 2), ("durable", 2)], held_out]
        assert [each["status"] for each in now] == ["held_out", "durable", "held_out"]
    running.cancel()


async def test_a_trainer_whose_news_are_lost_is_asked() -> None:
    async with feedback_api(ask_after_s=0.05, **ALONE) as here:
        here.trainer.is_mute = True
        here.trainer.allow(2)
        await correct(here, await ask(here))
        await until_status(here, "applied", "applied")
        await here.trainer.save()
        await until_status(here, "durable", "durable")


async def test_what_a_rollback_takes_out_is_told_and_not_trained_again(tmp_path: Path) -> None:
    async with feedback_api(run_dir=tmp_path, **ALONE) as here:
        here.trainer.allow(9)
        await correct(here, await ask(here))
        await here.until_applied(2)
        await here.trainer.save()
        await until_status(here, "durable", "durable")
        await here.trainer.roll_back()
        (shown,) = await until_status(here, "rejected", "rejected")
        assert (shown["status"], shown["lessons"][0]["reason"]) == ("rejected", "NaN")
        assert len(here.trainer.bodies) == 2


async def test_feedback_is_listed_page_by_page() -> None:
    async with feedback_api(feedback_batch_after_s=3600.0) as here:
        ids = [(await correct(here, await ask(here), f"{number}"))["id"] for number in range(5)]
        assert [each["id"] for each in await listed(here)] == ids[::-1]
        assert [each["id"] for each in await listed(here, limit=2, after=ids[3])] == [ids[2], ids[1]]
        page = await here.client.get("/feedback", cast_to=dict[str, Any], options={"params": {"limit": 5}})
        assert (page["object"], page["first_id"], page["last_id"]) == ("list", ids[4], ids[0])
        assert page["has_more"] is False
        error = await refusal(listed(here, after="fb-none"))
        assert (error["status"], error["param"]) == (400, "after")


async def test_of_one_answer_not_too_much_is_said() -> None:
    async with feedback_api(feedback_batch_after_s=3600.0) as here:
        answer_id = await ask(here)
        for number in range(MAX_OF_ANSWER):
            await correct(here, answer_id, f"{number}")
        assert (await refusal(correct(here, answer_id, "one more")))["param"] == "id"
        await correct(here, answer_id, "0")


async def test_while_too_much_is_on_its_way_corrections_wait_and_ratings_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service, "MAX_UNFINISHED", 2)
    async with feedback_api(feedback_batch_after_s=3600.0) as here:
        await correct(here, await ask(here))
        answer_id = await ask(here)
        assert (await refusal(correct(here, answer_id)))["status"] == 429
        assert (await correct(here, answer_id, None, score=1))["status"] == "rated"
