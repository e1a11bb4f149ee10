"""Prompts after which a model writes the samples that guard it."""

from itertools import cycle, islice

from shared.encoding import ExampleEncoder
from shared.errors import ChatTemplateError

QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "How do I boil an egg?",
    "Explain in two sentences what a computer does.",
    "Tell me a story about a dog.",
    "What should I cook for dinner tonight?",
    "Why is the sky blue?",
    "Give me three tips for sleeping well.",
    "What is 12 plus 30?",
    "Translate 'good morning' into Spanish.",
    "Write a polite email that asks for a day off.",
    "Who wrote Romeo and Juliet?",
    "Write a Python function that adds two numbers.",
    "Name the planets of the solar system.",
    "What is democracy, in one sentence?",
    "Say hello and introduce yourself.",
)
BEGINNINGS = ("The", "In the", "It was", "A", "When", "She said", "We", "How to", "There is", "One day")


def openings(encoder: ExampleEncoder, count: int) -> list[tuple[int, ...]]:
    """The tokens of `count` prompts: everyday questions in chat form, else beginnings of texts.

    There are none without a tokenizer. They come again when there are more to make.
    """
    if encoder.tokenizer is None:
        return []
    chats = _chats(encoder)
    prompts = chats or [tuple(encoder.tokenizer.encode(beginning)) for beginning in BEGINNINGS]
    return list(islice(cycle(each for each in prompts if each), count)) if any(prompts) else []


def _chats(encoder: ExampleEncoder) -> list[tuple[int, ...]]:
    """Empty where the model has no chat template, or one that does not take a lone question."""
    if encoder.chat_template is None or encoder.tokenizer is None:
        return []
    try:
        texts = [encoder.chat_template.render([{"role": "user", "content": each}]) for each in QUESTIONS]
    except ChatTemplateError:
        return []
    return [tuple(encoder.tokenizer.encode_part(text)) for text in texts]
