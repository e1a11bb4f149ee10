"""What is wrong with a run is told before anything is started, in one line that names the value."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lemix.devices import check_devices
from lemix.ports import claim_port
from lemix.preflight import check_start
from lemix.topology import ClusterOptions
from shared.errors import ConfigurationError, LemixError
from shared.model_files import num_layers
from shared.settings import EMBEDDED_MODEL
from tests.support.models import FAMILIES, NUM_LAYERS, save_tiny_model

NUM_EMBEDDED_LAYERS = json.loads((Path(EMBEDDED_MODEL) / "config.json").read_text())["num_hidden_layers"]


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize(
    ("options", "inherited", "fault"),
    [
        ({"devices": ("cpu", "foo")}, {}, "device 'foo' is neither cpu nor cuda:N"),
        ({"devices": ("cuda:64",)}, {}, "device 'cuda:64': "),
        ({}, {"LEMIX_MODEL": "/nope"}, "model '/nope': there is no such folder"),
        ({"model": "/nope"}, {}, "model '/nope': there is no such folder"),
        ({"model": "nobody/nothing"}, {}, "model 'nobody/nothing' is neither a folder here nor a model"),
        ({"model": str(Path(__file__).parent)}, {}, r"cannot read .*config\.json"),
        ({"stages": 99}, {}, f"num_stages=99: a model of {NUM_EMBEDDED_LAYERS} layers can have 1 to"),
        ({"policy": "nope"}, {}, "policy 'nope' is unknown; choose one of: .*lemix"),
        ({"policy": "lemix:x=1"}, {}, "policy 'lemix' has no option 'x'"),
        ({"emulate": "nope"}, {}, "profile 'nope' is neither"),
        ({"name": "a/b"}, {}, "'a/b' is no name of a run: it must be one plain folder name"),
        ({"nats_port": 4222, "nats_url": "nats://x"}, {}, "nats_port=4222 is for a server of the run's own"),
        ({}, {"LEMIX_COSTS": "nope"}, "nope"),
        ({}, {"LEMIX_MAX_BODY_BYTES": "many"}, "LEMIX_MAX_BODY_BYTES: .*'many'"),
        ({}, {"LEMIX_LEARNING_RATE": "fast"}, "LEMIX_LEARNING_RATE: .*'fast'"),
        ({}, {"LEMIX_CHAT_TEMPLATE": "/nope.jinja"}, "LEMIX_CHAT_TEMPLATE: cannot read /nope.jinja"),
        ({}, {"LEMIX_KV_TOKENS": "0"}, "LEMIX_KV_TOKENS: .*'0'"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(
    no_hub: None, options: dict[str, object], inherited: dict[str, str], fault: str
) -> None:
    with pytest.raises(LemixError, match=fault) as refusal:
        check_start(ClusterOptions(**options), inherited)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "options",
    [
        {"stages": NUM_EMBEDDED_LAYERS},
        {"emulate": "llama2-7b@a100", "devices": ("cuda:0",), "stages": 16},
        {"policy": "lemix:comfort=0.5", "nodes": 3},
    ],
)
def test_what_can_start_passes(options: dict[str, object]) -> None:
    check_start(ClusterOptions(**options), {"LEMIX_LEARNING_RATE": "0.5"})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_of_every_family_are_known_from_its_config(family: str, tmp_path: Path) -> None:
    save_tiny_model(family, tmp_path)
    assert num_layers(tmp_path) == NUM_LAYERS


@pytest.mark.parametrize(
    ("torch_version", "count", "fault"),
    [
        ("2.13.0+cpu", 8, r"device 'cuda:1': this PyTorch \(2\.13\.0\+cpu\) was built without CUDA"),
        ("2.13.0", 0, "device 'cuda:1': the NVIDIA driver shows 0 devices here"),
        ("2.13.0+cu128", 1, "device 'cuda:1': the NVIDIA driver shows 1 devices here"),
    ],
)
def test_a_cuda_device_that_is_not_there_is_named(torch_version: str, count: int, fault: str) -> None:
    with pytest.raises(ConfigurationError, match=fault):
        check_devices(["cpu", "cuda:1"], torch_version=torch_version, count=lambda: count)


@pytest.mark.parametrize(
    ("torch_version", "count"), [("2.13.0", 2), ("2.13.0+cu128", 2), ("2.13.0+rocm7", 0)]
)
def test_devices_that_are_there_pass(torch_version: str, count: int) -> None:
    check_devices(["cpu", "cuda", "cuda:1"], torch_version=torch_version, count=lambda: count)


def test_the_check_loads_no_torch() -> None:
    program = "import sys, lemix.preflight, lemix.up; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_port_in_use_is_named_with_the_option_that_chooses_another() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for option in ("--port", "--nats-port"):
            with pytest.raises(ConfigurationError, match=rf":{port}: .* in use; try another {option}"):
                claim_port("127.0.0.1", port, option=option)
