"""Both stores keep the same promises; the one on S3 is a real SeaweedFS."""

import hashlib
import pickle
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.errors import InputError, Unavailable
from cluster.storage import MissingKey, open_store


def test_what_is_put_comes_back_with_its_digest(store, tmp_path):
    data = bytes(range(256)) * 1000
    stored = store.put("a/b/c.bin", data)
    assert (stored.sha256, stored.size) == (hashlib.sha256(data).hexdigest(), len(data))
    assert store.get("a/b/c.bin") == data
    assert store.read("a/b/c.bin", 300, 20) == data[300:320]
    assert b"".join(store.stream("a/b/c.bin", piece=7777)) == data
    assert store.size("a/b/c.bin") == len(data)
    assert store.verify(stored)
    (tmp_path / "file").write_bytes(data)
    assert store.put("d", tmp_path / "file").sha256 == stored.sha256


def test_a_changed_object_is_noticed(store):
    stored = store.put("x", b"right")
    store.put("x", b"wrong")
    assert not store.verify(stored)


def test_missing_objects(store):
    assert store.size("nope") is None
    assert store.get_tagged("nope") is None
    for read in (lambda: store.get("nope"), lambda: store.read("nope", 0, 1), lambda: store.copy("nope", "there")):
        with pytest.raises(MissingKey):
            read()
    store.delete("nope")


def test_reading_past_the_end_is_an_error_not_less_data(store):
    store.put("x", b"12345")
    with pytest.raises((Unavailable, InputError)):
        store.read("x", 3, 10)


def test_copy_is_independent(store):
    store.put("x", b"1")
    store.copy("x", "y")
    store.put("x", b"2")
    assert store.get("y") == b"1"


def test_create_has_one_winner_among_many(store):
    def attempt(number: int) -> bool:
        return open_store(store.uri).create("prize", f"winner {number}".encode())

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(attempt, range(8)))
    assert sum(won) == 1
    assert store.get("prize") == f"winner {won.index(True)}".encode()


def test_swap_loses_no_update(store):
    assert store.swap("counter", b"0", None)
    assert not store.swap("counter", b"9", None)

    def add(_: int) -> None:
        mine = open_store(store.uri)
        while True:
            data, tag = mine.get_tagged("counter")
            if mine.swap("counter", str(int(data) + 1).encode(), tag):
                return

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(12)))
    assert store.get("counter") == b"12"


def test_keys_are_listed_below_a_prefix(store):
    for key in ("b/1", "a/2", "a/1"):
        store.put(key, b"")
    assert list(store.keys("a/")) == ["a/1", "a/2"]


@pytest.mark.parametrize("key", ["../x", "/x", "a//b", "a/../b", "", "a/./b", "a\0b", "a\\b"])
def test_keys_cannot_climb_out(store, key):
    with pytest.raises(InputError):
        store.put(key, b"")


def test_a_store_travels_to_workers(store):
    store.put("x", b"1")
    assert pickle.loads(pickle.dumps(store)).get("x") == b"1"


def test_checking_leaves_no_trace(store, tmp_path):
    store.check_writable()
    assert list(store.keys("")) == []
    assert not (tmp_path / "store").exists()


def test_unwritable_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        open_store(str(tmp_path / "file" / "below")).check_writable()


def test_wrong_credentials(s3, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with pytest.raises(InputError, match="refuses") as caught:
        open_store("s3://tests/x").check_writable()
    assert "not-the-secret" not in str(caught.value)


def test_missing_bucket(s3):
    with pytest.raises(InputError, match="no bucket no-such-bucket"):
        open_store("s3://no-such-bucket/x").check_writable()


def test_unreachable_store(s3, monkeypatch):
    with socket.socket() as taken:  # bound, not listening: every connection is refused
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(Unavailable, match="out of reach"):
            open_store("s3://tests/x").check_writable()


def test_other_addresses_are_refused():
    for uri in ("http://x/y", "ftp://x", "s3://"):
        with pytest.raises(InputError):
            open_store(uri)
