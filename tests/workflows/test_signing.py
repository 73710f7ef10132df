"""Signatures by a user's key: they hold over the files as stored, and for nobody else's tools less than for ours."""

import hashlib
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from cluster.errors import InputError
from cluster.storage import open_store
from jobs.pulling import pull_release, verify_pulled, verify_stored
from workflows.publishing import publish
from workflows.release import find_version
from workflows.signing import SIGNATURE, PrivateKey, PublicKey

DOCUMENTS = {"REPORT.json": b"{}"}


def write_keys(directory, name, key=None, passphrase=None):
    """A pair of PEM files; gives back their paths."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    private, public = directory / f"{name}.pem", directory / f"{name}.pub"
    secret = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secret))
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    directory = tmp_path_factory.mktemp("keys")
    return {name: write_keys(directory, name) for name in ("ours", "others")}


def release(store, text="weights", key=None, version="auto"):
    """Publishes two files, signed if a key is given."""
    files = {
        "model-outer.safetensors": store.put(f"runs/{text}/outer", text.encode() * 100),
        "config.json": store.put(f"runs/{text}/config", b"{}"),
    }
    papers = dict(DOCUMENTS)
    if key:
        digests = {name: stored.sha256 for name, stored in files.items()}
        papers[SIGNATURE] = PrivateKey(key).sign("chat", digests, [*papers, "MANIFEST.json"])
    return publish(store, "chat", version, files, papers, "run-1")


def test_a_signed_release_is_verified_in_the_store_while_pulled_and_afterwards(store, keys, tmp_path):
    private, public = keys["ours"]
    release(store, key=private)
    assert verify_stored(store.uri, "chat", public)[0].signed
    pull_release(store.uri, "chat", tmp_path / "out", public)
    assert verify_pulled(tmp_path / "out", store.uri, public)[0].signed
    assert not verify_pulled(tmp_path / "out", None, None)[0].signed


def test_the_other_tool_verifies_a_pulled_release_too(tmp_path, keys):
    private, public = keys["ours"]
    store = open_store(str(tmp_path / "store"))
    release(store, key=private)
    directory = tmp_path / "out"
    pull_release(store.uri, "chat", directory, public)
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(directory)]
    command += ["--signature", str(directory / SIGNATURE), "--public_key", str(public)]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    (directory / "config.json").write_bytes(b"[]")
    assert subprocess.run(command, check=False, capture_output=True).returncode != 0


def test_anothers_signature_is_refused_and_leaves_no_directory(store, keys, tmp_path):
    release(store, key=keys["others"][0])
    public = keys["ours"][1]
    for act in (
        lambda: verify_stored(store.uri, "chat@1", public),
        lambda: pull_release(store.uri, "chat@1", tmp_path / "out", public),
    ):
        with pytest.raises(InputError, match=r"chat@1: model\.sig does not hold"):
            act()
    assert not (tmp_path / "out").exists()


def test_an_unsigned_release_is_refused_by_who_asks_for_a_signature(store, keys, tmp_path):
    release(store)
    with pytest.raises(InputError, match="carries no signature"):
        pull_release(store.uri, "chat", tmp_path / "out", keys["ours"][1])
    with pytest.raises(InputError, match="carries no signature"):
        verify_stored(store.uri, "chat", keys["ours"][1])
    pull_release(store.uri, "chat", tmp_path / "out")


def test_a_whole_forged_release_is_caught_only_by_the_signature(keys, tmp_path):
    """Who can write the store can make files, manifest and pointer agree; not the signature."""
    private, public = keys["ours"]
    good, forged = open_store(str(tmp_path / "good")), open_store(str(tmp_path / "forged"))
    release(good, key=private)
    pointer = find_version(good, "chat", "1")
    directory = f"models/chat/{pointer.digest[:12]}"
    signature = next(good.get(key) for key in good.keys(directory) if key.endswith(".sig"))
    files = {"config.json": forged.put("runs/x/config", b"evil")}
    publish(forged, "chat", "1", files, DOCUMENTS | {SIGNATURE: signature}, "run-1")
    assert verify_stored(forged.uri, "chat", None)
    with pytest.raises(InputError, match="made over other files"):
        verify_stored(forged.uri, "chat", public)


@pytest.mark.parametrize("bad", [b"", b"{}", b"[]", b"\xff", b"null", b'{"verificationMaterial": {}}', b"[" * 100_000])
def test_what_is_no_signature(keys, bad):
    with pytest.raises(InputError, match=r"model\.sig does not hold"):
        PublicKey(keys["ours"][1]).check(bad, {"config.json": "0" * 64}, "chat@1")


def test_a_signature_of_more_or_fewer_files_does_not_hold(keys):
    private, public = keys["ours"]
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("a", "b")}
    signature = PrivateKey(private).sign("chat", digests, [])
    PublicKey(public).check(signature, digests, "chat@1")
    for other in ({"a": digests["a"]}, digests | {"c": "0" * 64}, digests | {"b": "0" * 64}):
        with pytest.raises(InputError, match="other files"):
            PublicKey(public).check(signature, other, "chat@1")


def test_keys_that_cannot_be_used_are_named(tmp_path):
    for name, key, passphrase in (
        ("rsa", rsa.generate_private_key(65537, 2048), None),
        ("curve", ec.generate_private_key(ec.SECP256K1()), None),
        ("locked", None, b"word"),
    ):
        private, _ = write_keys(tmp_path, name, key, passphrase)
        with pytest.raises(InputError, match=rf"sign_with: .*{name}\.pem"):
            PrivateKey(private)
    for path in (tmp_path / "nothing", tmp_path, tmp_path / "rsa.pub"):
        with pytest.raises(InputError, match=re_path(path)):
            PrivateKey(path)
        with pytest.raises(InputError, match=re_path(path)):
            PublicKey(path)


def re_path(path):
    return str(path).replace(".", r"\.")


def test_a_model_published_unsigned_is_not_called_signed(store, keys):
    release(store)
    with pytest.raises(InputError, match="holds this model already, unsigned"):
        release(store, key=keys["ours"][0])
    assert release(store, key=keys["ours"][0], version="signed").version == "signed"
    assert verify_stored(store.uri, "chat@signed", keys["ours"][1])[0].signed
