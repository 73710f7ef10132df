"""The release and its one atomic commit.

Order of writing: model files, documents, manifest, then the pointer `versions/<v>.json`, created only if it is not
there, then `latest`. Readers start at a pointer and verify what it names; they never list. Why races are harmless:

- Model files lie under a directory named by the digest of all of them, so whoever writes one writes the same bytes;
  a leftover that differs is damage, and is written again.
- Documents and manifest are stored under names that contain their own sha256: two runs that reach the same model
  have different timings, hence different reports, and neither may replace the other's under a pointer that vouches
  for it. The manifest maps plain names to stored ones; a loser's documents are named by nobody.
- The pointer is created once, by one writer, and never changed. Whoever loses reads who won: the same model is a
  success, another one is an error (or, with "auto", the next number). Numbers are tried in order without a gap, so
  that two publishers of one model meet at the same number.
- `latest` only ever moves forward. A publisher that dies before moving it leaves that to whoever publishes the same
  model next, for which everything else is done already.
"""

import hashlib
import itertools
import json
import re
import secrets
import tempfile
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.disk import is_full, not_written
from cluster.errors import InputError, Unavailable
from cluster.storage import MissingKey, Store, Stored
from cluster.version import VERSION

SWAP_TRIES = 50
MANIFEST = "MANIFEST.json"
VERSION_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
FILE_NAME = r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}"
LARGEST_MANIFEST = 4 << 20  # bytes; some 20 000 files
LARGEST_POINTER = 64 << 10  # bytes
STOCK = "huggingface"  # the format that needs no converting

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Object(Stored):
    """An object as a release names it: what is read of another's manifest is checked more strictly than our own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: Annotated[int, Field(ge=0, lt=1 << 63)]


class Manifest(BaseModel):
    """Every file of a release: its name there → the object, relative to the release's directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    digest: Digest
    format: str
    files: Annotated[dict[str, Object], Field(min_length=1)]


