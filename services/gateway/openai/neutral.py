"""Parameters of OpenAI's and vLLM's that are accepted only where they change nothing.

A field's type is all that it accepts; any other value is refused, naming it. What is in no model is refused
whatever its value.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from services.gateway.openai.schema import RequestModel, Whole, at_most

Empty = Annotated[list[Any], Field(max_length=0)]
One = Annotated[float, Field(ge=1, le=1)]
MAX_METADATA = 16
Metadata = Annotated[dict[str, str], Field(max_length=MAX_METADATA), at_most(MAX_METADATA)]


class NeutralParameters(RequestModel):
    """Those of all routes that generate."""

    # Who asks, and what for: nothing is done with it.
    user: str = ""
    safety_identifier: str = ""
    prompt_cache_key: str = ""
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] = "in_memory"
    metadata: Metadata = Field(default_factory=dict)

    # vLLM's
    use_beam_search: Literal[False] = False
    length_penalty: One = 1.0
    include_stop_str_in_output: Literal[False] = False
    skip_special_tokens: Literal[True] = True
    spaces_between_special_tokens: bool = True
    allowed_token_ids: Empty = Field(default_factory=list)
    bad_words: Empty = Field(default_factory=list)
    logits_processors: Empty = Field(default_factory=list)
    truncate_prompt_tokens: None = None
    prompt_logprobs: None = None
    priority: Whole = Field(default=0, ge=0, le=0)
    return_token_ids: Literal[False] = False
    return_tokens_as_token_ids: Literal[False] = False


class NeutralCompletionParameters(NeutralParameters):
    """Those of completions."""

    suffix: Literal[""] = ""
    add_special_tokens: Literal[True] = True


class NeutralChatParameters(NeutralParameters):
    """Those of chat completions."""

    # OpenAI's
    audio: None = None
    functions: Empty = Field(default_factory=list)
    function_call: Literal["none", "auto"] = "none"
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] = ["text"]  # noqa: RUF012
    moderation: None = None
    prediction: None = None
    reasoning_effort: Literal["none"] = "none"
    verbosity: Literal["medium"] = "medium"
    web_search_options: None = None

    # vLLM's
    echo: Literal[False] = False
    add_special_tokens: Literal[False] = False
    add_generation_prompt: Literal[True] = True
    continue_final_message: Literal[False] = False
    chat_template: None = None
    documents: Empty = Field(default_factory=list)
    include_reasoning: Literal[True] = True
