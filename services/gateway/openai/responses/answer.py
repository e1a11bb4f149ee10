"""The answer of the Responses API, and the events that tell of its growth."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, Field
from pydantic_core import to_json

from services.gateway.generation import Usage, Versions
from services.gateway.http.errors import ApiError
from services.gateway.openai.answers import Json, fingerprint
from services.gateway.openai.chat.answer import ChoiceReader
from services.gateway.openai.objective import ServiceTier
from services.gateway.openai.responses.items import Status
from services.gateway.openai.tool_calls import TextDelta, ToolCallDelta
from services.gateway.text.detokenise import Piece, TokenEntry

_STATUS: Mapping[bool, Literal["completed", "incomplete"]] = {False: "completed", True: "incomplete"}
"""Whether the answer is cut, in OpenAI's words."""


class OutputText(BaseModel):
    """The text of a message."""

    type: Literal["output_text"] = "output_text"
    text: str = ""
    annotations: list[Json] = Field(default_factory=list)
    logprobs: list[Json] = Field(default_factory=list)


class OutputMessage(BaseModel):
    """The model's message."""

    type: Literal["message"] = "message"
    id: str
    role: Literal["assistant"] = "assistant"
    status: Status = "in_progress"
    content: list[OutputText] = Field(default_factory=list)


class OutputCall(BaseModel):
    """A function that the model wants to be called."""

    type: Literal["function_call"] = "function_call"
    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: Status = "in_progress"


OutputItem = OutputMessage | OutputCall


class InputTokensDetails(BaseModel):
    """Tokens that a node had in its KV cache, from other requests; nobody pays for writing there."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputTokensDetails(BaseModel):
    """Thoughts are part of the text."""

    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    """OpenAI's count of tokens."""

    input_tokens: int
    input_tokens_details: InputTokensDetails = InputTokensDetails()
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int


class ResponseError(BaseModel):
    """Why there is no answer."""

    code: Literal["server_error"] = "server_error"
    message: str


class IncompleteDetails(BaseModel):
    """Why the answer is cut off."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseObject(BaseModel):
    """The answer of POST /v1/responses."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    """Seconds since the Unix epoch."""
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    system_fingerprint: str | None = None
    """The weights that made the first and the last token: `weights-3-5`; None while there are none."""
    output: list[OutputItem] = Field(default_factory=list)
    usage: ResponseUsage | None = None

    # As they were asked for.
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    service_tier: ServiceTier
    """The one that was used: `flex` for those of the class `batch`."""
    store: bool
    temperature: float
    text: Json
    tool_choice: str | Json
    tools: list[Json]
    top_logprobs: int
    top_p: float

    # The same for all.
    background: Literal[False] = False
    previous_response_id: None = None
    reasoning: dict[str, None] = Field(default_factory=lambda: {"effort": None, "summary": None})
    truncation: Literal["disabled"] = "disabled"
    user: None = None


class ResponseEvents:
    """Makes a response from the pieces of its text, and the events by which a stream tells of its growth."""

    def __init__(
        self,
        response: ResponseObject,
        new_id: Callable[[str], str],
        *,
        reader: ChoiceReader,
        logprobs_of: Callable[[Sequence[TokenEntry]], list[Json]],
    ) -> None:
        """`response`: without output."""
        self.response = response
        self._new_id = new_id
        self._reader = reader
        self._logprobs_of = logprobs_of
        self._told = b""
        self._num_told = 0
        self._message: OutputMessage | None = None
        """The message that is being written; it is the last item."""
        self._entries: list[TokenEntry] = []
        """Tokens whose text is not written yet."""
        self._is_cut = False

    def opening(self, versions: Versions | None) -> bytes:
        """Events before the first piece."""
        self._tell("response.created", response=self.response)
        self._tell("response.in_progress", response=self.response)
        return self._take_told()

    def piece(self, index: int, piece: Piece, versions: Versions | None) -> bytes:
        """Events of one piece; there is but one sequence."""
        self._entries.extend(piece.entries)
        deltas, finish = self._reader.read(piece)
        for delta in deltas:
            match delta:
                case TextDelta():
                    self._write(delta.text)
                case ToolCallDelta():
                    self._end_message("completed")
                    self._write_call(delta)
        self._is_cut = finish == "length"
        return self._take_told()

    def ending(self, versions: Versions | None, usage: Usage) -> bytes:
        """Events after the last piece; the response is whole then."""
        response, status = self.response, _STATUS[self._is_cut]
        if not response.output:
            self._begin_message()
        self._end_message(status)
        response.status = status
        response.system_fingerprint = fingerprint(versions)
        response.incomplete_details = IncompleteDetails() if self._is_cut else None
        response.usage = ResponseUsage(
            input_tokens=usage.num_prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=usage.num_cached_tokens),
            output_tokens=usage.num_generated_tokens,
            total_tokens=usage.num_prompt_tokens + usage.num_generated_tokens,
        )
        self._tell(f"response.{status}", response=response)
        return self._take_told()

    def failure(self, error: ApiError) -> bytes:
        """The event of an answer that stays incomplete."""
        self.response.status = "failed"
        self.response.error = ResponseError(message=error.message)
        self._tell("response.failed", response=self.response)
        return self._take_told()

    def _write(self, text: str) -> None:
        part = (self._message or self._begin_message()).content[0]
        logprobs = self._logprobs_of(self._entries)
        self._entries.clear()
        part.text += text
        part.logprobs += logprobs
        self._tell_of_part("response.output_text.delta", delta=text, logprobs=logprobs)

    def _begin_message(self) -> OutputMessage:
        self._message = message = OutputMessage(id=self._new_id("msg"))
        self._begin_item(message)
        message.content.append(OutputText())
        self._tell_of_part("response.content_part.added", part=message.content[0])
        return message

    def _end_message(self, status: Status) -> None:
        if self._message is None:
            return
        part = self._message.content[0]
        self._tell_of_part("response.output_text.done", text=part.text, logprobs=part.logprobs)
        self._tell_of_part("response.content_part.done", part=part)
        self._end_item(self._message, status)
        self._message = None

    def _write_call(self, found: ToolCallDelta) -> None:
        call = OutputCall(id=self._new_id("fc"), call_id=found.id, name=found.name)
        self._begin_item(call)
        call.arguments = found.arguments
        self._tell_of_item("response.function_call_arguments.delta", delta=call.arguments)
        self._tell_of_item("response.function_call_arguments.done", name=call.name, arguments=call.arguments)
        self._end_item(call, "completed")

    def _begin_item(self, item: OutputItem) -> None:
        self.response.output.append(item)
        self._tell("response.output_item.added", output_index=len(self.response.output) - 1, item=item)

    def _end_item(self, item: OutputItem, status: Status) -> None:
        item.status = status
        self._tell("response.output_item.done", output_index=len(self.response.output) - 1, item=item)

    def _tell_of_part(self, kind: str, **fields: object) -> None:
        self._tell_of_item(kind, content_index=0, **fields)

    def _tell_of_item(self, kind: str, **fields: object) -> None:
        """Write an event about the last item."""
        place = len(self.response.output) - 1
        self._tell(kind, item_id=self.response.output[place].id, output_index=place, **fields)

    def _tell(self, kind: str, **fields: object) -> None:
        content = to_json({"type": kind, "sequence_number": self._num_told, **fields})
        self._told += b"event: " + kind.encode() + b"\ndata: " + content + b"\n\n"
        self._num_told += 1

    def _take_told(self) -> bytes:
        told, self._told = self._told, b""
        return told
