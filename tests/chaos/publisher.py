"""Publishers that die: a small server of processes, each killed by SIGKILL at one exact boundary of its work.

The boundaries are the operations themselves: every request to S3, before it is sent and after it was carried out; every
operation on the file system. So no protocol step is left out, whatever the code's own structure is.
"""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from pydantic import BaseModel

from cluster.storage import Stored

FILE_OPERATIONS = ("open", "os.rename", "os.link", "os.remove", "os.mkdir", "shutil.copyfile")


class Order(BaseModel):
    """One publisher. It dies at boundary `die_at` (counted from 1; 0: never), for S3 on this `side` of the request."""

    store: str
    files: dict[str, Stored]
    documents: dict[str, str]
    run: str
    environment: dict[str, str]
    notes: str
    die_at: int = 0
    side: str = "before"


class Notes:
    """What a publisher wrote down for those that come after its death: boundaries passed, writes acknowledged."""

    def __init__(self, path: str) -> None:
        self.boundaries = 0
        self.acknowledged: list[Stored] = []
        for line in Path(path).read_text().splitlines() if Path(path).exists() else []:
            if line == "boundary":
                self.boundaries += 1
            else:
                self.acknowledged.append(Stored.model_validate_json(line))


class Publishers:
    """The server: a process that has all imports done, and forks a publisher for each order."""

    def __enter__(self) -> "Publishers":
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *error) -> None:
        self._server.communicate(timeout=60)

    def run(self, order: Order) -> int:
        """Its exit code; minus the signal that killed it."""
        self._server.stdin.write(f"{order.model_dump_json()}\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())


def serve() -> None:
    """Forks a publisher per line."""
    from cluster import s3_store  # noqa: F401
    from workflows import publishing  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if not child:
            code = 70
            try:
                publish_and_die(Order.model_validate_json(line))
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def publish_and_die(order: Order) -> None:
    """The real publishing, with a count of its boundaries."""
    os.environ.update(order.environment)
    from botocore.httpsession import URLLib3Session

    from cluster.storage import open_store
    from workflows.publishing import publish

    notes = os.open(order.notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    passed = 0

    def boundary(side: str) -> None:
        nonlocal passed
        passed += side == "before"
        if side == "before":
            os.write(notes, b"boundary\n")
        if passed == order.die_at and side == order.side:
            os.kill(os.getpid(), signal.SIGKILL)

    store = open_store(order.store)
    acknowledge(store, notes)
    if order.store.startswith("s3://"):
        send = URLLib3Session.send

        def counted(session, request):
            boundary("before")
            reply = send(session, request)
            boundary("after")
            return reply

        URLLib3Session.send = counted
    else:

        def hook(event: str, arguments: tuple) -> None:
            if event in FILE_OPERATIONS and any(order.store in str(one) for one in arguments):
                boundary("before")

        sys.addaudithook(hook)
    documents = {name: text.encode() for name, text in order.documents.items()}
    publish(store, "chat", "auto", order.files, documents, order.run)


def acknowledge(store, notes: int) -> None:
    """Writes down what the store says that it keeps, as soon as it says so."""
    put, create = store.put, store.create

    def noted_put(key, data):
        stored = put(key, data)
        os.write(notes, f"{stored.model_dump_json()}\n".encode())
        return stored

    def noted_create(key, data):
        import hashlib

        created = create(key, data)
        if created:
            stored = Stored(key=key, sha256=hashlib.sha256(data).hexdigest(), size=len(data))
            os.write(notes, f"{stored.model_dump_json()}\n".encode())
        return created

    store.put, store.create = noted_put, noted_create


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve()
