"""The release and its one atomic commit.

Order of writing: model files (content the digest names), documents, manifest, then the pointer
`versions/<v>.json`, created only if it is not there. Readers start at a pointer and verify what it names, so
nothing before the pointer is ever seen. Documents and manifest are stored under names that contain their own sha256:
two runs that reach the same model have different timings, hence different reports, and neither may replace the
other's under a pointer that vouches for it.
"""

import hashlib
import json
import secrets
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.errors import InputError, Unavailable
from cluster.storage import MissingKey, Store, Stored
from cluster.version import VERSION

MOST_VERSIONS = 100_000
SWAP_TRIES = 50


class Manifest(BaseModel):
    """Every file of a release: its name there → the object, relative to the release's directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    digest: str
    format: str
    files: dict[str, Stored]


class Pointer(BaseModel):
    """The commit: a version names one digest and one manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: str
    digest: str
    manifest: Stored
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
        InputError: the pointer is no pointer.
    """
    key = f"models/{name}/versions/{version}.json" if version else f"models/{name}/latest.json"
    try:
        return Pointer.model_validate_json(store.get(key))
    except MissingKey:
        return None
    except ValidationError as error:
        raise InputError(f"{store.uri}: {key} is no version pointer: {error}") from error


def publish(
    store: Store,
    name: str,
    version: str,
    model_files: Mapping[str, Stored],
    documents: Mapping[str, bytes],
    run: str,
    form: str = "huggingface",
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
        InputError: the version holds another model.
        Unavailable: the store does not keep what it was given.
    """
    digest = model_digest(model_files)
    if (taken := _same_model(store, name, version, digest)) is not None:
        return taken
    directory = f"models/{name}/{digest[:12]}"
    files = {}
    for file, stored in model_files.items():
        target = stored.model_copy(update={"key": f"{directory}/{file}"})
        if store.size(target.key) != stored.size or not store.verify(target):
            store.copy(stored.key, target.key)
            if not store.verify(target):
                raise Unavailable(f"{store.uri}: {target.key} is not what was written", "Run the same command again.")
        files[file] = target.model_copy(update={"key": file})
    for file, content in documents.items():
        files[file] = _put_named_by_content(store, directory, file, content)
    manifest = Manifest(name=name, digest=digest, format=form, files=files)
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True).encode()
    stored_manifest = _put_named_by_content(store, directory, "MANIFEST.json", text)
    pointer = Pointer(
        name=name,
        version=version,
        digest=digest,
        manifest=stored_manifest,
        run=run,
        nonce=secrets.token_hex(16),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        karikomi=VERSION,
    )
    committed = _commit(store, pointer)
    if committed.nonce == pointer.nonce:
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
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory}: is there and not empty", "Give a new directory.")
    pointer = find_version(store, name, version)
    if pointer is None:
        raise InputError(f"{store.uri}: no release {name}@{version or 'latest'}")
    root = f"models/{name}/{pointer.digest[:12]}"
    manifest = _manifest(store, root, pointer)
    directory.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=directory.absolute().parent) as temporary:
        fetched = Path(temporary) / "release"
        fetched.mkdir()
        for file, stored in manifest.files.items():
            _fetch(store, f"{root}/{stored.key}", stored, fetched / file)
        (fetched / "MANIFEST.json").write_bytes(store.get(f"{root}/{pointer.manifest.key}"))
        if convert and manifest.format in convert:
            convert[manifest.format](fetched)
        if directory.exists():
            directory.rmdir()
        fetched.rename(directory)
    return PulledRelease(name=name, version=pointer.version, digest=pointer.digest, files=tuple(manifest.files))


def _same_model(store: Store, name: str, version: str, digest: str) -> Published | None:
    """The version that already holds this model. With "auto" any number will do, so publishing twice is one release.

    Raises:
        InputError: the version asked for holds another model.
    """
    candidates = [version] if version != "auto" else map(str, range(1, MOST_VERSIONS))
    for candidate in candidates:
        pointer = find_version(store, name, candidate)
        if pointer is None:
            return None
        if pointer.digest == digest:
            return _published(store, pointer, already=True)
        if version != "auto":
            raise _taken(store, pointer)
    return None


def _commit(store: Store, pointer: Pointer) -> Pointer:
    """Writes the one pointer that makes the release visible; gives back the pointer that stands there now."""
    numbers = map(str, range(1, MOST_VERSIONS)) if pointer.version == "auto" else [pointer.version]
    for number in numbers:
        mine = pointer.model_copy(update={"version": number})
        if store.create(f"models/{pointer.name}/versions/{number}.json", mine.model_dump_json(indent=1).encode()):
            return mine
        there = find_version(store, pointer.name, number)
        if there is not None and there.nonce == mine.nonce:  # our own success, its reply was lost
            return there
        if there is not None and there.digest == mine.digest:  # another publisher of the same model was first
            return there
        if there is not None and pointer.version != "auto":
            raise _taken(store, there)
    raise Unavailable(f"{store.uri}: no free version of {pointer.name}")


def _move_latest(store: Store, pointer: Pointer) -> None:
    """Moves `latest` by compare-and-swap, never from a higher number to a lower one."""
    key = f"models/{pointer.name}/latest.json"
    for _ in range(SWAP_TRIES):
        found = store.get_tagged(key)
        if found is not None:
            there = Pointer.model_validate_json(found[0])
            if there.version.isdigit() and pointer.version.isdigit() and int(there.version) > int(pointer.version):
                return
        if store.swap(key, pointer.model_dump_json(indent=1).encode(), found[1] if found else None):
            return
    raise Unavailable(f"{store.uri}: {key} keeps changing", "Run the same command again.")


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
    stem, dot, suffix = file.rpartition(".")
    key = f"{stem}.{hashlib.sha256(content).hexdigest()[:8]}{dot}{suffix}"
    stored = store.put(f"{directory}/{key}", content)
    if not store.verify(stored):
        raise Unavailable(f"{store.uri}: {directory}/{key} is not what was written", "Run the same command again.")
    return stored.model_copy(update={"key": key})


def _manifest(store: Store, root: str, pointer: Pointer) -> Manifest:
    try:
        text = store.get(f"{root}/{_safe(pointer.manifest.key)}")
    except MissingKey as error:
        raise InputError(f"{store.uri}: the manifest of {pointer.name}@{pointer.version} is gone") from error
    if hashlib.sha256(text).hexdigest() != pointer.manifest.sha256:
        raise InputError(
            f"{store.uri}: the manifest of {pointer.name}@{pointer.version} was changed after it was published"
        )
    manifest = Manifest.model_validate_json(text)
    for file, stored in manifest.files.items():
        _safe(file)
        _safe(stored.key)
    return manifest


def _safe(file: str) -> str:
    """A plain file name, as far as another's manifest may name one.

    Raises:
        InputError: it could lead out of the directory.
    """
    if not file or file != PurePosixPath(file).name or file in (".", "..") or "\\" in file or "\0" in file:
        raise InputError(f"the manifest names a file {file!r}; a release has plain file names only")
    return file


def _fetch(store: Store, key: str, stored: Stored, path: Path) -> None:
    found, size = hashlib.sha256(), 0
    try:
        with path.open("xb") as file:
            for piece in store.stream(key):
                found.update(piece)
                size += len(piece)
                file.write(piece)
    except MissingKey as error:
        raise InputError(f"{store.uri}: {key} is gone; the release is damaged") from error
    if (found.hexdigest(), size) != (stored.sha256, stored.size):
        raise InputError(f"{store.uri}: {key} is not what the manifest says (sha256 differs); the release is damaged")
