"""A bus's dispatcher: what becomes of an answer that is cancelled before it began."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from shared.bus.base import Incoming
from shared.bus.dispatch import Dispatcher
from shared.errors import RefusedError
from shared.messages.base import Done
from shared.subjects import RequestSubject

ASK = RequestSubject("test.ask", Done, Done)


@dataclass
class Arrived:
    """A delivered message that remembers its replies."""

    replies: list[Any] = field(default_factory=list)
    size_bytes = 0
    traceparent = ""

    def read(self, kind: type[Any]) -> Any:
        return kind()

    async def reply(self, message: Any) -> None:
        self.replies.append(message)

    async def refuse(self, refusal: RefusedError) -> None:
        self.replies.append(refusal)


async def agree(incoming: Incoming[Done]) -> Done:
    return incoming.message


@pytest.mark.filterwarnings("error")
async def test_a_dispatcher_that_closes_before_an_answer_began_leaves_nothing_behind() -> None:
    dispatcher, delivery = Dispatcher(), Arrived()
    await dispatcher.answering(ASK, agree, max_running=1)(delivery)
    await dispatcher.close()
    assert delivery.replies == []
