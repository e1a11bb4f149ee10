"""Who may send and hear what on NATS: a user for each role, and the server's configuration that says so.

All that is not allowed here is refused. Whoever is asked something may answer into the inboxes of those who
may ask it, and nowhere else: so nobody has a command sent by naming its subject as the place for an answer.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from shared import subjects as s
from shared.subjects import RequestTopic, Topic

INBOXES = "_INBOX"
KEYS_FILE = "keys/public.conf"
"""The users' public keys, beside the file that has what `users_config` gives."""


class Role(StrEnum):
    """The roles, by the names of their users."""

    GATEWAY = "gateway"
    SCHEDULER = "scheduler"
    STAGE = "stage_worker"
    TRAINER = "trainer"
    INGEST = "ingest"
    """Publishes training batches: `lemix train publish`, and the jobs and the feedback of a gateway."""
    OPERATOR = "operator"
    """The other commands of `lemix`."""


GATEWAY, SCHEDULER, STAGE, TRAINER, INGEST, OPERATOR = Role


@dataclass(frozen=True, slots=True)
class User:
    """A user that the server knows."""

    name: str
    role: Role

    @property
    def inbox_prefix(self) -> str:
        """Answers to this user arrive under it, and nobody else may hear them."""
        return f"{INBOXES}.{self.name}"


@dataclass(frozen=True, slots=True)
class Rule:
    """Who may send the messages of a topic, and who may hear them."""

    topic: Topic[Any] | RequestTopic[Any, Any]
    senders: tuple[Role, ...]
    receivers: tuple[Role, ...]
    enters_node: bool = False
    """From the trainer to stage 0, from stages to those behind it."""


RULES = (
    Rule(s.SUBMIT, (GATEWAY,), (SCHEDULER,)),
    Rule(s.PLACE, (TRAINER,), (SCHEDULER,)),
    Rule(s.ENDED, (STAGE, TRAINER), (SCHEDULER,)),
    # The trainer has nodes write what its guard judges them by.
    Rule(s.ASSIGN, (SCHEDULER, TRAINER), (STAGE,)),
    Rule(s.CANCEL, (GATEWAY, TRAINER), (STAGE,)),
    Rule(s.TOKENS, (STAGE,), (GATEWAY, TRAINER)),
    Rule(s.FAILED, (SCHEDULER, STAGE), (GATEWAY, TRAINER)),
    Rule(s.ITERATION, (STAGE,), (STAGE,)),
    Rule(s.ITERATION_DONE, (STAGE,), (STAGE,)),
    Rule(s.FORWARD, (TRAINER, STAGE), (STAGE,), enters_node=True),
    Rule(s.CHECK, (TRAINER, STAGE), (STAGE,), enters_node=True),
    Rule(s.BACKWARD, (STAGE,), (STAGE,)),
    Rule(s.STEP_AHEAD, (TRAINER,), (STAGE,)),
    Rule(s.STEP, (TRAINER, STAGE), (STAGE,), enters_node=True),
    Rule(s.TRAINED, (STAGE,), (STAGE,)),
    Rule(s.TIED, (STAGE,), (STAGE,)),
    Rule(s.LINK, (STAGE,), (STAGE,)),
    Rule(s.RESTORE, (TRAINER,), (STAGE,)),
    Rule(s.SAVE, (TRAINER,), (STAGE,)),
    Rule(s.MERGE, (TRAINER,), (STAGE,)),
    Rule(s.REDUCE, (TRAINER,), (STAGE,)),
    Rule(s.RENDEZVOUS, (STAGE,), (STAGE,)),
    Rule(s.KEEP, (TRAINER,), (STAGE,)),
    Rule(s.PUBLISH, (TRAINER,), (STAGE,)),
    Rule(s.RELEASE, (TRAINER,), (STAGE,)),
    Rule(s.REPORT, (STAGE,), (TRAINER,)),
    Rule(s.DURABLE_VERSIONS, (OPERATOR,), (TRAINER,)),
    Rule(s.ROLLBACK, (OPERATOR,), (TRAINER,)),
    Rule(s.LINEAGE, (OPERATOR,), (TRAINER,)),
    Rule(s.LINEAGE_ENTRY, (OPERATOR,), (TRAINER,)),
    Rule(s.NODE_WEIGHTS, (GATEWAY, INGEST, OPERATOR), (TRAINER,)),
    Rule(s.TRAIN_PROGRESS, (TRAINER,), (INGEST,)),
    Rule(s.TRAIN_CHECK, (INGEST,), (TRAINER,)),
    Rule(s.TRAIN_STATUS, (INGEST,), (TRAINER,)),
    Rule(s.HEARTBEAT, (STAGE,), (SCHEDULER, TRAINER)),
    Rule(s.NEIGHBOUR, (STAGE,), (STAGE,)),
    Rule(s.PROGRESS, (STAGE,), (SCHEDULER,)),
    Rule(s.STOPPED, (STAGE,), (SCHEDULER,)),
    Rule(s.STATUS, (GATEWAY, INGEST, OPERATOR), (SCHEDULER,)),
)

