"""An adapter learns where all weights would not fit, unless somebody has chosen."""

from lemix.adapter_choice import memory_bytes, with_suitable_adapter
from lemix.topology import ClusterOptions
from shared.messages.training import AdapterKind

GB = 10**9


def chosen(
    memory: int | None = 24 * GB,
    inherited: dict[str, str] | None = None,
    num_weights: int | None = GB,
    trained: AdapterKind | None = None,
    **options: object,
) -> tuple[str | None, str]:
    """For a model of a billion weights unless told otherwise, and devices of that size."""
    given = ClusterOptions(**{"nodes": 1, "stages": 1, **options})  # type: ignore[arg-type]
    found, why = with_suitable_adapter(given, inherited or {}, num_weights, lambda device: memory, trained)
    return found.extra_env.get("LEMIX_ADAPTER"), why


def test_an_adapter_learns_where_all_weights_do_not_fit() -> None:
    adapter, why = chosen()
    assert adapter == "lora"
    assert "about 52.0 of 24.0 GB of cpu" in why and "LEMIX_ADAPTER=none" in why


def test_all_weights_learn_where_they_fit() -> None:
    assert chosen(64 * GB) == (None, "")
    assert chosen(num_weights=135_000_000) == (None, "")


def test_whoever_has_chosen_is_obeyed() -> None:
    assert chosen(inherited={"LEMIX_ADAPTER": "none"}) == (None, "")
    assert chosen(extra_env={"LEMIX_ADAPTER": "none"})[1] == ""


def test_nodes_on_one_device_add_up_and_stages_on_several_share() -> None:
    gpu = {"devices": ("cuda:0",)}
    assert chosen(40 * GB, **gpu) == (None, "")  # 28 bytes a weight
    assert chosen(40 * GB, nodes=2, **gpu)[0] == "lora"
    assert chosen(16 * GB, stages=2, devices=("cuda:0", "cuda:1"))[0] is None
    assert chosen(35 * GB, inherited={"LEMIX_DTYPE": "float32"}, **gpu)[0] == "lora"


def test_a_run_goes_on_with_what_has_learnt_before() -> None:
    assert chosen(trained="") == (None, "")
    assert chosen(64 * GB, trained="lora") == ("lora", "a LoRA adapter trains, as before")


def test_unknown_sizes_and_emulated_devices_choose_nothing() -> None:
    assert chosen(memory=None) == chosen(num_weights=None) == (None, "")
    assert chosen(emulate="llama2-7b@a100") == (None, "")


def test_the_memory_of_this_machine_is_known_and_that_of_no_gpu_is_not() -> None:
    assert (memory_bytes("cpu") or 0) > GB // 2
    assert memory_bytes("cuda:1000") is None
