"""Paths and methods as probes, proxies and people send them."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class LenientPaths:
    """A path may begin with the proxy's prefix, and end with a slash; HEAD is GET without the body."""

    def __init__(self, app: ASGIApp, *, prefix: str) -> None:
        """`prefix` is empty, or begins with a slash and does not end with one."""
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_without_body(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        lenient = {**scope, "root_path": self._prefix, "path": self._full(scope["path"])}
        if scope["method"] == "HEAD":
            await self._app(lenient | {"method": "GET"}, receive, send_without_body)
        else:
            await self._app(lenient, receive, send)

    def _full(self, path: str) -> str:
        """The path with the prefix, as ASGI wants it, and without a slash at its end."""
        path = path.rstrip("/")
        if path == self._prefix or path.startswith(self._prefix + "/"):
            path = path.removeprefix(self._prefix)
        return self._prefix + (path or "/")
