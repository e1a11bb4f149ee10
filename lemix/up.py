"""`lemix up`: a cluster on this machine until Ctrl-C."""

import json
import shlex

from rich.console import Console

from lemix.client import served_model
from lemix.launcher import LocalCluster
from lemix.topology import ClusterOptions
from shared.clock import Clock

EXAMPLE_PROMPT = "The function returns"


async def run_up(options: ClusterOptions, console: Console, clock: Clock) -> None:
    """Start the cluster, say how to reach it, and wait; ends only with an error or by cancellation."""

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    began_s = clock.now_s()
    say(f"starting {options.nodes} nodes x {options.stages} stages (logs in {options.run_dir / 'logs'})")
    async with LocalCluster(options, on_event=say) as cluster:
        model = await served_model(cluster.api_url)
        say(f"LeMix serves {model} at {cluster.api_url} (ready after {clock.now_s() - began_s:.1f} s)")
        say(f"try:  {curl_line(cluster.api_url, model)}")
        say(f"train it:  lemix train publish FILE.jsonl  (NATS is at {cluster.nats_url})")
        say("Ctrl-C stops everything.")
        await cluster.wait_failed()


def curl_line(api_url: str, model: str) -> str:
    """A shell command that asks for a completion."""
    body = json.dumps({"model": model, "prompt": EXAMPLE_PROMPT, "max_tokens": 32})
    return f"curl {api_url}/v1/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"
