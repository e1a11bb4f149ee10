"""What `lemix up` says and refuses before anything runs."""

import shlex
from pathlib import Path

import pytest

from lemix.launcher import LocalCluster
from lemix.topology import ClusterOptions
from lemix.up import access_line, curl_line, how_it_trains
from shared.errors import ConfigurationError


async def test_an_open_address_without_keys_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LEMIX_KEYS_FILE", raising=False)
    cluster = LocalCluster(ClusterOptions(runs_dir=tmp_path, host="0.0.0.0"))
    with pytest.raises(ConfigurationError, match=r"'0\.0\.0\.0'.*--insecure"):
        await cluster.start()
    assert not any(tmp_path.iterdir())  # noqa: ASYNC240  # nothing else runs here


@pytest.mark.parametrize(
    ("host", "has_keys", "told"),
    [
        ("127.0.0.1", False, "only programs of this machine"),
        ("::1", False, "only programs of this machine"),
        ("0.0.0.0", True, "clients need a key"),
        ("0.0.0.0", False, "INSECURE"),
    ],
)
def test_the_start_says_who_is_let_in(host: str, has_keys: bool, told: str) -> None:
    assert told in access_line(ClusterOptions(host=host, insecure=True), has_keys=has_keys)


def test_the_example_can_be_pasted_into_a_shell() -> None:
    line = shlex.split(curl_line("http://[::1]:8000", "tiny", with_key=True))
    assert line[:4] == [
        "curl",
        "http://[::1]:8000/v1/completions",
        "-H",
        "Authorization: Bearer $LEMIX_API_KEY",
    ]


def test_the_start_says_how_the_run_trains() -> None:
    options = ClusterOptions(extra_env={"LEMIX_LEARNING_RATE": "0.01"})
    assert how_it_trains(options, {"LEMIX_GUARD_SAMPLES": "4"}).startswith(
        "training: all weights, learning rate 1.0e-02, gradients clipped to 1, checkpoints of at "
    )
