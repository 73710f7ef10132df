"""What rayjob.yaml asks of Ray, asked of a real cluster: who drives, what is retried, where the run ends up."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import requests
import yaml
from clusters_for_tests import NodeOf, RayCluster
from models_for_tests import write_tiny_model

from cluster.storage import open_store
from jobs.job import read_job
from jobs.records import read_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
WITHIN = 400  # seconds, for a job on a busy machine
PARTS = {"calibration": [0, 0.3], "tuning": [0.3, 0.4], "evaluation": [0.8, 1]}


@pytest.fixture(scope="module")
def rayjob():
    documents = yaml.safe_load_all((ROOT / "cluster/deploy/kuberay/rayjob.yaml").read_text())
    [found] = [one["spec"] for one in documents if one["kind"] == "RayJob"]
    return found


@pytest.fixture(scope="module")
def cluster(rayjob):
    """A head with nothing, a driver's node and two others, with the resources that the file gives them."""
    [driver] = [one for one in rayjob["rayClusterSpec"]["workerGroupSpecs"] if one["groupName"] == "driver"]
    resources = {name: float(amount) for name, amount in driver["resources"].items() if name != "CPU"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with RayCluster(
        NodeOf(cpus=2, resources=resources, labels=driver["labels"]),
        NodeOf(cpus=4),
        environment={"PYTHONPATH": str(ROOT), "PATH": path},
    ) as one:
        yield one


def write_job(folder: Path, **changes) -> Path:
    source = {"source": "builtin:python-docs", "length": 32}
    job = {
        "name": "tiny",
        "model": str(write_tiny_model(folder / "model", layers=1)),
        "target": {"pattern": "2:4", "sparsity": 0.5},
        "publish": {"to": str(folder / "out")},
        "cluster": {"address": "auto", "workers": 2},
        "data": {
            role: source | {"part": part} | ({} if role == "tuning" else {"windows": 4}) for role, part in PARTS.items()
        },
    } | changes
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def carry_out(cluster, rayjob, job: Path) -> dict:
    """Hands the file's entrypoint in as KubeRay would, waits for its end, and gives Ray's record of it."""
    command = rayjob["entrypoint"].split()
    assert command[:3] == ["again-when-lost", "karikomi", "run"]
    again = ROOT / "cluster/deploy/image/again-when-lost"
    order = {
        "entrypoint": f"{again} {sys.executable} -m jobs.cli run {job}",
        "entrypoint_num_cpus": rayjob["entrypointNumCpus"],
        "entrypoint_resources": json.loads(rayjob["entrypointResources"]),
        "runtime_env": yaml.safe_load(rayjob["runtimeEnvYAML"]),
    }
    headers = {"Authorization": f"Bearer {cluster.token}"}
    reply = requests.post(f"{cluster.url}/api/jobs/", json=order, headers=headers, timeout=60)
    reply.raise_for_status()
    name = reply.json()["submission_id"]
    deadline = time.monotonic() + WITHIN
    while True:
        found = requests.get(f"{cluster.url}/api/jobs/{name}", headers=headers, timeout=60).json()
        if found["status"] in ("SUCCEEDED", "FAILED", "STOPPED"):
            logs = requests.get(f"{cluster.url}/api/jobs/{name}/logs", headers=headers, timeout=60).json()["logs"]
            return found | {"logs": logs}
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


def test_a_run_ends_in_the_store_and_its_driver_is_not_on_the_head(cluster, rayjob, tmp_path):
    job = write_job(tmp_path)
    ended = carry_out(cluster, rayjob, job)
    assert (ended["status"], ended["driver_exit_code"]) == ("SUCCEEDED", 0), ended["logs"]
    order = read_job(job)
    run = read_run(open_store(order.publish.to), order.run)
    assert [one.ended.result for one in run.attempts] == ["done"]
    assert run.attempts[0].started.cluster == "auto"
    headers = {"Authorization": f"Bearer {cluster.token}"}
    listing = requests.get(f"{cluster.url}/api/v0/nodes?detail=1", headers=headers, timeout=60).json()
    labelled = {
        one["node_id"] for one in listing["data"]["result"]["result"] if one["labels"].get("karikomi") == "driver"
    }
    assert {ended["driver_node_id"]} == labelled


def test_bad_input_is_tried_once_and_named(cluster, rayjob, tmp_path):
    ended = carry_out(cluster, rayjob, write_job(tmp_path, model=str(tmp_path / "no-model")))
    assert (ended["status"], ended["driver_exit_code"]) == ("FAILED", 2), ended["logs"]
    assert ended["logs"].count("error:") == 1
    assert "no-model" in ended["logs"]
    assert "attempt 2" not in ended["logs"]
