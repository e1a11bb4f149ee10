"""The table of who may send and hear what, against the protocol and the file that is shipped."""

from pathlib import Path

import pytest

from shared import subjects
from shared.bus.permissions import RULES, USERS, Role, User, permissions_of, users_config
from shared.subjects import RequestTopic, Topic

SHIPPED = Path(__file__).parents[3] / "deploy" / "nats" / "users.conf"


def test_every_subject_of_the_protocol_has_one_rule() -> None:
    topics = [topic for topic in vars(subjects).values() if isinstance(topic, Topic | RequestTopic)]
    assert sorted(rule.topic.pattern for rule in RULES) == sorted(topic.pattern for topic in topics)


def test_the_shipped_configuration_is_that_of_the_code() -> None:
    assert SHIPPED.read_text() == users_config()


@pytest.mark.parametrize("user", USERS, ids=lambda user: user.name)
def test_nobody_may_send_nothing_or_everything(user: User) -> None:
    """An empty list of what may be sent would allow everything."""
    allowed = permissions_of(user)
    assert allowed.send
    assert [each for each in (*allowed.send, *allowed.hear) if each.split(".")[0] in ("*", ">")] == []


def test_two_gateways_hear_their_own_tokens_only() -> None:
    users = (*USERS, User("second", Role.GATEWAY))
    heard = {user.name: set(permissions_of(user, users).hear) for user in users if user.role is Role.GATEWAY}
    assert heard["gateway"] & heard["second"] == set()
    assert "lemix.gateway.second.*.tokens" in heard["second"]
