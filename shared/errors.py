"""The one exception tree. Users' mistakes raise these; asserts are for invariants."""


class LemixError(Exception):
    """Root of every error that LeMix raises on purpose."""


class ConfigurationError(LemixError):
    """A setting or an argument is wrong; the message names it and its value."""


class UnsupportedModelError(LemixError):
    """The model cannot be split into pipeline stages; the message says why."""


class ChatTemplateError(LemixError):
    """The model's chat template refuses a conversation; the message says why, for the person who sent it."""


class RewrittenTurnsError(ChatTemplateError):
    """The template renders earlier turns otherwise once later ones follow."""


class InvalidBatchError(LemixError):
    """A training batch cannot be used; the message is the reason given to its publisher."""


class UnsupportedSchemaError(LemixError):
    """No text can be held to a JSON Schema; the message is the reason given to whoever asked for it."""


class CarrierError(LemixError):
    """A tensor could not be handed from one stage to the next."""


class StaleTensorError(CarrierError):
    """A handle outlived its tensor: the sender is gone, or was restarted since."""


class PeerLostError(CarrierError):
    """Another member of a collective group is gone, silent for too long, or never came."""


class IterationLostError(LemixError):
    """A stage cannot run an iteration; only the sequences in it are lost."""


class UnknownSequenceError(IterationLostError):
    """A stage is to go on with a sequence whose beginning never came to it."""


class VersionGoneError(IterationLostError):
    """A stage no longer holds the weights version that it is asked to run."""


class BusError(LemixError):
    """Root of what can go wrong between two services."""


class MalformedMessageError(BusError):
    """A message's bytes are not what its subject promises."""


class MessageTooLargeError(BusError):
    """A message is larger than the bus carries; raised at the sender, before sending."""


class NoResponderError(BusError):
    """Nobody listens on the subject of a request."""


class BusTimeoutError(BusError):
    """A request was not answered within its deadline."""


class NotAllowedError(BusError):
    """The server lets this process not in, or not send or hear this; the message names the user."""


class RefusedError(BusError):
    """The other side answered with a refusal.

    Raise it in a responder to refuse; `request` raises it again at the asking side.
    `code` is an HTTP status: it ends up in front of a person. `retry_after_s`: when asking again makes
    sense; None: nobody knows.
    """

    def __init__(self, reason: str, *, code: int = 503, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = code
        self.retry_after_s = retry_after_s
