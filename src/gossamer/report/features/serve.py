"""Serve: the page of a large dictionary on this machine's loopback, a page of features at a time.

Nothing but the table of all latents is worked out beforehand. The server answers reads alone, and
only to a browser that names it as localhost.
"""

import json
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch

from gossamer.core import GossamerError
from gossamer.report.features.book import Book
from gossamer.report.features.page import as_json, render, row

__all__ = ["Shelf", "server"]

_HOST = "127.0.0.1"
_PAGE = 25
_MOST = 200


class Shelf:
    """Answers what the page asks for.

    Parameters
    ----------
    book : the latents. facts : shown in the page's head.
    """

    def __init__(self, book: Book, facts: dict[str, Any]) -> None:
        self.book, self.facts = book, facts
        self._lock = Lock()
        self._texts = [
            " ".join((f"#{i}", *book.tokens_of(i), book.explanations.get(i, ""))).lower()
            for i in range(len(book))
        ]

    def page(self) -> str:
        """The page without any feature."""
        return render(None, self.facts)

    def rows(
        self,
        *,
        find: str = "",
        sort: str = "index",
        down: bool = False,
        dead: bool = False,
        explained: bool = False,
        start: int = 0,
        count: int = _PAGE,
    ) -> dict[str, Any]:
        """A page of the table: how many latents match, and the rows of some of them.

        Parameters
        ----------
        find : words that a latent's number, tokens or explanation must hold.
        sort : ``index``, ``density`` or ``top`` (the largest code). dead : also those that
            never fired.
        """
        book = self.book
        keys = {
            "index": torch.arange(len(book)),
            "density": book.density,
            "top": torch.maximum(book.top, -book.bottom),
        }
        if sort not in keys:
            raise GossamerError(f"sort is {sort!r}; give {', '.join(keys)}")
        # Stable sorting keeps ties in the order of the latents.
        order = torch.sort(keys[sort], descending=down, stable=True).indices.tolist()
        counts, words = book.firing.counts.tolist(), find.lower().split()
        matching = [
            i
            for i in order
            if (dead or counts[i])
            and (not explained or i in book.explanations)
            and all(word in self._texts[i] for word in words)
        ]
        shown = matching[max(0, start) : max(0, start) + min(max(1, count), _MOST)]
        with self._lock:
            return {"total": len(matching), "rows": [row(f) for f in book.features(shown)]}

    def feature(self, latent: int) -> dict[str, Any]:
        """One latent in full."""
        if not 0 <= latent < len(self.book):
            raise GossamerError(f"no feature {latent}; there are {len(self.book)}, from 0")
        with self._lock:
            return as_json(self.book.feature(latent), str)


def _asked(query: str) -> dict[str, Any]:
    given = {name: values[-1] for name, values in parse_qs(query).items()}
    return {
        "find": given.get("find", ""),
        "sort": given.get("sort", "index"),
        "down": given.get("down") == "1",
        "dead": given.get("dead") == "1",
        "explained": given.get("explained") == "1",
        "start": int(given.get("start", 0)),
        "count": int(given.get("count", _PAGE)),
    }


class _Handler(BaseHTTPRequestHandler):
    shelf: Shelf

    def do_GET(self) -> None:
        """Answer a read."""
        # Another site's name that points here must not read the page.
        host = (self.headers.get("Host") or "").rpartition(":")[0]
        if host not in (_HOST, "localhost"):
            self._send(HTTPStatus.FORBIDDEN, "text/plain", f"open http://{_HOST} instead")
            return
        asked = urlsplit(self.path)
        try:
            if asked.path == "/":
                self._send(HTTPStatus.OK, "text/html", self.shelf.page())
            elif asked.path == "/rows":
                self._json(lambda: self.shelf.rows(**_asked(asked.query)))
            elif asked.path.startswith("/feature/"):
                self._json(lambda: self.shelf.feature(int(asked.path.rpartition("/")[2])))
            else:
                self._send(HTTPStatus.NOT_FOUND, "text/plain", "there is only /")
        except (BrokenPipeError, ConnectionResetError):
            return

    def _json(self, make: Callable[[], Any]) -> None:
        try:
            text = json.dumps(make(), ensure_ascii=False)
        except ValueError as error:
            told = error if isinstance(error, GossamerError) else "a number was expected"
            self._send(HTTPStatus.BAD_REQUEST, "text/plain", str(told))
            return
        self._send(HTTPStatus.OK, "application/json", text)

    def _send(self, status: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode("utf-8")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal shows the address alone."""


def server(shelf: Shelf, port: int = 0) -> ThreadingHTTPServer:
    """A server on the loopback, listening; call ``serve_forever`` and ``server_close``.

    Parameters
    ----------
    port : 0 takes a free one, which ``server_port`` tells.

    Raises
    ------
    GossamerError
        If the port cannot be had.
    """
    handler = type("Handler", (_Handler,), {"shelf": shelf})
    try:
        made = ThreadingHTTPServer((_HOST, port), handler)
    except (OSError, OverflowError) as error:
        raise GossamerError(f"port {port} cannot be used ({error}); give another --port") from None
    made.daemon_threads = True
    return made
