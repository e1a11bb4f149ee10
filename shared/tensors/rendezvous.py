"""Where the members of a collective group find each other: a key-value store in the first one's process.

A store that is served over TCP, not a file in the run's folder, because it needs nothing that the group
itself does not need. A file (torch's FileStore) would need locks that work between hosts, which checkpoints
do not need and which not every shared file system has; and a killed member would leave it behind. That the
store ends with its host costs nothing: a group ends with any of its members. The price is one address in
the message that calls for the merge.
"""

import socket
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from shared.errors import CarrierError, PeerLostError


def host_store(host: str, *, timeout_s: float) -> TCPStore:
    """Serve a store on a free port of `host`, this machine's name or address where the others reach it.

    It lives as long as the object and may serve many groups. Raises CarrierError if it cannot listen there.
    """
    try:
        family, _, _, _, place = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        # The store would listen on every interface; it takes over a socket that listens on one.
        listening = socket.create_server((str(place[0]), 0), family=family)
    except OSError as error:
        raise CarrierError(f"no rendezvous on {host}: {error}") from error
    port = listening.getsockname()[1]
    return TCPStore(
        host,
        port,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )


def store_address(store: TCPStore) -> str:
    """The address that `join_store` takes: `host:port`."""
    return f"{store.host}:{store.port}"


def join_store(address: str, *, timeout_s: float) -> TCPStore:
    """The store that another process serves. Raises PeerLostError if nothing answers within `timeout_s`."""
    host, _, port = address.rpartition(":")
    try:
        return TCPStore(host, int(port), timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
    except RuntimeError as error:
        raise PeerLostError(f"no rendezvous at {address} within {timeout_s} s") from error


def meet(store: Store, member: int, members: Sequence[int], *, tells: str, timeout_s: float) -> list[str]:
    """Exchange texts: the one that each of `members` tells of itself, when all have come, in their order.

    Raises PeerLostError naming those who have not come in `timeout_s`.
    """
    keys = [_key(one) for one in members]
    store.set(_key(member), tells)
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
        return [told.decode() for told in store.multi_get(keys)]
    except RuntimeError as error:
        raise PeerLostError(_who_is_missing(store, members, timeout_s)) from error


def _who_is_missing(store: Store, members: Sequence[int], timeout_s: float) -> str:
    try:
        missing = [one for one in members if not store.check([_key(one)])]
    except RuntimeError:
        return f"the host of the rendezvous of {list(members)} is gone"
    return f"of members {list(members)} {missing} did not come within {timeout_s} s"


def _key(member: int) -> str:
    return f"member-{member}"
