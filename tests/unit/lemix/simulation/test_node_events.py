"""Changes of nodes, as a person writes them."""

import pytest

from lemix.simulation.node_events import NodeEvent, in_order, node_event
from shared.errors import ConfigurationError


@pytest.mark.parametrize(
    ("text", "event"),
    [
        ("60 s: fail 2", NodeEvent(at_s=60, kind="fail", node=2)),
        ("1.5s:leave 10", NodeEvent(at_s=1.5, kind="leave", node=10)),
        ("0: join 4", NodeEvent(at_s=0, kind="join", node=4)),
        ("30 s: slow 3 2.5", NodeEvent(at_s=30, kind="slow", node=3, factor=2.5)),
    ],
)
def test_an_event_is_read(text: str, event: NodeEvent) -> None:
    assert node_event(text) == event


@pytest.mark.parametrize(
    "text",
    ["fail 2", "60 s: explode 2", "60 s: slow 2", "60 s: fail 2 3", "1.2.3 s: fail 2", "6 s: slow 2 0", ""],
)
def test_another_text_is_an_error_that_names_it(text: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        node_event(text)
    assert repr(text) in str(error.value)


def test_events_are_sorted_by_time_and_a_node_may_come_and_go() -> None:
    texts = ["9 s: leave 2", "3 s: fail 1", "5 s: join 1", "7 s: slow 1 2", "1 s: join 2"]
    ordered = in_order(map(node_event, texts), num_nodes=2)
    assert [event.at_s for event in ordered] == [1, 3, 5, 7, 9]


@pytest.mark.parametrize(
    ("texts", "named"),
    [
        (["1 s: join 1"], "node 1 is there already"),
        (["1 s: fail 2"], "node 2 is not there"),
        (["1 s: fail 0", "2 s: slow 0 2"], "'2 s: slow 0': node 0 is not there"),
        (["1 s: leave 0", "2 s: fail 0"], "node 0 is not there"),
    ],
)
def test_what_cannot_happen_is_an_error(texts: list[str], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        in_order(map(node_event, texts), num_nodes=2)
