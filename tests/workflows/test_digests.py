"""A model's files are read through once, and again when they changed."""

import hashlib
import os
import time

import pytest

from cluster.storage import open_store
from workflows.models import digests as module
from workflows.models.digests import SETTLED, digests

NAMES = ("a.safetensors", "b.safetensors")


@pytest.fixture
def read(monkeypatch):
    """Names of the files that were read through."""
    names = []
    monkeypatch.setattr(
        module, "_digest", lambda store, name, real=module._digest: names.append(name) or real(store, name)
    )
    return names


def write(store, name: str, content: bytes) -> None:
    """A file that has lain there for a while."""
    store.put(name, content)
    if not store.uri.startswith("s3://"):
        long_ago = time.time() - 100 * SETTLED.total_seconds()
        os.utime(f"{store.uri}/{name}", (long_ago, long_ago))


def test_files_that_did_not_change_are_not_read_again(store, tmp_path, read, monkeypatch):
    monkeypatch.setattr(module, "SETTLED", SETTLED if not store.uri.startswith("s3://") else -SETTLED)
    for name in NAMES:
        write(store, name, name.encode())
    sizes = dict.fromkeys(NAMES, 13)
    first = digests(store, sizes, tmp_path / "cache")
    assert [one.sha256 for one in first] == [hashlib.sha256(name.encode()).hexdigest() for name in NAMES]
    assert digests(store, sizes, tmp_path / "cache") == first
    assert read == list(NAMES)
    write(store, NAMES[1], b"other content")
    changed = digests(store, sizes, tmp_path / "cache")
    assert read == [*NAMES, NAMES[1]]
    assert changed[0] == first[0]
    assert changed[1].sha256 == hashlib.sha256(b"other content").hexdigest()


def test_a_file_that_changed_just_now_is_not_trusted_to_stay(tmp_path, read):
    store = open_store(str(tmp_path / "model"))
    store.put(NAMES[0], b"a")
    for _ in range(2):
        digests(store, {NAMES[0]: 1}, tmp_path / "cache")
    assert read == [NAMES[0]] * 2


@pytest.mark.parametrize("junk", [b"", b"{}", b"[1]", b'{"uri": "x", "files": {"a.safetensors": 7}}'])
def test_a_spoilt_cache_is_done_without(tmp_path, read, junk):
    store = open_store(str(tmp_path / "model"))
    write(store, NAMES[0], b"a")
    first = digests(store, {NAMES[0]: 1}, tmp_path / "cache")
    (only,) = (tmp_path / "cache" / "digests").iterdir()
    only.write_bytes(junk)
    assert digests(store, {NAMES[0]: 1}, tmp_path / "cache") == first
    assert len(read) == 2
