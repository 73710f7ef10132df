"""Releases as a person names them: NAME, NAME@VERSION or NAME@ALIAS; fetched, or verified where they are."""

import re
from pathlib import Path

from cluster.errors import InputError
from cluster.storage import Store, open_store
from workflows.aliases import resolve
from workflows.catalogue import list_pointers
from workflows.formats.compact import pack_bytes
from workflows.formats.huggingface import unpack_directory
from workflows.publishing import PulledRelease, pull
from workflows.release import MANIFEST, Manifest, Pointer
from workflows.signing import SIGNATURE, PublicKey
from workflows.verifying import Verified, check_signature, verify_directory, verify_release

CONVERT = {"compact": unpack_directory}
AS_STORED = {"compact": lambda file: pack_bytes(file.read_bytes())}


def pull_release(store: str, release: str, directory: Path, key: Path | None = None) -> PulledRelease:
    """Fetches a release.

    Args:
        store: address of the store.
        release: NAME, NAME@VERSION or NAME@ALIAS.
        directory: new or empty.
        key: public key of whoever must have signed it, if any.

    Raises:
        InputError: no such release, the directory is not empty, or the signature does not hold.
    """
    public = PublicKey(key) if key else None
    where = open_store(store)
    pointer = find_release(where, release)

    def check(fetched: Path, manifest: Manifest) -> None:
        if public:
            signature = (fetched / SIGNATURE).read_bytes() if SIGNATURE in manifest.files else None
            check_signature(public, manifest, signature, f"{where.uri}: {pointer.name}@{pointer.version}")

    return pull(where, pointer.name, pointer.version, directory, CONVERT, check)


def find_release(store: Store, release: str) -> Pointer:
    """The version that a person means.

    Raises:
        InputError: it is no way to name a release, or there is no such one.
    """
    found = re.fullmatch(r"([a-z0-9][a-z0-9._-]{0,62})(?:@([A-Za-z0-9][A-Za-z0-9._-]{0,62}))?", release)
    if not found:
        raise InputError(f'"{release}" is no release; write NAME, NAME@VERSION or NAME@ALIAS')
    return resolve(store, found[1], found[2])


def verify_stored(store: str, release: str, key: Path | None) -> tuple[Verified, str]:
    """Verifies a release in the store; gives back what was found and what it is called.

    Raises:
        InputError: no such release, it is damaged, or the signature does not hold.
    """
    public = PublicKey(key) if key else None
    where = open_store(store)
    pointer = find_release(where, release)
    return verify_release(where, pointer, public), f"{pointer.name}@{pointer.version} in {where.uri}"


def verify_pulled(directory: Path, store: str | None, key: Path | None) -> tuple[Verified, str]:
    """Verifies a pulled release; with a store, also that its manifest is one that a version there names.

    Raises:
        InputError: it is damaged, no version names its manifest, or the signature does not hold.
    """
    verified, manifest = verify_directory(directory, PublicKey(key) if key else None, AS_STORED)
    if store is None:
        return verified, f"{verified.name} in {directory}"
    where = open_store(store)
    versions = [one.version for one in list_pointers(where, verified.name) if one.manifest.sha256 == manifest]
    if not versions:
        raise InputError(f"{directory / MANIFEST} is not that of any version of {verified.name} in {where.uri}")
    return verified, f"{verified.name}@{versions[0]} in {directory}"
