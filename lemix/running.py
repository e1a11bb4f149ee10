"""Running one coroutine as a command: signals end it, and one error comes out as that error."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from shared.errors import LemixError
from shared.lifecycle import run_until_stopped

T = TypeVar("T")


def run_command(main: Coroutine[Any, Any, T]) -> T | None:
    """Run `main` and return its result; None when SIGINT or SIGTERM ended it first.

    Raises the first LemixError out of the groups it may be in; other errors as they are.
    """
    results: list[T] = []

    async def keep_result() -> None:
        results.append(await main)

    try:
        asyncio.run(run_until_stopped(keep_result()))
    except BaseExceptionGroup as group:
        _, unexpected = group.split(LemixError)
        if unexpected is not None:
            raise
        raise _first_leaf(group) from None
    return results[0] if results else None


def _first_leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
