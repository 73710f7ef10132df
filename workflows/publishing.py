"""The release and its one atomic commit.

Order of writing: documents, model files, manifest, then the pointer `versions/<v>.json`, created only if it is not
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
- The collector of leftovers (`workflows.collecting`) leaves a directory alone in which something is young. A publisher
  therefore writes its documents first, and only then looks whether a collector has claimed the directory: of the two,
  one sees the other. A publisher that was stopped for longer than the collector's limit finds out after its commit,
  and lays out again what is missing.
"""

import hashlib
import itertools
import json
import secrets
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict

from cluster.disk import is_full, not_written
from cluster.errors import InputError, Unavailable
from cluster.storage import MissingKey, Store, Stored
from cluster.version import VERSION
from workflows.release import (
    LATEST,
    MANIFEST,
    STOCK,
    Manifest,
    Pointer,
    alias_key,
    check_files,
    check_name,
    collector_key,
    find_version,
    latest_key,
    model_digest,
    named_object,
    read_manifest,
    read_pointer,
    release_directory,
    version_key,
)
from workflows.signing import SIGNATURE

SWAP_TRIES = 50
COLLECTED_WITHIN = 60.0  # seconds that a publisher waits for a collector at work in its directory


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
        version: "auto" takes the next free number; or a name, which no alias may have.
        model_files: file name in the release → object in `store`.
        documents: file name → content; reports, provenance. At least one.
        run: who publishes.
        form: format of the model files, for who pulls.

    Raises:
        InputError: the version holds another model, or this one unsigned; a name cannot be one.
        Unavailable: the store does not keep what it was given.
    """
    check_name(name)
    check_name(version)
    check_files([*model_files, *documents])
    _check_no_alias(store, name, version)
    digest = model_digest(model_files)
    there, number = _same_model(store, name, version, digest)
    if there is not None:
        _check_signed(store, there, documents)
        _move_latest(store, there)
        return _published(store, there, already=True)
    manifest, stored_manifest = _lay_out(store, name, digest, model_files, documents, form)
    pointer = Pointer(
        name=name,
        version=version,
        digest=digest,
        manifest=named_object(stored_manifest),
        run=run,
        nonce=secrets.token_hex(16),
        created=datetime.now(UTC).isoformat(timespec="microseconds"),
        karikomi=VERSION,
    )
    committed = _commit(store, pointer, number)
    directory = release_directory(name, digest)
    files = [*manifest.files.values(), stored_manifest]
    if committed.nonce == pointer.nonce and any(store.size(f"{directory}/{one.key}") != one.size for one in files):
        _lay_out(store, name, digest, model_files, documents, form)  # stopped so long that it was collected meanwhile
    _check_signed(store, committed, documents)
    _move_latest(store, committed)
    return _published(store, committed, already=committed.nonce != pointer.nonce)


def pull(
    store: Store,
    name: str,
    version: str | None,
    directory: Path,
    convert: Mapping[str, Callable[[Path], None]] | None = None,
    check: Callable[[Path, Manifest], None] | None = None,
) -> PulledRelease:
    """Fetches a release into a new directory; every byte is verified before the directory appears.

    Args:
        store: where it is.
        name: the release's name.
        version: None for the latest.
        directory: must not exist, or be empty.
        convert: release format → what makes a stock directory of the fetched files, in place.
        check: looks at the fetched files, before they are converted, and raises what is wrong with them.

    Raises:
        InputError: no such release; the directory holds something; a file is not what the manifest says.
        Unavailable: the store is out of reach, or the disk is full.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory}: is there and not empty", "Give a new directory.")
    pointer = find_version(store, name, version)
    if pointer is None:
        raise InputError(f"{store.uri}: no release {name}@{version or 'latest'}")
    root = release_directory(name, pointer.digest)
    manifest = read_manifest(store, pointer)
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
            if check:
                check(fetched, manifest)
            if manifest.format != STOCK:
                convert[manifest.format](fetched)
            fetched.rename(directory)  # also onto an empty directory
    except OSError as error:
        if is_full(error):
            raise not_written(str(directory), error) from error
        raise InputError(f"{directory}: cannot be written: {error.strerror}", "Give another directory.") from error
    return PulledRelease(name=name, version=pointer.version, digest=pointer.digest, files=tuple(manifest.files))


