"""A release's signature: by a key that the user gives, over the model files as stored, in OpenSSF model-signing's form.

The signature names each model file by its sha256, which is known already: nothing is fetched to sign a release or to
check one in the store. It is a document of the release, `model.sig`, and the `model_signing` command line can check
it against a pulled directory as well. Signing needs no network; the package is an extra.
"""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import InputError

if TYPE_CHECKING:
    from model_signing.manifest import Manifest

SIGNATURE = "model.sig"
INSTALL = "pip install 'karikomi[signing]'"
MAKE_KEYS = (
    "Make a pair with: openssl ecparam -name prime256v1 -genkey -noout -out key.pem && "
    "openssl ec -in key.pem -pubout -out key.pub"
)


class PrivateKey:
    """A user's key to sign with. Its content is read when it signs, and kept nowhere.

    Args:
        path: a PEM file with an elliptic-curve key (P-256, P-384 or P-521) that no passphrase protects.

    Raises:
        InputError: it cannot be used, or the extra is not installed.
    """

    def __init__(self, path: Path) -> None:
        _import()
        from model_signing import signing

        self.path = path
        try:
            signing.Config().use_elliptic_key_signer(private_key=path)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"publish.sign_with: {path} is no private key that can sign: {_reason(error)}", MAKE_KEYS
            ) from error

    def sign(self, name: str, digests: Mapping[str, str], documents: Iterable[str]) -> bytes:
        """The signature over a release's model files.

        Args:
            name: the release's name; informative.
            digests: file name → sha256.
            documents: names of the files beside them that are not signed, so that others' tools ignore them.
        """
        from model_signing import signing

        with tempfile.TemporaryDirectory() as directory:
            signature = Path(directory) / SIGNATURE
            config = signing.Config().use_elliptic_key_signer(private_key=self.path)
            config.set_hashing_config(_known(name, digests, sorted({*documents, SIGNATURE}))).sign(name, signature)
            return signature.read_bytes()


class PublicKey:
    """Whose signature is asked for.

    Args:
        path: the PEM file of a public elliptic-curve key.

    Raises:
        InputError: it is none, or the extra is not installed.
    """

    def __init__(self, path: Path) -> None:
        _import()
        from model_signing import verifying

        self.path = path
        try:
            verifying.Config().use_elliptic_key_verifier(public_key=path)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"--key: {path} is no public key: {_reason(error)}", MAKE_KEYS) from error

    def check(self, signature: bytes, digests: Mapping[str, str], which: str) -> None:
        """Checks that the key's owner signed exactly these files.

        Args:
            signature: content of the release's `model.sig`.
            digests: file name → sha256 of every model file.
            which: names the release in errors.

        Raises:
            InputError: another key signed it, it is no signature, or it is of other files.
        """
        from cryptography.exceptions import InvalidSignature
        from model_signing import verifying

        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / SIGNATURE
            file.write_bytes(signature)
            config = verifying.Config().use_elliptic_key_verifier(public_key=self.path)
            try:
                config.set_hashing_config(_known("", digests, [])).verify(directory, file)
            except InvalidSignature as error:
                raise InputError(f"{which}: {SIGNATURE} was not made by the owner of {self.path}") from error
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise InputError(f"{which}: {SIGNATURE} does not hold: {_reason(error)}") from error


def _known(name: str, digests: Mapping[str, str], ignored: list[str]) -> Any:
    """What stands in for model-signing's own hashing: it hands over digests that are known, and reads no file.

    Made here, not at the top, because the package is an extra. It follows `model_signing.hashing.Config`, on which
    both `sign` and `verify` call `hash`, and `verify` also `add_ignored_paths` with what the signer ignored.
    """
    from model_signing import hashing, manifest
    from model_signing._hashing.hashing import Digest

    class KnownDigests(hashing.Config):
        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> "Manifest":
            items = [
                manifest.FileManifestItem(path=Path(file), digest=Digest("sha256", bytes.fromhex(sha256)))
                for file, sha256 in digests.items()
            ]
            arguments = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": ignored}
            return manifest.Manifest(name, items, manifest.SerializationType.from_args(arguments))

        def add_ignored_paths(self, *, model_path: Any, paths: Any) -> None:
            """Nothing is read, so nothing is ignored: every model file must be signed."""

    return KnownDigests()


def _import() -> None:
    try:
        import model_signing  # noqa: F401
    except ImportError as error:
        raise InputError(f"signatures need an extra: {error}", INSTALL) from error


def _reason(error: Exception) -> str:
    """The first line of another library's error, in words where the library has none."""
    if isinstance(error, AttributeError) and "curve" in str(error):
        return "it is no elliptic-curve key"
    if str(error).startswith("Signature mismatch"):
        return "it was made over other files than these"
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