# By neither a consumer nor a direct get: their answers can be sent to any subject, as they were stored.
_READ_LEASES = f"$JS.API.STREAM.MSG.GET.{s.FENCE_STREAM}"
DURABLE: dict[Role, tuple[str, ...]] = {
    INGEST: (s.BATCHES,),
    TRAINER: (
        s.REJECTED,
        f"$KV.{s.FENCE_BUCKET}.>",
        _READ_LEASES,
        f"$JS.ACK.{s.BATCHES_STREAM}.>",
        *(
            f"$JS.API.STREAM.CREATE.{stream}"
            for stream in (s.BATCHES_STREAM, s.REJECTED_STREAM, s.FENCE_STREAM)
        ),
        *(f"$JS.API.STREAM.INFO.{stream}" for stream in (s.BATCHES_STREAM, s.REJECTED_STREAM)),
        f"$JS.API.STREAM.PURGE.{s.BATCHES_STREAM}",
        f"$JS.API.CONSUMER.LIST.{s.BATCHES_STREAM}",
        *(
            f"$JS.API.CONSUMER.{call}.{s.BATCHES_STREAM}.*"
            for call in ("DURABLE.CREATE", "INFO", "DELETE", "MSG.NEXT")
        ),
    ),
    STAGE: (_READ_LEASES,),
    # As above: by neither a consumer nor a direct get.
    OPERATOR: (f"$JS.API.STREAM.MSG.GET.{s.REJECTED_STREAM}",),
}
"""The durable subjects, and the calls of JetStream, that a role may send."""

USERS = tuple(User(role.value, role) for role in Role)
"""One for each role."""


@dataclass(frozen=True, slots=True)
class Permissions:
    """The subjects that a user may send and hear; `*` is any word of a subject, `>` all that follow."""

    send: tuple[str, ...]
    never_send: tuple[str, ...]
    """Although `send` covers them."""
    hear: tuple[str, ...]


def permissions_of(user: User, users: Sequence[User] = USERS) -> Permissions:
    """The permissions of one of a server's `users`."""
    sent = [rule for rule in RULES if user.role in rule.senders]
    heard = [rule for rule in RULES if user.role in rule.receivers]
    return Permissions(
        send=(
            *(_pattern(rule.topic, stage="0" if _is_entrance(rule, user) else "*") for rule in sent),
            *DURABLE.get(user.role, ()),
            *(f"{asker.inbox_prefix}.>" for asker in users if asker.role in _askers(heard)),
        ),
        never_send=tuple(
            _pattern(rule.topic, stage="0")
            for rule in sent
            if rule.enters_node and not _is_entrance(rule, user)
        ),
        hear=(f"{user.inbox_prefix}.>", *(_pattern(rule.topic, gateway=f"{user.name}.*") for rule in heard)),
    )


def _is_entrance(rule: Rule, user: User) -> bool:
    return rule.enters_node and user.role is TRAINER


def _askers(heard: Iterable[Rule]) -> set[Role]:
    """The roles that may ask what these rules let somebody hear."""
    return {role for rule in heard if isinstance(rule.topic, RequestTopic) for role in rule.senders}


def _pattern(topic: Topic[Any] | RequestTopic[Any, Any], *, stage: str = "*", gateway: str = "*.*") -> str:
    return topic.pattern.format(node="*", stage=stage, gateway=gateway)


def users_config(users: Sequence[User] = USERS) -> str:
    """The part of a NATS server's configuration that lets in these users and nobody else."""
    return "\n".join(_lines(users)) + "\n"


def _lines(users: Sequence[User]) -> Iterator[str]:
    yield "# Who may send and hear what. Written by shared/bus/permissions.py; a test compares it."
    yield f'include "{KEYS_FILE}"'
    yield ""
    yield "authorization {"
    yield "  users = ["
    for user in users:
        allowed = permissions_of(user, users)
        yield f"    # {user.name}"
        yield "    {"
        yield f"      nkey: ${key_name(user.name)}"
        yield "      permissions: {"
        yield "        publish: {"
        yield from _listed("allow", allowed.send)
        if allowed.never_send:
            yield from _listed("deny", allowed.never_send)
        yield "        }"
        yield "        subscribe: {"
        yield from _listed("allow", allowed.hear)
        yield "        }"
        yield "      }"
        yield "    }"
    yield "  ]"
    yield "}"


def _listed(name: str, patterns: Iterable[str]) -> Iterator[str]:
    yield f"          {name}: ["
    yield from (f'            "{pattern}"' for pattern in patterns)
    yield "          ]"


def key_name(user: str) -> str:
    """The variable of the configuration that holds a user's public key."""
    return f"{user.replace('-', '_')}_key"
