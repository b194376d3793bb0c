"""The chat page: static files of this package, no build, nothing from elsewhere, under a strict policy."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from shoestring.serve.errors import ApiError
from shoestring.serve.examples import examples_of

if TYPE_CHECKING:
    from shoestring.serve.service import Service

TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def mount(app: FastAPI, service: Service) -> None:
    """Add the page at / and its files under /page."""

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return _file("index.html")

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return _file("icon.svg")

    @app.get("/page/about.json", include_in_schema=False)
    async def about(request: Request) -> Response:
        return JSONResponse(_about(service), headers={"cache-control": "no-cache"})

    @app.get("/page/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        return _file(name)


def _file(name: str) -> Response:
    kind = name.rpartition(".")[2]
    folder = resources.files("shoestring.report" if name == "style.css" else "shoestring.serve")
    file = folder / name if name == "style.css" else folder / "page" / name
    if kind not in TYPES or "/" in name or name.startswith(".") or not file.is_file():
        raise ApiError(404, f"there is no page file {name}.", code="unknown_path")
    return Response(file.read_bytes(), media_type=f"{TYPES[kind]}; charset=utf-8", headers=HEADERS)


def _about(service: Service) -> dict[str, Any]:
    """What the page shows before anybody has given a key: names and example questions, no state of anybody."""
    return {
        "keys": not service.meter.open,
        "examples": [example for served in service.models.values() for example in examples_of(served)],
        "prices": {
            name: {
                "prompt": served.spec.usd_per_million_prompt,
                "cached": served.spec.usd_per_million_cached,
                "completion": served.spec.usd_per_million_completion,
            }
            for name, served in service.models.items()
        },
        "thinks": [name for name, served in service.models.items() if "<think>" in served.tokenizer.specials],
    }
