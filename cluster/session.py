"""Attach to a Ray cluster, or start the embedded one."""

import json
import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from cluster.credentials import for_workers
from cluster.disk import is_full, not_written
from cluster.errors import Unavailable
from cluster.freed import ALLOCATOR
from cluster.spec import ClusterSpec

WORKER_ENVIRONMENT = ALLOCATOR | {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray's name for what it tells the driver of a submitted job about it

# Ray ends a worker process that is idle for a second; the next task then waits 3 s for imports. And it starts some at
# once, without our environment, which nothing of ours can run in: half a second of CPU each.
WORKER_PROCESSES = {"idle_worker_killing_time_threshold_ms": 60_000, "prestart_worker_first_driver": False}

# Ray repeats a task that it killed for memory without end; so the run would hang instead of saying why.
BOUNDED_RETRIES = {"task_oom_retries": 5}


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
            _system_config=WORKER_PROCESSES | BOUNDED_RETRIES if embedded else None,
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
