"""Publishing by its protocol: one winner, nothing half-done visible, every byte verified. Directory and real S3."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import Request, urlopen

import pytest

from cluster.errors import InputError
from cluster.storage import open_store
from workflows.publishing import find_version, model_digest, publish, pull

DOCUMENTS = {"REPORT.json": b"{}", "PROVENANCE.json": b"{}"}


def model(store, text: str = "weights"):
    """Some model files, already in the store, as a run has them."""
    return {
        "model-outer.safetensors": store.put(f"runs/{text}/outer", text.encode() * 100),
        "config.json": store.put(f"runs/{text}/config", b"{}"),
    }


def test_publish_then_pull(store, tmp_path):
    files = model(store)
    done = publish(store, "chat", "auto", files, DOCUMENTS, "run-1")
    assert (done.version, done.already, done.digest) == ("1", False, model_digest(files))
    pulled = pull(store, "chat", None, tmp_path / "out")
    assert pulled.version == "1"
    assert (tmp_path / "out" / "model-outer.safetensors").read_bytes() == b"weights" * 100
    assert (tmp_path / "out" / "REPORT.json").read_bytes() == b"{}"


def test_publishing_again_changes_nothing(store):
    first = publish(store, "chat", "auto", model(store), DOCUMENTS, "run-1")
    pointer = find_version(store, "chat", "1")
    again = publish(store, "chat", "auto", model(store), {"REPORT.json": b"other timings"}, "run-2")
    assert again.already
    assert again.version == first.version
    assert find_version(store, "chat", "1") == pointer
    assert find_version(store, "chat", "2") is None


def test_another_model_is_another_version_and_never_the_same_one(store):
    publish(store, "chat", "auto", model(store), DOCUMENTS, "run-1")
    second = publish(store, "chat", "auto", model(store, "other"), DOCUMENTS, "run-2")
    assert second.version == "2"
    assert find_version(store, "chat", None).version == "2"
    with pytest.raises(InputError, match=r"chat@1 holds another model .*run-1"):
        publish(store, "chat", "1", model(store, "third"), DOCUMENTS, "run-3")


@pytest.mark.parametrize("racers", [2, 8])
def test_one_version_has_one_winner(store, racers):
    def race(number: int):
        mine = open_store(store.uri)
        files = model(mine, f"racer-{number}")
        start.wait()
        try:
            return publish(mine, "chat", "gold", files, DOCUMENTS, f"run-{number}")
        except InputError as error:
            return error

    start = threading.Barrier(racers)
    with ThreadPoolExecutor(racers) as pool:
        results = list(pool.map(race, range(racers)))
    winners = [one for one in results if not isinstance(one, InputError)]
    assert len(winners) == 1
    assert find_version(store, "chat", "gold").digest == winners[0].digest
    assert all("holds another model" in str(one) for one in results if isinstance(one, InputError))


@pytest.mark.parametrize("after_writes", [0, 1, 2, 3, 4])
def test_a_publisher_killed_half_way_leaves_nothing_visible(store, tmp_path, after_writes):
    files = model(store)
    program = textwrap.dedent(
        """
        import os, signal, sys, json
        from cluster.storage import Stored, open_store
        from workflows import publishing
        store = open_store(sys.argv[1])
        files = {name: Stored(**one) for name, one in json.loads(sys.argv[2]).items()}
        left = int(sys.argv[3])
        def dying(write):
            def wrapped(*arguments):
                global left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return write(*arguments)
            return wrapped
        for name in ("put", "copy", "create"):
            setattr(store, name, dying(getattr(store, name)))
        publishing.publish(store, "chat", "auto", files, {"REPORT.json": b"{}"}, "run-1")
        """
    )
    description = json.dumps({name: stored.model_dump() for name, stored in files.items()})
    arguments = [sys.executable, "-c", program, store.uri, description, str(after_writes)]
    killed = subprocess.run(arguments, env=os.environ, check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert find_version(store, "chat", None) is None
    with pytest.raises(InputError, match="no release"):
        pull(store, "chat", None, tmp_path / "out")
    assert publish(store, "chat", "auto", files, DOCUMENTS, "run-1").version == "1"
    pull(store, "chat", "1", tmp_path / "out")


def test_a_wrong_byte_is_caught_and_leaves_no_directory(store, tmp_path):
    done = publish(store, "chat", "auto", model(store), DOCUMENTS, "run-1")
    key = f"models/chat/{done.digest[:12]}/model-outer.safetensors"
    damaged = bytearray(store.get(key))
    damaged[50] ^= 1
    store.put(key, bytes(damaged))
    with pytest.raises(InputError, match=r"model-outer\.safetensors is not what the manifest says"):
        pull(store, "chat", "1", tmp_path / "out")
    assert list(tmp_path.glob("out*")) + list(tmp_path.glob(".pull*")) == []


def test_a_changed_manifest_is_caught(store, tmp_path):
    publish(store, "chat", "auto", model(store), DOCUMENTS, "run-1")
    pointer = find_version(store, "chat", "1")
    key = f"models/chat/{pointer.digest[:12]}/{pointer.manifest.key}"
    store.put(key, store.get(key).replace(b"config.json", b"../evil.json"))
    with pytest.raises(InputError, match="changed after it was published"):
        pull(store, "chat", "1", tmp_path / "out")


def test_pull_does_not_write_into_a_full_directory(store, tmp_path):
    publish(store, "chat", "auto", model(store), DOCUMENTS, "run-1")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(InputError, match="not empty"):
        pull(store, "chat", "1", tmp_path / "mine")


def test_an_upload_over_damaged_leftovers_is_verified(store):
    files = model(store)
    digest = model_digest(files)
    store.put(f"models/chat/{digest[:12]}/config.json", b"[]")  # left by an interrupted upload, same size
    publish(store, "chat", "auto", files, DOCUMENTS, "run-1")
    assert store.get(f"models/chat/{digest[:12]}/config.json") == b"{}"


class LosesReplies(BaseHTTPRequestHandler):
    """A proxy that carries the commit out and then hangs up without a word, the first time."""

    upstream: str
    lost: list[str]

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._forward(body)

    def do_GET(self) -> None:
        self._forward(None)

    do_HEAD = do_DELETE = do_GET

    def _forward(self, body: bytes | None) -> None:
        request = Request(self.upstream + self.path, data=body, method=self.command, headers=dict(self.headers))
        try:
            reply = urlopen(request)
        except OSError as error:
            reply = error
        content = reply.read()
        if self.command == "PUT" and "/versions/" in self.path and not self.lost:
            self.lost.append(self.path)
            self.connection.close()
            return
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            if name.lower() not in ("transfer-encoding", "connection"):
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments) -> None:
        pass


def test_a_lost_reply_to_the_commit_is_recognised_as_our_own_success(s3, monkeypatch):
    handler = type("Handler", (LosesReplies,), {"upstream": s3.endpoint, "lost": []})
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{proxy.server_address[1]}")
    store = open_store("s3://tests/lost-reply")
    done = publish(store, "chat", "auto", model(store), DOCUMENTS, "run-1")
    proxy.shutdown()
    assert handler.lost, "no reply was lost, so this test showed nothing"
    assert (done.version, done.already) == ("1", False)
