"""The users of a NATS server: a key for each, made once, and the server's configuration that knows them.

`python -m lemix.nats_users FOLDER [GATEWAY ...]` makes them for a server that `lemix up` does not start.
The folder has:

    users.conf            who may do what, for the server's configuration to include
    keys/public.conf      the users' public keys, which it includes
    NAME/user.json        each user's name and secret, mode 0600, for its processes alone
"""

import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

import nkeys

from shared.bus.access import Credentials, read_credentials, user_file
from shared.bus.permissions import KEYS_FILE, USERS, Role, User, key_name, users_config
from shared.errors import ConfigurationError, LemixError

USERS_CONFIG = "users.conf"
SEED_BYTES = 32


def make_users(folder: Path, users: Sequence[User] = USERS) -> Path:
    """Make those users of `users` that are not there yet; returns the configuration that lets all of them in.

    Raises ConfigurationError when a file of a user that is there is wrong, or nothing can be written.
    """
    try:
        keys = {user.name: _public_key(_kept_or_new(user_file(folder, user.name), user)) for user in users}
        public = folder / KEYS_FILE
        public.parent.mkdir(parents=True, exist_ok=True)
        public.write_text("".join(f"{key_name(name)}: {key}\n" for name, key in keys.items()))
        config = folder / USERS_CONFIG
        config.write_text(users_config(users))
    except OSError as error:
        raise ConfigurationError(f"cannot write the NATS users to {folder}: {error}") from error
    return config


def _kept_or_new(file: Path, user: User) -> Credentials:
    if file.exists():
        return read_credentials(file)
    seed = nkeys.encode_seed(secrets.token_bytes(SEED_BYTES), nkeys.PREFIX_BYTE_USER)
    made = Credentials(name=user.name, seed=seed.decode())
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file.touch(mode=0o600)
    file.write_text(made.model_dump_json() + "\n")
    return made


def _public_key(credentials: Credentials) -> str:
    key: bytes = nkeys.from_seed(bytearray(credentials.seed.encode())).public_key
    return key.decode()


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python -m lemix.nats_users FOLDER [GATEWAY ...]")
    folder, *gateways = sys.argv[1:]
    try:
        make_users(Path(folder), (*USERS, *(User(name, Role.GATEWAY) for name in gateways)))
    except LemixError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
