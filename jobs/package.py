"""What travels to a cluster with a run (the three rooms and the job file, some 300 KiB), and how it is started."""

import json
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import cluster
import jobs
import workflows
from cluster.ray_facts import RayNode
from cluster.ray_jobs import Entrypoint
from cluster.version import VERSION
from jobs.admission import Admission
from jobs.explaining import ASKS, LABELS, asked
from jobs.job import Job, dump_job
from jobs.notifying import RETRIES_LEFT
from jobs.records import Started

JOB_FILE = "job.yaml"
DRIVER_CPUS = 1.0
DRIVER_LABEL = ("karikomi", "driver")
LEFT_BEHIND = shutil.ignore_patterns("__pycache__", "deploy", "examples")


@contextmanager
def packed(job: Job) -> Iterator[Path]:
    """A directory with the package and the job, for as long as the block goes on.

    Ray names it by its content: what is on the cluster already is not sent again.
    """
    with tempfile.TemporaryDirectory(prefix="karikomi-") as temporary:
        directory = Path(temporary)
        for room in (jobs, workflows, cluster):
            source = Path(room.__path__[0])
            shutil.copytree(source, directory / source.name, ignore=LEFT_BEHIND)
        (directory / JOB_FILE).write_bytes(dump_job(job))
        yield directory


@contextmanager
def entrypoint(
    admission: Admission, started: Started, nodes: Sequence[RayNode], retries: int = 0
) -> Iterator[tuple[Entrypoint, str]]:
    """What is submitted for an attempt, and where its driver will run, in words; its directory lives with the block.

    Args:
        admission: the job, and what its driver takes.
        started: the attempt.
        nodes: of the cluster.
        retries: how often whoever submits will try again when machines are lost; only the last such loss is told.
    """
    labels, where = place_of_driver(nodes)
    asks = {"CPU": DRIVER_CPUS} | admission.resources
    told = {
        "RAY_JOB_STOP_WAIT_TIME_S": str(admission.job.cluster.grace_seconds),
        "KARIKOMI_DRIVER_CPUS": f"{DRIVER_CPUS:g}",  # see cluster/remote.py
        RETRIES_LEFT: str(retries),
    }
    with packed(admission.job) as directory:
        entry = Entrypoint(
            name=started.attempt,
            command=f"python -m jobs.driver {JOB_FILE} --attempt {shlex.quote(started.attempt)}",
            directory=directory,
            environment=told | admission.environment,
            cpus=DRIVER_CPUS,
            resources=admission.resources,
            labels=labels,
            metadata={
                "karikomi": VERSION, "run": started.run, "tenant": started.tenant, "by": started.by,
                ASKS: json.dumps(asks), LABELS: json.dumps(labels), RETRIES_LEFT: str(retries),
            },
        )  # fmt: skip
        yield entry, f"Its driver takes {asked(asks)}, {where}."


def place_of_driver(nodes: Sequence[RayNode]) -> tuple[dict[str, str], str]:
    """Labels that keep a driver off the head, and where that puts it, in words."""
    key, value = DRIVER_LABEL
    if any(node.labels.get(key) == value for node in nodes):
        return {key: value}, f"on a node labelled {key}={value}"
    head = next((node for node in nodes if node.head), None)
    if head is not None and len(nodes) > 1:
        return {"ray.io/node-id": f"!{head.node_id}"}, "on any node but the head"
    return {}, "wherever there is room, the head included: the cluster has no other node now"
