"""The objects that the gateway's routes share, put together once at start."""

from collections.abc import Callable
from dataclasses import dataclass

from services.gateway.cluster_client import ClusterClient
from services.gateway.health import HealthProbe
from services.gateway.metrics import Metrics
from services.gateway.record import FirstTokens
from services.gateway.settings import GatewaySettings
from services.gateway.text.threads import TextThreads
from shared.chat_template import ChatTemplate
from shared.clock import Clock, IdSource
from shared.model_files import ModelCard
from shared.telemetry import Telemetry
from shared.text import TextTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayContext:
    """The objects that every route of the gateway works with."""

    cluster: ClusterClient
    tokenizer: TextTokenizer
    text_threads: TextThreads
    chat_template: ChatTemplate | None
    """None: the model has none."""
    card: ModelCard
    settings: GatewaySettings
    clock: Clock
    ids: IdSource
    metrics: Metrics
    telemetry: Telemetry
    probe: HealthProbe
    on_first_tokens: Callable[[FirstTokens], None]
    """Is told when a request has its first tokens."""