class Pointer(BaseModel):
    """The commit: a version names one digest and one manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: str
    digest: Digest
    manifest: Object
    run: str
    nonce: str
    created: str
    karikomi: str


class Published(BaseModel):
    """Where a release is. `already`: it was there before this call."""

    model_config = ConfigDict(frozen=True)

    name: str
    version: str
    digest: str
    uri: str
    already: bool


class PulledRelease(BaseModel):
    """A release that was fetched and verified."""

    model_config = ConfigDict(frozen=True)

    name: str
    version: str
    digest: str
    files: tuple[str, ...]


def model_digest(files: Mapping[str, Stored]) -> str:
    """The model's identity: sha256 over the names and digests of its weights, config and tokenizer files."""
    names = {name: stored.sha256 for name, stored in files.items()}
    return hashlib.sha256(json.dumps(names, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def find_version(store: Store, name: str, version: str | None) -> Pointer | None:
    """The pointer of a version, or of the latest one; None when there is none.

    Raises:
        InputError: the pointer is no pointer, or another release's.
    """
    _check_name(name)
    if version is not None:
        _check_name(version)
    key = _latest_key(name) if version is None else _version_key(name, version)
    try:
        return _pointer(store, key, name, version, store.get(key))
    except MissingKey:
        return None


def publish(
    store: Store,
    name: str,
    version: str,
    model_files: Mapping[str, Stored],
    documents: Mapping[str, bytes],
    run: str,
    form: str = STOCK,
) -> Published:
    """Makes a release visible, once.

    Args:
        store: holds the model files already, and takes the release.
        name: the release's name.
        version: "auto" takes the next free number; or a name.
        model_files: file name in the release → object in `store`.
        documents: file name → content; reports, provenance.
        run: who publishes.
        form: format of the model files, for who pulls.

    Raises:
        InputError: the version holds another model; a name cannot be one.
        Unavailable: the store does not keep what it was given.
    """
    _check_name(name)
    _check_name(version)
    _check_files([*model_files, *documents])
    digest = model_digest(model_files)
    there, number = _same_model(store, name, version, digest)
    if there is not None:
        _move_latest(store, there)
        return _published(store, there, already=True)
    directory = f"models/{name}/{digest[:12]}"
    files = {}
    for file, stored in model_files.items():
        target = stored.model_copy(update={"key": f"{directory}/{file}"})
        if not store.verify(target):
            store.copy(stored.key, target.key)
            if not store.verify(target):
                raise Unavailable(f"{store.uri}: {target.key} is not what was written", "Run the same command again.")
        files[file] = target.model_copy(update={"key": file})
    for file, content in documents.items():
        files[file] = _put_named_by_content(store, directory, file, content)
    manifest = Manifest(
        name=name, digest=digest, format=form, files={file: _object(stored) for file, stored in files.items()}
    )
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True).encode()
    stored_manifest = _put_named_by_content(store, directory, MANIFEST, text)
    pointer = Pointer(
        name=name,
        version=version,
        digest=digest,
        manifest=_object(stored_manifest),
        run=run,
        nonce=secrets.token_hex(16),
        created=datetime.now(UTC).isoformat(timespec="microseconds"),
        karikomi=VERSION,
    )
    committed = _commit(store, pointer, number)
    _move_latest(store, committed)
    return _published(store, committed, already=committed.nonce != pointer.nonce)


def pull(
    store: Store,
    name: str,
    version: str | None,
    directory: Path,
    convert: Mapping[str, Callable[[Path], None]] | None = None,
) -> PulledRelease:
    """Fetches a release into a new directory; every byte is verified before the directory appears.

    Args:
        store: where it is.
        name: the release's name.
        version: None for the latest.
        directory: must not exist, or be empty.
        convert: release format → what makes a stock directory of the fetched files, in place.

    Raises:
        InputError: no such release; the directory holds something; a file is not what the manifest says.
        Unavailable: the store is out of reach, or the disk is full.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory}: is there and not empty", "Give a new directory.")
    pointer = find_version(store, name, version)
    if pointer is None:
        raise InputError(f"{store.uri}: no release {name}@{version or 'latest'}")
    root = f"models/{name}/{pointer.digest[:12]}"
    manifest = _manifest(store, root, pointer)
    convert = convert or {}
    if manifest.format not in (STOCK, *convert):
        raise InputError(f"{store.uri}: the format of {name}@{pointer.version}, {manifest.format!r}, is not known here")
    try:
        directory.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=directory.absolute().parent) as temporary:
            fetched = Path(temporary) / "release"
            fetched.mkdir()
            for file, stored in {**manifest.files, MANIFEST: pointer.manifest}.items():
                _fetch(store, f"{root}/{stored.key}", stored, fetched / file)
            if manifest.format != STOCK:
                convert[manifest.format](fetched)
            fetched.rename(directory)  # also onto an empty directory
    except OSError as error:
        if is_full(error):
            raise not_written(str(directory), error) from error
        raise InputError(f"{directory}: cannot be written: {error.strerror}", "Give another directory.") from error
    return PulledRelease(name=name, version=pointer.version, digest=pointer.digest, files=tuple(manifest.files))


def _same_model(store: Store, name: str, version: str, digest: str) -> tuple[Pointer | None, int]:
    """The version that already holds this model, or None and, with "auto", the first free number.

    With "auto" any number will do, so that publishing twice is one release.

    Raises:
        InputError: the version asked for holds another model.
    """
    if version != "auto":
        there = find_version(store, name, version)
        if there is not None and there.digest != digest:
            raise _taken(store, there)
        return there, 0
    for number in itertools.count(1):
        there = find_version(store, name, str(number))
        if there is None or there.digest == digest:
            return there, number
    raise AssertionError("unreachable")


def _commit(store: Store, pointer: Pointer, first: int) -> Pointer:
    """Writes the one pointer that makes the release visible; gives back the pointer that stands there now."""
    numbers = map(str, itertools.count(first)) if pointer.version == "auto" else [pointer.version]
    for number in numbers:
        mine = pointer.model_copy(update={"version": number})
        key = _version_key(pointer.name, number)
        if store.create(key, mine.model_dump_json(indent=1).encode()):
            return mine
        there = find_version(store, pointer.name, number)
        if there is None:
            raise Unavailable(f"{store.uri}: {key} comes and goes", "Run the same command again.")
        if there.nonce == mine.nonce:  # our own success, its reply was lost
            return there
        if there.digest == mine.digest:  # another publisher of the same model was first
            return there
        if pointer.version != "auto":
            raise _taken(store, there)
    raise AssertionError("unreachable")


def _move_latest(store: Store, pointer: Pointer) -> None:
    """Moves `latest` by compare-and-swap, only ever forward."""
    key = _latest_key(pointer.name)
    for _ in range(SWAP_TRIES):
        found = store.get_tagged(key)
        if found is not None and not _is_later(pointer, _pointer(store, key, pointer.name, None, found[0])):
            return
        if store.swap(key, pointer.model_dump_json(indent=1).encode(), found[1] if found else None):
            return
    raise Unavailable(f"{store.uri}: {key} keeps changing", "Run the same command again.")


def _is_later(one: Pointer, other: Pointer) -> bool:
    """Numbers by their order; where a version is a name, by the time of commit, the other staying on a draw."""
    if one.version.isdigit() and other.version.isdigit():
        return int(one.version) > int(other.version)
    return one.created > other.created


def _taken(store: Store, pointer: Pointer) -> InputError:
    return InputError(
        f"{store.uri}: {pointer.name}@{pointer.version} holds another model ({pointer.digest[:12]}, run {pointer.run})",
        "Choose another publish.version, or version: auto.",
    )


def _published(store: Store, pointer: Pointer, already: bool) -> Published:
    uri = f"{store.uri}/models/{pointer.name}/{pointer.digest[:12]}"
    return Published(name=pointer.name, version=pointer.version, digest=pointer.digest, uri=uri, already=already)


def _put_named_by_content(store: Store, directory: str, file: str, content: bytes) -> Stored:
    """Stores REPORT.html as REPORT.<8 of its sha256>.html; the key is relative to the release's directory."""
    plain = PurePosixPath(file)
    key = f"{plain.stem}.{hashlib.sha256(content).hexdigest()[:8]}{plain.suffix}"
    stored = store.put(f"{directory}/{key}", content)
    if not store.verify(stored):
        raise Unavailable(f"{store.uri}: {directory}/{key} is not what was written", "Run the same command again.")
    return stored.model_copy(update={"key": key})


def _latest_key(name: str) -> str:
    return f"models/{name}/latest.json"


def _version_key(name: str, version: str) -> str:
    return f"models/{name}/versions/{version}.json"


def _pointer(store: Store, key: str, name: str, version: str | None, text: bytes) -> Pointer:
    """The pointer in an object, if it is the one that belongs there."""
    if len(text) > LARGEST_POINTER:
        raise InputError(f"{store.uri}: {key} is no version pointer: {len(text)} bytes is too large")
    try:
        pointer = Pointer.model_validate_json(text)
    except ValidationError as error:
        raise InputError(f"{store.uri}: {key} is no version pointer: {error}") from error
    if pointer.name != name or version not in (None, pointer.version):
        raise InputError(f"{store.uri}: {key} is the pointer of {pointer.name}@{pointer.version}; it was put there")
    _check_name(pointer.version)
    return pointer


def _manifest(store: Store, root: str, pointer: Pointer) -> Manifest:
    """The manifest that a pointer names, and that holds the model that it names.

    Raises:
        InputError: it is gone, was changed, or is of another model.
    """
    which = f"{store.uri}: the manifest of {pointer.name}@{pointer.version}"
    key, size = f"{root}/{_plain(pointer.manifest.key)}", pointer.manifest.size
    if size > LARGEST_MANIFEST:
        raise InputError(f"{which} is too large: {size} bytes")
    found = store.size(key)
    if found is None:
        raise InputError(f"{which} is gone")
    text = store.get(key) if found == size else b""
    if hashlib.sha256(text).hexdigest() != pointer.manifest.sha256:
        raise InputError(f"{which} was changed after it was published")
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise InputError(f"{which} cannot be read: {error}", "Another version of karikomi wrote it.") from error
    _check_files(manifest.files)
    for stored in manifest.files.values():
        _plain(stored.key)
    model = {file: stored for file, stored in manifest.files.items() if stored.key == file}  # documents: other names
    if manifest.name != pointer.name or not manifest.digest == pointer.digest == model_digest(model):
        raise InputError(f"{which} is of another model than the version names")
    return manifest


def _object(stored: Stored) -> Object:
    return Object(**stored.model_dump())


def _check_name(name: str) -> None:
    """Names and versions become parts of keys.

    Raises:
        InputError: it cannot be one.
    """
    if not re.fullmatch(VERSION_NAME, name):
        raise InputError(f"{name!r} names no release or version", "Letters, digits, '.', '_' and '-', at most 63.")


def _check_files(names: Collection[str]) -> None:
    """Files of a release: plain names, no two of which would be one file, on any file system.

    Raises:
        InputError: they are not.
    """
    seen = {MANIFEST.casefold()}
    for name in names:
        if _plain(name).casefold() in seen:
            raise InputError(f"the release has two files {name!r}")
        seen.add(name.casefold())


def _plain(file: str) -> str:
    """A file name that is plain on every file system: no way out, nothing hidden, no device of Windows.

    Raises:
        InputError: it is not.
    """
    if not re.fullmatch(FILE_NAME, file) or file.endswith(".") or PureWindowsPath(file).is_reserved():
        raise InputError(f"the release names a file {file!r}; only plain file names are taken")
    return file


def _fetch(store: Store, key: str, stored: Stored, path: Path) -> None:
    """One file of a release, verified while it comes in.

    Raises:
        InputError: it is gone, or not what the manifest says.
    """
    size = store.size(key)
    if size != stored.size:  # before a byte of it is fetched
        told = "is gone" if size is None else f"has {size} bytes, the manifest says {stored.size}"
        raise InputError(f"{store.uri}: {key} {told}; the release is damaged")
    try:
        found = store.download(key, path)
    except MissingKey as error:
        raise InputError(f"{store.uri}: {key} is gone; the release is damaged") from error
    if (found.sha256, found.size) != (stored.sha256, stored.size):
        raise InputError(f"{store.uri}: {key} is not what the manifest says (sha256 differs); the release is damaged")
