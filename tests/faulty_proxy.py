"""A real HTTP proxy on loopback that breaks what a network breaks: replies lost, cut short or changed on their way."""

import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

PIECE = 1 << 16
BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>less, please</Message></Error>"
BROKEN = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>something broke</Message></Error>"


class Mix:
    """Faults by chance, seeded, counted by kind.

    refuse: 503, and the server never sees the request. fail: the server carries it out, the reply is a 500.
    slow: the reply comes late. reset: the connection breaks before the server sees the request.
    lose: the server carries it out, nobody hears of it. cut: half of the reply's body comes, then the line is dead.

    Args:
        seed: of the draws; which request meets which draw depends on the order in which they come.
        rates: kind → share of requests.
        slow_seconds: the longest that a slow reply takes.
    """

    KINDS = ("refuse", "fail", "slow", "reset", "lose", "cut")

    def __init__(self, seed: int, rates: Mapping[str, float], slow_seconds: float = 0.3) -> None:
        assert set(rates) <= set(self.KINDS)
        self.rates = dict(rates)
        self.slow_seconds = slow_seconds
        self.done: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def draw(self) -> str:
        """The kind of the next request's fault; "" for none."""
        with self._lock:
            number = self._random.random()
        for kind, rate in self.rates.items():
            if number < rate:
                return kind
            number -= rate
        return ""

    def note(self, kind: str) -> None:
        """Counts a fault that was done."""
        with self._lock:
            self.done[kind] += 1


class FaultyProxy:
    """Passes everything on to an S3 server.

    Args:
        upstream: the server.
        fault: "METHOD path" and the body of the reply → the body that is sent, or None to hang up without a word.
        received: told "METHOD path" and how many bytes of a request's body are through.

    `mix`, where it is set, adds faults by chance; it can be set and taken away while requests come.
    """

    mix: Mix | None = None

    def __init__(
        self,
        upstream: str,
        fault: Callable[[str, bytes], bytes | None] = lambda request, body: body,
        received: Callable[[str, int], None] = lambda request, count: None,
    ) -> None:
        self.requests: list[str] = []
        server = urlsplit(upstream)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                request = f"{self.command} {self.path}"
                proxy.requests.append(request)
                mix = proxy.mix
                kind = mix.draw() if mix else ""
                if mix and kind == "reset":
                    mix.note(kind)
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.close_connection = True
                    return
                if mix and kind == "refuse":
                    mix.note(kind)
                    self.rfile.read(int(self.headers.get("Content-Length", 0)))
                    self.answer(503, BUSY)
                    return
                connection = HTTPConnection(server.hostname, server.port, timeout=60)
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() != "expect":
                        connection.putheader(name, value)
                connection.endheaders()
                length, count = int(self.headers.get("Content-Length", 0)), 0
                while count < length:
                    piece = self.rfile.read1(min(PIECE, length - count))
                    if not piece:  # who sends it is dead: what has come so far is all that the server ever gets
                        connection.close()
                        self.close_connection = True
                        return
                    connection.send(piece)
                    count += len(piece)
                    received(request, count)
                reply = connection.getresponse()
                body = reply.read()
                connection.close()
                if mix and kind == "fail":
                    mix.note(kind)
                    self.answer(500, BROKEN)
                    return
                if mix and kind == "slow":
                    mix.note(kind)
                    time.sleep(mix.slow_seconds)
                sent = fault(request, body)
                if mix and kind in ("lose", "cut"):
                    mix.note(kind)
                    sent = body[: len(body) // 2] if kind == "cut" and len(body) > 1 else None
                if sent is None:
                    self.close_connection = True
                    return
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                self.send_header("Content-Length", reply.headers.get("Content-Length") or str(len(body)))
                self.end_headers()
                self.wfile.write(sent)
                self.close_connection = len(sent) != len(body)

            def answer(self, status: int, body: bytes) -> None:
                body = b"" if self.command == "HEAD" else body
                self.send_response(status)
                self.send_header("Content-Type", "application/xml")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = forward

            def log_message(self, *arguments) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FaultyProxy":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()


class Server(ThreadingHTTPServer):
    """Ends connections by closing them, so that one told to break does break; clients may be killed at any time."""

    request_queue_size = 64

    def shutdown_request(self, request) -> None:
        self.close_request(request)

    def handle_error(self, request, client_address) -> None:
        pass


class Once:
    """A fault that happens the first time a request matches, and only then."""

    def __init__(self, method: str, part: str, fault: Callable[[bytes], bytes | None]) -> None:
        self.method, self.part, self.fault = method, part, fault
        self.happened = False

    def __call__(self, request: str, body: bytes) -> bytes | None:
        if self.happened or not request.startswith(self.method) or self.part not in request:
            return body
        self.happened = True
        return self.fault(body)
