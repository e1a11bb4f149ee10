"""Reading durable streams in tests."""

from shared.bus.base import StreamMessage, StreamReader

DEADLINE_S = 60.0


async def taken(reader: StreamReader, count: int) -> list[StreamMessage]:
    """The next messages. Raises TimeoutError when one of them does not come."""
    messages: list[StreamMessage] = []
    while len(messages) < count:
        message = await reader.next(timeout_s=DEADLINE_S)
        if message is None:
            raise TimeoutError(f"{len(messages)} of {count} messages came within {DEADLINE_S:g} s")
        messages.append(message)
    return messages
