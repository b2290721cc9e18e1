"""The page at /: files of the folder `page`, read once; there is no way from an address to a path."""

from functools import partial
from pathlib import Path
from typing import Final

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

__all__ = ["mount"]

FOLDER: Final = Path(__file__).with_name("page")
POLICY: Final = "; ".join(
    [
        "default-src 'none'",
        *(f"{kind} 'self'" for kind in ("script-src", "style-src", "font-src", "connect-src", "manifest-src")),
        "img-src 'self' data:",
        *(f"{kind} 'none'" for kind in ("base-uri", "form-action", "frame-ancestors")),
    ]
)

# Not asked of the system, whose tables differ; a browser runs no script of another type.
_MEDIA: Final = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".woff2": "font/woff2",
    ".webmanifest": "application/manifest+json",
}


def mount(app: FastAPI, folder: Path = FOLDER) -> frozenset[str]:
    """Serve index.html at / and every other file at its path below the folder; returns these addresses."""
    if not (folder / "index.html").is_file():
        return frozenset()
    addresses = set()
    for file in sorted(folder.rglob("*")):
        if not file.is_file():
            continue
        name = file.relative_to(folder).as_posix()
        address = "/" if name == "index.html" else f"/{name}"
        media = _MEDIA.get(file.suffix, "application/octet-stream")
        headers = {
            "Content-Security-Policy": POLICY,
            "Cache-Control": "no-cache",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
        }
        answer = partial(_answer, file.read_bytes(), headers, media)
        app.add_api_route(address, answer, methods=["GET"], include_in_schema=False)
        addresses.add(address)
    return frozenset(addresses)


async def _answer(content: bytes, headers: dict[str, str], media: str, request: Request) -> Response:
    return Response(content, headers=headers, media_type=media)
