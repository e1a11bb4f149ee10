"""What is kept of a key, what it opens, and how it is recognised."""

import pytest

from services.gateway.access.keys import Key, Scope, digest_of, find_key, scope_of, token_of

SECRET = "ab" * 32
TOKEN = token_of("1a2b3c4d", SECRET)


def key(*scopes: Scope, token: str = TOKEN, key_id: str = "1a2b3c4d") -> Key:
    return Key(id=key_id, name="me", digest=digest_of(token), scopes=scopes, created_at=0)


def test_a_key_is_recognised_by_all_of_it_and_kept_without_its_secret() -> None:
    kept = key("infer")
    assert find_key({kept.id: kept}, TOKEN) == kept
    assert SECRET not in kept.model_dump_json()


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "sk-lemix-",
        "1a2b3c4d",
        TOKEN[:-1],
        TOKEN + "0",
        token_of("1a2b3c4d", "cd" * 32),
        token_of("ffffffff", SECRET),
        TOKEN.removeprefix("sk-lemix-"),
        "na\u00efve",
    ],
)
def test_anything_else_is_no_key(wrong: str) -> None:
    kept = key("infer")
    assert find_key({kept.id: kept}, wrong) is None


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("/health", None),
        ("/healthy", "admin"),
        ("/docs", None),
        ("/openapi.json", None),
        ("/v1/chat/completions", "infer"),
        ("/v1/models/org/name", "infer"),
        ("/v1/modelsx", "admin"),
        ("/v1/files", "train"),
        ("/v1/files/file-1/content", "train"),
        ("/v1/fine_tuning/jobs", "train"),
        ("/metrics", "admin"),
        ("/something/new", "admin"),
        ("", "admin"),
    ],
)
def test_a_path_needs_its_scope_and_an_unknown_one_the_highest(path: str, scope: Scope | None) -> None:
    assert scope_of(path) == scope


def test_an_admin_may_do_everything_and_others_what_they_are_for() -> None:
    allowed = {(mine, needed) for mine in ("infer", "train") for needed in ("infer", "train", "admin")}
    assert {pair for pair in allowed if key(pair[0]).allows(pair[1])} == {
        ("infer", "infer"),
        ("train", "train"),
    }
    assert all(key("admin").allows(needed) for needed in ("infer", "train", "admin"))