def _lay_out(
    store: Store,
    name: str,
    digest: str,
    model_files: Mapping[str, Stored],
    documents: Mapping[str, bytes],
    form: str,
) -> tuple[Manifest, Stored]:
    """Puts every file of a release in its place, each verified; nothing of it is visible yet.

    Documents come first: they are written in any case, so that the directory is young before anything old in it is
    relied on. Where a collector was at work, they are written again: it may have taken them for old ones.

    Raises:
        Unavailable: the store does not keep what it was given, or the collector does not come to an end.
    """
    directory = release_directory(name, digest)
    deadline = time.monotonic() + COLLECTED_WITHIN
    while True:
        put = {file: _put_named_by_content(store, directory, file, content) for file, content in documents.items()}
        claim = store.get_tagged(collector_key(name, digest))
        if claim is None or not collector_at_work(store, claim[0]):
            break
        if time.monotonic() > deadline:
            raise Unavailable(
                f"{store.uri}: {collector_key(name, digest)}: leftovers are being removed there",
                "Run the same command again, later.",
            )
        time.sleep(0.5)
    files = {}
    for file, stored in model_files.items():
        target = stored.model_copy(update={"key": f"{directory}/{file}"})
        if not store.verify(target):
            store.copy(stored.key, target.key)
            if not store.verify(target):
                raise Unavailable(f"{store.uri}: {target.key} is not what was written", "Run the same command again.")
        files[file] = target.model_copy(update={"key": file})
    named = {file: named_object(stored) for file, stored in (files | put).items()}
    manifest = Manifest(name=name, digest=digest, format=form, files=named)
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True).encode()
    return manifest, _put_named_by_content(store, directory, MANIFEST, text)


def collector_at_work(store: Store, claim: bytes) -> bool:
    """Whether a collector's claim still holds: it says until when, by the store's clock."""
    try:
        return store.clock() < datetime.fromisoformat(json.loads(claim)["until"])
    except (ValueError, LookupError, TypeError):
        return False


def _check_no_alias(store: Store, name: str, version: str) -> None:
    """A version and an alias of one name would leave it open which NAME@IT is.

    Raises:
        InputError: the version is `latest` or an alias.
    """
    if version == LATEST or (version != "auto" and store.size(alias_key(name, version)) is not None):
        raise InputError(f"{store.uri}: {name}@{version} is an alias", "Choose another publish.version.")


def _check_signed(store: Store, there: Pointer, documents: Collection[str]) -> None:
    """Who publishes with a signature and finds the model published without one is told: a release never changes.

    Raises:
        InputError: the version that is there is unsigned.
    """
    if SIGNATURE in documents and SIGNATURE not in read_manifest(store, there).files:
        raise InputError(
            f"{store.uri}: {there.name}@{there.version} holds this model already, unsigned (run {there.run})",
            "Choose another publish.version to publish it signed; its files are kept once.",
        )


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
        key = version_key(pointer.name, number)
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
    key = latest_key(pointer.name)
    for _ in range(SWAP_TRIES):
        found = store.get_tagged(key)
        if found is not None and not _is_later(pointer, read_pointer(store, key, pointer.name, None, found[0])):
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
    uri = f"{store.uri}/{release_directory(pointer.name, pointer.digest)}"
    return Published(name=pointer.name, version=pointer.version, digest=pointer.digest, uri=uri, already=already)


def _put_named_by_content(store: Store, directory: str, file: str, content: bytes) -> Stored:
    """Stores REPORT.html as REPORT.<8 of its sha256>.html; the key is relative to the release's directory."""
    plain = PurePosixPath(file)
    key = f"{plain.stem}.{hashlib.sha256(content).hexdigest()[:8]}{plain.suffix}"
    stored = store.put(f"{directory}/{key}", content)
    if not store.verify(stored):
        raise Unavailable(f"{store.uri}: {directory}/{key} is not what was written", "Run the same command again.")
    return stored.model_copy(update={"key": key})


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
