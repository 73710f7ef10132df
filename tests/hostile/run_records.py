"""Records of runs that other code wrote, or somebody who wants `karikomi list` to believe something."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hostile.cases import Case

from cluster.directory_store import DirectoryStore
from jobs.records import Ended, Progress, claim, note_end, note_progress, read_run

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
ATTEMPT = "runs/chat-1/attempts/1"


def told(folder: Path) -> Path:
    """A store with one run, attempted and ended; its attempt's folder."""
    store = DirectoryStore(str(folder / "store"))
    started = claim(store, "chat-1", "retail", "chat", "ann@host", "embedded", b"name: chat\n")
    note_progress(store, started, Progress(at=NOW, step="prune"))
    note_end(store, started, Ended(at=NOW, code=0, result="done", sentence="fine"))
    return folder / "store" / ATTEMPT


def state(store: Path) -> object:
    run = read_run(DirectoryStore(str(store)), "chat-1")
    assert run is not None
    return run.state(datetime.now(UTC)), run.usage


def text(name: str, record: str, content: bytes | str, *mentions: str) -> Case:
    """One record with another content."""

    def build(folder: Path) -> Path:
        path = told(folder) / f"{record}.json"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return folder / "store"

    return Case(name, build, state, (f"{ATTEMPT}/{record}", *mentions))


def changed(name: str, record: str, changes: dict[str, Any] | Callable[[dict[str, Any]], None], *mentions: str) -> Case:
    """One record with other fields; Ellipsis takes one away."""

    def build(folder: Path) -> Path:
        attempt = told(folder)
        path = attempt / f"{record}.json"
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
        if record == "progress":  # else its end is what counts
            (attempt / "ended.json").unlink()
        return folder / "store"

    return Case(name, build, state, (f"{ATTEMPT}/{record}", *mentions))


def attempt_named(name: str) -> Case:
    """A folder among the attempts that no claim makes, beside a gap."""

    def build(folder: Path) -> Path:
        attempt = told(folder)
        attempt.rename(attempt.with_name(name))
        return folder / "store"

    def read(store: Path) -> object:
        found = read_run(DirectoryStore(str(store)), "chat-1")
        if found is None:  # it is no attempt, and not one is read
            from cluster.errors import InputError

            raise InputError(f"attempts: {name} is none")
        return found

    return Case(f"an attempt named {name[:20]!r}", build, read, ("attempts",))


def gone(folder: Path) -> Path:
    (told(folder) / "started.json").unlink()
    return folder / "store"


CASES = [
    *(
        text(f"{record}: {what}", record, content)
        for record in ("started", "progress", "ended")
        for what, content in {
            "nothing": "", "a list": "[]", "a number": "5", "random bytes": bytes(range(256)), "nested deep": '{"at":' * 100_000,
            "cut short": '{"at": "2026', "other fields": '{"at": 1, "colour": 2}', "NaN": "NaN",
        }.items()
    ),
    changed("an attempt of another run", "started", {"run": "other-1"}, "other-1"),
    changed("an attempt of another number", "started", {"number": 7}, "7"),
    changed("an attempt of a negative number", "started", {"number": -1}),
    changed("an attempt whose number is text", "started", {"number": "one"}, "number"),
    changed("a tenant that leads out", "started", {"tenant": "../other"}, "tenant"),
    changed("a name that leads out", "started", {"name": "../other"}, "name"),
    changed("no tenant", "started", {"tenant": ...}, "tenant"),
    changed("an unknown field", "started", {"colour": "red"}, "colour"),
    changed("a time without a zone", "started", {"at": "2026-11-24T12:00:00"}, "at"),
    changed("a heartbeat without a zone", "progress", {"at": "2026-11-24T12:00:00"}, "at"),
    changed("a heartbeat in the year 0", "progress", {"at": "0000-01-01T00:00:00Z"}, "at"),
    changed("a heartbeat of a number too large", "progress", {"at": 1e300}, "at"),
    changed("negative progress", "progress", {"done": -1}, "done"),
    changed("progress of text", "progress", {"done": "all"}, "done"),
    changed("a step of a list", "progress", {"step": ["prune"]}, "step"),
    changed("negative GPU-seconds", "ended", {"usage": {"gpu_seconds": -1e9}}, "gpu_seconds"),
    changed("infinite GPU-seconds", "ended", {"usage": {"gpu_seconds": float("inf")}}, "gpu_seconds"),
    changed("GPU-seconds of nan", "ended", {"usage": {"gpu_seconds": float("nan")}}, "gpu_seconds"),
    changed("GPU-seconds of text", "ended", {"usage": {"gpu_seconds": "1e999"}}, "gpu_seconds"),
    changed("usage with an unknown field", "ended", {"usage": {"money": 5}}, "money"),
    changed("usage of null", "ended", {"usage": None}, "usage"),
    changed("an unknown result", "ended", {"result": "splendid"}, "result"),
    changed("a code of text", "ended", {"code": "zero"}, "code"),
    changed("no sentence", "ended", {"sentence": ...}, "sentence"),
    changed("an end with an unknown field", "ended", {"html": "<script>"}, "html"),
    Case("an attempt that was never claimed", gone, state, (f"{ATTEMPT}/started",)),
    *map(attempt_named, ("01", "²", "٣", "-1", "1e3", "0x1", "1 ", "9" * 200, "0")),
]  # fmt: skip
