"""The doctor: well where all is well, and where something is broken, the line that says what to do."""

import json
import subprocess
import sys
import threading
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import time
from urllib.parse import unquote, urlsplit

import boto3
import pytest
from faulty_proxy import FaultyProxy
from packaging.requirements import Requirement
from typer.testing import CliRunner

from cluster.directory_store import DirectoryStore
from cluster.errors import InputError
from cluster.storage import open_store
from jobs import doctor
from jobs.checks import machine, ray_cluster, software
from jobs.checks import store as store_checks
from jobs.checks.finding import fail
from jobs.cli import app

GIB = 1 << 30


def states(findings):
    return {one.name: one.state for one in findings}


def named(findings, name):
    [found] = [one for one in findings if one.name == name]
    return found


# ---- all is well ------------------------------------------------------------------------------------------------------


def test_a_healthy_machine_with_a_real_store(s3):
    """The whole command: real packages, a real DeepSpeed step, a real S3 server."""
    uri = s3.make_prefix()
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "doctor", "--from", uri, "--json"],
        capture_output=True,
        text=True,
    )
    findings = {one["name"]: one for one in json.loads(done.stdout)}
    assert done.returncode == 0, findings
    assert all(one["advice"] for one in findings.values() if one["state"] != "ok")
    for name in ("Python", "packages", "Ray", "DeepSpeed", "compiler", "disk for temporary files"):
        assert findings[name]["state"] in ("ok", "warn"), findings[name]
    assert "one ZeRO step" in findings["DeepSpeed"]["finding"]
    for name in ("clock", "store", "store, missing objects", "store, create once", "store, compare and swap"):
        assert findings[name]["state"] == "ok", findings[name]
    assert findings["store, checksums"]["state"] == "ok", findings["store, checksums"]
    assert list(open_store(uri).keys("")) == []
    assert s3.environment()["AWS_SECRET_ACCESS_KEY"] not in done.stdout + done.stderr


def test_a_directory_is_a_store_too(tmp_path):
    findings = store_checks.store(str(tmp_path))
    assert set(states(findings).values()) == {"ok"}
    assert list(tmp_path.iterdir()) == []


# ---- the store is broken ----------------------------------------------------------------------------------------------


def test_wrong_key(s3, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-key")
    findings = store_checks.store(s3.make_prefix())
    found = named(findings, "store")
    assert found.state == "fail"
    assert "refuses" in found.finding
    assert "AWS_ACCESS_KEY_ID" in found.advice
    assert "not-the-key" not in str(findings)
    assert states(findings) == {"clock": "ok", "store": "fail"}  # nothing further is asked of it


def test_no_such_bucket(s3):
    found = named(store_checks.store("s3://not-there/prefix"), "store")
    assert (found.state, found.finding) == ("fail", "s3://not-there/prefix: there is no bucket not-there")
    assert found.advice == "Create it, or choose another."


def test_nobody_listens(monkeypatch, s3):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    [found] = store_checks.store("s3://tests/x")
    assert found.state == "fail"
    assert "out of reach" in found.finding
    assert "AWS_ENDPOINT_URL_S3" in found.advice


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    [found] = store_checks.store(str(tmp_path / "file" / "below"))
    assert found.state == "fail"
    assert found.advice


class Deaf(FaultyProxy):
    """A server that ignores conditions on writes, as older S3-compatible ones do: it writes by keys of its own."""

    def __init__(self, server, conditions=("If-None-Match", "If-Match")) -> None:
        super().__init__(server.endpoint)
        keys = server.environment()
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=server.endpoint,
            aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
        )

        class Handler(self._server.RequestHandlerClass):
            def do_PUT(self) -> None:
                if not any(self.headers.get(one) for one in conditions):
                    self.forward()
                    return
                body = self.rfile.read(int(self.headers["Content-Length"]))
                bucket, _, key = unquote(urlsplit(self.path).path).lstrip("/").partition("/")
                tag = client.put_object(Bucket=bucket, Key=key, Body=body)["ETag"]
                self.send_response(200)
                self.send_header("ETag", tag)
                self.send_header("Content-Length", "0")
                self.end_headers()

        self._server.RequestHandlerClass = Handler


