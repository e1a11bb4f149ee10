"""The OpenAPI document, and a page to read and try it, which needs no internet."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles

from services.gateway.access.keys import scope_of

_KEY = "key"
_PAGE = "/docs"
_ASSETS = f"{_PAGE}/static"


class DocumentedApp(FastAPI):
    """An application whose document says which routes need a key."""

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        document.setdefault("components", {})["securitySchemes"] = {
            _KEY: {"type": "http", "scheme": "bearer", "description": "Needed once the gateway has keys."}
        }
        for path, operations in document["paths"].items():
            for operation in operations.values():
                if scope_of(path) is not None:
                    operation["security"] = [{_KEY: []}]
                for status in ("4XX", "5XX"):  # JSON, whatever the route's other answers are
                    (error,) = operation["responses"][status]["content"].values()
                    operation["responses"][status]["content"] = {"application/json": error}
        return document


def add_documentation(app: FastAPI) -> None:
    """Serve the page, with Swagger UI as the package `fastapi_offline` has it."""
    app.mount(_ASSETS, StaticFiles(packages=[("fastapi_offline", "static")]))

    @app.get(_PAGE, include_in_schema=False)
    async def page(request: Request) -> HTMLResponse:
        prefix = request.scope["root_path"]
        return get_swagger_ui_html(
            openapi_url=f"{prefix}/openapi.json",
            title=app.title,
            swagger_js_url=f"{prefix}{_ASSETS}/swagger-ui-bundle.js",
            swagger_css_url=f"{prefix}{_ASSETS}/swagger-ui.css",
            swagger_favicon_url=f"{prefix}{_ASSETS}/favicon.png",
        )
