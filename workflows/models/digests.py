"""Digests of a model's weight files, kept beside the converted models: a file that did not change is read once."""

import hashlib
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.errors import KarikomiError
from cluster.marks import Mark, marks
from cluster.storage import Store, Stored, open_store

SETTLED = timedelta(seconds=2)  # a file that changed later may change again within one tick of its clock


class Known(BaseModel):
    """What is known of one model's files: name → (mark, digest)."""

    model_config = ConfigDict(frozen=True, strict=True)

    uri: str
    files: dict[str, tuple[str, str]]


def digests(store: Store, sizes: dict[str, int], cache: Path) -> tuple[Stored, ...]:
    """Names, digests and sizes of weight files; those whose size and time (on S3: ETag) are as before are not read.

    Args:
        store: the model's directory or prefix.
        sizes: bytes of each file, by name.
        cache: where they are kept; one that cannot be written is done without.

    Raises:
        Unavailable, InputError: as the store's own reading does.
    """
    there = {name: one for name, one in marks(store).items() if name in sizes}
    key = f"{hashlib.sha256(store.uri.encode()).hexdigest()}.json"
    known = _read(cache, key, store.uri)
    same = {name: sha256 for name, (mark, sha256) in known.items() if name in there and there[name].mark == mark}
    found = {name: same.get(name) or _digest(store, name) for name in sizes}
    keep = {name: (one.mark, found[name]) for name, one in there.items() if _settled(one)}
    if keep != known:
        _write(cache, key, Known(uri=store.uri, files=keep))
    return tuple(Stored(key=name, sha256=found[name], size=size) for name, size in sizes.items())


def _settled(mark: Mark) -> bool:
    return mark.changed < datetime.now(UTC) - SETTLED


def _read(cache: Path, key: str, uri: str) -> dict[str, tuple[str, str]]:
    try:
        known = Known.model_validate_json(open_store(str(cache / "digests")).get(key), strict=False)
    except (KarikomiError, ValidationError, OSError):
        return {}
    return known.files if known.uri == uri else {}


def _write(cache: Path, key: str, known: Known) -> None:
    with suppress(KarikomiError, OSError):
        open_store(str(cache / "digests")).put(key, known.model_dump_json(indent=1).encode())


def _digest(store: Store, name: str) -> str:
    found = hashlib.sha256()
    for piece in store.stream(name):
        found.update(piece)
    return found.hexdigest()
