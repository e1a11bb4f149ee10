"""Run the gateway: python -m services.gateway"""

import asyncio

from services.gateway.app import build_app
from services.gateway.completions import Toolbox
from services.gateway.metrics import Metrics
from services.gateway.server import listen, serve
from services.gateway.service import Gateway
from services.gateway.settings import GatewaySettings
from shared.lifecycle import World, load_settings, run_service
from shared.model_files import CONFIG_FILES, TOKENIZER_FILES, ModelCard, name_of, read_card, resolve
from shared.text import TextTokenizer


def load_model(model: str) -> tuple[ModelCard, TextTokenizer]:
    """Card and tokenizer of `model`. Raises ConfigurationError or UnsupportedModelError."""
    folder = resolve(model, CONFIG_FILES + TOKENIZER_FILES)
    return read_card(folder, name_of(model)), TextTokenizer.load(folder)


async def run(world: World, settings: GatewaySettings) -> None:
    """Serve HTTP until cancelled."""
    card, tokenizer = await asyncio.to_thread(load_model, settings.model)
    gateway = Gateway(
        bus=world.bus,
        clock=world.clock,
        ids=world.ids,
        telemetry=world.telemetry,
        request_timeout_s=settings.request_timeout_s,
    )
    tools = Toolbox(
        gateway=gateway,
        tokenizer=tokenizer,
        card=card,
        settings=settings,
        clock=world.clock,
        ids=world.ids,
        metrics=Metrics(),
        telemetry=world.telemetry,
    )
    listener = listen(settings.host, settings.port)
    async with gateway.running():
        await serve(build_app(tools), listener, before_end=gateway.end_sessions)


if __name__ == "__main__":
    settings = load_settings(GatewaySettings)
    run_service("gateway", settings, lambda world: run(world, settings))
