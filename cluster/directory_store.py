"""A store in a directory: every write is a temporary file, synced, then one rename or link."""

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from cluster.disk import is_full, not_written
from cluster.errors import InputError, Unavailable
from cluster.paths import local_path
from cluster.storage import Entry, Leftover, MissingKey, Store, Stored, checked_key, sha256_of

TEMPORARY = ".tmp-"
LOCK = f"{TEMPORARY}lock-"  # lock files stay: who removes one that is held lets a second holder in


class DirectoryStore(Store):
    """See `Store`. Safe for several processes on one file system."""

    def __init__(self, uri: str) -> None:
        super().__init__(str(local_path(uri).absolute()))

    def put(self, key: str, data: bytes | Path) -> Stored:
        """See `Store.put`. The digest is that of the stored copy, not of a file that may change meanwhile."""
        with self._written(key, data) as temporary:
            sha256, size = sha256_of(data if isinstance(data, bytes) else temporary)
            self._settle(temporary, key)
        return Stored(key=key, sha256=sha256, size=size)

    def get(self, key: str) -> bytes:
        """See `Store.get`."""
        with self._reading(key) as path:
            return path.read_bytes()

    def read(self, key: str, start: int, length: int) -> bytes:
        """See `Store.read`."""
        with self._reading(key) as path, path.open("rb") as file:
            file.seek(start)
            data = file.read(length)
        if len(data) != length:
            raise Unavailable(f"{self.uri}: {key}: {len(data)} bytes from {start}, not {length}: it is cut short")
        return data

    def size(self, key: str) -> int | None:
        """See `Store.size`."""
        try:
            with self._reading(key) as path:
                return path.stat().st_size if path.is_file() else None
        except MissingKey:
            return None

    def copy(self, source: str, target: str) -> None:
        """See `Store.copy`. A hard link: objects are replaced, never changed in place."""
        with self._reading(source) as origin, self._temporary(target) as temporary:
            try:
                os.link(origin, temporary)
            except FileNotFoundError as error:
                raise MissingKey(self.uri, source) from error
            except OSError:  # a file system without links
                shutil.copyfile(origin, temporary)
                _sync(temporary)
            self._settle(temporary, target)

    def create(self, key: str, data: bytes) -> bool:
        """See `Store.create`. Linking fails when the name is taken, which is the one atomic decision."""
        path = self._path(key)
        with self._written(key, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            _sync(path.parent)
        return True

    def get_tagged(self, key: str) -> tuple[bytes, str] | None:
        """See `Store.get_tagged`."""
        try:
            data = self.get(key)
        except MissingKey:
            return None
        return data, hashlib.sha256(data).hexdigest()

    def swap(self, key: str, data: bytes, tag: str | None) -> bool:
        """See `Store.swap`. Swaps of one key take turns by a lock file beside it."""
        path = self._path(key)
        turn = path.with_name(f"{LOCK}{path.name}")
        with self._written(key, data) as temporary, turn.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = self.get_tagged(key)
            if (found[1] if found else None) != tag:
                return False
            self._settle(temporary, key)
        return True

    def keys(self, prefix: str) -> Iterator[str]:
        """See `Store.keys`. Looks only into the directory that the prefix names."""
        return (entry.key for entry in self.entries(prefix))

    def entries(self, prefix: str) -> Iterator[Entry]:
        """See `Store.entries`."""
        root = Path(self.uri)
        folder = prefix.rpartition("/")[0]
        below = self._path(folder) if folder else root
        found = []
        for path, status in _files(below):
            key = path.relative_to(root).as_posix()
            if key.startswith(prefix) and not path.name.startswith(TEMPORARY):
                found.append(Entry(key=key, size=status.st_size, modified=_written_at(status)))
        return iter(sorted(found, key=lambda entry: entry.key))

    def clock(self) -> datetime:
        """See `Store.clock`."""
        return datetime.now(UTC)

    def leftovers(self) -> list[Leftover]:
        """See `Store.leftovers`."""
        root = Path(self.uri)
        return [
            Leftover(key=path.relative_to(root).as_posix(), size=status.st_size, began=_written_at(status))
            for path, status in _files(root)
            if path.name.startswith(TEMPORARY) and not path.name.startswith(LOCK)
        ]

    def drop(self, leftover: Leftover) -> None:
        """See `Store.drop`."""
        self.delete(leftover.key)

    def folders(self, prefix: str) -> list[str]:
        """See `Store.folders`."""
        below = self._path(prefix.removesuffix("/"))
        return sorted(one.name for one in below.iterdir() if one.is_dir()) if below.is_dir() else []

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        try:
            with self._reading(key) as path:
                path.unlink()
        except MissingKey:
            return

    def check_writable(self) -> None:
        """See `Store.check_writable`. Tries where the store's first directory would be made; makes none that stays."""
        root = Path(self.uri)
        try:
            nearest = next(one for one in (root, *root.parents) if one.exists())
            with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=nearest) as probe:
                store = DirectoryStore(probe)
                if not store.verify(store.put("probe", b"probe")):
                    raise InputError(f"{self.uri}: what was written came back changed")
        except OSError as error:
            if is_full(error):
                raise not_written(self.uri, error) from error
            raise InputError(
                f"{self.uri}: cannot be written: {error.strerror}", "Choose another publish.to."
            ) from error

    def _path(self, key: str) -> Path:
        return Path(self.uri) / checked_key(key)

    def _settle(self, temporary: Path, key: str) -> None:
        """The one moment in which the object changes; synced, so that it also outlives a loss of power."""
        path = self._path(key)
        os.replace(temporary, path)
        _sync(path.parent)

    @contextmanager
    def _reading(self, key: str) -> Iterator[Path]:
        """The key's file; the system's errors about it as ours."""
        try:
            yield self._path(key)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise MissingKey(self.uri, key) from error
        except PermissionError as error:
            raise InputError(f"{self.uri}: {key} may not be touched: {error.strerror}") from error
        except OSError as error:
            raise Unavailable(f"{self.uri}: {key}: {error.strerror}", "Run the same command again.") from error

    @contextmanager
    def _temporary(self, key: str) -> Iterator[Path]:
        """A name for a temporary file beside the key's place; it is gone afterwards, whatever happens."""
        path = self._path(key)
        temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield temporary
            finally:  # a rename onto a link of the same file leaves both names
                temporary.unlink(missing_ok=True)
        except (NotADirectoryError, IsADirectoryError, PermissionError, FileExistsError) as error:
            raise InputError(f"{self.uri}: {key} cannot be written: {error.strerror}") from error
        except OSError as error:
            raise not_written(f"{self.uri}: {key}", error) from error

    @contextmanager
    def _written(self, key: str, data: bytes | Path) -> Iterator[Path]:
        """A temporary file beside the key's place with the data in it, safely on disk."""
        with self._temporary(key) as temporary:
            if isinstance(data, Path):
                shutil.copyfile(data, temporary)
            else:
                temporary.write_bytes(data)
            _sync(temporary)
            yield temporary


def _files(below: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The files below a directory; one that goes meanwhile is left out."""
    for path in below.rglob("*"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if stat.S_ISREG(status.st_mode):
            yield path, status


def _written_at(status: os.stat_result) -> datetime:
    """When a file came to its place: a hard link has the time of its first name, but a change time of its own."""
    return datetime.fromtimestamp(status.st_ctime, UTC)


def _sync(path: Path) -> None:
    """Waits until a file, or a directory's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
