"""`lemix up`: a cluster on this machine until Ctrl-C."""

import asyncio
import json
import os
import shlex
from collections.abc import Mapping

from rich.console import Console

from lemix.devices import num_cpu_cores
from lemix.launcher import LocalCluster
from lemix.preflight import environments
from lemix.topology import ClusterOptions, layout_of
from services.gateway.access.exposure import is_loopback
from services.trainer.defaults import training_line, with_defaults
from services.trainer.settings import TrainerSettings
from shared.chat_template_files import load_chat_template
from shared.clock import Clock
from shared.model_files import CONFIG_FILES, TOKENIZER_FILES, name_of, resolve
from shared.settings import LemixSettings, read_settings

EXAMPLE_PROMPT = "What is the capital of France?"


async def run_up(options: ClusterOptions, console: Console, clock: Clock, *, why_adapter: str = "") -> None:
    """Start the cluster, say how to reach it, and wait; ends only with an error or by cancellation.

    `why_adapter`: why an adapter trains although nobody asked for one.
    """

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    began_s = clock.now_s()
    say(
        f"starting nodes: {options.nodes}, stages of each: {options.stages}; logs: {options.run_dir / 'logs'}"
    )
    say(layout_of(options, num_cpu_cores()).line)
    if why_adapter:
        say(why_adapter)
    say(await asyncio.to_thread(how_it_trains, options, os.environ))
    async with LocalCluster(options, on_event=say) as cluster:
        settings = read_settings(LemixSettings)
        model = options.model or settings.model
        can_chat = await asyncio.to_thread(has_chat_template, model, settings, clock)
        body = example_body(name_of(model), can_chat=can_chat)
        took_s = clock.now_s() - began_s
        say(f"LeMix serves {name_of(model)} at {cluster.api_url} (ready after {took_s:.1f} s)")
        say(access_line(options, has_keys=cluster.has_keys))
        say(f"try:  {curl_line(cluster.api_url, body, with_key=cluster.has_keys)}")
        say(f"train it:  lemix train publish FILE.jsonl  (NATS is at {cluster.nats_url})")
        say("Ctrl-C stops everything.")
        await cluster.wait_failed()


def how_it_trains(options: ClusterOptions, inherited: Mapping[str, str]) -> str:
    """The learning rate and what else is chosen for the run's model. Blocks; raises ConfigurationError."""
    settings = read_settings(TrainerSettings, environments(options, inherited)["trainer"])
    return training_line(with_defaults(settings, resolve(settings.model, CONFIG_FILES)))


def access_line(options: ClusterOptions, *, has_keys: bool) -> str:
    """Who may use the API."""
    if has_keys:
        return "clients need a key (make one: lemix keys create --name NAME --scope infer)"
    if is_loopback(options.host):
        return "no keys: only programs of this machine are answered (lemix keys create makes the first key)"
    return f"INSECURE: no keys, so whoever reaches {options.host} may use and train the model"


def has_chat_template(model: str, settings: LemixSettings, clock: Clock) -> bool:
    """Whether the served model chats. Raises ConfigurationError when its files cannot be read."""
    folder = resolve(model, TOKENIZER_FILES)
    return load_chat_template(folder, clock, chosen=settings.chat_template) is not None


def example_body(model: str, *, can_chat: bool) -> dict[str, object]:
    """A request that this model can answer: a chat, or a completion where it has no chat template."""
    asked = (
        {"messages": [{"role": "user", "content": EXAMPLE_PROMPT}]}
        if can_chat
        else {"prompt": EXAMPLE_PROMPT}
    )
    return {"model": model, **asked, "max_tokens": 32}


def curl_line(api_url: str, body: dict[str, object], *, with_key: bool) -> str:
    """A shell command that sends the request; with a key it reads LEMIX_API_KEY."""
    route = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    key = ' -H "Authorization: Bearer $LEMIX_API_KEY"' if with_key else ""
    json_type = "-H 'Content-Type: application/json'"
    return f"curl {shlex.quote(api_url + route)}{key} {json_type} -d {shlex.quote(json.dumps(body))}"
