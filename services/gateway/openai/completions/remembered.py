"""A completion as it is remembered, if its client asked for that (`store`)."""

from services.gateway.context import GatewayContext
from services.gateway.feedback.answers import StoredAnswer
from services.gateway.feedback.recording import Recorder
from services.gateway.feedback.service import Feedback
from services.gateway.generation import Caller
from services.gateway.openai.completions.request import CompletionRequest
from services.gateway.openai.schema import invalid


def completion_recorder(
    asked: CompletionRequest,
    answer_id: str,
    *,
    caller: Caller,
    context: GatewayContext,
    feedback: Feedback,
) -> Recorder | None:
    """The collector of the answer to a completion request; None: it is not to be remembered (`store`).

    Raises ApiError (400) when it is, and cannot be.
    """
    if not asked.store:
        return None
    feedback.check_is_on()
    if asked.echo:
        raise invalid("store", "not together with 'echo'")
    if not all(isinstance(prompt, str) for prompt in asked.prompt):
        raise invalid("store", "only with prompts that are texts")
    begun = StoredAnswer(
        id=answer_id,
        key_id=caller.key.id if caller.key else "",
        created_at=int(context.clock.wall_s()),
        model=context.card.name,
        prompts=tuple(str(prompt) for prompt in asked.prompt for _ in range(asked.n)),
    )
    return Recorder(
        begun,
        lambda pieces: {"role": "assistant", "content": "".join(piece.text for piece in pieces)},
        feedback.keep,
    )
