"""A real HTTP proxy on loopback that breaks what a network breaks: replies lost, cut short or changed on their way."""

import threading
from collections.abc import Callable
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

PIECE = 1 << 16


class FaultyProxy:
    """Passes everything on to an S3 server.

    Args:
        upstream: the server.
        fault: "METHOD path" and the body of the reply → the body that is sent, or None to hang up without a word.
        received: told "METHOD path" and how many bytes of a request's body are through.
    """

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
                sent = fault(request, body)
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

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = forward

            def log_message(self, *arguments) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FaultyProxy":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()


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
