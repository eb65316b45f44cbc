"""Real servers on the loopback interface that fail as servers on the network do."""

from __future__ import annotations

import re
import socket
import socketserver
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


class Request(NamedTuple):
    method: str
    name: str
    start: int
    """The first byte requested; 0 without a Range."""
    sent: int
    """Bytes of the body that were sent."""


@dataclass
class Server:
    """An HTTP server of files by name. Each list of failures is used up, one entry per request."""

    files: dict[str, bytes]
    ranges: bool = True
    says_size: bool = True
    cuts: list[int | None] = field(default_factory=list)
    """For GETs: bytes of the body to send before cutting the connection; None sends all."""
    always_cut_at: int | None = None
    statuses: list[int] = field(default_factory=list)
    """For all requests: the status to answer with; 200 sends the file."""
    vanish_after: int | None = None
    """Number of GETs to answer before all files are gone."""
    stalls: list[float] = field(default_factory=list)
    """For GETs: seconds to wait after the first byte of the body, at most until `released` is set."""
    requests: list[Request] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Server:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                name = self.path.strip("/").partition("?")[0]
                data = server.files.get(name)
                if server.vanish_after is not None and len(server.gets()) >= server.vanish_after:
                    data = None
                status = server.statuses.pop(0) if server.statuses else 200 if data is not None else 404
                if status != 200 or data is None:
                    server.requests.append(Request(self.command, name, 0, 0))
                    self.send_error(status)
                    return
                total, start = len(data), 0
                wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                if server.ranges and wanted:
                    start = int(wanted[1])
                    if start >= total:
                        self.send_error(416)
                        return
                    data = data[start : int(wanted[2]) + 1 if wanted[2] else None]
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{total}")
                else:
                    self.send_response(200)
                self.send_header("ETag", f'"{hash(server.files[name])}"')
                if server.says_size:
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if not body:
                    server.requests.append(Request("HEAD", name, start, 0))
                    return
                cut = server.cuts.pop(0) if server.cuts else server.always_cut_at
                server.requests.append(Request("GET", name, start, len(data[:cut])))
                if server.stalls:
                    self.wfile.write(data[:1])
                    server.released.wait(server.stalls.pop(0))
                    data = data[1:]
                self.wfile.write(data[:cut])

            def handle(self) -> None:
                with suppress(BrokenPipeError, ConnectionResetError):  # the client has closed the connection
                    super().handle()

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def gets(self) -> list[Request]:
        return [request for request in self.requests if request.method == "GET"]


class CuttingProxy:
    """Forwards connections to a server, and cuts one each time the total of bytes answered reaches the next cut."""

    def __init__(self, host: str, port: int, cuts: Iterable[int]) -> None:
        cuts = list(cuts)
        passed = 0

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                nonlocal passed
                with socket.create_connection((host, port)) as upstream, suppress(OSError):
                    asking = threading.Thread(target=self.forward, args=(upstream,))
                    asking.start()
                    while data := upstream.recv(1 << 16):
                        left = cuts[0] - passed if cuts else len(data) + 1
                        self.request.sendall(data[:left])
                        passed += len(data[:left])
                        if left <= len(data):
                            cuts.pop(0)
                            break
                    for side in (self.request, upstream):
                        with suppress(OSError):
                            side.shutdown(socket.SHUT_RDWR)
                    asking.join()

            def forward(self, upstream: socket.socket) -> None:
                with suppress(OSError):
                    while data := self.request.recv(1 << 16):
                        upstream.sendall(data)
                with suppress(OSError):
                    upstream.shutdown(socket.SHUT_RDWR)

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True  # clients keep idle connections: do not wait for them
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> str:
        self._thread.start()
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
