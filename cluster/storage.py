"""The store: one layout, in a directory or on S3. Everything that a run must not lose goes through here."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pydantic import BaseModel, ConfigDict

from cluster.errors import InputError, KarikomiError


class Stored(BaseModel):
    """An object in a store, and the digest that is its identity."""

    model_config = ConfigDict(frozen=True)

    key: str
    sha256: str
    size: int


class Entry(BaseModel):
    """What a listing tells of an object. `modified`: when it was last written, by the store's own clock."""

    model_config = ConfigDict(frozen=True)

    key: str
    size: int
    modified: datetime


class Leftover(BaseModel):
    """What a write left that was cut off: a temporary file, or an upload in parts that nobody completed."""

    model_config = ConfigDict(frozen=True)

    key: str
    upload: str = ""  # S3's name of the upload
    size: int | None  # None: the store does not tell
    began: datetime


class MissingKey(KarikomiError):
    """There is no object of this key."""

    def __init__(self, uri: str, key: str) -> None:
        super().__init__(f"{uri}: {key} is not there")


class Store(ABC):
    """Objects under '/'-separated keys below one uri.

    Picklable; makes no request before it is asked for something. Reading needs no listing: who reads knows the key.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/") or "/"

    @abstractmethod
    def put(self, key: str, data: bytes | Path) -> Stored:
        """Writes an object, whole or not at all; what was there is replaced."""

    @abstractmethod
    def get(self, key: str) -> bytes:
        """The whole object.

        Raises:
            MissingKey: there is none.
        """

    @abstractmethod
    def read(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`.

        Raises:
            MissingKey: there is no such object.
            Unavailable: fewer bytes came than were asked for.
        """

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Bytes of an object; None when there is none."""

    @abstractmethod
    def copy(self, source: str, target: str) -> None:
        """Makes a second object of the same bytes without moving them through here."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Writes an object if there is none: atomic, one winner. False when there is one already."""

    @abstractmethod
    def get_tagged(self, key: str) -> tuple[bytes, str] | None:
        """An object and the tag that `swap` wants; None when there is none."""

    @abstractmethod
    def swap(self, key: str, data: bytes, tag: str | None) -> bool:
        """Replaces an object if it still has this tag (None: if there is none). False when it changed meanwhile.

        A tag stands for the content: replacing an object by the same bytes is no change.
        """

    @abstractmethod
    def keys(self, prefix: str) -> Iterator[str]:
        """Keys that begin so, in order."""

    @abstractmethod
    def entries(self, prefix: str) -> Iterator[Entry]:
        """As `keys`, each with its size and the time of its last write."""

    @abstractmethod
    def clock(self) -> datetime:
        """What time it is for the store; ages are counted by it, never by this machine's clock."""

    @abstractmethod
    def leftovers(self) -> list[Leftover]:
        """What cut-off writes left below this store, and writes at work just now: look at their age."""

    @abstractmethod
    def drop(self, leftover: Leftover) -> None:
        """Removes a leftover; one that is gone is no error."""

    @abstractmethod
    def folders(self, prefix: str) -> list[str]:
        """Names directly below a prefix that ends with "/" and that have keys below them, in order."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Removes an object; one that is not there is no error."""

    @abstractmethod
    def check_writable(self) -> None:
        """Writes, reads and removes one small object.

        Raises:
            InputError: it cannot be written here (credentials, bucket, permissions).
            Unavailable: it is out of reach.
        """

    def verify(self, stored: Stored) -> bool:
        """Whether the object is there with this size and content; it is read back in pieces where need be."""
        if self.size(stored.key) != stored.size:
            return False
        found = hashlib.sha256()
        for piece in self.stream(stored.key):
            found.update(piece)
        return found.hexdigest() == stored.sha256

    def stream(self, key: str, piece: int = 16 << 20) -> Iterator[bytes]:
        """The object in pieces of at most `piece` bytes."""
        size = self.size(key)
        if size is None:
            raise MissingKey(self.uri, key)
        for start in range(0, size, piece):
            yield self.read(key, start, min(piece, size - start))

    def download(self, key: str, path: Path) -> Stored:
        """Fetches an object into a new file, and says what came; who knows what it should be compares.

        Raises:
            MissingKey: there is no such object; no file is left.
            FileExistsError: the file is there already.
        """
        found, size = hashlib.sha256(), 0
        with path.open("xb") as file:
            try:
                for piece in self.stream(key):
                    found.update(piece)
                    size += file.write(piece)
            except BaseException:
                path.unlink()
                raise
        return Stored(key=key, sha256=found.hexdigest(), size=size)

    def put_json(self, key: str, value: Any) -> Stored:
        """Writes a value as JSON."""
        return self.put(key, json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode())

    def get_json(self, key: str) -> Any:
        """Reads a JSON object."""
        return json.loads(self.get(key))


def open_store(uri: str) -> Store:
    """The store at an s3:// address or in a directory (also as file://). Makes no request and no directory.

    Raises:
        InputError: another kind of address.
    """
    from cluster.directory_store import DirectoryStore
    from cluster.s3_store import S3Store

    if uri.startswith("s3://"):
        return S3Store(uri)
    if uri.startswith("file:///"):
        return DirectoryStore(unquote(uri.removeprefix("file://")))
    if "://" in uri or not uri.strip() or "\0" in uri:
        raise InputError(f"{uri!r}: no kind of store; write s3://bucket/prefix or a directory")
    return DirectoryStore(uri)


def checked_key(key: str) -> str:
    """The key, if it stays below the store.

    Raises:
        InputError: it is empty, absolute, or climbs out.
    """
    parts = key.split("/")
    if not key or "\0" in key or "\\" in key or any(part in ("", ".", "..") for part in parts):
        raise InputError(f"{key!r} is no key: it must be relative, without empty parts, '.' or '..'")
    return key


def sha256_of(data: bytes | Path) -> tuple[str, int]:
    """Digest and size of bytes, or of a file without holding it whole."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest(), len(data)
    with data.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), data.stat().st_size
