"""What a release is in the store: a directory of files, a manifest that names them, and a pointer that is the commit.

    models/<name>/<digest12>/           the files; 12 characters of the model's digest
    models/<name>/versions/<v>.json     a version's pointer, created once
    models/<name>/latest.json           the pointer of the latest one

Readers start at a pointer and verify what it names: neither is trusted for what it says of keys and digests.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import PureWindowsPath
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import InputError
from cluster.storage import MissingKey, Store, Stored

MANIFEST = "MANIFEST.json"
LATEST = "latest"
VERSION_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
FILE_NAME = r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}"
LARGEST_MANIFEST = 4 << 20  # bytes; some 20 000 files
LARGEST_POINTER = 64 << 10  # bytes
STOCK = "huggingface"  # the format that needs no converting

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Object(Stored):
    """An object as a release names it: what is read of another's manifest is checked more strictly than our own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: Digest
    size: Annotated[int, Field(ge=0, lt=1 << 63)]


class Manifest(BaseModel):
    """Every file of a release: its name there → the object, relative to the release's directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    digest: Digest
    format: str
    files: Annotated[dict[str, Object], Field(min_length=1)]

    @property
    def model(self) -> dict[str, Object]:
        """The files that make the model: all but the documents, which are kept under other names than their own."""
        return {file: stored for file, stored in self.files.items() if stored.key == file}


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


def model_digest(files: Mapping[str, Stored]) -> str:
    """The model's identity: sha256 over the names and digests of its weights, config and tokenizer files."""
    names = {name: stored.sha256 for name, stored in files.items()}
    return hashlib.sha256(json.dumps(names, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def find_version(store: Store, name: str, version: str | None) -> Pointer | None:
    """The pointer of a version, or of the latest one; None when there is none.

    Raises:
        InputError: the pointer is no pointer, or another release's.
    """
    check_name(name)
    if version is not None:
        check_name(version)
    key = latest_key(name) if version is None else version_key(name, version)
    try:
        return read_pointer(store, key, name, version, store.get(key))
    except MissingKey:
        return None


def read_manifest(store: Store, pointer: Pointer) -> Manifest:
    """The manifest that a pointer names, and that holds the model that it names.

    Raises:
        InputError: it is gone, was changed, or is of another model.
    """
    which = f"{store.uri}: the manifest of {pointer.name}@{pointer.version}"
    key = f"{release_directory(pointer.name, pointer.digest)}/{plain_file(pointer.manifest.key)}"
    if pointer.manifest.size > LARGEST_MANIFEST:
        raise InputError(f"{which} is too large: {pointer.manifest.size} bytes")
    found = store.size(key)
    if found is None:
        raise InputError(f"{which} is gone")
    text = store.get(key) if found == pointer.manifest.size else b""
    if hashlib.sha256(text).hexdigest() != pointer.manifest.sha256:
        raise InputError(f"{which} was changed after it was published")
    manifest = parse_manifest(text, which)
    if (manifest.name, manifest.digest) != (pointer.name, pointer.digest):
        raise InputError(f"{which} is of another model than the version names")
    return manifest


def parse_manifest(text: bytes, which: str) -> Manifest:
    """A manifest, if it is one and consistent in itself; `which` names it in errors.

    Raises:
        InputError: it is not.
    """
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise InputError(f"{which} cannot be read: {error}", "Another version of karikomi wrote it.") from error
    check_files(manifest.files)
    for stored in manifest.files.values():
        plain_file(stored.key)
    if manifest.digest != model_digest(manifest.model):
        raise InputError(f"{which} is of another model than its digest says")
    return manifest


def read_pointer(store: Store, key: str, name: str, version: str | None, text: bytes) -> Pointer:
    """The pointer in an object, if it is the one that belongs there."""
    if len(text) > LARGEST_POINTER:
        raise InputError(f"{store.uri}: {key} is no version pointer: {len(text)} bytes is too large")
    try:
        pointer = Pointer.model_validate_json(text)
    except ValidationError as error:
        raise InputError(f"{store.uri}: {key} is no version pointer: {error}") from error
    if pointer.name != name or version not in (None, pointer.version):
        raise InputError(f"{store.uri}: {key} is the pointer of {pointer.name}@{pointer.version}; it was put there")
    check_name(pointer.version)
    return pointer


def release_directory(name: str, digest: str) -> str:
    """Where the files of a model lie."""
    return f"models/{name}/{digest[:12]}"


def version_key(name: str, version: str) -> str:
    """Where a version's pointer is."""
    return f"models/{name}/versions/{version}.json"


def latest_key(name: str) -> str:
    """Where the pointer to the latest version is."""
    return f"models/{name}/{LATEST}.json"


def alias_key(name: str, alias: str) -> str:
    """Where an alias is (see `workflows.catalogue`)."""
    return f"models/{name}/aliases/{alias}.json"


def collector_key(name: str, digest: str) -> str:
    """What a collector of leftovers leaves as long as it is at work in a release's directory."""
    return f"models/{name}/collecting/{digest[:12]}.json"


def check_name(name: str) -> None:
    """Names and versions become parts of keys.

    Raises:
        InputError: it cannot be one.
    """
    if not re.fullmatch(VERSION_NAME, name):
        raise InputError(f"{name!r} names no release or version", "Letters, digits, '.', '_' and '-', at most 63.")


def check_files(names: Collection[str]) -> None:
    """Files of a release: plain names, no two of which would be one file, on any file system.

    Raises:
        InputError: they are not.
    """
    seen = {MANIFEST.casefold()}
    for name in names:
        if plain_file(name).casefold() in seen:
            raise InputError(f"the release has two files {name!r}")
        seen.add(name.casefold())


def plain_file(file: str) -> str:
    """A file name that is plain on every file system: no way out, nothing hidden, no device of Windows.

    Raises:
        InputError: it is not.
    """
    if not re.fullmatch(FILE_NAME, file) or file.endswith(".") or PureWindowsPath(file).is_reserved():
        raise InputError(f"the release names a file {file!r}; only plain file names are taken")
    return file


def named_object(stored: Stored) -> Object:
    """An object of ours as a release names it."""
    return Object(**stored.model_dump())
