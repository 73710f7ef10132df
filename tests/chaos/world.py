"""Where the suite runs: a fresh place per case, a real S3 server behind a proxy that can be made faulty."""

import itertools
import os
import secrets
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from faulty_proxy import FaultyProxy, Mix
from publisher import Publishers

from cluster.local_s3 import LocalS3
from cluster.storage import Store, open_store


class World:
    """Opened once, used by many cases. What needs starting is started when a case first asks for it."""

    def __init__(self, s3: LocalS3 | None = None) -> None:
        self._given_s3 = s3
        self._open = ExitStack()
        self._numbers = itertools.count()
        self._seconds: dict[str, float] = {}
        self.kept: dict[str, Any] = {}  # what cases made once for all

    def __enter__(self) -> "World":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # the session of a run makes its own
        self.directory = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        return self

    def __exit__(self, *error) -> None:
        self._open.close()

    def baseline(self, name: str, undisturbed: Callable[[], object]) -> float:
        """Seconds that an undisturbed run takes, measured once; the first one warms up and does not count."""
        if name not in self._seconds:
            for _ in range(2):
                started = time.monotonic()
                undisturbed()
                self._seconds[name] = time.monotonic() - started
        return self._seconds[name]

    def enter(self, context: AbstractContextManager[Any]) -> None:
        """Keeps something open until the world ends."""
        self._open.enter_context(context)

    def fresh(self) -> Path:
        """A new empty directory."""
        path = self.directory / str(next(self._numbers))
        path.mkdir()
        return path

    @cached_property
    def s3(self) -> LocalS3:
        return self._given_s3 or self._open.enter_context(LocalS3(self.directory / "s3", bucket="chaos"))

    @cached_property
    def proxy(self) -> FaultyProxy:
        return self._open.enter_context(FaultyProxy(self.s3.endpoint))

    @cached_property
    def publishers(self) -> Publishers:
        return self._open.enter_context(Publishers())

    @cached_property
    def s3_environment(self) -> dict[str, str]:
        """The server, by way of the proxy."""
        return self.s3.environment() | {"AWS_ENDPOINT_URL_S3": self.proxy.endpoint}

    def s3_store(self) -> Store:
        """A fresh place on the server; from now on this process and its children know the way."""
        os.environ.update(self.s3_environment)
        return open_store(f"s3://{self.s3.bucket}/{uuid.uuid4().hex}")

    @contextmanager
    def broken_network(self, mix: Mix) -> Iterator[None]:
        """Faults by chance on every request to the server, as long as the block goes on."""
        self.proxy.mix = mix
        try:
            yield
        finally:
            self.proxy.mix = None
