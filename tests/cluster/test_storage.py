"""Both stores keep the same promises; the one on S3 is a real SeaweedFS."""

import hashlib
import os
import pickle
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy, Once

from cluster import s3_store
from cluster.errors import InputError, Unavailable
from cluster.storage import MissingKey, open_store


@pytest.fixture
def through(s3, monkeypatch):
    """Sends all requests of a test through a proxy with a fault; gives a fresh store and the proxy."""
    proxies = []

    def start(**faults):
        proxies.append(FaultyProxy(s3.endpoint, **faults).__enter__())
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxies[-1].endpoint)
        return open_store(s3.make_prefix()), proxies[-1]

    yield start
    for proxy in proxies:
        proxy.__exit__()


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


def test_creating_the_same_bytes_again_is_no_second_win(store):
    assert store.create("prize", b"same")
    assert not store.create("prize", b"same")


def test_swap_has_one_winner_among_many(store):
    assert store.create("seat", b"empty")
    _, tag = store.get_tagged("seat")

    def attempt(number: int) -> bool:
        return open_store(store.uri).swap("seat", f"sitter {number}".encode(), tag)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(attempt, range(8)))
    assert sum(won) == 1
    assert store.get("seat") == f"sitter {won.index(True)}".encode()
    store.delete("seat")
    assert not store.swap("seat", b"9", tag)
    assert store.size("seat") is None


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
    store.put("a-b", b"")
    assert list(store.keys("")) == ["a-b", "a/1", "a/2", "b/1"]
    assert list(store.keys("a")) == ["a-b", "a/1", "a/2"]
    assert list(store.keys("none/")) == []


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


def test_download_leaves_a_whole_file_or_none(store, tmp_path):
    stored = store.put("x", b"12345")
    assert store.download("x", tmp_path / "file") == stored
    assert (tmp_path / "file").read_bytes() == b"12345"
    with pytest.raises(MissingKey):
        store.download("nope", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_directory_keeps_no_temporary_files(tmp_path):
    store = open_store(str(tmp_path / "store"))
    stored = store.put("a/x", b"1")
    for _ in range(2):  # the second time, both names are the same file already
        store.copy("a/x", "b/y")
    assert store.create("a/z", b"2")
    assert not store.create("a/z", b"3")
    (tmp_path / "store" / "taken").mkdir()
    with pytest.raises(InputError):
        store.put("taken", b"")
    with pytest.raises(InputError):
        store.put("a/x/below", b"")
    assert store.verify(stored)
    names = {path.relative_to(tmp_path / "store").as_posix() for path in (tmp_path / "store").rglob("*")}
    assert names == {"a", "a/x", "a/z", "b", "b/y", "taken"}


def test_checks_and_writes_at_once_do_not_disturb_each_other(tmp_path):
    store = open_store(str(tmp_path / "deep" / "store"))

    def act(number: int) -> None:
        store.check_writable()
        store.put(f"{number}/x", b"1")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(act, range(32)))
    assert len(list(store.keys(""))) == 32


def test_unwritable_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        open_store(str(tmp_path / "file" / "below")).check_writable()


def test_wrong_credentials(s3, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with pytest.raises(InputError, match="refuses") as caught:
        open_store("s3://tests/x").check_writable()
    assert "not-the-secret" not in str(caught.value)


@pytest.mark.parametrize("uri", ["s3://", "s3:///", "s3:///x", "s3:////x/y"])
def test_an_address_without_a_bucket(uri):
    with pytest.raises(InputError, match="names no bucket"):
        open_store(uri)


def test_missing_bucket(s3):
    store = open_store("s3://no-such-bucket/x")
    with pytest.raises(InputError, match="no bucket no-such-bucket"):
        store.check_writable()
    for act in (lambda: store.put("x", b""), lambda: store.get("x")):
        with pytest.raises(InputError, match="NoSuchBucket"):
            act()


def test_unreachable_store(s3, monkeypatch):
    with socket.socket() as taken:  # bound, not listening: every connection is refused
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(Unavailable, match="out of reach"):
            open_store("s3://tests/x").check_writable()


def test_other_addresses_are_refused(s3, monkeypatch):
    for uri in ("http://x/y", "ftp://x", "s3://", "", " ", "file://host/x", "s3://bucket/../x", "s3://bucket//x"):
        with pytest.raises(InputError):
            open_store(uri)
    with pytest.raises(InputError, match="bucket name"):
        open_store("s3://No bucket!/x").check_writable()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "nonsense")
    with pytest.raises(InputError, match="AWS_ENDPOINT_URL_S3"):
        open_store("s3://tests/x").check_writable()


