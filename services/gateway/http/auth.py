"""Lets a request in when its key may do what its path needs; without keys, when this machine sent it."""

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from services.gateway.access.exposure import is_known_host, is_loopback, is_own_origin
from services.gateway.access.key_file import KeyRing, Keys
from services.gateway.access.keys import Key, find_key, scope_of
from services.gateway.access.keys import Scope as KeyScope
from services.gateway.access.meter import Meter
from services.gateway.generation import Caller
from services.gateway.http.errors import ApiError
from services.gateway.http.request_log import ANSWER_HEADERS
from services.gateway.metrics import Metrics
from services.gateway.settings import GatewaySettings
from shared.clock import Clock


class Gate:
    """A middleware. It tells routes the key and its meter, and each answer what the key has left."""

    def __init__(
        self, app: ASGIApp, *, settings: GatewaySettings, ring: KeyRing, clock: Clock, metrics: Metrics
    ) -> None:
        self._app = app
        self._settings = settings
        self._ring = ring
        self._clock = clock
        self._metrics = metrics
        self._meters: dict[str, Meter] = {}
        """By the ids of keys."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (needed := scope_of(_route_of(scope))) is None:
            await self._app(scope, receive, send)
            return
        headers, keys = Headers(scope=scope), self._ring.keys()
        if keys is None:
            self._check_neighbour(headers)
            await self._app(scope, receive, send)
            return
        key = _key_for(needed, headers, keys)
        meter = self._meter(key)
        scope.setdefault("state", {}).update({"key": key, "meter": meter, ANSWER_HEADERS: meter.headers})
        try:
            meter.count_request()
        except ApiError as error:
            self._metrics.refused(error.refused_for, key.service_class)
            raise
        await self._app(scope, receive, send)

    def _check_neighbour(self, headers: Headers) -> None:
        """Without keys. Raises ApiError for a request that a page of another site may have sent."""
        settings = self._settings
        host, origin = headers.get("host", ""), headers.get("origin", "")
        if not (settings.insecure or is_loopback(settings.host)):  # the file of keys has gone since the start
            raise _unauthorised("there are no keys: nobody has access")
        any_host = settings.insecure and not settings.trusted_hosts
        if host and not (any_host or is_known_host(host, settings.trusted_hosts)):
            message = f"without keys, requests for {host!r} are not answered (LEMIX_TRUSTED_HOSTS)"
            raise ApiError(403, message, code="host_not_allowed")
        if origin and not is_own_origin(origin, host, settings.cors_origins):
            message = f"pages of {origin!r} may not use this API (LEMIX_CORS_ORIGINS names those that may)"
            raise ApiError(403, message, code="origin_not_allowed")

    def _meter(self, key: Key) -> Meter:
        if key.id not in self._meters:
            self._meters[key.id] = Meter(key, self._clock)
        return self._meters[key.id]


def _route_of(scope: Scope) -> str:
    """The path without the prefix that a proxy serves it under."""
    path: str = scope["path"]
    return path.removeprefix(scope["root_path"])


def caller_of(request: Request) -> Caller:
    """On whose behalf a request is answered."""
    state = request.scope.get("state", {})
    traceparent = request.headers.get("traceparent", "")
    return Caller(traceparent=traceparent, meter=state.get("meter"), key=state.get("key"))


def _key_for(needed: KeyScope, headers: Headers, keys: Keys) -> Key:
    """The key of a request. Raises ApiError: 401 without a known key, 403 for one of another scope."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise _unauthorised("an API key is needed: send 'Authorization: Bearer KEY'")
    key = find_key(keys, token.strip())
    if key is None:
        raise _unauthorised("the API key is not known", challenge='Bearer error="invalid_token"')
    if not key.allows(needed):
        raise ApiError(
            403,
            f"this API key lacks the scope {needed!r}",
            code="insufficient_permissions",
            headers={"www-authenticate": f'Bearer error="insufficient_scope", scope="{needed}"'},
        )
    return key


def _unauthorised(message: str, challenge: str = "Bearer") -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": challenge})
