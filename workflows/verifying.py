"""Whether a release still is what was published: in the store, or in a directory that it was pulled to."""

from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from cluster.errors import InputError
from cluster.storage import Store, sha256_of
from workflows.release import MANIFEST, Manifest, Pointer, parse_manifest, read_manifest, release_directory
from workflows.signing import SIGNATURE, PublicKey


class Verified(BaseModel):
    """A release all of whose files are what its manifest says."""

    model_config = ConfigDict(frozen=True)

    name: str
    digest: str
    files: int
    size: int
    signed: bool  # by the key that was asked for


def verify_release(store: Store, pointer: Pointer, key: PublicKey | None = None) -> Verified:
    """Checks a release where it lies: manifest, every file, and the signature if a key is given.

    Raises:
        InputError: something is gone or changed; names every such file.
    """
    manifest = read_manifest(store, pointer)
    root = release_directory(pointer.name, pointer.digest)
    which = f"{store.uri}: {pointer.name}@{pointer.version}"
    wrong = [
        file
        for file, stored in sorted(manifest.files.items())
        if not store.verify(stored.model_copy(update={"key": f"{root}/{stored.key}"}))
    ]
    if wrong:
        raise InputError(f"{which}: gone, or not what was published: {', '.join(wrong)}", "Publish it again.")
    if key is not None:
        stored = manifest.files.get(SIGNATURE)
        check_signature(key, manifest, store.get(f"{root}/{stored.key}") if stored else None, which)
    return _verified(manifest, key)


def verify_directory(
    directory: Path,
    key: PublicKey | None = None,
    as_stored: Mapping[str, Callable[[Path], bytes]] | None = None,
) -> tuple[Verified, str]:
    """Checks a pulled release against the manifest beside it, and the signature if a key is given.

    Without a key, and without holding the manifest's sha256 against a store's, this shows damage, not malice: who
    changes a file can change the manifest too.

    Args:
        directory: where it was pulled to.
        key: whose signature it must carry, if any.
        as_stored: release format → what gives a weight file back as it was stored.

    Returns:
        What was verified, and the sha256 of the manifest.

    Raises:
        InputError: a file is missing, changed, or none of the release's; names every such file.
    """
    try:
        text = (directory / MANIFEST).read_bytes()
    except OSError as error:
        raise InputError(f"{directory}: no pulled release: {MANIFEST}: {error.strerror}") from error
    manifest = parse_manifest(text, f"{directory / MANIFEST}")
    restore = (as_stored or {}).get(manifest.format)
    wrong = []
    for file, stored in sorted(manifest.files.items()):
        path = directory / file
        packed = restore is not None and path.suffix == ".safetensors"
        try:
            found = sha256_of(restore(path) if packed and restore else path)
        except (OSError, ValueError):  # gone; or no weight file any more
            found = ("", 0)
        if found != (stored.sha256, stored.size):
            wrong.append(file)
    if wrong:
        raise InputError(f"{directory}: gone, or not what was published: {', '.join(wrong)}", "Pull it again.")
    strangers = sorted({path.name for path in directory.iterdir()} - {*manifest.files, MANIFEST})
    if strangers:
        raise InputError(
            f"{directory}: no files of the release: {', '.join(strangers)}",
            "A file more can be what a runtime loads; take them out, or pull it again.",
        )
    if key is not None:
        signature = (directory / SIGNATURE).read_bytes() if SIGNATURE in manifest.files else None
        check_signature(key, manifest, signature, str(directory))
    return _verified(manifest, key), sha256(text).hexdigest()


def check_signature(key: PublicKey, manifest: Manifest, signature: bytes | None, which: str) -> None:
    """Checks that the key's owner signed the model that a manifest names.

    Raises:
        InputError: there is no signature, or it does not hold.
    """
    if signature is None:
        raise InputError(f"{which} carries no signature", "Verify it without a key, or publish it signed.")
    key.check(signature, {file: stored.sha256 for file, stored in manifest.model.items()}, which)


def _verified(manifest: Manifest, key: PublicKey | None) -> Verified:
    return Verified(
        name=manifest.name,
        digest=manifest.digest,
        files=len(manifest.files),
        size=sum(one.size for one in manifest.files.values()),
        signed=key is not None,
    )
