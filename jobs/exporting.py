"""How metrics leave: as a file that is never seen half-written, or served for Prometheus to scrape."""

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import structlog
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric

from cluster.errors import InputError, KarikomiError
from cluster.storage import Store
from jobs.metrics import RunCollector

log = structlog.get_logger()


class Scraped(RunCollector):
    """Tells a scrape that the store is out of reach, instead of breaking it off."""

    def collect(self) -> Iterator[Metric]:
        """All metrics, now, and whether they could be had."""
        try:
            found = list(super().collect())
        except KarikomiError as error:
            log.warning("the store was not read", error=error.message)
            found = []
        yield from found
        yield GaugeMetricFamily("karikomi_store_reachable", "1 when the store could be read.", value=int(bool(found)))


def write_whole(path: Path, text: bytes) -> None:
    """Replaces a file in one move.

    Raises:
        InputError: it cannot be written.
    """
    temporary = ""
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.absolute().parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # the collector is another user
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written: {error.strerror}", "Give --to a file in a directory.") from error


def serve(store: Store, days: float, address: str) -> None:
    """Answers every scrape with what the store says at that moment, until SIGINT or SIGTERM.

    Args:
        store: whose runs.
        days: as for `RunCollector`.
        address: HOST:PORT.

    Raises:
        InputError: no address, or it is taken.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise InputError(f"--listen {address}: no HOST:PORT", "For example: --listen 127.0.0.1:9464")
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Scraped(store, days))
    try:
        server, thread = start_http_server(int(port), addr=host.strip("[]"), registry=registry)
    except OSError as error:
        raise InputError(f"--listen {address}: {error.strerror}", "Choose another address.") from error
    print(f"serving http://{host}:{server.server_port}/metrics", flush=True)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    server.shutdown()
    server.server_close()
    thread.join()
