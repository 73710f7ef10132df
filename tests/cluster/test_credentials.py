"""Tenants' keys: looked up where a process runs, in the driver and in every kind of Ray's workers; never sent."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster.credentials import adopt, adopt_in_worker, for_workers
from cluster.errors import InputError
from cluster.session import SUBMITTED, worker_environment
from cluster.storage import open_store

ROLE = "arn:aws:iam::123456789012:role/karikomi-retail"
MACHINE = {"RETAIL_AWS_ACCESS_KEY_ID": "id", "RETAIL_AWS_SECRET_ACCESS_KEY": "secret"}


def test_keys_replace_whoever_the_process_was():
    before = {"AWS_ACCESS_KEY_ID": "x", "AWS_SESSION_TOKEN": "t", "AWS_PROFILE": "p", "AWS_REGION": "r"}
    environment = MACHINE | before | {"KARIKOMI_CREDENTIALS": "environment:RETAIL"}
    assert adopt(environment)
    assert {name: value for name, value in environment.items() if name.startswith("AWS_")} == {
        "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "r",
    }  # fmt: skip
    environment["RETAIL_AWS_SESSION_TOKEN"] = "token"
    assert adopt(environment)
    assert environment["AWS_SESSION_TOKEN"] == "token"


def test_without_a_name_nothing_changes():
    environment = {"AWS_ACCESS_KEY_ID": "x"}
    assert not adopt(environment)
    assert environment == {"AWS_ACCESS_KEY_ID": "x"}
    assert for_workers(environment) == {}


@pytest.mark.parametrize(
    ("machine", "name", "message"),
    [
        ({}, "environment:RETAIL", "RETAIL_AWS_ACCESS_KEY_ID and RETAIL_AWS_SECRET_ACCESS_KEY not set on this machine"),
        ({"RETAIL_AWS_ACCESS_KEY_ID": "x"}, "environment:RETAIL", "RETAIL_AWS_SECRET_ACCESS_KEY not set"),
        ({}, "RETAIL", "names no credentials"),
        ({}, "environment:a b", "names no credentials"),
        ({}, "keys:AKIA", "names no credentials"),
        ({"AWS_ACCESS_KEY_ID": "x"}, f"role:{ROLE}", "boto3 would use instead"),
    ],
)
def test_what_is_missing_is_named(machine, name, message):
    with pytest.raises(InputError, match=message):
        adopt(machine | {"KARIKOMI_CREDENTIALS": name})


def test_a_profile_is_not_overruled_by_the_machines_own_keys():
    environment = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "KARIKOMI_CREDENTIALS": "profile:retail"}
    adopt(environment)
    assert {name for name in environment if name.startswith("AWS_")} == {"AWS_PROFILE"}


def test_a_worker_without_the_keys_is_nobody_not_somebody_else(s3, monkeypatch, capsys):
    monkeypatch.setenv("KARIKOMI_CREDENTIALS", "environment:NOT_HERE")
    for name in s3.environment():
        monkeypatch.setenv(name, os.environ[name])  # the owner's: it must not be used
    adopt_in_worker()
    try:
        with pytest.raises(InputError, match="no credentials") as refused:
            open_store(s3.make_prefix()).get("x")
        assert "NOT_HERE_AWS_ACCESS_KEY_ID" in str(refused.value.__cause__)
    finally:
        os.environ.pop("AWS_PROFILE", None)
    assert "NOT_HERE_AWS_SECRET_ACCESS_KEY" in capsys.readouterr().err


def test_a_submitted_jobs_workers_are_not_told_twice(monkeypatch):
    name = "KARIKOMI_CREDENTIALS"
    monkeypatch.setenv(name, "environment:RETAIL")
    assert worker_environment()["env_vars"][name] == "environment:RETAIL"
    submitted = {"runtime_env": {"env_vars": {name: "environment:RETAIL"}}}
    monkeypatch.setenv(SUBMITTED, json.dumps(submitted))
    assert name not in worker_environment()["env_vars"]
    assert worker_environment()["worker_process_setup_hook"], "the workers adopt it all the same"
    monkeypatch.setenv(SUBMITTED, "{}")
    assert name in worker_environment()["env_vars"]


class Cloud(BaseHTTPRequestHandler):
    """Amazon's two services that give a role: STS, and the metadata of an instance."""

    def do_GET(self):
        if self.path.endswith("security-credentials/"):
            self.answer(b"instance")
        else:
            until = (datetime.now(UTC) + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
            keys = {"AccessKeyId": "machine", "SecretAccessKey": "m", "Token": "t", "Expiration": until}
            self.answer(json.dumps(keys | {"Code": "Success", "Type": "AWS-HMAC"}).encode())

    def do_PUT(self):
        self.answer(b"metadata-token")

    def do_POST(self):
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.asked.append(asked + self.headers.get("Authorization", ""))
        kind = "AssumeRoleWithWebIdentity" if "WebIdentity" in asked else "AssumeRole"
        until = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
        self.answer(
            f'<{kind}Response xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><{kind}Result><Credentials>'
            f"<AccessKeyId>assumed</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken>"
            f"<Expiration>{until}</Expiration></Credentials></{kind}Result></{kind}Response>".encode()
        )

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-aws-ec2-metadata-token-ttl-seconds", "300")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def cloud():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Cloud)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("pod", [True, False])
def test_a_role_is_assumed_by_what_the_machine_is(cloud, tmp_path, pod):
    url = f"http://127.0.0.1:{cloud.server_port}"
    (tmp_path / "token").write_text("the pod's own token")
    program = """
        import boto3
        from cluster.credentials import adopt
        adopt()
        print(boto3.session.Session().get_credentials().get_frozen_credentials().access_key)
    """
    plain = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment = plain | {
        "HOME": str(tmp_path), "AWS_REGION": "us-east-1", "AWS_ENDPOINT_URL_STS": url,
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": url, "KARIKOMI_CREDENTIALS": f"role:{ROLE}",
    }  # fmt: skip
    environment |= {"AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "token")} if pod else {}
    code = "\n".join(line.strip() for line in program.splitlines())
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "assumed", done.stderr
    assert "karikomi-retail" in cloud.asked[0]
    assert ("Credential=machine/" in cloud.asked[0]) != pod, "an instance signs with its own keys"


WORKERS = """
import json, os, sys
import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util import state
from cluster.credentials import adopt
from cluster.session import session
from cluster.spec import ClusterSpec
from cluster.storage import open_store

def seen():
    open_store(os.environ["PLACE"]).put(f"by-{os.getpid()}", b"x")
    return os.environ.get("AWS_ACCESS_KEY_ID")

@ray.remote
def task():
    return seen()

@ray.remote
class Actor:
    def look(self):
        return seen()

def loop(config):
    assert os.environ["AWS_ACCESS_KEY_ID"] == config["wanted"]
    seen()

adopt()
found = {"driver": seen()}
if sys.argv[3] == "attached":
    with session(ClusterSpec(address=sys.argv[1]), 2):
        print(json.dumps(found | {"task": ray.get(task.remote())}))
    sys.exit()
with session(ClusterSpec(address=sys.argv[1]), 2):
    found["task"] = ray.get(task.remote())
    actor = Actor.remote()
    found["actor"] = ray.get(actor.look.remote())
    trainer = TorchTrainer(
        loop, train_loop_config={"wanted": found["driver"]}, scaling_config=ScalingConfig(num_workers=1),
        torch_config=TorchConfig(backend="gloo"), run_config=RunConfig(storage_path=sys.argv[2], name="t"),
    )
    trainer.fit()
    found["train"] = "done"
    context = ray.get_runtime_context()
    found["told"] = [str(context.runtime_env)]
    found["told"] += [str(one) for one in state.list_jobs(detail=True)]
    found["told"] += [str(one) for one in state.list_workers(detail=True)]
    found["told"] += [str(one) for one in state.list_tasks(detail=True)]
    found["told"] += [str(one) for one in state.list_actors(detail=True)]
    found["told"] += [str(one) for one in state.list_runtime_envs(detail=True)]
print(json.dumps(found))
"""


@pytest.fixture
def short():
    """Ray's sockets need short paths."""
    with tempfile.TemporaryDirectory(prefix="kk-") as directory:
        yield Path(directory)


def test_every_worker_is_the_tenant_and_nobody_is_told_the_secret(s3, short):
    """A cluster that is there already, whose machines keep the keys; a driver that attaches and tells only the name."""
    owner = s3.environment()
    keys = {f"RETAIL_{name}": owner[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    plain = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    machine = plain | keys | {
        "AWS_ENDPOINT_URL_S3": s3.endpoint, "AWS_REGION": "us-east-1", "PLACE": s3.make_prefix(),
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_TRAIN_V2_ENABLED": "1",
    }  # fmt: skip
    head = subprocess.Popen(
        [sys.executable, "-c", HEAD, str(short / "ray")],
        env=machine,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address = head.stdout.readline().strip()
        mine = machine | {"KARIKOMI_CREDENTIALS": "environment:RETAIL"}
        attached = drive(address, short, "attached", mine)
        job = {"runtime_env": {"env_vars": {"KARIKOMI_CREDENTIALS": "environment:RETAIL"}}}  # as Ray tells a driver
        found = drive(address, short, "submitted", mine | {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job)})
    finally:
        head.stdin.close()
        head.wait(60)
    told = found.pop("told")
    key = owner["AWS_ACCESS_KEY_ID"]
    assert attached == {"driver": key, "task": key}
    assert found == {"driver": key, "task": key, "actor": key, "train": "done"}
    assert len(told) > 5
    assert any("environment:RETAIL" in one for one in told), "the name is what travels"
    assert owner["AWS_SECRET_ACCESS_KEY"] not in " ".join(told)
    written = [path for path in short.rglob("*") if path.is_file()]
    assert not [path for path in written if owner["AWS_SECRET_ACCESS_KEY"].encode() in path.read_bytes()]


def drive(address, directory, how, environment):
    done = subprocess.run(
        [sys.executable, "-c", WORKERS, address, str(directory), how],
        env=environment, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


HEAD = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": True, "temp_dir": sys.argv[1]})
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