def test_a_server_that_ignores_if_none_match(s3, monkeypatch):
    with Deaf(s3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        findings = store_checks.store(s3.make_prefix())
    found = named(findings, "store, create once")
    assert found.state == "fail"
    assert "not conditional: 8 of 8 racing writers" in found.finding
    assert "If-None-Match is ignored" in found.advice
    assert named(findings, "store, compare and swap").state == "fail"
    assert named(findings, "store").state == "ok"


def test_a_server_that_ignores_if_match_alone(s3, monkeypatch):
    with Deaf(s3, conditions=("If-Match",)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        findings = store_checks.store(s3.make_prefix())
    assert named(findings, "store, create once").state == "ok"
    found = named(findings, "store, compare and swap")
    assert found.state == "fail"
    assert "stale tag succeeded" in found.finding


class TellsNothing(DirectoryStore):
    """S3 towards a role without s3:ListBucket, which no server here can play: 403 for what is not there."""

    def size(self, key):
        raise InputError("s3://bucket/prefix: the store refuses (403)")


def test_a_role_that_may_not_know_what_is_missing(tmp_path):
    found = store_checks.missing(TellsNothing(str(tmp_path)), "nothing")
    assert found.state == "fail"
    assert "s3:ListBucket" in found.advice


def test_checksums_switched_off(s3, monkeypatch):
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    found = named(store_checks.store(s3.make_prefix()), "store, checksums")
    assert (found.state, "read back" in found.finding) == ("ok", True)


@pytest.mark.parametrize(
    ("ahead", "state", "words"),
    [
        (0.4, "ok", "within a few seconds"),
        (20, "ok", "20 s behind the store's"),
        (-45, "warn", "45 s ahead of the store's"),
        (45, "warn", "45 s behind the store's"),
        (1000, "fail", "refuses requests at 15 minutes"),
    ],
)
def test_the_clock_in_words(ahead, state, words):
    found = store_checks.clock_of(ahead)
    assert (found.state, words in found.finding) == (state, True)


def test_the_stores_clock_is_read_even_from_a_refusal(monkeypatch):
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response_only(403)
            self.send_header("Date", formatdate(time() + 1200, usegmt=True))
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        [found] = store_checks.clock("s3://bucket/prefix")
    finally:
        server.shutdown()
        server.server_close()
    assert found.state == "fail"
    assert 1150 < int(found.finding.split()[0]) < 1250
    assert "behind" in found.finding


# ---- the software is broken -------------------------------------------------------------------------------------------


def test_packages_that_are_missing_or_of_another_version():
    wanted = [Requirement(one) for one in ("transformers<5", "no-such-package>=1", "torch>=2")]
    other, missing = software.compared(wanted)
    assert (other.state, missing.state) == ("fail", "fail")
    assert "transformers is 5" in other.finding
    assert other.advice == "pip install 'transformers<5'"
    assert "no-such-package is not installed" in missing.finding


def test_a_broken_deepspeed(tmp_path, monkeypatch):
    (tmp_path / "deepspeed.py").write_text("raise ImportError('libaio.so: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    [found] = software.deepspeed()
    assert found.state == "fail"
    assert "libaio.so" in found.finding
    assert "pip install" in found.advice


def test_the_token_in_a_variable_is_not_shown(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "very-secret")
    [found] = software.ray_token("http://head:8265")
    assert found.state == "ok"
    assert "very-secret" not in str(found)


def test_the_tokens_file(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert states(software.ray_token(None)) == {"Ray token": "ok"}  # the embedded cluster makes its own
    assert states(software.ray_token("http://head:8265")) == {"Ray token": "fail"}
    path = tmp_path / ".ray" / "auth_token"
    path.parent.mkdir()
    path.touch(mode=0o600)
    assert "is empty" in software.ray_token("http://head:8265")[0].finding
    path.write_text("very-secret")
    path.chmod(0o644)
    [found] = software.ray_token("http://head:8265")
    assert (found.state, found.advice) == ("warn", f"chmod 600 {path}")
    path.chmod(0o600)
    [found] = software.ray_token("http://head:8265")
    assert found.state == "ok"
    assert "very-secret" not in str(found)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
    assert states(software.ray_token(None)) == {"Ray token": "fail"}  # named, and not there


@pytest.mark.parametrize(("mode", "state"), [("disabled", "warn"), ("tokens", "fail")])
def test_the_token_mode(mode, state, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    [found] = software.ray_token(None)
    assert (found.state, found.advice) == (state, "export RAY_AUTH_MODE=token")


@pytest.mark.parametrize(
    ("free", "bf16", "state", "words"),
    [
        (78, True, "ok", "driver 570.1, 78 of 80 GiB free, bf16"),
        (78, False, "warn", "no bf16"),
        (10, True, "warn", "somebody else is using it"),
    ],
)
def test_a_gpu_in_words(free, bf16, state, words):
    found = software.device(0, "NVIDIA H100", "570.1", free * GIB, 80 * GIB, bf16)
    assert (found.name, found.state, words in found.finding) == ("CUDA 0", state, True)


@pytest.mark.gpu
def test_a_real_gpu():
    findings = software.cuda()
    assert all(one.name.startswith("CUDA ") and "driver unknown" not in one.finding for one in findings)


# ---- the machine is short of something --------------------------------------------------------------------------------


@pytest.mark.parametrize(("free", "state"), [(100, "ok"), (10, "warn"), (1, "fail")])
def test_disk(free, state, tmp_path):
    found = machine.room("disk for the cache", tmp_path, 200 * GIB, free * GIB)
    assert (found.state, str(tmp_path) in found.finding) == (state, True)


def test_a_full_disk_that_is_large(tmp_path):
    found = machine.room("disk for temporary files", tmp_path, 2000 * GIB, 50 * GIB)
    assert (found.state, "spills no more" in found.finding) == ("warn", True)


def test_a_place_that_is_not_there_yet_is_judged_by_what_is_above_it(tmp_path):
    findings = machine.disk(str(tmp_path / "new" / "store"))
    assert str(tmp_path) in named(findings, "disk of the store").finding
    assert "new" not in named(findings, "disk of the store").finding


def test_shared_memory():
    assert machine.shared(8 * GIB, 16 * GIB).state == "ok"
    found = machine.shared(64 << 20, 16 * GIB)  # what docker gives
    assert (found.state, "--shm-size=5g" in found.advice) == ("warn", True)


def test_open_files():
    assert machine.open_files(65536, 65536).state == "ok"
    assert machine.open_files(-1, -1).finding == "no limit"
    assert machine.open_files(1024, 1048576).advice == "ulimit -n 65536"
    assert machine.open_files(1024, 16384).advice == "ulimit -n 16384"
    assert "hard limit (4096)" in machine.open_files(1024, 4096).advice


# ---- the cluster ------------------------------------------------------------------------------------------------------


def node(head=False, labels=None, **resources):
    return {"is_head_node": head, "resources_total": resources, "labels": labels or {}}


def test_a_cluster_as_it_should_be():
    findings = ray_cluster.judged(
        [
            node(head=True),
            node(CPU=4.0, labels={"karikomi": "driver"}, **{"tenant-retail": 8.0, "tenant-finance": 4.0}),
            node(CPU=8.0, GPU=8.0),
        ]
    )
    assert set(states(findings).values()) == {"ok"}
    assert named(findings, "cluster's nodes").finding == "3 nodes, 12 CPUs, 8 GPUs"
    assert named(findings, "cluster's quotas").finding == "finance 4, retail 8"


def test_a_cluster_as_it_should_not_be():
    findings = ray_cluster.judged(
        [node(head=True, CPU=8.0, **{"tenant-retail": 4.0}), node(CPU=1.0, **{"tenant-retail": 4.0})]
    )
    assert "--num-cpus=0" in named(findings, "cluster's head").advice
    assert "karikomi=driver" in named(findings, "cluster's drivers").advice
    assert named(findings, "cluster's quotas").state == "warn"
    empty = ray_cluster.judged([node(head=True)])
    assert named(empty, "cluster's nodes").state == "warn"
    assert ray_cluster.reached("http://head:8265", "2.40.0", "2.60.0").state == "fail"


def test_a_cluster_out_of_reach():
    [found] = ray_cluster.ray_cluster("http://127.0.0.1:9")
    assert found.state == "fail"
    assert "port-forward" in found.advice


# ---- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["--from", "ftp://x"], ["--cluster", "head:6379"], ["--cluster", "ray://head:10001"]]
)
def test_a_bad_option_is_bad_input(arguments):
    failure = CliRunner().invoke(app, ["doctor", *arguments]).exception
    assert isinstance(failure, InputError)
    assert failure.exit_code == 2


def test_a_failure_ends_by_1_and_says_what_to_do(s3, monkeypatch):
    monkeypatch.setattr(software, "deepspeed", list)  # it has its own tests, and takes seconds
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-key")
    shown = CliRunner().invoke(app, ["doctor", "--from", s3.make_prefix()])
    assert shown.exit_code == 1
    lines = shown.stdout.splitlines()
    [index] = [number for number, line in enumerate(lines) if line.startswith("fail store ")]
    assert lines[index + 1].strip().startswith("→ Check the bucket's name")


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(software, "deepspeed", list)
    monkeypatch.setattr(machine, "shared_memory", lambda: [][0])
    findings = doctor.examine()
    assert named(findings, "shared memory").state == "fail"
    assert "IndexError" in named(findings, "shared memory").finding
    assert named(findings, "Python").state == "ok"
    assert not doctor.is_well(findings)
    assert not doctor.is_well([fail("x", "y", "z")])
