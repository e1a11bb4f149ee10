"""A chat as it is remembered, if its client asked for that (`store`)."""

from collections.abc import Sequence

from services.gateway.context import GatewayContext
from services.gateway.feedback.answers import Json, StoredAnswer, as_trained
from services.gateway.feedback.recording import Recorder
from services.gateway.feedback.service import Feedback
from services.gateway.generation import Caller
from services.gateway.openai.chat.answer import choice_of, reader_of
from services.gateway.openai.chat.messages import for_template
from services.gateway.openai.chat.request import ChatRequest
from services.gateway.openai.schema import invalid
from services.gateway.text.detokenise import Piece


def chat_recorder(
    asked: ChatRequest,
    answer_id: str,
    *,
    store: bool,
    caller: Caller,
    context: GatewayContext,
    feedback: Feedback,
) -> Recorder | None:
    """The collector of the answer to a chat; None: it is not to be remembered (`store`).

    Raises ApiError (400) when it is, and cannot be.
    """
    if not store:
        return None
    feedback.check_is_on()
    if asked.chat_template_kwargs:
        raise invalid("store", "not together with 'chat_template_kwargs', which training does not know")
    begun = StoredAnswer(
        id=answer_id,
        key_id=caller.key.id if caller.key else "",
        created_at=int(context.clock.wall_s()),
        model=context.card.name,
        messages=as_trained([for_template(message) for message in asked.messages]),
        tools=tuple(tool.model_dump(exclude_unset=True) for tool in asked.tools if asked.may_call_tools),
    )

    def message_of(pieces: Sequence[Piece]) -> Json:
        reader = reader_of(asked, context.ids)
        choice = choice_of(0, pieces, reader, context.tokenizer, with_logprobs=False)
        (message,) = as_trained([choice["message"]])  # type: ignore[list-item]
        return message

    return Recorder(begun, message_of, feedback.keep)
