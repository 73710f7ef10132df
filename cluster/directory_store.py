"""A store in a directory: every write is a temporary file, synced, then one rename or link."""

import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import InputError, Unavailable
from cluster.storage import MissingKey, Store, Stored, checked_key, sha256_of

TEMPORARY = ".tmp-"


class DirectoryStore(Store):
    """See `Store`. Safe for several processes on one file system."""

    def __init__(self, uri: str) -> None:
        super().__init__(str(Path(uri).expanduser().absolute()))

    def put(self, key: str, data: bytes | Path) -> Stored:
        """See `Store.put`."""
        sha256, size = sha256_of(data)
        with self._written(key, data) as temporary:
            os.replace(temporary, self._path(key))
        return Stored(key=key, sha256=sha256, size=size)

    def get(self, key: str) -> bytes:
        """See `Store.get`."""
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise MissingKey(self.uri, key) from error

    def read(self, key: str, start: int, length: int) -> bytes:
        """See `Store.read`."""
        try:
            with self._path(key).open("rb") as file:
                file.seek(start)
                data = file.read(length)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise MissingKey(self.uri, key) from error
        if len(data) != length:
            raise Unavailable(f"{self.uri}: {key}: {len(data)} bytes from {start}, not {length}: it is cut short")
        return data

    def size(self, key: str) -> int | None:
        """See `Store.size`."""
        path = self._path(key)
        return path.stat().st_size if path.is_file() else None

    def copy(self, source: str, target: str) -> None:
        """See `Store.copy`. A hard link: objects are replaced, never changed in place."""
        path = self._path(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
        try:
            os.link(self._path(source), temporary)
        except FileNotFoundError as error:
            raise MissingKey(self.uri, source) from error
        except OSError:  # a file system without links
            shutil.copyfile(self._path(source), temporary)
        os.replace(temporary, path)

    def create(self, key: str, data: bytes) -> bool:
        """See `Store.create`. Linking fails when the name is taken, which is the one atomic decision."""
        with self._written(key, data) as temporary:
            try:
                os.link(temporary, self._path(key))
            except FileExistsError:
                return False
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
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f"{TEMPORARY}lock-{path.name}").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = self.get_tagged(key)
            if (found[1] if found else None) != tag:
                return False
            self.put(key, data)
        return True

    def keys(self, prefix: str) -> Iterator[str]:
        """See `Store.keys`."""
        root = Path(self.uri)
        found = (path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file())
        return (key for key in found if key.startswith(prefix) and not key.rsplit("/", 1)[-1].startswith(TEMPORARY))

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        self._path(key).unlink(missing_ok=True)

    def check_writable(self) -> None:
        """See `Store.check_writable`. Directories that it has to make are removed again."""
        root = Path(self.uri)
        made = [one for one in (root, *root.parents) if not one.exists()]
        probe = root / f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            root.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"probe")
        except OSError as error:
            raise InputError(
                f"{self.uri}: cannot be written: {error.strerror}", "Choose another publish.to."
            ) from error
        finally:
            if probe.exists():
                probe.unlink()
            for one in made:
                if one.exists():
                    one.rmdir()

    def _path(self, key: str) -> Path:
        return Path(self.uri) / checked_key(key)

    @contextmanager
    def _written(self, key: str, data: bytes | Path) -> Iterator[Path]:
        """A temporary file beside the key's place with the data in it, safely on disk."""
        path = self._path(key)
        temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(data, Path):
                shutil.copyfile(data, temporary)
            else:
                temporary.write_bytes(data)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            yield temporary
        except (NotADirectoryError, PermissionError, FileExistsError) as error:
            raise InputError(f"{self.uri}: {key} cannot be written: {error.strerror}") from error
        except OSError as error:
            raise Unavailable(f"{self.uri}: {key} cannot be written: {error.strerror}") from error
        finally:
            temporary.unlink(missing_ok=True)
