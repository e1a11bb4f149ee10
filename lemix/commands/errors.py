"""How an error is told to whoever ran a command."""

from rich.console import Console


def say_error(message: str) -> None:
    """One line on standard error."""
    Console(stderr=True).print(f"error: {message}", markup=False, highlight=False, soft_wrap=True)
