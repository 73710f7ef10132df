"""The real S3 server that the demo and the tests start: it keeps what it has, and to itself."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from cluster.errors import InputError
from cluster.local_s3 import LocalS3
from cluster.storage import open_store

TENANT = "retail"
MAY = [f"{action}:shared/{TENANT}/*" for action in ("Read", "Write", "List")]


def use(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow
def test_a_killed_server_has_kept_data_and_credentials_and_tenants_stay_in_their_prefix(tmp_path, monkeypatch):
    with LocalS3(tmp_path, bucket="shared") as server:
        first = server.environment()
        use(monkeypatch, first)
        open_store("s3://shared/finance").put("secret", b"1")
        os.kill(server._process.pid, signal.SIGKILL)
        sockets = [f"-{port}.sock" for port in server.ports.values()]
    with LocalS3(tmp_path, bucket="shared", tenants={TENANT: MAY}) as server:
        assert server.environment() == first | {"AWS_ENDPOINT_URL_S3": server.endpoint}
        use(monkeypatch, server.environment())
        assert open_store("s3://shared/finance").get("secret") == b"1"
        use(monkeypatch, server.environment(TENANT))
        mine = open_store(f"s3://shared/{TENANT}")
        mine.check_writable()
        assert mine.create("x", b"1")
        assert mine.get("x") == b"1"
        others = open_store("s3://shared/finance")
        for act in (
            others.check_writable,
            lambda: others.get("secret"),
            lambda: others.create("x", b""),
            lambda: others.delete("secret"),
            lambda: open_store("s3://shared").copy("finance/secret", f"{TENANT}/stolen"),
        ):
            with pytest.raises(InputError, match="refuses"):
                act()
    assert not [name for name in os.listdir("/tmp") if name.endswith(tuple(sockets))]


def test_it_does_not_outlive_whoever_started_it(tmp_path):
    program = """
        import pathlib, sys, time
        from cluster.local_s3 import LocalS3
        server = LocalS3(pathlib.Path(sys.argv[1]))
        server.start()
        print(server._process.pid, flush=True)
        time.sleep(600)
    """
    code = "\n".join(line.strip() for line in program.splitlines())
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    server = int(parent.stdout.readline())
    os.kill(server, 0)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while alive(server) and time.monotonic() < deadline:
        time.sleep(0.05)
    outlived = alive(server)
    if outlived:
        os.kill(server, signal.SIGKILL)
    assert not outlived


def alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"  # a zombie waits only for its new parent
    except FileNotFoundError:
        return False


def test_a_name_that_no_bucket_can_have(tmp_path):
    started = time.monotonic()
    with pytest.raises(InputError, match="cannot be a bucket's name"):
        LocalS3(tmp_path, bucket="b").start()
    assert time.monotonic() - started < 50, "it waited instead of saying so"


def test_without_seaweedfs(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="not installed"):
        LocalS3(tmp_path / "s3").start()
    assert not (tmp_path / "s3").exists()


def test_secrets_are_fresh_and_for_their_owner_only(tmp_path):
    files = [LocalS3(tmp_path / name)._identities() if (tmp_path / name).mkdir() is None else None for name in "ab"]
    secrets = [json.loads(file.read_text())["identities"][0]["credentials"][0]["secretKey"] for file in files]
    assert secrets[0] != secrets[1]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
