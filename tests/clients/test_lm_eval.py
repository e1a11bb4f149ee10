"""lm-eval scores the served model through the API as it scores the same folder by its own `hf` model.

The tasks are our own: no hub is asked.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from shared.settings import EMBEDDED_MODEL
from tests.clients.ways import MODEL

Task = dict[str, Any]

TEXTS = [
    "Return the absolute value of a number. The argument may be an integer or a floating-point number.",
    "Open file and return a corresponding file object. If the file cannot be opened, an OSError is raised.",
    "A list is a mutable sequence; strings are immutable. Use append() to add an item to the end of it.",
]
CHOICES = [
    {"question": "The built-in function", "choices": [" open", " returns the", " zebra"], "answer": 0},
    {"question": "If the file cannot be", "choices": [" opened", " blue.", " read, an error"], "answer": 0},
    {"question": "A list is a", "choices": [" banana", " sequence of items", " mutable"], "answer": 2},
]


def rows(examples: list[dict[str, Any]]) -> Any:
    """A data set; what lm-eval brings is imported where it is used, as it takes long."""
    from datasets import Dataset

    return Dataset.from_list(examples)


SCORED: Task = {
    "task": "choice",
    "custom_dataset": lambda **_: {"test": rows(CHOICES)},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
}
ROLLING: Task = {
    "task": "perplexity",
    "custom_dataset": lambda **_: {"test": rows([{"text": text} for text in TEXTS])},
    "test_split": "test",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}
WRITTEN: Task = {
    "task": "written",
    "custom_dataset": lambda **_: {"test": rows([{"text": text} for text in TEXTS])},
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{text[:20]}}",
    "doc_to_target": "{{text}}",
    "generation_kwargs": {
        "until": ["\n\n", ".", ";", "?", "!", "</s>"],
        "max_gen_toks": 24,
        "do_sample": False,
    },
    "metric_list": [{"metric": "exact_match"}],
}


Scored = tuple[dict[str, float], list[Any]]
"""Scores by metric, and all that the model has answered: log-likelihoods, or texts."""


def evaluated(
    kind: str, tasks: list[dict[str, Any]], chat: bool = False, **options: Any
) -> dict[str, Scored]:
    """What lm-eval finds with that kind of model, by task."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    told = lm_eval.simple_evaluate(
        model=kind,
        model_args=options,
        tasks=[dict(task) for task in tasks],
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=chat,
        bootstrap_iters=0,
        log_samples=True,
    )
    assert told is not None
    return {
        name: (
            {metric: value for metric, value in results.items() if isinstance(value, float)},
            list(_flat([sample["resps"] for sample in told["samples"][name]])),
        )
        for name, results in told["results"].items()
    }


def _flat(answers: Any) -> Iterator[Any]:
    if isinstance(answers, list | tuple):
        for each in answers:
            yield from _flat(each)
    else:
        yield answers


def by_transformers(tasks: list[Task], chat: bool = False) -> dict[str, Scored]:
    return evaluated("hf", tasks, chat, pretrained=EMBEDDED_MODEL, dtype="float32", device="cpu")


def test_scores_through_completions_are_those_of_transformers(address: str) -> None:
    tasks = [SCORED, ROLLING, WRITTEN]
    expected = by_transformers(tasks)
    got = evaluated(
        "local-completions",
        tasks,
        model=MODEL,
        base_url=f"{address}/v1/completions",
        tokenizer=EMBEDDED_MODEL,
        tokenizer_backend="huggingface",
        max_length=1024,
        num_concurrent=4,
    )
    for name, (scores, answers) in expected.items():
        assert got[name][0] == pytest.approx(scores, rel=1e-4), name
        assert got[name][1] == pytest.approx(answers, abs=1e-3), name


def test_answers_through_chat_are_those_of_transformers(address: str) -> None:
    got = evaluated(
        "local-chat-completions",
        [WRITTEN],
        chat=True,
        model=MODEL,
        base_url=f"{address}/v1/chat/completions",
        num_concurrent=2,
    )
    assert got == by_transformers([WRITTEN], chat=True)
    assert all(got["written"][1])
