"""The assistant's words are learnt, and nothing else: as transformers marks them, for ten forms of templates.

Texts are compared, not tokens: transformers tokenises a conversation as a whole, and here each prompt is
tokenised by itself, as at inference.
"""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from shared.chat_template import ChatTemplate
from shared.clock import SystemClock
from shared.encoding import ExampleEncoder
from shared.examples import Conversation
from shared.model_files import read_card
from shared.settings import EMBEDDED_MODEL
from shared.text import TextTokenizer

FOLDER = Path(EMBEDDED_MODEL)
TOKENIZER = AutoTokenizer.from_pretrained(FOLDER)

# Each writes what the assistant says, with the mark that ends it, between the marks for trainers.
SAYS = "{% generation %}{{ m['content'] + END }}{% endgeneration %}"


def form(turn: str, answer: str, prompt: str, *, head: str = "", end: str) -> str:
    """A template: `turn` of others, `answer` of the assistant (with SAYS), `prompt` before it speaks."""
    return (
        f"{{%- set END = '{end}' %}}{head}"
        "{%- for m in messages %}"
        f"{{%- if m['role'] == 'assistant' %}}{answer.replace('SAYS', SAYS)}{{%- else %}}{turn}{{%- endif %}}"
        "{%- endfor %}"
        f"{{%- if add_generation_prompt %}}{prompt}{{%- endif %}}"
    )


FORMS = {
    "chatml": form(
        "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}",
        "{{ '<|im_start|>assistant\\n' }}SAYS",
        "{{ '<|im_start|>assistant\\n' }}",
        end="<|im_end|>\\n",
    ),
    "llama-3": form(
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ m['content'] + '<|eot_id|>' }}",
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}SAYS",
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}",
        head="{{ '<|begin_of_text|>' }}",
        end="<|eot_id|>",
    ),
    "llama-2": form("{{ '<s>[INST] ' + m['content'] + ' [/INST]' }}", "SAYS", "", end=" </s>"),
    "mistral": form("{{ '[INST]' + m['content'] + '[/INST]' }}", "SAYS", "", head="{{ '<s>' }}", end="</s>"),
    "gemma": form(
        "{{ '<start_of_turn>' + m['role'] + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}",
        "{{ '<start_of_turn>model\\n' }}SAYS",
        "{{ '<start_of_turn>model\\n' }}",
        head="{{ '<bos>' }}",
        end="<end_of_turn>\\n",
    ),
    "phi-3": form(
        "{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}",
        "{{ '<|assistant|>\\n' }}SAYS",
        "{{ '<|assistant|>\\n' }}",
        end="<|end|>\\n",
    ),
    "zephyr": form(
        "{{ '<|' + m['role'] + '|>\\n' + m['content'] + '</s>\\n' }}",
        "{{ '<|assistant|>\\n' }}SAYS",
        "{{ '<|assistant|>\\n' }}",
        end="</s>\\n",
    ),
    "vicuna": form(
        "{{ m['role'] | upper + ': ' + m['content'] + ' ' }}",
        "{{ 'ASSISTANT:' }}SAYS",
        "{{ 'ASSISTANT:' }}",
        end="</s>",
    ),
    "alpaca": form(
        "{{ '### Instruction:\\n' + m['content'] + '\\n\\n' }}",
        "{{ '### Response:\\n' }}SAYS",
        "{{ '### Response:\\n' }}",
        end="\\n\\n",
    ),
    "command-r": form(
        "{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + m['content'] + '<|END_OF_TURN_TOKEN|>' }}",
        "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}SAYS",
        "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}",
        end="<|END_OF_TURN_TOKEN|>",
    ),
}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one answer": [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "There."}],
    "several, after a system message": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who wrote it?"},
        {"role": "assistant", "content": "Nobody knows."},
        {"role": "user", "content": "Naïve <b>question</b>: why?"},
        {"role": "assistant", "content": "It was long ago.\nVery long."},
    ],
}


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("source", FORMS.values(), ids=FORMS)
def test_labels_are_those_that_transformers_marks(source: str, chat: list[dict[str, Any]]) -> None:
    marked: Any = TOKENIZER.apply_chat_template(
        chat, chat_template=source, return_dict=True, return_assistant_tokens_mask=True
    )
    encoder = ExampleEncoder(
        card=read_card(FOLDER, "m"),
        max_tokens=512,
        tokenizer=TextTokenizer.load(FOLDER),
        chat_template=ChatTemplate({"default": source}, {}, SystemClock()),
    )
    encoded = encoder.encode(Conversation.model_validate({"messages": chat}))
    masked = zip(marked["input_ids"], marked["assistant_masks"], strict=True)
    said = [token for token, is_said in masked if is_said]
    assert TOKENIZER.decode(encoded.tokens) == TOKENIZER.decode(marked["input_ids"])
    assert TOKENIZER.decode(encoded.labels) == TOKENIZER.decode(said) != ""
