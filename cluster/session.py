"""Attach to a Ray cluster, or start the embedded one; reserve a gang of workers, or say why not."""

import json
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from cluster.credentials import for_workers
from cluster.disk import is_full, not_written
from cluster.errors import Cancelled, Unavailable
from cluster.freed import ALLOCATOR
from cluster.spec import ClusterSpec

WORKER_ENVIRONMENT = ALLOCATOR | {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray's name for what it tells the driver of a submitted job about it

# Ray ends a worker process that is idle for a second; the next task then waits 3 s for imports.
KEEP_WORKERS = {"idle_worker_killing_time_threshold_ms": 60_000}

# Ray repeats a task that it killed for memory without end; so the run would hang instead of saying why.
BOUNDED_RETRIES = {"task_oom_retries": 5}

LOOK_AGAIN = 1.0  # seconds between looks at whether the user gave up waiting


@contextmanager
def session(spec: ClusterSpec, cpus: int) -> Iterator[None]:
    """Connects to Ray for the length of a run.

    Args:
        spec: which cluster.
        cpus: CPUs that the run will ask for at once; the embedded cluster has at least as many slots.

    Raises:
        Unavailable: the cluster does not answer.
    """
    if ray.is_initialized():  # a notebook's or a test's own cluster
        yield
        return
    embedded = spec.address == "embedded"
    if embedded:  # its token lives and dies with it
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(
            address="local" if embedded else spec.address,
            num_cpus=max(os.cpu_count() or 1, cpus) if embedded else None,
            include_dashboard=False if embedded else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
            runtime_env=worker_environment(),
            _system_config=KEEP_WORKERS | BOUNDED_RETRIES if embedded else None,
        )
    except Exception as error:
        if not isinstance(error, OSError | RuntimeError) and type(error) is not Exception:
            raise  # Ray says with a plain Exception that a node did not start in time
        if is_full(error):
            raise not_written("Ray's temporary directory (RAY_TMPDIR)", error) from error
        raise Unavailable(
            f"no Ray cluster at {spec.address}: {error}",
            "Check cluster.address, or leave it out for the embedded one.",
        ) from error
    if threading.current_thread() is threading.main_thread():  # Ray takes SIGTERM for itself; whoever had it keeps it
        for number, handler in handlers.items():
            signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def worker_environment() -> dict[str, Any]:
    """The runtime environment of all tasks, actors and training ranks; a tenant's credentials only by their name.

    Ray refuses to be given a variable again that this process was submitted with as a cluster's job.
    """
    job = json.loads(os.environ.get(SUBMITTED, "{}"))
    told = (job.get("runtime_env") or {}).get("env_vars") or {}
    tenant = for_workers()
    mine = WORKER_ENVIRONMENT | tenant.get("env_vars", {})
    return tenant | {"env_vars": {name: value for name, value in mine.items() if name not in told}}


@contextmanager
def gang(spec: ClusterSpec, cpus_per_worker: int, stop: Callable[[], bool]) -> Iterator[PlacementGroup]:
    """Reserves one bundle per worker, all or none, and gives them back at the end.

    Raises:
        Unavailable: they cannot be had within `spec.wait_seconds`; says what was asked and what there is.
        Cancelled: `stop` said so while waiting.
    """
    bundle = {"CPU": float(cpus_per_worker)}
    if spec.gpus_per_worker:
        bundle["GPU"] = spec.gpus_per_worker
    group = placement_group([bundle] * spec.workers, strategy="SPREAD")
    try:
        deadline = time.monotonic() + spec.wait_seconds
        while not group.wait(min(spec.wait_seconds, LOOK_AGAIN)):
            if stop():
                raise Cancelled("stopped while waiting for machines")
            if time.monotonic() > deadline:
                raise Unavailable(
                    shortage(bundle, spec.workers, ray.cluster_resources(), ray.available_resources()),
                    f"Ask for less (cluster.workers is {spec.workers}), or run it again when machines are free.",
                )
        yield group
    finally:
        remove_placement_group(group)


def shortage(bundle: dict[str, float], workers: int, total: dict[str, float], free: dict[str, float]) -> str:
    """What was asked, what there is and what is taken, in one sentence."""
    parts = [
        f"{name}: asked {workers} x {amount:g}, cluster has {total.get(name, 0):g}, free {free.get(name, 0):g}"
        for name, amount in bundle.items()
    ]
    return f"no room for {workers} workers ({'; '.join(parts)})"
