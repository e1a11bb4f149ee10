"""`lemix up`: a cluster on this machine until Ctrl-C."""

import json
import shlex

from rich.console import Console

from lemix.launcher import LocalCluster
from lemix.topology import ClusterOptions
from services.gateway.access.exposure import is_loopback
from shared.clock import Clock
from shared.model_files import name_of
from shared.settings import LemixSettings, read_settings

EXAMPLE_PROMPT = "The function returns"


async def run_up(options: ClusterOptions, console: Console, clock: Clock) -> None:
    """Start the cluster, say how to reach it, and wait; ends only with an error or by cancellation."""

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    began_s = clock.now_s()
    say(f"starting {options.nodes} nodes x {options.stages} stages (logs in {options.run_dir / 'logs'})")
    async with LocalCluster(options, on_event=say) as cluster:
        model = name_of(options.model or read_settings(LemixSettings).model)
        say(f"LeMix serves {model} at {cluster.api_url} (ready after {clock.now_s() - began_s:.1f} s)")
        say(access_line(options, has_keys=cluster.has_keys))
        say(f"try:  {curl_line(cluster.api_url, model, with_key=cluster.has_keys)}")
        say(f"train it:  lemix train publish FILE.jsonl  (NATS is at {cluster.nats_url})")
        say("Ctrl-C stops everything.")
        await cluster.wait_failed()


def access_line(options: ClusterOptions, *, has_keys: bool) -> str:
    """Who may use the API."""
    if has_keys:
        return "clients need a key (make one: lemix keys create --name NAME --scope infer)"
    if is_loopback(options.host):
        return "no keys: only programs of this machine are answered (lemix keys create makes the first key)"
    return f"INSECURE: no keys, so whoever reaches {options.host} may use and train the model"


def curl_line(api_url: str, model: str, *, with_key: bool) -> str:
    """A shell command that asks for a completion; with a key it reads LEMIX_API_KEY."""
    body = json.dumps({"model": model, "prompt": EXAMPLE_PROMPT, "max_tokens": 32})
    key = ' -H "Authorization: Bearer $LEMIX_API_KEY"' if with_key else ""
    json_type = "-H 'Content-Type: application/json'"
    return f"curl {shlex.quote(api_url + '/v1/completions')}{key} {json_type} -d {shlex.quote(body)}"
