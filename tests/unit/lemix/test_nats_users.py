"""The users' files: made once, secret, and told by name when they are wrong."""

from pathlib import Path

import pytest

from lemix.nats_users import make_users
from shared.bus.access import access_of, user_file
from shared.bus.permissions import USERS, Role
from shared.errors import ConfigurationError
from shared.settings import LemixSettings


def test_each_user_has_a_secret_of_its_own_that_only_its_owner_reads(tmp_path: Path) -> None:
    make_users(tmp_path)
    files = [user_file(tmp_path, user.name) for user in USERS]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    seeds = {access_of(LemixSettings.given(nats_users=tmp_path), user.role).seed for user in USERS}
    assert len(seeds) == len(USERS)
    public = (tmp_path / "keys" / "public.conf").read_text()
    assert all(seed not in public for seed in seeds)


def test_who_is_there_keeps_its_key(tmp_path: Path) -> None:
    make_users(tmp_path)
    before = {file: file.read_text() for file in tmp_path.rglob("*") if file.is_file()}
    user_file(tmp_path, "ingest").unlink()
    make_users(tmp_path)
    changed = [file for file, text in before.items() if file.read_text() != text]
    assert sorted(file.name for file in changed) == ["public.conf", "user.json"]


@pytest.mark.parametrize("content", ["", "{}", '{"name": "a.b", "seed": "S"}'])
def test_a_file_that_is_no_user_is_named(tmp_path: Path, content: str) -> None:
    make_users(tmp_path)
    user_file(tmp_path, "trainer").write_text(content)
    with pytest.raises(ConfigurationError, match=r"LEMIX_NATS_USERS: .*trainer/user\.json is no NATS user"):
        access_of(LemixSettings.given(nats_users=tmp_path), Role.TRAINER)
    with pytest.raises(ConfigurationError, match=r"trainer/user\.json"):
        make_users(tmp_path)


def test_a_folder_without_the_role_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot read the NATS user in .*scheduler/user\.json"):
        access_of(LemixSettings.given(nats_users=tmp_path), Role.SCHEDULER)
