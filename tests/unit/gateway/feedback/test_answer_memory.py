"""Answers are remembered at once, whatever the disk does, and no longer than they may be."""

from pathlib import Path

import pytest

from services.gateway.feedback import answer_memory
from services.gateway.feedback.answer_memory import AnswerMemory
from services.gateway.feedback.answer_store import AnswerLimits, AnswerStore
from services.gateway.feedback.database import Database
from tests.integration.test_trainer_service import SetClock
from tests.unit.gateway.feedback.test_stores import answer

LIMITS = AnswerLimits(max_answers=2, max_bytes=1 << 20, max_age_s=10.0)


class Memory:
    """A memory with its store, at a time that stands still."""

    def __init__(self, folder: Path) -> None:
        self.clock = SetClock()
        self.clock.time_s = 4.0
        self.store = AnswerStore(Database(folder / "feedback.sqlite"))
        self.memory = AnswerMemory(self.store, LIMITS, self.clock)

    async def known(self) -> list[int]:
        return [number for number in range(1, 5) if await self.memory.find(f"a{number}")]


@pytest.fixture
async def here(tmp_path: Path) -> Memory:
    return Memory(tmp_path)


async def test_an_answer_is_known_before_and_after_it_is_saved(here: Memory) -> None:
    here.memory.keep(answer(1))
    assert await here.known() == [1]
    assert here.store.find("a1") is None
    await here.memory.save()
    assert here.store.find("a1") == answer(1)
    assert await here.known() == [1]


async def test_an_answer_that_is_too_old_is_not_known_although_it_is_still_there(here: Memory) -> None:
    here.memory.keep(answer(1))
    here.memory.keep(answer(2))
    await here.memory.save()
    here.clock.time_s = 12.0
    assert await here.known() == [2]
    await here.memory.forget()
    assert here.store.find("a1") is None


async def test_while_nothing_can_be_saved_the_newest_are_remembered(
    here: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_memory, "MAX_UNSAVED", 2)
    for number in (1, 2, 3):
        here.memory.keep(answer(number))
    assert await here.known() == [2, 3]