def test_file_addresses(tmp_path):
    assert open_store(f"file://{tmp_path}/a%20b").uri == f"{tmp_path}/a b"


def test_a_lost_reply_to_a_conditional_write_is_our_own_success(through):
    lost = Once("PUT", "prize", lambda body: None)
    store, proxy = through(fault=lost)
    assert store.create("prize", b"first")
    assert lost.happened
    assert sum(one.startswith("PUT") for one in proxy.requests) == 2, "it was not asked again, so nothing was shown"
    assert not store.create("prize", b"first")
    lost.happened = False
    assert store.swap("prize", b"second", store.get_tagged("prize")[1])
    assert lost.happened
    assert store.get("prize") == b"second"


@pytest.mark.parametrize(
    "damage", [lambda body: body[:-5], lambda body: b"?" + body[1:], lambda body: None], ids=["cut", "changed", "lost"]
)
def test_a_damaged_reply_is_asked_for_again_and_never_given_out(through, monkeypatch, damage):
    monkeypatch.setattr(s3_store, "PAUSES", (0.01, 0.02))
    once = Once("GET", "x", damage)
    store, _ = through(fault=once)
    store.put("x", b"right" * 1000)
    assert store.get("x") == b"right" * 1000
    assert once.happened


def test_a_reply_that_is_always_cut_short_is_an_error(through, monkeypatch):
    monkeypatch.setattr(s3_store, "PAUSES", (0.01, 0.02))
    store, proxy = through(fault=lambda request, body: body[:-5] if request.startswith("GET") else body)
    store.put("x", b"right" * 1000)
    for read in (lambda: store.get("x"), lambda: store.read("x", 10, 100), lambda: b"".join(store.stream("x"))):
        with pytest.raises(Unavailable):
            read()
    assert sum(one.startswith("GET") for one in proxy.requests) == 9


def test_an_uploader_killed_in_the_middle_leaves_nothing(through, tmp_path):
    (tmp_path / "big").write_bytes(os.urandom(24 << 20))
    program = "import sys, pathlib; from cluster.storage import open_store; input();"
    program += "open_store(sys.argv[1]).put('big', pathlib.Path(sys.argv[2]))"
    uploader: list[subprocess.Popen] = []
    reached: list[int] = []

    def kill_half_way(request: str, count: int) -> None:
        if "big" in request and count > 8 << 20 and not reached:
            reached.append(count)
            uploader[0].send_signal(signal.SIGKILL)
            uploader[0].wait()

    store, _ = through(received=kill_half_way)
    uploader.append(
        subprocess.Popen([sys.executable, "-c", program, store.uri, str(tmp_path / "big")], stdin=subprocess.PIPE)
    )
    uploader[0].communicate(b"go\n", timeout=60)
    assert reached
    assert uploader[0].returncode == -signal.SIGKILL
    assert store.size("big") is None
    assert list(store.keys("")) == []


def test_verifying_asks_the_server_and_moves_no_bytes(through):
    store, proxy = through()
    stored = store.put("x", bytes(9 << 20))
    store.copy("x", "y")
    assert store.verify(stored.model_copy(update={"key": "y"}))
    assert not store.verify(stored.model_copy(update={"key": "y", "sha256": "0" * 64}))
    assert not any(one.startswith("GET") for one in proxy.requests)


def test_what_is_too_large_for_one_request_goes_in_parts(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(s3_store, "LARGEST_SINGLE_PUT", 1 << 20)
    monkeypatch.setattr(s3_store, "PART", 5 << 20)
    store = open_store(s3.make_prefix())
    (tmp_path / "big").write_bytes(os.urandom(17 << 20))
    stored = store.put("x", tmp_path / "big")
    store.copy("x", "y")
    for key in ("x", "y"):
        assert store.verify(stored.model_copy(update={"key": key}))
        assert not store.verify(stored.model_copy(update={"key": key, "sha256": "0" * 64}))


def test_servers_without_checksums(through, monkeypatch):
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    store, proxy = through()
    stored = store.put("x", b"right")
    assert store.verify(stored)
    assert not store.verify(stored.model_copy(update={"sha256": "0" * 64}))
    assert any(one.startswith("GET") for one in proxy.requests), "no checksum was kept, so it is read back"


def test_a_store_holds_no_secrets(s3):
    store = open_store(s3.make_prefix())
    store.put("x", b"1")
    secret = s3.environment()["AWS_SECRET_ACCESS_KEY"].encode()
    assert secret not in pickle.dumps(store)
    assert Path(s3.directory / "identities.json").stat().st_mode & 0o777 == 0o600
