"""The workload of both sides of a comparison."""

import random

BATCH_SIZE = 8
PROMPT_LENGTH = 128
MAX_TOKENS = 64
NUM_EXAMPLES = 8
EXAMPLE_LENGTH = 256
LEARNING_RATE = 1e-4


def prompt_tokens(vocab_size: int, round_number: int = 1, length: int = PROMPT_LENGTH) -> list[list[int]]:
    """Eight prompts of random tokens, others in each round: nodes compute none of them twice."""
    rng = random.Random(round_number)
    return [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(BATCH_SIZE)]


def example_tokens(vocab_size: int, number: int) -> list[list[int]]:
    """Training batch `number`: 8 examples of 256 random tokens."""
    rng = random.Random(1000 + number)
    return [[rng.randrange(vocab_size) for _ in range(EXAMPLE_LENGTH)] for _ in range(NUM_EXAMPLES)]
